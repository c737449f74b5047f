"""Files of a run: written beside their place and then renamed, read back with a checksum.

A reader never sees half a file.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checksums
from .places import from_home
from .writing import beside


RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.json"
CURVE_FILE = "curve.png"
CARD_FILE = "README.md"
SUM_KEY = "sha256"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, without the name of the home folder, beside `path`, then rename: nobody sees half a file."""
    with beside(path) as written:
        written.write_text(from_home(text), encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of it as the last key, which `read_json` compares."""
    plain = record(content)
    plain.pop(SUM_KEY, None)  # of a file that was read without `read_json`
    plain[SUM_KEY] = _json_sum(path, plain)
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def record(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of `write_json` holds of `content`, which may be compared with it."""
    return from_home(json.loads(json.dumps(content, default=str)))


def read_json(path: Path, way_out: str, needs: Sequence[str] = ()) -> dict[str, Any]:
    """What `write_json` wrote; a file without a checksum is taken as it is.

    Args:
        way_out: what to do about a damaged file, for the message.
        needs: keys without which it is another file.

    Raises:
        ValueError: the file is damaged, or holds no JSON object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, no JSON object")
        if SUM_KEY in content and content.pop(SUM_KEY) != _json_sum(path, content):
            raise ValueError(f"its content differs from its {SUM_KEY}")
        if missing := set(needs) - content.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {way_out}") from error
    return content


def _json_sum(path: Path, plain: Mapping[str, Any]) -> str:
    """Of content and file name: one file put in another's place is damage too."""
    return hashlib.sha256(json.dumps([path.name, plain], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises into a ValueError that names the checkpoint: few of its errors do.

    A folder with a checksums.json is compared with it first. Raises a FileNotFoundError where there is none.
    """
    check_folder(checkpoint)
    try:
        checksums.check(checkpoint)
        yield
    except Exception as error:  # damaged files set off anything: tokenizers, for one, raises bare Exceptions
        reason = " ".join(str(error).split())
        way_out = checksums.safer(checkpoint, reason)
        raise ValueError(f"the checkpoint {checkpoint!r} cannot be loaded: {reason}{way_out}") from error


def check_folder(name: str) -> None:
    """Raise a FileNotFoundError unless `name` is a folder or may be a name on the Hub; a ValueError for an adapter."""
    if not Path(name).is_dir() and (is_path(name) or Path(name).exists()):
        raise FileNotFoundError(f"there is no folder {name!r}, and a Hub name has the form owner/name.")
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        raise ValueError(
            f"{name!r} holds an adapter, no model: load it with PEFT (AutoPeftModel...), and save what its "
            "merge_and_unload() gives, with the tokenizer, to a folder of its own."
        )


def is_path(name: str) -> bool:
    """Whether it can be the name of a file or folder only: one on the Hub has the form owner/name."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
