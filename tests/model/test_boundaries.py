"""Every module keeps its boundary: wrapped, subclassed, patched, hooked, it is given and gives the same on every path.

The fast ways (packing, blocks, writes in place) must give way to the plain one wherever a module is not exactly ours.
"""

import copy
from contextlib import ExitStack

import pytest
import torch
from boundaries import BAND, KINDS, Seen, batch, build, hooked, names_of, patched, patched_class, subclassed, wrapped
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linformer_hf import LinformerModel
from linformer_hf import attention_linformer as attention
from linformer_hf import modeling_linformer as modeling


def answer(model, head: str) -> torch.Tensor:
    output = model(**batch(head))
    name = {"LinformerModel": "last_hidden_state", "LinformerForQuestionAnswering": "start_logits"}.get(head, "logits")
    found = output.pooler_output if head == "LinformerModel" else output[name]
    if found.shape[:2] == (2, 70):
        found = found[batch(head)["attention_mask"].bool()]
    return found.detach()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (attention, modeling):
        monkeypatch.setattr(module, "BLOCK", 25)
    monkeypatch.setattr(modeling, "WORTH_BLOCKS", 32)


@pytest.mark.parametrize("way", [wrapped, subclassed, patched, patched_class, hooked], ids=lambda way: way.__name__)
@pytest.mark.parametrize("head", KINDS)
def test_every_module_that_somebody_changed_is_called_as_on_the_plain_path(head, way, monkeypatch):
    made = build(head)
    untouched = answer(made, head)
    for name in names_of(made):
        calls = []
        for plain in (False, True):
            with ExitStack() as stack:
                model, seen = copy.deepcopy(made), Seen()
                way(model, name, seen, stack)
                if plain:
                    stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                        LinformerModel, "_packs", lambda *_: False
                    )
                stack.enter_context(torch.set_grad_enabled(plain))
                calls.append((answer(model, head), seen))
        (ours, seen), (wanted, seen_plain) = calls
        assert seen, name
        assert not torch.allclose(ours, untouched, atol=1e-3), f"{name}: the change was passed by"
        assert torch.allclose(ours, wanted, atol=1e-4), name
        assert len(seen) == len(seen_plain), name
        for call, call_plain in zip(seen, seen_plain, strict=True):
            assert [one.shape for one, _ in call] == [one.shape for one, _ in call_plain], name
            for tensor, before in call:
                assert torch.equal(tensor, before), f"{name}: a tensor that somebody holds was overwritten"


def test_an_encoder_that_nobody_changed_is_packed(monkeypatch):
    model = build()
    answers, real = [], LinformerModel._packs
    monkeypatch.setattr(LinformerModel, "_packs", lambda *given: answers.append(real(*given)) or answers[-1])
    with torch.no_grad():
        packed = answer(model, "LinformerModel")
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)  # a profiler's
        assert torch.allclose(answer(model, "LinformerModel"), packed, atol=1e-5)
        handle.remove()
        answer(model, "LinformerModel")
    assert answers == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_attention_of_ones_own_is_called_with_whole_batches(dtype, monkeypatch):
    seen = []

    def own(module, query, *given, **more):
        seen.append(query.shape)
        return sdpa_attention_forward(module, query, *given, **more)

    model = build().to(dtype)
    AttentionInterface.register("own", own)
    try:
        model.set_attn_implementation("own")
        with torch.no_grad():
            answer(model, "LinformerModel")
    finally:
        del AttentionInterface._global_mapping["own"]
    assert seen == [(2, 2, 70, 8)] * 2
    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", own)  # sdpa itself, replaced
    with torch.no_grad():
        answer(model, "LinformerModel")
    assert len(seen) == 4


def test_a_layer_that_is_skipped_at_random_is_skipped():
    class Skipped(modeling.LinformerLayer):
        def forward(self, hidden_states, *given, **more):
            return hidden_states

    model, shallow = build(), build(num_hidden_layers=1)
    shallow.load_state_dict(model.state_dict(), strict=False)
    model.encoder.layer[1].__class__ = Skipped
    with torch.no_grad():
        assert torch.allclose(answer(model, "LinformerModel"), answer(shallow, "LinformerModel"), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("kind", [KINDS["LinformerModel"], BAND], ids=["linear", "band"])
def test_a_subclass_of_the_layer_is_computed_twice_under_checkpointing(kind, reentrant):
    """Forward and, once more, for the backward pass."""

    class Layer(modeling.LinformerLayer):
        def forward(self, hidden_states, *given, **more):
            calls.append(hidden_states.shape)
            return super().forward(hidden_states, *given, **more)

    calls: list = []
    gradients = []
    for kind_of_layer in (modeling.LinformerLayer, Layer):
        model = build(**{"projection_sharing": None, **kind}).train()
        for layer in model.encoder.layer:
            layer.__class__ = kind_of_layer
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads() if reentrant else None
        inner: list = []
        model.encoder.layer[0].intermediate.register_forward_hook(lambda *_, inner=inner: inner.append(1))
        model(**batch()).pooler_output.sum().backward()
        gradients.append(model.encoder.layer[0].output.dense.weight.grad)
        assert len(inner) == 2
    assert calls == [(2, 70, 16)] * 4
    assert torch.allclose(*gradients, atol=1e-6)


def test_weights_of_another_kind_are_not_added_up():
    """int8 weights know a matrix product and little else (torchao)."""

    class Int8(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, given=(), more=None):
            if function is nn.functional.linear:
                states, weight, *bias = given
                return function(states, weight.as_subclass(torch.Tensor), *bias)
            if "__get__" in str(function):
                return super().__torch_function__(function, types, given, more or {})
            raise NotImplementedError(f"{function} of int8 weights")

    head = "LinformerForSequenceClassification"
    wanted, model = answer(build(head), head), build(head)
    ids = batch(head)["input_ids"][:1]
    with torch.no_grad():
        alone = model(ids).logits
        for layer in model.linformer.encoder.layer:
            for linear in (layer.attention.output.dense, layer.attention.output.correction, layer.intermediate.dense):
                linear._parameters["weight"] = linear.weight.detach().as_subclass(Int8)
        assert type(linear.weight) is Int8
        assert torch.allclose(answer(model, head), wanted, atol=1e-5)
        assert torch.allclose(model(ids).logits, alone, atol=1e-5)
