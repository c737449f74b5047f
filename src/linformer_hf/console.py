"""What a verb shows at its end."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from .results import markdown_table


def show(markdown: str) -> None:
    """Print Markdown to stdout: drawn, if a person reads it on a terminal; as it is in a file or a pipe."""
    if sys.stdout.isatty():
        Console().print(Markdown(markdown))
    else:
        print(markdown)


def summary_table(content: Mapping[str, Any]) -> str:
    """The measured part of a training's results.json as a table."""
    rows = {**content["metrics"]}
    rows |= {f"{name} (without a model)": value for name, value in (content.get("baselines") or {}).items()}
    rows["steps"] = content["steps"]
    rows["seconds"], rows["of them training"] = content["wall_seconds"], content["train_seconds"]
    rows["peak memory, MiB"] = content["peak_memory_mib"]
    return markdown_table(("", "measured"), [(name.replace("_", " "), value) for name, value in rows.items()])
