"""The fidelity report as a page, a picture and a model card."""

from dataclasses import replace

import pytest

from linformer_hf.conversion import fidelity_page
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.hub.card import model_card


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
