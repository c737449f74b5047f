"""How faithful a converted model is to its source, on text that neither its weights nor its calibration have seen.

Everything is compared with the exact twin (the source as a Linformer with K = N), whose own distance from the source's
model is measured first. What is longer than the source's own N is compared with the source over windows of N tokens:
it was never trained to attend further, so its full attention there is no goal (it is what time and memory are compared
with). Embeddings are what the source's own modules make of the last hidden state, or its mean over the tokens; because
such vectors point in similar directions for any text, the cosine has a floor: that of the constant mean embedding.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerBase

from ..attention_linformer import LinformerSelfAttention
from ..data.masking import IGNORE, Masker
from ..modeling_linformer import (
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerLayer,
    LinformerModel,
    LinformerPreTrainedModel,
)
from ..tokens_linformer import RealTokens
from ..utils.places import own_name
from ..utils.timing import peak_resident_mib
from .calibrate import squared
from .shorten import Windows, exact_twin
from .sources import ConversionError, Source
from .texts import cut


MEAN = partial(torch.mean, dim=1)  # of states [B, N, C]
REPEATS, SLOW_REPEATS, SLOW = 5, 3, 1.0  # what takes more than a second varies less, in proportion
LONGEST_PASS = 30.0  # seconds: full attention over 65,536 tokens would take the report's readers an hour
BATCH_TOKENS = 4096
# More than this between the source's own model and its exact twin means that the tables are wrong for it.
LARGEST_DIFFERENCE = 1e-3


class _Layers:
    """Collects every layer's attention output (before the residual) and hidden state while it is entered."""

    def __init__(self, model: LinformerModel):
        self.model = model
        self.attention: list[torch.Tensor] = []
        self.hidden: list[torch.Tensor] = []

    def __enter__(self) -> "_Layers":
        def keep(kept: list[torch.Tensor]) -> Callable[[Any, tuple, torch.Tensor], None]:
            return lambda module, arguments, output: kept.append(output)

        self.handles = []
        for layer in self.model.encoder.layer:
            assert isinstance(layer, LinformerLayer)
            self.handles += [
                layer.attention.output.dropout.register_forward_hook(keep(self.attention)),  # in front of the residual
                layer.register_forward_hook(keep(self.hidden)),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


class _Agreement:
    """Of ours and the source's last hidden states: the vectors and the relative error."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.goal: list[torch.Tensor] = []
        self.final = [0.0, 0.0]

    def add(self, given: torch.Tensor, goal: torch.Tensor, vectors: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """States [B, n, C] of a batch."""
        _add(self.final, given, goal)
        self.given += vectors(given)
        self.goal += vectors(goal)

    def facts(self) -> dict[str, float]:
        cosine = torch.cosine_similarity(torch.stack(self.given), torch.stack(self.goal))
        return {"cosine": float(cosine.mean()), "final_error": _ratio(self.final)}


def source_difference(reference: Any, twin: LinformerPreTrainedModel, rows: Sequence[torch.Tensor], pad: int) -> float:
    """Largest difference of the encoders' last hidden states, relative to their largest value, on a padded batch."""
    ids = torch.stack([rows[0], rows[-1]])  # there may be one only
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 3 :] = 0
    ids = ids.masked_fill(mask == 0, pad)
    with torch.no_grad():
        theirs = reference.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = twin.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    return float((theirs - ours)[real].abs().max() / theirs[real].abs().max())


def check_twin(source: Source, twin: LinformerPreTrainedModel, held_out: Mapping[str, Sequence[torch.Tensor]]) -> float:
    """The difference between the source's own model and its twin. Raises a ConversionError unless it is rounding."""
    rows = [row[: source.length] for row in next(iter(held_out.values()))]
    if twin.config.max_position_embeddings > source.length:  # its positions may be stretched: compare without that
        twin = exact_twin(source, source.length, "repeat")
    difference = source_difference(source.reference, twin, rows, twin.config.pad_token_id or 0)
    if not difference <= LARGEST_DIFFERENCE:
        raise ConversionError(
            f"{source.name}: with K = N the converted model differs from the source by {difference:.1e}, more than "
            f"{LARGEST_DIFFERENCE}. Its architecture is not what its configuration says; it cannot be converted."
        )
    return difference


def report(
    source: Source,
    twin: LinformerPreTrainedModel,
    model: LinformerPreTrainedModel,
    held_out: Mapping[str, Sequence[torch.Tensor]],
    difference: float,
) -> dict[str, Any]:
    """The content of fidelity.json, for lengths from K / 2 to N, doubling."""
    assert source.tokenizer is not None
    n, k = model.config.max_position_embeddings, max(model.config.projected_lengths)
    lengths, length = {n, min(n, max(8, k // 2))}, k
    while length < n:
        lengths.add(length)
        length *= 2

    def timed(length: int) -> Any:
        return source.reference if source.reference is not None and length <= source.length else twin

    return {
        "source": own_name(source.name),
        "description": describe(model),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "source_difference": difference,
        "source_length": source.length,
        "window": source.reach,
        **({"vectors": str(source.sentence)} if source.sentence else {}),
        "lengths": compare(
            twin, model, held_out, sorted(lengths), source.tokenizer, timed, source, source.sentence or MEAN
        ),
    }


def describe(model: LinformerPreTrainedModel) -> str:
    """N, K and the projection in one line."""
    config = model.config
    text = f"N = {config.max_position_embeddings}, K = {config.projected_length}, `{config.projection_type}`"
    if config.local_window:
        text += f" with a band of 3 x {config.local_window} single tokens"
    if config.projection_sharing:
        text += f", sharing `{config.projection_sharing}`"
    return text + (", with length correction" if config.length_correction else "")


@torch.no_grad()
def compare(
    twin: LinformerPreTrainedModel,
    student: LinformerPreTrainedModel,
    held_out: Mapping[str, Sequence[torch.Tensor]],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    timed: Callable[[int], Any],
    source: Source | None = None,
    vectors: Callable[[torch.Tensor], torch.Tensor] = MEAN,
) -> dict[str, Any]:
    """Compare at several lengths.

    Args:
        twin, student: models of the same class in evaluation mode.
        held_out: genre -> rows of ids; rows are cut to each length.
        lengths: lengths in tokens, none above the rows'.
        timed: length -> the model whose speed and memory stand for the source's.
        source: whose windows the twin reads of rows that are longer than its N (see `Windows`).
        vectors: states [B, n, C] -> embeddings [B, D].

    Returns:
        length -> measures, JSON-able; see `measure`.
    """
    result, pace = {}, 0.0  # seconds of full attention over the square of the length
    for length in lengths:
        rows = {genre: cut(given, length) for genre, given in held_out.items()}
        exact = timed(length) if pace * length**2 <= LONGEST_PASS else None
        measured = cost(exact, student, next(iter(rows.values()))[:1])
        if exact is not None:
            pace = measured["seconds"]["source"]["median"] / length**2
        shortest = min(student.config.projected_lengths, default=length)
        beyond = bool(student.config.local_window) and length == max(lengths) > shortest
        result[str(length)] = measure(twin, student, rows, tokenizer, source, vectors, beyond) | measured
    return result


@torch.no_grad()
def measure(
    twin: LinformerPreTrainedModel,
    student: LinformerPreTrainedModel,
    rows: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    source: Source | None = None,
    vectors: Callable[[torch.Tensor], torch.Tensor] = MEAN,
    with_parts: bool = False,
) -> dict[str, Any]:
    """Errors, similarity of embeddings and, with a masked-LM head, agreement, for rows [M, n] of each genre.

    `with_parts`: also what is left when the band `alone` may speak, or the slots.
    """
    layers = twin.config.num_hidden_layers
    sums = {name: [[0.0, 0.0] for _ in range(layers)] for name in ("attention", "hidden")}
    goal: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    parts = {kept: _Agreement() for kept in (("band", "slots") if with_parts else ())}
    genres: dict[str, Any] = {}
    for genre, ids in rows.items():
        own = _Agreement()
        windows = Windows.of(source, ids.shape[1])
        for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            with _Layers(twin.base_model) as exact:
                theirs = windows.join(twin.base_model(windows.split(batch)).last_hidden_state)
            with _Layers(student.base_model) as short:
                own.add(student.base_model(batch).last_hidden_state, theirs, vectors)
            for name in sums:
                for total, a, b in zip(sums[name], getattr(short, name), getattr(exact, name), strict=True):
                    _add(total, a, windows.join(b))
            for kept, part in parts.items():
                with alone(student.base_model, kept):
                    part.add(student.base_model(batch).last_hidden_state, theirs, vectors)
        genres[genre] = {"rows": len(ids), **own.facts()}
        given, goal = given + own.given, goal + own.goal
    a, b = torch.stack(given), torch.stack(goal)
    measured = {
        "rows": len(a),
        "cosine": float(torch.cosine_similarity(a, b).mean()),
        "cosine_floor": float(torch.cosine_similarity(b.mean(0, keepdim=True), b).mean()),
        "rank_correlation": rank_correlation(a, b),
        "final_error": _ratio(sums["hidden"][-1]) if layers else 0.0,
        "layers": [
            {"attention_error": _ratio(attention), "hidden_error": _ratio(hidden)}
            for attention, hidden in zip(sums["attention"], sums["hidden"], strict=True)
        ],
        "genres": genres,
        **({"alone": {kept: part.facts() for kept, part in parts.items()}} if parts else {}),
    }
    if isinstance(student, LinformerForMaskedLM) and tokenizer.mask_token_id is not None:
        measured["masked"] = masked(twin, student, rows, tokenizer, source)
    return measured


@contextmanager
def alone(model: LinformerModel, kept: str) -> Iterator[None]:
    """While it is entered, queries of `model` see only the `band` (with the first and last token) or only the `slots`.

    Slots inside the band, which are shut beside it, are open without it.
    """
    attentions = [module for module in model.modules() if isinstance(module, LinformerSelfAttention)]

    def heard(own: Callable, edge: int) -> Callable:
        def band_bias(slot_bias: torch.Tensor, tokens: RealTokens, blocks: int) -> torch.Tensor:
            bias, lowest = own(slot_bias, tokens, blocks).clone(), torch.finfo(slot_bias.dtype).min  # [B, b, H or 1, K]
            slots = slot_bias.shape[-1]
            if kept == "band":
                bias[..., edge : slots - edge] = lowest
            else:
                bias[..., :slots], bias[..., slots:] = slot_bias.transpose(1, 2), lowest
            return bias

        return band_bias

    for attention in attentions:
        attention.__dict__["band_bias"] = heard(attention.band_bias, int(attention.boundary))
    try:
        yield
    finally:
        for attention in attentions:
            del attention.__dict__["band_bias"]


def _add(total: list[float], given: torch.Tensor, goal: torch.Tensor) -> None:
    total[0] += squared(given - goal)
    total[1] += squared(goal)


def _ratio(total: Sequence[float]) -> float:
    return (total[0] / total[1]) ** 0.5 if total[1] else 0.0


def rank_correlation(given: torch.Tensor, goal: torch.Tensor) -> float | None:
    """Spearman correlation of the cosine similarities of all pairs of rows; None below 3 rows."""
    if len(goal) < 3:
        return None
    one, two = torch.triu_indices(len(goal), len(goal), 1)
    similar = [torch.cosine_similarity(all_[one].double(), all_[two].double()) for all_ in (given, goal)]
    return float(spearmanr(*similar).statistic)


@torch.no_grad()
def masked(
    twin: LinformerPreTrainedModel,
    student: LinformerPreTrainedModel,
    rows: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    source: Source | None = None,
) -> dict[str, Any]:
    """Of the tokens behind BERT's masks: share with the same most likely token, and both models' perplexities."""
    masker = Masker(tokenizer, seed=0)
    same = count = 0
    loss = {"source": 0.0, "student": 0.0}
    for ids in rows.values():
        for index, row in enumerate(ids):
            inputs, labels = (torch.from_numpy(each)[None] for each in masker(row.tolist(), 0, index))
            hidden = labels[0] != IGNORE
            windows = Windows.of(source, len(row))
            goal = windows.join(twin(windows.split(inputs)).logits)
            logits = {"source": goal[0, hidden], "student": student(inputs).logits[0, hidden]}
            for name, given in logits.items():
                loss[name] += float(torch.nn.functional.cross_entropy(given, labels[0, hidden], reduction="sum"))
            same += int((logits["source"].argmax(-1) == logits["student"].argmax(-1)).sum())
            count += int(hidden.sum())
    nats = {name: torch.tensor(total / max(count, 1)) for name, total in loss.items()}
    return {
        "tokens": count,
        "agreement": same / max(count, 1),
        **{f"{name}_perplexity": float(value.exp()) for name, value in nats.items()},
    }


@torch.no_grad()
def cost(source: Any, student: LinformerPreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Seconds (median and spread of interleaved runs) and peak memory of a pass over ids [1, n], without source too."""
    models: dict[str, Any] = {"source": source, "student": student} if source is not None else {"student": student}
    if isinstance(student, LinformerForMultipleChoice):
        ids = ids[:, None]  # one choice
    seconds: dict[str, list[float]] = {name: [] for name in models}
    memory: dict[str, float | None] = {}
    started = time.perf_counter()
    for model in models.values():
        model(ids)  # warm up
    for _ in range(SLOW_REPEATS if time.perf_counter() - started > SLOW else REPEATS):
        for name, model in models.items():
            started = time.perf_counter()
            model(ids)
            seconds[name].append(time.perf_counter() - started)
    for name, model in models.items():
        memory[name] = peak_resident_mib(partial(model, ids))
    return {
        "seconds": {
            name: {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}
            for name, runs in seconds.items()
        },
        "memory_mib": memory,
    }
