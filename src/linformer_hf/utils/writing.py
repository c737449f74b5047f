"""Write beside, then rename; and how a full disk or quota appears, which is different for every writer."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEXTS = (
    *(f"os error {number}" for number in NUMBERS),  # safetensors and tokenizers (Rust)
    *(os.strerror(number) for number in NUMBERS),
    "PytorchStreamWriter failed",  # torch.save
    "unexpected pos",
    "iostream error",
)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends well, and else disappears.

    Whoever reads finds the file that was there before or the whole new one.
    """
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield written
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


class DiskFull(OSError):
    """A full disk, as a sentence that says where, what is whole, and the way out."""


def full_disk(error: BaseException) -> str | None:
    """What a writer said about a full disk, in one line; None for any other error."""
    cause: BaseException | None = error
    seen: list[BaseException] = []  # a chain may lead back to itself
    while cause is not None and not any(cause is one for one in seen):
        seen.append(cause)
        text = " ".join(str(cause).split())
        if getattr(cause, "errno", None) in NUMBERS or any(known in text for known in TEXTS):
            return text
        cause = cause.__cause__ or cause.__context__  # closing a file may fail after writing to it did
    return None
