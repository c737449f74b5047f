"""Tables and plots of a benchmark's results, beside the paper's Table 3.

A row is what was measured of one encoder with one K (None where it has none) in one setting at one length.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

import numpy as np

from ..utils.figures import new_figure, save_figure
from ..utils.reporting import markdown_table
from .encoders import FLOOR, OURS
from .published import TABLE_2, TABLE_3


BASELINE = "roberta eager"
# Beyond this, N is long enough for the part of the cost that grows with it to be all of it.
LONG = 4096
WORK = ("mode", "dtype", "dropout", "fill")  # what a row has in common with those that it is compared with,
SETTING = (*WORK, "threads", "allocator")  # and if it is one of time
Row = dict[str, Any]


def grouped(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Values of `fields` -> the rows that have them, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in fields), []).append(row)
    return found


def passed(rows: Iterable[Row]) -> Iterator[Row]:
    """Our rows that were measured and passed their check."""
    return (row for row in rows if row["encoder"] == OURS and not row.get("failed") and not row.get("fails_check"))


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of a straight line through the logarithms of (N, value); None for fewer than two points."""
    return linear_regression(*np.log(points).T.tolist()).slope if len(points) > 1 else None


def exponents(rows: Iterable[Row], value: str, per_row: bool) -> str:
    """`encoder, K = 128 1.02; ...`: the exponent of every encoder's values (over the batch's rows, if asked for)."""
    slopes = {
        name_of(own[0]): exponent([(row["length"], row[value] / (row["batch"] if per_row else 1)) for row in own])
        for own in grouped(rows, "encoder", "k").values()
    }
    return "; ".join(f"{name} {slope:.2f}" for name, slope in slopes.items() if slope is not None)


def name_of(row: Row) -> str:
    return f"{row['encoder']}, K = {row['k']}" if row["k"] else row["encoder"]


def clock(row: Row) -> str:
    """What of a row is compared: CPU time where one thread ran."""
    return "cpu_s" if row["threads"] == 1 else "wall_s"


def beside(rows: Iterable[Row], ours: Row) -> dict[str, Row]:
    """The rows that one of ours is compared with, by encoder: of the same input, with the same K if they have one."""
    return {
        row["encoder"]: row
        for row in rows
        if row["encoder"] != OURS
        and not row.get("failed")
        and (row["length"], row["batch"]) == (ours["length"], ours["batch"])
        and row["k"] in (None, ours["k"])
    }


def ratio(ours: Row, other: Row) -> float:
    """Another's time over ours; of the floor, ours over it."""
    value = float(other[clock(ours)] / ours[clock(ours)])
    return 1 / value if other["encoder"] == FLOOR else value


def title(row: Row) -> str:
    threads = row["threads"]
    thread = "1 thread, CPU time" if threads == 1 else f"{threads or 'all'} threads, wall time"
    kind = "bfloat16 autocast" if (row["mode"], row["dtype"]) == ("training", "bfloat16") else row["dtype"]
    rate = f", dropout {row['dropout']:g}" if row["mode"] == "training" else ""
    rate += f", {100 * row['fill']:g} % real tokens" if row["fill"] < 1 else ""
    return f"{row['mode']}, {kind}{rate}, {thread}, {row['allocator']} malloc"


def tables(content: dict[str, Any]) -> str:
    """Markdown: for every setting times and ratios, then memory, exponents and the paper's Table 3 beside ours."""
    versions = content["versions"]
    sizes = [content["device_name"]] if content.get("device") == "cuda" else []
    sizes += [content["processor"], *(f"{name} {versions[name]}" for name in ("torch", "transformers"))]
    blocks = [f"{'; '.join(sizes)}; revision {(content['revision'] or 'unknown')[:12]}."]
    for rows in grouped(content["timings"], *SETTING).values():
        heading = f"**{title(rows[0])}**: our time in ms, then each alternative's time over ours"
        blocks.append(f"{heading}\n\n{time_table(rows)}")
        long = [row for row in done(rows) if row["length"] >= LONG and not row.get("fails_check")]
        if found := exponents((row for row in long if row["encoder"] != FLOOR), clock(rows[0]), True):
            blocks.append(f"Time grows with N to the power (from {LONG:,} tokens on): {found}.")
    blocks += [memory_table(rows) for rows in grouped(content["memory"], *WORK).values()]
    blocks.append(paper_table(content))
    notes = [f"- {name}: {text}" for name, text in content["differences"].items()]
    blocks.append("What remains different:\n\n" + "\n".join(notes))
    marked, taken = (sum(row[key] for row in done(content["timings"])) for key in ("contended", "samples"))
    blocks.append(
        f"{taken:,} samples, {marked:,} of them contended (other processes were busy) and left out where three others "
        f"remain. {content['recipe']['benchmark'].get('samples', 7)} samples of each case, medians. A case marked ! "
        "was contended in most."
    )
    if failed := sorted({f"- {name_of(row)}: {row['failed']}" for row in content["timings"] if row.get("failed")}):
        blocks.append("\n".join(["Failed:\n", *failed]))
    return "\n\n".join(block for block in blocks if block)


def done(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.get("failed")]


def time_table(rows: list[Row]) -> str:
    encoders = dict.fromkeys(row["encoder"] for row in done(rows))
    others = [name for name in encoders if name not in (OURS, FLOOR)]
    lines: list[list[Any]] = []
    for ours in (row for row in rows if row["encoder"] == OURS):
        lines.append([f"{ours['length']:,}", ours["k"], ours["batch"]])
        if ours["fails_check"]:
            lines[-1] += ["fails its check: no ratio", *[""] * (len(others) + 1)]
            continue
        middle, (low, high) = ours[clock(ours)], ours[clock(ours).replace("_s", "_range_s")]
        lines[-1].append(f"{1e3 * middle:.4g} ({1e3 * low:.4g} to {1e3 * high:.4g}){mark(ours)}")
        for other in map(beside(rows, ours).get, (*others, FLOOR)):
            lines[-1].append(f"{ratio(ours, other):.2f}{mark(other)}" if other else "")
    return markdown_table(["N", "K", "rows", "ours, ms", *others, "ours / matmul floor"], lines)


def mark(row: Row) -> str:
    return " !" if 2 * row["contended"] > row["samples"] else ""


def memory_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(map(name_of, rows)))
    lines = []
    for (length, batch), own in grouped(rows, "length", "batch").items():
        shown = {name_of(row): f"{row['peak_bytes'] / row['input_bytes']:.2f}" for row in done(own)}
        shown |= {name_of(row): "failed" for row in own if row.get("failed")}
        lines.append([f"{length:,}", batch, *(shown.get(name, "") for name in names)])
    text = "**Peak memory above model and input, in inputs** ({mode}, {dtype}, dropout {dropout:g}, fill {fill:g})"
    text = f"{text.format(**rows[0])}\n\n{markdown_table(['N', 'rows', *names], lines)}"
    grows = exponents(done(rows), "peak_bytes", False)
    return f"{text}\n\nIt grows with N to the power: {grows}." if grows else text


Saved = dict[tuple[int, int], float]


def savings(content: dict[str, Any]) -> tuple[Row | None, Saved, Saved]:
    """What we save against BASELINE in inference: a row of the first setting that has it, then time and memory.

    Both by (N, K).
    """
    timings = grouped(done(content["timings"]), "mode", "encoder")
    first = next(iter(timings.get(("inference", BASELINE), [])), None)
    saved: tuple[Saved, Saved] = ({}, {})
    for found, part, fields in zip(saved, ("timings", "memory"), (SETTING, WORK), strict=True):
        rows = [row for row in content[part] if first and all(row[name] == first[name] for name in fields)]
        for ours in passed(rows):
            if base := beside(rows, ours).get(BASELINE):
                value = clock(ours) if part == "timings" else "peak_bytes"
                found[ours["length"], ours["k"]] = base[value] / ours[value]
    return first, *saved


def paper_table(content: dict[str, Any]) -> str:
    """Inference, time and memory of the eager baseline over ours, with the paper's cell in brackets."""
    first, times, memory = savings(content)
    if first is None:
        return ""
    ks = sorted({k for _, k in times})
    lines: list[list[str]] = []
    for n in dict.fromkeys(n for n, _ in times):
        lines.append([f"{n:,}"])
        for k in ks:
            over = f"{memory[n, k]:.1f}" if (n, k) in memory else ""
            paper = TABLE_3.get(n, {}).get(k)
            shown = f"{times[n, k]:.1f} / {over}" if (n, k) in times else ""
            lines[-1].append(f"{shown} [{paper[0]:g} / {paper[1]:g}]" if shown and paper else shown)
    head = f"**Beside the paper's Table 3**: time saved / memory saved against {BASELINE} ({title(first)}) "
    return head + f"[the paper's, on a V100]\n\n{markdown_table(['N', *(f'K = {k}' for k in ks)], lines)}"


def table_2(tasks: Sequence[str]) -> list[str]:
    """The paper's Table 2 for those of the tasks that it has: no block if it has none of them."""
    known = [task for task in tasks if any(task in row for row in TABLE_2.values())]
    rows = [[n, model, *(row[task] for task in known)] for (n, model), row in TABLE_2.items()]
    head = "**The paper's Table 2** (base size, pretrained on BookCorpus and Wikipedia)"
    return [f"{head}\n\n{markdown_table(['N', 'model', *known], rows)}"] if known else []


def plot(folder: Path, content: dict[str, Any]) -> None:
    """time.png and memory.png: medians against N on logarithmic axes, one panel for each mode and dtype."""
    timings = next(iter(grouped(content["timings"], "threads", "allocator").values()))
    label = "CPU time of a call, s" if timings[0]["threads"] == 1 else "time of a call, s"
    _panels(folder / "time.png", timings, clock(timings[0]), 1, label)
    if content["memory"]:
        label = "peak memory above model and input, MiB"
        _panels(folder / "memory.png", content["memory"], "peak_bytes", 2**20, label)


def _panels(path: Path, rows: list[Row], value: str, unit: float, label: str) -> None:
    panels = grouped(rows, *WORK).values()
    figure, all_axes = new_figure((5.2 * len(panels), 6.8), ncols=len(panels), squeeze=False, sharey=True)
    encoders, ks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("encoder", "k"))
    cases = list(grouped(rows, "encoder", "k"))
    for axes, own in zip(all_axes[0], panels, strict=True):
        found = grouped(done(own), "encoder", "k")
        for encoder, k in (case for case in cases if case in found):
            points = [(row["length"], row[value] / unit) for row in found[encoder, k]]
            slope = exponent(points)
            name = name_of(found[encoder, k][0])
            axes.plot(
                *zip(*points, strict=True),
                marker="osD^v"[ks.index(k) % 5],  # a marker for each K, a colour for each encoder
                markersize=4,
                label=name if slope is None else f"{name} (N$^{{{slope:.2f}}}$)",
                linewidth=2.4 if encoder == OURS else 1.1,
                linestyle={OURS: "-", FLOOR: ":"}.get(encoder, "--"),
                color="black" if encoder == FLOOR else f"C{encoders.index(encoder) % 10}",
            )
        text = "{mode}, {dtype}, dropout {dropout:g}" + (", fill {fill:g}" if own[0]["fill"] < 1 else "")
        axes.set(xscale="log", yscale="log", xlabel="N, tokens", title=text.format(**own[0]))
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        lengths = sorted({row["length"] for row in own})
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel(label)
    save_figure(figure, path)
