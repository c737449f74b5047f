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
"""LinformerConfig: BERT's fields, and how keys and values are shortened.

What differs from `BertConfig`:

- `max_position_embeddings` is the true N: the longest input, and the number of columns of E and F.
- `projected_length` (the paper's k), `projection_type`, `projection_sharing`, `projection_init` and the options
  of the windowed types. A combination in which an option would do nothing is refused, never ignored.
- There is no decoder: a projection along the sequence mixes later tokens into every slot.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


LEARNED_TYPES = ("linear", "fixed", "conv")  # types that own numbers: something to initialise and to share
POOLED_TYPES = ("mean_pool", "max_pool")  # types whose windows follow the real length of every row

# Written into every config.json, so that `trust_remote_code=True` finds each head, whichever one was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_linformer.LinformerConfig",
    "AutoModel": "modeling_linformer.LinformerModel",
    "AutoModelForMaskedLM": "modeling_linformer.LinformerForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_linformer.LinformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_linformer.LinformerForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_linformer.LinformerForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_linformer.LinformerForMultipleChoice",
}

NO_CAUSAL = (
    "a projection along the sequence mixes later tokens into every slot, so Linformer has no causal, decoder or "
    "cross-attention form; use it as an encoder"
)


@strict
class LinformerConfig(PreTrainedConfig):
    r"""Configuration of a Linformer encoder (Wang et al. 2020, arXiv 2006.04768).

    The defaults are the best row of the paper's Table 2: base size, N = 512, K = 256, linear E = F shared by all
    layers. Fields that are not listed mean what they mean in `BertConfig`.

    Args:
        max_position_embeddings (`int`, defaults to 512):
            N, the longest input in tokens. `model.resize_position_embeddings` changes it later.
        projected_length (`int` or `list[int]`, defaults to 256):
            K, the number of slots that keys and values are shortened to; a list gives one K per layer (the paper's
            non-uniform projected dimension, section 4). 1 <= K <= N.
        projection_type (`str`, defaults to `"linear"`):
            `linear`: learned E and F (equation 7). `fixed`: random E and F that are saved but never trained (the case
            of theorems 1 and 2). `mean_pool`, `max_pool`: windows over the real tokens. `conv`: depthwise convolution,
            kernel = stride = N / K (the last three are the paper's "general projections", section 4).
        projection_sharing (`str`, *optional*):
            `none`: E and F for each head; `headwise`: E and F for each layer; `key_value`: E = F, one for each layer;
            `layerwise`: one E = F for the model. Unset means `layerwise` for the learned types. The pooled types have
            no matrices, so there it must stay unset.
        projection_init (`str`, *optional*):
            Start of E and F: `normal` N(0, 1/K), the Johnson-Lindenstrauss matrix of the theorems; `xavier`, uniform
            with gain 1/sqrt(2), fairseq's; `mean_pool`, windows of N / K tokens whose rows sum to 1. For `conv` the
            fan is the kernel: N(0, K/N), xavier over the kernel, K/N. Unset means `normal` for the learned types.
        freeze_projection (`bool`, defaults to `False`):
            Keep E and F as they are (stored as buffers under the same names).
        log_count_bias (`bool`, defaults to `False`):
            Pooled types: add log(tokens in the slot) to the slot's logits, so that a slot weighs what its tokens
            would together.
        boundary_slots (`bool`, defaults to `False`):
            Pooled types: the first and the last real token get slots of their own (within the K slots).
        classifier_pooling (`str`, defaults to `"cls"`):
            What the pooler reads: the first real token (`cls`) or the mean over the real tokens (`mean`).
        sparse_prediction (`bool`, defaults to `False`):
            Masked LM: while training, compute the logits of labelled tokens only; they then have the shape
            [number of labelled tokens, vocab_size]. The loss is the same, the head about 1 / 0.15 times cheaper.

    Raises:
        ValueError: a combination that cannot work, or in which an option would have no effect; the message names
            the values and the way out. A value of the wrong type raises the strict dataclass's own error.

    Example:

    ```python
    >>> from linformer_hf import LinformerConfig, LinformerModel

    >>> config = LinformerConfig(max_position_embeddings=1024, projected_length=128, projection_sharing="headwise")
    >>> model = LinformerModel(config)
    ```
    """

    model_type = "linformer"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    classifier_dropout: float | int | None = None
    classifier_pooling: Literal["cls", "mean"] = "cls"
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    sparse_prediction: bool = False

    projected_length: int | list[int] = 256
    projection_type: Literal["linear", "fixed", "mean_pool", "max_pool", "conv"] = "linear"
    projection_sharing: Literal["none", "headwise", "key_value", "layerwise"] | None = None
    projection_init: Literal["normal", "xavier", "mean_pool"] | None = None
    freeze_projection: bool = False
    log_count_bias: bool = False
    boundary_slots: bool = False

    def __post_init__(self, **kwargs):
        if self.projection_type in LEARNED_TYPES:
            self.projection_sharing = self.projection_sharing or "layerwise"
            self.projection_init = self.projection_init or "normal"
        kwargs["auto_map"] = kwargs.get("auto_map") or dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here it raises its ValueError; `@strict` would wrap it in a class of its own

    @property
    def projected_lengths(self) -> list[int]:
        """K of every layer: a list of `num_hidden_layers` ints."""
        if isinstance(self.projected_length, int):
            return [self.projected_length] * self.num_hidden_layers
        return list(self.projected_length)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: every combination that cannot work, or would silently do nothing."""
        for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
            if getattr(self, name, False):
                raise ValueError(f"{name}=True is not possible: {NO_CAUSAL}.")
        self._validate_sizes()
        self._validate_projected_length()
        self._validate_projection_options()

    def _validate_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers must be at least 0, got {self.num_hidden_layers}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): every head gets hidden_size / num_attention_heads channels."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {self.hidden_act!r}.")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range}.")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")

    def _validate_projected_length(self):
        lengths, n = self.projected_lengths, self.max_position_embeddings
        if isinstance(self.projected_length, int):
            lengths = lengths or [self.projected_length]  # K is checked for a model without layers too
        elif len(lengths) != self.num_hidden_layers:
            raise ValueError(
                f"projected_length lists {len(lengths)} values for num_hidden_layers={self.num_hidden_layers} layers; "
                "give one int per layer, or a single int for all of them."
            )
        for k in lengths:
            if not 1 <= k <= n:
                raise ValueError(
                    f"projected_length must lie between 1 and max_position_embeddings={n}, got {k}: keys and values "
                    "cannot be projected to more slots than there are tokens. Lower projected_length, or raise "
                    "max_position_embeddings."
                )
            if self.projection_type == "conv" and n % k:
                raise ValueError(
                    f"projection_type='conv' needs windows of equal size: max_position_embeddings={n} is not a "
                    f"multiple of projected_length={k}. Choose a divisor of {n}, or projection_type='mean_pool', "
                    "whose windows adapt."
                )
            if self.boundary_slots and k < 3:
                raise ValueError(
                    f"boundary_slots=True keeps two slots for the first and the last token and needs "
                    f"projected_length >= 3, got {k}."
                )
        if self.projection_sharing == "layerwise" and len(set(lengths)) > 1:
            raise ValueError(
                f"projection_sharing='layerwise' uses one E for all layers, but projected_length={lengths} differs "
                "between layers. Use projection_sharing='key_value' (one E = F per layer), or a single "
                "projected_length."
            )

    def _validate_projection_options(self):
        kind = self.projection_type
        if kind in POOLED_TYPES:
            for name in ("projection_sharing", "projection_init"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} would have no effect: projection_type={kind!r} has no "
                        f"matrices to share or initialise. Leave {name} unset (None), or use "
                        "projection_type='linear'."
                    )
        else:
            for name in ("log_count_bias", "boundary_slots"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}=True would have no effect: it belongs to the windows of projection_type='mean_pool' "
                        f"and 'max_pool', not to {kind!r}. Leave it False, or change projection_type."
                    )
        if self.freeze_projection and kind not in ("linear", "conv"):
            raise ValueError(
                f"freeze_projection=True would have no effect: projection_type={kind!r} has no learned matrices. "
                "Leave it False, or use projection_type='linear' or 'conv'."
            )


__all__ = ["LinformerConfig"]
