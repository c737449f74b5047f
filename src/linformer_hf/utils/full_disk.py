"""How a full disk or quota appears, which is different for every writer."""

import errno
import os


NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEXTS = (
    *(f"os error {number}" for number in NUMBERS),  # safetensors and tokenizers (Rust)
    *(os.strerror(number) for number in NUMBERS),
    "PytorchStreamWriter failed",  # torch.save
    "unexpected pos",
    "iostream error",
)


class DiskFull(OSError):
    """A full disk, as a sentence that says where, what is whole, and the way out."""


def reason(error: BaseException) -> str | None:
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
