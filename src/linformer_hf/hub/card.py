"""The model card: a function of plain data, which results.json keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.files import CARD_FILE, CURVE_FILE, write_text
from ..utils.reporting import markdown_table


CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Measured

{{ table }}

{{ notes }}

{{ picture }}

## Use

{{ sentence }}```python
from transformers import AutoTokenizer, {{ auto_class }}

name = "<this folder or repository>"
commit = "<the commit whose code you have read>"  # trust_remote_code runs it; in a folder of yours it is ignored
tokenizer = AutoTokenizer.from_pretrained(name, revision=commit)
model = {{ auto_class }}.from_pretrained(name, revision=commit, trust_remote_code=True)
```

With the package `linformer_hf` installed, `import linformer_hf` replaces `trust_remote_code=True`.

## Limits

{{ limits }}

Everything that was run is in `results.json`: options, versions, seed, data counts, metrics.
"""


SENTENCE = """{prompts}```python
from sentence_transformers import SentenceTransformer

name = "<this folder or repository>"
commit = "<the commit whose code you have read>"  # trust_remote_code runs it; in a folder of yours it is ignored
encoder = SentenceTransformer(name, revision=commit, trust_remote_code=True)
vectors = encoder.{encode}(["A first text.", "And a second one."])
```

Those vectors are made of the states of the tokens: {vectors}. The states alone:

"""


@dataclass
class CardMetadata:
    """Section `card` of a recipe: what only its author knows, for the model card's metadata.

    Args:
        license: of the weights, by the Hub's identifier, such as apache-2.0.
        language: codes such as en.
        datasets: Hub names of what it was trained on.
    """

    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)


def metadata_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section `card`, as model_card takes it."""
    return {key: value for key, value in (recipe.get("card") or {}).items() if value}


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """README.md; `facts` are the arguments of model_card."""
    write_text(folder / CARD_FILE, model_card(**facts))


def _evaluation(task: str, dataset: str, split: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_value=value,
        verified=False,
    )


def _sentence(vectors: str, prompts: Mapping[str, str]) -> str:
    """How to encode, with what belongs before the texts first."""
    before = ""
    if prompts:
        listed = "\n".join(f"- `{name}`: `{text}`" for name, text in prompts.items())
        before = (
            f"Texts are read behind a prompt:\n\n{listed}\n\n`encode_query` and `encode_document` put the one of their "
            "name there, `encode(..., prompt_name=...)` any of them.\n\n"
        )
    return SENTENCE.format(prompts=before, encode="encode_document" if prompts else "encode", vectors=vectors)


def model_card(
    *,
    title: str,
    summary: str,
    metrics: Mapping[str, Any],
    notes: str,
    limits: str,
    auto_class: str,
    pipeline_tag: str,
    evaluated: Sequence[Mapping[str, Any]] = (),
    picture: Sequence[str] | None = ("training curve", CURVE_FILE),
    sentence: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> str:
    """The README.md of a checkpoint, with the Hub's metadata block.

    A function of plain data, which results.json keeps as `card`: the page can be rendered again from that.

    Args:
        metrics: becomes the table, in order.
        evaluated: for the metadata's model-index; `dataset` (a name), `split`, `metric` and `value` of each number.
        picture: its description and its file in the same folder.
        sentence: of a sentence encoder, its `vectors` in words and its `prompts` by name.
        base_model: Hub name of the model that this one was made from.
        license, language, datasets: as the recipe's section `card` says.
    """
    found = [_evaluation(pipeline_tag, **one) for one in evaluated]
    data = ModelCardData(
        library_name="sentence-transformers" if sentence else "transformers",
        license=license,
        language=list(language) if language else None,
        pipeline_tag=pipeline_tag,
        tags=[
            "linformer",
            "efficient-attention",
            *(["sentence-transformers", "feature-extraction"] if sentence else []),
        ],
        datasets=list(datasets) if datasets else None,
        base_model=base_model,
        model_name=title if found else None,
        eval_results=found or None,
    )
    table = markdown_table(["", ""], list(metrics.items()))
    card = ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE,
        title=title,
        summary=summary,
        table=table,
        notes=notes,
        limits=limits,
        auto_class=auto_class,
        sentence=_sentence(**sentence) if sentence else "",
        picture=f"![{picture[0]}]({picture[1]})" if picture else "",
    )
    return str(card)
