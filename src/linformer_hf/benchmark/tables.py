"""Tables and plots of a benchmark's results, beside the paper's Table 3."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.reporting import markdown_table, save_figure
from .encoders import FLOOR, OURS
from .published import TABLE_3


BASELINE = "roberta eager"
# Beyond this, N is long enough for the part of the cost that grows with it to be all of it.
LONG = 4096


def reference(cases: dict[str, Any], fails: Sequence[str]) -> Iterator[str]:
    """Our cases that passed their check."""
    for name in cases:
        if name.startswith(f"{OURS}, K") and name not in fails:
            yield name


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of a straight line through the logarithms of (N, value); None for fewer than two points."""
    if len(points) < 2:
        return None
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def split_k(name: str) -> tuple[str, int | None]:
    """("linformer", 256) of "linformer, K = 256"."""
    encoder, _, k = name.partition(", K = ")
    return encoder, int(k) if k else None


def ratios(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Our case -> other case -> its CPU (one thread) or wall time over ours; an other with a K beside the same K."""
    clock = "cpu_s" if row["threads"] == 1 else "wall_s"
    found: dict[str, dict[str, float]] = {}
    for ours in reference(row["cases"], row["fails_check"]):
        base, (_, own_k) = row["cases"][ours][clock], split_k(ours)
        found[ours] = {}
        for name, case in row["cases"].items():
            encoder, k = split_k(name)
            if encoder != OURS and k in (None, own_k):
                value = case[clock] / base
                found[ours][encoder] = 1 / value if encoder == FLOOR else value
    return found


def setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["mode"], row["dtype"], row["dropout"], row["fill"], row["threads"], row["allocator"]


def title(key: tuple[Any, ...]) -> str:
    mode, dtype, dropout, fill, threads, allocator = key
    thread = "1 thread, CPU time" if threads == 1 else f"{threads or 'all'} threads, wall time"
    kind = "bfloat16 autocast" if (mode, dtype) == ("training", "bfloat16") else dtype
    rate = f", dropout {dropout:g}" if mode == "training" else ""
    rate += f", {100 * fill:g} % real tokens" if fill < 1 else ""
    return f"{mode}, {kind}{rate}, {thread}, {allocator} malloc"


def tables(content: dict[str, Any]) -> str:
    """Markdown: for every setting times and ratios, then memory, exponents and the paper's Table 3 beside ours."""
    section = content["recipe"]["benchmark"]
    sizes = [content["processor"], f"torch {content['versions']['torch']}"]
    if content.get("device") == "cuda":
        sizes.insert(0, content["device_name"])
    sizes += [f"transformers {content['versions']['transformers']}"]
    sizes += [f"revision {(content['revision'] or 'unknown')[:12]}"]
    blocks = ["; ".join(sizes) + "."]
    rows_of: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in content["timings"]:
        rows_of.setdefault(setting(row), []).append(row)
    for key, rows in rows_of.items():
        blocks.append(f"**{title(key)}**: our time in ms, then each alternative's time over ours\n\n{time_table(rows)}")
        blocks.append(exponents(rows, key[4]))
    if content["memory"]:
        blocks.append(memory_tables(content["memory"]))
    blocks.append(paper_table(content))
    notes = [f"- {name}: {text}" for name, text in content["differences"].items()]
    blocks.append("What remains different:\n\n" + "\n".join(notes))
    marked = sum(case["contended"] for row in content["timings"] for case in row["cases"].values())
    taken = sum(case["samples"] for row in content["timings"] for case in row["cases"].values())
    blocks.append(
        f"{taken:,} samples, {marked:,} of them contended (other processes were busy) and left out where three others "
        f"remain. {section.get('samples', 7)} samples of each case, medians. A case marked ! was contended in most."
    )
    failed = sorted({(name, text) for row in content["timings"] for name, text in row["failed"].items()})
    if failed:
        blocks.append("Failed:\n\n" + "\n".join(f"- {name}: {text}" for name, text in failed))
    return "\n\n".join(block for block in blocks if block)


def time_table(rows: list[dict[str, Any]]) -> str:
    encoders = list(dict.fromkeys(split_k(name)[0] for row in rows for name in row["cases"]))
    others = [name for name in encoders if name not in (OURS, FLOOR)]
    lines: list[list[Any]] = []
    for row in rows:
        clock = "cpu_s" if row["threads"] == 1 else "wall_s"
        for ours, found in ratios(row).items():
            case = row["cases"][ours]
            low, high = case[clock.replace("_s", "_range_s")]
            mark = " !" if 2 * case["contended"] > case["samples"] else ""
            time = f"{1e3 * case[clock]:.4g} ({1e3 * low:.4g} to {1e3 * high:.4g}){mark}"
            lines.append([f"{row['length']:,}", split_k(ours)[1], row["batch"], time])
            lines[-1] += [cell(row, name, found.get(name), split_k(ours)[1]) for name in (*others, FLOOR)]
        for name in row["fails_check"]:
            lines.append([f"{row['length']:,}", split_k(name)[1], row["batch"], "fails its check: no ratio"])
            lines[-1] += [""] * (len(others) + 1)
    return markdown_table(["N", "K", "rows", "ours, ms", *others, "ours / matmul floor"], lines)


def cell(row: dict[str, Any], encoder: str, ratio: float | None, k: int | None) -> str:
    """A ratio, marked if that encoder's samples were contended."""
    if ratio is None:
        return ""
    case = row["cases"].get(f"{encoder}, K = {k}") or row["cases"][encoder]
    return f"{ratio:.2f}" + (" !" if 2 * case["contended"] > case["samples"] else "")


def exponents(rows: list[dict[str, Any]], threads: int) -> str:
    clock = "cpu_s" if threads == 1 else "wall_s"
    found = []
    for name in dict.fromkeys(name for row in rows for name in row["cases"]):
        points = [
            (row["length"], row["cases"][name][clock] / row["batch"])
            for row in rows
            if name in row["cases"] and name not in row["fails_check"] and row["length"] >= LONG
        ]
        slope = exponent(points)
        if slope is not None and not name.startswith(FLOOR):
            found.append(f"{name} {slope:.2f}")
    return f"Time grows with N to the power (from {LONG:,} tokens on): {'; '.join(found)}." if found else ""


def memory_tables(memory: list[dict[str, Any]]) -> str:
    blocks: list[str] = []
    rows_of: dict[tuple[str, str, float, float], list[dict[str, Any]]] = {}
    for row in memory:
        rows_of.setdefault((row["mode"], row["dtype"], row["dropout"], row["fill"]), []).append(row)
    for (mode, dtype, dropout, fill), rows in rows_of.items():
        names = list(dict.fromkeys(name for row in rows for name in row["cases"]))
        lines = []
        for row in rows:
            cells: list[Any] = [f"{row['length']:,}", row["batch"]]
            for name in names:
                case = row["cases"].get(name, {})
                peak = case.get("peak_bytes")
                cells.append("failed" if "failed" in case else f"{peak / case['input_bytes']:.2f}" if peak else "")
            lines.append(cells)
        slopes = []
        for name in names:
            points = [(row["length"], row["cases"].get(name, {}).get("peak_bytes")) for row in rows]
            slope = exponent([point for point in points if point[1]])
            if slope is not None:
                slopes.append(f"{name} {slope:.2f}")
        text = f"**Peak memory above model and input, in inputs** ({mode}, {dtype}, dropout {dropout:g}, fill {fill:g})"
        blocks.append(f"{text}\n\n{markdown_table(['N', 'rows', *names], lines)}")
        if slopes:
            blocks.append(f"It grows with N to the power: {'; '.join(slopes)}.")
    return "\n\n".join(blocks)


def paper_table(content: dict[str, Any]) -> str:
    """Inference, time and memory of the eager baseline over ours, with the paper's cell in brackets."""
    rows = [row for row in content["timings"] if row["mode"] == "inference" and BASELINE in row["cases"]]
    if not rows:
        return ""
    first = setting(rows[0])
    rows = [row for row in rows if setting(row) == first]
    memory = {
        (row["length"], row["batch"]): row["cases"]
        for row in content["memory"]
        if (row["mode"], row["dtype"], row["dropout"], row["fill"]) == first[:4]
    }
    ks = sorted({split_k(name)[1] or 0 for row in rows for name in reference(row["cases"], ())})
    lines = []
    for row in rows:
        cells: list[Any] = [f"{row['length']:,}"]
        found = ratios(row)
        for k in ks:
            ours = f"{OURS}, K = {k}"
            paper = TABLE_3.get(row["length"], {}).get(k)
            if ours not in found:
                cells.append("")
                continue
            cell = f"{found[ours][BASELINE]:.1f}"
            peaks = memory.get((row["length"], row["batch"]), {})
            over, under = (peaks.get(name, {}).get("peak_bytes") for name in (BASELINE, ours))
            cell += f" / {over / under:.1f}" if over and under else " / "
            cells.append(f"{cell} [{paper[0]:g} / {paper[1]:g}]" if paper else cell)
        lines.append(cells)
    head = f"**Beside the paper's Table 3**: time saved / memory saved against {BASELINE} ({title(first)}) "
    return head + f"[the paper's, on a V100]\n\n{markdown_table(['N', *(f'K = {k}' for k in ks)], lines)}"


def plot(folder: Path, content: dict[str, Any]) -> None:
    """time.png and memory.png: medians against N on logarithmic axes, one panel for each mode and dtype."""
    first = setting(content["timings"][0])[4:]
    timings = [row for row in content["timings"] if setting(row)[4:] == first]
    clock = "cpu_s" if first[0] == 1 else "wall_s"
    label = "CPU time of a call, s" if first[0] == 1 else "time of a call, s"
    _panels(folder / "time.png", timings, lambda case: case.get(clock), label)
    if content["memory"]:
        _panels(
            folder / "memory.png",
            content["memory"],
            lambda case: case["peak_bytes"] / 2**20 if case.get("peak_bytes") else None,
            "peak memory above model and input, MiB",
        )


def _panels(path: Path, rows: list[dict[str, Any]], value: Any, label: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    keys = list(dict.fromkeys((row["mode"], row["dtype"], row["dropout"], row["fill"]) for row in rows))
    figure, all_axes = plt.subplots(
        1, len(keys), figsize=(5.2 * len(keys), 6.8), squeeze=False, layout="constrained", sharey=True
    )
    names = list(dict.fromkeys(name for row in rows for name in row["cases"]))
    encoders = list(dict.fromkeys(split_k(name)[0] for name in names))  # a colour for each, a marker for each K
    ks = list(dict.fromkeys(split_k(name)[1] for name in names))
    for axes, key in zip(all_axes[0], keys, strict=True):
        own = [row for row in rows if (row["mode"], row["dtype"], row["dropout"], row["fill"]) == key]
        for name in names:
            points = [(row["length"], value(row["cases"].get(name, {}))) for row in own]
            points = [point for point in points if point[1]]
            if not points:
                continue
            ours, floor = name.startswith(f"{OURS}, K"), name.startswith(FLOOR)
            style: dict[str, Any] = {
                "linewidth": 2.4 if ours else 1.1,
                "linestyle": ":" if floor else "-" if ours else "--",
            }
            encoder, k = split_k(name)
            style["color"] = "black" if floor else colormaps["tab10"](encoders.index(encoder) % 10)
            slope = exponent(points)
            text = name if slope is None else f"{name} (N$^{{{slope:.2f}}}$)"
            marker = "osD^v"[ks.index(k) % 5]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=text, **style)
        mode, dtype, dropout, fill = key
        kind = f"{mode}, {dtype}, dropout {dropout:g}" + (f", fill {fill:g}" if fill < 1 else "")
        axes.set(xscale="log", yscale="log", xlabel="N, tokens", title=kind)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        lengths = sorted({row["length"] for row in own})
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel(label)
    save_figure(figure, path)
