"""Verdicts and comparisons, on numbers worked out by hand."""

import pytest

from linformer_hf.paper import verdicts
from linformer_hf.paper.verdicts import (
    FAILS,
    HOLDS,
    UNSEEN,
    Kind,
    claim,
    compare_cells,
    fall,
    kinds,
    main_kinds,
)


def run(perplexity, ratio=10.0, before=1.0, **model):
    curve = [{"step": 6, "perplexity": perplexity * before}, {"step": 9, "perplexity": perplexity}]
    metrics = {"validation_perplexity": perplexity, "perplexity_ratio": ratio}
    return {"metrics": metrics, "curve": curve, "model": model}


@pytest.fixture
def judge(monkeypatch):
    """What a rule that has seen these things finds."""
    monkeypatch.setattr(verdicts, "CLAIMS", [])

    def found(*seen):
        @claim("words", "section 1", "all", "Speed", "no timings")
        def rule(evidence):
            assert evidence["never measured"] == []
            yield from seen

        (one,) = verdicts.CLAIMS
        assert (one.words, one.place, one.rule, one.section, one.judge) == ("words", "section 1", "all", "Speed", rule)
        return rule({})

    return found


def test_a_claim_joins_what_was_seen_and_names_each_basis_once(judge):
    found = judge((HOLDS, "a: 1", "CPU"), (UNSEEN, "b: 2", "GPU"), (FAILS, "c: 3", "CPU"))
    assert (found.measured, found.basis, found.verdict) == ("a: 1; b: 2; c: 3", "CPU; GPU", FAILS)


def test_a_claim_that_has_seen_nothing_says_what_is_missing(judge):
    found = judge()
    assert (found.measured, found.basis, found.verdict) == ("nothing: no timings", "", UNSEEN)


def test_kinds_come_from_the_first_finished_seed_and_sharing_counts_where_there_are_matrices():
    full = {"projected_length": 8, "max_position_embeddings": 8, "projection_type": "mean_pool"}
    own = {"projected_length": 2, "max_position_embeddings": 8, "projection_sharing": "headwise"}
    cells = {
        "broken": {"0": {"failed": "no disk"}},
        "full": {"0": run(1.0, **full, projection_sharing="none")},
        "half failed": {"0": {"failed": "no disk"}, "1": run(1.0, **own)},
        "defaults": {"0": run(1.0)},
    }
    assert kinds({"cells": cells}) == [
        Kind("full", 8, 8, "mean_pool", None),
        Kind("half failed", 8, 2, "linear", "headwise"),
        Kind("defaults", 512, 256, "linear", "layerwise"),
    ]


def test_the_plain_linformer_has_a_quarter_of_the_n_of_full_attention():
    full, plain = Kind("f", 8, 8, "mean_pool", None), Kind("p", 8, 2, "linear", "none")
    others = [Kind("a", 16, 2, "linear", "none"), Kind("b", 8, 4, "linear", "none"), Kind("c", 8, 2, "conv", "none")]
    assert main_kinds([*others, full, plain, Kind("d", 8, 2, "linear", "headwise")]) == (full, plain)
    assert main_kinds([*others, full]) is None
    assert main_kinds([*others, plain]) is None


def test_the_fall_is_over_the_last_third_of_the_updates():
    points = [(3, 100.0), (6, 50.0), (7, 45.0), (9, 40.0)]
    curve = [{"step": step, "perplexity": perplexity} for step, perplexity in points]
    assert fall({"curve": curve}) == pytest.approx(0.2)  # 50 to 40: update 6 is the last within two thirds of 9
    assert fall({"curve": curve[2:]}) == 1.0


ONE, OTHER = Kind("one", 8, 2, "linear", "none"), Kind("other", 8, 8, "mean_pool", None)


def compared(ours, theirs, both_sides=False):
    cells = {"one": dict(enumerate(ours)), "other": dict(enumerate(theirs))}
    return compare_cells({"cells": cells}, ONE, OTHER, both_sides)


def test_cells_are_compared_seed_by_seed():
    assert compared([run(10.2), run(20.8)], [run(10.0), run(20.0)]) == (HOLDS, "+3.0 % (+2.0 to +4.0)")
    assert compared([run(10.2), run(22.0)], [run(10.0), run(20.0)]) == (UNSEEN, "+6.0 % (+2.0 to +10.0)")
    better = [run(9.0)], [run(10.0)]
    assert compared(*better) == (HOLDS, "-10.0 % (-10.0 to -10.0)")
    assert compared(*better, both_sides=True)[0] == FAILS
