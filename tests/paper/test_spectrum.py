"""The spectrum of attention maps: what is summed, what it is compared with, and a run from end to end."""

import json

import pytest
import torch

from linformer_hf import cli
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import exact_twin
from linformer_hf.paper import spectrum as verb
from linformer_hf.paper.spectrum import Spectrum, Statistics, measure, read_recipe, summary
from linformer_hf.utils.recipe import RecipeError


def maps_of_rank(rank: int, heads: int = 2, n: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(heads, n, rank, generator=generator) @ torch.rand(heads, rank, n, generator=generator)


def test_a_map_of_rank_3_has_all_its_mass_in_3_values_and_no_error_from_there():
    found = Statistics(1, 2, 12, 3, [0.9, 0.999])
    found.add(0, maps_of_rank(3), torch.randn(2, 12, 4))
    means = found.means()
    assert means["curve"][0, :, 2] == pytest.approx(1, abs=1e-5)
    assert (means["curve"][0, :, 1] < 0.999).all()
    assert means["error"][0, :, 0] == pytest.approx(1, abs=1e-6)  # no value at all: the answer zero
    assert (means["error"][0, :, 3:] < 1e-3).all()
    assert (means["error"][0, :, 2] > 1e-3).all()
    assert (means["ranks"][1] == 3).all()


def test_the_error_is_that_of_the_cut_decomposition():
    maps, values = torch.rand(2, 12, 12).softmax(-1), torch.randn(2, 12, 4)
    found = Statistics(1, 2, 12, 5, [0.9])
    found.add(0, maps, values)
    left, singular, right = torch.linalg.svd(maps)
    for k in (1, 5, 11):
        cut = (left[..., :k] * singular[:, None, :k]) @ right[:, :k]
        wanted = ((maps - cut) @ values).norm(dim=(1, 2)) / (maps @ values).norm(dim=(1, 2))
        assert torch.allclose(found.error[0, :, k].float(), wanted, atol=1e-4)
    curve = singular.cumsum(-1) / singular.sum(-1, keepdim=True)
    assert torch.allclose(found.curve[0].float(), curve, atol=1e-5)
    assert torch.equal(found.ranks[0, 0], ((curve < 0.9).sum(-1) + 1).double())


def test_texts_are_averaged_and_the_extremes_kept():
    found = Statistics(1, 2, 12, 1, [0.9])
    one, two = maps_of_rank(1), maps_of_rank(6)
    found.add(0, one, torch.randn(2, 12, 4))
    found.add(0, two, torch.randn(2, 12, 4))
    assert found.count == 2
    at = found.means()["curve"][0, :, 0]
    assert found.highest[0] == pytest.approx(1, abs=1e-5)
    assert torch.allclose(found.lowest[0] + 1, 2 * at, atol=1e-5)


def test_the_maps_are_the_models_own(tiny_source):
    source = read_source(str(tiny_source()))
    model = exact_twin(source, 48, "repeat").base_model.eval()
    row = torch.randint(5, 100, (48,))
    seen = []
    real = Statistics.add

    class Spy(Statistics):
        def add(self, layer, maps, values):
            seen.append((layer, maps, values))
            real(self, layer, maps, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "Statistics", Spy)
        measure(model, [row], 8, [0.9])
    theirs = source.reference.base_model
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = theirs(row[None], output_attentions=True).attentions
    assert [layer for layer, _, _ in seen] == [0, 1]
    for (_, maps, values), wanted in zip(seen, attentions, strict=True):
        assert torch.allclose(maps, wanted[0], atol=1e-5)
        assert values.shape == (2, 48, 12)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_recommended_k_is_the_smallest_multiple_within_the_tolerance():
    found = Statistics(2, 1, 12, 4, [0.9])
    found.count = 1
    found.error[0, 0] = torch.linspace(1, 0, 13)
    found.error[1, 0] = 0.5
    section = Spectrum("out", "model", "demo", tolerance=0.4, step=2)
    assert summary(found, section, 12)["recommended_projected_length"] == [8, 12]


@pytest.fixture
def recipe(tmp_path, tiny_source, texts):
    content = {"output_dir": str(tmp_path / "out"), "model": str(tiny_source()), "corpus": str(texts)}
    content |= {"rows": 3, "length": 32, "step": 8}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"spectrum": content}), encoding="utf-8")
    return path


def test_a_run(recipe, tmp_path, capsys):
    assert cli.main(["spectrum", str(recipe)]) == 0
    folder = tmp_path / "out"
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["texts"] == 3
    assert content["index"] == 8
    assert len(content["layers"]) == 2
    for layer in content["layers"]:
        assert layer["lowest_at_index"] <= layer["mean_at_index"] <= layer["highest_at_index"]
        assert list(layer["output_error"]) == ["8", "16", "24", "32"]
        assert layer["recommended_k"] in (8, 16, 24, 32)
    text = (folder / "spectrum.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    k = ",".join(map(str, content["recommended_projected_length"]))
    assert f"--projected-length {k}" in text
    for picture in (verb.CURVES_FILE, verb.HEAT_FILE, verb.ERROR_FILE):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert cli.main(["spectrum", str(recipe)]) == 2
    assert "finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("spectrum.length=49", "length=49 must lie between 8 and what"),
        ("spectrum.index=33", "index=33 must lie between 1 and length=32"),
        ("spectrum.corpus=no-such-folder", "no-such-folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(recipe, tmp_path, capsys, change, words):
    assert cli.main(["spectrum", str(recipe), change]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("spectrum.rows=0", "rows must be at least 1, got 0"),
        ("spectrum.tolerance=1.0", "tolerance must lie between 0 and 1"),
        ("spectrum.masses=[2.0]", "masses must lie between 0 and 1"),
    ],
)
def test_bad_recipes_are_refused(recipe, change, words):
    with pytest.raises(RecipeError, match=words):
        read_recipe(recipe, [change])
