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
- Extensions of the paper (`projection_linformer.py` has the formulae): `gated_pool`, `dense_conv`, `local_window`,
  `boundary_slots`, `log_count_bias`, `length_correction`, `original_max_position_embeddings`.
- There is no decoder: a projection along the sequence mixes later tokens into every slot.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers


try:
    from huggingface_hub.dataclasses import strict
    from transformers import PreTrainedConfig
except ImportError as error:
    raise ImportError(
        f"A Linformer needs transformers 5.0 or later, and this is transformers {transformers.__version__}: "
        "pip install 'transformers>=5'."
    ) from error

from transformers.activations import ACT2FN


if not hasattr(torch.nn.Module, "register_load_state_dict_pre_hook"):
    raise ImportError(
        f"A Linformer needs torch 2.6 or later, and this is torch {torch.__version__}: pip install 'torch>=2.6'."
    )
try:
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # transformers 5.0 and 5.1: one decorator does both
    from transformers.utils.generic import check_model_inputs as capture_outputs

    def merge_with_config_defaults(forward: Callable) -> Callable:
        return forward


CONVOLUTIONS = ("conv", "dense_conv")  # kernel = stride = window: windows of one size, for rows of any length
LEARNED_TYPES = ("linear", "fixed", *CONVOLUTIONS)  # types that own numbers: something to initialise and to share
POOLED_TYPES = ("mean_pool", "max_pool", "gated_pool")  # types whose windows follow the real length of every row

# Written into config.json where a model is saved with its code, so that `trust_remote_code=True` finds each head,
# whichever one was saved.
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


def checked(config_class: Any) -> Any:
    """`strict`; in transformers 5.0 to 5.3, where no configuration is a dataclass yet, after making it one."""
    if is_dataclass(PreTrainedConfig):
        return strict(config_class)
    config_class.validate_rope = None  # `strict` would call it, without the arguments that it has there
    return strict(accept_kwargs=True)(dataclass(repr=False, eq=False)(config_class))


@checked
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
            kernel = stride = N / K (the last three are the paper's "general projections", section 4). `dense_conv`, an
            extension: the same with a matrix for each token of the window in place of a weight for each channel, so N /
            K x C^2 weights (x 2 for E and F, x layers). `gated_pool`, an extension: windows in which learned gates
            weigh the tokens by their content, for each head.
        projection_sharing (`str`, *optional*):
            `none`: E and F for each head; `headwise`: E and F for each layer; `key_value`: E = F, one for each layer;
            `layerwise`: one E = F for the model. Unset means `layerwise` for the learned types. The pooled types have
            no matrices, so there it must stay unset.
        projection_init (`str`, *optional*):
            Start of E and F: `normal` N(0, 1/K), the Johnson-Lindenstrauss matrix of the theorems; `xavier`, uniform
            with gain 1/sqrt(2), fairseq's; `mean_pool`, windows of N / K tokens whose rows sum to 1; `offsets`, one
            token of each window, for head h the token h mod (N / K) (not where heads share E and F of tokens, whose
            start would be one token for all; convolutions that weigh the layer's input split its channels like heads).
            For convolutions the fan is the kernel: of `conv` N(0, K/N), xavier over the kernel, K/N. Unset means
            `normal` for the learned types. Of `gated_pool` the start of the gates: `mean_pool` (unset), gates of 0, or
            `normal`, N(0, 4/C), so that each head picks nearly single tokens by their content, which pretraining wants.
            It stays with the weights: `linear` that began as `mean_pool` or `offsets` shuts slots which a short input
            does not reach.
        freeze_projection (`bool`, defaults to `False`):
            Keep E and F (or the gates) as they are (stored as buffers under the same names).
        log_count_bias (`bool`, defaults to `False`):
            `mean_pool`, `max_pool`: add log(tokens in the slot) to the slot's logits, so that a slot weighs what its
            tokens would together (`gated_pool` always does; there the count is the gates' effective one).
        boundary_slots (`bool`, defaults to `False`):
            Pooled types: the first and the last real token get slots of their own (within the K slots).
        local_window (`int`, defaults to 0):
            An extension: with w > 0, 3 w of a query's K keys are single tokens: those of its own block of w tokens and
            of the two blocks beside it. The other K - 3 w keys are slots; a window that lies wholly among the single
            tokens is masked. Rows of at most K tokens have all of them as keys.
        original_max_position_embeddings (`int`, *optional*):
            An extension, for windows whose slots weigh what their tokens would (`gated_pool`, or `log_count_bias`): L0,
            the longest input that the weights were trained on. In a row of l > L0 tokens log(l / L0) is taken off the
            logits of the slots (not of the first and last token's own): they stand for l / L0 times as many tokens as
            they did in training, and would drown the single ones. `convert` sets it where it lengthens a source.
        length_correction (`bool`, defaults to `False`):
            An extension: the attention's output gets a second linear map of its context, times max(0, 1 - K / l) in a
            row of l real tokens. It makes up for what shortening changes on average (`calibrate.py` solves for it) and
            leaves rows of at most K tokens alone.
        type_vocab_size (`int`, defaults to 2):
            Token types; 0: there are none, and `token_type_ids` are ignored (DistilBERT).
        pooler_act (`str`, defaults to `"tanh"`):
            Activation of the pooler: BERT's and RoBERTa's `tanh`, DistilBERT's `relu`, ELECTRA's `gelu`.
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
    # Two thirds of a layer's weights. Attention stays whole on every process: gates, and E and F per head, would have
    # to be cut by heads too. No pipeline plan: a layer takes the places of real tokens, and may share E and F with
    # layers of other stages.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    }

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
    pooler_act: str = "tanh"
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    sparse_prediction: bool = False

    projected_length: int | list[int] = 256
    projection_type: Literal["linear", "fixed", "mean_pool", "max_pool", "conv", "dense_conv", "gated_pool"] = "linear"
    projection_sharing: Literal["none", "headwise", "key_value", "layerwise"] | None = None
    projection_init: Literal["normal", "xavier", "mean_pool", "offsets"] | None = None
    freeze_projection: bool = False
    log_count_bias: bool = False
    boundary_slots: bool = False
    local_window: int = 0
    original_max_position_embeddings: int | None = None
    length_correction: bool = False

    def __post_init__(self, **kwargs):
        if self.projection_type in LEARNED_TYPES:
            self.projection_sharing = self.projection_sharing or "layerwise"
            self.projection_init = self.projection_init or "normal"
        (super().__post_init__ if is_dataclass(PreTrainedConfig) else super().__init__)(**kwargs)
        self.validate_architecture()  # here it raises its ValueError; `@strict` would wrap it in a class of its own

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # what is registered is this class, and its code is saved

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """PreTrainedConfig's. Of an `auto_map` that came with the configuration, what lies in the folder is kept."""
        self.auto_map = {
            name: target
            for name, target in getattr(self, "auto_map", {}).items()
            if (Path(save_directory) / f"{str(target).partition('.')[0]}.py").exists()
        }
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self):
        """Without `auto_map`, which belongs to the folder with the code: another model may hold this configuration."""
        content = super().to_dict()
        content.pop("auto_map", None)
        return content

    def to_diff_dict(self):
        """What config.json holds."""
        auto_map = getattr(self, "auto_map", None)
        return super().to_diff_dict() | ({"auto_map": dict(auto_map)} if auto_map else {})

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
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("num_hidden_layers", "type_vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): every head gets hidden_size / num_attention_heads channels."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must lie between 0 and vocab_size - 1 = {self.vocab_size - 1}, or be None (no vector of "
                f"padding), got {self.pad_token_id}: the row of that id is kept at zero."
            )
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"{name} must be one of {', '.join(sorted(ACT2FN))}, got {getattr(self, name)!r}.")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range}.")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")

    def _validate_projected_length(self):
        n = self.max_position_embeddings
        if self.local_window < 0:
            raise ValueError(f"local_window must be at least 0 (0: no band of single tokens), got {self.local_window}.")
        # One K stands for all layers, none included. A list of it would hold as many as a file from elsewhere says.
        lengths = [self.projected_length] if isinstance(self.projected_length, int) else list(self.projected_length)
        if not isinstance(self.projected_length, int) and len(lengths) != self.num_hidden_layers:
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
            least = 3 * self.local_window + (3 if self.boundary_slots else 1)
            if k < least:
                raise ValueError(
                    f"projected_length must be at least {least} with local_window={self.local_window} (3 keys for each "
                    f"of its tokens) and boundary_slots={self.boundary_slots} (2 slots for the first and the last "
                    f"token), and one slot for the rest; got {k}. Raise projected_length, or lower local_window."
                )
            if self.projection_type in CONVOLUTIONS:
                self._validate_windows(k, n)
        if self.projection_sharing == "layerwise" and len(set(lengths)) > 1:
            raise ValueError(
                f"projection_sharing='layerwise' uses one E for all layers, but projected_length={lengths} differs "
                "between layers. Use projection_sharing='key_value' (one E = F per layer), or a single "
                "projected_length."
            )

    def _validate_windows(self, k: int, n: int):
        band = 3 * self.local_window
        if n % (k - band):
            fitting = ", ".join(str(d + band) for d in range(1, min(n - band, 4096) + 1) if n % d == 0)
            minus, more = (f" - {band} for local_window", f", and {band} for the band") if band else ("", "")
            raise ValueError(
                f"projection_type={self.projection_type!r} needs windows of equal size: max_position_embeddings={n} is "
                f"not a multiple of projected_length={k}{minus}. Choose {fitting} (a divisor of {n}{more}), or "
                "projection_type='mean_pool', whose windows adapt."
            )

    def _validate_projection_options(self):
        kind = self.projection_type
        pooled = kind in POOLED_TYPES
        refused = {
            "projection_sharing": (pooled, "has no matrices to share", "unset (None)"),
            "projection_init": (kind in ("mean_pool", "max_pool"), "has no matrices to initialise", "unset (None)"),
            "boundary_slots": (not pooled, f"has no windows; {', '.join(POOLED_TYPES)} have", "False"),
            "log_count_bias": (
                kind not in ("mean_pool", "max_pool"),
                "is neither 'mean_pool' nor 'max_pool' (and 'gated_pool' always weighs its slots)",
                "False",
            ),
            "freeze_projection": (
                kind not in ("linear", *CONVOLUTIONS, "gated_pool"),
                "has no learned weights; 'linear', 'conv', 'dense_conv' and 'gated_pool' have",
                "False",
            ),
            "original_max_position_embeddings": (
                kind != "gated_pool" and not self.log_count_bias,
                "has slots that weigh one token each (no log_count_bias)",
                "unset (None)",
            ),
        }
        for name, (useless, reason, default) in refused.items():
            if useless and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} would have no effect: projection_type={kind!r} {reason}. Leave "
                    f"{name} {default}, or choose another projection_type."
                )
        if kind == "gated_pool" and self.projection_init not in (None, "normal", "mean_pool"):
            raise ValueError(
                f"projection_init={self.projection_init!r} is no start of the gates of projection_type='gated_pool': "
                "choose 'normal' (random) or 'mean_pool' (0)."
            )
        if self.projection_init == "offsets" and kind not in CONVOLUTIONS and self.projection_sharing != "none":
            raise ValueError(
                f"projection_init='offsets' starts each head at a token of its own, but with projection_type={kind!r} "
                f"and projection_sharing={self.projection_sharing!r} all heads have one E. Use "
                "projection_sharing='none', or projection_init='mean_pool'."
            )
        original, k = self.original_max_position_embeddings, self.projected_length
        if original is not None and original < (k if isinstance(k, int) else max(k, default=1)):
            raise ValueError(
                f"original_max_position_embeddings must be at least projected_length={self.projected_length}, up to "
                f"which attention is exact, got {self.original_max_position_embeddings}."
            )


__all__ = ["LinformerConfig", "capture_outputs", "merge_with_config_defaults"]
