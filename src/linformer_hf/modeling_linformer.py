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
"""The Linformer encoder and its heads (Wang et al. 2020, arXiv 2006.04768).

    out = softmax(Q K'^T / sqrt(D) + slot bias) V'        cost O(N K) instead of O(N^2)

Everything that is not attention is BERT: post-LN layers, learned positions, BERT's submodule names. What differs:

- Keys and values are shortened from N tokens to K slots (`projection_linformer.py`).
- Positions count real tokens, and the pooler reads the first real token: padding on either side changes nothing.
  A flat row of several documents is computed as their padded batch (`flat_rows`).
- A loss is a sum over labels divided by `num_items_in_batch` where the caller gives it, in every head. Trainer counts
  on that under gradient accumulation; a head that took the mean would train with gradients too large.
- The forward pass never changes the configuration.
- On a CPU a batch is packed: padding is dropped before the first layer and put back, as zeros, behind the last. Without
  gradients a layer then overwrites its input in blocks of `BLOCK` tokens, since all that follows K' and V' is local to
  a token; gradient checkpointing recomputes the same blocks. No module is called as a whole there, so this way is taken
  only where every module of the encoder is just as it was made here (`as_made`): one that is wrapped, subclassed,
  patched, hooked or quantized gets what BERT's would, and so does whoever asks for hidden states or attention maps. A
  band's keys and scores too are made for some `BLOCK` queries at a time: they are larger than the input and would
  leave the cache.
- On a CPU, bfloat16 and attention dropout go through `eager_attention_forward` under the name of sdpa too: over K slots
  it is faster than torch's kernel there. float16 does not: its logits would overflow, which torch's kernel has in
  float32. Dropout draws 16 bits for an element.
- Bad ids, labels and masks raise a ValueError on the CPU. On an accelerator that check would stall the queue at every
  step: there torch's own device-side assertion speaks, and rows without padding are fastest without a mask of ones.

Letters: B batch, N length, K slots, H heads, D head size, C hidden size, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2CLS, ACT2FN, GELUActivation
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_linformer import (
    AUTO_MAP,
    CONVOLUTIONS,
    LinformerConfig,
    capture_outputs,
    merge_with_config_defaults,
)
from .projection_linformer import LinformerProjection, slot_edges
from .tokens_linformer import (
    ID_TYPES,
    RealTokens,
    at_least,
    check_inputs,
    check_range,
    check_shape,
    cross_entropy,
    exact,
    flat_rows,
    holds,
    ignore_padding,
    in_general_form,
    mean_loss,
    padded_beyond_n,
    readable,
    refuse_flat,
    shut,
)


# Tokens of a block: enough for a matrix product to run at full speed, few enough to stay in the cache.
BLOCK = 512
# A row as a batch of its own costs some calls more: on average it must save so many tokens of padding, or, where blocks
# save memory, be so long.
WORTH_PACKING, WORTH_BLOCKS = 64, 256
LM_BIAS = "cls.predictions.decoder.bias"
# A function that gives the projection: were the module an argument itself, hooks that bring a layer's weights from
# elsewhere (accelerate) would try to move it too.
SharedProjection = Callable[[], LinformerProjection | None]


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


def adapter(module: nn.Module) -> bool:
    """Whether it is PEFT's, and packed rows are to it what a batch is: LoRA on a linear layer, a trained projection."""
    kind = type(module)
    name, inside = f"{kind.__module__}.{kind.__qualname__}", getattr(module, "original_module", None)
    known = name == "peft.tuners.lora.layer.Linear"
    known |= name == "peft.utils.other.ModulesToSaveWrapper" and isinstance(inside, LinformerProjection)
    return known and kind.forward.__module__ == kind.__module__


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


def as_made(module: nn.Module, hooks: int = 0, adapters: bool = False) -> bool:
    """Whether it is just as this file makes it, so that nobody can tell whether it was called.

    Nobody has subclassed or replaced it (but, with `adapters`, by an `adapter`), given it or its class a `forward` of
    its own, compiled it, put more than `hooks` forward hooks on it, or made its weights tensors of another kind
    (quantized, sharded).
    """
    kind = type(module)
    return (
        (MADE_HERE.get(kind) is kind.forward or (adapters and adapter(module)))
        and "forward" not in module.__dict__
        and len(module._forward_hooks) <= hooks
        and not (module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and module._compiled_call_impl is None
        and all(weight is None or type(weight) in PLAIN_TENSORS for weight in module._parameters.values())
    )


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
    if scores.device.type == "cpu":  # softmax computes in float32 whatever it is given
        free = scores if not torch.is_grad_enabled() and not is_tracing(scores) and not transformed() else None
        weights = torch.softmax(scores, dim=-1, out=free)
    else:
        weights = nn.functional.softmax(scores, dim=-1, dtype=exact(scores.dtype)).to(query.dtype)
    weights = drop(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attention_function(implementation: str | None) -> Callable:
    """What `attn_implementation` names."""
    if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    # transformers 5.0. It lets a model change its attention if it finds this in the model's file:
    # ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    return ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward)


class LinformerEmbeddings(nn.Module):
    """Word, position and token-type embeddings; positions count the real tokens of a row."""

    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, config.hidden_size) if types else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = LinformerDropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        tokens: RealTokens,
        in_blocks: bool = False,
    ) -> torch.Tensor:
        """-> [B, N, C]. Words at padding are replaced by zeros, so whatever stands there has no effect."""
        if position_ids is None:
            position_ids = tokens.place
        position_ids = position_ids[None] if position_ids.dim() == 1 else position_ids
        if token_type_ids is not None and token_type_ids.dim() == 1:
            token_type_ids = token_type_ids[None]
        given: list[Any] = [input_ids, token_type_ids, position_ids, inputs_embeds, tokens.mask]
        if not in_blocks or tokens.place.shape[1] <= BLOCK:
            return self.embed(*given)
        # The sum of three embeddings at once would need three times their memory.
        whole = None
        for start in range(0, tokens.place.shape[1], BLOCK):
            parts: list[Any] = [None if part is None else part[:, start : start + BLOCK] for part in given]
            block = self.embed(*parts)
            if whole is None:
                whole = block.new_empty(block.shape[0], tokens.place.shape[1], block.shape[2])
            whole[:, start : start + BLOCK] = block
        assert whole is not None
        return whole

    def embed(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if mask is not None:  # a `where`, not a product: 0 * NaN is NaN
            words = torch.where(mask[..., None], words, words.new_zeros(()))
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = position_ids.new_zeros(1, 1)
            words = words + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(words + self.position_embeddings(position_ids)))


class LinformerSelfAttention(nn.Module):
    """Attention of N queries over K slots."""

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
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
        attention = attention_function(implementation)
        dropout = self.attention_dropout if self.training else 0.0
        written_out = query.dtype != torch.float16 and (dropout > 0 or query.dtype == torch.bfloat16)
        plain = attention is sdpa_attention_forward and query.device.type == "cpu" and not is_tracing(query)
        if plain and (written_out or not query.shape[0]):  # see the top; the kernel takes no empty batch with a bias
            compute = partial(eager_attention_forward, self, dropout=dropout, scaling=self.scaling, **kwargs)
            return recomputed(lambda *given: compute(*given)[0], query.shape[2], query, key, value, bias), None
        return attention(self, query, key, value, bias, dropout=dropout, scaling=self.scaling, **kwargs)

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
        by_block = (query, self.near(keys, blocks), self.near(values, blocks), bias)
        outputs, maps = [], []
        for part, near_keys, near_values, part_bias in zip(*map(self.parts, by_block), strict=True):
            compute = partial(self.attend_to_band, single=single, **kwargs)
            states = [(slot_keys, near_keys), (slot_values, near_values)]
            output, weights = recomputed(compute, length, part, states, part_bias)
            outputs.append(output.reshape(batch, part.shape[1] * w, channels))  # [B b, w, H, D] -> [B, b w, C]
            if weights is not None:  # [B b, H, w, K] -> [B, H, b w, K]
                maps.append(weights.unflatten(0, part.shape[:2]).transpose(1, 2).flatten(2, 3))
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
        states: list[tuple[torch.Tensor, torch.Tensor]],
        bias: torch.Tensor,
        single: list[torch.Tensor] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of some blocks [B, b, H, w, D] -> [B b, w, H, D] and the map or None."""
        key, value, bias = self.band(states, bias, single)
        return self.attend(query.flatten(0, 1), key, value, bias, **kwargs)

    def parts(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys or biases of all blocks, [B, b, ...] -> those that are computed at a time: some `BLOCK` tokens.

        A block has a copy of its keys, which is 4 times the tokens at K = 4 w; that of a few blocks stays in the cache.
        On an accelerator few at a time would leave it idle.
        """
        if states.device.type != "cpu" or is_tracing(states):
            return (states,)
        return states.split(max(1, BLOCK // self.local_window), 1)

    def near(self, states: torch.Tensor, blocks: int) -> torch.Tensor:
        """States [B, N, C] -> for each block its 3 w tokens, [B, b, H, 3 w, D], as a view."""
        w = self.local_window
        padded = nn.functional.pad(states, (0, 0, w, blocks * w - states.shape[1] + w))
        heads = (self.num_attention_heads, self.attention_head_size)
        return padded.unfold(1, 3 * w, w).unflatten(2, heads).transpose(3, 4)

    def band(
        self,
        states: list[tuple[torch.Tensor, torch.Tensor]],
        bias: torch.Tensor,
        single: list[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some blocks the keys and values (slots, then the 3 w tokens) and the bias, [B b, H, K or 1, D or K]."""
        banded = [torch.cat([slots[:, None].expand(-1, near.shape[1], -1, -1, -1), near], 3) for slots, near in states]
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


class LinformerCorrection(nn.Linear):
    """W' of `length_correction`: a class of its own, because it starts at zero."""


class LinformerSelfOutput(nn.Module):
    """BERT's; with `length_correction`, the dense layer W is W + max(0, 1 - K / l) W' in a row of l real tokens."""

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.keys = config.projected_lengths[layer_idx]  # K
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        size = config.hidden_size
        self.correction = LinformerCorrection(size, size) if config.length_correction else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = LinformerDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor, tokens: RealTokens) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.project(hidden_states, tokens)) + input_tensor)

    def project(self, context: torch.Tensor, tokens: RealTokens) -> torch.Tensor:
        """[B, N, C] -> [B, N, C]."""
        if self.correction is None:
            return self.dense(context)
        length = tokens.length.clamp(min=1).to(exact(context.dtype))
        share = (1 - self.keys / length).clamp(min=0).to(context.dtype)  # [B] or [1]
        if tokens.rows is not None:  # [1, T, C]
            share = share.repeat_interleave(tokens.length)
            return self.dense(context) + share[None, :, None] * self.correction(context)
        if tokens.mask is None and as_made(self.dense) and as_made(self.correction):  # rows of one length: one product
            weight = self.dense.weight + share * self.correction.weight
            return nn.functional.linear(context, weight, self.dense.bias + share * self.correction.bias)
        return self.dense(context) + share[:, None, None] * self.correction(context)


class LinformerAttention(nn.Module):
    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.self = LinformerSelfAttention(config, layer_idx)
        self.output = LinformerSelfOutput(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        shared_projection: SharedProjection | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self(hidden_states, tokens, shared_projection, **kwargs)
        return self.output(attention_output, hidden_states, tokens)


class LinformerIntermediate(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = self.dense(hidden_states)
        plain = torch.is_grad_enabled() or states.device.type != "cpu" or is_tracing(states) or transformed()
        gelu = type(self.intermediate_act_fn) is GELUActivation and as_made(self.intermediate_act_fn)
        if not plain and gelu and as_made(self.dense):
            return torch.ops.aten.gelu_(states)  # in place: this is the largest tensor of a layer
        return self.intermediate_act_fn(states)


class LinformerOutput(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = LinformerDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class LinformerLayer(GradientCheckpointingLayer):
    """BERT's layer."""

    def __init__(self, config: LinformerConfig, layer_idx: int):
        super().__init__()
        self.attention = LinformerAttention(config, layer_idx)
        self.intermediate = LinformerIntermediate(config)
        self.output = LinformerOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        shared_projection: SharedProjection | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """[B, N, C] -> [B, N, C]."""
        attention_output = self.attention(hidden_states, tokens, shared_projection, **kwargs)
        return self.output(self.intermediate(attention_output), attention_output)

    def packed(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        shared_projection: SharedProjection,
        overwrite: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """[1, T, C] -> [1, T, C], the real tokens of row after row: `forward`, in chunks.

        With `overwrite` the result overwrites `hidden_states`: above the input, memory is that of one block. With
        checkpointing only K', V' and the layer's input are kept, and a block is computed again for its gradient.
        """
        compute, results = partial(self.chunk, **kwargs), []
        checkpointing = self.gradient_checkpointing and self.training
        given: Any
        for given in self.chunks(hidden_states, tokens, shared_projection, overwrite or checkpointing, **kwargs):
            if checkpointing:  # K' and V' are arguments of their own: reentrant checkpoints look at these only
                results.append(self._gradient_checkpointing_func(compute, *given))
            elif overwrite:
                given[0].copy_(compute(*given))
            else:
                results.append(compute(*given))
        return torch.cat(results, 1) if results else hidden_states

    def chunks(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        shared_projection: SharedProjection,
        in_blocks: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Iterator[tuple]:
        """The arguments of `chunk`: blocks of `BLOCK` tokens of one row, or the whole batch as one chunk."""
        attention, contexts = self.attention.self, []
        projection = attention.projection_of(shared_projection)
        assert tokens.rows is not None
        for row in hidden_states.split(tokens.rows, 1):
            alone = RealTokens.from_mask(None, row.shape[1], row.device)
            if in_blocks and not attention.banded(row):
                slots = attention.slots(row, alone, projection)
                yield from ((block, alone, None, *slots) for block in row.split(BLOCK, 1))
                continue
            context = attention(row, alone, shared_projection, **kwargs)[0]
            if in_blocks:
                yield from zip(row.split(BLOCK, 1), repeat(alone), context.split(BLOCK, 1), strict=False)
            contexts.append(context)
        if not in_blocks:
            yield hidden_states, tokens, torch.cat(contexts, 1)

    def chunk(
        self,
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        context: torch.Tensor | None,
        key: Any = None,
        value: Any = None,
        slot_bias: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """What of the layer is local to a token, [1, n, C] -> [1, n, C]; `context`: attention's output, if known."""
        if context is None:
            context, _ = self.attention.self.attend_to_slots(hidden_states, (key, value, slot_bias), **kwargs)
        attention_output = self.attention.output(context, hidden_states, tokens)
        return self.output(self.intermediate(attention_output), attention_output)


class LinformerEncoder(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.config = config
        shared = config.projection_sharing == "layerwise" and config.num_hidden_layers > 0
        self.projection = LinformerProjection(config) if shared else None
        self.layer = nn.ModuleList([LinformerLayer(config, i) for i in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, tokens: RealTokens, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        for layer in self.layer:
            hidden_states = layer(hidden_states, tokens, self.shared_projection, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def packed(self, hidden_states: torch.Tensor, tokens: RealTokens, overwrite: bool, **kwargs) -> torch.Tensor:
        """[1, T, C] -> [1, T, C], see `LinformerLayer.packed`."""
        layer: Any
        for layer in self.layer:
            hidden_states = layer.packed(hidden_states, tokens, self.shared_projection, overwrite, **kwargs)
        return hidden_states

    def shared_projection(self) -> LinformerProjection | None:
        """The projection of all layers (`layerwise`), or None."""
        return self.projection


class LinformerPooler(nn.Module):
    """BERT's pooler over the first real token, or over the mean of the real tokens (`classifier_pooling`)."""

    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden_states: torch.Tensor, tokens: RealTokens) -> torch.Tensor:
        """[B, N, C] -> [B, C]."""
        pooled = tokens.mean(hidden_states) if self.pooling == "mean" else tokens.first(hidden_states)
        return self.activation(self.dense(pooled))


class LinformerPredictionHeadTransform(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


def rename_old_bias(head: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
    """What `OldBias` does, for `load_state_dict` (Trainer resumes by it)."""
    old = state_dict.pop(f"{prefix}bias", None)
    if old is not None:
        state_dict.setdefault(f"{prefix}decoder.bias", old)


class OldBias(ConversionOps):
    """BERT's second name of the decoder's bias. In an old file that has both names, it was used by nothing."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, Any]:
        return {LM_BIAS: next(input_dict[name] for name in source_patterns if name in input_dict)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self  # saved under the one name


# What from_pretrained renames. `overwrite`: code from the Hub registers the same beside the installed package's.
register_checkpoint_conversion_mapping(
    LinformerConfig.model_type,
    [WeightConverter([LM_BIAS, "cls.predictions.bias"], LM_BIAS, operations=[OldBias()])],
    overwrite=True,
)


class LinformerLMPredictionHead(nn.Module):
    """BERT's, with one bias: BERT ties a second one, of no use where words are not tied, to the decoder's."""

    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.transform = LinformerPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_load_state_dict_pre_hook(rename_old_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class LinformerOnlyMLMHead(nn.Module):
    def __init__(self, config: LinformerConfig):
        super().__init__()
        self.predictions = LinformerLMPredictionHead(config)

    def forward(self, sequence_output: torch.Tensor) -> torch.Tensor:
        return self.predictions(sequence_output)


@auto_docstring
class LinformerPreTrainedModel(PreTrainedModel):
    config: LinformerConfig
    base_model_prefix = "linformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinformerEmbeddings", "LinformerLayer"]
    # No flex attention: it gains by skipping blocks of an N x N mask. Keys are K slots here, of which only those that a
    # short row leaves empty are masked: nothing to skip, and a kernel to compile.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LinformerLayer, "attentions": LinformerSelfAttention}
    # A masked-LM checkpoint in another head: its LM head is left out on purpose.
    _keys_to_ignore_on_load_unexpected = [r"^cls\.predictions\."]

    def __init__(self, config: LinformerConfig, *inputs, **kwargs):
        # Attributes may have been assigned since the configuration was built.
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # of a subclass, other code is to be saved, if it is registered itself

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """PreTrainedModel's. config.json names the classes of this file only where this file is saved beside it."""
        self.config.auto_map = dict(AUTO_MAP)
        if type(self).__module__ != __name__ or self._auto_class is None:
            del self.config.auto_map
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LinformerProjection):
            module.initialize()
        elif isinstance(module, LinformerCorrection):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def get_position_embeddings(self) -> nn.Embedding:
        """The position embeddings, [N, C]."""
        return self.base_model.embeddings.position_embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Make the model read up to `new_num_position_embeddings` tokens.

        Positions and the learned E and F are interpolated linearly along the sequence (for `conv`, the kernel), so a
        row of E keeps its sum. The projected length K stays. Pooled types have no E; their windows follow.

        Raises:
            ValueError: the new N is below a layer's K, or, for `conv`, no multiple of it. The model is unchanged then.
        """
        n = new_num_position_embeddings
        config, base = self.config, self.base_model
        old = config.max_position_embeddings
        config.max_position_embeddings = n
        try:
            config.validate_architecture()
        except ValueError:
            config.max_position_embeddings = old
            raise
        positions = base.embeddings.position_embeddings
        weight = positions.weight.detach()
        stretched = nn.functional.interpolate(weight.to(exact(weight.dtype)).T[None], size=n, mode="linear")[0].T
        base.embeddings.position_embeddings = nn.Embedding.from_pretrained(
            stretched.to(weight.dtype).contiguous(), freeze=not positions.weight.requires_grad
        )
        for module in base.modules():
            if isinstance(module, LinformerProjection) and module.weight is not None:
                resized: torch.Tensor | None = module.resized(n)
                assert resized is not None
                if isinstance(module.weight, nn.Parameter):
                    resized = nn.Parameter(resized, requires_grad=module.weight.requires_grad)
                module.weight = resized


@auto_docstring
class LinformerModel(LinformerPreTrainedModel):
    def __init__(self, config: LinformerConfig, add_pooling_layer: bool = True):
        r"""
        add_pooling_layer (bool, *optional*, defaults to `True`):
            Whether to add BERT's pooling layer.
        """
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embeddings = LinformerEmbeddings(config)
        self.encoder = LinformerEncoder(config)
        self.pooler = LinformerPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @flat_rows
    @padded_beyond_n
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | BaseModelOutputWithPooling:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        check_inputs(self.config, given, attention_mask, kwargs)
        if not self.config.type_vocab_size:  # DistilBERT's tokenizer sends them, and DistilBERT ignores them
            token_type_ids = None
        check_range("input_ids", input_ids, self.config.vocab_size, "the vocabulary")
        check_range("token_type_ids", token_type_ids, self.config.type_vocab_size, "type_vocab_size")
        check_range("position_ids", position_ids, self.config.max_position_embeddings, "max_position_embeddings")

        rows, length = given.shape[:2]
        for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            check_shape(name, ids, (rows, length), (1, length), (length,))

        tokens = RealTokens.from_mask(attention_mask, length, given.device)
        packs = self._packs(given, tokens, kwargs)
        in_blocks = packs and not torch.is_grad_enabled() and not self.training
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, tokens, in_blocks)
        if packs:
            sequence_output = self._encode_packed(hidden_states, tokens, in_blocks, **kwargs)
        else:
            sequence_output = tokens.select(self.encoder(hidden_states, tokens, **kwargs).last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=sequence_output,
            pooler_output=self.pooler(sequence_output, tokens) if self.pooler is not None else None,
        )

    def _packs(self, given: torch.Tensor, tokens: RealTokens, kwargs: dict) -> bool:
        """Whether the encoder is given the real tokens of row after row (see the top); `given`: ids or embeddings."""
        if given.device.type != "cpu" or is_tracing(given) or transformed():
            return False
        batch, length = given.shape[:2]
        real = batch * length if tokens.mask is None else int(tokens.length.sum())
        if not real:
            return False
        overwrite = not torch.is_grad_enabled() and not self.training
        blocks = overwrite or (self.gradient_checkpointing and self.training)
        if batch * length - real < WORTH_PACKING * batch and not (blocks and real >= WORTH_BLOCKS * batch):
            return False
        # Embeddings that are changed may keep what they give; PEFT and reentrant checkpoints hook those of words.
        return not self._observed(kwargs) and self._as_made(self.encoder, *([self.embeddings] if overwrite else []))

    def _observed(self, kwargs: dict) -> bool:
        """Whether hidden states or attention maps are asked for, or an attention that is not from here is to run."""
        for name in ("output_hidden_states", "output_attentions"):
            asked = kwargs.get(name, getattr(self.config, name, None))
            if asked is not None and asked is not False:
                return True
        attention = attention_function(self.config._attn_implementation)
        return attention not in (eager_attention_forward, sdpa_attention_forward)

    def _as_made(self, *parts: nn.Module) -> bool:
        """Whether nobody has changed, hooked or compiled a module of these parts."""
        capturing = getattr(self, "_output_capturing_hooks_installed", False)  # transformers' own; asleep unless asked
        everywhere = vars(torch.nn.modules.module)
        return not any(everywhere[f"_global_{name}_hooks"] for name in EVERYWHERE) and all(
            as_made(module, capturing and isinstance(module, LinformerLayer | LinformerSelfAttention), adapters=True)
            for part in parts
            for module in part.modules()
        )

    def _encode_packed(
        self, hidden_states: torch.Tensor, tokens: RealTokens, overwrite: bool, **kwargs
    ) -> torch.Tensor:
        """The encoder over real tokens only: [B, N, C] -> [B, N, C] with zeros at padding."""
        batch, length, channels = hidden_states.shape
        if tokens.mask is None:
            rows = RealTokens(None, tokens.place, tokens.length.expand(batch), None, [length] * batch)
            packed = hidden_states.reshape(1, batch * length, channels)  # the embeddings' own output: free to overwrite
            return self.encoder.packed(packed, rows, overwrite, **kwargs).view(batch, length, channels)
        counts: list[int] = tokens.length.tolist()
        filled = [count for count in counts if count]
        lengths = tokens.length[tokens.length > 0]
        rows = RealTokens(None, tokens.place[tokens.mask][None], lengths, None, filled)
        packed = self.encoder.packed(hidden_states[tokens.mask][None], rows, overwrite, **kwargs)[0]
        unpacked = packed.new_zeros(batch, length, channels)
        return unpacked.masked_scatter(tokens.mask[..., None], packed)


@auto_docstring
class LinformerForMaskedLM(LinformerPreTrainedModel):
    _tied_weights_keys = {"cls.predictions.decoder.weight": "linformer.embeddings.word_embeddings.weight"}
    _keys_to_ignore_on_load_unexpected = [r"^linformer\.pooler\."]

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.cls = LinformerOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | MaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            The tokens behind the masks, in `[0, vocab_size)`; -100 elsewhere. Those at padding are ignored.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Labels in the whole optimizer step: what the summed loss is divided by (Trainer passes it).
        """
        check_range("labels", labels, self.config.vocab_size, "the vocabulary", ignore_index=-100)
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None:
            check_shape("labels", labels, tuple(hidden_states.shape[:2]))
            labels = ignore_padding(labels, attention_mask)
        if labels is not None and self.training and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]  # [n, C], [n]
        logits = self.cls(hidden_states)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.flatten(0, -2), labels.flatten(), num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def classifier_dropout(config: LinformerConfig) -> LinformerDropout:
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return LinformerDropout(rate)


@auto_docstring
class LinformerForSequenceClassification(LinformerPreTrainedModel):
    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.linformer = LinformerModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | SequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Classes in `[0, num_labels)`; floats for regression (`num_labels` = 1, or `problem_type="regression"`);
            floats of shape `(batch_size, num_labels)` for multi-label classification.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Labels in the whole optimizer step: what the summed loss is divided by (Trainer passes it).
        """
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))  # [B, num_labels]
        loss = self._loss(logits, labels, num_items_in_batch) if labels is not None else None
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        problem = self.config.problem_type
        if problem is None and self.num_labels == 1:
            problem = "regression"
        elif problem is None:
            integer = labels.dtype in (torch.long, torch.int)
            problem = "single_label_classification" if integer else "multi_label_classification"
        labels, rows = labels.to(logits.device), logits.shape[0]
        if problem == "single_label_classification":
            check_shape("labels (ids of classes, one for each text)", labels, (rows,), (rows, 1))
            check_range("labels", labels, self.num_labels, f"num_labels={self.num_labels}", ignore_index=-100)
            return cross_entropy(logits, labels.flatten(), num_items_in_batch)
        compare: Callable
        if problem == "regression":
            compare = nn.functional.mse_loss
        elif problem == "multi_label_classification":
            compare = nn.functional.binary_cross_entropy_with_logits
        else:
            raise ValueError(
                "problem_type must be 'regression', 'single_label_classification', 'multi_label_classification' or "
                f"None, got {problem!r}."
            )
        if labels.shape != logits.shape and (self.num_labels != 1 or labels.shape != (rows,)):
            raise ValueError(
                f"labels of shape {list(labels.shape)} do not fit problem_type={problem!r} with num_labels="
                f"{self.num_labels}: give one number per row and label, {list(logits.shape)}, or set problem_type."
            )
        logits = logits.to(exact(logits.dtype))
        total = compare(logits, labels.view_as(logits).to(logits.dtype), reduction="sum")
        return mean_loss(total, labels.numel(), num_items_in_batch)


@auto_docstring
class LinformerForTokenClassification(LinformerPreTrainedModel):
    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | TokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            The class of every token in `[0, num_labels)`; -100 is ignored, and so are labels at padding.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Labels in the whole optimizer step: what the summed loss is divided by (Trainer passes it).
        """
        check_range("labels", labels, self.num_labels, f"num_labels={self.num_labels}", ignore_index=-100)
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))  # [B, N, num_labels]
        loss = None
        if labels is not None:
            check_shape("labels", labels, tuple(logits.shape[:2]))
            labels = ignore_padding(labels, attention_mask)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring
class LinformerForQuestionAnswering(LinformerPreTrainedModel):
    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.linformer = LinformerModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | QuestionAnsweringModelOutput:
        r"""
        start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the answer's first and last token. A position at padding or beyond the end of the input (an answer
            that was truncated away) is ignored. The logits of padding are the lowest number.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Answers in the whole optimizer step: what the summed loss is divided by.
        """
        outputs = self.linformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.qa_outputs(outputs.last_hidden_state)  # [B, N, 2]
        if attention_mask is not None:
            logits = shut(logits, attention_mask[..., None] == 0)
        start_logits, end_logits = logits.unbind(-1)  # [B, N] each
        loss = None
        if start_positions is not None and end_positions is not None:
            refuse_flat("start_positions", start_logits, attention_mask, position_ids, kwargs)
            (rows, length), losses = start_logits.shape, []
            for name, scores, positions in (
                ("start_positions", start_logits, start_positions),
                ("end_positions", end_logits, end_positions),
            ):
                check_shape(name, positions, (rows,), (rows, 1))
                check_range(name, positions.clamp(max=length - 1), length, "the input")
                positions = positions.flatten().to(scores.device).clamp(max=length)
                if attention_mask is not None:
                    there = attention_mask.gather(1, positions.clamp(max=length - 1)[:, None])[:, 0]
                    positions = positions.masked_fill(there == 0, length)
                losses.append(cross_entropy(scores, positions, num_items_in_batch, ignore_index=length))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring
class LinformerForMultipleChoice(LinformerPreTrainedModel):
    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.linformer = LinformerModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor] | MultipleChoiceModelOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`):
            Token ids of every choice; `attention_mask`, `token_type_ids` and `position_ids` have the same shape. A
            choice without a real token is padding: its logit is the lowest number.
        token_type_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            0 on the first and 1 on the second sentence of a pair; one row of them stands for all.
        position_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Positions; by default they count the real tokens. One row of them stands for all.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_choices, sequence_length, hidden_size)`, *optional*):
            Embedded input instead of `input_ids`.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            The right choice, in `[0, num_choices)`; -100 and choices that are padding are ignored.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Labels in the whole optimizer step: what the summed loss is divided by (Trainer passes it).
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if given.dim() != (3 if given.dtype in ID_TYPES else 4):
            raise ValueError(
                "The input must be [batch, choices, length], or [batch, choices, length, hidden_size] as embeddings, "
                f"got {list(given.shape)}."
            )
        rows, choices = given.shape[:2]
        check_shape("labels", labels, (rows,), (rows, 1))
        check_range("labels", labels, choices, f"num_choices={choices}", ignore_index=-100)
        flat = [
            tensor if tensor is None or tensor.dim() < 2 else tensor.flatten(0, 1)  # [B choices, N, ...]
            for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        refuse_flat("A choice", given.flatten(0, 1), flat[1], flat[3], kwargs)
        outputs = self.linformer(*flat, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(rows, choices)
        labels = None if labels is None else labels.flatten().to(logits.device)
        if attention_mask is not None:
            empty = ~(attention_mask != 0).any(-1)  # [B, choices]
            logits = shut(logits, empty)
            if labels is not None:
                labels = labels.masked_fill(empty.gather(1, labels.clamp(min=0).long()[:, None])[:, 0], -100)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# What `as_made` knows: every kind of module of an encoder, with the `forward` that it has when this file is imported.
ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
MADE_HERE = {
    kind: kind.forward
    for kind in (
        *(nn.Embedding, nn.LayerNorm, nn.Linear, nn.ModuleList, *ACTIVATIONS),
        *(nn.ModuleDict, nn.ParameterDict, nn.Dropout, nn.Identity),  # the inside of adapters
        *(LinformerEmbeddings, LinformerDropout, LinformerEncoder, LinformerLayer, LinformerProjection),
        *(LinformerAttention, LinformerSelfAttention, LinformerSelfOutput, LinformerCorrection),
        *(LinformerIntermediate, LinformerOutput),
    )
}
PLAIN_TENSORS = (nn.Parameter, torch.Tensor)
# Hooks on all modules of the process: "register_module_forward_hook" and its kin.
EVERYWHERE = ("forward", "forward_pre", "backward", "backward_pre")


__all__ = [
    "LinformerForMaskedLM",
    "LinformerForMultipleChoice",
    "LinformerForQuestionAnswering",
    "LinformerForSequenceClassification",
    "LinformerForTokenClassification",
    "LinformerModel",
    "LinformerPreTrainedModel",
]
