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

from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

from .configuration_linformer import NO_CAUSAL, LinformerConfig


ID_TYPES = (torch.int64, torch.int32)
ONE_TEXT = "a row is one text, and slots would mix several; give each a row of its own, with an attention_mask"
# Arguments of other models that would change the answer, and why they cannot be honoured.
REFUSED = {
    **dict.fromkeys(
        ("is_causal", "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache"), NO_CAUSAL
    ),
    **dict.fromkeys(
        ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen"),
        ONE_TEXT,
    ),
    "global_attention_mask": "every token reads the same K slots, and none is read by all others; leave it out",
    "head_mask": "heads cannot be switched off; leave it out",
}
KNOWN = {
    *("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "labels", "start_positions", "end_positions"),
    *("return_dict", *TransformersKwargs.__annotations__),
}


def readable(tensor: torch.Tensor) -> bool:
    """Whether a branch may depend on its numbers.

    Not in a graph, under torch.func, on the meta device, or on an accelerator, where reading stalls the queue.
    """
    plain = tensor.device.type == "cpu" and not is_tracing(tensor)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_general_form() -> bool:
    """Whether what runs is recorded for other lengths than this input's, so that no branch may depend on its length."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


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
    if length > limit:
        raise ValueError(
            f"The input has {length} tokens, but this model reads at most max_position_embeddings={limit}. "
            f"Truncate it, or call model.resize_position_embeddings({length}) (and fine-tune). Padding beyond that "
            "is cut off where an attention_mask tells it, except in graphs."
        )
    for name, value in kwargs.items():
        if name in REFUSED and value is not None and value is not False:
            raise ValueError(f"{name} cannot be used: {REFUSED[name]}.")
        if name in KNOWN or name in REFUSED or is_tracing(given):
            continue
        meant = get_close_matches(name, KNOWN, n=1, cutoff=0.85)
        if meant:
            raise ValueError(f"{name} is no argument of this model, and would be ignored; is it {meant[0]}?")


def ignore_padding(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Labels [B, N] with -100 wherever there is no real token."""
    return labels if attention_mask is None else labels.masked_fill(attention_mask.to(labels.device) == 0, -100)


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

        def put_back(states: torch.Tensor | None) -> torch.Tensor | None:  # [B, n, C], or maps [B, H, n, K]
            if states is None:
                return None
            shape = (rows, *[1] * (states.dim() - 3), length, 1)
            place = tokens.place.clamp(max=longest - 1).view(shape).expand(*states.shape[:-2], -1, states.shape[-1])
            return torch.where(attention_mask.view(shape) != 0, states.gather(-2, place), states.new_zeros(()))

        as_dict = kwargs.pop("return_dict", None)
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        outputs = forward(self, *map(trim, names, arguments), return_dict=True, **kwargs)
        outputs.last_hidden_state = put_back(outputs.last_hidden_state)
        for name in ("hidden_states", "attentions"):
            if outputs.get(name) is not None:
                outputs[name] = tuple(map(put_back, outputs[name]))
        return outputs if (self.config.return_dict if as_dict is None else as_dict) else outputs.to_tuple()

    return wrapper


__all__ = ["RealTokens"]
