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

- Keys and values are shortened from N tokens to K slots (`projection_linformer.py`), which attention is over
  (`attention_linformer.py`).
- Positions count real tokens, and the pooler reads the first real token: padding on either side changes nothing.
  A flat row of several documents is computed as their padded batch (`flat_rows`).
- A loss is a sum over labels divided by `num_items_in_batch` where the caller gives it, in every head. Trainer counts
  on that under gradient accumulation; a head that took the mean would train with gradients too large.
- The forward pass leaves the configuration alone, but for one thing: a classifier in training without a `problem_type`
  notes there what its labels pose, as every classifier of transformers does.
- On a CPU a batch is packed: padding is dropped before the first layer and put back, as zeros, behind the last. Without
  gradients a layer then overwrites its input in blocks of `BLOCK` tokens, since all that follows K' and V' is local to
  a token; gradient checkpointing recomputes the same blocks. No module is called as a whole there, so this way is taken
  only where every module of the encoder is just as it was made here (`as_made`): one that is wrapped, subclassed,
  patched, hooked or quantized gets what BERT's would, and so does whoever asks for hidden states or attention maps.
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
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .attention_linformer import (
    BLOCK,
    LinformerDropout,
    LinformerSelfAttention,
    SharedProjection,
    attention_function,
    eager_attention_forward,
    transformed,
)
from .configuration_linformer import AUTO_MAP, LinformerConfig, capture_outputs, merge_with_config_defaults
from .projection_linformer import LinformerProjection
from .tokens_linformer import (
    ID_TYPES,
    RealTokens,
    check_inputs,
    check_range,
    check_shape,
    cross_entropy,
    exact,
    flat_rows,
    ignore_padding,
    mean_loss,
    padded_beyond_n,
    refuse_flat,
    shut,
)


# A row as a batch of its own costs some calls more: on average it must save so many tokens of padding, or, where blocks
# save memory, be so long.
WORTH_PACKING, WORTH_BLOCKS = 64, 256
LM_BIAS = "cls.predictions.decoder.bias"


def adapter(module: nn.Module) -> bool:
    """Whether it is PEFT's, and packed rows are to it what a batch is: LoRA on a linear layer, a trained projection."""
    kind = type(module)
    name, inside = f"{kind.__module__}.{kind.__qualname__}", getattr(module, "original_module", None)
    known = name == "peft.tuners.lora.layer.Linear"
    known |= name == "peft.utils.other.ModulesToSaveWrapper" and isinstance(inside, LinformerProjection)
    return known and kind.forward.__module__ == kind.__module__


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


@auto_docstring(
    custom_intro="What every Linformer shares: weights, loading and saving, and `resize_position_embeddings`."
)
class LinformerPreTrainedModel(PreTrainedModel):
    config: LinformerConfig
    base_model_prefix = "linformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinformerEmbeddings", "LinformerLayer"]
    # No flex attention: it gains by skipping blocks of an N x N mask. Keys are K slots here, of which only those that a
    # short row leaves empty are masked: nothing to skip, and a kernel to compile.
    _supports_flash_attn = True
    _supports_sdpa = True
    # transformers lets a model change its attention only if its own file has `ALL_ATTENTION_FUNCTIONS.get_interface(`,
    # in 5.0 `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]`: see `attention_function`.
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
            ValueError: the new N is below a layer's K, or, for `conv`, no multiple of it; or an adapter holds
                positions, E or F. The model is unchanged then.
        """
        n = new_num_position_embeddings
        config, base = self.config, self.base_model
        positions = base.embeddings.position_embeddings
        learned = {
            name: module
            for name, module in base.named_modules()
            if isinstance(module, LinformerProjection) and module.weight is not None
        }
        held = [name.removesuffix(".base_layer") for name in learned if name.endswith(".base_layer")]  # PEFT's name
        if held or type(positions) is not nn.Embedding:
            raise ValueError(
                f"an adapter holds {', '.join(held) or 'embeddings.position_embeddings'} and would be lost, or keep "
                "the former N: merge or unload it first (PEFT: merge_and_unload)."
            )
        old = config.max_position_embeddings
        config.max_position_embeddings = n
        try:
            config.validate_architecture()
        except ValueError:
            config.max_position_embeddings = old
            raise
        weight = positions.weight.detach()
        stretched = nn.functional.interpolate(weight.to(exact(weight.dtype)).T[None], size=n, mode="linear")[0].T
        base.embeddings.position_embeddings = nn.Embedding.from_pretrained(
            stretched.to(weight.dtype).contiguous(), freeze=not positions.weight.requires_grad
        )
        for module in learned.values():
            resized: torch.Tensor | None = module.resized(n)
            assert resized is not None
            assert module.weight is not None
            if isinstance(module.weight, nn.Parameter):
                resized = nn.Parameter(resized, requires_grad=module.weight.requires_grad)
            module.weight = resized


@auto_docstring(
    custom_intro="""A Linformer encoder: N queries over K keys and values.

    Attention maps (`output_attentions=True`, with `attn_implementation="eager"`) are `(batch_size, num_heads,
    sequence_length, projected_length)`. Documents in one row are told apart by `cu_seq_lens_q`, `seq_idx` or
    `position_ids`, and do not see each other. An input that is longer than `max_position_embeddings`, a mask or ids
    that do not fit it and an argument of a decoder raise a ValueError.
    """
)
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
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions in `[0, max_position_embeddings)`; by default they count each row's real tokens. One row of them
            stands for all. In one row without a mask, positions that start again begin another document.
        """
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


@auto_docstring(custom_intro="A Linformer encoder with BERT's masked-language-modelling head.")
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
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions in `[0, max_position_embeddings)`, as [`LinformerModel`] takes them.
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


@auto_docstring(
    custom_intro="A Linformer encoder with a linear layer on its pooled output: classes, several labels or numbers."
)
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
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions in `[0, max_position_embeddings)`, as [`LinformerModel`] takes them.
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
        loss = None
        if labels is not None:
            problem = self.config.problem_type or self._problem(labels)
            loss = self._loss(problem, logits, labels, num_items_in_batch)
            if self.training and self.config.problem_type is None:
                # By it a pipeline chooses between softmax, sigmoid and the number itself.
                self.config.problem_type = problem
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _problem(self, labels: torch.Tensor) -> str:
        """What labels pose where the configuration does not say it."""
        if self.num_labels == 1:
            return "regression"
        integer = labels.dtype in (torch.long, torch.int)
        return "single_label_classification" if integer else "multi_label_classification"

    def _loss(self, problem: str, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
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


@auto_docstring(custom_intro="A Linformer encoder with a linear layer on each token's state.")
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
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions in `[0, max_position_embeddings)`, as [`LinformerModel`] takes them.
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


@auto_docstring(
    custom_intro="A Linformer encoder with a linear layer that scores each token as an answer's first and last."
)
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
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions in `[0, max_position_embeddings)`, as [`LinformerModel`] takes them.
        start_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the answer's first token. A position at padding or beyond the end of the input (an answer that was
            truncated away) is ignored. The logits of padding are the lowest number.
        end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Index of the answer's last token, likewise.
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
                positions = positions.long()  # uint8 holds no length of 300
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


@auto_docstring(
    custom_intro="A Linformer encoder with a linear layer that scores each choice, each read with its text."
)
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
