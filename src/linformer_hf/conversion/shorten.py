"""From a source to a Linformer: its exact twin with K = N, and the one with K < N."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Windows:
    """What a source knows of a row that is longer than its own N: itself over windows that it was trained to read.

    It was never trained to attend further, so full attention over all of the row is no teacher. Windows overlap by
    half; each has the row's first and last id as its own, and a token is taken from the one in whose midst it stands.

    Attributes:
        index: [w, N], the tokens of each window.
        window, place: [n], where each token of the row is taken from. All are None for rows of at most N tokens.
    """

    index: torch.Tensor | None
    window: torch.Tensor | None = None
    place: torch.Tensor | None = None

    @classmethod
    def of(cls, source: Source | None, length: int) -> "Windows":
        """Of a row of `length` tokens: the row itself up to the source's N, and wherever no source is given."""
        return cls(None) if source is None or length <= source.length else cls.over(length, source.reach)

    @classmethod
    def over(cls, length: int, size: int) -> "Windows":
        """Of a row of `length` tokens, each of `size` tokens, 4 at least."""
        if length <= size:
            return cls(None)
        inner = size - 2
        starts = [*range(1, length - 1 - inner, max(1, inner // 2)), length - 1 - inner]
        first = torch.tensor(starts)[:, None]
        index = torch.cat([torch.zeros_like(first), first + torch.arange(inner), first * 0 + length - 1], 1)
        token = torch.arange(length)
        depth = torch.minimum(token - first, first + inner - 1 - token)  # [w, n], below 0 outside the window
        depth[:, 0], depth[:, -1] = -first[:, 0], first[:, 0]  # the first window's mark, the last one's
        window = depth.argmax(0)
        place = (token - first[window, 0] + 1).clamp(0, size - 1)
        place[0], place[-1] = 0, size - 1
        return cls(index, window, place)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """[m, n] -> [m w, N]."""
        return rows if self.index is None else rows[:, self.index].flatten(0, 1)

    def join(self, states: torch.Tensor) -> torch.Tensor:
        """[m w, N, C] -> [m, n, C]."""
        if self.index is None:
            return states
        return states.unflatten(0, (-1, len(self.index)))[:, self.window, self.place]


def shortened(
    source: Source, length: int, positions: Literal["repeat", "interpolate"], projection: dict[str, Any]
) -> LinformerPreTrainedModel:
    """The source with shortened attention, in evaluation mode and float32.

    Args:
        length: N; above the source's own, positions are extended, below it they are cut.
        positions: how they are extended: the rows over again, those that the source's texts reached when it was last
            trained (`Source.reach`), or stretched by linear interpolation.
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
    period = source.reach - 2 if source.reach < source.length else None
    weights[prefix + POSITIONS] = extend_positions(weights[prefix + POSITIONS], length, positions, period)
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


def extend_positions(
    rows: torch.Tensor, length: int, how: Literal["repeat", "interpolate"], period: int | None = None
) -> torch.Tensor:
    """[n, C] -> [length, C]. `repeat` goes on with rows 1 to `period` (default: n - 1), again and again.

    Row 0 is the first token's alone.
    """
    n = len(rows)
    period = period or n - 1
    if length <= n:
        return rows[:length].clone()
    if how == "interpolate":
        return torch.nn.functional.interpolate(rows.T[None], size=length, mode="linear")[0].T.contiguous()
    index = torch.arange(length)
    return rows[torch.where(index < n, index, 1 + (index - n) % period)] if n > 1 else rows.expand(length, -1).clone()
