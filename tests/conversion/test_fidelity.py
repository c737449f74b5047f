"""The fidelity report: measures with known answers, tables, plot and card."""

import copy
import json
import math

import pytest
import torch

from linformer_hf.conversion import fidelity, fidelity_page
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import exact_twin
from linformer_hf.conversion.sources import ConversionError
from linformer_hf.data.masking import Masker
from linformer_hf.hub.card import model_card
from linformer_hf.utils import timing
from linformer_hf.utils.files import read_json


N = 48


@pytest.fixture(scope="module", params=["BertModel", "BertForMaskedLM"])
def source(request, tiny_source):
    return read_source(str(tiny_source(request.param)))


@pytest.fixture(scope="module")
def held_out(source):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, source.config["vocab_size"], (8, N), generator=generator)
    return {"plays": list(ids[:5]), "manuals": list(ids[5:])}


def stacked(held_out):
    return {genre: torch.stack(given) for genre, given in held_out.items()}


def test_a_model_is_faithful_to_itself(source, held_out):
    twin = exact_twin(source, N, "repeat")
    measured = fidelity.measure(twin, twin, stacked(held_out), source.tokenizer)
    assert measured["cosine"] == pytest.approx(1)
    assert measured["rank_correlation"] == pytest.approx(1)
    assert measured["final_error"] == 0
    assert measured["layers"] == [{"attention_error": 0, "hidden_error": 0}] * 2
    assert {genre: each["rows"] for genre, each in measured["genres"].items()} == {"plays": 5, "manuals": 3}
    if source.head == "ForMaskedLM":
        assert measured["masked"]["agreement"] == 1
        assert measured["masked"]["student_perplexity"] == measured["masked"]["source_perplexity"] > 1
        assert measured["masked"]["tokens"] > 20
    else:
        assert "masked" not in measured


def test_errors_are_relative_to_the_source(source, held_out):
    twin = exact_twin(source, N, "repeat")
    other = copy.deepcopy(twin)
    with torch.no_grad():  # the last hidden state is 1.1 times the source's
        norm = other.base_model.encoder.layer[1].output.LayerNorm
        norm.weight.mul_(1.1)
        norm.bias.mul_(1.1)
        dense = other.base_model.encoder.layer[0].attention.output.dense  # and this output three times
        dense.weight.mul_(3)
        dense.bias.mul_(3)
    measured = fidelity.measure(twin, other, stacked(held_out), source.tokenizer)
    assert measured["layers"][0]["attention_error"] == pytest.approx(2, rel=1e-4)
    with torch.no_grad():
        dense.weight.div_(3)
        dense.bias.div_(3)
    measured = fidelity.measure(twin, other, stacked(held_out), source.tokenizer)
    assert measured["final_error"] == pytest.approx(0.1, rel=1e-3)
    assert measured["cosine"] == pytest.approx(1)


def test_the_floor_is_the_cosine_of_the_mean_embedding(source, held_out):
    twin = exact_twin(source, N, "repeat")
    measured = fidelity.measure(twin, twin, stacked(held_out), source.tokenizer)
    with torch.no_grad():
        embeddings = source.reference.base_model(torch.cat(list(stacked(held_out).values()))).last_hidden_state.mean(1)
    expected = torch.cosine_similarity(embeddings.mean(0, keepdim=True), embeddings).mean()
    assert measured["cosine_floor"] == pytest.approx(float(expected), abs=1e-5)


def test_rank_correlation_of_reversed_similarities_is_minus_one():
    angles = torch.tensor([0.0, 0.1, 0.3])
    goal = torch.stack([angles.cos(), angles.sin()], 1)
    turned = torch.tensor([0.0, 0.3, 0.4])  # the nearest pair becomes the second, and so on
    given = torch.stack([turned.cos(), turned.sin()], 1)
    assert fidelity.rank_correlation(goal, goal) == pytest.approx(1)
    assert fidelity.rank_correlation(given, goal) < 1
    assert fidelity.rank_correlation(goal[:2], goal[:2]) is None


def test_a_twin_that_is_not_the_source_is_refused(source, held_out):
    twin = exact_twin(source, N, "repeat")
    assert fidelity.check_twin(source, twin, held_out) < 1e-5
    with torch.no_grad():
        twin.base_model.encoder.layer[0].attention.self.query.weight.mul_(2)
    with pytest.raises(ConversionError, match="differs from the source"):
        fidelity.check_twin(source, twin, held_out)


def test_the_report_is_whole_and_written(source, held_out, tmp_path):
    twin, student = exact_twin(source, N, "repeat"), convert_model(source, projected_length=12)
    content = fidelity.report(source, twin, student, held_out, 1e-7)
    assert list(content["lengths"]) == ["8", "12", "24", "48"]
    assert content["lengths"]["12"]["final_error"] < 1e-5 < content["lengths"]["48"]["final_error"]
    for measured in content["lengths"].values():
        assert 0 < measured["seconds"]["student"]["min"] <= measured["seconds"]["student"]["median"]
    fidelity_page.write(tmp_path, content)
    assert read_json(tmp_path / "fidelity.json", "") == json.loads(json.dumps(content, allow_nan=False))
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "fidelity.md").read_text()
    for part in ("plays", "manuals", "| 48 | ", "`gated_pool` with a band of 3 x 3 single tokens", "8 rows"):
        assert part in text
    assert ("same masked token" in text) == (source.head == "ForMaskedLM")
    card = model_card(**fidelity_page.card(student, source, content, {"parameters": 12345}))
    for part in ("12,345", "fidelity.png", fidelity_page.summary_table(content["lengths"]), "N = 48, K = 12"):
        assert part in card
    auto = "AutoModelForMaskedLM" if source.head == "ForMaskedLM" else "AutoModel"
    assert f"import AutoTokenizer, {auto}\n" in card


def test_peak_memory_sees_a_large_tensor():
    peak = timing.peak_resident_mib(lambda: torch.ones(64 * 2**18))
    assert peak is None or 60 < peak < 200


def test_peak_memory_is_unknown_without_proc(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("/proc/self/clear_refs")

    monkeypatch.setattr(timing.Path, "write_text", missing)
    assert timing.peak_resident_mib(lambda: None) is None


def test_masked_numbers_are_those_of_a_plain_loop(tiny_source, held_out):
    source = read_source(str(tiny_source("BertForMaskedLM")))
    twin, student = exact_twin(source, N, "repeat"), convert_model(source, projected_length=12)
    masker, same, losses = Masker(source.tokenizer, seed=0), [], {"source": [], "student": []}
    for given in held_out.values():
        for index, row in enumerate(given):
            inputs, labels = masker(row.tolist(), 0, index)
            with torch.no_grad():
                logits = {
                    "source": source.reference(torch.from_numpy(inputs)[None]).logits[0],
                    "student": student(torch.from_numpy(inputs)[None]).logits[0],
                }
            for place, label in enumerate(labels.tolist()):
                if label != -100:
                    same.append(int(logits["source"][place].argmax()) == int(logits["student"][place].argmax()))
                    for name, each in logits.items():
                        losses[name].append(-each[place].log_softmax(0)[label].item())
    found = fidelity.masked(twin, student, stacked(held_out), source.tokenizer)
    assert found["tokens"] == len(same)
    assert found["agreement"] == pytest.approx(sum(same) / len(same))
    for name, nats in losses.items():
        assert found[f"{name}_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3)


def test_a_stretched_twin_is_compared_at_the_sources_own_length(source):
    ids = torch.randint(5, 100, (1, 2 * N), generator=torch.Generator().manual_seed(0))
    for positions in ("repeat", "interpolate"):
        twin = exact_twin(source, 2 * N, positions)
        assert fidelity.check_twin(source, twin, {"one row": list(ids)}) < 1e-5


def test_the_band_and_the_slots_alone(source, held_out):
    """K = 12: a band of 3 x 3, and 3 slots: the first token, the last one and all between."""
    model = convert_model(source, projected_length=12).base_model
    model.set_attn_implementation("eager")
    ids = held_out["plays"][0][None]
    before = model(ids, output_attentions=True)
    for kept in ("band", "slots"):
        with fidelity.alone(model, kept):
            maps = torch.stack(model(ids, output_attentions=True).attentions)  # [L, 1, H, N, K]
        assert maps.sum(-1).allclose(torch.ones(()), atol=1e-5)
        first, between, last, near = maps[..., 0], maps[..., 1], maps[..., 2], maps[..., 3:]
        assert (last > 0).any()
        assert (between.max() == 0) == (kept == "band")
        assert (near.max() == 0) == (kept == "slots")
        assert (first[..., 0] > 0).all() == (kept == "slots")  # in the band of the first block, so shut beside it
    assert model(ids, output_attentions=True).last_hidden_state.equal(before.last_hidden_state)


def test_the_report_says_what_band_and_slots_are_worth_alone(source, held_out):
    twin, student = exact_twin(source, N, "repeat"), convert_model(source, projected_length=12)
    content = fidelity.report(source, twin, student, held_out, 1e-7)
    assert [length for length, measured in content["lengths"].items() if "alone" in measured] == ["48"]
    found = content["lengths"]["48"]
    with fidelity.alone(student.base_model, "band"):
        band = fidelity.measure(twin, student, stacked(held_out), source.tokenizer, source)
    assert found["alone"]["band"] == {name: pytest.approx(band[name]) for name in ("cosine", "final_error")}
    assert found["final_error"] < found["alone"]["band"]["final_error"] != found["alone"]["slots"]["final_error"]
    text = fidelity_page.render(content)
    assert f"| the slots | {found['alone']['slots']['cosine']:.4f} |" in text
    without = fidelity.report(source, twin, convert_model(source, projected_length=12, local_window=0), held_out, 1e-7)
    assert "alone" not in without["lengths"]["48"]
    assert "queries see" not in fidelity_page.render(without)


def test_full_attention_that_would_take_long_is_not_run(source, held_out, monkeypatch):
    """Its time grows with the square of the length: .5 s at 8 tokens, 1.1 at 12, 4.5 at 24 and 18 at 48."""
    twin, student = exact_twin(source, N, "repeat"), convert_model(source, projected_length=12)
    asked, whole = [], fidelity.cost

    def cost(exact, model, ids):
        asked.append(exact is not None)
        found = whole(exact, model, ids)
        if exact is not None:
            found["seconds"]["source"]["median"] = ids.shape[1] ** 2 / 128
        return found

    monkeypatch.setattr(fidelity, "cost", cost)
    monkeypatch.setattr(fidelity, "LONGEST_PASS", 2.0)
    lengths = fidelity.report(source, twin, student, held_out, 1e-7)["lengths"]
    assert asked == [True, True, False, False]
    *_, row = fidelity_page.summary_table(lengths).splitlines()
    assert row.count("(not run)") == 2
    assert "0.0000" not in row  # it is compared all the same
