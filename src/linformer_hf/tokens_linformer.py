# Copyright 2026 The linformer_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a model is given: which tokens of a batch are real, whether they may be read, what is refused.

Letters: B batch, N length, K slots, C hidden size.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

from .configuration_linformer import NO_CAUSAL, LinformerConfig


ID_TYPES = (torch.int64, torch.int32)
# What tells the documents of a flat row apart, as DataCollatorWithFlattening names it.
BOUNDS, LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
FLAT = (*BOUNDS, "seq_idx", *LONGEST)
ONE_TEXT = (
    "in a graph and under torch.func a row is one text, for how many documents it holds would be read from numbers; "
    "give each document a row of its own, with an attention_mask"
)
# Arguments of other models that would change the answer, and why they cannot be honoured.
REFUSED = {
    **dict.fromkeys(
        ("is_causal", "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache"), NO_CAUSAL
    ),
    # These reach `check_inputs` only where they tell no documents: `flat_rows` takes them out.
    **dict.fromkeys((*BOUNDS, "seq_idx"), ONE_TEXT),
    **dict.fromkeys(LONGEST, "alone it does not tell a row's documents apart; give cu_seq_lens_q too"),
    **dict.fromkeys(("cu_seqlens", "max_seqlen"), "the documents of a row are told by cu_seq_lens_q and max_length_q"),
    "global_attention_mask": "every token reads the same K slots, and none is read by all others; leave it out",
    "head_mask": "heads cannot be switched off; leave it out",
}
KNOWN = {
    *("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "labels", "start_positions", "end_positions"),
    *("return_dict", *TransformersKwargs.__annotations__),
}
# What others call it, too unlike for a slip of the pen.
OTHER_NAMES = dict.fromkeys(("attn_mask", "mask", "padding_mask", "key_padding_mask"), "attention_mask")
OTHER_NAMES |= dict.fromkeys(("segment_ids", "segments"), "token_type_ids")


def concrete(tensor: torch.Tensor) -> bool:
    """Whether it has numbers that are known: not in a graph, under torch.func, or on the meta device."""
    plain = tensor.device.type != "meta" and not is_tracing(tensor)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def readable(tensor: torch.Tensor) -> bool:
    """Whether a branch may depend on its numbers: not on an accelerator either, where reading stalls the queue."""
    return tensor.device.type == "cpu" and concrete(tensor)


# torch 2.6 cannot tell them apart: there, what is compiled holds for every length too.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def in_general_form() -> bool:
    """Whether what runs is recorded for other lengths than this input's, so that no branch may depend on its length."""
    return is_exporting() or torch.jit.is_tracing()


def holds(condition: Any) -> bool:
    """Whether it holds; in a graph for many lengths, whether it does for all, so that it is no reason for another."""
    if in_general_form():
        return False
    return statically_known_true(condition) if torch.compiler.is_compiling() else bool(condition)


def at_least(size: Any, least: int) -> Any:
    """max(size, least) for a size in a graph: a symbol of torch.export, a tensor of torch.jit.trace."""
    return size.clamp(min=least) if isinstance(size, torch.Tensor) else torch.sym_max(size, least)


def exact(dtype: torch.dtype) -> torch.dtype:
    """What sums, counts and logarithms are computed in: float32, or float64 where the model is float64."""
    return torch.promote_types(dtype, torch.float32)


def shut(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Logits or their bias with the lowest finite number at `where`: a softmax gives 0 there, and never NaN."""
    return values.masked_fill(where, torch.finfo(values.dtype).min)


class RealTokens(NamedTuple):
    """Where the real tokens of a batch stand.

    Attributes:
        mask: [B, N] bool, True on real tokens; None where every token is real.
        place: [B, N] int, how many real tokens stand before this one ([1, N] without a mask).
        length: [B] int, real tokens in each row ([1] without a mask).
        order: [B, N] int, indices that bring the real tokens of each row to its front; None where they stand there.
        rows: real tokens in each row, where the batch is packed: [1, T, C] holds the real tokens of row after row.
    """

    mask: torch.Tensor | None
    place: torch.Tensor
    length: torch.Tensor
    order: torch.Tensor | None
    rows: list[int] | None = None

    @classmethod
    def from_mask(cls, mask: torch.Tensor | None, length: int, device: torch.device) -> "RealTokens":
        """`mask`: [B, N], nonzero on real tokens, or None for rows of `length` real tokens."""
        concrete = mask is not None and readable(mask)
        if mask is not None and concrete and bool(mask.all()):
            mask = None
        if mask is None:
            place = torch.arange(length, device=device)[None]
            return cls(None, place, torch.full((1,), length, device=device), None)
        mask = mask.bool()
        place = mask.long().cumsum(-1) - mask.long()
        real = mask.sum(-1)
        if concrete and bool((mask == (torch.arange(length, device=device) < real[:, None])).all()):
            return cls(mask, place, real, None)
        # The inverse of the permutation that puts padding behind: a stable argsort of it, which ONNX does not have.
        column = torch.arange(length, device=device).expand_as(place)
        target = torch.where(mask, place, real[:, None] + column - place)
        return cls(mask, place, real, torch.zeros_like(target).scatter(1, target, column))

    def select(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, C] with zeros at padding. A `where`, not a product: 0 * NaN is NaN."""
        if self.mask is None:
            return hidden_states
        return torch.where(self.mask[..., None], hidden_states, hidden_states.new_zeros(()))

    def to_front(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, C] with the real tokens of each row first, in their order, and zeros behind them."""
        if self.order is None:
            return self.select(hidden_states)
        index = self.order[..., None].expand(-1, -1, hidden_states.shape[-1])
        filled = torch.arange(self.order.shape[-1], device=self.order.device) < self.length[:, None]
        return torch.where(filled[..., None], hidden_states.gather(1, index), hidden_states.new_zeros(()))

    def in_front(self, masked: bool) -> "RealTokens":
        """Of what `to_front` gives; `masked`: with the places behind the real tokens, which hold zeros, as padding."""
        place = torch.arange(self.place.shape[1], device=self.place.device)[None]
        mask = place < self.length[:, None] if masked and self.mask is not None else None
        return RealTokens(mask, place, self.length, None)

    def first(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, C]: the first real token of each row (token 0 of a row that has none)."""
        if self.order is None:
            return hidden_states[:, 0]
        index = self.order[:, :1, None].expand(-1, -1, hidden_states.shape[-1])
        return hidden_states.gather(1, index)[:, 0]

    def mean(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, C]: the mean over the real tokens (zeros for a row that has none)."""
        total = self.select(hidden_states).sum(1, dtype=exact(hidden_states.dtype))
        return (total / self.length.clamp(min=1)[:, None]).to(hidden_states.dtype)


def check_range(name: str, ids: torch.Tensor | None, upper: int, limit: str, ignore_index: int | None = None) -> None:
    """Raise a ValueError if an entry of `ids` lies outside [0, upper); eager CPU tensors only (see `readable`)."""
    if ids is None or not readable(ids) or ids.numel() == 0:
        return
    bad = (ids < 0) | (ids >= upper)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bool(bad.any()):
        allowed = f"0 to {upper - 1}" + (f" or {ignore_index} (ignored)" if ignore_index is not None else "")
        raise ValueError(f"{name} holds {ids[bad][0].item()}, but {limit} allows {allowed}.")


def check_shape(name: str, given: torch.Tensor | None, *allowed: tuple[int, ...]) -> None:
    """Raise a ValueError unless `given` has one of these shapes; eager tensors only."""
    if given is not None and not is_tracing(given) and tuple(given.shape) not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must be of shape {shapes}, got {list(given.shape)}.")


def check_mask(attention_mask: torch.Tensor, given: torch.Tensor) -> None:
    """Raise a ValueError unless it holds 1 and 0 for every token of `given` (ids or embeddings)."""
    if attention_mask.shape != given.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, length] = {list(given.shape[:2])} with 1 on real tokens, got "
            f"{list(attention_mask.shape)}; a mask of query-key pairs cannot be honoured: {NO_CAUSAL}."
        )
    if readable(attention_mask):
        bad = (attention_mask != 0) & (attention_mask != 1)
        if bool(bad.any()):
            raise ValueError(
                f"attention_mask holds {attention_mask[bad][0].item()}, but only 1 (real token) and 0 (padding) have a "
                "meaning; additive masks are not supported."
            )


def check_inputs(
    config: LinformerConfig, given: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict
) -> None:
    """Refuse what would give a wrong answer: too long an input, a mask of another meaning, decoder arguments."""
    dimensions, meaning = (2, "[batch, length]") if given.dtype in ID_TYPES else (3, "[batch, length, hidden_size]")
    if given.dim() != dimensions or given.shape[1] == 0:
        raise ValueError(f"The input must be {meaning} with at least one token in a row, got {list(given.shape)}.")
    length, limit = given.shape[1], config.max_position_embeddings
    if attention_mask is not None:
        check_mask(attention_mask, given)
    for name, value in kwargs.items():
        if name in REFUSED and value is not None and value is not False:
            raise ValueError(f"{name} cannot be used: {REFUSED[name]}.")
        if name in KNOWN or name in REFUSED or is_tracing(given):
            continue
        meant = [OTHER_NAMES[name]] if name in OTHER_NAMES else get_close_matches(name, KNOWN, n=1, cutoff=0.85)
        if meant:
            raise ValueError(f"{name} is no argument of this model, and would be ignored; is it {meant[0]}?")
    if length > limit:
        raise ValueError(
            f"The input has {length} tokens, but this model reads at most max_position_embeddings={limit}. "
            f"Truncate it, or call model.resize_position_embeddings({length}) (and fine-tune). Padding beyond that "
            "is cut off where an attention_mask tells it, except in graphs."
        )


def ignore_padding(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Labels [B, N] with -100 wherever there is no real token."""
    if attention_mask is None:
        return labels
    if not labels.is_floating_point():  # which is refused later
        labels = labels.long()  # uint8 holds no -100
    return labels.masked_fill(attention_mask.to(labels.device) == 0, -100)


def mean_loss(total: torch.Tensor, count: torch.Tensor | int, num_items_in_batch: torch.Tensor | int | None):
    """`total` (a sum over labels) over the labels of the whole optimizer step if known, else over those seen here."""
    if num_items_in_batch is None:
        return total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross entropy of logits [n, classes] against labels [n]; 0 if every label is ignored."""
    if labels.is_floating_point():
        raise ValueError(f"labels must be ids of classes (int64), got {labels.dtype}.")
    labels, logits = labels.to(logits.device, torch.int64), logits.to(exact(logits.dtype))
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return mean_loss(total, (labels != ignore_index).sum(), num_items_in_batch)


def encode_elsewhere(forward: Callable, model: Any, arguments: Iterable, kwargs: dict, put_back: Callable) -> Any:
    """`forward` of a batch that was made of another one; states and maps are `put_back` to where the tokens stood."""
    as_dict = kwargs.pop("return_dict", None)
    outputs = forward(model, *arguments, return_dict=True, **kwargs)
    outputs.last_hidden_state = put_back(outputs.last_hidden_state)
    for name in ("hidden_states", "attentions"):
        if outputs.get(name) is not None:
            outputs[name] = tuple(None if states is None else put_back(states) for states in outputs[name])
    return outputs if (model.config.return_dict if as_dict is None else as_dict) else outputs.to_tuple()


def padded_beyond_n(forward: Callable) -> Callable:
    """Decorates `LinformerModel.forward`: an input that is longer than N because of its padding.

    The real tokens of each row are brought to its front, and what is behind the longest row is cut off. All that the
    encoder gives (hidden states and attention maps too) is put back to where the tokens stand, with zeros at padding.
    """

    @wraps(forward)
    def wrapper(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        arguments = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        given, limit = input_ids if input_ids is not None else inputs_embeds, self.config.max_position_embeddings
        beyond = given is not None and given.dim() > 1 and given.shape[1] > limit and given.shape[0] > 0
        if not beyond or attention_mask is None or is_tracing(given) or given.device.type == "meta":
            return forward(self, *arguments, **kwargs)
        check_mask(attention_mask, given)
        rows, length = given.shape[:2]
        tokens = RealTokens.from_mask(attention_mask, length, given.device)
        longest = max(int(tokens.length.max()), 1)
        if longest > limit:
            return forward(self, *arguments, **kwargs)  # refuses it
        front = torch.arange(length, device=given.device)[None] if tokens.order is None else tokens.order
        front = front[:, :longest].expand(rows, -1)

        def trim(name: str, values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            if values.dim() == 3:  # embeddings
                return values.gather(1, front[..., None].expand(-1, -1, values.shape[2]))
            check_shape(name, values, (rows, length), (1, length), (length,))
            return values.expand(rows, length).gather(1, front)

        def put_back(states: torch.Tensor) -> torch.Tensor:  # [B, n, C], or maps [B, H, n, K]
            shape = (rows, *[1] * (states.dim() - 3), length, 1)
            place = tokens.place.clamp(max=longest - 1).view(shape).expand(*states.shape[:-2], -1, states.shape[-1])
            return torch.where(attention_mask.view(shape) != 0, states.gather(-2, place), states.new_zeros(()))

        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        return encode_elsewhere(forward, self, map(trim, names, arguments), kwargs, put_back)

    return wrapper


def restarts(marks: torch.Tensor, positions: bool) -> torch.Tensor | None:
    """Bounds [documents + 1] of the documents of a row, by its positions or by each token's document ([T], T > 1).

    None unless positions fall, and each time to where the row's began. All alike they tell nothing.
    """
    starts = marks[1:] <= marks[:-1] if positions else marks[1:] != marks[:-1]  # [T - 1]
    told = bool(starts.any()) and not bool(starts.all()) and bool((marks[1:][starts] == marks[0]).all())
    if positions and not told:
        return None
    begins = starts.nonzero().flatten() + 1
    return torch.cat([begins.new_zeros(1), begins, begins.new_tensor([len(marks)])])


def check_bounds(name: str, bounds: torch.Tensor, total: int, longest: int | None) -> None:
    """Raise a ValueError unless they rise (or stay) from 0 to `total`, by at most `longest` at a time."""
    if bounds.dim() != 1 or len(bounds) < 2:
        raise ValueError(f"{name} must be of shape [documents + 1], got {list(bounds.shape)}.")
    first, last, steps = int(bounds[0]), int(bounds[-1]), bounds.diff()
    if (first, last) != (0, total):
        raise ValueError(f"{name} goes from {first} to {last}, but must go from 0 to the row's {total} tokens.")
    if bool((steps < 0).any()):
        fall = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"{name} falls from {int(bounds[fall])} to {int(bounds[fall + 1])}; it must rise: where each document "
            "begins, and at last where the row ends."
        )
    if longest is not None and int(steps.max()) > longest:
        raise ValueError(f"{name} has a document of {int(steps.max())} tokens, but max_length_q is {longest}.")


def documents_of(
    given: torch.Tensor | None, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, kwargs: dict
) -> tuple[torch.Tensor, int] | None:
    """Bounds [documents + 1] of the documents of a flat row, and room for the longest; None for any other input.

    On an accelerator nothing is read where `cu_seq_lens_q` and `max_length_q` are given. Positions have to be, of a
    single row without a mask that comes with some: its documents would be mixed unnoticed.

    Raises:
        ValueError: bounds that are none, of several rows, or beside padding.
    """
    told = {name: kwargs[name] for name in FLAT[:3] if kwargs.get(name) is not None}
    if given is None or given.dim() < 2 or is_tracing(given) or not (told or position_ids is not None):
        return None
    (rows, total), name = given.shape[:2], next(iter(told), "position_ids")
    marks = torch.as_tensor(told.get(name, position_ids))
    if not concrete(marks) or given.device.type == "meta":
        return None
    if not told and (rows != 1 or attention_mask is not None or marks.numel() != total):
        return None
    if rows != 1:
        raise ValueError(
            f"{name} tells the documents of one row, [1, tokens], but the input has {rows} rows; give these an "
            "attention_mask instead, or all documents in one row."
        )
    if attention_mask is not None:
        check_mask(attention_mask, given)
        if not bool(attention_mask.all()):
            raise ValueError(f"attention_mask holds 0, but beside {name} a row has no padding; leave both out.")
    if name not in BOUNDS:
        check_shape(name, marks, (1, total), (total,))
        bounds = restarts(marks.flatten().cpu(), positions=not told)
        return None if bounds is None else (bounds.to(given.device), int(bounds.diff().max()))
    longest = next((int(kwargs[name]) for name in LONGEST if kwargs.get(name) is not None), None)
    if readable(marks) or longest is None:
        host = marks.cpu()
        check_bounds(name, host, total, longest)
        if torch.as_tensor(told.get(BOUNDS[1], host)).tolist() != host.tolist():
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ, but a token's document gives its query and key.")
        longest = int(host.diff().max())
    return marks.to(given.device, torch.int64), longest


def refuse_flat(head: str, given: torch.Tensor, attention_mask: Any, position_ids: Any, kwargs: dict) -> None:
    """Raise a ValueError for a flat row, of which a head would have to know which document is meant."""
    if documents_of(given, attention_mask, position_ids, kwargs) is not None:
        raise ValueError(
            f"{head} cannot tell which document of a row is meant; give each a row of its own, with an attention_mask."
        )


def flat_rows(forward: Callable) -> Callable:
    """Decorates `LinformerModel.forward`: one row [1, T] of several documents one after the other, without padding.

    They become a padded batch, so that each has its own positions, slots and band. What the encoder gives is brought
    back into the row; the pooler's output stays one for each document.
    """

    @wraps(forward)
    def wrapper(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        arguments = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        given = input_ids if input_ids is not None else inputs_embeds
        documents = documents_of(given, attention_mask, position_ids, kwargs)
        if documents is None:
            return forward(self, *arguments, **kwargs)
        (bounds, longest), total = documents, given.shape[1]
        column, token = (torch.arange(length, device=given.device) for length in (longest, total))
        inside = column < bounds.diff()[:, None]  # [documents, n]
        there = torch.where(inside, bounds[:-1, None] + column, 0)
        row = torch.searchsorted(bounds, token, right=True) - 1  # [T]
        place = token - bounds[row]
        # Bounds that nobody could check lead outside, where the device's own assertion speaks.
        back = torch.where(place < longest, row * longest + place, inside.numel())

        def apart(name: str, values: torch.Tensor | None) -> torch.Tensor | None:  # [1, T, ...] -> [documents, n, ...]
            if values is None:
                return None
            channels = values.shape[2:]
            check_shape(name, values, (1, total, *channels), (total,))
            return values.reshape(total, *channels).index_select(0, there.flatten()).view(*there.shape, *channels)

        def put_back(states: torch.Tensor) -> torch.Tensor:  # [documents, n, C], or maps [documents, H, n, K]
            return states.movedim(-2, 1).flatten(0, 1).index_select(0, back)[None].movedim(1, -2)

        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        arguments = (input_ids, None, token_type_ids, position_ids, inputs_embeds)
        ids, _, *others = map(apart, names, arguments)
        kwargs = {name: value for name, value in kwargs.items() if name not in FLAT}
        return encode_elsewhere(forward, self, (ids, inside, *others), kwargs, put_back)

    return wrapper


__all__ = ["RealTokens"]
