"""The claims of the paper, each with a rule that turns results into a verdict.

A rule reads what the verbs left in their results.json and nothing else. The verdicts:

- **holds**, **does not hold**: the rule's words in the report say when;
- **cannot be seen at this scale**: nothing was measured, a run failed, the seeds disagree, the model that others are
  compared with has itself learned too little (LEARNED), or training has not settled (SETTLED): the paper's claims are
  about converged models.

Where seeds are compared, each is compared with the same seed of the reference, so both saw the same rows. A comparison
holds if every seed is within the limit, and does not hold if every seed is beyond it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..benchmark.published import TABLE_3
from ..benchmark.tables import BASELINE, LONG, exponent, ratios, setting, split_k
from ..data.metrics import test_metric
from .verdicts import (
    CLOSE,
    FAILS,
    HOLDS,
    LINEAR,
    LOW_RANK,
    POINTS,
    UNSEEN,
    Claim,
    Evidence,
    Finding,
    Kind,
    kinds,
    main_kinds,
    nothing,
    over_sweeps,
    together,
)


def shortened(divisor: int) -> Callable[[Evidence], Finding]:
    """K = N / divisor against full attention at the same N."""

    def pairs(sweep: dict[str, Any]) -> Iterator[tuple[Kind, Kind, str]]:
        found = main_kinds(sweep)
        if found:
            full, plain = found
            for cell in kinds(sweep):
                wanted = (plain.type, full.n, plain.sharing, full.n // divisor)
                if (cell.type, cell.n, cell.sharing, cell.k) == wanted:
                    yield cell, full, f"K = {cell.k}, N = {cell.n}"

    return lambda evidence: over_sweeps(evidence, pairs)


def by_length(evidence: Evidence) -> Finding:
    def pairs(sweep: dict[str, Any]) -> Iterator[tuple[Kind, Kind, str]]:
        cells = [cell for cell in kinds(sweep) if cell.type == "linear" and not cell.full]
        plain = (main_kinds(sweep) or (None, None))[1] or (cells[0] if cells else None)
        for cell in cells:
            if plain and (cell.k, cell.sharing) == (plain.k, plain.sharing) and cell.n != plain.n:
                yield cell, plain, f"N = {cell.n} over N = {plain.n}, K = {plain.k}"

    return over_sweeps(evidence, pairs, both_sides=True)


def by_sharing(evidence: Evidence) -> Finding:
    def pairs(sweep: dict[str, Any]) -> Iterator[tuple[Kind, Kind, str]]:
        cells = [cell for cell in kinds(sweep) if cell.type == "linear"]
        for base in (cell for cell in cells if cell.sharing == "none"):
            for cell in cells:
                if (cell.k, cell.n) == (base.k, base.n) and cell is not base:
                    yield cell, base, f"{cell.sharing} over none"

    return over_sweeps(evidence, pairs)


def by_layer(evidence: Evidence) -> Finding:
    def pairs(sweep: dict[str, Any]) -> Iterator[tuple[Kind, Kind, str]]:
        cells = [cell for cell in kinds(sweep) if cell.type == "linear"]
        for cell in cells:
            if isinstance(cell.k, list):
                for base in cells:
                    if (base.n, base.sharing) == (cell.n, cell.sharing) and base.k == sum(cell.k) / len(cell.k):
                        yield cell, base, f"K = {', '.join(map(str, cell.k))} over {base.k}"

    return over_sweeps(evidence, pairs)


def by_type(evidence: Evidence) -> Finding:
    def pairs(sweep: dict[str, Any]) -> Iterator[tuple[Kind, Kind, str]]:
        found = main_kinds(sweep)
        for cell in kinds(sweep) if found else []:
            assert found
            if cell.type in ("mean_pool", "max_pool", "conv") and (cell.k, cell.n) == (found[1].k, found[1].n):
                yield cell, found[1], f"{cell.type} over linear"

    return over_sweeps(evidence, pairs)


# -- the other evidence -----------------------------------------------------------------------------------------------


def low_rank(evidence: Evidence) -> Finding:
    verdicts, words, bases = [], [], []
    for found in evidence.get("spectrum", []):
        if found["index"] * 4 != found["length"]:
            continue  # the rule is about a quarter of the values
        means = [layer["mean_at_index"] for layer in found["layers"]]
        lowest = min(layer["lowest_at_index"] for layer in found["layers"])
        verdicts.append(HOLDS if min(means) >= LOW_RANK else FAILS if max(means) < LOW_RANK else UNSEEN)
        words.append(
            f"the first {found['index']} of {found['length']} values hold {min(means):.2f} to {max(means):.2f} of the "
            f"sum by layer (lowest head and text {lowest:.2f})"
        )
        bases.append(_texts(found, "spectrum"))
    return Finding("; ".join(words), "; ".join(bases), together(verdicts)) if words else nothing("no spectrum at N / 4")


def output_rank(evidence: Evidence) -> Finding:
    verdicts, words, bases = [], [], []
    for found in evidence.get("spectrum", []):
        k, tolerance = str(found["length"] // 4), found["recipe"]["spectrum"].get("tolerance", 0.1)
        errors = [layer["output_error"][k] for layer in found["layers"] if k in layer["output_error"]]
        if errors:
            above = [number for number, error in enumerate(errors) if error > tolerance]
            verdicts.append(FAILS if above else HOLDS)
            text = f"error {min(errors):.3f} to {max(errors):.3f} by layer"
            words.append(text + (f", above {tolerance:g} in layers {', '.join(map(str, above))}" if above else ""))
            bases.append(_texts(found, "spectrum"))
    return Finding("; ".join(words), "; ".join(bases), together(verdicts)) if words else nothing("no spectrum at N / 4")


def skewed(evidence: Evidence) -> Finding:
    verdicts, words, bases = [], [], []
    for found in evidence.get("spectrum", []):
        means = [layer["mean_at_index"] for layer in found["layers"]]
        half = len(means) // 2
        if not half:
            continue
        lower, upper = sum(means[:half]) / half, sum(means[-half:]) / half
        last = means[-1] == max(means)
        verdicts.append(HOLDS if upper > lower and last else FAILS if upper <= lower else UNSEEN)
        words.append(f"lower half {lower:.3f}, upper half {upper:.3f}, last layer {means[-1]:.3f}")
        bases.append(_texts(found, "spectrum"))
    return Finding("; ".join(words), "; ".join(bases), together(verdicts)) if words else nothing("no spectrum")


def _texts(found: dict[str, Any], verb: str) -> str:
    return f"`{found['recipe'][verb]['model']}`, {found['texts']} texts"


def fine_tuned(evidence: Evidence) -> Finding:
    verdicts, words, bases = [], [], []
    for found in evidence.get("compare", []):
        first = next(iter(found["recipe"]["compare"]["checkpoints"]))
        for task, checkpoints in found["tasks"].items():
            base = _accuracy(checkpoints[first])
            for name, runs in checkpoints.items():
                if name == first:
                    continue
                own = _accuracy(runs)
                if base is None or own is None:
                    verdicts.append(UNSEEN)
                    words.append(f"{name} on {task}: failed")
                    continue
                points = [100 * (own[seed] - base[seed]) for seed in base]
                within = [value >= -POINTS for value in points]
                verdicts.append(HOLDS if all(within) else UNSEEN if any(within) else FAILS)
                mean = sum(points) / len(points)
                words.append(f"{name} on {task}: {mean:+.1f} points ({min(points):+.1f} to {max(points):+.1f})")
            bases.append(f"{task}, {len(checkpoints[first]['seeds'])} seeds")
    if not words:
        return nothing("no comparison")
    return Finding("; ".join(words), "; ".join(dict.fromkeys(bases)), together(verdicts))


def _accuracy(runs: dict[str, Any]) -> dict[str, float] | None:
    if any("failed" in run for run in runs["seeds"].values()):
        return None
    found = {}
    for seed, run in runs["seeds"].items():
        found[seed] = run["metrics"][test_metric(run["metrics"])]
    return found


def _ours(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, case in row["cases"].items():
        if name.startswith("linformer_hf, K = ") and name not in row.get("fails_check", ()):
            yield name, case


def _growth(evidence: Evidence, series: Callable[[dict[str, Any]], list[dict[str, Any]]], value: str) -> Finding:
    words, slopes, bases = [], [], []
    for found in evidence.get("benchmark", []):
        rows = [row for row in series(found) if row["mode"] == "inference" and row["length"] >= LONG]
        keys = list(dict.fromkeys((row["dtype"], name) for row in rows for name, _ in _ours(row)))
        for dtype, name in keys:
            points = [
                (row["length"], case[value] / row["batch"])
                for row in rows
                for own, case in _ours(row)
                if (row["dtype"], own) == (dtype, name) and case.get(value)
            ]
            slope = exponent(points)
            if slope is not None:
                slopes.append(slope)
                lengths = sorted({length for length, _ in points})
                words.append(f"K = {split_k(name)[1]}, {dtype}: N^{slope:.2f} ({lengths[0]:,} to {lengths[-1]:,})")
                bases.append(found["processor"])
    if not slopes:
        return nothing(f"no two lengths from {LONG:,} tokens on")
    return Finding("; ".join(words), "; ".join(dict.fromkeys(bases)), HOLDS if max(slopes) <= LINEAR else FAILS)


def linear_time(evidence: Evidence) -> Finding:
    def series(found: dict[str, Any]) -> list[dict[str, Any]]:
        first = setting(found["timings"][0])[4:]  # threads and allocator
        return [row for row in found["timings"] if setting(row)[4:] == first]

    return _growth(evidence, series, "cpu_s")


def linear_memory(evidence: Evidence) -> Finding:
    return _growth(evidence, lambda found: found["memory"], "peak_bytes")


def table_3(evidence: Evidence) -> Finding:
    """Each cell of the paper's table that was measured: what we save is at least what the paper's model saves?"""
    cells: dict[tuple[str, int, int], tuple[float, float]] = {}  # (what, N, K) -> (ours, the paper's)
    bases = []
    for found in evidence.get("benchmark", []):
        timings = [row for row in found["timings"] if row["mode"] == "inference" and BASELINE in row["cases"]]
        if not timings:
            continue
        first = setting(timings[0])
        bases.append(f"one layer against {BASELINE}, {first[1]}, {found['processor']}")
        for row in (row for row in timings if setting(row) == first):
            for name, others in ratios(row).items():
                _cell(cells, "time", row["length"], name, others[BASELINE])
        for row in found["memory"]:
            base = row["cases"].get(BASELINE, {}).get("peak_bytes")
            if base and (row["mode"], row["dtype"], row["dropout"], row["fill"]) == first[:4]:
                for name, case in _ours(row):
                    if case.get("peak_bytes"):
                        _cell(cells, "memory", row["length"], name, base / case["peak_bytes"])
    if not cells:
        return nothing(f"no benchmark with {BASELINE}")
    words, below = [], []
    for what in ("time", "memory"):
        own = {key: value for key, value in cells.items() if key[0] == what}
        missed = {key: value for key, value in own.items() if value[0] < value[1]}
        below += list(missed)
        if own:
            words.append(f"{what}: {len(own) - len(missed)} of {len(own)} cells reach the paper's")
        for (_, n, k), (ours, paper) in missed.items():
            words.append(f"{what} at N = {n}, K = {k}: {ours:.2f} against {paper:g}")
    return Finding("; ".join(words), "; ".join(dict.fromkeys(bases)), FAILS if below else HOLDS)


def _cell(cells: dict[tuple[str, int, int], tuple[float, float]], what: str, n: int, name: str, ours: float) -> None:
    k = split_k(name)[1] or 0
    paper = TABLE_3.get(n, {}).get(k)
    if paper:
        cells[what, n, k] = (ours, paper[what == "memory"])


def theorem_1(evidence: Evidence) -> Finding:
    found = [cell for content in evidence.get("theory", []) for cell in content["cells"]]
    if not found:
        return nothing("no theory")
    telling = [cell for cell in found if cell["bound"] < 1]
    broken = [cell for cell in telling if cell["theorem_1_proved_failures"] > cell["bound"]]
    words = f"failures above the proof's bound in {len(broken)} of the {len(telling)} settings where it is below 1"
    words += f" ({len(found)} settings in all)"
    return Finding(words, _theory_basis(evidence), FAILS if broken else HOLDS if telling else UNSEEN)


def theorem_2(evidence: Evidence) -> Finding:
    contents = evidence.get("theory", [])
    if not contents:
        return nothing("no theory")
    words, verdicts = [], []
    for content in contents:
        epsilon = content["recipe"]["theory"].get("epsilon", 0.5)
        largest = max(cell["k"] for cell in content["cells"])
        errors = [cell["theorem_2"]["high"] for cell in content["cells"] if cell["k"] == largest]
        verdicts.append(HOLDS if max(errors) <= epsilon else FAILS)
        words.append(f"at K = {largest}, nine of ten errors at most {max(errors):.2f} (eps = {epsilon:g})")
    return Finding("; ".join(words), _theory_basis(evidence), together(verdicts))


def useful_bound(evidence: Evidence) -> Finding:
    """At K = N / 4, do the proofs' projections beat the answer zero on the maps of a real model?"""
    cells = [cell for content in evidence.get("theory", []) for cell in content["cells"]]
    cells = [cell for cell in cells if cell["k"] * 4 == cell["n"] and cell["kind"].startswith("layer")]
    if not cells:
        return nothing("no theory at K = N / 4")
    first = sum(cell["theorem_1"]["median"] < 1 for cell in cells)
    second = sum(cell["theorem_2"]["median"] < cell["theorem_2_zero"]["median"] for cell in cells)
    words = (
        f"smaller error than the answer zero in {first} (theorem 1) and {second} (theorem 2) of {len(cells)} settings"
    )
    return Finding(words, _theory_basis(evidence), HOLDS if min(first, second) == len(cells) else FAILS)


def _theory_basis(evidence: Evidence) -> str:
    return "; ".join(_texts(content, "theory") for content in evidence["theory"])


def no_extra_step(evidence: Evidence) -> Finding:
    """The longest chain of operations that wait for each other, at several N."""
    found = evidence.get("depth", [])
    if not found:
        return nothing("no graph")
    linformer, full = found[0]["linformer"], found[0]["full attention"]
    lengths = ", ".join(linformer)
    same = len(set(linformer.values())) == 1
    words = f"longest chain of operations: Linformer {_values(linformer)}, full attention {_values(full)}"
    return Finding(words, f"exported graph of one layer, N = {lengths}", HOLDS if same else FAILS)


def _values(depths: dict[str, int]) -> str:
    values = sorted(set(depths.values()))
    return f"{values[0]} at every N" if len(values) == 1 else ", ".join(f"{d} at {n}" for n, d in depths.items())


SPECTRUM, SWEEP, TASKS = "Figure 1: spectrum", "Figure 3: perplexity", "Table 2: fine-tuning"
SPEED, THEOREMS = "Table 3 and Figure 2: time and memory", "Theorems 1 and 2"
_CLOSE = f"every seed's perplexity is at most {CLOSE:.0%} above the reference's (does not hold: no seed's)"
CLAIMS = (
    Claim(
        "Attention maps are low-rank",
        "Section 3, Figure 1",
        f"in every layer the first N / 4 singular values hold at least {LOW_RANK:g} of the sum: halfway between "
        "a flat spectrum and all",
        low_rank,
        SPECTRUM,
    ),
    Claim(
        "... so that rank N / 4 is enough for attention's output",
        "ours: what Figure 1 is to justify",
        "the best approximation of rank N / 4 moves every layer's output by at most the recipe's tolerance (10 %)",
        output_rank,
        SPECTRUM,
    ),
    Claim(
        "Higher layers are more skewed",
        "Figure 1, right",
        "the share of the first values is larger in the upper half of the layers, and largest in the last",
        skewed,
        SPECTRUM,
    ),
    Claim(
        "K = N / 4 is nearly on par with full attention (K = 128 at N = 512)",
        "Figure 3 (a, b)",
        _CLOSE,
        shortened(4),
        SWEEP,
    ),
    Claim("K = N / 2 is nearly on par with full attention", "Figure 3 (a)", _CLOSE, shortened(2), SWEEP),
    Claim(
        "Quality depends on K, not on N",
        "Figure 3 (d)",
        f"at one K, perplexity differs by at most {CLOSE:.0%} between N, either way",
        by_length,
        SWEEP,
    ),
    Claim(
        "Sharing E and F costs little, layerwise included",
        "Section 4, Figure 3 (c)",
        f"{_CLOSE}; the reference shares nothing",
        by_sharing,
        SWEEP,
    ),
    Claim(
        "Smaller K in higher layers is enough",
        "Section 4, non-uniform projected dimension",
        f"{_CLOSE}; the reference spends as many K on all layers alike",
        by_layer,
        SWEEP,
    ),
    Claim(
        "Pooling and convolution work as projections",
        "Section 4, general projections",
        f"{_CLOSE}; the reference is the learned projection at the same K",
        by_type,
        SWEEP,
    ),
    Claim(
        "Fine-tuning is on par",
        "Table 2",
        f"every seed's accuracy is at most {POINTS:g} point below the full model's (does not hold: no seed's is)",
        fine_tuned,
        TASKS,
    ),
    Claim(
        "Time is linear in N",
        "Table 1, Figure 2",
        f"from {LONG:,} tokens on it grows as N to the power {LINEAR:g} at most",
        linear_time,
        SPEED,
    ),
    Claim(
        "Memory is linear in N",
        "Table 1",
        f"from {LONG:,} tokens on its peak grows as N to the power {LINEAR:g} at most",
        linear_memory,
        SPEED,
    ),
    Claim(
        "It saves the time and memory of Table 3",
        "Table 3",
        "every measured cell saves at least what the paper's does",
        table_3,
        SPEED,
    ),
    Claim(
        "Theorem 1: a random projection approximates the map",
        "Theorem 1",
        "the measured share of failures is at most the proof's bound wherever that is below 1",
        theorem_1,
        THEOREMS,
    ),
    Claim(
        "Theorem 2: so does one with K independent of N",
        "Theorem 2",
        "at the largest K nine of ten errors are at most eps, by the theorem's own measure",
        theorem_2,
        THEOREMS,
    ),
    Claim(
        "... and they justify K = N / 4",
        "ours: what the theorems are cited for",
        "at K = N / 4 the proofs' projections have a smaller median error than the answer zero, for every layer and N",
        useful_bound,
        THEOREMS,
    ),
    Claim(
        "No sequential step is added",
        "Table 1 (O(1) sequential operations)",
        "the longest chain of operations has the same length at every N",
        no_extra_step,
        "Sequential steps",
    ),
)
