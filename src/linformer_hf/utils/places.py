"""What a place on this machine is called in files that may be published: no path in them names a user."""

import re
from pathlib import Path
from typing import Any


# Of the Hub. No recipe, record or page may hold one.
ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def own_name(source: str) -> str:
    """A file's or folder's own name; what else `source` is, such as a name on the Hub, stays as it is."""
    path = Path(source).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else source


def from_home(content: Any) -> Any:
    """Text, or JSON-able data with all that it holds, with the home folder written as `~`.

    What reads a path back expands it; what compares records applies this to both.
    """
    if isinstance(content, dict):
        return {from_home(key): from_home(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [from_home(value) for value in content]
    if isinstance(content, str):
        for home in _homes():
            content = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-]|\.\w)", "~", content)
    return content


def _homes() -> list[str]:
    """The home folder, and where it leads to if it is a link; none where the whole file system, or nothing, is home."""
    try:
        home = Path.home()
    except RuntimeError:
        return []
    return [str(path) for path in dict.fromkeys((home, home.resolve())) if path.is_absolute() and path.name]
