"""The fidelity report: measures with known answers, tables, plot and card."""

import copy
import json
import math
from dataclasses import replace

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


def fixed(lengths: dict[str, float], masked: bool = False, rho: float | None = 0.5) -> dict:
    """A report with round numbers."""
    times = {"source": 0.02, "student": 0.01}
    seconds = {name: {"median": value, "min": value, "max": value} for name, value in times.items()}
    mlm = {"tokens": 9, "agreement": 0.875, "source_perplexity": 4.0, "student_perplexity": 5.0}
    return {
        "source": "acme/bert",
        "description": "N = 48, K = 12, `gated_pool`",
        "threads": 2,
        "dtype": "float32",
        "source_difference": 1.5e-7,
        "lengths": {
            length: {
                "rows": 8,
                "cosine": 1 - error / 10,
                "cosine_floor": 0.25,
                "rank_correlation": rho,
                "final_error": error,
                "layers": [{"attention_error": 2 * error, "hidden_error": error}] * 2,
                "genres": {"plays": {"rows": 8, "cosine": 0.75, "final_error": error}},
                "seconds": seconds,
                "memory_mib": {"source": 20.0, "student": None if masked else 10.0},
                **({"masked": mlm} if masked else {}),
            }
            for length, error in lengths.items()
        },
    }


def test_summary_table_row_by_row():
    assert fidelity_page.summary_table(fixed({"12": 0.0, "48": 0.125})["lengths"]).splitlines() == [
        "| tokens | cosine (floor) | rank correlation | error of the last hidden state | ms (source) | MiB (source) |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 12 | 1.0000 (0.250) | 0.5000 | 0.0000 | 10.0 (20.0) | 10 (20) |",
        "| 48 | 0.9875 (0.250) | 0.5000 | 0.1250 | 10.0 (20.0) | 10 (20) |",
    ]
    masked = fidelity_page.summary_table(fixed({"48": 0.125}, masked=True, rho=None)["lengths"]).splitlines()
    assert masked[0].split(" | ")[4:6] == ["same masked token", "perplexity (source)"]
    assert masked[2] == (
        "| 48 | 0.9875 (0.250) | too few rows | 0.1250 | 0.875 | 5.00 (4.00) | 10.0 (20.0) | not measured |"
    )


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


def test_the_report_in_markdown():
    text = fidelity_page.render(fixed({"12": 0.0, "48": 0.125}))
    title, first, table = text.split("\n\n")[:3]
    assert title == "# How faithful is it?"
    assert first == "`acme/bert` beside its Linformer: N = 48, K = 12, `gated_pool`."
    assert table == fidelity_page.summary_table(fixed({"12": 0.0, "48": 0.125})["lengths"])
    assert "8 rows; errors are |ours - source| / |source|." in text
    assert "2 threads, float32" in text
    assert "differ by 1.5e-07 (relative)" in text
    assert "At 48 tokens, by text and by layer:" in text
    assert "| plays | 8 | 0.7500 | 0.1250 |" in text
    assert "| 0 | 0.250 | 0.125 |\n| 1 | 0.250 | 0.125 |" in text
    assert text.endswith("![fidelity](fidelity.png)\n")


@pytest.mark.parametrize("rho", [0.5, None])
def test_the_plot_is_a_picture(rho, tmp_path):
    fidelity_page.plot(tmp_path / "p.png", fixed({"12": 0.0, "48": 0.125}, rho=rho))
    picture = (tmp_path / "p.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


CARD = """---
{base}library_name: transformers
pipeline_tag: feature-extraction
tags:
- linformer
- efficient-attention
---

# Linformer from bert

`{name}` (BertModel) with attention shortened: N = 48, K = 12, `gated_pool` with a band of 3 x 3 single tokens.

## Measured

|  |  |
| --- | --- |
| parameters | 12,345 |
| wall time, s | 1.5 |

| tokens | cosine (floor) | rank correlation | error of the last hidden state | ms (source) | MiB (source) |
| --- | --- | --- | --- | --- | --- |
| 48 | 0.9875 (0.250) | 0.5000 | 0.1250 | 10.0 (20.0) | 10 (20) |

Measured on text that was not trained or calibrated on; `fidelity.md` has the layers and says what the columns mean.

![fidelity](fidelity.png)

## Use

```python
from transformers import AutoTokenizer, AutoModel

name = "<this folder or repository>"
commit = "<the commit whose code you have read>"  # trust_remote_code runs it; in a folder of yours it is ignored
tokenizer = AutoTokenizer.from_pretrained(name, revision=commit)
model = AutoModel.from_pretrained(name, revision=commit, trust_remote_code=True)
```

With the package `linformer_hf` installed, `import linformer_hf` replaces `trust_remote_code=True`.

## Limits

It knows what its source knows, less exactly on inputs longer than K tokens, and shares its biases. \
Positions beyond the source's own length were never pretrained. The source's licence applies.

Everything that was run is in `results.json`: options, versions, seed, data counts, metrics.
"""


def test_the_card_word_by_word(tiny_source, tmp_path):
    source = read_source(str(tiny_source()))
    student = convert_model(source, projected_length=12)
    metrics = {"parameters": 12345, "wall time, s": 1.5}
    for name, base in (("acme/bert", "base_model: acme/bert\n"), (str(tmp_path / "bert"), "")):
        (tmp_path / "bert").mkdir(exist_ok=True)
        card = model_card(**fidelity_page.card(student, replace(source, name=name), fixed({"48": 0.125}), metrics))
        assert card.strip() == CARD.format(name=name if base else "bert", base=base).strip()


def test_the_card_of_an_official_linformer_claims_no_measurement(tiny_source):
    source = read_source(str(tiny_source()))
    facts = fidelity_page.card(convert_model(source, projected_length=12), source, None, {"parameters": 1})
    card = model_card(**facts)
    assert "nothing is approximated" in card
    assert "fidelity" not in card
