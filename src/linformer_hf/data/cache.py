"""The folder of prepared data: made once, found by the checksum of its recipe; in parts, where there is much of it."""

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from ..utils import checksums
from ..utils.processes import forked
from ..utils.writing import DiskFull, full_disk


logger = logging.getLogger(__name__)


def cache_folder(cache_dir: str | None) -> Path:
    return Path(cache_dir or os.environ.get("LINFORMER_HF_CACHE") or Path.home() / ".cache" / "linformer_hf")


def _beside(target: Path) -> str:
    """How the names begin that this machine writes `target` under; another's work is not cleared away."""
    return f".{target.name}.{platform.node()}."


@contextlib.contextmanager
def _room_named(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into a DiskFull that names the folders that are written to."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise DiskFull(
            f"preparing the corpus failed ({reason}): {folder} or {datasets.config.HF_DATASETS_CACHE} is full, and "
            "nothing half was left there. Make room and give the same command again, or set data.cache_dir and the "
            "environment variable HF_DATASETS_CACHE to folders with more of it."
        ) from error


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` when the block ends well. The first process to finish wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=_beside(target), dir=target.parent))
    try:
        yield beside
        checksums.write(beside)
        try:
            os.rename(beside, target)
        except OSError:
            if not target.is_dir():  # else another process has written the same meanwhile
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_whole(folder: Path, only: Iterable[str] | None = None) -> bool:
    """Whether `folder` is there and what it was (of it `only` these files and folders); else the log says why not."""
    if not folder.is_dir():
        return False
    try:
        problem = checksums.damage(folder, only)
    except FileNotFoundError as error:
        problem = str(error)
    if problem:
        logger.warning("The cached %s is damaged (%s): it is made again.", folder, problem)
    return problem is None


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time makes `target`; others wait here. Readers need no lock: a whole folder never changes.

    The system takes the lock from a process that dies, however it dies; what that process was writing is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    try:
        file = _locked(path)
    except OSError as error:  # a file system without locks: then two may prepare the same, and the first one wins
        logger.warning("%s cannot be locked (%s).", target, error.strerror)
        yield
        return
    with file:
        try:
            for half in target.parent.glob(glob.escape(_beside(target)) + "*/"):
                shutil.rmtree(half, ignore_errors=True)
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> Any:
    """The file, opened and locked. Not flock: processes that this one forks would hold on to that."""
    while True:
        with contextlib.ExitStack() as unless_kept:
            file = unless_kept.enter_context(path.open("a"))
            fcntl.lockf(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # else the process that had it has removed it meanwhile
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    unless_kept.pop_all()
                    return file


def made_once(target: Path, write: Callable[[Path, Path | None], None], only: Iterable[str] | None = None) -> None:
    """Make the folder `target`, unless it is there and, as far as it is read (`only`), whole.

    Args:
        write: is given the folder to fill and, where there was a damaged one, where that is now.
    """
    if is_whole(target, only):
        shutil.rmtree(kept_parts(target), ignore_errors=True)  # of one that was killed just before it did so
        return
    with _room_named(target.parent), _alone(target), contextlib.ExitStack() as last:
        if is_whole(target, only):  # another process has made it meanwhile
            return
        damaged = None
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=_beside(target), dir=target.parent))
            last.callback(shutil.rmtree, aside, ignore_errors=True)
            damaged = target.rename(aside / target.name)
        with written_whole(target) as beside:
            write(beside, damaged)
        shutil.rmtree(kept_parts(target), ignore_errors=True)


def kept_parts(target: Path) -> Path:
    """Where the finished parts of `target` lie until it is whole: what a kill leaves of it for the next try."""
    return target.with_name(f".{target.name}.parts")


def in_parts(target: Path, beside: Path, count: int, write: Callable[[int, Path], None], processes: int) -> list[Path]:
    """Fill `count` folders of `beside`, which is to be `target`, by `write(number, folder)`; the folders, in order.

    A single part is written here. Of several, `processes` at a time are written by processes of their own, and those
    that an earlier try has finished are taken as they are. All of it may only depend on what names `target`.
    """
    names = [f"{number:05}" for number in range(count)]
    folders = [beside / "parts" / name for name in names]
    if count == 1:
        folders[0].mkdir(parents=True)
        write(0, folders[0])
        return folders
    kept = kept_parts(target)

    def make(number: int) -> None:
        with written_whole(kept / names[number]) as folder:
            write(number, folder)

    def clear(damaged: Iterable[str] = ()) -> None:
        for half in (*(kept / name for name in damaged), *kept.glob(f".*.{glob.escape(platform.node())}.*")):
            shutil.rmtree(half, ignore_errors=True)

    missing = [number for number, name in enumerate(names) if not is_whole(kept / name)]
    if len(missing) < count:
        logger.info("%s of %s parts of %s are there already", count - len(missing), count, target)
    clear(names[number] for number in missing)
    try:
        with tqdm(total=count, initial=count - len(missing), desc=f"preparing {target.name}", unit="part") as bar:
            forked([partial(make, number) for number in missing], processes, bar.update)
    finally:
        clear()
    for name, folder in zip(names, folders, strict=True):
        shutil.copytree(kept / name, folder, copy_function=_linked)  # a kill from here on loses no part either
    return folders


def _linked(source: str, target: str) -> None:
    """One more name for a file, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def checksum(recipe: Any) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def write_plain_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
