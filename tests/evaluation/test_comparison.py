"""Rivals, differences and their means, on scores that are given."""

import numpy as np
import pytest

from linformer_hf.evaluation.comparison import BEST_PIECE, ONE_VECTOR, Measured, compared, over_lengths, rivals
from linformer_hf.evaluation.scores import Score
from linformer_hf.evaluation.tasks import Task


PIECES = ("pieces-128", "pieces-256")


def measured(task: Task, method: str, share: float, view=ONE_VECTOR, size=None, metric="first") -> Measured:
    """A share of ten queries is answered."""
    values = (np.arange(10) < round(10 * share)).astype(float)
    return Measured(task, method, view, size, metric, Score(values, np.arange(10)))


def task(name: str, length: int | None = None) -> Task:
    return Task(name, "", [], length=length)


def all_scores() -> list[Measured]:
    bible, plays = task("search-bible"), task("probe-plays")
    short, long, longer = (task("needle", length) for length in (512, 1024, 4096))
    found = [
        *(measured(bible, name, share) for name, share in (("pieces-128", 0.5), ("pieces-256", 0.6), ("mine", 0.8))),
        *(
            measured(bible, name, share, metric="among ten")
            for name, share in (("pieces-128", 0.9), ("pieces-256", 0.7))
        ),
        measured(bible, "mine", 0.9, metric="among ten"),
        *(measured(bible, name, share, BEST_PIECE, 128) for name, share in (("pieces-128", 0.8), ("mine", 0.4))),
    ]
    for name, share in (("pieces-128", 0.7), ("pieces-256", 0.3), ("mine", 0.6)):
        found.append(measured(plays, name, share, metric="accuracy"))
        found += [measured(short, name, 1.0), measured(long, name, share), measured(longer, name, share / 2)]
    return found


def test_the_rival_is_the_best_of_the_pieces_by_the_main_measure():
    found = rivals(all_scores(), PIECES)
    assert found["search-bible", None] == "pieces-256"  # though the others find more among ten
    assert found["probe-plays", None] == found["needle", 4096] == "pieces-128"


def test_one_vector_meets_the_best_pieces_and_a_piece_the_sources_own():
    rows, _ = compared(all_scores(), PIECES, 512, seed=0)
    assert {row["method"] for row in rows} == {"mine"}

    def row(name, **wanted):
        (found,) = [r for r in rows if r["task"] == name and all(r[key] == value for key, value in wanted.items())]
        return found

    first = row("search-bible", view=ONE_VECTOR, metric="first")
    assert (first["rival"], first["difference"], first["ratio"]) == (
        "pieces-256",
        pytest.approx(0.2),
        pytest.approx(4 / 3),
    )
    assert 0 <= first["low"] < 0.2 < first["high"] < 0.6
    ten = row("search-bible", view=ONE_VECTOR, metric="among ten")
    assert (ten["rival"], ten["rival_value"], ten["difference"]) == ("pieces-256", 0.7, pytest.approx(0.2))
    piece = row("search-bible", view=BEST_PIECE)
    assert (piece["rival"], piece["size"], piece["ratio"]) == ("pieces-128", 128, pytest.approx(0.5))
    assert row("needle", length=512)["difference"] == 0


def test_in_the_mean_each_task_counts_once_and_what_the_source_reads_does_not():
    _, (mean,) = compared(all_scores(), PIECES, 512, seed=0)
    assert mean["method"] == "mine"
    assert mean["tasks"] == ["search-bible", "probe-plays", "needle"]
    needle = (-0.1 + (0.3 - 0.4)) / 2  # .6 and .7 at 1,024; .3 and .4 (of .35, rounded) at 4,096
    assert mean["difference"] == pytest.approx((0.2 - 0.1 + needle) / 3)
    assert mean["low"] < mean["difference"] < mean["high"]


def test_tasks_that_share_documents_draw_the_same_ones():
    own = {
        name: (measured(task(name, 512), "a", 0.5), measured(task(name, 512), "b", 0.2))
        for name in ("needle", "passkey", "x")
    }
    drawn = {name: one.differences(other, 3) for name, (one, other) in own.items()}
    assert np.array_equal(drawn["needle"], drawn["passkey"])
    assert not np.array_equal(drawn["needle"], drawn["x"])


def test_nothing_over_nothing_has_no_ratio():
    nothing = [measured(task("needle", 512), name, 0.0) for name in ("pieces-128", "mine")]
    rows, _ = compared(nothing, PIECES, 512, seed=0)
    assert rows[0]["ratio"] is None
    assert rows[0]["difference"] == 0
    assert (
        over_lengths([*nothing, *(measured(task("needle", 4096), "mine", 0.5) for _ in "1")], 512, 4096)[0]["ratio"]
        is None
    )


def test_what_is_left_at_length():
    rows = over_lengths(all_scores(), 512, 4096)
    assert {(row["task"], row["method"]): row["ratio"] for row in rows} == {
        ("needle", "pieces-128"): 0.4,
        ("needle", "pieces-256"): 0.2,
        ("needle", "mine"): 0.3,
    }
    assert {(row["length"], row["from_length"], row["from_value"]) for row in rows} == {(4096, 512, 1.0)}
