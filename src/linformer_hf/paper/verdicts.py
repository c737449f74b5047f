"""What the claims of `claims.py` are made of: verdicts, findings, and comparisons of a sweep's cells seed by seed."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..configuration_linformer import LEARNED_TYPES
from .grid import measured


HOLDS, FAILS, UNSEEN = "holds", "does not hold", "cannot be seen at this scale"
CLOSE = 0.05  # of the perplexity
LEARNED = 2.0  # times below the perplexity of token frequencies
PERPLEXITY = "validation_perplexity"
BAND = " with a band of {}"
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
    type: str  # of projection, and the band if there is one: what is said of a type is not meant of it with a band
    sharing: str | None


def kinds(sweep: dict[str, Any]) -> list[Kind]:
    """The cells that have at least one finished seed; the others are known by name only."""
    found = []
    for name, seeds in sweep["cells"].items():
        model = next((run["model"] for run in seeds.values() if "failed" not in run), None)
        if model is not None:
            type_ = model.get("projection_type", "linear")
            sharing = model.get("projection_sharing", "layerwise") if type_ in LEARNED_TYPES else None
            k, n = model.get("projected_length", 256), model.get("max_position_embeddings", 512)
            band = BAND.format(3 * model["local_window"]) if model.get("local_window") else ""
            found.append(Kind(name, n, k, type_ + band, sharing))
    return found


def main_kinds(cells: list[Kind]) -> tuple[Kind, Kind] | None:
    """(full attention, the plain Linformer that others vary: the first `linear` cell with K = N / 4)."""
    full = next((cell for cell in cells if cell.k == cell.n), None)
    plain = next((c for c in cells if full and (c.type, c.n, c.k) == ("linear", full.n, full.n // 4)), None)
    return (full, plain) if full and plain else None


def fall(run: dict[str, Any]) -> float:
    """By what share the perplexity fell over the last third of the updates; 1 if it was not measured before them."""
    curve = run["curve"]
    before = [point for point in curve if point["step"] <= curve[-1]["step"] * 2 / 3]
    return 1 - curve[-1]["perplexity"] / before[-1]["perplexity"] if before else 1.0


def compare_cells(sweep: dict[str, Any], one: Kind, other: Kind, both_sides: bool) -> tuple[str, str]:
    """The verdict on the perplexity of `one` over that of `other`, seed by seed, and the ratios in words."""
    pairs = [(sweep["cells"][one.name][seed], run) for seed, run in sweep["cells"][other.name].items()]
    failed = any("failed" in run for pair in pairs for run in pair)
    if failed or any(reference["metrics"]["perplexity_ratio"] < LEARNED for _, reference in pairs):
        return UNSEEN, "failed, or too little learned"
    ratios = [run["metrics"][PERPLEXITY] / reference["metrics"][PERPLEXITY] for run, reference in pairs]
    low, middle, high = (100 * (value - 1) for value in (min(ratios), mean(ratios), max(ratios)))
    words = f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
    falling = max(fall(run) for pair in pairs for run in pair)
    if falling > SETTLED:
        return UNSEEN, f"{words}, perplexity still falling by {falling:.0%}"
    return of_each([ratio <= 1 + CLOSE and (not both_sides or ratio >= 1 / (1 + CLOSE)) for ratio in ratios]), words


def mean_over(sweep: dict[str, Any], one: Kind, other: Kind) -> float:
    """The mean perplexity of `one` over that of `other`; infinite where a seed of either failed."""
    found = [measured(sweep["cells"][kind.name], PERPLEXITY) for kind in (one, other)]
    return mean(found[0]) / mean(found[1]) if found[0] and found[1] else math.inf


def over_sweeps(
    pairs: Callable[[list[Kind]], Iterator[tuple[Kind, Kind, str]]], both_sides: bool = False
) -> Callable[[Evidence], Iterator[Seen]]:
    """Judge all pairs (cell, reference, label) that `pairs` finds among the cells of each sweep."""

    def look(evidence: Evidence) -> Iterator[Seen]:
        for sweep in evidence["sweep"]:
            seeds = len(next(iter(sweep["cells"].values())))
            basis = f"perplexity of held-out documents, {seeds} seeds, `{sweep['recipe']['sweep']['recipe']}`"
            for one, other, label in pairs(kinds(sweep)):
                verdict, words = compare_cells(sweep, one, other, both_sides)
                yield verdict, f"{label}: {words}", basis

    return look
