"""Learning from text alone what a long row's vectors must be: near those of its pieces, read alone (`pieces_loss`).

Or they must find the row's own passages among others' (`search_loss`, section `search`).
Passages are drawn from a row; some of them are taken out before the student reads it, so that what stands around them
must do, and the others stay. A passage's vector is the source's own (it is short, so nothing is approximated there) and
never changes: texts and queries that are embedded already stay valid. Three contrasts, each a cross entropy over
cosines: a passage finds its row among the batch's, a row finds each of its passages among the other rows', and a
passage finds the piece of all rows' pieces that it stands, or stood, in. Vectors are what the student's folder makes of
hidden states, or their means. A folder that reads one token has no vectors of pieces, and does without the third.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase


Vectors = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # states [B, N, C] and mask [B, N] -> [B, D]
TRIES = 20  # for a place that overlaps with no other passage


@dataclass
class Search:
    """Section `search` of a distillation recipe.

    Args:
        weight: of this loss beside those of section `distillation`; 0 for none.
        passages: drawn from each row, fewer where they do not fit.
        shortest, longest: tokens of a passage; lengths between them are drawn log-uniformly.
        kept: share of the passages that are not taken out of the row.
        pieces: sizes, in tokens, of the pieces that a passage must find; one of them is drawn for each batch.
        scale: of the cosines, 1 over the temperature.
    """

    weight: float = 0.0
    passages: int = 8
    shortest: int = 16
    longest: int = 128
    kept: float = 0.5
    pieces: list[int] = field(default_factory=lambda: [128, 256, 512])
    scale: float = 20.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"search.weight must be at least 0, got {self.weight}.")
        for name in ("passages", "shortest", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"search.{name} must be above 0, got {getattr(self, name)}.")
        if self.longest < self.shortest:
            raise ValueError(f"search.longest={self.longest} is below search.shortest={self.shortest}.")
        if not 0 <= self.kept <= 1:
            raise ValueError(f"search.kept is a share, from 0 to 1; got {self.kept}.")
        if not self.pieces or min(self.pieces) < 1:
            raise ValueError(f"search.pieces must name at least one size of at least 1 token, got {self.pieces}.")


@dataclass
class Draw:
    """Draws the passages of a row: another draw for each epoch and row, the same one in each run."""

    section: Search
    seed: int

    def __call__(self, ids: Sequence[int], epoch: int, index: int) -> dict[str, Any]:
        """The row without what is taken out of it, its passages, and where in the row each of them stands or stood."""
        draw = np.random.default_rng((self.seed, epoch, index))
        first, *inner, last = np.asarray(ids).tolist()
        spans = self.spans(len(inner), draw)
        row, places, at = [first], [], 0
        for start, stop in spans:
            row += inner[at:start]
            kept = inner[start:stop] if draw.random() < self.section.kept else []
            places.append(len(row) - 1 + len(kept) // 2)  # counted without the first token
            row += kept
            at = stop
        return {
            "input_ids": [*row, *inner[at:], last],
            "passages": [[first, *inner[start:stop], last] for start, stop in spans],
            "places": places,
            "piece": int(draw.choice(self.section.pieces)),
        }

    def spans(self, length: int, draw: np.random.Generator) -> list[tuple[int, int]]:
        """Passages that do not overlap, in order, and that leave at least a quarter of `length` tokens."""
        section, spans = self.section, list[tuple[int, int]]()
        room = 3 * length // 4
        for _ in range(section.passages):
            tokens = round(np.exp(draw.uniform(np.log(section.shortest), np.log(section.longest))))
            if tokens > room:
                break
            for _ in range(TRIES):
                start = int(draw.integers(length - tokens + 1))
                if all(start + tokens <= a or start >= b for a, b in spans):
                    spans.append((start, start + tokens))
                    room -= tokens
                    break
        return sorted(spans)


class PassageCollator:
    """Pads rows and passages: input_ids and attention_mask [B, N]; passages and passages_mask [M, n]; rows, places [M]
    and piece, a number."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.pad([{"input_ids": item["input_ids"]} for item in items]))
        passages = [{"input_ids": ids} for item in items for ids in item["passages"]]
        if passages:
            padded = self.pad(passages)
            batch |= {"passages": padded["input_ids"], "passages_mask": padded["attention_mask"]}
        counts = torch.tensor([len(item["passages"]) for item in items])
        batch["rows"] = torch.arange(len(items)).repeat_interleave(counts)
        batch["places"] = torch.tensor([place for item in items for place in item["places"]], dtype=torch.long)
        return batch | {"piece": items[0]["piece"]}


def taken(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a `PassageCollator` has put beside the model's own inputs, taken out of them."""
    return {
        name: inputs.pop(name) for name in ("passages", "passages_mask", "rows", "places", "piece") if name in inputs
    }


def mean_state(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, N, C] and [B, N] -> [B, C], in float32 at least: the mean over a row's real tokens."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def search_loss(
    states: torch.Tensor,
    mask: torch.Tensor,
    passages: torch.Tensor,
    found: dict[str, Any],
    scale: float,
    vectors: Vectors = mean_state,
    with_pieces: bool = True,
) -> torch.Tensor:
    """The three contrasts, or the two that need no pieces.

    Args:
        states, mask: [B, N, C] of the student, [B, N].
        passages: [M, D], the source's vectors of the passages.
        found: `rows` [M], each passage's row; `places` [M], its place in it, counted without the first token; `piece`.

    Returns:
        A scalar.
    """
    rows, mask = found["rows"], mask.bool()
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    whole = normalize(vectors(states, mask), dim=-1)
    passages = normalize(passages.to(whole), dim=-1)
    to_rows = scale * passages @ whole.T  # [M, B]
    loss = cross_entropy(to_rows, rows)
    # A passage against those of other rows, for its own row's vector: those of the same row are no wrong answers.
    number = torch.arange(len(rows), device=rows.device)
    same = (rows[:, None] == rows[None]) & (number[:, None] != number[None])
    back = to_rows[:, rows].T.masked_fill(same, float("-inf"))
    loss = loss + 0.5 * cross_entropy(back, number)
    if not with_pieces:
        return loss
    pieces = [
        piece_vectors(row[real][1:-1] if real.sum() > 2 else row[real], found["piece"], vectors)
        for row, real in zip(states, mask, strict=True)
    ]
    counts = torch.tensor([len(own) for own in pieces], device=rows.device)
    start, most = (counts.cumsum(0) - counts)[rows], counts[rows]
    piece = start + torch.minimum(found["places"] // found["piece"], most - 1)
    return loss + cross_entropy(scale * passages @ torch.cat(pieces).T, piece)


def piece_vectors(states: torch.Tensor, size: int, vectors: Vectors = mean_state) -> torch.Tensor:
    """A row's states [n, C], cut into pieces of `size` tokens -> their vectors of length 1, [p, D]."""
    pieces = states.split(size)
    real = torch.ones(1, size, dtype=torch.bool, device=states.device)
    return normalize(torch.cat([vectors(piece[None], real[:, : len(piece)]) for piece in pieces]), dim=-1)


@torch.no_grad()
def read_alone(teacher: Any, ids: torch.Tensor, size: int, vectors: Vectors = mean_state) -> torch.Tensor:
    """A row's ids [n], cut into pieces of `size` tokens with the row's first and last around each -> [p, D]."""
    pieces = [torch.cat([ids[:1], piece, ids[-1:]]) for piece in ids[1:-1].split(size - 2)]
    rows = pad_sequence(pieces, batch_first=True, padding_value=int(ids[-1]))
    lengths = torch.tensor([len(piece) for piece in pieces], device=ids.device)
    mask = torch.arange(rows.shape[1], device=ids.device) < lengths[:, None]
    return normalize(vectors(teacher(rows, attention_mask=mask.long()).last_hidden_state, mask), dim=-1)


def pieces_loss(
    teacher: Any,
    ids: torch.Tensor,
    states: torch.Tensor,
    mask: torch.Tensor,
    sizes: Sequence[int],
    vectors: Vectors = mean_state,
    with_pieces: bool = True,
) -> torch.Tensor:
    """How far a row's vector is from the mean of its pieces', read alone, and those cut from its pass from each.

    Each is one minus the cosine. The mean is that over all sizes: it finds more than the pieces of any one of them.
    A piece counts by its tokens, for the last one may have a few only.

    Args:
        teacher: encoder that reads `max(sizes)` tokens.
        ids, states, mask: [B, N], the student's [B, N, C], [B, N].
        sizes: tokens of a piece, special tokens included. A row that is no longer than the largest is left out.

    Returns:
        A scalar.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    losses = [states.sum() * 0.0]  # a gradient also for a batch of short rows
    for row_ids, row, real in zip(ids, states, mask.bool(), strict=True):
        row_ids, row = row_ids[real], row[real]
        if len(row_ids) <= max(sizes):
            continue
        means = []
        for size in sizes:
            goal = read_alone(teacher, row_ids, size, vectors).to(row)
            share = goal.new_tensor([len(piece) for piece in row_ids[1:-1].split(size - 2)]) / (len(row_ids) - 2)
            means.append(normalize(share @ goal, dim=-1))
            if with_pieces:
                near = (piece_vectors(row[1:-1], size - 2, vectors) * goal).sum(-1)
                losses.append((1 - share @ near) / len(sizes))
        whole = vectors(row[None], real.new_ones(1, len(row)))[0]
        losses.append(1 - torch.cosine_similarity(whole, torch.stack(means).mean(0), dim=0))
    return torch.stack(losses).sum() / len(ids)
