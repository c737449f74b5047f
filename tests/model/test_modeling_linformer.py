"""The laws of the model: it is the paper's formula, padding does not exist for it, and what is saved is what it was."""

import copy
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    BANDS,
    LEARNED,
    SHAPES,
    SHARINGS,
    TYPES,
    VARIANTS,
    add_noise,
    encode_row,
    name_of,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from linformer_hf import (
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)
from linformer_hf.configuration_linformer import POOLED_TYPES
from linformer_hf.modeling_linformer import LM_BIAS
from linformer_hf.tokens_linformer import RealTokens


HEADS = (
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerForQuestionAnswering,
    LinformerForMultipleChoice,
)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=name_of)
each_type = pytest.mark.parametrize("kind", TYPES, ids=name_of)
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, still attached to the model, so that gradients flow to them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def logits_of(output) -> torch.Tensor:
    return output.start_logits if "start_logits" in output else output.logits


def projection_weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(model).items() if name.endswith("projection.weight")}


def head_inputs(head) -> dict[str, torch.Tensor]:
    ids, types, mask = tiny_batch()
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    if head is LinformerForMultipleChoice:
        return {name: tensor[:4].view(2, 2, -1) for name, tensor in inputs.items()}
    return inputs


# The formula


@each_variant
def test_model_equals_the_reference_in_outputs_and_gradients(variant):
    model = tiny_model(**variant).double()  # nothing on the way is float32
    ids, types, mask = tiny_batch()
    names, parameters = zip(*model.named_parameters(), strict=True)
    output = model(ids, mask, types, output_hidden_states=True)
    weigh = torch.randn(len(ids), ids.shape[1], model.config.hidden_size, dtype=torch.float64)
    ours, theirs = 0, 0
    for row, real in enumerate(mask.bool()):
        states = encode_row(model.config, tensors_of(model), ids[row][real], types[row][real])
        for layer, expected in enumerate(states):
            torch.testing.assert_close(output.hidden_states[layer][row][real], expected, atol=1e-11, rtol=1e-11)
        ours = ours + (output.last_hidden_state[row][real] * weigh[row][real]).sum()
        theirs = theirs + (states[-1] * weigh[row][real]).sum()
    gradients = torch.autograd.grad(ours, parameters, allow_unused=True)
    expected_gradients = torch.autograd.grad(theirs, parameters, allow_unused=True)
    for name, gradient, expected in zip(names, gradients, expected_gradients, strict=True):
        assert (gradient is None) == (expected is None) == name.startswith("pooler"), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@each_shape
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-1), (torch.float16, 1e-2)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_equal_the_reference_in_every_dtype(shape, dtype, tolerance, attention):
    """Tolerances are relative errors of a row's states (Frobenius norm); measured maxima: 3e-6, 9e-2, 9e-3."""
    model = tiny_model(**shape).to(dtype)
    model.set_attn_implementation(attention)
    ids, types, mask = tiny_batch()
    with torch.no_grad():
        output = model(ids, mask, types).last_hidden_state
        assert output.dtype == dtype
        tensors = {name: tensor.double() for name, tensor in tensors_of(model).items()}
        for row, real in enumerate(mask.bool()):
            expected = encode_row(model.config, tensors, ids[row][real], types[row][real])[-1]
            assert (output[row][real] - expected).norm() <= tolerance * expected.norm()


def test_non_uniform_projected_length_reaches_every_layer():
    model = tiny_model(projected_length=[10, 4], projection_sharing="headwise")
    model.set_attn_implementation("eager")
    ids, types, mask = tiny_batch()
    output = model(ids, mask, types, output_attentions=True)
    assert [attention.shape[-1] for attention in output.attentions] == [10, 4]
    for row, real in enumerate(mask.bool()):
        expected = encode_row(model.config, tensors_of(model), ids[row][real], types[row][real])[-1]
        torch.testing.assert_close(output.last_hidden_state[row][real], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_bias_comes_after_compression_as_in_the_official_code(sharing):
    """K' = (E X) W_K + b_K on a full row: with random E this differs from E (X W_K + b_K), row sums not being 1."""
    model = tiny_model(projection_sharing=sharing, num_hidden_layers=1).double()
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.key.bias.mul_(20)
        attention.value.bias.mul_(20)
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    weight = next(iter(projection_weights(model).values()))
    projection = attention.projection or model.encoder.projection
    keys, values, bias = projection(x, attention.key, attention.value, RealTokens.from_mask(None, 20, x.device))
    assert bias is None
    for which, (short, linear) in enumerate(((keys, attention.key), (values, attention.value))):
        for head in range(2):
            e = weight[which, head] if sharing == "none" else weight[min(which, len(weight) - 1)]
            columns = slice(8 * head, 8 * head + 8)
            expected = (e @ x) @ linear.weight[columns].T + linear.bias[columns]
            torch.testing.assert_close(short[:, head], expected)


def bert_twin(**overrides) -> tuple[BertModel, LinformerModel]:
    """A random BERT and a Linformer with its weights, float64."""
    torch.manual_seed(0)
    config = tiny_config(**overrides)
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    bert = BertModel(BertConfig(**fields)).eval().double()
    for name, parameter in bert.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = LinformerModel(config).eval().double()
    if config.projection_type == "gated_pool" or config.length_correction:
        add_noise(model)  # gates and corrections, which start at zero
    missing, unexpected = model.load_state_dict(bert.state_dict(), strict=False)
    assert all(name.endswith("projection.weight") or "correction" in name for name in missing)
    assert not [name for name in unexpected if not name.endswith("position_ids")]
    return bert, model


def assert_same_on_padded_batches(bert: BertModel, model: LinformerModel, length: int) -> None:
    ids, types, mask = tiny_batch(length)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = bert(ids, mask, types, places)
        output = model(ids, mask, types)
    real = mask.bool()
    torch.testing.assert_close(output.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-6, rtol=1e-6)
    first_is_real = mask[:, 0].bool()  # BERT pools column 0, whatever stands there
    torch.testing.assert_close(
        output.pooler_output[first_is_real], expected.pooler_output[first_is_real], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["linear", "fixed"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_identity_projection_is_bert_on_padded_batches(kind, sharing):
    options = {"projection_type": kind, "projection_sharing": sharing, "projection_init": "mean_pool"}
    bert, model = bert_twin(projected_length=20, **options)
    for weight in projection_weights(model).values():  # windows of one token
        assert torch.equal(weight, torch.eye(20, dtype=weight.dtype).expand_as(weight))
    for length in (20, 13, 1):
        assert_same_on_padded_batches(bert, model, length)


@pytest.mark.parametrize("kind", ["mean_pool", "max_pool"])
@pytest.mark.parametrize("options", [{}, {"log_count_bias": True}, {"boundary_slots": True}], ids=name_of)
@pytest.mark.parametrize("length", [3, 7, 8])
def test_pooled_types_are_full_attention_up_to_k_tokens(kind, options, length):
    bert, model = bert_twin(projection_type=kind, projected_length=8, **options)
    assert_same_on_padded_batches(bert, model, length)


GATED = [
    {"projection_type": "gated_pool", **options}
    for options in (
        {"projected_length": 8},
        {"projected_length": 8, "boundary_slots": True},
        {"projected_length": 8, "local_window": 1},
        {"projected_length": 8, "local_window": 2},
        {"projected_length": 9, "local_window": 2, "boundary_slots": True},
    )
]


BANDED = [
    {"projection_type": kind, "projected_length": 8, "local_window": 2}
    for kind in ("linear", "fixed", "conv", "dense_conv", "mean_pool", "max_pool")
]


@pytest.mark.parametrize("options", GATED + BANDED, ids=name_of)
@pytest.mark.parametrize("length", [3, 7, 8])
def test_gates_and_bands_are_full_attention_up_to_k_tokens(options, length):
    bert, model = bert_twin(length_correction=True, **options)
    assert_same_on_padded_batches(bert, model, length)


@pytest.mark.parametrize("options", GATED + BANDED, ids=name_of)
def test_rows_of_at_most_k_tokens_are_full_attention_inside_a_longer_batch_too(options):
    """Every length up to K, on the right, on the left and scattered, next to a row of N > K tokens."""
    bert, model = bert_twin(length_correction=True, **options)
    k, n = options["projected_length"], 20
    rows = [torch.arange(length) + start for length in range(1, k + 1) for start in (0, n - length)]
    rows += [torch.randperm(n)[:length].sort().values for length in range(1, k + 1)]
    mask = torch.zeros(len(rows) + 1, n, dtype=torch.long)
    for row, places in enumerate(rows):
        mask[row, places] = 1
    mask[-1] = 1
    ids = torch.randint(1, 50, mask.shape)
    with torch.no_grad():
        expected = bert(ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state
        output = model(ids, mask).last_hidden_state
    real = mask[:-1].bool()
    torch.testing.assert_close(output[:-1][real], expected[:-1][real], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output[-1], expected[-1], atol=1e-2)


@pytest.mark.parametrize("boundary", [False, True])
def test_gates_of_zero_are_mean_pool_with_the_count_of_tokens(boundary):
    """Where every token of a window weighs the same, the entropy is the logarithm of their number."""
    gated = tiny_model(projection_type="gated_pool", boundary_slots=boundary)
    pooled = tiny_model(projection_type="mean_pool", log_count_bias=True, boundary_slots=boundary)
    state = gated.state_dict()
    for name in list(state):
        if name.endswith("projection.weight"):
            state.pop(name).zero_()  # zeroes the model's gates: a state dict shares its tensors
    pooled.load_state_dict(state)
    ids, types, mask = tiny_batch()
    for real in (mask.bool(), torch.ones_like(mask).bool()):
        output, expected = (model(ids, real, types).last_hidden_state for model in (gated, pooled))
        torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=1e-5)


def test_gates_that_are_the_query_keep_the_attention_of_their_window():
    """With p the softmax of q k, a slot weighs what its tokens do together and holds their mix: exact attention."""
    model = tiny_model(projection_type="gated_pool", num_hidden_layers=1).double()
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    query = torch.randn(2, 8, dtype=torch.float64)  # one query for each head, whatever the token
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.query.bias.copy_(query.flatten())
        key_maps = attention.key.weight.view(2, 8, 16)
        attention.projection.weight.copy_(torch.einsum("hd,hdc->hc", query, key_maps) / math.sqrt(8))
        output, _ = attention(x, RealTokens.from_mask(None, 20, x.device))
        keys, values = (linear(x)[0].view(20, 2, 8).transpose(0, 1) for linear in (attention.key, attention.value))
        share = (torch.einsum("hd,hnd->hn", query, keys) / math.sqrt(8)).softmax(-1)
    full = torch.einsum("hn,hnd->hd", share, values).flatten()
    torch.testing.assert_close(output[0], full.expand(20, -1))


def test_gates_far_apart_have_finite_gradients():
    """Gates of +-1e4 choose one token of a window; loss scaling makes the gradients large. No 0 * inf on the way."""
    model = tiny_model(projection_type="gated_pool", local_window=1)
    for weight in projection_weights(model).values():
        weight.data.mul_(1e4)
    ids, _, mask = tiny_batch()
    (model(ids, mask).last_hidden_state[mask.bool()].square().sum() * 2**16).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "length_correction" in shape], ids=name_of)
def test_the_length_correction_is_the_same_with_and_without_a_mask(shape):
    """Rows of one length share one product, W + (1 - K / l) W'; a padded row of that length has two."""
    model = tiny_model(**shape)
    for length in (4, 13, 19):
        ids, _, _ = tiny_batch(length)
        alone = model(ids).last_hidden_state
        padded = torch.cat([ids, ids[:, :1]], dim=1)
        mask = torch.ones_like(padded)
        mask[:, -1] = 0
        torch.testing.assert_close(model(padded, mask).last_hidden_state[:, :-1], alone, atol=5e-5, rtol=5e-5)


def test_gates_and_corrections_start_at_zero_also_where_a_checkpoint_lacks_them():
    config = tiny_config(projection_type="gated_pool", length_correction=True)
    built = LinformerModel(config)
    kept = {n: t for n, t in built.state_dict().items() if "projection" not in n and "correction" not in n}
    loaded = LinformerModel.from_pretrained(None, config=config, state_dict=kept)
    for model in (built, loaded):
        new = {name: tensor for name, tensor in tensors_of(model).items() if name not in kept}
        assert len(new) == 2 * 3  # of each layer the gates, and weight and bias of the correction
        assert not any(tensor.any() for tensor in new.values())


@pytest.mark.parametrize("kind", ["mean_pool", "max_pool", "conv", "dense_conv", "gated_pool"])
def test_k_equal_to_n_is_bert_on_padded_batches(kind):
    bert, model = bert_twin(projection_type=kind, projected_length=20)
    for weight in projection_weights(model).values() if "conv" in kind else ():
        weight.data.copy_(torch.eye(16) if kind == "dense_conv" else torch.ones(16))  # windows of one token
    assert_same_on_padded_batches(bert, model, 20)


# Padding


@st.composite
def padded_batches(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    width = draw(st.integers(max(lengths), 20))
    sides = [draw(st.sampled_from(["left", "right", "scattered"])) for _ in lengths]
    return lengths, width, sides, draw(st.integers(0, 10**6))


@settings(deadline=None, max_examples=240)
@given(
    batch=padded_batches(),
    shape=st.sampled_from(VARIANTS),
    attention=st.sampled_from(["eager", "sdpa"]),
    junk=st.sampled_from([0.0, 1e4, math.nan, math.inf]),
)
def test_padding_and_neighbours_never_move_a_real_token(batch, shape, attention, junk):
    """Each row alone, unpadded, gives what it gives in any batch, on any side, whatever the padding holds.

    In float64: rounding of another order, inflated by these weights, would otherwise need a loose tolerance.
    """
    lengths, width, sides, seed = batch
    model = tiny_model(**shape).double()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.full((len(lengths), width, 16), junk, dtype=torch.float64)
    types = torch.randint(0, 2, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    rows = []
    for row, (length, side) in enumerate(zip(lengths, sides, strict=True)):
        places = torch.arange(length) + (width - length if side == "left" else 0)
        if side == "scattered":
            places = torch.randperm(width, generator=generator)[:length].sort().values
        rows.append(torch.randn(length, 16, generator=generator, dtype=torch.float64))
        embeddings[row, places] = rows[-1]
        mask[row, places] = 1
    with torch.no_grad():
        together = model(inputs_embeds=embeddings, attention_mask=mask, token_type_ids=types)
        for row, alone in enumerate(rows):
            real = mask[row].bool()
            expected = model(inputs_embeds=alone[None], token_type_ids=types[row][real][None])
            for ours, single in (
                (together.last_hidden_state[row][real], expected.last_hidden_state[0]),
                (together.pooler_output[row], expected.pooler_output[0]),
            ):
                torch.testing.assert_close(ours, single, atol=1e-5, rtol=1e-5)


@each_shape
def test_ids_at_padded_positions_have_no_effect_and_no_gradient(shape):
    model = tiny_model(**shape)
    ids, types, mask = tiny_batch()
    other_ids, other_types, _ = tiny_batch(seed=1)
    real = mask.bool()
    before = model(ids, mask, types).last_hidden_state[real]
    after = model(torch.where(real, ids, other_ids), mask, torch.where(real, types, other_types))
    torch.testing.assert_close(after.last_hidden_state[real], before, atol=0, rtol=0)
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[~real] = math.nan
    embeddings.requires_grad_()
    model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state[real].sum().backward()
    assert embeddings.grad.isfinite().all()
    assert not embeddings.grad[~real].any()


@each_shape
def test_bool_and_float_masks_mean_the_same(shape):
    model = tiny_model(**shape)
    ids, _, mask = tiny_batch()
    expected = model(ids, mask).last_hidden_state
    for other in (mask.bool(), mask.float(), mask.int()):
        torch.testing.assert_close(model(ids, other).last_hidden_state, expected, atol=0, rtol=0)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_without_real_tokens_is_finite_and_leaves_its_neighbours_alone(shape, dtype, attention):
    model = tiny_model(**shape).to(dtype)
    model.set_attn_implementation(attention)
    ids, _, mask = tiny_batch()
    mask[1] = 0
    output = model(ids, mask)
    assert output.last_hidden_state.isfinite().all()
    assert output.pooler_output.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(
            output.last_hidden_state[0], model(ids[:1]).last_hidden_state[0], atol=5e-5, rtol=5e-5
        )
    output.last_hidden_state[mask.bool()].float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_over_nothing_is_the_value_bias(kind, dtype):
    """Law: a row of padding only has X' = 0, so every slot holds b_V; softmax over K equal slots returns it.

    Also where the logits are far below 0: added to the lowest number of float16, they would be -inf for every slot.
    """
    model = tiny_model(num_hidden_layers=1, **kind).to(dtype)
    model.set_attn_implementation("eager")  # sdpa adds up in float32
    torch.nn.init.constant_(model.encoder.layer[0].attention.self.query.bias, -10)
    torch.nn.init.constant_(model.encoder.layer[0].attention.self.key.bias, 10)
    seen = {}
    attention = model.encoder.layer[0].attention
    attention.output.register_forward_pre_hook(lambda module, args: seen.update(mixed=args[0]))
    model(torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long))
    torch.testing.assert_close(seen["mixed"][0], attention.self.value.bias.expand(6, -1))


@pytest.mark.parametrize(("name", "activation"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_the_pooler_reads_the_first_real_token_or_the_mean_of_real_tokens(name, activation):
    ids, types, mask = tiny_batch()
    for pooling in ("cls", "mean"):
        model = tiny_model(classifier_pooling=pooling, pooler_act=name)
        output = model(ids, mask, types)
        for row, real in enumerate(mask.bool()):
            states = output.last_hidden_state[row][real]
            pooled = states[0] if pooling == "cls" else states.mean(0)
            torch.testing.assert_close(output.pooler_output[row], activation(model.pooler.dense(pooled)))


# E and F: how many, where they start, that they stay


@pytest.mark.parametrize(("sharing", "count"), [("none", 288), ("headwise", 24), ("key_value", 12), ("layerwise", 1)])
@pytest.mark.parametrize("kind", ["linear", "fixed"])
def test_number_of_distinct_matrices(sharing, count, kind):
    model = LinformerModel(
        tiny_config(
            projection_type=kind,
            projection_sharing=sharing,
            hidden_size=12,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )
    matrices = [matrix for w in projection_weights(model).values() for matrix in w.detach().view(-1, 5, 20)]
    assert len({tuple(matrix.flatten().tolist()) for matrix in matrices}) == len(matrices) == count


@pytest.mark.parametrize(
    ("sharing", "count"),
    [("none", 18_874_368), ("headwise", 1_572_864), ("key_value", 786_432), ("layerwise", 65_536)],
)
def test_projection_parameters_of_base_size(sharing, count):
    with torch.device("meta"):
        model = LinformerModel(LinformerConfig(projected_length=128, projection_sharing=sharing))
    assert sum(weight.numel() for weight in projection_weights(model).values()) == count


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_two_models_in_one_process_own_their_matrices(kind, sharing):
    first = tiny_model(seed=0, projection_type=kind, projection_sharing=sharing)
    second = tiny_model(seed=1, projection_type=kind, projection_sharing=sharing)
    ids, _, mask = tiny_batch()
    before = second(ids, mask).last_hidden_state
    for name, weight in projection_weights(first).items():
        assert not torch.equal(weight, projection_weights(second)[name])
        weight.data.zero_()
    torch.testing.assert_close(second(ids, mask).last_hidden_state, before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "fixed"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_e_starts_with_the_papers_deviation_and_not_with_the_models(kind, sharing):
    """N(0, 1/K), also where a checkpoint lacks E; fairseq's is overwritten by the model-wide N(0, 0.02^2)."""
    config = tiny_config(
        projection_type=kind,
        projection_sharing=sharing,
        max_position_embeddings=512,
        projected_length=64,
        initializer_range=0.02,
    )
    built = LinformerModel(config)
    without_e = {name: tensor for name, tensor in built.state_dict().items() if "projection" not in name}
    loaded = LinformerModel.from_pretrained(None, config=config, state_dict=without_e)
    for model in (built, loaded):
        for weight in projection_weights(model).values():
            assert weight.std().item() == pytest.approx(1 / 8, rel=0.03)
            assert weight.mean().item() == pytest.approx(0, abs=0.01)
    assert loaded.encoder.layer[0].attention.self.key.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_every_initialisation_starts_as_its_formula_says(kind, sharing):
    """N = 512, K = 64, windows of 8 tokens. A convolution's fan is its kernel of 8 taps (x channels)."""
    sizes = {"max_position_embeddings": 512, "projected_length": 64, "hidden_size": 256, "num_hidden_layers": 1}
    options = {**sizes, "projection_type": kind, "projection_sharing": sharing}

    def started(init: str) -> torch.Tensor:
        (weight,) = projection_weights(LinformerModel(tiny_config(projection_init=init, **options))).values()
        return weight.detach()

    convolution, channels = kind.endswith("conv"), 128 if sharing == "none" else 256
    fan = 8 * (channels if kind == "dense_conv" else 1)
    normal = started("normal")
    assert normal.std().item() == pytest.approx(math.sqrt(1 / fan if convolution else 1 / 64), rel=0.06)
    xavier = started("xavier")
    bound = math.sqrt(6 / (2 * fan if convolution else 512 + 64)) / math.sqrt(2)
    assert 0.97 * bound < xavier.abs().max().item() <= bound * (1 + 1e-6)
    assert xavier.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    windows = torch.full((8, 256), 1 / 8) if convolution else torch.eye(64).repeat_interleave(8, dim=1) / 8
    windows = torch.eye(channels) / 8 if kind == "dense_conv" else windows
    pooled = started("mean_pool")
    assert torch.equal(pooled, windows.expand_as(pooled))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_fixed_matrices_are_saved_buffers(sharing, tmp_path):
    model = tiny_model(projection_type="fixed", projection_sharing=sharing)
    assert not [name for name, _ in model.named_parameters() if "projection" in name]
    assert set(projection_weights(model)) <= set(model.state_dict())
    model.save_pretrained(tmp_path)
    ids, _, mask = tiny_batch()
    torch.manual_seed(99)  # E comes from the file and not from a generator
    reloaded = LinformerModel.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)


@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s["projection_type"] in ("linear", "conv", "dense_conv", "gated_pool")], ids=name_of
)
def test_frozen_projections_do_not_learn_before_and_after_loading(shape, tmp_path):
    free = tiny_model(**shape)
    free.save_pretrained(tmp_path / "free")
    model = LinformerModel.from_pretrained(tmp_path / "free", freeze_projection=True)  # the names are the same
    model.save_pretrained(tmp_path / "frozen")
    ids, _, mask = tiny_batch()
    for frozen in (model, LinformerModel.from_pretrained(tmp_path / "frozen")):
        start = {name: weight.clone() for name, weight in projection_weights(frozen).items()}
        assert start.keys() == projection_weights(free).keys()
        optimizer = torch.optim.AdamW(frozen.parameters(), lr=0.1, weight_decay=0.1)
        frozen(ids, mask).last_hidden_state.square().mean().backward()
        optimizer.step()
        for name, weight in projection_weights(frozen).items():
            assert weight.grad is None
            assert torch.equal(weight, start[name])
            assert torch.equal(weight, projection_weights(free)[name])
    free.train()(ids, mask).last_hidden_state.sum().backward()
    assert all(weight.grad is not None for weight in projection_weights(free).values())


# Saving


@pytest.fixture(scope="module")
def old_names(tmp_path_factory) -> bool:
    """Whether this transformers gives a LayerNorm its old names, gamma and beta, where it saves what it has loaded."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1, "vocab_size": 8}
    folder = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "a")
    BertModel.from_pretrained(folder / "a").save_pretrained(folder / "b")
    return "embeddings.LayerNorm.gamma" in load_file(folder / "b" / "model.safetensors")


@each_shape
def test_save_load_and_save_again_are_byte_equal(shape, tmp_path, old_names):
    model = tiny_model(LinformerForMaskedLM, **shape)
    model.save_pretrained(tmp_path / "a")
    again = LinformerForMaskedLM.from_pretrained(tmp_path / "a").eval()
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json",) if old_names else ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    inputs = head_inputs(LinformerForMaskedLM)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_shared_matrix_exists_once_in_memory_and_in_the_file(tmp_path):
    model = tiny_model(LinformerForMaskedLM, num_hidden_layers=4, projection_sharing="layerwise")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "projection" in name]  # noqa: SIM118 (not a dict)
        assert [(name, file.get_slice(name).get_shape()) for name in names] == [
            ("linformer.encoder.projection.weight", [1, 5, 20])
        ]
    assert list(projection_weights(LinformerForMaskedLM.from_pretrained(tmp_path))) == names


@each_head
def test_every_head_loads_the_body_of_another(head, tmp_path):
    source = tiny_model(LinformerForMaskedLM, projection_sharing="headwise")
    source.save_pretrained(tmp_path)
    body = head.from_pretrained(tmp_path).linformer
    for name, tensor in source.linformer.state_dict().items():
        assert torch.equal(body.state_dict()[name], tensor), name


@pytest.mark.parametrize("model", [*HEADS, LinformerModel])
def test_the_documentation_of_a_class_is_about_this_family(model):
    """transformers writes it, out of templates, and knows the folders of its own models."""
    assert model.__doc__.lstrip().startswith("A Linformer encoder")
    for text in (model.__doc__, model.forward.__doc__):
        assert not re.search(r"The None|None Model|n_positions", text)


def test_auto_classes_know_the_family(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LinformerConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is LinformerModel


# What the library expects of a model


@each_type
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    ids, _, mask = tiny_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(LinformerForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **kind)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(ids, mask, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@each_shape
def test_attention_maps_are_n_by_k_and_their_rows_sum_to_one(shape):
    model = tiny_model(**shape)
    model.set_attn_implementation("eager")
    ids, _, mask = tiny_batch(length=18)
    output = model(ids, mask, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    for attention in output.attentions:
        assert attention.shape == (5, 2, 18, model.config.projected_length)
        torch.testing.assert_close(attention.sum(-1), torch.ones(5, 2, 18))
    if shape["projection_type"] in POOLED_TYPES:  # a single real token: every other slot is empty and gets nothing
        torch.testing.assert_close(output.attentions[0][4, ..., 0], torch.ones(2, 18))
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert isinstance(model(ids, mask, return_dict=False), tuple)


@pytest.mark.parametrize("kind", ["linear", "conv", "mean_pool", "gated_pool"])
@pytest.mark.parametrize("w", [1, 2, 3])
def test_a_query_sees_the_single_tokens_of_its_block_and_of_the_two_beside_it(kind, w):
    """In a row of l > K real tokens the last 3 w columns of the map are those tokens, 0 where they would be outside.

    Of the two slots before them, those count whose window reaches beyond the single tokens; a row of E always does.
    """
    model = tiny_model(projection_type=kind, local_window=w, projected_length=3 * w + 2)
    model.set_attn_implementation("eager")
    ids, _, mask = tiny_batch()
    mask[3, ::2], mask[3, 1::4] = 1, 1  # holes, and 15 real tokens
    with torch.no_grad():
        attentions = model(ids, mask, output_attentions=True).attentions
    for row, real in enumerate(mask.bool()):
        length = int(real.sum())
        if length <= 3 * w + 2:
            continue
        for place, weights in enumerate(attentions[0][row][:, real].unbind(1)):  # [H, K]
            first = (place // w - 1) * w
            exists = torch.tensor([0 <= first + i < length for i in range(3 * w)])
            assert bool((weights[:, 2:][:, ~exists] == 0).all())
            assert bool((weights[:, 2:][:, exists] > 0).all())
            middle = min(10, length) if kind == "conv" else math.ceil(length / 2)  # slot 0 ends here
            covered = torch.tensor(
                [first <= 0 and middle <= first + 3 * w, first <= middle and length <= first + 3 * w]
            )
            assert bool(((weights[:, :2] == 0) == (covered & (kind != "linear"))).all())


@each_shape
def test_embedded_inputs_equal_ids_on_every_position(shape):
    model = tiny_model(**shape)
    ids, types, mask = tiny_batch()
    embeddings = torch.where(mask[..., None].bool(), model.get_input_embeddings()(ids), math.nan)
    embedded = model(inputs_embeds=embeddings, attention_mask=mask, token_type_ids=types)
    torch.testing.assert_close(
        embedded.last_hidden_state, model(ids, mask, types).last_hidden_state, atol=1e-5, rtol=1e-5
    )


def test_explicit_positions_are_used():
    model = tiny_model()
    ids, _, mask = tiny_batch()
    places = mask.cumsum(1) - mask
    expected = model(ids, mask).last_hidden_state
    torch.testing.assert_close(model(ids, mask, position_ids=places).last_hidden_state, expected)
    assert not torch.allclose(model(ids, mask, position_ids=places.flip(1)).last_hidden_state, expected)


def test_resize_token_embeddings_moves_head_labels_and_limits():
    model = tiny_model(LinformerForMaskedLM)
    ids, _, mask = tiny_batch()
    before = model(ids, mask).logits
    model.resize_token_embeddings(53)
    after = model(ids, mask).logits
    assert after.shape[-1] == model.config.vocab_size == 53
    torch.testing.assert_close(after[..., :50], before)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    new = torch.full_like(ids, 52)
    assert model(new, mask, labels=new).loss.isfinite()


@each_shape
@pytest.mark.parametrize("size", [30, 10])
def test_resize_position_embeddings(shape, size, tmp_path):
    model = tiny_model(LinformerForMaskedLM, **shape)
    old = {name: weight.clone() for name, weight in projection_weights(model).items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first, last = (model.get_position_embeddings().weight[i].clone() for i in (0, -1))
    model.resize_position_embeddings(size)
    assert model.config.max_position_embeddings == size
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    positions = model.get_position_embeddings().weight
    assert positions.shape == (size, 16)
    if size > 20:  # stretched, so both ends stay
        torch.testing.assert_close(positions[0], first)
        torch.testing.assert_close(positions[-1], last)
    for name, weight in projection_weights(model).items():
        if shape["projection_type"] == "gated_pool":  # gates read contents and know no places
            assert torch.equal(weight, old[name])
            continue
        along = {"conv": 1, "dense_conv": weight.dim() - 3}.get(shape["projection_type"], -1)
        assert weight.shape[along] == old[name].shape[along] * size // 20
        assert weight.isfinite().all()
    ids, _, mask = tiny_batch(size)
    output = model.eval()(ids, mask).logits
    model.save_pretrained(tmp_path)
    reloaded = LinformerForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(ids, mask).logits, output)
    with pytest.raises(ValueError, match=f"{size + 1} tokens.*{size}"):
        model(torch.ones(1, size + 1, dtype=torch.long))


@pytest.mark.parametrize("size", [40, 30, 10, 7])
@pytest.mark.parametrize("kind", ["linear", "fixed"])
def test_resizing_keeps_the_row_sums_of_e(kind, size):
    model = tiny_model(projection_type=kind, projection_sharing="none", projection_init="mean_pool")
    for weight in projection_weights(model).values():
        weight.data.mul_(torch.linspace(0.5, 3, 5)[:, None])  # row k sums to one of five different numbers
    before = {name: weight.sum(-1) for name, weight in projection_weights(model).items()}
    model.resize_position_embeddings(size)
    for name, weight in projection_weights(model).items():
        torch.testing.assert_close(weight.sum(-1), before[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [40, 30, 10])
def test_resizing_a_convolution_keeps_a_mean_a_mean(size):
    """The kernel of `mean_pool` holds 1 / w at each of its w = N / K taps, whatever N is."""
    for kind, kernel in (("conv", torch.ones(16)), ("dense_conv", torch.eye(16))):
        model = tiny_model(projection_type=kind, projection_init="mean_pool")
        model.resize_position_embeddings(size)
        for weight in projection_weights(model).values():
            torch.testing.assert_close(weight.detach(), (kernel * 5 / size).expand(1, size // 5, *kernel.shape))


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, 4, "projected_length.*max_position_embeddings=4.*got 5"),
        ({"projection_type": "conv"}, 22, "max_position_embeddings=22.*projected_length=5"),
        ({"projection_type": "dense_conv", **BANDS[0]}, 21, "max_position_embeddings=21.*Choose 4, 6, 10 "),
        ({"projection_type": "gated_pool", **BANDS[2]}, 7, "projected_length.*max_position_embeddings=7.*got 8"),
    ],
)
def test_a_refused_resize_leaves_the_model_as_it_was(options, size, message):
    model = tiny_model(**options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.resize_position_embeddings(size)
    assert model.config.max_position_embeddings == 20
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@each_head
@each_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_head_loads_in_every_dtype(head, kind, dtype, tmp_path):
    tiny_model(head, **kind).save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(model).values() if tensor.is_floating_point()} == {dtype}
    logits = logits_of(model.eval()(**head_inputs(head)))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


# Heads


def test_masked_lm_loss_ignores_minus_100():
    model = tiny_model(LinformerForMaskedLM)
    ids, types, mask = tiny_batch()
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    output = model(ids, mask, types, labels=labels)
    kept = (labels != -100) & mask.bool()
    logp = output.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output.loss, -logp[kept].mean())
    torch.testing.assert_close(model(ids, mask, types, labels=labels, num_items_in_batch=7).loss, -logp[kept].sum() / 7)
    assert model(ids, mask, labels=torch.full_like(ids, -100)).loss == 0  # nothing to predict is not NaN


def test_sparse_prediction_changes_the_cost_and_not_the_loss():
    ids, _, mask = tiny_batch()
    labels = torch.where((torch.rand(ids.shape) < 0.3) & mask.bool(), ids, -100)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dense = tiny_model(LinformerForMaskedLM, **quiet).train()
    sparse = tiny_model(LinformerForMaskedLM, sparse_prediction=True, **quiet).train()
    losses = [model(ids, mask, labels=labels) for model in (dense, sparse)]
    torch.testing.assert_close(losses[1].loss, losses[0].loss)
    assert losses[1].logits.shape == ((labels != -100).sum(), 50)
    assert sparse.eval()(ids, mask, labels=labels).logits.shape == (*ids.shape, 50)
    for output in losses:
        output.loss.backward()
    for (name, p), (_, q) in zip(dense.named_parameters(), sparse.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("num_labels", "labels", "formula"),
    [
        (1, torch.randn(5), lambda z, y: (z[:, 0] - y).square().mean()),
        (3, torch.tensor([0, 2, 1, 1, 0]), lambda z, y: -z.log_softmax(-1)[torch.arange(5), y].mean()),
        (
            3,
            torch.tensor([[1.0, 0, 1]] * 5),
            lambda z, y: -(y * z.sigmoid().log() + (1 - y) * (-z).sigmoid().log()).mean(),
        ),
    ],
    ids=["regression", "single label", "multi label"],
)
def test_sequence_classification_losses(num_labels, labels, formula):
    model = tiny_model(LinformerForSequenceClassification, num_labels=num_labels)
    before = model.config.to_dict()
    output = model(**head_inputs(type(model)), labels=labels)
    assert output.logits.shape == (5, num_labels)
    torch.testing.assert_close(output.loss, formula(output.logits, labels))
    assert model.config.to_dict() == before
    items = labels.numel() * 2
    torch.testing.assert_close(
        model(**head_inputs(type(model)), labels=labels, num_items_in_batch=items).loss, output.loss / 2
    )


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.randn(5), "regression"),
        (3, torch.tensor([0, 2, 1, 1, 0]), "single_label_classification"),
        (3, torch.ones(5, 3), "multi_label_classification"),
    ],
)
def test_what_training_s_labels_pose_is_kept_for_the_pipeline(num_labels, labels, problem, tmp_path):
    model = tiny_model(LinformerForSequenceClassification, num_labels=num_labels).train()
    if num_labels > 1:
        with pytest.raises(ValueError, match="labels of shape"):  # and what is refused is not kept
            model(**head_inputs(type(model)), labels=torch.ones(5))
        assert model.config.problem_type is None
    model(**head_inputs(type(model)), labels=labels)
    model.save_pretrained(tmp_path)
    assert LinformerConfig.from_pretrained(tmp_path).problem_type == problem


def test_switching_off_every_dropout_module_leaves_none():
    model = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, initializer_range=0.5).train()
    ids, _, mask = tiny_batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one, other = (model(ids, mask).last_hidden_state for _ in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    inner = model.encoder.layer[0].attention.self
    inner.dropout.p = 0.5
    assert not torch.equal(model(ids, mask).last_hidden_state, one)
    inner.dropout = torch.nn.Sequential(inner.dropout)
    assert not torch.equal(model(ids, mask).last_hidden_state, one)
    inner.dropout = torch.nn.Identity()
    torch.testing.assert_close(model(ids, mask).last_hidden_state, one, rtol=0, atol=0)


def test_problem_type_decides_where_it_is_given():
    labels = torch.randn(5, 3)
    model = tiny_model(LinformerForSequenceClassification, num_labels=3, problem_type="regression")
    output = model(**head_inputs(type(model)), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())
    model = tiny_model(LinformerForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    whole = torch.randint(0, 2, (5, 3))
    output = model(**head_inputs(type(model)), labels=whole)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, whole.float()))


def test_token_classification_loss():
    model = tiny_model(LinformerForTokenClassification, num_labels=4)
    inputs = head_inputs(type(model))
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 4, -100)
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (5, 20, 4)
    logp = output.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output.loss, -logp[labels != -100].mean())


def test_question_answering_loss():
    model = tiny_model(LinformerForQuestionAnswering)
    inputs = head_inputs(type(model))
    start, end = torch.tensor([0, 3, 19, 4, 10]), torch.tensor([1, 25, 19, 15, 10])  # 25: truncated away, ignored
    inputs["attention_mask"][3, 4], inputs["attention_mask"][3, 15] = 1, 0  # and so is 15
    output = model(**inputs, start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (5, 20)
    first = -output.start_logits.log_softmax(-1)[torch.arange(5), start].mean()
    kept = torch.tensor([0, 2, 4])
    second = -output.end_logits.log_softmax(-1)[kept, end[kept]].mean()
    torch.testing.assert_close(output.loss, (first + second) / 2)
    columns = model(**inputs, start_positions=start[:, None], end_positions=end[:, None])
    torch.testing.assert_close(columns.loss, output.loss)
    nothing = model(**inputs, start_positions=torch.full((5,), 20), end_positions=torch.full((5,), 99))
    assert nothing.loss == 0


def test_multiple_choice_loss():
    model = tiny_model(LinformerForMultipleChoice)
    inputs, labels = head_inputs(type(model)), torch.tensor([1, 0])
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (2, 2)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[torch.arange(2), labels].mean())
    body = model.linformer(**{name: tensor.flatten(0, 1) for name, tensor in inputs.items()}).pooler_output
    torch.testing.assert_close(output.logits, model.classifier(body).view(2, 2))


def labels_of(head, length: int = 10) -> dict[str, torch.Tensor]:
    """For two rows, or two rows of two choices."""
    if head is LinformerForQuestionAnswering:
        return {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, length - 1])}
    if head in (LinformerForMaskedLM, LinformerForTokenClassification):
        return {"labels": torch.arange(2 * length).view(2, length) % 2}
    return {"labels": torch.tensor([1, 0])}


@each_head
@pytest.mark.parametrize("path", ["packed", "plain"])
def test_a_loss_does_not_depend_on_padding(head, path):
    """10 real tokens of 100, labels and a choice at padding."""
    model = tiny_model(head, max_position_embeddings=100).double()
    multiple, labels = head is LinformerForMultipleChoice, labels_of(head)
    ids = torch.randint(1, 50, (2, 2, 10) if multiple else (2, 10))
    alone = model(ids, **labels)
    padding = (0, 90, 0, 1) if multiple else (0, 90)
    padded, mask = (F.pad(tensor, padding) for tensor in (ids, torch.ones_like(ids)))
    if labels.get("labels", ids[0, 0]).dim() == 2:
        labels = {"labels": F.pad(labels["labels"], padding, value=1)}
    body = {}
    model.linformer.register_forward_hook(lambda module, args, output: body.update(output))
    together = model(padded, mask, **labels, output_hidden_states=path == "plain")
    torch.testing.assert_close(together.loss, alone.loss)
    assert not body["last_hidden_state"][~mask.flatten(0, -2).bool()].any()
    if head is LinformerForQuestionAnswering:
        for logits in (together.start_logits, together.end_logits):
            assert bool((logits[:, 10:] == torch.finfo(logits.dtype).min).all())
    if multiple:
        assert bool((together.logits[:, 2] == torch.finfo(together.logits.dtype).min).all())
        assert model(padded, mask, labels=torch.tensor([2, 2])).loss == 0
    together.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_head
@each_shape
def test_a_batch_without_rows_works(head, shape):
    model = tiny_model(head, **shape)
    ids = torch.zeros((0, 2, 12) if head is LinformerForMultipleChoice else (0, 12), dtype=torch.long)
    labels = {name: label[:0] for name, label in labels_of(head, 12).items()}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for mask in (None, ids):
            assert model(ids, mask, **labels).loss == 0
            with torch.no_grad():
                assert len(logits_of(model(ids, mask))) == 0


@each_head
@each_type
def test_padding_beyond_n_does_not_count(head, kind):
    """Rows of at most N real tokens in 27 places: on the left, scattered, without any; one row of N."""
    model = tiny_model(head, **kind).double()
    multiple = head is LinformerForMultipleChoice
    ids, types, mask = (F.pad(tensor, (3, 4)) for tensor in tiny_batch())
    mask[4] = 0
    real, rows = mask.bool(), torch.arange(5)[:, None]
    order = torch.arange(27).expand(5, -1).masked_fill(~real, 99).argsort(stable=True)[:, :20]
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    fitting = {name: tensor[rows, order] for name, tensor in inputs.items()}
    fitting["input_ids"] = fitting["input_ids"] * fitting["attention_mask"]
    if multiple:
        inputs, fitting = ({n: t[:4].view(2, 2, -1) for n, t in each.items()} for each in (inputs, fitting))
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    long, short = model(**inputs, **asked), model(**fitting, **asked)
    real, back = real[: 4 if multiple else 5], fitting["attention_mask"].flatten(0, -2).bool()
    for ours, theirs in zip(long.hidden_states, short.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[back])
        assert not ours[~real].any()
    for ours, theirs in zip(long.attentions, short.attentions, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[back])
    if head in (LinformerForSequenceClassification, LinformerForMultipleChoice):
        torch.testing.assert_close(long.logits, short.logits)
    else:
        torch.testing.assert_close(logits_of(long)[real], logits_of(short)[back])
        assert logits_of(long).shape[:2] == (5, 27)


def test_padding_beyond_n_with_embeddings_and_positions():
    model = tiny_model()
    ids, types, mask = tiny_batch(13)
    expected = model(ids, mask, types)
    ids, mask = F.pad(ids, (0, 12)), F.pad(mask, (0, 12))
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    given["token_type_ids"] = F.pad(types, (0, 12))
    for places in (None, (mask.cumsum(1) - mask).clamp(max=19)):
        states, pooled = model(**given, position_ids=places, return_dict=False)
        torch.testing.assert_close(states[:, :13], expected.last_hidden_state)
        torch.testing.assert_close(pooled, expected.pooler_output)
        assert states.shape == (5, 25, 16)
    one_row = model(ids[:1], mask[:1], position_ids=torch.arange(25).clamp(max=19))
    torch.testing.assert_close(one_row.last_hidden_state[:, :13], model(ids[:1, :13]).last_hidden_state)
    with pytest.raises(ValueError, match="21 tokens"):
        model(torch.ones(1, 21, dtype=torch.long), torch.ones(1, 21))
    with pytest.raises(ValueError, match=r"token_type_ids must be.*\[5, 25\].*got \[5, 13\]"):
        model(ids, mask, types)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_one_row_of_token_types_or_positions_stands_for_all_choices(name):
    model = tiny_model(LinformerForMultipleChoice)
    ids = torch.randint(1, 50, (2, 3, 8))
    row = torch.arange(8) if name == "position_ids" else torch.arange(8) // 4
    expected = model(ids, **{name: row.expand(2, 3, 8)}).logits
    for rows in (row, row[None], row[None, None]):
        torch.testing.assert_close(model(ids, **{name: rows}).logits, expected)


def test_float64_is_kept():
    """Losses, the mean and resizing; E, windows and attention are held against the reference above."""
    for head in HEADS:
        model = tiny_model(head, classifier_pooling="mean").double()
        ids = torch.randint(1, 50, (2, 2, 10) if head is LinformerForMultipleChoice else (2, 10))
        assert model(ids, **labels_of(head)).loss.dtype == torch.float64
    for problem, labels in (("regression", torch.rand(2, 2)), ("multi_label_classification", torch.ones(2, 2))):
        model = tiny_model(LinformerForSequenceClassification, problem_type=problem).double()
        assert model(IDS, labels=labels).loss.dtype == torch.float64
    model = tiny_model(classifier_pooling="mean").double()
    output = model(IDS)
    torch.testing.assert_close(
        output.pooler_output, model.pooler.dense(output.last_hidden_state.mean(1)).tanh(), atol=1e-15, rtol=1e-13
    )
    for kind in ("linear", "conv", "dense_conv"):
        model = tiny_model(projection_type=kind).double()
        model.resize_position_embeddings(40)
        for weight in (model.get_position_embeddings().weight, model.encoder.projection.weight):
            assert not torch.equal(weight, weight.float().double())  # more digits than float32 holds


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_has_one_bias_that_resizing_and_saving_keep(tied, tmp_path):
    model = tiny_model(LinformerForMaskedLM, tie_word_embeddings=tied)
    ids, _, mask = tiny_batch()
    model(ids, mask, labels=ids).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in model.state_dict() if "predictions" in name and name.endswith("r.bias")] == [LM_BIAS]
    model.resize_token_embeddings(53)
    expected = model(ids, mask).logits
    model.save_pretrained(tmp_path)
    again, info = LinformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(ids, mask).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_files_with_the_older_names_of_the_bias_load(tied, tmp_path):
    """One name where words were tied; else two, of which the decoder's was the one that counted."""
    model = tiny_model(LinformerForMaskedLM, tie_word_embeddings=tied)
    ids, _, mask = tiny_batch()
    expected = model(ids, mask).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    new = load_file(file)
    old = {**new, "cls.predictions.bias": torch.full((50,), 9.0)}
    if tied:
        old["cls.predictions.bias"] = old.pop(LM_BIAS)
    save_file(old, file, metadata={"format": "pt"})
    again, info = LinformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    other = tiny_model(LinformerForMaskedLM, seed=1, tie_word_embeddings=tied)
    assert not other.load_state_dict(old, strict=False).unexpected_keys  # as Trainer resumes
    for loaded in (again.eval(), other):
        assert torch.equal(loaded(ids, mask).logits, expected)
    again.save_pretrained(tmp_path)
    assert load_file(file).keys() == new.keys()


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards nothing on a CPU")
def test_fsdp2_takes_a_tied_language_model():
    """Groups as accelerate makes them: layers, tied words, the rest. torch refuses a parameter that lies in two."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model(LinformerForMaskedLM)
        ids, _, mask = tiny_batch()
        expected = model(ids, mask, labels=ids).loss
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        words = [model.get_input_embeddings(), model.get_output_embeddings()]
        for module in (*model.linformer.encoder.layer, words, model):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        loss = model(ids, mask, labels=ids).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()


# Bad input: one error that names the value, the limit and the way out


IDS = torch.ones(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids.*inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 16)}, "input_ids.*inputs_embeds"),
        (
            {"input_ids": torch.ones(2, 21, dtype=torch.long)},
            r"21 tokens.*max_position_embeddings=20.*resize_position_embeddings\(21\)",
        ),
        ({"inputs_embeds": torch.zeros(2, 21, 16)}, "21 tokens.*20.*resize_position_embeddings"),
        ({"input_ids": IDS * 50}, "input_ids holds 50.*vocabulary.*0 to 49"),
        ({"input_ids": -IDS}, "input_ids holds -1.*0 to 49"),
        ({"input_ids": IDS, "token_type_ids": 2 * IDS}, "token_type_ids holds 2.*type_vocab_size.*0 to 1"),
        ({"input_ids": IDS, "position_ids": 20 * IDS}, "position_ids holds 20.*max_position_embeddings.*0 to 19"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, r"\[2, 6\].*\[2, 1, 6, 6\].*encoder"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 6, 6)}, r"\[2, 6\].*\[2, 6, 6\].*mixes later tokens"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, r"\[2, 6\].*\[2, 5\]"),
        ({"input_ids": IDS, "attention_mask": torch.full((2, 6), -1e4)}, "attention_mask holds -10000.*1.*0"),
        ({"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 6, 16)}, "encoder_hidden_states.*mixes later"),
        ({"input_ids": IDS, "past_key_values": ()}, "past_key_values.*mixes later"),
        ({"input_ids": IDS, "use_cache": True}, "use_cache.*mixes later"),
        ({"input_ids": IDS, "is_causal": True}, "is_causal.*mixes later"),
        ({"input_ids": IDS, "global_attention_mask": IDS}, "global_attention_mask.*same K slots.*leave it out"),
        ({"input_ids": IDS, "head_mask": torch.ones(2, 2)}, "head_mask.*leave it out"),
        *(
            ({"input_ids": IDS, name: value}, f"{name} tells the documents of one row.*2 rows.*attention_mask")
            for name, value in (("seq_idx", IDS), ("cu_seq_lens_q", IDS[0]), ("cu_seq_lens_k", IDS[0]))
        ),
        ({"input_ids": IDS, "max_length_q": 3}, "max_length_q cannot be used.*give cu_seq_lens_q"),
        ({"input_ids": IDS, "attention_maks": IDS}, "attention_maks is no argument.*is it attention_mask"),
        ({"input_ids": IDS, "attn_mask": IDS}, "attn_mask is no argument.*is it attention_mask"),
        ({"input_ids": IDS, "key_padding_mask": IDS}, "key_padding_mask is no argument.*is it attention_mask"),
        ({"input_ids": IDS, "segment_ids": IDS}, "segment_ids is no argument.*is it token_type_ids"),
        ({"input_ids": IDS, "token_type_id": IDS}, "token_type_id is no argument.*is it token_type_ids"),
    ],
)
def test_bad_inputs_are_refused_with_value_limit_and_way_out(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("head", [LinformerForTokenClassification, LinformerForQuestionAnswering])
def test_labels_of_narrow_types_beside_padding(head, dtype):
    model = tiny_model(head, max_position_embeddings=300).eval()
    mask = torch.ones(2, 300, dtype=torch.long)  # more than uint8 holds
    mask[1, 7:] = 0
    ids, labels = torch.randint(5, 40, (2, 300)), torch.randint(0, 2, (2, 300))

    def loss(kind):
        if head is LinformerForTokenClassification:
            return model(ids, mask, labels=labels.to(kind)).loss
        return model(ids, mask, start_positions=labels[:, 0].to(kind), end_positions=labels[:, 1].to(kind)).loss

    assert torch.equal(loss(dtype), loss(torch.long))


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        (LinformerForMaskedLM, {"labels": 50 * IDS}, "labels holds 50.*0 to 49 or -100"),
        (LinformerForMaskedLM, {"labels": -IDS}, "labels holds -1.*0 to 49 or -100"),
        (LinformerForSequenceClassification, {"labels": torch.tensor([0, 3])}, "labels holds 3.*num_labels=3.*0 to 2"),
        (LinformerForSequenceClassification, {"labels": torch.zeros(2, 2)}, r"\[2, 2\].*num_labels=3.*\[2, 3\]"),
        (LinformerForTokenClassification, {"labels": 3 * IDS}, "labels holds 3.*num_labels=3.*0 to 2"),
        (
            LinformerForQuestionAnswering,
            {"start_positions": torch.tensor([0, -2]), "end_positions": torch.tensor([1, 1])},
            "start_positions holds -2",
        ),
        (
            LinformerForQuestionAnswering,
            {"start_positions": IDS[:, 0], "end_positions": IDS[:, :3]},
            r"end_positions must be of shape \[2\] or \[2, 1\], got \[2, 3\]",
        ),
        (LinformerForTokenClassification, {"labels": IDS.T}, r"labels must be.*\[2, 6\], got \[6, 2\]"),
        (LinformerForTokenClassification, {"labels": IDS.float()}, r"ids of classes.*torch.float32"),
        (LinformerForMaskedLM, {"labels": IDS.T}, r"labels must be.*\[2, 6\], got \[6, 2\]"),
        (LinformerForSequenceClassification, {"labels": IDS[:1, :2]}, r"\[2\] or \[2, 1\], got \[1, 2\]"),
        (LinformerForSequenceClassification, {"labels": torch.zeros(3, 2)}, r"\[3, 2\].*num_labels=3.*\[2, 3\]"),
        (LinformerForSequenceClassification, {"label": IDS[:, 0]}, "label is no argument.*is it labels"),
    ],
)
def test_labels_out_of_range_are_refused(head, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(head, num_labels=3)(IDS, **labels)


def test_choices_out_of_range_are_refused():
    model = tiny_model(LinformerForMultipleChoice)
    with pytest.raises(ValueError, match=r"labels holds 2.*num_choices=2.*0 to 1"):
        model(**head_inputs(type(model)), labels=torch.tensor([0, 2]))


def test_a_problem_type_that_is_none_is_refused_where_the_loss_is_taken():
    """The configuration refuses it too, but not where it is assigned later."""
    model = tiny_model(LinformerForSequenceClassification)
    model.config.problem_type = "single_label_clasification"
    with pytest.raises(ValueError, match=r"problem_type must be.*None, got 'single_label_clasification'"):
        model(IDS, labels=IDS[:, 0])
    model.config.problem_type = "single_label_classification"
    assert model(IDS, labels=IDS[:, 0].int()).loss.isfinite()
    with pytest.raises(ValueError, match=r"ids of classes.*torch.float32"):
        model(IDS, labels=IDS[:, 0].float())


@each_head
def test_arguments_that_change_nothing_are_taken(head):
    model = tiny_model(head)
    inputs = head_inputs(head)
    quiet = {"is_causal": False, "use_cache": False, "seq_idx": None, "output_router_logits": False, "mine": 3}
    output = model(**inputs, **quiet, num_items_in_batch=3, output_attentions=False, return_dict=True)
    assert torch.equal(logits_of(output), logits_of(model(**inputs)))


def test_a_decoder_is_refused_at_the_configuration_of_the_model():
    for name in ("is_decoder", "add_cross_attention"):
        with pytest.raises(ValueError, match=f"{name}.*mixes later tokens"):
            tiny_config(**{name: True})
        config = tiny_config()
        setattr(config, name, True)
        with pytest.raises(ValueError, match=f"{name}.*mixes later tokens"):
            LinformerModel(config)


def test_attributes_set_after_the_configuration_are_checked():
    config = tiny_config()
    config.projected_length = 21
    with pytest.raises(ValueError, match="max_position_embeddings=20, got 21"):
        LinformerModel(config)


@pytest.mark.parametrize("keep", [0, 7, 500])
def test_a_truncated_weights_file_is_refused(keep, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)header|safetensors|incomplete|deserializ"):
        LinformerModel.from_pretrained(tmp_path)


def test_config_json_lists_every_head_and_no_private_state(tmp_path):
    tiny_model(LinformerForMaskedLM).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} | {
        head.__name__.replace("Linformer", "AutoModel") for head in HEADS
    }
    assert not [name for name in config if name.startswith("_")]


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind["projection_type"] in POOLED_TYPES], ids=name_of)
@pytest.mark.parametrize("length", [3, 5, 20])
def test_attention_maps_have_k_columns_for_short_inputs_too(kind, length):
    model = tiny_model(**kind)
    model.set_attn_implementation("eager")
    ids, _, _ = tiny_batch(length)
    for weights in model(ids, output_attentions=True).attentions:
        assert weights.shape == (5, 2, length, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(5, 2, length))
        assert bool((weights[..., length:] == 0).all())
