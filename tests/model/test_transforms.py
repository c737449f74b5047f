"""The model inside other machinery: torch.jit.trace, the meta device, torch.func, forward-mode differentiation, DDP."""

import copy
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap

import linformer_hf
from linformer_hf import LinformerConfig, LinformerModel


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "projected_length": 16,
    "initializer_range": 0.3,
}
KINDS = [
    {"projection_type": "linear", "projection_sharing": "layerwise"},
    {"projection_type": "linear", "projection_sharing": "none"},
    {"projection_type": "linear", "projection_sharing": "headwise", "projection_init": "mean_pool"},
    {"projection_type": "conv"},
    {"projection_type": "dense_conv"},
    {"projection_type": "dense_conv", "projection_sharing": "none", "projected_length": 14, "local_window": 2},
    {"projection_type": "linear", "projection_sharing": "none", "local_window": 2},
    {"projection_type": "conv", "projection_sharing": "none"},
    {"projection_type": "mean_pool"},
    {"projection_type": "mean_pool", "log_count_bias": True, "boundary_slots": True},
    {"projection_type": "max_pool"},
    {"projection_type": "gated_pool"},
    {"projection_type": "gated_pool", "local_window": 2, "boundary_slots": True, "length_correction": True},
]
HEADS = [name for name in linformer_hf.__all__ if name == "LinformerModel" or name.startswith("LinformerFor")]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
lengths = pytest.mark.parametrize("length", [10, 40], ids=["short", "long"])  # of K = 16 slots


def build(kind: dict, cls=LinformerModel, **changes):
    torch.manual_seed(0)
    model = cls(LinformerConfig(**{**SIZES, **kind, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "correction" in name or name.endswith("projection.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(rows: int, length: int, masked: bool) -> tuple[torch.Tensor, ...]:
    """Ids and, if asked for, a mask with padding on the right of the second row and on the left of the others."""
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(length))
    if not masked:
        return (ids,)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    mask[2:, :1] = 0
    return ids, mask


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("traced", [5, 40])
@kinds
def test_a_trace_holds_for_every_length(kind, traced, masked):
    model = build(kind, return_dict=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # checks of the input become constants
        graph = torch.jit.trace(model, batch(2, traced, masked), check_trace=False)
        for length in (3, 16, 17, 40, 47, 64):
            given = batch(3, length, masked)
            (states, pooled), (wanted, wanted_pooled) = graph(*given), model(*given)
            real = given[1].bool() if masked else torch.ones_like(given[0]).bool()
            torch.testing.assert_close(states[real], wanted[real], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(pooled, wanted_pooled, atol=1e-4, rtol=1e-4)


@lengths
@kinds
def test_on_the_meta_device_shapes_come_out(kind, length):
    given = [tensor.to("meta") for tensor in batch(3, length, masked=True)]
    for head in HEADS:
        model = build(kind, getattr(linformer_hf, head)).to("meta")
        tensors = [tensor[None] for tensor in given] if head.endswith("Choice") else given
        output = model(*tensors)[0]
        assert output.device.type == "meta"
        assert output.shape[0] == (1 if head.endswith("Choice") else 3)


@lengths
@kinds
def test_vmap_over_batches_models_and_samples(kind, length):
    model, given = build(kind), batch(3, length, masked=True)

    def states(weights, ids, mask):
        return functional_call(model, weights, (ids, mask)).last_hidden_state

    weights = dict(model.named_parameters())
    with torch.no_grad():
        wanted = states(weights, *given)
        batches = vmap(lambda ids, mask: states(weights, ids, mask))(*(tensor[:, None] for tensor in given))
        torch.testing.assert_close(batches[:, 0], wanted, atol=1e-5, rtol=1e-4)
        stacked, _ = stack_module_state([model, copy.deepcopy(model)])
        for one in vmap(lambda weights: states(weights, *given))(stacked):
            torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-4)
    for one in vmap(lambda weights: states(weights, *given))(stacked):  # whose weights ask for gradients
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-4)

    def loss(weights, ids, mask):
        return states(weights, ids[None], mask[None]).sin().sum()  # of squares, normalised, nothing would be left

    samples = vmap(grad(loss), (None, 0, 0))(weights, *given)
    for row in range(3):
        model.zero_grad()
        loss(weights, *(tensor[row] for tensor in given)).backward()
        for name, parameter in model.named_parameters():
            found = samples[name][row]
            wanted = torch.zeros_like(found) if parameter.grad is None else parameter.grad
            assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-4, name


@lengths
@kinds
def test_forward_mode_gives_the_derivative_along_a_direction(kind, length):
    """torch's sdpa has no forward mode, so it is asked of the attention that is written out."""
    model = build(kind, attn_implementation="eager").double()
    mask = batch(3, length, masked=True)[1]
    generator = torch.Generator().manual_seed(1)
    point, direction = torch.randn(2, 3, length, 16, generator=generator, dtype=torch.float64)

    def states(embeddings):
        return model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state[mask.bool()]

    with torch.no_grad():
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(states(forward_ad.make_dual(point, direction))).tangent
        step = 1e-6
        wanted = (states(point + step * direction) - states(point - step * direction)) / (2 * step)
    if kind["projection_type"] != "max_pool":  # a step may change which token is the largest
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(found).all()


LABELS = {
    "LinformerForMaskedLM": lambda ids: {"labels": ids},
    "LinformerForSequenceClassification": lambda ids: {"labels": ids[:, 0] % 2},
    "LinformerForTokenClassification": lambda ids: {"labels": ids % 2},
    "LinformerForQuestionAnswering": lambda ids: {"start_positions": ids[:, 0] * 0, "end_positions": ids[:, 0] * 0},
    "LinformerForMultipleChoice": lambda ids: {"labels": ids[:1, 0] % 3},
}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointed", "reentrant"])
@pytest.mark.parametrize("rows", [[16, 16, 16], [7, 3, 1], [40, 40, 40], [64, 12, 3], [60, 0, 2]], ids=str)
@kinds
def test_every_trained_parameter_takes_part_in_every_step(kind, rows, checkpointing, monkeypatch):
    """Several processes depend on it: DDP waits for a gradient of each parameter."""
    monkeypatch.setattr(linformer_hf.modeling_linformer, "WORTH_PACKING", 8)
    ids = batch(3, max(rows), masked=False)[0]
    mask = (torch.arange(max(rows)) < torch.tensor(rows)[:, None]).long()
    heads = LABELS if checkpointing is None else {"LinformerForMaskedLM": LABELS["LinformerForMaskedLM"]}
    for head, labels in heads.items():
        for tied in (True, False) if head == "LinformerForMaskedLM" else (True,):
            model = build(kind, getattr(linformer_hf, head), tie_word_embeddings=tied).train()
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
                model.enable_input_require_grads() if checkpointing else None
            given = {"input_ids": ids, "attention_mask": mask}
            if head.endswith("Choice"):
                given = {name: tensor[None] for name, tensor in given.items()}
            model(**given, **labels(ids)).loss.backward()
            missing = [
                name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None
            ]
            assert not missing, (head, tied)
