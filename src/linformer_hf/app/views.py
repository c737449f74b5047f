"""What the page of `linformer-hf app` shows, for one text: tables and figures, without the page.

Every function raises a ValueError of one line for a text that it cannot use.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..conversion.shorten import exact_twin
from ..conversion.sources import Source
from ..modeling_linformer import LinformerPreTrainedModel
from ..paper.spectrum import draw_layers, measure
from ..utils.figures import new_figure
from ..utils.timing import interleave


BEST = 5  # words shown for a mask
SHOWN_TOKENS = 64  # rows of the picture of attention that can still be told apart
SPECTRUM_TOKENS = 512  # a decomposition of each head's map costs n ** 3
SHORTEST = 64  # tokens, where the plot of speed begins
SAMPLES = 5


@dataclass
class Subject:
    """What the page is about.

    Attributes:
        model: of `export.load`, in evaluation mode.
        tokenizer: its own.
        source: what it was converted from, with full attention; None where it is not known.
    """

    model: LinformerPreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source | None = None

    @property
    def length(self) -> int:
        """N, the longest input."""
        return self.model.config.max_position_embeddings

    def encode(self, text: str) -> tuple[dict[str, torch.Tensor], int]:
        """The model's inputs, each [1, n] with n <= N, and the number of tokens before the cut."""
        if not text.strip():
            raise ValueError("There is no text: type or paste one.")
        whole = len(self.tokenizer(text, verbose=False)["input_ids"])
        return dict(self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")), whole

    def cut(self, whole: int) -> str:
        """How much of the text was read, in words."""
        if whole <= self.length:
            return f"All {whole:,} tokens were read."
        return f"The first {self.length:,} of {whole:,} tokens were read: N = {self.length:,}."


@torch.no_grad()
def fill_mask(subject: Subject, text: str) -> list[tuple[int, str, float]]:
    """(number of the mask, word, probability): the best words for each mask, the likeliest first."""
    inputs, whole = subject.encode(text)
    places = (inputs["input_ids"][0] == subject.tokenizer.mask_token_id).nonzero().flatten().tolist()
    if not places:
        mask, reason = (
            subject.tokenizer.mask_token,
            " among the tokens that were read" if whole > subject.length else "",
        )
        raise ValueError(f"There is no {mask} in the text{reason}: put one where a word is to be guessed.")
    chances = subject.model(**inputs).logits[0, places].float().softmax(-1)
    best = chances.topk(min(BEST, chances.shape[-1]))
    return [
        (number, subject.tokenizer.decode([token]).strip(), chance)
        for number, (tokens, values) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), 1)
        for token, chance in zip(tokens, values, strict=True)
    ]


@torch.no_grad()
def classify(subject: Subject, text: str) -> tuple[dict[str, float], str]:
    """(label -> probability, how much was read). A regression has one entry, its number."""
    inputs, whole = subject.encode(text)
    logits = subject.model(**inputs).logits[0].float()
    names = subject.model.config.id2label
    if subject.model.config.problem_type == "multi_label_classification":
        chances = logits.sigmoid()
    else:
        chances = logits.softmax(-1) if len(logits) > 1 else logits
    return {names[i]: float(chance) for i, chance in enumerate(chances)}, subject.cut(whole)


@torch.no_grad()
def attention(subject: Subject, text: str, layer: int, head: int) -> tuple[Any, str]:
    """(figure, what is seen): one head's map, a row for each token and a column for each slot."""
    inputs, _ = subject.encode(text)
    model, chosen = subject.model.base_model, subject.model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that gives its maps
    try:
        maps = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(chosen)
    if not (0 <= layer < len(maps) and 0 <= head < maps[0].shape[1]):
        raise ValueError(f"There are layers 0 to {len(maps) - 1} and heads 0 to {maps[0].shape[1] - 1}.")
    n, k = maps[layer].shape[2:]
    k = min(n, k)  # of more slots than tokens the rest is empty
    shown = maps[layer][0, head, :SHOWN_TOKENS, :k]
    tokens = subject.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0, :SHOWN_TOKENS].tolist())
    figure, axes = new_figure((9, 1.5 + 0.14 * len(tokens)))
    image = axes.imshow(shown.sqrt().numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
    axes.set(xlabel="key", title=f"layer {layer}, head {head}: where each token looks (square root of the weight)")
    figure.colorbar(image, ax=axes, shrink=0.6)
    rows = f"the first {SHOWN_TOKENS} of {n:,}" if n > SHOWN_TOKENS else f"{n}"
    band = 3 * model.config.local_window if n > k else 0
    around = f", and {band} single tokens around that of the row" if band else ""
    return figure, f"Rows: {rows} tokens. Columns: {k - band} slots that stand for all {n:,} tokens{around}."


def spectrum(subject: Subject, text: str) -> tuple[Any, str]:
    """(figure, what is seen): cumulative singular values of the source's attention maps, for each layer."""
    source = _source(subject)
    inputs, _ = subject.encode(text)
    ids = inputs["input_ids"][0, : min(SPECTRUM_TOKENS, source.length)]
    n = len(ids)
    if n < SHORTEST:
        raise ValueError(f"The text has {n} tokens; a spectrum needs at least {SHORTEST}.")
    with torch.no_grad():
        twin = exact_twin(source, n, "repeat").base_model.eval()
    curves = measure(twin, [ids], n // 4, [0.9]).means()["curve"].mean(1)  # [L, n]
    figure, axes = new_figure((9, 4.6))
    draw_layers(axes, curves, 1)
    axes.axvline(n // 4, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="singular values, largest first", ylabel="their sum over the sum of all")
    axes.set_title(f"Attention maps of {source.name} on {n} tokens of this text (dashed: n / 4)")
    low, high = float(curves[:, n // 4 - 1].min()), float(curves[:, n // 4 - 1].max())
    return figure, f"A quarter of the singular values hold {low:.0%} to {high:.0%} of their sum, by layer."


def speed(subject: Subject, text: str) -> tuple[Any, list[tuple[int, float, float | None]]]:
    """(figure, rows): milliseconds of one forward pass over n tokens, ours and the source's, the text repeated."""
    inputs, _ = subject.encode(text)
    ids = inputs["input_ids"][0].repeat(1 + subject.length // inputs["input_ids"].shape[1])[: subject.length]
    reference = subject.source.reference if subject.source else None
    longest = subject.source.length if subject.source else 0
    rows: list[tuple[int, float, float | None]] = []
    for n in _lengths(subject.length):
        cases: dict[str, Any] = {"ours": lambda n=n: subject.model.base_model(ids[None, :n])}
        if reference is not None and n <= longest:
            cases["source"] = lambda n=n: reference.base_model(ids[None, :n])
        with torch.no_grad():
            found = {name: 1000 * samples.summary()["wall_s"] for name, samples in interleave(cases, SAMPLES).items()}
        rows.append((n, found["ours"], found.get("source")))
    figure, axes = new_figure((9, 4.6))
    axes.plot([n for n, *_ in rows], [ours for _, ours, _ in rows], marker="o", label="this Linformer")
    if both := [(n, theirs) for n, _, theirs in rows if theirs is not None]:
        axes.plot(*zip(*both, strict=True), marker="s", label=str(subject.source and subject.source.name))
    axes.set(xlabel="tokens", ylabel="milliseconds", xscale="log", ylim=(0, None))
    axes.minorticks_off()
    axes.set_xticks([n for n, *_ in rows], [f"{n:,}" for n, *_ in rows])
    axes.set_title(f"One forward pass, {torch.get_num_threads()} threads, median of {SAMPLES}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure, rows


def _lengths(longest: int) -> list[int]:
    """Powers of two up to N, and N."""
    powers = [SHORTEST << i for i in range(20) if SHORTEST << i < longest]
    return [*powers, longest]


def _source(subject: Subject) -> Source:
    if subject.source is None:
        raise ValueError("The source model is not known here: start the page with --source FOLDER_OR_NAME.")
    return subject.source
