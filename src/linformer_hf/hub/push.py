"""`linformer-hf push FOLDER USER/NAME`: a finished model's folder becomes a repository on the Hub, in one commit.

Everything is checked before anything is sent, and what would not load elsewhere is refused. The branch changes with the
commit alone: an upload that breaks off leaves it as it was, and the next one does not send again what has arrived.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports
from yaml import YAMLError

from ..configuration_linformer import AUTO_MAP
from ..utils import checksums
from ..utils.files import CARD_FILE, RECIPE_FILE, RESULTS_FILE
from ..utils.options import Push, takes
from ..utils.places import ACCESS_TOKEN, from_home
from . import sentence_head


CONFIG_FILE = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # what PEFT writes
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model"),
}
# Each of them holds the vocabulary whole; vocab.json does so together with merges.txt.
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model"}
REPORTS = {CARD_FILE, RESULTS_FILE, RECIPE_FILE, "LICENSE", "fidelity.json", "fidelity.md"}
PICTURES = {".png", ".svg", ".jpg"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
SECRET = re.compile(ACCESS_TOKEN.pattern.encode())
PLACEHOLDER = "<this folder or repository>"  # of CARD_TEMPLATE


class PushError(ValueError):
    """What is to be pushed, or where to, is not right; the message names it and the way out."""


@takes(Push)
def push(options: Push) -> str | None:
    """Check a folder and upload it to the Hub: weights, tokenizer, code, model card, results and pictures.

    The folder is what pretrain, finetune, distill, convert or save_pretrained left, with a tokenizer and a model card;
    or an adapter that PEFT saved, with a model card, whose base model is on the Hub.

    Returns:
        The address of the commit; None for a dry run.

    Raises:
        PushError: the folder, the name or the token cannot be used.
        PermissionError: the Hub refuses the token, or the token may not write there.
        ConnectionError: the Hub cannot be reached, or the upload broke off.
    """
    folder, repository, revision = Path(options.folder), options.repository, options.revision
    _check_names(repository, revision)
    files = read_folder(folder, repository)
    place = repository + (f", branch {revision}" if revision else "")
    print(_listing(files, folder))
    total = sum(_size(content) for content in files.values())
    if options.dry_run:
        print(f"Would upload {len(files)} files, {total:,} bytes, to {place}. Nothing was sent.")
        return None
    api = HfApi(token=_token(), library_name="linformer_hf")
    with _explained(api.endpoint, repository, revision):
        commit = _upload(api, repository, files, options.private, revision)
    print(f"{len(files)} files, {total:,} bytes: {api.endpoint}/{repository} at commit {commit}")
    return f"{api.endpoint}/{repository}/commit/{commit}"


def read_folder(folder: Path, repository: str) -> dict[str, Path | bytes]:
    """Name in the repository -> file or content, of all that is to be uploaded.

    Raises:
        PushError: something is missing, damaged, or must not be published.
    """
    if not folder.is_dir():
        raise PushError(f"there is no folder {str(folder)!r}; give the folder of a finished model.")
    try:
        checksums.check(folder)
    except ValueError as error:
        raise PushError(str(error)) from error
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    pickles = [name for name in present if Path(name).suffix in PICKLES and name != checksums.NEVER_READ]
    if pickles:
        raise PushError(
            f"{folder} holds {', '.join(pickles)}: pickled files can run code where they are loaded. Delete them (a "
            "checkpoint-* folder of Trainer is no finished model; push the folder of the run), or save the weights "
            "with model.save_pretrained, which writes safetensors."
        )
    adapter = ADAPTER_FILE in present and CONFIG_FILE not in present
    names = {
        *(_adapter(folder, present) if adapter else _config_and_code(folder, present) | _weights(folder, present)),
        *(TOKENIZER_FILES | REPORTS) & present.keys(),
        *(name for name in present if Path(name).suffix in PICTURES),
    }
    if sentence_head.MODULES_FILE in present and not adapter:
        nested = _sentence_head(folder, present)
        present |= {name: folder / name for name in nested}
        names |= set(nested)
    if not VOCABULARIES & names and not adapter:
        raise PushError(f"{folder} has no tokenizer; write it there with tokenizer.save_pretrained({str(folder)!r}).")
    for name in sorted(names):
        if not present[name].resolve().is_relative_to(folder.resolve()):
            raise PushError(
                f"{folder}/{name} is a link to {present[name].resolve()}, outside of the folder; what is published "
                f"must lie in it: put a copy in the link's place (cp -rL {folder} COPY makes a folder without links)."
            )
    files: dict[str, Path | bytes] = {name: present[name] for name in sorted(names)}
    files[CARD_FILE] = _card(folder, present).replace(PLACEHOLDER, repository).encode()
    for name, content in files.items():
        _check_no_secret(folder, name, content)
        _check_no_home(folder, name, content)
    return files


def _check_names(repository: str, revision: str | None) -> None:
    try:
        if repository.count("/") != 1:
            raise HFValidationError("it must have the form owner/name")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PushError(
            f"{repository!r} is no name of a repository: give your user name or organization, a slash and a name, "
            f"such as jane/linformer-512 ({' '.join(str(error).split()).rstrip('.')})."
        ) from error
    if revision is not None and (not re.fullmatch(r"[\w][\w./-]*", revision) or ".." in revision):
        raise PushError(f"--revision {revision!r} is no name of a branch; use letters, digits, '.', '-', '_' and '/'.")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise PushError(f"--revision {revision} is a commit, which cannot change; name a branch.")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}")
    except ValueError as error:
        again = "save the model again with model.save_pretrained."
        raise PushError(f"{path} is no JSON object ({error}); {again}") from error
    return content


def _config_and_code(folder: Path, present: dict[str, Path]) -> set[str]:
    """config.json and the files that its auto_map needs."""
    if CONFIG_FILE not in present:
        raise PushError(f"{folder} is no model: it has no {CONFIG_FILE}. Give the folder that save_pretrained wrote.")
    config = _json(present[CONFIG_FILE])
    kind = config.get("model_type")
    if kind != "linformer":
        raise PushError(
            f"{folder} holds a model of type {kind!r}, no Linformer; `linformer-hf convert {folder} OUTPUT` makes one."
        )
    auto_map = config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    missing = [name for name in AUTO_MAP if name not in auto_map]
    again = "load it as a class of linformer_hf itself, and save that with model.save_pretrained."
    if missing:
        raise PushError(f"{folder}/{CONFIG_FILE} has no auto_map for {', '.join(missing)}; {again}")
    modules = list({f"{str(target).partition('.')[0]}.py" for target in auto_map.values()})
    names = {CONFIG_FILE, *modules}
    while modules:
        if (module := modules.pop()) in present:
            try:
                imported = {f"{name}.py" for name in get_relative_imports(present[module])} - names
            except ValueError as error:
                raise PushError(f"{present[module]} is not UTF-8 text ({error}); {again}") from error
            names |= imported
            modules += imported
    missing = sorted(names - present.keys())
    if missing:
        raise PushError(f"{folder} lacks {', '.join(missing)}, without which nobody can load the model; {again}")
    return names


def _weights(folder: Path, present: dict[str, Path]) -> set[str]:
    """The weights' file, or the shards and their index; every one is opened."""
    if WEIGHTS_FILE in present and INDEX_FILE in present:  # save_pretrained does not delete the other kind
        raise PushError(
            f"{folder} has weights twice, in {WEIGHTS_FILE} and in the shards of {INDEX_FILE}, and from_pretrained "
            "reads the former. Delete those that are out of date."
        )
    if WEIGHTS_FILE in present:
        names = {WEIGHTS_FILE}
    elif INDEX_FILE in present:
        index = _json(present[INDEX_FILE])
        shards = index.get("weight_map")
        names = {INDEX_FILE, *map(str, shards.values() if isinstance(shards, dict) else ())}
    else:
        raise PushError(f"{folder} has no weights: no {WEIGHTS_FILE} and no {INDEX_FILE}. Is the run finished?")
    missing = sorted(names - present.keys())
    if missing:
        raise PushError(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names; save the model again.")
    for name in names - {INDEX_FILE}:
        _check_weights(present[name])
    return names


def _sentence_head(folder: Path, present: dict[str, Path]) -> list[str]:
    """What makes vectors for sentence-transformers; it must fit to the encoder. And the ONNX file that servers read."""
    config = _json(present[CONFIG_FILE])
    try:
        head = sentence_head.read(folder)
        if head is not None and head.width != config.get("hidden_size"):
            raise sentence_head.SentenceHeadError(f"{folder}: the pooling is {head.width} wide, not hidden_size.")
    except sentence_head.SentenceHeadError as error:
        raise PushError(f"{error} Put it right, or delete modules.json to publish the encoder alone.") from error
    onnx = [f"onnx/{path.name}" for path in folder.glob("onnx/model.onnx*")]
    return sentence_head.files(folder) + onnx


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise PushError(f"{path} cannot be read ({error}); save the model again.") from error


def _adapter(folder: Path, present: dict[str, Path]) -> set[str]:
    """An adapter's configuration and weights; the model that it belongs to must be where others find it."""
    base = str(_json(present[ADAPTER_FILE]).get("base_model_name_or_path"))
    if Path(base).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise PushError(
            f"{folder}/{ADAPTER_FILE} has base_model_name_or_path={base!r}, which nobody else can load. Push that "
            f"model first, and write its name on the Hub there and as base_model in {CARD_FILE}."
        )
    if ADAPTER_WEIGHTS not in present:
        raise PushError(f"{folder} has no weights: no {ADAPTER_WEIGHTS}. Save the adapter again with save_pretrained.")
    _check_weights(present[ADAPTER_WEIGHTS])
    return {ADAPTER_FILE, ADAPTER_WEIGHTS}


def _card(folder: Path, present: dict[str, Path]) -> str:
    """The text of the model card, whose metadata huggingface_hub's own classes accept."""
    if CARD_FILE not in present:
        raise PushError(f"{folder} has no model card ({CARD_FILE}); write one with metadata between '---' lines.")
    path = present[CARD_FILE]
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PushError(f"the metadata at the top of {path} cannot be read: {reason}. Correct it.") from error
    for key in ("library_name", "pipeline_tag"):
        if not card.data.get(key):
            raise PushError(
                f"the metadata at the top of {path} has no {key}; write, between two lines '---', "
                "`library_name: transformers` and `pipeline_tag: fill-mask` (or what the model is for)."
            )
    return path.read_text(encoding="utf-8")


def _content(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _check_no_secret(folder: Path, name: str, content: Path | bytes) -> None:
    """A recipe may have held `training.hub_token`, and a command line ends up in results.json."""
    if Path(name).suffix in (".json", ".md", ".py", ".txt", "") and SECRET.search(_content(content)):
        raise PushError(
            f"{folder}/{name} holds what looks like an access token (hf_...); remove it there, and revoke the token "
            "at https://huggingface.co/settings/tokens if anybody else may have read it."
        )


def _check_no_home(folder: Path, name: str, content: Path | bytes) -> None:
    """What this package writes has none; a card of PEFT's, or an older folder, may."""
    if Path(name).suffix in (".json", ".md") and name not in VOCABULARIES:
        text = _content(content).decode(errors="replace")
        if from_home(text) != text:
            raise PushError(
                f"{folder}/{name} holds the path of your home folder ({Path.home()}); write what others know the place "
                "by, or ~, in its stead."
            )


def _token() -> str:
    token = get_token()
    if token is None:
        raise PushError(
            "there is no access token: run `hf auth login`, or set HF_TOKEN to a token with the right to write "
            "(https://huggingface.co/settings/tokens)."
        )
    if not re.fullmatch("[!-~]+", token):  # an HTTP library's own message would repeat it
        raise PushError("the access token has characters that no token has; copy it again (HF_TOKEN, `hf auth login`).")
    return token


def _listing(files: dict[str, Path | bytes], folder: Path) -> str:
    width = max(map(len, files))
    lines = [f"  {name:<{width}}  {_size(content):>15,}" for name, content in files.items()]
    sent = {name.partition("/")[0] for name in files}
    left = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in sent)
    return "\n".join([*lines, *([f"Left out: {', '.join(left)}"] if left else [])])


def _upload(api: HfApi, repository: str, files: dict[str, Path | bytes], private: bool, revision: str | None) -> str:
    """Create what is not there, send the files, commit; the commit's hash."""
    api.create_repo(repository, private=True if private else None, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise PushError(
            f"{repository} is there already and public, so --private would not hide the files. Make it private in its "
            "settings on the Hub, leave --private out, or give another name."
        )
    branch = revision or constants.DEFAULT_REVISION
    if revision is not None and revision != constants.DEFAULT_REVISION:
        api.create_branch(repository, branch=revision, exist_ok=True)
    there = api.list_repo_files(repository, revision=branch)
    operations: list[Any] = [CommitOperationDelete(name) for name in _stale(there, files)]
    operations += [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(repository, operations, commit_message="Upload with linformer-hf push", revision=branch)
    return commit.oid


def _stale(there: Iterable[str], files: dict[str, Path | bytes]) -> list[str]:
    """Weights and modules of an earlier push under names that are not used any more: they might be loaded instead."""
    pattern = re.compile(
        r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|modules\.json|\d+_[A-Z]\w+/.+|onnx/model\.onnx.*"
    )
    return [name for name in there if pattern.fullmatch(name) and name not in files]


@contextlib.contextmanager
def _explained(endpoint: str, repository: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises, as one message with a way out."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.") from error
    except HfHubHTTPError as error:
        raise _answer(error, repository, revision) from error
    except (HTTPError, OSError) as error:  # OSError: hf_xet has errors of its own
        raise ConnectionError(_broken_off(endpoint, repository, error)) from error
    except RuntimeError as error:  # what a file's upload ends with, whatever the reason
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise _answer(cause, repository, revision) from error
        raise ConnectionError(_broken_off(endpoint, repository, cause)) from error


def _broken_off(endpoint: str, repository: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"the push to {repository} broke off, since the connection to {endpoint} failed ({reason}). The branch is as "
        "it was or, if only the last answer got lost, has the whole commit. Check the network and run the same command "
        "again: files that have arrived are not sent twice."
    )


def _answer(error: HfHubHTTPError, repository: str, revision: str | None) -> Exception:
    status = error.response.status_code
    said = " ".join((error.server_message or error.response.reason_phrase).split())
    if status == 401:
        return PermissionError(
            f"the Hub does not accept the access token (HTTP 401: {said}). Log in again with `hf auth login`, or set "
            "HF_TOKEN to a valid one; HF_TOKEN comes before the login (https://huggingface.co/settings/tokens)."
        )
    if status == 403:
        return PermissionError(
            f"the access token may not write to {repository} (HTTP 403: {said}). Use a token with the right to write, "
            "and a name under your own user or an organization of yours; `hf auth whoami` says who you are."
        )
    if status == 404:
        what = f"{repository}, branch {revision}" if revision else repository
        return PushError(
            f"the Hub has no repository {what}, or the access token may not see it (HTTP 404: {said}). Check the name."
        )
    return ConnectionError(
        f"the Hub answered the push to {repository} with HTTP {status} ({said}). If it names a fault, put it right; "
        "else run the same command again later: files that have arrived are not sent twice."
    )
