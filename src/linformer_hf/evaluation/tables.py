"""results.json of an evaluation as tables and as a picture; nothing is computed here that it does not hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.figures import new_figure, save_figure, shades
from ..utils.reporting import markdown_table


TABLE_FILE, PLOT_FILE = "long-documents.md", "differences.png"
METRICS = {"first": "found first", "among ten": "among ten", "accuracy": "accuracy"}
MAIN = ("first", "accuracy")
Row = Mapping[str, Any]


def title(row: Row) -> str:
    """A task, with its length if it has one."""
    return row["task"] if row["length"] is None else f"{row['task']}, {row['length']:,} tokens"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def signed(row: Row) -> str:
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def distinct(rows: Sequence[Row], *keys: str) -> list[tuple]:
    """The values of some fields, each combination once, in order."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def pick(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def grid(rows: Sequence[Row], keys: Sequence[str], first: Any, columns: Sequence[str], cell: Any) -> list[list[str]]:
    """Rows of cells: a row for each combination of `keys`, a column for each method; `first` makes the row's head."""
    made = []
    for values in distinct(rows, *keys):
        wanted = dict(zip(keys, values, strict=True))
        found = {name: pick(rows, method=name, **wanted) for name in columns}
        some = next(row for row in found.values() if row is not None)
        made.append([*first(some), *(cell(row) if row is not None else "-" for row in found.values())])
    return made


def markdown(content: Row) -> str:
    """All tables."""
    parts = [
        ("Tasks", tasks_table(content["tasks"])),
        ("One vector for each document", one_vector_table(content)),
        ("Difference from the best pieces, one vector", differences_table(content)),
        ("The best piece of each document", pieces_table(content, "best piece")),
        ("The best piece, half the source's alone and half of one pass", pieces_table(content, "best piece, blended")),
        ("What is left at length", lengths_table(content["over_lengths"])),
        ("Time and memory of one document", costs_table(content)),
    ]
    return "\n\n".join(f"**{name}**\n\n{text}" for name, text in parts if text)


def tasks_table(tasks: Sequence[Row]) -> str:
    header = ("task", "documents", "tokens: median (range)", "queries", "classes", "groups", "what it is")
    rows = []
    for task in tasks:
        tokens = task["tokens"]
        spread = f"{tokens['median']:,.0f} ({tokens['lowest']:,} to {tokens['highest']:,})"
        counts = (task["queries"] or "", len(task["classes"]) or "", task["groups"] or "")
        rows.append((title(task), task["documents"], spread, *counts, task["about"]))
    return markdown_table(header, rows)


def one_vector_table(content: Row) -> str:
    rows = [row for row in content["scores"] if row["view"] == "one vector"]
    found = grid(
        rows,
        ("task", "length", "metric"),
        lambda row: (title(row), METRICS[row["metric"]]),
        content["methods"],
        lambda row: share(row["value"]),
    )
    return markdown_table(("task", "measure", *content["methods"]), found)


def differences_table(content: Row) -> str:
    rows = [row for row in content["differences"] if row["view"] == "one vector"]
    methods = [name for (name,) in distinct(rows, "method")]
    found = grid(
        rows,
        ("task", "length", "metric"),
        lambda row: (title(row), METRICS[row["metric"]], f"{share(row['rival_value'])} ({row['rival']})"),
        methods,
        signed,
    )
    means = {row["method"]: row for row in content["mean_differences"]}
    names = next(iter(means.values()))["tasks"] if means else []
    found.append(
        [f"mean over {len(names)} tasks", "", "", *(signed(means[name]) if name in means else "-" for name in methods)]
    )
    return (
        markdown_table(("task", "measure", "best pieces", *methods), found)
        + "\n\nIn brackets 95 % (paired bootstrap over a search's documents, a probe's groups). In the mean: found "
        "first, accuracy; a task with several lengths counts once, over those that are longer than the source reads."
    )


def pieces_table(content: Row, view: str) -> str:
    rows = [row for row in content["differences"] if row["view"] == view]
    methods = [name for (name,) in distinct(rows, "method")]
    found = grid(
        rows,
        ("task", "length", "metric", "size"),
        lambda row: (title(row), METRICS[row["metric"]], row["size"], share(row["rival_value"])),
        methods,
        lambda row: f"{share(row['value'])}; {share(row['ratio'])}; {signed(row)}",
    )
    if not found:
        return ""
    header = (
        "task",
        "measure",
        "tokens of a piece",
        "source, pieces alone",
        *(f"{name}: value; ratio; difference" for name in methods),
    )
    return markdown_table(header, found)


def lengths_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    methods = [name for (name,) in distinct(rows, "method")]
    found = grid(
        rows,
        ("task", "length", "view", "size"),
        lambda row: (f"{row['task']}, {row['length']:,} / {row['from_length']:,} tokens", view(row)),
        methods,
        lambda row: f"{share(row['ratio'])} ({share(row['value'])} / {share(row['from_value'])})",
    )
    return markdown_table(("task", "view", *methods), found)


def view(row: Row) -> str:
    return row["view"] if row["size"] is None else f"{row['view']}, {row['size']} tokens"


def costs_table(content: Row) -> str:
    rows = []
    for row in content["costs"]:
        low, high = (1000 * value for value in row["wall_range_s"])
        busy = f"{row['contended']} of {row['samples']}"
        rows.append(
            (row["method"], f"{1000 * row['wall_s']:,.0f} ({low:,.0f} to {high:,.0f})", f"{row['peak_mib']:,.0f}", busy)
        )
    tokens = ", ".join(f"{count:,}" for count in content["costs"][0]["tokens"])
    header = ("method", "ms: median (lowest to highest)", "peak memory, MiB", "samples beside other work")
    note = (
        f"Documents of {tokens} tokens, {content['threads']} thread(s), {content['dtype']}, {content['device_name']}; "
        "a document at a time, all methods in turn. Memory is that above the weights."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def plot(path: Path, content: Row) -> None:
    """Each method's difference from the best pieces in every task, one vector, with its interval."""
    rows = [row for row in content["differences"] if row["view"] == "one vector" and row["metric"] in MAIN]
    means = [{"task": "mean over the tasks", "length": None, **row} for row in content["mean_differences"]]
    places = {name: i for i, name in enumerate(dict.fromkeys(title(row) for row in [*rows, *means]))}
    methods = [name for (name,) in distinct(rows, "method")]
    figure, axes = new_figure((7.2, 1.2 + 0.42 * len(places)))
    for number, (method, colour) in enumerate(zip(methods, shades(len(methods), 0.8), strict=True)):
        own = [row for row in [*rows, *means] if row["method"] == method]
        shift = (number - (len(methods) - 1) / 2) * 0.6 / len(methods)
        errors = [[row["difference"] - row["low"] for row in own], [row["high"] - row["difference"] for row in own]]
        heights = [places[title(row)] + shift for row in own]
        axes.errorbar(
            [row["difference"] for row in own],
            heights,
            xerr=errors,
            fmt="o",
            markersize=4,
            capsize=2,
            color=colour,
            label=method,
        )
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(places)), list(places))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="found first, or accuracy: difference from the best pieces (95 %)")
    figure.legend(loc="outside upper center", ncols=min(4, len(methods)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
