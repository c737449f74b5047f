"""What a verb shows at its end."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from .renaming import beside


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


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG and close it."""
    from matplotlib import pyplot as plt

    with beside(path) as written:
        figure.savefig(written, dpi=120, format="png")
    plt.close(figure)


def loss_of(perplexity: float) -> float:
    """Nats per token."""
    return math.log(perplexity)


def format_number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(format_number(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
