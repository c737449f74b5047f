"""Closed-form calibration of a converted encoder: no gradient, no learning rate, minutes on a CPU.

Layer by layer, on the hidden states that the layers before it really give:

1. **Gates.** g(x) = (mean query of the head) . W_K x / sqrt(D): a window keeps what the average query attends to. Where
   rows are longer than the source reads, g is SHARPNESS times that: a slot is nearly one token, and weighs as much.
2. **Output.** With the student's context c (attention before W_O), its input h, and the teacher's input and attention
   output h*, o*, ridge regression gives the correction W' that brings h + (W + a W') c + b + a b' closest to h* + o*:
   it answers for what the layers before have done too. a = max(0, 1 - K / l), so rows of at most K tokens stay exact.

Letters: M rows, N length, C hidden size, H heads, D head size.
"""

import logging
import math
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ..configuration_linformer import LinformerConfig
from ..modeling_linformer import LinformerLayer, LinformerModel
from ..tokens_linformer import RealTokens
from .shorten import Windows
from .sources import Source


logger = logging.getLogger(__name__)

BATCH_TOKENS = 8192
SHARPNESS = 16.0  # docs/results/long-documents.md has other values


def mean_query_gates(layer: LinformerLayer, mean_input: torch.Tensor, sharpness: float = 1.0) -> None:
    """Set the layer's gates [H, C] from the mean of its input, [C] (a query is linear in it), times `sharpness`."""
    attention = layer.attention.self
    assert attention.projection is not None
    heads = attention.num_attention_heads
    query = attention.query(mean_input).view(heads, -1)  # [H, D]
    key = attention.key.weight.view(heads, -1, mean_input.shape[0])  # [H, D, C]
    gates = torch.einsum("hd,hdc->hc", query, key) * attention.scaling
    attention.projection.weight.data.copy_(gates * sharpness)


def ridge(gram: torch.Tensor, target: torch.Tensor, strength: float) -> torch.Tensor:
    """(G + s mean(diag G) I)^-1 T: gram [c, c] and target [c, C] in float64 -> [c, C]."""
    scale = strength * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram + scale * torch.eye(len(gram), dtype=gram.dtype), target)


def batches(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rows of ids, each [n], in batches [m, n] of equal length and about BATCH_TOKENS tokens."""
    by_length: dict[int, list[torch.Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    result = []
    for length, group in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        result += [torch.stack(group[i : i + size]) for i in range(0, len(group), size)]
    return result


@torch.no_grad()
def calibrate(
    teacher: LinformerModel,
    student: LinformerModel,
    rows: Sequence[torch.Tensor],
    strength: float = 0.3,
    source: Source | None = None,
) -> list[float]:
    """Calibrate `student` in place.

    Args:
        teacher: the exact twin (K = N), whose layers attend to every token.
        student: the same weights with shortened attention; its gates and length corrections are set.
        rows: token ids with special tokens, each [n] with n <= N; rows of at most K tokens teach nothing.
        strength: of the ridge, relative to the mean square of the context.
        source: whose windows the teacher reads of rows that are longer than its N (see `Windows`).

    Returns:
        For each layer, the relative error of its output, |h - h*| / |h*|, on these rows.

    Raises:
        ValueError: the student has neither gates nor length corrections, or no row is longer than its smallest K.
    """
    gated = student.config.projection_type == "gated_pool"
    sharpness = 1.0 if student.config.original_max_position_embeddings is None else SHARPNESS
    rows = _worth_calibrating(student.config, rows)
    given = batches(rows)
    tokens = [RealTokens.from_mask(None, ids.shape[1], ids.device) for ids in given]
    states = [student.embeddings(ids, None, None, None, places) for ids, places in zip(given, tokens, strict=True)]
    windows = [Windows.of(source, ids.shape[1]) for ids in given]
    read = [each.split(ids) for each, ids in zip(windows, given, strict=True)]  # what the teacher is given
    theirs = [RealTokens.from_mask(None, ids.shape[1], ids.device) for ids in read]
    goal = [teacher.embeddings(ids, None, None, None, places) for ids, places in zip(read, theirs, strict=True)]
    errors = []
    layers = list(zip(teacher.encoder.layer, student.encoder.layer, strict=True))
    for exact, layer in tqdm(layers, desc=f"calibrating on {len(rows)} rows", unit="layer"):
        if gated:
            count = sum(state.shape[0] * state.shape[1] for state in states)
            mean_query_gates(layer, sum(state.sum((0, 1)) for state in states) / count, sharpness)
        shared = (teacher.encoder.shared_projection, student.encoder.shared_projection)
        contexts = [
            layer.attention.self(state, places, shared[1])[0] for state, places in zip(states, tokens, strict=True)
        ]
        sums = []
        for state, places in zip(goal, theirs, strict=True):
            context = exact.attention.self(state, places, shared[0])[0]
            sums.append(state + exact.attention.output.project(context, places))  # h* + o*
        if layer.attention.output.correction is not None:
            correct(layer, states, contexts, [w.join(s) for w, s in zip(windows, sums, strict=True)], tokens, strength)
        for i, places in enumerate(tokens):
            attended = exact.attention.output.LayerNorm(sums[i])
            goal[i] = exact.output(exact.intermediate(attended), attended)
            attended = layer.attention.output(contexts[i], states[i], places)
            states[i] = layer.output(layer.intermediate(attended), attended)
        errors.append(relative_error(states, [w.join(g) for w, g in zip(windows, goal, strict=True)]))
    logger.info("calibrated; relative error of each layer's output: %s", ", ".join(f"{e:.3f}" for e in errors))
    return errors


def _worth_calibrating(config: LinformerConfig, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The rows that teach something. Raises a ValueError if there are none, or nothing that could learn."""
    if config.projection_type != "gated_pool" and not config.length_correction:
        raise ValueError(
            f"projection_type={config.projection_type!r} without length_correction has nothing to calibrate; set "
            "length_correction=True, or projection_type='gated_pool'."
        )
    rows = [row for row in rows if len(row) > min(config.projected_lengths)]
    if not rows:
        raise ValueError(
            f"no calibration row is longer than projected_length={config.projected_length}, up to which attention is "
            "exact. Give longer texts, or lower projected_length."
        )
    return rows


def correct(
    layer: LinformerLayer,
    states: Sequence[torch.Tensor],
    contexts: Sequence[torch.Tensor],
    sums: Sequence[torch.Tensor],
    tokens: Sequence[RealTokens],
    strength: float,
) -> None:
    """Solve for the layer's length correction, W' [C, C] and b' [C]."""
    output = layer.attention.output
    assert output.correction is not None
    channels = states[0].shape[-1]
    gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
    target = torch.zeros(channels + 1, channels, dtype=torch.float64)
    for state, context, total, places in zip(states, contexts, sums, tokens, strict=True):
        share = max(0.0, 1 - output.keys / int(places.length[0]))
        missing = (total - state - output.dense(context)).flatten(0, 1)  # [M N, C]
        features = share * torch.nn.functional.pad(context, (0, 1), value=1.0).flatten(0, 1)  # [M N, C + 1]
        gram += (features.T @ features).double()
        target += (features.T @ missing).double()
    solved = ridge(gram, target, strength).to(states[0].dtype)
    output.correction.weight.data.copy_(solved[:-1].T)
    output.correction.bias.data.copy_(solved[-1])


def relative_error(given: Sequence[torch.Tensor], goal: Sequence[torch.Tensor]) -> float:
    """|given - goal| / |goal| over all tensors together."""
    missed = sum(squared(a - b) for a, b in zip(given, goal, strict=True))
    return math.sqrt(missed / sum(squared(b) for b in goal))


def squared(states: torch.Tensor) -> float:
    """The sum of squares, added up in float64 without a copy in it."""
    return float(torch.linalg.vector_norm(states, dtype=torch.float64)) ** 2
