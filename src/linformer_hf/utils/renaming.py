"""Write beside, then rename: whoever reads finds the file that was there before or the whole new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends well, and else disappears."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield written
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
