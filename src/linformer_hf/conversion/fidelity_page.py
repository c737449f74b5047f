"""The fidelity report as a page, a picture and a model card: what `fidelity.report` measured, for people to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling_linformer import LinformerPreTrainedModel
from ..utils.figures import new_figure, save_figure
from ..utils.files import write_json, write_text
from ..utils.places import own_name
from ..utils.reporting import markdown_table
from .fidelity import LONGEST_PASS, REPEATS, SLOW_REPEATS, describe


FIDELITY_FILE = "fidelity.json"
REPORT_FILE = "fidelity.md"
PLOT_FILE = "fidelity.png"
PIPELINES = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "text-classification",
}


def summary_table(lengths: Mapping[str, Any]) -> str:
    """The fidelity table in Markdown, a row for each length."""
    with_mlm = any("masked" in measured for measured in lengths.values())
    header = ["tokens", "cosine (floor)", "rank correlation", "error of the last hidden state"]
    header += ["same masked token", "perplexity (source)"] if with_mlm else []
    header += ["ms (source)", "MiB (source)"]
    rows = []
    for length, measured in lengths.items():
        row = [length, f"{measured['cosine']:.4f} ({measured['cosine_floor']:.3f})"]
        row.append(f"{rho:.4f}" if (rho := measured["rank_correlation"]) is not None else "too few rows")
        row.append(f"{measured['final_error']:.4f}")
        if with_mlm:
            mlm = measured["masked"]
            row += [f"{mlm['agreement']:.3f}", f"{mlm['student_perplexity']:.2f} ({mlm['source_perplexity']:.2f})"]
        ms = {name: f"{1000 * each['median']:.1f}" for name, each in measured["seconds"].items()}
        mib = {name: f"{each:.0f}" for name, each in measured["memory_mib"].items() if each is not None}
        row.append(f"{ms['student']} ({ms.get('source', 'not run')})")
        row.append(f"{mib['student']} ({mib.get('source', 'not run')})" if "student" in mib else "not measured")
        rows.append(row)
    return markdown_table(header, rows)


def layer_table(measured: Mapping[str, Any]) -> str:
    rows = [
        [i, f"{layer['attention_error']:.3f}", f"{layer['hidden_error']:.3f}"]
        for i, layer in enumerate(measured["layers"])
    ]
    return markdown_table(["layer", "error of the attention output", "error of the hidden state"], rows)


def genre_table(measured: Mapping[str, Any]) -> str:
    rows = [
        [genre, f"{each['rows']}", f"{each['cosine']:.4f}", f"{each['final_error']:.4f}"]
        for genre, each in measured["genres"].items()
    ]
    return markdown_table(["text", "rows", "cosine", "error of the last hidden state"], rows)


def alone_table(measured: Mapping[str, Any]) -> str:
    """What is left when the band alone may speak, or the slots; empty for a model without a band."""
    if "alone" not in measured:
        return ""
    names = {"band": "the band, first and last token", "slots": "the slots"}
    parts = {"both": measured} | {names[kept]: part for kept, part in measured["alone"].items()}
    rows = [[name, f"{part['cosine']:.4f}", f"{part['final_error']:.4f}"] for name, part in parts.items()]
    return "\n" + markdown_table(["queries see", "cosine", "error of the last hidden state"], rows) + "\n"


def render(content: Mapping[str, Any]) -> str:
    """The report in Markdown: `content` is what fidelity.json holds."""
    lengths = content["lengths"]
    longest, window, difference = max(lengths, key=int), content.get("window"), content["source_difference"]
    beyond, vectors = "", content.get("vectors")
    made = f"made as the source's folder says ({vectors})" if vectors else "means over tokens"
    if window and int(longest) > (own := content.get("source_length", window)):
        beyond = (
            f"\nBeyond the source's own {own} tokens ours is compared with the source over windows of {window}: "
            "it was trained\nfor no more. Time and memory are those of its full attention over all tokens, not run\n"
            f"where a pass would take more than {LONGEST_PASS:.0f} s."
        )
    return f"""# How faithful is it?

`{content["source"]}` beside its Linformer: {content["description"]}.

{summary_table(lengths)}

Text that was not calibrated on, {lengths[longest]["rows"]} rows; errors are |ours - source| / |source|. Embeddings are
{made}; the floor is the cosine of one constant embedding for all texts. Time: median of {SLOW_REPEATS} or {REPEATS}
interleaved passes over one row, {content["threads"]} threads, {content["dtype"]}; memory: peak resident memory above
the loaded models. The source's own model and its exact twin differ by {difference:.1e} (relative).{beyond}

At {longest} tokens, by text and by layer:

{genre_table(lengths[longest])}

{layer_table(lengths[longest])}
{alone_table(lengths[longest])}
![fidelity]({PLOT_FILE})
"""


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Cosine against length, and both errors of every layer at the longest length."""
    lengths = content["lengths"]
    figure, (left, right) = new_figure((11, 4.2), ncols=2)
    x = [int(length) for length in lengths]
    for key, label, style in (
        ("cosine", "cosine of the embedding", "o-"),
        ("rank_correlation", "rank correlation of similarities", "s-"),
        ("cosine_floor", "cosine of a constant embedding", "k--"),
    ):
        left.plot(x, [measured[key] for measured in lengths.values()], style, label=label)
    left.set(xlabel="tokens", title="Embeddings, ours against the source's", xscale="log")
    left.set_xticks(x, [str(length) for length in x])
    left.minorticks_off()
    left.legend()
    left.grid(alpha=0.3)
    longest = max(lengths, key=int)
    for shift, key in ((-0.2, "attention_error"), (0.2, "hidden_error")):
        heights = [layer[key] for layer in lengths[longest]["layers"]]
        right.bar([i + shift for i in range(len(heights))], heights, width=0.4, label=key.replace("_", " "))
    right.set(xlabel="layer", ylabel="relative error", title=f"Layers at {longest} tokens")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    right.grid(alpha=0.3, axis="y")
    save_figure(figure, path)


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """fidelity.json, fidelity.md and fidelity.png."""
    plot(folder / PLOT_FILE, content)
    write_text(folder / REPORT_FILE, render(content))
    write_json(folder / FIDELITY_FILE, content)


def card(
    model: LinformerPreTrainedModel,
    source: Any,
    content: Mapping[str, Any] | None,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """What the model card says (see model_card).

    `source` is the `sources.Source`; `content` is fidelity.json's, or None for an official Linformer, which is
    taken over exactly.
    """
    notes = "An official Linformer's own weights under other names: nothing is approximated."
    if content is not None:
        notes = (
            f"{summary_table(content['lengths'])}\n\nMeasured on text that was not trained or calibrated on; "
            f"`{REPORT_FILE}` has the layers and says what the columns mean."
        )
    return {
        "title": f"Linformer from {Path(source.name).name}",
        "summary": f"`{own_name(source.name)}` ({source.architecture}) with attention shortened: {describe(model)}.",
        "metrics": metrics,
        "notes": notes,
        "limits": (
            "It knows what its source knows, less exactly on inputs longer than K tokens, and shares its biases. "
            "Positions beyond the source's own length were never pretrained. The source's licence applies."
        ),
        "auto_class": "AutoModel" if source.head == "Model" else f"AutoModel{source.head}",
        "pipeline_tag": "sentence-similarity" if source.sentence else PIPELINES[source.head],
        "picture": ("fidelity", PLOT_FILE) if content is not None else None,
        "base_model": None if Path(source.name).exists() else source.name,
        **({"sentence": source.sentence.facts} if source.sentence else {}),
    }
