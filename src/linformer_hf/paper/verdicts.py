"""What the claims of `claims.py` are made of: verdicts, findings, and comparisons of a sweep's cells seed by seed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any


HOLDS, FAILS, UNSEEN = "holds", "does not hold", "cannot be seen at this scale"
CLOSE = 0.05  # of the perplexity
LEARNED = 2.0  # times below the perplexity of token frequencies
SETTLED = 0.1  # largest fall of the perplexity over the last third of the updates
Evidence = dict[str, list[dict[str, Any]]]
Seen = tuple[str, str, str]  # verdict, the numbers in words, what they were measured on


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
        section: heading of the report that shows the evidence.
        judge: the rule.
    """

    words: str
    place: str
    rule: str
    section: str
    judge: Callable[[Evidence], Finding]


CLAIMS: list[Claim] = []  # in the order of claims.py


def claim(
    words: str, place: str, rule: str, section: str, missing: str
) -> Callable[[Callable[[Evidence], Iterable[Seen]]], Callable[[Evidence], Finding]]:
    """Make a function that yields what it has seen the rule of a new claim; `missing`: what was not there, if nothing.

    All that was seen must hold, and one thing that fails decides.
    """

    def decorate(look: Callable[[Evidence], Iterable[Seen]]) -> Callable[[Evidence], Finding]:
        def judge(evidence: Evidence) -> Finding:
            seen = list(look(defaultdict(list, evidence)))
            if not seen:
                return Finding(f"nothing: {missing}", "", UNSEEN)
            verdicts, found, bases = zip(*seen, strict=True)
            return Finding("; ".join(found), "; ".join(dict.fromkeys(bases)), together(verdicts))

        CLAIMS.append(Claim(words, place, rule, section, judge))
        return judge

    return decorate


def together(verdicts: Iterable[str]) -> str:
    """All must hold; one that fails decides; without any there is nothing to see."""
    given = set(verdicts)
    return FAILS if FAILS in given else HOLDS if given == {HOLDS} else UNSEEN


def of_each(within: list[bool]) -> str:
    """The verdict on seeds: it holds if all are within the limit, does not hold if none is."""
    return HOLDS if all(within) else UNSEEN if any(within) else FAILS


# -- perplexity -----------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """What a cell of a sweep is, read from its model."""

    name: str
    n: int
    k: int | list[int]
    type: str
    sharing: str | None


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


def main_kinds(cells: list[Kind]) -> tuple[Kind, Kind] | None:
    """(full attention, the plain Linformer that others vary: the first `linear` cell with K = N / 4)."""
    full = next((cell for cell in cells if cell.k == cell.n), None)
    plain = next((c for c in cells if full and (c.type, c.n, c.k) == ("linear", full.n, full.n // 4)), None)
    return (full, plain) if full and plain else None


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
        return of_each([ratio <= 1 + CLOSE and (not both_sides or ratio >= 1 / (1 + CLOSE)) for ratio in self.ratios])

    def words(self) -> str:
        if not self.ratios:
            return f"{self.label}: failed, or too little learned"
        low, middle, high = (100 * (value - 1) for value in (min(self.ratios), mean(self.ratios), max(self.ratios)))
        words = f"{self.label}: {middle:+.1f} % ({low:+.1f} to {high:+.1f})"
        return words + (f", perplexity still falling by {self.falling:.0%}" if self.falling > SETTLED else "")


def fall(run: dict[str, Any]) -> float:
    """By what share the perplexity fell over the last third of the updates; 1 if it was not measured before them."""
    curve = run["curve"]
    before = [point for point in curve if point["step"] <= curve[-1]["step"] * 2 / 3]
    return 1 - curve[-1]["perplexity"] / before[-1]["perplexity"] if before else 1.0


def compare_cells(sweep: dict[str, Any], one: Kind, other: Kind, label: str) -> Comparison:
    """`one` over `other`, seed by seed."""
    pairs = [(sweep["cells"][one.name][seed], run) for seed, run in sweep["cells"][other.name].items()]
    if any("failed" in run for pair in pairs for run in pair):
        return Comparison(label, None)
    metrics = [(run["metrics"], reference["metrics"]) for run, reference in pairs]
    if any(reference["perplexity_ratio"] < LEARNED for _, reference in metrics):
        return Comparison(label, None)
    perplexity = "validation_perplexity"
    falling = max(fall(run) for pair in pairs for run in pair)
    return Comparison(label, [run[perplexity] / reference[perplexity] for run, reference in metrics], falling)


def over_sweeps(
    pairs: Callable[[list[Kind]], Iterator[tuple[Kind, Kind, str]]], both_sides: bool = False
) -> Callable[[Evidence], Iterator[Seen]]:
    """Judge all pairs (cell, reference, label) that `pairs` finds among the cells of each sweep."""

    def look(evidence: Evidence) -> Iterator[Seen]:
        for sweep in evidence["sweep"]:
            seeds = len(next(iter(sweep["cells"].values())))
            basis = f"perplexity of held-out documents, {seeds} seeds, `{sweep['recipe']['sweep']['recipe']}`"
            for pair in pairs(kinds(sweep)):
                found = compare_cells(sweep, *pair)
                yield found.verdict(both_sides), found.words(), basis

    return look
