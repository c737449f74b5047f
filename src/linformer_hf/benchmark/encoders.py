"""What a Linformer is compared with: encoders of the same width, heads, feed-forward, layers, dtype and dropout.

Every builder takes a `Shape` and gives a module that maps [B, N, C] to [B, N, C]. What remains different is listed in
`DIFFERENCES`, and the benchmark prints it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from ..configuration_linformer import LinformerConfig
from ..modeling_linformer import LinformerModel


VOCABULARY = 32  # the input is embedded already


@dataclass(frozen=True)
class Shape:
    """Sizes that all encoders have in common; `projected_length` and `projection_sharing` are the Linformers'."""

    length: int
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 1
    dropout: float = 0.0
    projected_length: int = 256
    projection_sharing: str = "layerwise"

    def bert_fields(self) -> dict[str, Any]:
        """The fields of BERT-like configurations."""
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
        }


class Embedded(nn.Module):
    """A model of transformers as a map from [B, N, C] to [B, N, C]."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self.model(inputs_embeds=states, attention_mask=mask).last_hidden_state
        return output


def linformer_hf(shape: Shape, **options: Any) -> nn.Module:
    config = LinformerConfig(
        **shape.bert_fields(),
        max_position_embeddings=shape.length,
        projected_length=shape.projected_length,
        **(options or {"projection_sharing": shape.projection_sharing}),
    )
    return Embedded(LinformerModel(config, add_pooling_layer=False))


def converted(shape: Shape) -> nn.Module:
    options = {"projection_type": "gated_pool", "local_window": shape.projected_length // 4}
    return linformer_hf(shape, **options, boundary_slots=True, length_correction=True)


def hugging_face(name: str, fields: dict[str, Any], **options: Any) -> nn.Module:
    """A model of transformers with the configuration's fields; `options` are the model's."""
    config = getattr(transformers, f"{name}Config")(**fields)
    return Embedded(getattr(transformers, f"{name}Model")(config, **options))


def roberta(shape: Shape, attention: str) -> nn.Module:
    fields = {"max_position_embeddings": shape.length + 2, "attn_implementation": attention}
    return hugging_face("Roberta", {**shape.bert_fields(), **fields}, add_pooling_layer=False)


def modernbert(shape: Shape) -> nn.Module:
    fields = dict(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size * 2 // 3,  # its feed-forward has three maps instead of two
        num_hidden_layers=shape.num_hidden_layers,
        max_position_embeddings=shape.length,
        **dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout"), shape.dropout),
        reference_compile=False,
    )
    return hugging_face("ModernBert", fields)


def longformer(shape: Shape) -> nn.Module:
    fields: dict[str, Any] = {"max_position_embeddings": shape.length + 2, "pad_token_id": 1}
    fields["attention_window"] = [min(512, shape.length)] * shape.num_hidden_layers
    return hugging_face("Longformer", {**shape.bert_fields(), **fields}, add_pooling_layer=False)


def nystromformer(shape: Shape) -> nn.Module:
    n = shape.length
    fields = {"max_position_embeddings": n, "segment_means_seq_len": n, "num_landmarks": 64}
    return hugging_face("Nystromformer", {**shape.bert_fields(), **fields})


def lucidrains(shape: Shape) -> nn.Module:
    return package("linformer").Linformer(
        dim=shape.hidden_size,
        seq_len=shape.length,
        depth=shape.num_hidden_layers,
        k=shape.projected_length,
        heads=shape.num_attention_heads,
        dropout=shape.dropout,
    )


def tatp22(shape: Shape) -> nn.Module:
    return package("linformer_pytorch").Linformer(
        input_size=shape.length,
        channels=shape.hidden_size,
        dim_k=shape.projected_length,
        dim_ff=shape.intermediate_size,
        dropout_ff=shape.dropout,
        dropout=shape.dropout,
        nhead=shape.num_attention_heads,
        depth=shape.num_hidden_layers,
        activation="gelu",
        parameter_sharing="layerwise",
    )


def package(name: str) -> Any:
    """An installed package. Raises an ImportError that holds the command."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"the package {name!r} is not installed: pip install 'linformer_hf[benchmark]', or leave "
            f"{name.replace('_', '-')} out of benchmark.alternatives."
        ) from None


# Name in recipes and tables -> builder. The first is ours.
OURS = "linformer_hf"
FLOOR = "matmul floor"  # no encoder: the time of its matrix products alone
BUILDERS: dict[str, Callable[[Shape], nn.Module]] = {
    OURS: linformer_hf,
    "linformer_hf mean_pool": lambda shape: linformer_hf(shape, projection_type="mean_pool"),
    "linformer_hf converted": converted,
    "roberta eager": lambda shape: roberta(shape, "eager"),
    "roberta sdpa": lambda shape: roberta(shape, "sdpa"),
    "modernbert": modernbert,
    "longformer": longformer,
    "nystromformer": nystromformer,
    "linformer": lucidrains,
    "linformer-pytorch": tatp22,
}
# Those that have a K.
PROJECTED = (OURS, "linformer_hf mean_pool", "linformer_hf converted", "linformer", "linformer-pytorch")
# Those that take no mask of padding: what stands there moves their answers.
UNMASKED = ("linformer", "linformer-pytorch")
DIFFERENCES = {
    OURS: "type linear, E = F for all layers (the paper's best row) unless projection_sharing says otherwise",
    "linformer_hf mean_pool": "windows instead of learned E, F",
    "linformer_hf converted": "what `linformer-hf convert` makes by default: gated slots and a band of single tokens",
    "roberta eager": "full attention, softmax written out: what the paper compares with",
    "roberta sdpa": "full attention, torch's fused kernel",
    "modernbert": "pre-norm, rotary positions, no biases, gated feed-forward with 2/3 of the width (equal products); "
    "its first layer and every third attend fully, the others to 128 tokens",
    "longformer": "attention to a window of 512 tokens, no global tokens",
    "nystromformer": "64 landmarks and a convolution of 65 values, which reads padding too",
    "linformer": "lucidrains: pre-norm, no embedding, no biases of queries, keys and values, E and F per layer, "
    "feed-forward always 4 times the width",
    "linformer-pytorch": "tatp22: E = F for all layers; no embedding",
}
