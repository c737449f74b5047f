"""A module that somebody wrapped, subclassed, patched or hooked, and what it was given."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import linformer_hf
from linformer_hf import LinformerConfig


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 96,
    "projected_length": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
BAND = {"projection_type": "gated_pool", "local_window": 6, "boundary_slots": True, "length_correction": True}
KINDS = {
    "LinformerModel": {"projection_type": "linear", "projection_sharing": "headwise"},
    "LinformerForMaskedLM": {"projection_type": "linear", "projection_sharing": "layerwise"},
    "LinformerForSequenceClassification": BAND,
    "LinformerForTokenClassification": {"projection_type": "conv"},
    "LinformerForQuestionAnswering": {"projection_type": "gated_pool"},
    "LinformerForMultipleChoice": {"projection_type": "linear", "projection_sharing": "none"},
}


def build(head: str = "LinformerModel", **changes):
    torch.manual_seed(0)
    model = getattr(linformer_hf, head)(LinformerConfig(**{**SIZES, **KINDS[head], **changes})).eval()
    for name, parameter in model.named_parameters():
        if "correction" in name or name.endswith("projection.weight"):
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(head: str = "LinformerModel") -> dict[str, torch.Tensor]:
    """Rows of 70 and 60 real tokens: enough to be packed, and computed in blocks (`small_blocks`)."""
    ids = torch.randint(1, 50, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return {name: tensor[None] for name, tensor in given.items()} if head.endswith("Choice") else given


def change(output):
    """Another output of the same form; a LayerNorm behind it does not undo the change."""
    if isinstance(output, torch.Tensor):
        return output.roll(1, -1) * 1.25
    if isinstance(output, dict):  # a ModelOutput
        return type(output)(**{name: change(value) for name, value in output.items()})
    return (change(output[0]), *output[1:])


class Seen(list):
    """What a module was given and gave: the tensors and copies of them."""

    def note(self, *values) -> None:
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self.append([(tensor, tensor.detach().clone()) for tensor in tensors])


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module, seen: Seen):
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, *given, **more):
        output = self.module(*given, **more)
        self.seen.note(*given, output)
        return change(output)


def changed_forward(forward: Callable, seen: Seen) -> Callable:
    def another(*given, **more):
        output = forward(*given, **more)
        seen.note(*given, output)
        return change(output)

    return another


def wrapped(model, name: str, seen: Seen, stack: ExitStack) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Wrapper(model.get_submodule(name), seen))


def subclassed(model, name: str, seen: Seen, stack: ExitStack) -> None:
    module = model.get_submodule(name)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": changed_forward(kind.forward, seen)})


def patched(model, name: str, seen: Seen, stack: ExitStack) -> None:
    module = model.get_submodule(name)
    module.forward = changed_forward(module.forward, seen)


def patched_class(model, name: str, seen: Seen, stack: ExitStack) -> None:
    kind = type(model.get_submodule(name))
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(kind, "forward", changed_forward(kind.forward, seen))


def hooked(model, name: str, seen: Seen, stack: ExitStack) -> None:
    def hook(module, given, output):
        seen.note(*given, output)
        return change(output)

    model.get_submodule(name).register_forward_hook(hook)


def names_of(model) -> list[str]:
    """Every module but the second layer's, which is like the first, and those that are not called, as in BERT: lists
    and attention's dropout, whose rate is read."""
    names = [name for name, module in model.named_modules() if name and not isinstance(module, nn.ModuleList)]
    return [name for name in names if ".layer.1" not in f".{name}" and not name.endswith("attention.self.dropout")]
