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
"""Attention of N queries over K keys: slots that the projection makes and, with `local_window`, single tokens.

On a CPU:

- bfloat16 and attention dropout go through `eager_attention_forward` under the name of sdpa too: over K slots it is
  faster than torch's kernel there. float16 does not: its logits would overflow, which torch's kernel has in float32.
- Dropout draws 16 bits for an element.
- A band's keys and scores are made for some `BLOCK` queries at a time: they are larger than the input and would leave
  the cache.

Letters: B batch, N length, K slots, H heads, D head size, C hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

from .configuration_linformer import CONVOLUTIONS, LinformerConfig
from .projection_linformer import LinformerProjection, slot_edges
from .tokens_linformer import RealTokens, at_least, exact, holds, in_general_form, readable, shut


# Tokens of a block: enough for a matrix product to run at full speed, few enough to stay in the cache.
BLOCK = 512
# A function that gives the projection: were the module an argument itself, hooks that bring a layer's weights from
# elsewhere (accelerate) would try to move it too.
SharedProjection = Callable[[], LinformerProjection | None]
# Keys or values of a band: of some blocks the one in front of them, themselves, the one behind, [B, 1 or b, H, w, D].
Near = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def dropout_factor(states: torch.Tensor, rate: float) -> torch.Tensor:
    """0 with probability `rate`, else 1 / (1 - rate), for every element of a CPU tensor: 16 random bits for each.

    Four elements to a draw take a third of the time of torch's dropout.
    """
    threshold, device = round(rate * 2**16), states.device
    draws = torch.empty((states.numel() + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: states.numel()].view(states.shape)
    scale = torch.tensor(1 / (1 - threshold / 2**16), dtype=states.dtype, device=device)
    return torch.where(bits >= threshold - 2**15, scale, scale.new_zeros(()))


def drop(states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """`nn.functional.dropout`, faster on a CPU; the probability is rounded to a multiple of 2^-16."""
    if not training or rate == 0:
        return states
    plain = states.device.type != "cpu" or not 2**-16 <= rate < 1 - 2**-16 or is_tracing(states) or transformed()
    if plain:
        return nn.functional.dropout(states, p=rate, training=True)
    # With and without gradients alike: a checkpoint's two passes must agree.
    return states * dropout_factor(states, rate)


class LinformerDropout(nn.Dropout):
    """`nn.Dropout` by `drop`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return drop(states, self.p, self.training)


def transformed() -> bool:
    """Whether torch.func (vmap, grad, ...) or forward-mode differentiation looks on: it follows no write in place."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def recomputed(function: Callable, length: int, *given: Any) -> Any:
    """`function(*given)`; in training on a CPU, what it computes between is not kept but computed again for gradients.

    Of an attention over rows of `length` tokens that is more than all else of a layer. Rows of one block are not worth
    it.
    """
    query: torch.Tensor = given[0]
    plain = query.device.type != "cpu" or is_tracing(query) or transformed() or not torch.is_grad_enabled()
    if plain or length <= BLOCK or not query.requires_grad:
        return function(*given)
    return checkpoint(function, *given, use_reentrant=False)


def softmax(scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Over the last dimension, computed in float32 at least, given in `dtype`; `scores` may be written over."""
    if scores.device.type != "cpu":
        return nn.functional.softmax(scores, dim=-1, dtype=exact(scores.dtype)).to(dtype)
    # On a CPU softmax computes in float32 whatever it is given.
    free = scores if not torch.is_grad_enabled() and not is_tracing(scores) and not transformed() else None
    return torch.softmax(scores, dim=-1, out=free)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's equation 7. query [B, H, N, D], key and value [B, H, K, D] -> [B, N, H, D], [B, H, N, K]."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))  # [B, H, N, K]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = softmax(scores, query.dtype)
    weights = drop(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def three_blocks(near: Near) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each block the one in front of it, itself and the one behind it, [B, b, H, w, D] each."""
    blocks = torch.cat(near, 1)
    return blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]


def eager_band_forward(
    module: nn.Module,
    query: torch.Tensor,
    states: list[tuple[torch.Tensor, Near]],
    bias: torch.Tensor,
    scaling: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager_attention_forward` over slots and a band, without a copy of the slots for every block.

    Args:
        query: of some blocks, [B, b, H, w, D].
        states: of keys and of values the slots [B, H, S, D] and the band.
        bias: [B, b, H or 1, K].

    Returns:
        [B, b w, H, D] and the map [B, H, b w, K], slots first.
    """
    (slot_keys, near_keys), (slot_values, near_values) = states
    query, w = (query * scaling).transpose(1, 2), query.shape[3]  # [B, H, b, w, D]
    key, value = (torch.cat(three_blocks(near), 3).transpose(1, 2) for near in (near_keys, near_values))
    far = torch.matmul(query.flatten(2, 3), slot_keys.transpose(2, 3)).unflatten(2, (-1, w))  # [B, H, b, w, S]
    scores = torch.cat([far, torch.matmul(query, key.transpose(3, 4))], 4)
    weights = softmax(scores + bias.transpose(1, 2)[:, :, :, None], query.dtype)
    weights = drop(weights, dropout, module.training)
    far, near = weights.split([slot_keys.shape[2], 3 * w], 4)
    output = torch.matmul(far.flatten(2, 3), slot_values) + torch.matmul(near, value).flatten(2, 3)
    return output.transpose(1, 2), weights.flatten(2, 3)


def attention_function(implementation: str | None) -> Callable:
    """What `attn_implementation` names."""
    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    # transformers 5.0
    return ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward)


class LinformerSelfAttention(nn.Module):
    """Attention of N queries over K slots."""

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        # As BERT's: its rate is read, it is not called.
        self.dropout: nn.Module = LinformerDropout(config.attention_probs_dropout_prob)
        # What of the projection is needed here; it may be wrapped, so it is not asked.
        self.projection_type = config.projection_type
        self.local_window = config.local_window
        self.keys = config.projected_lengths[layer_idx]  # K
        self.boundary = config.boundary_slots
        self.is_causal = False  # sdpa would otherwise assume a causal mask where none is given

        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        # Shared layerwise, the one projection belongs to the encoder and is handed to every layer's forward.
        shared = config.projection_sharing == "layerwise"
        self.projection = None if shared else LinformerProjection(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        shared_projection: SharedProjection | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, N, C] -> [B, N, C], and the attention map [B, H, N, K] where the implementation gives it (eager)."""
        projection = self.projection_of(shared_projection)
        if self.banded(hidden_states):
            return self.banded_attention(hidden_states, tokens, projection, **kwargs)
        slots = self.slots(hidden_states, tokens, projection)
        output, weights = self.attend_to_slots(hidden_states, slots, **kwargs)
        if weights is not None and weights.shape[-1] < self.keys:  # the keys that a short input leaves empty
            weights = nn.functional.pad(weights, (0, self.keys - weights.shape[-1]))
        return output, weights

    def projection_of(self, shared_projection: SharedProjection | None) -> LinformerProjection:
        """This layer's own projection, or the one that all layers share."""
        projection = self.projection
        if projection is None and shared_projection is not None:
            projection = shared_projection()
        assert projection is not None
        return projection

    def slots(
        self, hidden_states: torch.Tensor, tokens: RealTokens, projection: LinformerProjection
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """K', V' and their bias, as `LinformerProjection.forward` gives them."""
        return projection(hidden_states, lambda states: self.key(states), lambda states: self.value(states), tokens)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[B, n, C] -> [B, H, n, D]."""
        return states.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def banded(self, hidden_states: torch.Tensor) -> bool:
        """Whether an input of this length has a band of single tokens among its keys."""
        return bool(self.local_window) and not holds(hidden_states.shape[1] <= self.keys)

    def attend_to_slots(
        self,
        hidden_states: torch.Tensor,
        slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens of a row or a block of them, [B, n, C], over K', V' and their bias -> [B, n, C] and the map."""
        query = self.split_heads(self.query(hidden_states))  # [B, H, n, D]
        output, weights = self.attend(query, *slots, **kwargs)
        return output.reshape(*hidden_states.shape).contiguous(), weights

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention by the chosen implementation: [B, H, N, D] and [B, H, K, D] -> [B, N, H, D] and the map or None."""
        implementation = self.config._attn_implementation
        if bias is not None and "flash" in (implementation or ""):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no bias on slots, which projection_type="
                f"{self.projection_type!r} needs for this input (empty slots, or slots that weigh what their tokens "
                "would together). Load the model with attn_implementation='sdpa'."
            )
        attention, dropout, written_out = self.implementation(query, bias)
        if written_out:
            compute = partial(eager_attention_forward, self, dropout=dropout, scaling=self.scaling, **kwargs)
            return recomputed(lambda *given: compute(*given)[0], query.shape[2], query, key, value, bias), None
        return attention(self, query, key, value, bias, dropout=dropout, scaling=self.scaling, **kwargs)

    def implementation(self, query: torch.Tensor, bias: torch.Tensor | None) -> tuple[Callable, float, bool]:
        """The chosen attention function, the dropout, and whether it is sdpa's but written out (see the top)."""
        attention = attention_function(self.config._attn_implementation)
        dropout = self.dropout_rate() if self.training else 0.0
        faster = query.dtype != torch.float16 and (dropout > 0 or query.dtype == torch.bfloat16)
        # With a bias the kernel takes no empty batch, and gives it no gradient where torch.func looks on.
        faster |= not query.shape[0] or (bias is not None and transformed() and torch.is_grad_enabled())
        plain = attention is sdpa_attention_forward and query.device.type == "cpu" and not is_tracing(query)
        return attention, dropout, plain and faster

    def dropout_rate(self) -> float:
        """Of what stands there now: somebody may have wrapped the dropout, or put nn.Identity in its place."""
        return next((module.p for module in self.dropout.modules() if isinstance(module, nn.Dropout)), 0.0)

    def banded_attention(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        projection: LinformerProjection,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over the slots and, exactly, over the blocks of w tokens around each query.

        Real tokens are brought to the front of each row, so blocks are counted among them. A row of at most K real
        tokens has these as its keys, all of them. Letters: b = N / w blocks, rounded up; S = K - 3 w slots.

        Returns [B, N, C] and the map [B, H, N, K] (slots first, then the band; no gradient reaches it) or None. What
        stands at padding is the answer of some real token.
        """
        w, (batch, length, channels) = self.local_window, hidden_states.shape
        blocks = (length + w - 1) // w
        if in_general_form():
            blocks = at_least(blocks, 2)  # 1 is special: the graph would hold for N <= w only, or for N > w
        front = tokens.to_front(hidden_states)  # [B, N, C]
        keys, values = self.key(front), self.value(front)  # [B, N, C]
        # A call, for hooks and wrappers to see (accelerate, PEFT). What needs all keys, as the band does, gets these.
        slot_keys, slot_values, slot_bias = projection(
            front,
            lambda states: keys if states is front else self.key(states),
            lambda states: values if states is front else self.value(states),
            tokens.in_front(masked=self.projection_type != "gated_pool"),
        )
        assert slot_bias is not None  # beside a band there always is one
        bias = self.band_bias(slot_bias.expand(batch, -1, -1, -1), tokens, blocks)  # [B, b, H or 1, K]
        single = self.single_tokens(keys, values, bias, tokens)
        query = nn.functional.pad(self.query(front), (0, 0, 0, blocks * w - length))
        query = self.split_heads(query).unflatten(2, (blocks, w)).transpose(1, 2)  # [B, b, H, w, D]
        by_block = (self.parts(query), self.near(keys, blocks), self.near(values, blocks), self.parts(bias))
        outputs, maps = [], []
        for part, near_keys, near_values, part_bias in zip(*by_block, strict=True):
            compute = partial(self.attend_to_band, single=single, **kwargs)
            states = [(slot_keys, near_keys), (slot_values, near_values)]
            output, weights = recomputed(compute, length, part, states, part_bias)
            outputs.append(output.reshape(batch, part.shape[1] * w, channels))  # [.., w, H, D] -> [B, b w, C]
            if weights is not None:
                maps.append(weights)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        weights = torch.cat(maps, 2) if maps else None
        if tokens.order is None and not in_general_form():  # a slice would fix N to multiples of w
            return output[:, :length].contiguous(), None if weights is None else weights[:, :, :length]
        # Back to where the tokens stand.
        output = output.gather(1, tokens.place[..., None].expand(batch, -1, channels))
        if weights is not None:
            place = tokens.place[:, None, :, None].expand(batch, weights.shape[1], -1, weights.shape[3])
            weights = weights.gather(2, place)
        return output, weights

    def attend_to_band(
        self,
        query: torch.Tensor,
        states: list[tuple[torch.Tensor, Near]],
        bias: torch.Tensor,
        single: list[torch.Tensor] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries of some blocks, [B, b, H, w, D] -> outputs in the order of the tokens, of H heads and D, and the map,
        [B, H, b w, K], or None."""
        attention, dropout, written_out = self.implementation(query, bias)
        ours = getattr(self.attend, "__func__", None) is LinformerSelfAttention.attend  # nobody's own instead
        # Copies of few slots, beside a block's own tokens, are small: one product over all keys is faster then.
        many = states[0][0].shape[2] > 2 * self.local_window
        if many and single is None and ours and (written_out or attention is eager_attention_forward):
            output, attended = eager_band_forward(self, query, states, bias, self.scaling, dropout)
            return output, None if written_out else attended
        key, value, bias = self.band(states, bias, single)
        output, weights = self.attend(query.flatten(0, 1), key, value, bias, **kwargs)
        if weights is None:
            return output, None
        return output, weights.unflatten(0, query.shape[:2]).transpose(1, 2).flatten(2, 3)  # [B b, H, w, K] before

    def parts(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys or biases of all blocks, [B, b, ...] -> those that are computed at a time: some `BLOCK` tokens.

        A block has a copy of its keys, which is 4 times the tokens at K = 4 w; that of a few blocks stays in the cache.
        On an accelerator few at a time would leave it idle.
        """
        if states.device.type != "cpu" or is_tracing(states):
            return (states,)
        return states.split(max(1, BLOCK // self.local_window), 1)

    def near(self, states: torch.Tensor, blocks: int) -> list[Near]:
        """States [B, N, C] -> of each of the `parts`, as views: the block in front of it, its own and the next."""
        w, length = self.local_window, states.shape[1]
        if in_general_form() or length != blocks * w:
            states = nn.functional.pad(states, (0, 0, 0, blocks * w - length))
        heads = (self.num_attention_heads, self.attention_head_size)
        parts = self.parts(states.unflatten(1, (blocks, w)).unflatten(3, heads).transpose(2, 3))  # [B, b, H, w, D]
        edge = torch.zeros_like(parts[0][:, :1])
        before = [edge, *(part[:, -1:] for part in parts[:-1])]
        after = [*(part[:, :1] for part in parts[1:]), edge]
        return list(zip(before, parts, after, strict=True))

    def band(
        self, states: list[tuple[torch.Tensor, Near]], bias: torch.Tensor, single: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some blocks the keys and values (slots, then the 3 w tokens) and the bias, [B b, H, K or 1, D or K]."""
        banded = []
        for slots, near in states:
            each = three_blocks(near)
            banded.append(torch.cat([slots[:, None].expand(-1, each[1].shape[1], -1, -1, -1), *each], 3))
        banded.append(bias[:, :, :, None])
        if single is not None:
            short, *instead = single
            banded = [torch.where(short, *pair) for pair in zip(instead, banded, strict=True)]
        key, value, part_bias = (each.flatten(0, 1) for each in banded)
        return key, value, part_bias

    def single_tokens(
        self, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, tokens: RealTokens
    ) -> list[torch.Tensor] | None:
        """Which rows have at most K real tokens, [B or 1, 1, 1, 1, 1], and their keys, values and bias; None if no row.

        Each [B or 1, 1, H or 1, K or 1, D or K]: the same for all blocks.
        """
        short = tokens.length <= self.keys  # [B or 1]
        if (tokens.mask is None and holds(keys.shape[1] > self.keys)) or (readable(short) and not bool(short.any())):
            return None
        first = torch.arange(self.keys, device=keys.device)
        # A row without a real token gets no bias, as in `LinformerProjection.slot_bias`.
        outside = ((first >= tokens.length[:, None]) & (tokens.length > 0)[:, None])[:, None, None, None]
        single_bias = shut(bias.new_zeros(outside.shape), outside)
        first = first.clamp(max=keys.shape[1] - 1)
        single = [self.split_heads(states[:, first])[:, None] for states in (keys, values)]
        return [short[:, None, None, None, None], *single, single_bias]

    def band_bias(self, slot_bias: torch.Tensor, tokens: RealTokens, blocks: int) -> torch.Tensor:
        """[B, b, H or 1, K]: the slots' bias, and the lowest number on slots inside the band and outside the row."""
        w, slots = self.local_window, slot_bias.shape[-1]
        far = slot_bias.transpose(1, 2).expand(-1, blocks, -1, -1)  # [B, b, H or 1, S]
        first = (torch.arange(blocks, device=far.device) - 1)[:, None] * w  # [b, 1], where the band starts
        if self.projection_type not in ("linear", "fixed"):  # a row of E reaches everywhere
            size = self.config.max_position_embeddings // slots if self.projection_type in CONVOLUTIONS else None
            edges = slot_edges(tokens.length, slots, self.boundary, size)  # [B or 1, S + 1]
            inside = (edges[:, None, :-1] >= first) & (edges[:, None, 1:] <= first + 3 * w)  # [B or 1, b, S]
            far = shut(far, inside[:, :, None])
        place = first + torch.arange(3 * w, device=far.device)  # [b, 3 w]
        outside = (place < 0) | (place >= tokens.length[:, None, None])  # [B or 1, b, 3 w]
        near = shut(torch.zeros_like(outside, dtype=slot_bias.dtype), outside)
        return torch.cat([far, near[:, :, None].expand(far.shape[0], -1, far.shape[2], -1)], 3)
