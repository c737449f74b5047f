"""Tables of what was measured, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(format_number(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def summary_table(content: Mapping[str, Any]) -> str:
    """The measured part of a training's results.json as a table."""
    rows = {**content["metrics"]}
    rows |= {f"{name} (without a model)": value for name, value in (content.get("baselines") or {}).items()}
    rows["steps"] = content["steps"]
    rows["seconds"], rows["of them training"] = content["wall_seconds"], content["train_seconds"]
    rows["peak memory, MiB"] = content["peak_memory_mib"]
    return markdown_table(("", "measured"), [(name.replace("_", " "), value) for name, value in rows.items()])
