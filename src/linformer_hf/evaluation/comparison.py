"""What is made of scores: rows of results.json, each with its fields, and differences from the rival."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scores import Score, interval, resampled
from .tasks import Task


ONE_VECTOR, BEST_PIECE, BLENDED = "one vector", "best piece", "best piece, blended"
MAIN = ("first", "accuracy")  # a task's measure in means and pictures
HAYSTACKS = ("needle", "passkey")  # they share their documents, which are drawn together


@dataclass(frozen=True)
class Measured:
    """A score, and of what it is.

    Attributes:
        view: ONE_VECTOR, or BEST_PIECE with pieces of `size` tokens, or BLENDED: such a piece read alone, too.
        metric: `first`, `among ten` or `accuracy`.
    """

    task: Task
    method: str
    view: str
    size: int | None
    metric: str
    score: Score

    def row(self) -> dict[str, Any]:
        facts = {"task": self.task.name, "length": self.task.length, "view": self.view, "size": self.size}
        return facts | {
            "metric": self.metric,
            "method": self.method,
            "value": self.score.mean,
            "count": len(self.score.values),
            "units": len(np.unique(self.score.units)),
        }

    def differences(self, rival: "Measured", seed: int) -> np.ndarray:
        """Resampled; tasks that share documents draw the same ones."""
        name = HAYSTACKS[0] if self.task.name in HAYSTACKS else self.task.name
        return resampled(self.score, rival.score, (seed, zlib.crc32(name.encode())))


def find(all_scores: Sequence[Measured], like: Measured, **other: Any) -> Measured:
    """The score that differs from `like` in what is given and in nothing else."""
    names = ("task", "method", "view", "size", "metric")
    wanted = {name: other.get(name, getattr(like, name)) for name in names}
    return next(one for one in all_scores if all(getattr(one, name) == value for name, value in wanted.items()))


def rivals(all_scores: Sequence[Measured], pieces: Sequence[str]) -> dict[tuple[str, int | None], str]:
    """The best of the source's pieces in each task (and length), by one vector and the task's main measure."""
    found: dict[tuple[str, int | None], Measured] = {}
    for one in all_scores:
        if one.method in pieces and one.view == ONE_VECTOR and one.metric in MAIN:
            key = (one.task.name, one.task.length)
            if key not in found or one.score.mean > found[key].score.mean:
                found[key] = one
    return {key: one.method for key, one in found.items()}


def compared(
    all_scores: Sequence[Measured], pieces: Sequence[str], beyond: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of differences from the rival, and of their means over the tasks, with intervals of 95 %.

    One vector is compared with the best of the source's pieces in that task, the best piece, blended or not, with the
    source's own pieces of that size. A task that is given at several lengths counts once in a mean, over those `beyond`
    so many tokens.

    Args:
        pieces: the methods that are the rivals.
    """
    best = rivals(all_scores, pieces)
    rows: list[dict[str, Any]] = []
    means: dict[str, dict[str, list[tuple[float, np.ndarray]]]] = {}
    for one in all_scores:
        if one.method in pieces:
            continue
        key = (one.task.name, one.task.length)
        own = {"method": best[key]} if one.view == ONE_VECTOR else {"method": f"pieces-{one.size}", "view": BEST_PIECE}
        rival = find(all_scores, one, **own)
        drawn = one.differences(rival, seed)
        low, high = interval(drawn)
        value, other = one.score.mean, rival.score.mean
        found = {"rival": rival.method, "rival_value": other, "difference": value - other, "low": low, "high": high}
        rows.append(one.row() | found | {"ratio": value / other if other else None})
        if one.view == ONE_VECTOR and one.metric in MAIN and (one.task.length or beyond + 1) > beyond:
            means.setdefault(one.method, {}).setdefault(one.task.name, []).append((value - other, drawn))
    return rows, [_mean(method, tasks) for method, tasks in means.items()]


def _mean(method: str, tasks: dict[str, list[tuple[float, np.ndarray]]]) -> dict[str, Any]:
    values = [np.mean([value for value, _ in lengths]) for lengths in tasks.values()]
    low, high = interval(np.mean([np.mean([drawn for _, drawn in lengths], 0) for lengths in tasks.values()], 0))
    return {"method": method, "tasks": list(tasks), "difference": float(np.mean(values)), "low": low, "high": high}


def over_lengths(all_scores: Sequence[Measured], reads: int, longest: int) -> list[dict[str, Any]]:
    """What is left of a score at `longest` tokens of what it is at `reads`, where a task is given at both."""
    rows = []
    shorter = {_key(one): one.score.mean for one in all_scores if one.task.length == reads}
    for one in all_scores:
        if one.task.length == longest and one.metric in MAIN and _key(one) in shorter:
            before = shorter[_key(one)]
            facts = {"from_length": reads, "from_value": before, "ratio": one.score.mean / before if before else None}
            rows.append(one.row() | facts)
    return rows


def _key(one: Measured) -> tuple:
    return one.task.name, one.method, one.view, one.size, one.metric
