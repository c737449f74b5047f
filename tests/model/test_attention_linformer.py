"""What attention is made of: dropout, the written-out softmax. Attention itself is held against reference.py."""

import math
from functools import partialmethod
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from reference import tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linformer_hf.attention_linformer import LinformerSelfAttention, drop, eager_attention_forward
from linformer_hf.tokens_linformer import RealTokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_its_gradient_has_the_same_mask(rate, dtype):
    torch.manual_seed(0)
    states = torch.ones(1001, 333, dtype=dtype, requires_grad=True)
    dropped = drop(states, rate, training=True)
    kept = dropped != 0
    share = 1 - rate
    spread = math.sqrt(rate * share / states.numel())
    assert abs(kept.float().mean().item() - share) < 5 * spread
    scale = torch.tensor(1 / share, dtype=dtype)
    assert (dropped[kept] - scale).abs().max() <= 2e-3 * scale
    # No element hangs together with its neighbour, and every row has a mask of its own.
    centred = kept.float() - share
    assert abs((centred[:, 1:] * centred[:, :-1]).mean().item()) < 5 * rate * share / math.sqrt(states.numel())
    assert not torch.equal(kept[0], kept[1])
    dropped.sum().backward()
    assert torch.equal(states.grad, dropped.detach())


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    states = torch.randn(50, 40, requires_grad=True)
    torch.manual_seed(3)
    first = drop(states, 0.3, training=True)
    torch.manual_seed(3)
    second = drop(states, 0.3, training=True)
    assert torch.equal(first, second)
    assert not torch.equal(second, drop(states, 0.3, training=True))
    assert drop(states, 0.3, training=False) is states
    assert drop(states, 0.0, training=True) is states
    assert not drop(states, 1.0, training=True).any()


def test_the_written_out_softmax_keeps_float64_on_an_accelerator(monkeypatch):
    seen = []
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype: (seen.append(dtype), softmax(x, dim, dtype=dtype))[1])
    module = torch.nn.Identity().eval()
    for dtype in (torch.float64, torch.float32, torch.float16):
        states = torch.zeros(1, 2, 3, 4, dtype=dtype, device="meta")
        assert eager_attention_forward(module, states, states, states, None, 1.0)[0].dtype == dtype
    assert seen == [torch.float64, torch.float32, torch.float32]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_band_drops_attention_in_training(implementation):
    """Written out there: a share of the map is 0, the rest is larger, and the mean over passes is the whole."""
    model = tiny_model(
        projected_length=8,
        local_window=1,
        projection_sharing="headwise",
        attention_probs_dropout_prob=0.5,
        attn_implementation=implementation,
    )
    attention = model.encoder.layer[0].attention.self
    states = torch.randn(2, 20, model.config.hidden_size)
    tokens = RealTokens.from_mask(None, 20, states.device)
    whole, _ = attention.eval()(states, tokens)
    attention.train()
    torch.manual_seed(0)
    passes = torch.stack([attention(states, tokens)[0] for _ in range(2000)])
    assert (passes[0] - whole).abs().max() > 0.1 * whole.abs().max()
    assert (passes.mean(0) - whole).abs().max() < 6 * passes.std(0).max() / math.sqrt(len(passes))
    if implementation == "eager":
        weights = attention(states, tokens)[1]
        kept = attention.eval()(states, tokens)[1] > 0
        assert 0.4 < (weights[kept] == 0).float().mean() < 0.6


@pytest.mark.parametrize("changed", ["attend of a subclass", "attend of one module", "a registered eager"])
def test_a_band_passes_nobodys_own_attention_by(changed, monkeypatch):
    """The fast way for a band stands in for our attention only."""
    model = tiny_model(projected_length=8, local_window=1, attn_implementation="eager")
    ids = torch.arange(1, 21)[None]
    before = model(ids).last_hidden_state
    module = model.encoder.layer[0].attention.self
    own, calls = LinformerSelfAttention.attend, []

    def attend(self, *given, **more):
        calls.append(given)
        output, weights = own(self, *given, **more)
        return output * 2, weights

    def eager(*given, **more):
        calls.append(given)
        output, weights = eager_attention_forward(*given, **more)
        return output * 2, weights

    if changed == "attend of a subclass":
        module.__class__ = type("Their", (LinformerSelfAttention,), {"attend": attend})
    elif changed == "attend of one module":
        module.attend = MethodType(attend, module)
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "eager", eager)
    after = model(ids).last_hidden_state
    assert calls
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("rows", [1, 3])
def test_a_band_with_few_and_with_many_slots_is_one_attention(rows, monkeypatch):
    """Whether slots are copied for every block: outputs, maps and gradients are the same."""
    found = []
    for copied in (False, True):
        if copied:  # as for somebody's own `attend`
            monkeypatch.setattr(LinformerSelfAttention, "attend", partialmethod(LinformerSelfAttention.attend))
        model = tiny_model(projected_length=8, local_window=1, attn_implementation="eager").double()
        ids = torch.arange(1, 20 * rows + 1).view(rows, 20) % 49 + 1
        output = model(ids, output_attentions=True)
        (output.last_hidden_state.square().sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([output.last_hidden_state, *output.attentions, *gradients])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
