"""Every rule of claims.py, on results that satisfy it, that break it, and that are not there."""

import copy
import json
from pathlib import Path

import pytest

from linformer_hf.paper import claims
from linformer_hf.paper.claims import CLAIMS
from linformer_hf.paper.verdicts import FAILS, HOLDS, UNSEEN, together


REPORTS = Path(__file__).parents[2] / "reports"
BY_RULE = {claim.judge: claim for claim in CLAIMS}


def committed(name):
    return json.loads((REPORTS / name / "results.json").read_text(encoding="utf-8"))


def run(perplexity, n=128, k=32, kind="linear", sharing="headwise", ratio=10.0, before=1.05, window=0):
    """`before`: the perplexity at two thirds of the updates, over the last."""
    model = {"max_position_embeddings": n, "projected_length": k, "projection_type": kind, "local_window": window}
    metrics = {"validation_perplexity": perplexity, "perplexity_ratio": ratio}
    curve = [{"step": step, "perplexity": perplexity * over} for step, over in ((4, 3.0), (8, before), (12, 1.0))]
    return {"metrics": metrics, "model": {**model, "projection_sharing": sharing}, "curve": curve}


def sweep(**cells):
    """name -> perplexities of the seeds and the cell's model."""
    made = {
        name: {str(seed): run(value, **model) for seed, value in enumerate(values)}
        for name, (values, model) in cells.items()
    }
    return {"sweep": [{"recipe": {"sweep": {"recipe": "r.yaml"}}, "cells": made}]}


FULL = ([10.0, 11.0, 12.0], {"k": 128, "kind": "mean_pool", "sharing": None})
PLAIN = ([10.2, 11.2, 12.2], {})
FAR = [20.0, 22.0, 24.0]
MIXED = [10.0, 22.0, 12.0]


def judge_sweep(rule, **cells):
    return rule(sweep(**{"full": FULL, "plain": PLAIN, **cells}))


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        (claims.half, {"k": 64}),
        (claims.by_length, {"n": 256}),
        (claims.by_layer, {"k": [48, 16]}),
        (claims.by_type, {"kind": "conv"}),
        (claims.by_type, {"kind": "mean_pool", "sharing": None}),
    ],
)
def test_a_cell_close_to_its_reference_holds_a_far_one_does_not_and_seeds_that_disagree_show_nothing(rule, model):
    assert judge_sweep(rule, cell=([10.3, 11.3, 12.3], model)).verdict == HOLDS
    found = judge_sweep(rule, cell=(FAR, model))
    assert found.verdict == FAILS
    assert "%" in found.measured
    assert "3 seeds" in found.basis
    assert judge_sweep(rule, cell=(MIXED, model)).verdict == UNSEEN
    assert judge_sweep(rule).verdict == UNSEEN  # no such cell


def test_a_quarter_is_compared_with_full_attention_at_the_same_n():
    quarter = claims.quarter
    assert judge_sweep(quarter).verdict == HOLDS
    assert judge_sweep(quarter, plain=(FAR, {})).verdict == FAILS
    assert quarter(sweep(plain=PLAIN)).verdict == UNSEEN
    assert "K = 32, N = 128: +1.8 %" in judge_sweep(quarter).measured


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "dense_conv"},
        {"window": 5},
        {"k": [16, 48], "kind": "gated_pool", "sharing": None, "window": 5},
        {"k": 31, "kind": "dense_conv", "window": 5},
    ],
)
def test_of_our_forms_at_a_quarter_the_best_is_judged(model):
    rule = claims.quarter_of_ours
    assert judge_sweep(rule).verdict == UNSEEN  # the paper's form is none of them
    assert judge_sweep(rule, cell=(PLAIN[0], model)).verdict == HOLDS
    far = judge_sweep(rule, cell=(FAR, model))
    assert far.verdict == FAILS
    assert ("with a band of 15" in far.measured) == ("window" in model)
    assert judge_sweep(rule, cell=(FAR, model), best=(PLAIN[0], {"kind": "dense_conv"})).verdict == HOLDS
    level = ([10.0, 11.0, 12.0], {"kind": "dense_conv"})
    assert ": +0.0 %" in judge_sweep(rule, cell=(PLAIN[0], model), best=level).measured
    assert ": +0.0 %" in judge_sweep(rule, best=level, cell=(PLAIN[0], model)).measured
    assert judge_sweep(rule, cell=(PLAIN[0], {**model, "k": 64})).verdict == UNSEEN  # not a quarter
    assert judge_sweep(rule, cell=(PLAIN[0], {**model, "n": 256})).verdict == UNSEEN  # no full attention at this N


def test_what_is_said_of_a_type_is_not_meant_of_it_with_a_band():
    found = judge_sweep(claims.by_sharing, none=([10.0, 11.0, 12.0], {"sharing": "none"}), band=(FAR, {"window": 5}))
    assert found.verdict == HOLDS


def test_sharing_is_compared_with_no_sharing_and_one_bad_mode_decides():
    rule = claims.by_sharing
    none = ([10.0, 11.0, 12.0], {"sharing": "none"})
    assert judge_sweep(rule, none=none).verdict == HOLDS
    found = judge_sweep(rule, none=none, layerwise=(FAR, {"sharing": "layerwise"}))
    assert found.verdict == FAILS
    assert "layerwise over none: +100.0 %" in found.measured
    assert judge_sweep(rule).verdict == UNSEEN


def test_better_than_the_reference_holds_but_not_where_n_must_make_no_difference():
    assert judge_sweep(claims.by_type, cell=([5.0, 5.0, 5.0], {"kind": "conv"})).verdict == HOLDS
    assert judge_sweep(claims.by_length, cell=([5.0, 5.0, 5.0], {"n": 256})).verdict == FAILS


def test_a_failed_run_or_a_reference_that_learned_nothing_shows_nothing():
    evidence = sweep(full=FULL, plain=PLAIN)
    evidence["sweep"][0]["cells"]["plain"]["1"] = {"failed": True}
    found = claims.quarter(evidence)
    assert found.verdict == UNSEEN
    assert "failed" in found.measured
    found = claims.quarter(sweep(full=(FULL[0], {**FULL[1], "ratio": 1.9}), plain=PLAIN))
    assert found.verdict == UNSEEN


def test_a_training_that_has_not_settled_shows_nothing():
    for values in (PLAIN[0], FAR):
        found = judge_sweep(claims.quarter, plain=(values, {"before": 1.2}))
        assert found.verdict == UNSEEN
        assert "perplexity still falling by 17%" in found.measured
    evidence = sweep(full=FULL, plain=PLAIN)
    for seed in evidence["sweep"][0]["cells"]["plain"].values():
        seed["curve"] = seed["curve"][2:]  # evaluated at the end only
    assert claims.quarter(evidence).verdict == UNSEEN


def test_verdicts_together():
    assert together([HOLDS, HOLDS]) == HOLDS
    assert together([HOLDS, FAILS, UNSEEN]) == FAILS
    assert together([HOLDS, UNSEEN]) == UNSEEN
    assert together([]) == UNSEEN
    assert together([UNSEEN]) == UNSEEN


def test_spectra():
    good = committed("spectrum")
    assert claims.low_rank({"spectrum": [good]}).verdict == HOLDS
    assert claims.skewed({"spectrum": [good]}).verdict == HOLDS
    assert claims.output_rank({"spectrum": [good]}).verdict == FAILS  # layers 0 to 2 of MiniLM
    flat = copy.deepcopy(good)
    for layer in flat["layers"]:
        layer["mean_at_index"] = 0.3
        layer["output_error"] = dict.fromkeys(layer["output_error"], 0.05)
    assert claims.low_rank({"spectrum": [flat]}).verdict == FAILS
    assert claims.skewed({"spectrum": [flat]}).verdict == FAILS
    assert claims.output_rank({"spectrum": [flat]}).verdict == HOLDS
    other = {**good, "index": 64}
    assert claims.low_rank({"spectrum": [other]}).verdict == UNSEEN


def test_theorems():
    good = committed("theory")
    assert claims.theorem_1({"theory": [good]}).verdict == HOLDS
    assert claims.useful_bound({"theory": [good]}).verdict == FAILS
    bad = copy.deepcopy(good)
    for cell in bad["cells"]:
        cell["theorem_1_proved_failures"] = 1.0
        cell["theorem_2"]["high"] = 2.0
    assert claims.theorem_1({"theory": [bad]}).verdict == FAILS
    assert claims.theorem_2({"theory": [bad]}).verdict == FAILS
    for cell in bad["cells"]:
        cell["theorem_1"]["median"] = cell["theorem_2"]["median"] = 0.001
        cell["theorem_2"]["high"] = 0.1
    assert claims.useful_bound({"theory": [bad]}).verdict == HOLDS
    assert claims.theorem_2({"theory": [bad]}).verdict == HOLDS


def test_speed():
    good = committed("benchmark/inference")
    assert claims.linear_time({"benchmark": [good]}).verdict == HOLDS
    assert claims.linear_memory({"benchmark": [good]}).verdict == HOLDS
    found = claims.table_3({"benchmark": [good]})
    assert found.verdict == FAILS
    assert "time at N = 512" in found.measured
    slow = copy.deepcopy(good)
    for row in slow["timings"]:
        if "failed" not in row:
            row["cpu_s"] *= row["length"]
    for row in slow["memory"]:
        row["peak_bytes"] = row["length"] ** 2
    assert claims.linear_time({"benchmark": [slow]}).verdict == FAILS
    assert claims.linear_memory({"benchmark": [slow]}).verdict == FAILS
    fast = copy.deepcopy(good)
    for row in fast["timings"]:
        if row["encoder"] == "roberta eager":
            row["cpu_s"] *= 100
    for row in fast["memory"]:
        if row["encoder"] == "roberta eager" and "failed" not in row:
            row["peak_bytes"] *= 100
    assert claims.table_3({"benchmark": [fast]}).verdict == HOLDS


def comparison(values, metric="accuracy"):
    runs = {
        name: {"seeds": {str(i): {"metrics": {"test_rows": 9, f"test_{metric}": v}} for i, v in enumerate(own)}}
        for name, own in values.items()
    }
    return {"compare": [{"recipe": {"compare": {"checkpoints": dict.fromkeys(values, "x")}}, "tasks": {"task": runs}}]}


def test_fine_tuning():
    rule = claims.fine_tuned
    assert rule(comparison({"full": [0.8, 0.9], "K": [0.795, 0.91]})).verdict == HOLDS
    found = rule(comparison({"full": [0.8, 0.9], "K": [0.7, 0.85]}))
    assert found.verdict == FAILS
    assert "K on task: -7.5 points (-10.0 to -5.0)" in found.measured
    assert rule(comparison({"full": [0.8, 0.9], "K": [0.9, 0.8]})).verdict == UNSEEN
    failed = comparison({"full": [0.8, 0.9], "K": [0.8, 0.9]})
    failed["compare"][0]["tasks"]["task"]["K"]["seeds"]["1"] = {"failed": True}
    assert rule(failed).verdict == UNSEEN
    assert rule(comparison({"full": [0.4, 0.4], "K": [1.9, 1.9]}, "mse")).verdict == UNSEEN


def test_steps():
    chains = {"linformer": {"64": 30, "128": 30}, "full attention": {"64": 25, "128": 25}}
    assert claims.no_extra_step({"depth": [chains]}).verdict == HOLDS
    chains["linformer"]["128"] = 31
    assert claims.no_extra_step({"depth": [chains]}).verdict == FAILS


def test_without_any_evidence_every_claim_is_unseen_and_says_what_is_missing():
    assert len(BY_RULE) == len(CLAIMS)
    for claim in CLAIMS:
        found = claim.judge({})
        assert (found.verdict, found.measured[:8]) == (UNSEEN, "nothing:"), claim.words
