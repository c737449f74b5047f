"""The benchmark from end to end at a tiny size (no assertion about time), its check and its tables."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linformer_hf import cli
from linformer_hf.benchmark import benchmark as verb
from linformer_hf.benchmark import encoders as alternatives
from linformer_hf.benchmark.benchmark import Benchmark, Group, difference, read_recipe, step
from linformer_hf.benchmark.encoders import BUILDERS, DIFFERENCES, FLOOR, OURS, PROJECTED, Shape
from linformer_hf.benchmark.published import TABLE_2, TABLE_3
from linformer_hf.benchmark.tables import beside, exponent, grouped, passed, ratio, tables
from linformer_hf.utils.files import SUM_KEY
from linformer_hf.utils.recipe import RecipeError


RECIPE = """
benchmark:
  output_dir: {folder}
  lengths: [64, 128]
  projected_lengths: [16]
  alternatives: [roberta eager, roberta sdpa, linformer, linformer-pytorch]
  dtypes: [float32, bfloat16]
  hidden_size: 32
  num_attention_heads: 2
  intermediate_size: 64
  samples: 3
  longest: {{roberta eager: 64}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(folder=folder / "out"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ran(recipe, tmp_path_factory):
    """(folder, what was printed)"""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["benchmark", str(recipe)]) == 0
    return recipe.parent / "out", printed.getvalue()


def test_results_plots_and_the_last_line(ran):
    folder, printed = ran
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    # The file holds its own sum besides.
    assert content.pop(SUM_KEY)
    assert json.loads(printed.splitlines()[-1]) == content
    for picture in ("time.png", "memory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert (folder / "tables.md").read_text(encoding="utf-8").strip() in printed
    groups = {(row["mode"], row["dtype"], row["length"]) for row in content["timings"]}
    modes = ("inference", "training")
    wanted = {(mode, dtype, n) for mode in modes for dtype in verb.TOLERANCE for n in (64, 128)}
    assert groups == wanted == {(row["mode"], row["dtype"], row["length"]) for row in content["memory"]}
    for (mode, _, length), rows in grouped(content["timings"], "mode", "dtype", "length").items():
        cases = {(OURS, 16), ("roberta sdpa", None), ("linformer", 16), ("linformer-pytorch", 16)}
        cases |= {("roberta eager", None)} if length == 64 else set()
        cases |= {(FLOOR, 16)} if mode == "inference" else set()
        assert {(row["encoder"], row["k"]) for row in rows} == cases
        assert len(rows) == len(cases)
        for row in rows:
            assert not row.get("failed")
            assert row.get("fails_check") == (False if row["encoder"] == OURS else None)
            assert 0 < row["wall_range_s"][0] <= row["wall_s"] <= row["wall_range_s"][1]
            assert row["samples"] == 3
    assert all(row["peak_bytes"] > row["input_bytes"] for row in content["memory"])
    assert content["processor"]
    assert content["versions"]["torch"] == torch.__version__


def test_a_finished_benchmark_is_not_overwritten(ran, recipe, capsys):
    assert cli.main(["benchmark", str(recipe)]) == 2
    assert "holds a finished benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("name", BUILDERS)
def test_alternatives_map_to_the_same_shape_and_have_equal_sizes(name):
    shape = Shape(64, 32, 2, 128, 2, 0.1, 16)
    model = BUILDERS[name](shape).eval()
    assert model(torch.randn(2, 64, 32)).shape == (2, 64, 32)
    assert name in DIFFERENCES
    used = {
        child.out_features * child.in_features
        for child in model.modules()
        if isinstance(child, torch.nn.Linear) and child.out_features != child.in_features
    }
    assert used & {32 * 128, 32 * 85}, "the feed-forward layer has another size"


def test_dropout_reaches_every_encoder():
    for name, build in BUILDERS.items():
        model = build(Shape(64, 32, 2, 66, 1, 0.5, 16)).train()
        states = torch.randn(1, 64, 32)
        assert not torch.allclose(model(states), model(states)), name


@pytest.mark.parametrize("fill", [1.0, 0.6])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", verb.TOLERANCE)
def test_the_check_passes_for_ours_and_fails_for_a_wrong_fast_path(monkeypatch, mode, dtype, fill):
    from linformer_hf import modeling_linformer as modeling

    group = Group(mode, dtype, 0.1 if mode == "training" else 0.0, fill, 256, 2)
    section = Benchmark("x", [256], [16], [])
    model, states, mask = verb.build(OURS, Shape(256, 32, 2, 64, 1, group.dropout, 16), group, section)
    assert mask is None if fill == 1 else mask.float().mean().item() == pytest.approx(fill, abs=0.01)
    assert difference(model, states, mask, group) <= verb.TOLERANCE[dtype]
    inner = model.model.encoder.layer[0]
    assert inner.attention.self.dropout.p == group.dropout  # as before the check
    assert inner.attention.output.dropout.p == group.dropout
    step(model, states, mask, group)()
    real = modeling.LinformerLayer.forward

    def wrong(self, hidden_states, tokens, *rest, **kwargs):
        return real(self, hidden_states, tokens, *rest, **kwargs) * (1 if "output_hidden_states" in kwargs else 1.2)

    monkeypatch.setattr(modeling.LinformerLayer, "forward", wrong)
    assert difference(model, states, mask, group) > verb.TOLERANCE[dtype]


def test_a_case_that_fails_its_check_has_no_ratio():
    shared = {"mode": "inference", "dtype": "float32", "dropout": 0.0, "fill": 1.0, "length": 512, "batch": 1}
    shared |= {"threads": 1, "allocator": "default", "contended": 0, "samples": 3}
    rows = [
        {**shared, "encoder": encoder, "k": k, "cpu_s": seconds, "cpu_range_s": [seconds, seconds]}
        for encoder, k, seconds in (
            (OURS, 128, 2.0),
            (OURS, 256, 4.0),
            ("roberta eager", None, 8.0),
            ("linformer", 128, 3.0),
            (FLOOR, 128, 1.0),
        )
    ]
    rows[0]["fails_check"], rows[1]["fails_check"] = False, True
    assert list(passed(rows)) == rows[:1]
    others = {"roberta eager": 4.0, "linformer": 1.5, FLOOR: 2.0}
    assert {encoder: ratio(rows[0], row) for encoder, row in beside(rows, rows[0]).items()} == others
    content = {
        "processor": "p",
        "versions": {"torch": "1", "transformers": "2"},
        "revision": None,
        "recipe": {"benchmark": {}},
        "timings": rows,
        "memory": [],
        "differences": {},
    }
    text = tables(content)
    assert "fails its check: no ratio" in text
    assert "4.0 / [1.5 / 1.7]" in text.replace("  ", " ")  # beside the paper's cell for N = 512, K = 128
    rows[1]["fails_check"] = False
    assert "fails its check" not in tables(content)


def test_exponent():
    assert exponent([(10, 3.0), (100, 300.0), (1000, 30000.0)]) == pytest.approx(2)
    assert exponent([(10, 3.0)]) is None


def test_the_papers_table_is_whole():
    assert sum(len(row) for row in TABLE_3.values()) == 34
    assert TABLE_3[65536][2048] == (7.9, 18)
    averages = {name: sum(row.values()) / 4 for name, row in TABLE_2.items()}
    assert len(averages) == 12
    assert averages[512, "RoBERTa-base"] == pytest.approx(92.25)  # as the paper prints them
    assert averages[1024, "Linformer, K = 256, shared kv, shared layer"] == pytest.approx(92.18, abs=0.006)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("benchmark.alternatives=[reformer]", "no encoder is called 'reformer'; there are"),
        ("benchmark.longest={bert: 3}", "no encoder is called 'bert'"),
        ("benchmark.samples=1", "samples must be at least 3, got 1"),
        ("benchmark.lengths=[]", "lengths is empty"),
        ("benchmark.projected_lengths=[100]", "are all above half of the longest input"),
        ("benchmark.fills=[0.3]", "fills must lie between 0.5 and 1"),
        ("benchmark.threads=[-1]", "threads at least 0"),
        ("benchmark.modes=[test]", "must be"),
        ("benchmark.colour=red", "unknown key 'benchmark.colour'"),
    ],
)
def test_bad_recipes_are_refused(recipe, change, words):
    with pytest.raises(RecipeError, match=words.replace("[", r"\[")):
        read_recipe(recipe, [change])


def test_a_package_that_is_missing_is_named_before_anything_is_measured(recipe, tmp_path, monkeypatch, capsys):
    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(alternatives, "importlib", SimpleNamespace(import_module=gone))  # ours only
    with pytest.raises(ImportError, match=r"pip install 'linformer_hf\[benchmark\]'"):
        verb.benchmark(recipe, [f"benchmark.output_dir={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def test_encoders_without_a_mask_are_left_out_of_padded_batches():
    section = Benchmark("x", [64], [16], ["roberta sdpa", "linformer"], fills=[1.0, 0.5])
    full, padded = (set(section.cases(group)) for group in section.groups()[:2])
    assert full - padded == {("linformer", 16)}


def test_gradient_checkpointing_reaches_the_encoders():
    section = Benchmark("x", [64], [16], [], gradient_checkpointing=True)
    group = Group("training", "float32", 0.0, 1.0, 64, 1)
    for name in (OURS, "roberta sdpa"):
        model, _, _ = verb.build(name, Shape(64, 32, 2, 64, 1, 0.0, 16), group, section)
        assert model.model.is_gradient_checkpointing


def test_constant_tokens_change_the_batch():
    section = Benchmark("x", [64, 128], [16], [], tokens=256)
    assert [(group.length, group.batch) for group in section.groups()[:2]] == [(64, 4), (128, 2)]
    assert set(PROJECTED) <= set(BUILDERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused_before_anything_is_measured(tmp_path, capsys):
    recipe = "configs/benchmark/gpu.yaml"
    folder = tmp_path / "out"
    root = Path(__file__).parents[2]
    assert cli.main(["benchmark", str(root / recipe), f"benchmark.output_dir={folder}"]) == 2
    assert "no CUDA device here. Set device: cpu" in capsys.readouterr().err
    assert not folder.exists()
