"""The fidelity report: measures with known answers, tables, plot and card."""

import copy
import json

import pytest
import torch

from linformer_hf import fidelity
from linformer_hf.convert import convert_model
from linformer_hf.data.texts import UNSEEN, cut, draw, text_rows
from linformer_hf.sources import ConversionError, exact_twin, read_source


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
    fidelity.write(tmp_path, content)
    assert json.loads((tmp_path / "fidelity.json").read_text()) == json.loads(json.dumps(content))
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "fidelity.md").read_text()
    for part in ("plays", "manuals", "| 48 | ", "`gated_pool` with a band of 3 x 3 single tokens", "8 rows"):
        assert part in text
    assert ("same masked token" in text) == (source.head == "ForMaskedLM")
    card = fidelity.card(student, source, content, {"parameters": 12345})
    for part in (
        "12,345",
        "fidelity.png",
        fidelity.summary_table(content["lengths"]),
        "base_model" * 0,
        "N = 48, K = 12",
    ):
        assert part in card
    auto = "AutoModelForMaskedLM" if source.head == "ForMaskedLM" else "AutoModel"
    assert f"import AutoTokenizer, {auto}\n" in card


def test_peak_memory_sees_a_large_tensor():
    peak = fidelity.peak_resident_mib(lambda: torch.ones(64 * 2**18))
    assert peak is None or 60 < peak < 200


def test_calibration_and_held_out_rows_share_no_document(source, texts, tmp_path):
    found = text_rows(str(texts), source.tokenizer, N, 40, 6, cache_dir=str(tmp_path))
    documents = {name: file.read_text() for name, file in ((f.name, f) for f in texts.iterdir())}
    marks = {number: f"{number}x" for number in range(len(documents))}  # every sentence names its file: "7x12."

    def files(rows):
        words = source.tokenizer.decode(torch.cat(list(rows))).replace(" ", "")
        return {number for number, mark in marks.items() if f"{mark}" in words}

    genre = next(name for name in found.held_out if name != UNSEEN)
    names = source.tokenizer.batch_decode(found.calibration[:3])
    assert len(found.calibration) > 5
    assert {len(row) for row in [*found.calibration, *found.held_out[genre]]} == {N}, names
    held = {tuple(row.tolist()) for row in found.held_out[genre]}
    assert held
    assert not held & {tuple(row.tolist()) for row in found.calibration}
    assert UNSEEN in found.held_out
    assert found.counts["held_out_rows"][UNSEEN] == 3
    again = text_rows(str(texts), source.tokenizer, N, 40, 6, cache_dir=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(found.calibration, again.calibration, strict=True))


def test_without_a_corpus_only_pythons_topics_are_measured_on(source, tmp_path):
    found = text_rows(None, source.tokenizer, N, 40, 6, cache_dir=str(tmp_path))
    assert found.calibration == []
    assert {genre: len(rows) for genre, rows in found.held_out.items()} == {UNSEEN: 6}


def test_too_little_text_is_refused(source, tmp_path, tmp_path_factory):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the river")
    with pytest.raises(ValueError, match="no row of 48 tokens"):
        text_rows(str(tmp_path), source.tokenizer, N, 40, 6, cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_draw_takes_whole_rows_only_and_cut_keeps_the_closing_mark():
    rows = [[1, 7, 8, 2], [1, 9, 2], [1, 5, 6, 2]]
    drawn = draw(rows, 4, 5, seed=0)
    assert sorted(row.tolist() for row in drawn) == [[1, 5, 6, 2], [1, 7, 8, 2]]
    assert sorted(cut(drawn, 3).tolist()) == [[1, 5, 2], [1, 7, 2]]
