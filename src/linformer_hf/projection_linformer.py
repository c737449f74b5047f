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
"""E and F: every way of shortening N keys and values to K slots.

    K' = E (m * X) W_K + b_K        V' = F (m * X) W_V + b_V        (the paper's equation 7, with a mask)

What differs from other implementations of the paper:

- The mask m acts before the projection, so padding never reaches a slot. A learned E is indexed by a token's place
  among the real tokens, and windows follow each row's real length, so the side of the padding does not matter either.
- Biases come after compression: b_K is invisible to the softmax and b_V is added once, as in BERT.
- E (X W) = (E X) W, and the cheaper side is computed: where the heads share E, K rows are projected instead of N.

`gated_pool` is no projection of the paper. Its windows are those of `mean_pool`, but within a window W each head weighs
the tokens by their content, and the slot's logit gets the entropy of these weights:

    g_t = G x_t        p = softmax(g over W)        k' = sum_t p_t k_t        v' = sum_t p_t v_t
    bias = - sum_t p_t log p_t = logsumexp(g) - sum_t p_t g_t      (- log(l / L0), see `dilution`)

For any p, q k' + bias is a lower bound of logsumexp_t(q k_t), what the window's tokens weigh together under full
attention, and both it and v' are exact where p is the softmax of q k_t. So G = (W_K^T q)/sqrt(D) with the head's mean
query q keeps what the average query attends to (`calibrate.py` sets it so); G = 0 is `mean_pool` with
`log_count_bias`. p depends on the content, so this K' is no fixed linear map of X, and the theorems do not cover it.

`dense_conv` maps each offset of a window by a matrix of its own, so that neighbours stay apart in different channels,
where every other type blurs them (`conv` has one weight for a channel, the rest one for a token):

    K'_s = W_K (sum_j A_j x_(s w + j)) + b_K        V' likewise

With `local_window` the projection makes K - 3 w slots; the other keys are single tokens (`LinformerSelfAttention`).

Letters: B batch, N length, K slots, H heads, D head size, C = H D hidden size, S distinct matrices (2: E and F; 1:
E = F), w window.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.import_utils import is_tracing

from .configuration_linformer import CONVOLUTIONS, POOLED_TYPES, LinformerConfig
from .tokens_linformer import RealTokens, at_least, exact, holds, in_general_form, readable, shut


GATES = 2.0  # standard deviation of the gates that start as `normal`: most windows then are one or two of their tokens


def adaptive_slots(tokens: RealTokens, slots: int, boundary: bool) -> torch.Tensor:
    """The slot of every token, [B, N] int, in windows that follow each row's real length.

    Token p of a row with l real tokens falls in slot p if l <= K (attention is then exact), else in floor(p K / l).
    With `boundary`, the first and the last real token of a longer row have slots 0 and K - 1 to themselves.
    """
    place, length = tokens.place, tokens.length[:, None]
    if boundary:
        inner = 1 + (place - 1) * (slots - 2) // (length - 2).clamp(min=1)
        inner = torch.where(place == 0, 0, inner)
        pooled = torch.where(place == length - 1, slots - 1, inner)
    else:
        pooled = place * slots // length.clamp(min=1)
    return torch.where(length <= slots, place, pooled)


def slot_edges(length: torch.Tensor, slots: int, boundary: bool, window: int | None = None) -> torch.Tensor:
    """[B, K + 1] int: slot s of a row holds the real tokens edges[s] to edges[s + 1] - 1, as in `adaptive_slots`.

    With `window`, as in the convolutions: that many tokens, whatever the row's length.
    """
    edge, length = torch.arange(slots + 1, device=length.device)[None], length[:, None]
    if window is not None:
        return torch.minimum(edge * window, length)
    if boundary:
        inner = slots - 2
        pooled = 1 + ((edge - 1) * (length - 2) + inner - 1) // inner  # 1 + ceil((s - 1) (l - 2) / (K - 2))
        pooled = torch.where(edge == 0, 0, torch.where(edge == slots, length, pooled))
    else:
        pooled = (edge * length + slots - 1) // slots  # ceil(s l / K)
    return torch.where(length <= slots, torch.minimum(edge, length), pooled)


class LinformerProjection(nn.Module):
    """Shortens the keys and values of one layer (or, shared layerwise, of all layers) from N to K slots.

    `weight` (a parameter, or a buffer of the same name where it is not trained):

    - `linear`, `fixed`: [S, K, N], or [2, H, K, N] where each head has its own (`projection_sharing="none"`).
    - `conv`: [S, w, C] with w = N / K. It weighs the layer's input; with `projection_sharing="none"` it weighs each
      head's own projected keys and values, so no kernel is shared between heads.
    - `dense_conv`: [S, w, C, C] (offset, from, to), on the layer's input; with `projection_sharing="none"`
      [2, H, w, D, D], on each head's own projected keys and values.
    - `gated_pool`: [H, C], the gates' map G.
    - `mean_pool`, `max_pool`: None.
    """

    weight: torch.Tensor

    def __init__(self, config: LinformerConfig, layer_idx: int = 0):
        super().__init__()
        self.projection_type = config.projection_type
        self.init = config.projection_init
        self.keys = config.projected_lengths[layer_idx]  # K
        self.slots = self.keys - 3 * config.local_window
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.per_head = config.projection_sharing == "none"
        self.banded = config.local_window > 0
        self.boundary = config.boundary_slots
        self.log_count = config.log_count_bias
        self.trained_length = config.original_max_position_embeddings  # L0
        if self.projection_type in ("mean_pool", "max_pool"):
            self.register_parameter("weight", None)
            return
        matrices = 1 if config.projection_sharing in ("key_value", "layerwise") else 2
        n = config.max_position_embeddings
        if self.projection_type == "conv":
            shape: tuple[int, ...] = (matrices, n // self.slots, config.hidden_size)
        elif self.projection_type == "dense_conv":
            heads, size = ((self.num_heads,), self.head_dim) if self.per_head else ((), config.hidden_size)
            shape = (matrices, *heads, n // self.slots, size, size)
        elif self.projection_type == "gated_pool":
            shape = (self.num_heads, config.hidden_size)
        else:
            shape = (matrices, *([self.num_heads] if self.per_head else []), self.slots, n)
        if self.projection_type == "fixed" or config.freeze_projection:
            self.register_buffer("weight", torch.empty(shape))
        else:
            self.weight = nn.Parameter(torch.empty(shape))

    def initialize(self) -> None:
        """Start `weight` as `projection_init` says, by transformers' initialisers: they skip loaded tensors."""
        if self.weight is None:
            return
        if self.projection_type == "gated_pool":
            if self.init == "normal":  # a layer's input is normalised: its C squares sum to C
                init.normal_(self.weight, std=GATES / math.sqrt(self.weight.shape[-1]))
            else:
                init.zeros_(self.weight)  # the mean over each window
            return
        # E is [K, N]. A convolution's fan is its kernel: w taps, for all channels in `dense_conv`.
        fan_out, fan_in = self.weight.shape[-2:]
        if self.projection_type in CONVOLUTIONS:
            fan_in = fan_out = self.window * (fan_in if self.projection_type == "dense_conv" else 1)
        if self.init == "normal":
            init.normal_(self.weight, std=1 / math.sqrt(fan_out))
        elif self.init == "xavier":
            bound = math.sqrt(6 / (fan_in + fan_out)) / math.sqrt(2)
            init.uniform_(self.weight, -bound, bound)
        else:
            init.copy_(self.weight, self.windowed_start().to(self.weight.dtype).expand_as(self.weight))

    def windowed_start(self) -> torch.Tensor:
        """What broadcasts to `weight`: the mean of each window (`mean_pool`), or one token of it (`offsets`).

        Head h then begins with token h mod w of every window; in kernels that weigh the layer's input, the h-th
        D channels do.
        """
        device, size = self.weight.device, self.head_dim
        head = torch.arange(self.num_heads, device=device)
        if self.projection_type not in CONVOLUTIONS:
            rows, columns = self.weight.shape[-2:]
            slot = torch.arange(columns, device=device) * rows // columns
            inside = slot == torch.arange(rows, device=device)[:, None]  # [K, N]
            width = inside.sum(-1, keepdim=True)
            if self.init == "mean_pool":
                return inside / width
            return inside & (inside.cumsum(-1) - 1 == head[:, None, None] % width)  # [H, K, N]
        tap = torch.arange(self.window, device=device)
        taps = (tap == head[:, None] % len(tap)).to(self.weight.dtype)  # [H, w]
        if self.init == "mean_pool":
            taps = torch.full_like(taps, 1 / len(tap))
        if self.projection_type == "dense_conv" and self.per_head:
            return taps[:, :, None, None] * torch.eye(size, device=device)  # [H, w, D, D]
        channels = taps.T.repeat_interleave(size, 1)  # [w, C]
        return channels if self.projection_type == "conv" else torch.diag_embed(channels)

    @property
    def window(self) -> int:
        """w, the taps of a convolution's kernel. Of the weight, which `resize_position_embeddings` replaces."""
        return self.weight.shape[2 if self.projection_type == "dense_conv" and self.per_head else 1]

    def resized(self, n: int) -> torch.Tensor | None:
        """`weight` for inputs of `n` tokens, interpolated along the sequence; every row of E keeps its sum."""
        if self.weight is None:
            return None
        if self.projection_type == "gated_pool":
            return self.weight.detach().clone()
        weight = self.weight.detach().to(exact(self.weight.dtype))
        if self.projection_type in CONVOLUTIONS:
            taps, new_taps, along = self.window, n // self.slots, 2 if self.weight.dim() == 5 else 1
            last = weight.movedim(along, -1)  # [.., w]
            stretched = nn.functional.interpolate(last.reshape(1, -1, taps), size=new_taps, mode="linear")
            stretched = stretched.view(*last.shape[:-1], new_taps).movedim(-1, along)
            return (stretched * (taps / new_taps)).to(self.weight.dtype)
        flat = weight.flatten(0, -2)[:, None]  # [S H K, 1, N]
        stretched = nn.functional.interpolate(flat, size=n, mode="linear")
        scale = flat.sum(-1, keepdim=True) / stretched.sum(-1, keepdim=True)
        # A row that sums to almost nothing has no sum to keep: use the ratio of lengths there, as for a constant row.
        ratio = weight.shape[-1] / n
        scale = torch.where((scale / ratio - 1).abs() < 0.5, scale, ratio)
        return (stretched * scale).view(*weight.shape[:-1], n).to(self.weight.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: Callable[[torch.Tensor], torch.Tensor],
        value: Callable[[torch.Tensor], torch.Tensor],
        tokens: RealTokens,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Project and shorten.

        Args:
            hidden_states: the layer's input X, [B, N, C].
            key, value: the layer's maps W_K, b_K and W_V, b_V, [.., C] -> [.., C]. Functions, not modules: hooks that
                bring weights from elsewhere (accelerate) move every argument that can be moved.
            tokens: where the real tokens stand.

        Returns:
            K' and V', each [B, H, K, D], and a bias on the slots' logits, [B or 1, 1 or H, 1, K], or None if all are
            0. Windows over an input of N <= K tokens fill N slots only, and only these are returned.
        """
        if (self.banded or self.projection_type in POOLED_TYPES) and holds(hidden_states.shape[1] <= self.keys):
            # One token per slot: full attention over the real tokens. A graph for many lengths, and an exported one,
            # keeps the general form, which holds for every length.
            short = tokens.to_front(hidden_states)  # [B, N, C]
            keys, values = self.split_heads(key(short)), self.split_heads(value(short))
            if self.weight is not None and self.weight.requires_grad:
                # An unused weight takes part with nothing: several processes need a gradient of every parameter.
                keys = keys + self.weight[:0].sum()
            return keys, values, self.short_bias(tokens, short.dtype)
        if self.projection_type in ("linear", "fixed"):
            slot, slot_bias = None, self.unreached_bias(tokens, hidden_states.dtype)
        elif self.projection_type in CONVOLUTIONS:
            slot = tokens.place // self.window
            slot_bias = self.slot_bias(slot, tokens, hidden_states.dtype)
        elif self.projection_type == "gated_pool":
            front = tokens.to_front(hidden_states)  # [B, N, C]
            return self.gated_pool(front, key(front), value(front), tokens)
        else:
            slot = adaptive_slots(tokens, self.slots, self.boundary)
            slot_bias = self.slot_bias(slot, tokens, hidden_states.dtype)

        if self.per_head:
            keys, values = (
                self.compress_heads(states_of, hidden_states, tokens, slot, self.weight[i])
                for i, states_of in enumerate((key, value))
            )
        else:
            compressed = self.compress(hidden_states, tokens, slot)  # [B, S, K, C]
            keys, values = self.split_heads(key(compressed[:, 0])), self.split_heads(value(compressed[:, -1]))
        if slot_bias is None and self.banded:
            slot_bias = keys.new_zeros(1, 1, 1, self.slots)
        return keys, values, slot_bias

    def compress(self, hidden_states: torch.Tensor, tokens: RealTokens, slot: torch.Tensor | None) -> torch.Tensor:
        """E X and F X where the heads share them: [B, N, C] -> [B, S, K, C]."""
        batch, length, channels = hidden_states.shape
        if slot is None:
            stacked = self.columns(self.weight, length).flatten(0, 1)  # [S K, N]: E and F in one product
            compressed = torch.matmul(stacked, tokens.to_front(hidden_states))  # [B, S K, C]
            return compressed.view(batch, self.weight.shape[0], self.slots, channels)
        if self.projection_type in CONVOLUTIONS:
            return self.convolve(tokens.to_front(hidden_states)[:, None], self.weight)
        if self.projection_type == "max_pool":
            return self.max_pool(hidden_states, tokens, slot)[:, None]
        even = tokens.mask is None and not self.boundary and self.projection_type == "mean_pool"
        if even and holds(length % self.slots == 0):
            return hidden_states.unflatten(1, (self.slots, -1)).mean(2)[:, None]  # the same, without the matmul
        windows = self.windows(slot, tokens, hidden_states.dtype)[:, None]  # [B or 1, 1, K, N]
        selected = tokens.select(hidden_states)[:, None]  # [B, 1, N, C]
        count = windows.sum(-1, keepdim=True).clamp(min=1)
        return torch.matmul((windows / count).to(selected.dtype), selected)

    def convolve(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Real tokens in front, [B, 1 or G, N, c], by kernels [G, w, c] or [G, w, c, c] -> [B, G, K, c]."""
        window, length = weight.shape[1], states.shape[2]
        filled = self.slots if is_tracing(states) else -(-length // window)
        states = nn.functional.pad(states, (0, 0, 0, filled * window - length))
        states = states.unflatten(2, (filled, window))  # [B, 1 or G, k, w, c]
        if weight.dim() == 3:
            kernel = (states * weight[:, None]).sum(3)
        else:
            kernel = torch.matmul(states.flatten(3), weight.flatten(1, 2))
        return nn.functional.pad(kernel, (0, 0, 0, self.slots - filled))

    def gated_pool(
        self, front: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: RealTokens
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pool keys and values by content (the formulae are at the top of this file).

        Args:
            front: the layer's input, real tokens first, [B, N, C].
            keys, values: its projections, [B, N, C]; p sums to 1, so their biases pass through unchanged.

        Returns:
            K' and V' [B, H, K, D] and the slots' bias [B, H, 1, K].
        """
        edges = slot_edges(tokens.length, self.slots, self.boundary)
        outer = 2 if self.boundary else 0
        inner, slots = front.shape[1] - outer, self.slots - outer
        # No window is wider than the longest row's, nor than 1 where N <= K. A graph gets at least 2: 1 is special.
        width = at_least((inner + slots - 1) // slots, 2) if is_tracing(front) else max(-(-inner // slots), 1)
        index = edges[:, :-1, None] + torch.arange(width, device=front.device)  # [B or 1, K, w]
        inside = index < edges[:, 1:, None]
        index = index.clamp(max=front.shape[1] - 1)
        gates = self.gather(nn.functional.linear(front, self.weight), index)  # [B, K, w, H]
        gates = gates.to(torch.promote_types(front.dtype, torch.float32))
        masked = shut(gates, ~inside[..., None])
        p = masked.softmax(2)  # an empty slot's is uniform; the slot is masked below
        # Not p * masked: its gradient multiplies the lowest number, overflows, and 0 * inf is NaN.
        entropy = torch.logsumexp(masked, 2) - (p * gates).sum(2)  # [B, K, H]
        empty = (edges[:, 1:] <= edges[:, :-1]) & (tokens.length > 0)[:, None]  # [B or 1, K]
        entropy = torch.where((tokens.length > 0)[:, None, None], entropy, 0.0)
        if self.trained_length is not None:
            entropy = entropy - self.dilution(tokens, entropy.dtype, self.trained_length)[..., None]
        bias = shut(entropy.to(front.dtype), empty[..., None])
        p, heads = p.to(front.dtype)[..., None], (self.num_heads, self.head_dim)
        pooled = [(self.gather(states, index).unflatten(-1, heads) * p).sum(2) for states in (keys, values)]
        return pooled[0].transpose(1, 2), pooled[1].transpose(1, 2), bias.transpose(1, 2)[:, :, None]

    @staticmethod
    def gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """states [B, N, c] at index [B or 1, K, w] -> [B, K, w, c]."""
        if index.shape[0] == 1:  # whose gradient is faster than that of an index with several dimensions
            return states.index_select(1, index.flatten()).unflatten(1, index.shape[1:])
        rows = torch.arange(states.shape[0], device=states.device)  # not len(): it would fix the size of the batch
        return states[rows[:, None, None], index]

    def compress_heads(
        self,
        states_of: Callable[[torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        tokens: RealTokens,
        slot: torch.Tensor | None,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """E_h (X W_h) + b_h where every head has its own E: projecting first costs less. [B, N, C] -> [B, H, K, D]."""
        # What the map gives for zeros is its bias. It is not read from the module: a quantized one keeps it elsewhere,
        # an offloaded one has none outside its forward pass. For each row, as adapters may differ by row; [B, 1, C].
        bias = states_of(hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[-1]))
        projected = states_of(hidden_states) - bias  # the bias belongs after compression; [B, N, C]
        heads = self.split_heads(tokens.to_front(projected))  # [B, H, N, D]
        if slot is None:
            compressed = torch.matmul(self.columns(weight, heads.shape[2]), heads)  # [H, K, N] x [B, H, N, D]
        else:
            by_head = weight.unflatten(-1, heads.shape[1::2]).movedim(1, 0) if weight.dim() == 2 else weight
            compressed = self.convolve(heads, by_head)
        return compressed + self.split_heads(bias)  # [B, H, 1, D]

    @staticmethod
    def columns(weight: torch.Tensor, length: int) -> torch.Tensor:
        """The first `length` columns of E: what a shorter input uses, as in the official code."""
        if in_general_form():  # a slice would be specialised to length < N: its strides tell them apart
            return weight.index_select(-1, torch.arange(length, device=weight.device))
        return weight[..., :length]

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[B, n, C] -> [B, H, n, D]."""
        return states.view(*states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def windows(self, slot: torch.Tensor, tokens: RealTokens, dtype: torch.dtype) -> torch.Tensor:
        """[B or 1, K, N] in float32, or float64 as `dtype`: 1 where a real token falls in a slot."""
        inside = slot[:, None] == torch.arange(self.slots, device=slot.device)[:, None]
        if tokens.mask is not None:
            inside = inside & tokens.mask[:, None]
        return inside.to(exact(dtype))

    def max_pool(self, hidden_states: torch.Tensor, tokens: RealTokens, slot: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, K, C], 0 in empty slots. Padding goes to a slot K that is dropped."""
        batch, _, channels = hidden_states.shape
        if tokens.mask is not None:
            slot = torch.where(tokens.mask, slot, self.slots)
        index = slot[..., None].expand(batch, -1, channels)
        pooled = hidden_states.new_zeros(batch, self.slots + 1, channels)
        return pooled.scatter_reduce(1, index, hidden_states, "amax", include_self=False)[:, : self.slots]

    def slot_bias(self, slot: torch.Tensor, tokens: RealTokens, dtype: torch.dtype) -> torch.Tensor | None:
        """[B or 1, 1, 1, K]: the lowest finite number on empty slots, else log(count) or 0.

        A row without a real token has only empty slots, all of them zero vectors; it gets no bias, so its softmax is
        uniform and its output finite.
        """
        if tokens.mask is None and not self.log_count:
            length = slot.shape[-1]  # rows of `length` real tokens: does the last of them fall in the last slot?
            last = (length - 1) // self.window if self.projection_type in CONVOLUTIONS else length - 1
            if holds(last >= self.slots - 1):
                return None
        count = self.windows(slot, tokens, dtype).sum(-1)  # [B or 1, K]
        bias = count.clamp(min=1).log() if self.log_count else torch.zeros_like(count)
        if self.trained_length is not None:
            bias = bias - self.dilution(tokens, count.dtype, self.trained_length)
        empty = (count == 0) & (tokens.length > 0)[:, None]
        return shut(bias.to(dtype), empty)[:, None, None]

    def dilution(self, tokens: RealTokens, dtype: torch.dtype, trained_length: int) -> torch.Tensor:
        """[B or 1, K]: log(l / L0) on the slots that hold the more tokens the longer a row is, at least 0.

        A softmax over l tokens was trained up to l = L0. The slots weigh what all their tokens would, so beyond it far
        text would drown what is near, which has no more tokens than before.
        """
        share = (tokens.length.to(dtype) / trained_length).clamp(min=1).log()[:, None]
        slot = torch.arange(self.slots, device=share.device)
        inner = (slot > 0) & (slot < self.slots - 1) if self.boundary else slot >= 0
        return share * inner

    @staticmethod
    def short_bias(tokens: RealTokens, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, 1, N]: the lowest finite number on the places behind a row's real tokens; None without a mask."""
        if tokens.mask is None:
            return None
        length = tokens.length[:, None]
        empty = (torch.arange(tokens.mask.shape[-1], device=length.device) >= length) & (length > 0)  # [B, N]
        return shut(torch.zeros_like(empty, dtype=dtype), empty)[:, None, None]

    def unreached_bias(self, tokens: RealTokens, dtype: torch.dtype) -> torch.Tensor | None:
        """[B or 1, 1 or H, 1, K]: the lowest finite number on slots whose E and F are 0 at every real token of a row.

        Only a start from windows makes rows of E like that: a short input does not reach the later ones. Where it
        reaches none of a head (`offsets`: no token stands at the head's place), all are zero vectors, and none is shut.
        """
        if self.init not in ("mean_pool", "offsets"):
            return None
        reached = self.weight.ne(0).any(0)  # [K, N], or [H, K, N]
        reached = reached if self.per_head else reached[None]
        columns = torch.arange(reached.shape[-1], device=reached.device)
        first = torch.where(reached, columns, reached.shape[-1]).amin(-1)  # [1 or H, K], first column not 0
        length = tokens.length[:, None, None]
        empty = first >= length  # [B or 1, 1 or H, K]
        empty = empty & ~empty.all(-1, keepdim=True)
        if readable(empty) and not bool(empty.any()):
            return None
        return shut(torch.zeros_like(empty, dtype=dtype), empty)[:, :, None]


__all__ = ["LinformerProjection"]
