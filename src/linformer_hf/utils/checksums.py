"""Whether files are what was written: sizes and SHA-256 of a folder's files, in a `checksums.json` beside them.

Bits that flip inside weights or prepared rows give a file that still loads. Checkpoints, finished models and prepared
corpora carry the list, written when all else is there, and what reads them compares first (half a second per GB with a
processor's SHA instructions). It finds damage, not forgery: who can change a file can change the list.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .writing import beside


CHECKSUMS_FILE = "checksums.json"
# Trainer writes it beside every model, and nothing that loads a model reads it.
NEVER_READ = "training_args.bin"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write(folder: Path, files: Iterable[Path] | None = None) -> None:
    """List files of `folder`, by default all that it holds, in its checksums.json, which is written last."""
    found = sorted(path for path in (folder.rglob("*") if files is None else files) if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in found
        if path.name not in (CHECKSUMS_FILE, NEVER_READ)
    }
    with beside(folder / CHECKSUMS_FILE) as written:
        written.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path, only: Iterable[str] | None = None) -> str | None:
    """What in `folder` differs from its list, in words; None if nothing does.

    Args:
        only: names of files and folders in it; by default everything that is listed.

    Raises:
        FileNotFoundError: there is no list.
    """
    if not (folder / CHECKSUMS_FILE).exists():
        raise FileNotFoundError(f"{folder} has no {CHECKSUMS_FILE}")
    try:
        listed = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{CHECKSUMS_FILE} cannot be read ({type(error).__name__})"
    if only is not None:
        parts = {name: PurePosixPath(name).parts[0] for name in wanted}
        if missing := set(only) - set(parts.values()):
            return f"{CHECKSUMS_FILE} does not list {', '.join(sorted(missing))}"
        wanted = {name: entry for name, entry in wanted.items() if parts[name] in set(only)}
    for name, (size, digest) in wanted.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{CHECKSUMS_FILE} names {name!r}, which is outside of the folder"
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, {size} were written"
            if sha256(path) != digest:
                return f"{name} is not what was written: its SHA-256 differs from {CHECKSUMS_FILE}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def safer(checkpoint: str, reason: str) -> str:
    """What to do where a model has pickled weights and no others, as a sentence; empty elsewhere.

    Args:
        reason: what transformers says, which knows the files of a repository on the Hub.
    """
    folder = Path(checkpoint)
    unread = " Its weights are pickled, and pickled files are not read: they can run code."
    if "cannot be loaded with `safetensors`" in reason:
        return (
            f"{unread} https://huggingface.co/spaces/safetensors/convert opens a pull request with safe ones in the "
            "repository, which the revision refs/pr/NUMBER reads."
        )
    if not list(folder.glob("pytorch_model*.bin")) or list(folder.glob("*.safetensors")):
        return ""
    return (
        f"{unread} If you trust who made them, write safe ones beside them (weights_only=True, which must stay, lets "
        'torch read tensors and nothing that runs): python -c "import glob, torch; from safetensors.torch import '
        "save_file; weights = {}; [weights.update(torch.load(file, map_location='cpu', weights_only=True)) for file in "
        f"glob.glob({str(folder / 'pytorch_model*.bin')!r})]; save_file({{name: weight.clone() for name, weight in "
        f"weights.items()}}, {str(folder / 'model.safetensors')!r}, {{'format': 'pt'}})\""
    )


def check(folder: str | os.PathLike) -> None:
    """Raise a ValueError if a model's folder has a list and differs from it. Hub names and bare folders pass."""
    if not (Path(folder) / CHECKSUMS_FILE).exists():
        return
    if problem := damage(Path(folder)):
        raise ValueError(
            f"{folder} is damaged: {problem}. Restore it from a copy or make it again; if you changed it on purpose, "
            f"delete {Path(folder) / CHECKSUMS_FILE}."
        )
