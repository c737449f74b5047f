"""Packed and blockwise encoding, written-out attention and fast dropout: equal to the plain path, and cheaper."""

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch

from linformer_hf import LinformerConfig, LinformerForMaskedLM, LinformerModel
from linformer_hf import attention_linformer as attention
from linformer_hf import modeling_linformer as modeling
from linformer_hf.utils.timing import peak_bytes


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "projected_length": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
KINDS = [
    {"projection_type": "linear", "projection_sharing": "layerwise"},
    {"projection_type": "linear", "projection_sharing": "none"},
    {"projection_type": "linear", "projection_sharing": "headwise", "projection_init": "mean_pool"},
    {"projection_type": "fixed"},
    {"projection_type": "conv"},
    {"projection_type": "dense_conv", "projection_sharing": "headwise"},
    {"projection_type": "linear", "projection_sharing": "none", "local_window": 8},
    {"projection_type": "mean_pool", "log_count_bias": True},
    {"projection_type": "max_pool"},
    {"projection_type": "gated_pool"},
    {"projection_type": "gated_pool", "local_window": 8, "boundary_slots": True, "length_correction": True},
]
PLAIN = {"output_hidden_states": True}  # what is to be seen is not computed in blocks, except a band's


@contextmanager
def at_once():
    """A band too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, modeling):
            patch.setattr(module, "BLOCK", 10**6)
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (attention, modeling):
        monkeypatch.setattr(module, "BLOCK", 96)  # no length below is a multiple of it


def build(kind: dict, cls=LinformerModel, **changes):
    torch.manual_seed(0)
    model = cls(LinformerConfig(**{**SIZES, **kind, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "correction" in name or name.endswith("projection.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(lengths: list[int], left: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[-length:] = left
        row[:length] |= not left
        if not length:
            row[:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def packs(monkeypatch) -> list[bool]:
    """What `_packs` answered, call after call."""
    answers, real = [], LinformerModel._packs
    monkeypatch.setattr(LinformerModel, "_packs", lambda *given: answers.append(real(*given)) or answers[-1])
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[300, 300], [301, 70, 9], [64, 200, 0]], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_gradients_the_answers_are_those_of_the_plain_path(kind, left, lengths, dtype, packs):
    model, given = build(kind).to(dtype), batch(lengths, left)
    with torch.no_grad():
        ours = model(**given)
        with at_once():
            plain = model(**given, **PLAIN)
    assert packs == [True, False]
    real = given["attention_mask"].bool()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # values are about 1: a few units of bfloat16's last place
    assert (ours.last_hidden_state - plain.last_hidden_state)[real].abs().max() < tolerance
    assert (ours.last_hidden_state[~real] == 0).all()
    filled = torch.tensor([length > 0 for length in lengths])
    assert (ours.pooler_output - plain.pooler_output)[filled].abs().max() < tolerance


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_maps_of_a_band_computed_in_parts_are_those_at_once(left):
    model, given = build(KINDS[-1], attn_implementation="eager"), batch([301, 70, 9], left)
    with torch.no_grad():
        parts = model(**given, output_attentions=True).attentions
        with at_once():
            maps = model(**given, output_attentions=True).attentions
    assert len(parts) == len(maps) == 3
    for ours, whole in zip(parts, maps, strict=True):
        assert ours.shape == (3, 4, 301, 64)
        torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["packed", "checkpointed", "reentrant"])
@pytest.mark.parametrize("lengths", [[300, 300], [301, 70, 9]], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_those_of_the_plain_path(kind, lengths, checkpointing, packs):
    model, given = build(kind).train(), batch(lengths, left=True)
    real = given["attention_mask"].bool()
    weights = torch.randn(*real.shape, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for plain in (False, True):
        model.zero_grad()
        if checkpointing is not None and not plain:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads() if checkpointing else None
        with at_once() if plain else nullcontext():
            outputs = model(**given, **(PLAIN if plain else {}))
        ((outputs.last_hidden_state * weights)[real].sum() + outputs.pooler_output.sum()).backward()
        model.gradient_checkpointing_disable()
        model._require_grads_hook.remove() if checkpointing and not plain else None
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    padded = len(lengths) * max(lengths) > sum(lengths)
    assert packs == [padded or checkpointing is not None, False]
    ours, plain = found
    assert ours.keys() == plain.keys()
    for name in ours:
        error = (ours[name] - plain[name]).norm() / plain[name].norm().clamp(min=1e-6)
        assert error < 1e-5 or (ours[name] - plain[name]).abs().max() < 1e-6, name


def test_the_callers_tensors_are_left_alone():
    model = build(KINDS[0])
    states, mask = torch.randn(2, 300, 32), torch.ones(2, 300, dtype=torch.long)
    before = states.clone()
    with torch.no_grad():
        first, second = (model(inputs_embeds=states, attention_mask=mask).last_hidden_state for _ in range(2))
    assert torch.equal(states, before)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("place", ["layer", "embeddings", "inside"])
def test_a_hook_sees_whole_batches_that_stay_as_they_are(place, packs):
    model, given, seen = build(KINDS[0]), batch([300, 290], left=False), []
    layer = model.encoder.layer[1]
    module = {"layer": layer, "embeddings": model.embeddings, "inside": layer.intermediate}[place]
    handle = module.register_forward_hook(lambda _, __, output: seen.append((output, output.clone())))
    with torch.no_grad():
        model(**given)
    assert packs == [False]
    (output, copy) = seen[0]
    assert output.shape[:2] == (2, 300)
    assert torch.equal(output, copy)
    handle.remove()
    with torch.no_grad():
        model(**given, **PLAIN)  # leaves transformers' own, sleeping hooks behind
        model(**given)
    assert packs == [False, False, True]


def test_hidden_states_are_those_of_every_layer():
    model, given = build(KINDS[0]), batch([300, 200], left=False)
    with torch.no_grad():
        states = model(**given, **PLAIN).hidden_states
    assert len(states) == 4
    assert len({state.data_ptr() for state in states}) == 4
    assert not any(torch.equal(one, two) for one, two in itertools.pairwise(states))


def test_short_rows_are_not_packed(packs):
    model, given = build(KINDS[0]), batch([40, 20], left=False)
    with torch.no_grad():
        model(**given)
    assert packs == [False]


def test_masked_lm_trains_on_a_padded_batch_as_on_its_rows_alone():
    model, given = build(KINDS[0], LinformerForMaskedLM).train(), batch([300, 120], left=False)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    model(**given, labels=labels).loss.backward()
    together = model.linformer.encoder.layer[0].output.dense.weight.grad.clone()
    model.zero_grad()
    for row, length in enumerate((300, 120)):
        ids = given["input_ids"][row : row + 1, :length]
        model(input_ids=ids, labels=ids, num_items_in_batch=420).loss.backward()
    alone = model.linformer.encoder.layer[0].output.dense.weight.grad
    assert (together - alone).norm() / alone.norm() < 1e-5


def test_memory_of_a_long_input_is_one_input_and_a_block():
    model = build({"projection_type": "mean_pool"}, max_position_embeddings=16384)
    states = torch.randn(1, 16384, 32)
    with torch.no_grad():
        model(inputs_embeds=states)
        ours = peak_bytes(lambda: model(inputs_embeds=states))
        plain = peak_bytes(lambda: model(inputs_embeds=states, **PLAIN))
    inputs = states.numel() * 4
    assert ours < 2.5 * inputs  # windows of K x N take a share of it at this width
    assert plain > 4 * ours


def test_memory_of_a_band_is_its_tokens_and_a_part():
    """Nine inputs: query, key, value, padded copies of the latter, the output twice, the bias; and a few blocks."""
    model = build(KINDS[-1], max_position_embeddings=16384)
    states = torch.randn(1, 16384, 32)
    with torch.no_grad():
        model(inputs_embeds=states)
        ours = peak_bytes(lambda: model(inputs_embeds=states))
        with at_once():
            whole = peak_bytes(lambda: model(inputs_embeds=states))
    inputs = states.numel() * 4
    assert ours < 10 * inputs
    assert whole > 2 * ours


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=["linear", "band"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_inside_of_an_attention_is_computed_again_and_not_kept(kind, rate, monkeypatch):
    """For the backward pass: it is the most that training keeps. The masks of dropout are drawn alike."""
    model = build(kind, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate).train()
    states, kept, gradients = torch.randn(2, 500, 32), [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for recomputed in (attention.recomputed, lambda function, length, *given: function(*given)):
        monkeypatch.setattr(attention, "recomputed", recomputed)
        kept.append(0)
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(inputs_embeds=states).last_hidden_state
        gradients.append(torch.autograd.grad(output.pow(3).sum(), list(model.encoder.parameters())))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    if rate or kind is KINDS[-1]:  # without dropout the kernel of torch keeps no map of `linear`
        assert kept[0] < 0.8 * kept[1]


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_checkpointing_needs_less_memory_than_by_layer(rate):
    changes = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    model = build({"projection_type": "linear"}, max_position_embeddings=4096, num_hidden_layers=4, **changes).train()
    states = torch.randn(1, 4096, 32)

    def step(**extra):
        model.zero_grad()
        model(inputs_embeds=states, **extra).last_hidden_state.sum().backward()

    step()
    kept = peak_bytes(step)
    model.gradient_checkpointing_enable()
    by_layer = peak_bytes(lambda: step(**PLAIN))
    by_block = peak_bytes(step)
    assert by_block < 0.7 * by_layer < 0.7 * kept


@pytest.mark.parametrize("extra", [{}, PLAIN, {"output_attentions": False}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_masks_again(reentrant, extra, monkeypatch):
    model = build(KINDS[0], hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, num_hidden_layers=2).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    drawn, real = [], attention.dropout_factor
    monkeypatch.setattr(attention, "dropout_factor", lambda *given: drawn.append(real(*given)) or drawn[-1])
    states = torch.randn(1, 300, 32, requires_grad=True)
    output = model(inputs_embeds=states, **extra).last_hidden_state
    forward = drawn[1:]  # the embeddings' is not drawn again
    drawn.clear()
    output.sum().backward()
    # Checkpointed by layer, the map of a row of more than a block is computed once more within the layer.
    assert len(drawn) == len(forward) + (model.config.num_hidden_layers if extra == PLAIN else 0) > 0
    for again in drawn:
        assert any(again.shape == first.shape and torch.equal(again, first) for first in forward)


def test_checkpointing_computes_a_block_twice(monkeypatch):
    model, calls, real = build(KINDS[0]).train(), [], modeling.LinformerLayer.chunk
    model.gradient_checkpointing_enable()
    monkeypatch.setattr(
        modeling.LinformerLayer, "chunk", lambda *given, **more: calls.append(1) or real(*given, **more)
    )
    model(inputs_embeds=torch.randn(1, 300, 32)).last_hidden_state.sum().backward()
    assert len(calls) == 2 * 3 * 4  # forward and backward, layers, blocks of 96 tokens


def test_a_replaced_or_hooked_layer_is_used():
    model, states, kept = build(KINDS[0]), torch.randn(1, 300, 32), []
    inner = model.encoder.layer[0].intermediate
    with torch.no_grad():
        gelu = model(inputs_embeds=states).last_hidden_state
        inner.intermediate_act_fn = torch.nn.ReLU()
        relu, plain = model(inputs_embeds=states), model(inputs_embeds=states, **PLAIN)
    assert not torch.allclose(gelu, relu.last_hidden_state)
    assert torch.allclose(relu.last_hidden_state, plain.last_hidden_state, atol=1e-5)
    model = build(KINDS[0])
    handle = model.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda _, __, output: kept.append((output, output.clone()))
    )
    with torch.no_grad():
        model(inputs_embeds=states)
    handle.remove()
    assert torch.equal(*kept[0])


def test_an_adapter_on_the_output_map_counts_in_rows_of_any_length():
    """PEFT puts a module around a Linear; its weight is the Linear's, without the adapter."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        @property
        def weight(self):
            return self.base.weight

        @property
        def bias(self):
            return self.base.bias

        def forward(self, states):
            return 2 * self.base(states)

    model, states = build(KINDS[-1]), torch.randn(1, 300, 32)
    output = model.encoder.layer[0].attention.output
    with torch.no_grad():
        before = model(inputs_embeds=states).last_hidden_state
        output.dense = Adapter(output.dense)
        after = model(inputs_embeds=states).last_hidden_state
        plain = model(inputs_embeds=states, **PLAIN).last_hidden_state
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, plain, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_batch_without_a_real_token(gradients):
    model = build(KINDS[0])
    with torch.set_grad_enabled(gradients):
        empty = {"input_ids": torch.ones(2, 300, dtype=torch.long), "attention_mask": torch.zeros(2, 300)}
        assert torch.isfinite(model(**empty).last_hidden_state).all()


def test_positions_of_one_dimension():
    model, ids = build(KINDS[0]), torch.randint(1, 50, (2, 300))
    places = torch.arange(300).flip(0)
    for kinds in (None, torch.zeros(300, dtype=torch.long)):
        with torch.no_grad():
            one = model(ids, position_ids=places, token_type_ids=kinds).last_hidden_state
        two = model(ids, position_ids=places.expand(2, -1)).last_hidden_state
        assert torch.allclose(one, two, atol=1e-5)


def test_gradients_of_single_samples():
    """torch.func goes through dropout too."""
    model = build(KINDS[0], hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    weights = dict(model.named_parameters())
    states = torch.randn(1, 100, 32)

    def loss(weights):
        return torch.func.functional_call(model, weights, kwargs={"inputs_embeds": states}).last_hidden_state.sum()

    found = torch.func.grad(loss)(weights)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_a_layer_that_others_checkpoint_does_not_overwrite():
    from torch.utils.checkpoint import checkpoint

    model, given = build(KINDS[0]), batch([300, 100], left=False)
    real = given["attention_mask"].bool()

    def gradient():
        model.zero_grad()
        model(**given).last_hidden_state[real].square().sum().backward()
        return model.encoder.layer[0].output.dense.weight.grad.clone()

    wanted = gradient()
    for layer in model.encoder.layer:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, **k: checkpoint(lambda *b: forward(*b, **k), *a, use_reentrant=True)
    assert torch.allclose(gradient(), wanted, atol=1e-4)


def test_dropout_of_an_attention_map_is_applied_under_sdpa():
    model = build(KINDS[0], attention_probs_dropout_prob=0.5).train()
    states = torch.randn(1, 100, 32)
    torch.manual_seed(0)
    one, two = (model(inputs_embeds=states).last_hidden_state for _ in range(2))
    assert not torch.allclose(one, two)
    model.eval()
    one, two = (model(inputs_embeds=states).last_hidden_state for _ in range(2))
    assert torch.equal(one, two)
