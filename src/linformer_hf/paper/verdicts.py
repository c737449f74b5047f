"""What a rule of `claims.py` is made of: findings, verdicts, and comparisons of a sweep's cells seed by seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


HOLDS, FAILS, UNSEEN = "holds", "does not hold", "cannot be seen at this scale"
CLOSE = 0.05  # of the perplexity
POINTS = 1.0  # of accuracy, in percent
LEARNED = 2.0  # times below the perplexity of token frequencies
SETTLED = 0.1  # largest fall of the perplexity over the last third of the updates
LINEAR = 1.1  # exponent of N
LOW_RANK = 0.625  # halfway between a flat spectrum's share of a quarter of the values, 1/4, and all
Evidence = dict[str, list[dict[str, Any]]]


@dataclass
class Finding:
    """What a rule found: the numbers in words, what they were measured on, the verdict."""

    measured: str
    basis: str
    verdict: str


@dataclass
class Claim:
    """A claim of the paper (or of its code), and how it is judged.

    Attributes:
        words: the claim.
        place: where it stands.
        rule: the condition under which it holds, in words.
        judge: the rule.
        section: heading of the report that shows the evidence.
    """

    words: str
    place: str
    rule: str
    judge: Callable[[Evidence], Finding]
    section: str


def nothing(what: str) -> Finding:
    return Finding(f"nothing: {what}", "", UNSEEN)


# -- perplexity -----------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """The perplexity of a cell over that of another.

    Attributes:
        ratios: seed by seed; None where a run failed or learned too little.
        falling: the largest fall of any of the runs over the last third of its updates.
    """

    label: str
    ratios: list[float] | None
    falling: float = 0.0

    def verdict(self, both_sides: bool = False) -> str:
        if not self.ratios or self.falling > SETTLED:
            return UNSEEN
        within = [ratio <= 1 + CLOSE and (not both_sides or ratio >= 1 / (1 + CLOSE)) for ratio in self.ratios]
        return HOLDS if all(within) else UNSEEN if any(within) else FAILS

    def words(self) -> str:
        if not self.ratios:
            return f"{self.label}: failed, or too little learned"
        low, high = (100 * (value - 1) for value in (min(self.ratios), max(self.ratios)))
        words = f"{self.label}: {100 * (sum(self.ratios) / len(self.ratios) - 1):+.1f} % ({low:+.1f} to {high:+.1f})"
        return words + (f", perplexity still falling by {self.falling:.0%}" if self.falling > SETTLED else "")


def fall(run: dict[str, Any]) -> float:
    """By what share the perplexity fell over the last third of the updates; 1 if it was not measured before them."""
    curve = run["curve"]
    before = [point for point in curve if point["step"] <= curve[-1]["step"] * 2 / 3]
    return 1 - curve[-1]["perplexity"] / before[-1]["perplexity"] if before else 1.0


def together(verdicts: Sequence[str]) -> str:
    """All must hold; one that fails decides; without any there is nothing to see."""
    if not verdicts or (UNSEEN in verdicts and FAILS not in verdicts):
        return UNSEEN
    return FAILS if FAILS in verdicts else HOLDS


@dataclass
class Kind:
    """What a cell of a sweep is, read from its model."""

    name: str
    n: int
    k: int | list[int]
    type: str
    sharing: str | None

    @property
    def full(self) -> bool:
        return self.k == self.n


def kinds(sweep: dict[str, Any]) -> list[Kind]:
    """The cells that have at least one finished seed; the others are known by name only."""
    found = []
    for name, seeds in sweep["cells"].items():
        model = next((run["model"] for run in seeds.values() if "failed" not in run), None)
        if model is not None:
            type_ = model.get("projection_type", "linear")
            sharing = model.get("projection_sharing", "layerwise") if type_ in ("linear", "conv", "fixed") else None
            k, n = model.get("projected_length", 256), model.get("max_position_embeddings", 512)
            found.append(Kind(name, n, k, type_, sharing))
    return found


def compare_cells(sweep: dict[str, Any], one: Kind, other: Kind, label: str) -> Comparison:
    """`one` over `other`, seed by seed."""
    pairs = [(sweep["cells"][one.name][seed], run) for seed, run in sweep["cells"][other.name].items()]
    if any("failed" in run for pair in pairs for run in pair):
        return Comparison(label, None)
    if any(reference["metrics"]["perplexity_ratio"] < LEARNED for _, reference in pairs):
        return Comparison(label, None)
    perplexity = "validation_perplexity"
    falling = max(fall(run) for pair in pairs for run in pair)
    return Comparison(label, [run["metrics"][perplexity] / base["metrics"][perplexity] for run, base in pairs], falling)


def main_kinds(sweep: dict[str, Any]) -> tuple[Kind, Kind] | None:
    """(full attention, the plain Linformer that others vary: the first `linear` cell with K = N / 4)."""
    cells = kinds(sweep)
    full = next((cell for cell in cells if cell.full), None)
    plain = next((c for c in cells if full and c.type == "linear" and c.n == full.n and c.k == full.n // 4), None)
    return (full, plain) if full and plain else None


def over_sweeps(
    evidence: Evidence, pairs: Callable[[dict[str, Any]], Iterator[tuple[Kind, Kind, str]]], both_sides: bool = False
) -> Finding:
    """Judge all pairs (cell, reference, label) that the sweeps have."""
    compared: list[Comparison] = []
    bases = []
    for sweep in evidence.get("sweep", []):
        own = [compare_cells(sweep, *pair) for pair in pairs(sweep)]
        if own:
            compared += own
            seeds = len(next(iter(sweep["cells"].values())))
            bases.append(f"perplexity of held-out documents, {seeds} seeds, `{sweep['recipe']['sweep']['recipe']}`")
    if not compared:
        return nothing("no sweep has these cells")
    verdict = together([one.verdict(both_sides) for one in compared])
    return Finding("; ".join(one.words() for one in compared), "; ".join(dict.fromkeys(bases)), verdict)
