"""The two theorems: their constructions, written as loops here, their bound, and a run."""

import json
import math

import pytest
import torch

from linformer_hf import cli
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import exact_twin
from linformer_hf.paper import theory as verb
from linformer_hf.paper.theory import bound, collect, needed_k, projection, read_recipe, theorem_1, theorem_2, zero_2
from linformer_hf.utils.recipe import RecipeError


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator) for size in ((6, 6), (6, 3), (4, 6))]


def test_theorem_1_is_its_formula(drawn):
    scores, values, r = drawn
    maps = scores.softmax(-1)
    stated, proved = theorem_1(maps, values, r)
    low = maps @ r.T @ r
    for column in range(3):
        w = values[:, column]
        assert stated[column].item() == pytest.approx(((low - maps) @ w).norm().item() / (maps @ w).norm().item(), 1e-4)
        for row in range(6):
            p = maps[row]
            wanted = abs(p @ r.T @ r @ w - p @ w) / (p.norm() * w.norm())
            assert proved[row, column].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_theorem_2_is_its_formula(drawn):
    scores, values, r = drawn
    delta = 0.3
    errors, zeros = theorem_2(scores, values, r, delta), zero_2(scores, values)
    for row in range(6):
        w, exact = scores[row], scores[row].softmax(-1)
        given = (w @ (delta * r).T).softmax(-1) @ (math.exp(-delta) * r) @ values
        size = exact.norm() * values.norm()
        assert errors[row].item() == pytest.approx(((given - exact @ values).norm() / size).item(), 1e-4)
        assert zeros[row].item() == pytest.approx(((exact @ values).norm() / size).item(), 1e-4)


def test_projections_keep_lengths_on_average():
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(50)
    squares = [(projection(8, 50, generator) @ vector).square().sum() for _ in range(4000)]
    assert (torch.stack(squares).mean() / vector.square().sum()).item() == pytest.approx(1, abs=0.05)


def test_the_bound_holds_and_is_what_the_paper_says():
    assert needed_k(512, 0.5) == math.ceil(5 * math.log(512) / (0.25 - 0.125))
    assert bound(4, 512, 0.5) == 1
    assert bound(1000, 512, 0.5) == pytest.approx(2 * 512 * math.exp(-0.125 * 250))
    generator = torch.Generator().manual_seed(1)
    maps, values = torch.randn(64, 64, generator=generator).softmax(-1), torch.randn(64, 8, generator=generator)
    failed = []
    for _ in range(100):
        _, proved = theorem_1(maps, values, projection(300, 64, generator))
        failed.append((proved > 0.5).any(0).float().mean().item())
    assert sum(failed) / 100 <= bound(300, 64, 0.5)


def test_scores_and_values_are_the_models_own(tiny_source):
    source = read_source(str(tiny_source()))
    model = exact_twin(source, 48, "repeat").base_model.eval()
    row = torch.randint(5, 100, (30,))
    found = collect(model, row, head=1)
    theirs = source.reference.base_model
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = theirs(row[None], output_attentions=True).attentions
    assert len(found) == len(attentions) == 2
    for (scores, values), wanted in zip(found, attentions, strict=True):
        assert torch.allclose(scores.softmax(-1), wanted[0, 1], atol=1e-5)
        assert values.shape == (30, 12)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def recipe(tmp_path, tiny_source, texts):
    content = {"output_dir": str(tmp_path / "out"), "model": str(tiny_source()), "corpus": str(texts)}
    content |= {"rows": 2, "lengths": [16, 32], "projected_lengths": [4, 64], "draws": 2}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"theory": content}), encoding="utf-8")
    return path


def test_a_run(recipe, tmp_path, capsys):
    assert cli.main(["theory", str(recipe)]) == 0
    folder = tmp_path / "out"
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    kinds = {"layer 0", "layer 1", verb.RANDOM}
    assert {(c["kind"], c["n"], c["k"]) for c in content["cells"]} == {
        (kind, n, k) for kind in kinds for n in (16, 32) for k in (4, 64)
    }
    for kind in kinds:  # more slots, less error
        few, many = (c for c in content["cells"] if (c["kind"], c["n"]) == (kind, 32))
        assert many["theorem_1"]["median"] < few["theorem_1"]["median"]
        assert many["theorem_1_proved_failures"] <= few["theorem_1_proved_failures"]
    text = (folder / "theory.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert f"K = {needed_k(32, 0.5):,}, more than N" in text
    for picture in (verb.FIRST_FILE, verb.SECOND_FILE, verb.LENGTH_FILE):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_texts_longer_than_the_model_reads_are_refused(recipe, tmp_path, capsys):
    assert cli.main(["theory", str(recipe), "theory.lengths=[64]"]) == 2
    assert "reads at most 48 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("theory.epsilon=1.0", "epsilon must lie between 0 and 1, got 1.0"),
        ("theory.draws=0", "draws must be at least 1, got 0"),
        ("theory.lengths=[]", "need at least one number"),
        ("theory.projected_lengths=[0]", "projected_lengths at least 1"),
    ],
)
def test_bad_recipes_are_refused(recipe, change, words):
    with pytest.raises(RecipeError, match=words):
        read_recipe(recipe, [change])
