"""The claims of the paper, each with a rule that turns results into a verdict.

A rule reads what the verbs left in their results.json and nothing else. The verdicts:

- **holds**, **does not hold**: the rule's words in the report say when;
- **cannot be seen at this scale**: nothing was measured, a run failed, the seeds disagree, the model that others are
  compared with has itself learned too little (LEARNED), or training has not settled (SETTLED): the paper's claims are
  about converged models.

Where seeds are compared, each is compared with the same seed of the reference, so both saw the same rows. A comparison
holds if every seed is within the limit, and does not hold if every seed is beyond it.
"""

from collections.abc import Iterator
from functools import partial
from statistics import mean
from typing import Any

from ..benchmark.published import TABLE_3
from ..benchmark.tables import BASELINE, LONG, exponent, grouped, passed, savings
from ..data.metrics import ERRORS, test_metric
from .verdicts import (
    BAND,
    CLAIMS,
    CLOSE,
    FAILS,
    HOLDS,
    UNSEEN,
    Evidence,
    Kind,
    Seen,
    claim,
    kinds,
    main_kinds,
    mean_over,
    of_each,
    over_sweeps,
    together,
)


__all__ = ["CLAIMS"]

SPECTRUM, SWEEP, TASKS = "Figure 1: spectrum", "Figure 3: perplexity", "Table 2: fine-tuning"
SPEED, THEOREMS = "Table 3 and Figure 2: time and memory", "Theorems 1 and 2"
STEPS = "Sequential steps"
POINTS = 1.0  # of accuracy, in percent
LINEAR = 1.1  # exponent of N
LOW_RANK = 0.625  # halfway between a flat spectrum's share of a quarter of the values, 1/4, and all
Pairs = Iterator[tuple[Kind, Kind, str]]
_CLOSE = f"every seed's perplexity is at most {CLOSE:.0%} above the reference's (does not hold: no seed's)"
_CELLS = "no sweep has these cells"


def _texts(found: dict[str, Any]) -> str:
    return f"`{found['recipe'][found['verb']]['model']}`, {found['texts']} texts"


# -- Figure 1 -----------------------------------------------------------------------------------------------------


@claim(
    "Attention maps are low-rank",
    "Section 3, Figure 1",
    f"in every layer the first N / 4 singular values hold at least {LOW_RANK:g} of the sum: halfway between a flat "
    "spectrum and all",
    SPECTRUM,
    missing="no spectrum at N / 4",
)
def low_rank(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["spectrum"]:
        if found["index"] * 4 == found["length"]:  # the rule is about a quarter of the values
            means = [layer["mean_at_index"] for layer in found["layers"]]
            low, high = min(means), max(means)
            lowest = min(layer["lowest_at_index"] for layer in found["layers"])
            words = f"the first {found['index']} of {found['length']} values hold {low:.2f} to {high:.2f} of the sum"
            words += f" by layer (lowest head and text {lowest:.2f})"
            yield HOLDS if low >= LOW_RANK else FAILS if high < LOW_RANK else UNSEEN, words, _texts(found)


@claim(
    "... so that rank N / 4 is enough for attention's output",
    "ours: what Figure 1 is to justify",
    "the best approximation of rank N / 4 moves every layer's output by at most the recipe's tolerance (10 %)",
    SPECTRUM,
    missing="no spectrum at N / 4",
)
def output_rank(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["spectrum"]:
        k, tolerance = str(found["length"] // 4), found["recipe"]["spectrum"].get("tolerance", 0.1)
        errors = [layer["output_error"][k] for layer in found["layers"] if k in layer["output_error"]]
        if errors:
            above = [str(number) for number, error in enumerate(errors) if error > tolerance]
            words = f"error {min(errors):.3f} to {max(errors):.3f} by layer"
            words += f", above {tolerance:g} in layers {', '.join(above)}" if above else ""
            yield FAILS if above else HOLDS, words, _texts(found)


@claim(
    "Higher layers are more skewed",
    "Figure 1, right",
    "the share of the first values is larger in the upper half of the layers, and largest in the last",
    SPECTRUM,
    missing="no spectrum",
)
def skewed(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["spectrum"]:
        means = [layer["mean_at_index"] for layer in found["layers"]]
        if half := len(means) // 2:
            lower, upper, last = mean(means[:half]), mean(means[-half:]), means[-1]
            words = f"lower half {lower:.3f}, upper half {upper:.3f}, last layer {last:.3f}"
            yield FAILS if upper <= lower else HOLDS if last == max(means) else UNSEEN, words, _texts(found)


# -- Figure 3 -----------------------------------------------------------------------------------------------------


def _shortened(cells: list[Kind], divisor: int) -> Pairs:
    """K = N / divisor against full attention at the same N."""
    if found := main_kinds(cells):
        full, plain = found
        wanted = (plain.type, full.n, plain.sharing, full.n // divisor)
        for cell in cells:
            if (cell.type, cell.n, cell.sharing, cell.k) == wanted:
                yield cell, full, f"K = {cell.k}, N = {cell.n}"


@claim(
    "K = N / 4 is nearly on par with full attention (K = 128 at N = 512)",
    "Figure 3 (a, b)",
    _CLOSE,
    SWEEP,
    missing=_CELLS,
)
@over_sweeps
def quarter(cells: list[Kind]) -> Pairs:
    return _shortened(cells, 4)


@claim(
    "From random weights K = N / 4 is on par: a dense convolution, or a band of single tokens among the K; "
    "of several K their mean",
    "ours: extensions of the paper's section 4",
    f"{_CLOSE}; of all such cells the best is judged",
    SWEEP,
    missing=_CELLS,
)
def quarter_of_ours(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["sweep"]:
        over = [mean_over(found, cell, full) for cell, full, _ in _extended(kinds(found))]
        seen = list(over_sweeps(_extended)({"sweep": [found]}))
        if seen:
            yield min(zip(map(_place, seen), over, seen, strict=True))[2]


def _extended(cells: list[Kind]) -> Pairs:
    """Slots of one size must divide N, so with a band K may be a little below N / 4. Of several K the mean counts."""
    full = next((cell for cell in cells if cell.k == cell.n), None)
    for cell in cells if full else ():
        ours = cell.type.startswith("dense_conv") or BAND.format("") in cell.type
        lengths = cell.k if isinstance(cell.k, list) else [cell.k]
        if full and ours and cell.n == full.n and 0.85 * full.n <= 4 * mean(lengths) <= full.n:
            yield cell, full, f"{cell.type}, K = {', '.join(map(str, lengths))}, N = {cell.n}"


def _place(seen: Seen) -> int:
    """Holds, cannot be seen, does not hold."""
    return (HOLDS, UNSEEN, FAILS).index(seen[0])


@claim("K = N / 2 is nearly on par with full attention", "Figure 3 (a)", _CLOSE, SWEEP, missing=_CELLS)
@over_sweeps
def half(cells: list[Kind]) -> Pairs:
    return _shortened(cells, 2)


@claim(
    "Quality depends on K, not on N",
    "Figure 3 (d)",
    f"at one K, perplexity differs by at most {CLOSE:.0%} between N, either way",
    SWEEP,
    missing=_CELLS,
)
@partial(over_sweeps, both_sides=True)
def by_length(cells: list[Kind]) -> Pairs:
    found, cells = main_kinds(cells), [cell for cell in cells if cell.type == "linear" and cell.k != cell.n]
    for plain in [found[1]] if found else cells[:1]:
        for cell in cells:
            if (cell.k, cell.sharing) == (plain.k, plain.sharing) and cell.n != plain.n:
                yield cell, plain, f"N = {cell.n} over N = {plain.n}, K = {plain.k}"


@claim(
    "Sharing E and F costs little, layerwise included",
    "Section 4, Figure 3 (c)",
    f"{_CLOSE}; the reference shares nothing",
    SWEEP,
    missing=_CELLS,
)
@over_sweeps
def by_sharing(cells: list[Kind]) -> Pairs:
    for base in (cell for cell in cells if (cell.type, cell.sharing) == ("linear", "none")):
        for cell in cells:
            if (cell.type, cell.k, cell.n) == ("linear", base.k, base.n) and cell is not base:
                yield cell, base, f"{cell.sharing} over none"


@claim(
    "Smaller K in higher layers is enough",
    "Section 4, non-uniform projected dimension",
    f"{_CLOSE}; the reference spends as many K on all layers alike",
    SWEEP,
    missing=_CELLS,
)
@over_sweeps
def by_layer(cells: list[Kind]) -> Pairs:
    cells = [cell for cell in cells if cell.type == "linear"]
    for cell in cells:
        if isinstance(cell.k, list):
            for base in cells:
                if (base.n, base.sharing, base.k) == (cell.n, cell.sharing, mean(cell.k)):
                    yield cell, base, f"K = {', '.join(map(str, cell.k))} over {base.k}"


@claim(
    "Pooling and convolution work as projections",
    "Section 4, general projections",
    f"{_CLOSE}; the reference is the learned projection at the same K",
    SWEEP,
    missing=_CELLS,
)
@over_sweeps
def by_type(cells: list[Kind]) -> Pairs:
    if found := main_kinds(cells):
        for cell in cells:
            if cell.type in ("mean_pool", "max_pool", "conv") and (cell.k, cell.n) == (found[1].k, found[1].n):
                yield cell, found[1], f"{cell.type} over linear"


# -- Table 2 ------------------------------------------------------------------------------------------------------


@claim(
    "Fine-tuning is on par",
    "Table 2",
    f"every seed's accuracy is at most {POINTS:g} point below the full model's (does not hold: no seed's is)",
    TASKS,
    missing="no comparison",
)
def fine_tuned(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["compare"]:
        first = next(iter(found["recipe"]["compare"]["checkpoints"]))
        for task, checkpoints in found["tasks"].items():
            base, basis = _accuracy(checkpoints[first]), f"{task}, {len(checkpoints[first]['seeds'])} seeds"
            for name, runs in checkpoints.items():
                own = _accuracy(runs)
                if name != first and (base is None or own is None):
                    yield UNSEEN, f"{name} on {task}: failed", basis
                elif name != first and base and own:
                    points = [100 * (own[seed] - base[seed]) for seed in base]
                    words = f"{mean(points):+.1f} points ({min(points):+.1f} to {max(points):+.1f})"
                    yield of_each([value >= -POINTS for value in points]), f"{name} on {task}: {words}", basis


def _accuracy(runs: dict[str, Any]) -> dict[str, float] | None:
    """Seed -> the first metric; None where a seed failed, nothing where the metric is an error."""
    if any("failed" in run for run in runs["seeds"].values()):
        return None
    metric = test_metric(next(iter(runs["seeds"].values()))["metrics"])
    if metric.removeprefix("test_") in ERRORS:  # no share of right answers: there are no points
        return {}
    return {seed: run["metrics"][metric] for seed, run in runs["seeds"].items()}


# -- Table 3 and Figure 2 -----------------------------------------------------------------------------------------


def _growth(rows: list[dict[str, Any]], value: str, basis: str) -> Iterator[Seen]:
    rows = [row for row in passed(rows) if row["mode"] == "inference" and row["length"] >= LONG]
    for (dtype, k), own in grouped(rows, "dtype", "k").items():
        slope = exponent([(row["length"], row[value] / row["batch"]) for row in own])
        if slope is not None:
            lengths = sorted(row["length"] for row in own)
            words = f"K = {k}, {dtype}: N^{slope:.2f} ({lengths[0]:,} to {lengths[-1]:,})"
            yield HOLDS if slope <= LINEAR else FAILS, words, basis


@claim(
    "Time is linear in N",
    "Table 1, Figure 2",
    f"from {LONG:,} tokens on it grows as N to the power {LINEAR:g} at most",
    SPEED,
    missing=f"no two lengths from {LONG:,} tokens on",
)
def linear_time(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["benchmark"]:
        first = grouped(found["timings"], "threads", "allocator")
        yield from _growth(next(iter(first.values())), "cpu_s", found["processor"])


@claim(
    "Memory is linear in N",
    "Table 1",
    f"from {LONG:,} tokens on its peak grows as N to the power {LINEAR:g} at most",
    SPEED,
    missing=f"no two lengths from {LONG:,} tokens on",
)
def linear_memory(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["benchmark"]:
        yield from _growth(found["memory"], "peak_bytes", found["processor"])


@claim(
    "It saves the time and memory of Table 3",
    "Table 3",
    "every measured cell saves at least what the paper's does",
    SPEED,
    missing=f"no benchmark with {BASELINE}",
)
def table_3(evidence: Evidence) -> Iterator[Seen]:
    cells: dict[str, dict[tuple[int, int], float]] = {"time": {}, "memory": {}}
    bases = []
    for found in evidence["benchmark"]:
        setting, *saved = savings(found)
        if setting:
            bases.append(f"one layer against {BASELINE}, {setting['dtype']}, {found['processor']}")
        for own, values in zip(cells.values(), saved, strict=True):
            own |= {(n, k): value for (n, k), value in values.items() if k in TABLE_3.get(n, {})}
    verdicts, words = [], []
    for place, (what, own) in enumerate(cells.items()):
        below = {(n, k): value for (n, k), value in own.items() if value < TABLE_3[n][k][place]}
        verdicts += [FAILS if below else HOLDS] if own else []
        words += [f"{what}: {len(own) - len(below)} of {len(own)} cells reach the paper's"] if own else []
        words += [
            f"{what} at N = {n}, K = {k}: {value:.2f} against {TABLE_3[n][k][place]:g}"
            for (n, k), value in below.items()
        ]
    if words:
        yield together(verdicts), "; ".join(words), "; ".join(dict.fromkeys(bases))


# -- the theorems and Table 1 -------------------------------------------------------------------------------------


@claim(
    "Theorem 1: a random projection approximates the map",
    "Theorem 1",
    "the measured share of failures is at most the proof's bound wherever that is below 1",
    THEOREMS,
    missing="no theory",
)
def theorem_1(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["theory"]:
        telling = [cell for cell in found["cells"] if cell["bound"] < 1]
        broken = sum(cell["theorem_1_proved_failures"] > cell["bound"] for cell in telling)
        words = f"failures above the proof's bound in {broken} of the {len(telling)} settings where it is below 1"
        words += f" ({len(found['cells'])} settings in all)"
        yield FAILS if broken else HOLDS if telling else UNSEEN, words, _texts(found)


@claim(
    "Theorem 2: so does one with K independent of N",
    "Theorem 2",
    "at the largest K nine of ten errors are at most eps, by the theorem's own measure",
    THEOREMS,
    missing="no theory",
)
def theorem_2(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["theory"]:
        epsilon = found["recipe"]["theory"].get("epsilon", 0.5)
        largest = max(cell["k"] for cell in found["cells"])
        error = max(cell["theorem_2"]["high"] for cell in found["cells"] if cell["k"] == largest)
        words = f"at K = {largest}, nine of ten errors at most {error:.2f} (eps = {epsilon:g})"
        yield HOLDS if error <= epsilon else FAILS, words, _texts(found)


@claim(
    "... and they justify K = N / 4",
    "ours: what the theorems are cited for",
    "at K = N / 4 the proofs' projections have a smaller median error than the answer zero, for every layer and N",
    THEOREMS,
    missing="no theory at K = N / 4",
)
def useful_bound(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["theory"]:
        cells = [cell for cell in found["cells"] if cell["k"] * 4 == cell["n"] and cell["kind"].startswith("layer")]
        first = sum(cell["theorem_1"]["median"] < 1 for cell in cells)
        second = sum(cell["theorem_2"]["median"] < cell["theorem_2_zero"]["median"] for cell in cells)
        words = f"smaller error than the answer zero in {first} (theorem 1) and {second} (theorem 2) of {len(cells)}"
        if cells:
            yield HOLDS if min(first, second) == len(cells) else FAILS, f"{words} settings", _texts(found)


@claim(
    "No sequential step is added",
    "Table 1 (O(1) sequential operations)",
    "the longest chain of operations has the same length at every N",
    STEPS,
    missing="no graph",
)
def no_extra_step(evidence: Evidence) -> Iterator[Seen]:
    for found in evidence["depth"]:
        chains = [f"{name} {_values(found[name.lower()])}" for name in ("Linformer", "full attention")]
        same = len(set(found["linformer"].values())) == 1
        basis = f"exported graph of one layer, N = {', '.join(found['linformer'])}"
        yield HOLDS if same else FAILS, f"longest chain of operations: {', '.join(chains)}", basis


def _values(depths: dict[str, int]) -> str:
    values = set(depths.values())
    return f"{min(values)} at every N" if len(values) == 1 else ", ".join(f"{d} at {n}" for n, d in depths.items())
