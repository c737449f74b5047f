"""From a source to a Linformer: its exact twin with K = N, and the one with K < N."""

from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError

from .. import modeling_linformer
from ..configuration_linformer import LinformerConfig
from ..modeling_linformer import LinformerPreTrainedModel
from .sources import POSITIONS, ConversionError, Source, names_listed


def exact_twin(source: Source, length: int, positions: Literal["repeat", "interpolate"]) -> LinformerPreTrainedModel:
    """The source as a Linformer whose every query sees every token, for inputs of up to `length` tokens."""
    return shortened(source, length, positions, {"projection_type": "mean_pool", "projected_length": length})


def shortened(
    source: Source, length: int, positions: Literal["repeat", "interpolate"], projection: dict[str, Any]
) -> LinformerPreTrainedModel:
    """The source with shortened attention, in evaluation mode and float32.

    Args:
        length: N; above the source's own, positions are extended, below it they are cut.
        positions: how they are extended: the rows over again, or stretched by linear interpolation.
        projection: fields of LinformerConfig such as `projected_length`.

    Raises:
        ConversionError: the configuration is refused, or a weight is missing or left over.
    """
    fields = {**source.config, "max_position_embeddings": length, **projection}
    try:
        config = LinformerConfig(**fields, dtype="float32")
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{source.name} cannot be converted like this: {reason}") from error
    model_class = getattr(modeling_linformer, f"Linformer{source.head}")
    arguments = {"add_pooling_layer": source.with_pooler} if source.head == "Model" else {}
    model: LinformerPreTrainedModel = model_class(config, **arguments)
    weights = dict(source.weights)
    prefix = "" if source.head == "Model" else "linformer."
    weights[prefix + POSITIONS] = extend_positions(weights[prefix + POSITIONS], length, positions)
    own = model.state_dict()
    started = {name for name in own if ".projection." in name or ".correction." in name}
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    missing = set(own) - set(weights) - started - tied
    leftover = set(weights) - set(own)
    wrong = [
        f"{name} {list(weights[name].shape)}, here {list(own[name].shape)}"
        for name in set(own) & set(weights)
        if own[name].shape != weights[name].shape
    ]
    if missing or leftover or wrong:
        raise ConversionError(
            f"{source.name}: {names_listed('weights are missing', missing)}"
            f"{names_listed('weights have no place', leftover)}{names_listed('shapes differ', wrong)}".strip()
        )
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def extend_positions(rows: torch.Tensor, length: int, how: Literal["repeat", "interpolate"]) -> torch.Tensor:
    """[n, C] -> [length, C]. `repeat` starts again at row 1 behind the last one: row 0 is the first token's alone."""
    n = len(rows)
    if length <= n:
        return rows[:length].clone()
    if how == "interpolate":
        return torch.nn.functional.interpolate(rows.T[None], size=length, mode="linear")[0].T.contiguous()
    index = torch.arange(length)
    return rows[torch.where(index < n, index, 1 + (index - n) % (n - 1))] if n > 1 else rows.expand(length, -1).clone()
