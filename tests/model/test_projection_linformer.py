"""Windows and matrices that shorten a sequence: small cases by hand, and the two ways of naming a window agree."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny_config

from linformer_hf.projection_linformer import LinformerProjection, adaptive_slots, slot_edges
from linformer_hf.tokens_linformer import RealTokens


def projection(**options) -> LinformerProjection:
    made = LinformerProjection(tiny_config(**options))
    made.initialize()
    return made


def whole(length: int) -> RealTokens:
    return RealTokens.from_mask(None, length, torch.device("cpu"))


@pytest.mark.parametrize(
    ("length", "slots", "boundary", "expected"),
    [
        (3, 4, False, [0, 1, 2]),  # no more tokens than slots: one each
        (10, 4, False, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),  # floor(4 p / 10)
        (10, 4, True, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]),  # the first and the last are alone
        (5, 4, True, [0, 1, 1, 2, 3]),
    ],
)
def test_windows_by_hand(length, slots, boundary, expected):
    assert adaptive_slots(whole(length), slots, boundary).tolist() == [expected]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(3, 12), st.booleans())
def test_edges_are_those_of_the_windows(lengths, slots, boundary):
    width = max(*lengths, 1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = RealTokens.from_mask(mask, width, mask.device)
    slot = adaptive_slots(tokens, slots, boundary).expand(len(lengths), -1)
    edges = slot_edges(torch.tensor(lengths), slots, boundary)
    for row, length in enumerate(lengths):
        sizes = torch.bincount(slot[row, :length], minlength=slots).tolist()
        assert edges[row].diff().tolist() == sizes
        assert (edges[row, 0].item(), edges[row, -1].item()) == (0, length)
        inner = sizes[1:-1] if boundary and length > slots else sizes[: min(length, slots)]
        assert max(inner, default=0) - min(inner, default=0) <= 1  # windows are as even as they can be


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"projection_sharing": "headwise"}, (2, 5, 20)),
        ({"projection_sharing": "key_value"}, (1, 5, 20)),
        ({"projection_sharing": "none"}, (2, 2, 5, 20)),
        ({"projection_type": "conv", "projection_sharing": "headwise"}, (2, 4, 16)),
        ({"projection_type": "dense_conv", "projection_sharing": "headwise"}, (2, 4, 16, 16)),
        ({"projection_type": "dense_conv", "projection_sharing": "none"}, (2, 2, 4, 8, 8)),
        ({"projection_type": "dense_conv", "projected_length": 8, "local_window": 1}, (1, 4, 16, 16)),
        ({"projection_type": "gated_pool"}, (2, 16)),
        ({"projection_type": "max_pool"}, None),
    ],
)
def test_the_weight_has_the_shape_that_the_class_promises(options, shape):
    weight = projection(**options).weight
    assert shape == (None if weight is None else tuple(weight.shape))


def test_the_largest_of_a_window_is_taken_of_real_tokens_and_an_empty_slot_is_zero():
    pool = projection(projection_type="max_pool", projected_length=3)
    x = torch.tensor([[-3.0, -1.0, -2.0, 9.0]])[..., None]
    mask = torch.tensor([[True, True, True, False]])
    tokens = RealTokens.from_mask(mask, 4, mask.device)
    assert pool.max_pool(x, tokens, torch.tensor([[0, 0, 2, 2]])).flatten().tolist() == [-1.0, 0.0, -2.0]


def test_rows_of_e_that_start_as_means_are_shut_where_a_text_does_not_reach():
    made = projection(projection_init="mean_pool")  # E: 5 windows of 4 columns
    assert made.unreached_bias(whole(20), torch.float32) is None
    assert made.unreached_bias(whole(17), torch.float32) is None
    bias = made.unreached_bias(whole(9), torch.float32).flatten()  # tokens 0 to 8 reach the windows 0, 1 and 2
    assert (bias < 0).tolist() == [False, False, False, True, True]


def test_gates_start_at_zero_or_so_that_a_normalised_token_has_gates_of_deviation_two():
    sizes = {"projection_type": "gated_pool", "projection_sharing": None, "hidden_size": 256}
    for start in (None, "mean_pool"):
        assert not projection(projection_init=start, **sizes).weight.any()
    made = projection(projection_init="normal", **sizes, num_attention_heads=64)
    states = torch.nn.functional.layer_norm(torch.randn(500, 256, generator=torch.Generator().manual_seed(0)), (256,))
    assert (states @ made.weight.T).std().item() == pytest.approx(2, rel=0.03)


def test_heads_that_start_at_offsets_begin_with_one_token_of_each_window():
    """Four heads, windows of 2 tokens: heads 0 and 2 begin with the first, heads 1 and 3 with the second."""
    sizes = {"num_attention_heads": 4, "projected_length": 10, "projection_init": "offsets"}
    e = projection(**sizes, projection_sharing="none").weight
    first = torch.arange(0, 20, 2)
    for head in range(4):
        assert torch.equal(e[:, head], torch.eye(20)[first + head % 2].expand(2, -1, -1))
    offset = torch.arange(16) // 4 % 2  # of every channel
    taps = projection(**sizes, projection_type="conv").weight
    assert torch.equal(taps, torch.stack([offset == 0, offset == 1]).float()[None])
    dense = projection(**sizes, projection_type="dense_conv").weight
    assert torch.equal(dense, torch.diag_embed(taps))
    own = projection(**sizes, projection_type="dense_conv", projection_sharing="none").weight
    for head in range(4):
        assert torch.equal(own[:, head, head % 2], torch.eye(4).expand(2, -1, -1))
        assert not own[:, head, 1 - head % 2].any()


def test_offsets_stay_inside_windows_of_unequal_size():
    e = projection(
        num_attention_heads=4, projected_length=7, projection_sharing="none", projection_init="offsets"
    ).weight
    starts = [-(-s * 20 // 7) for s in range(8)]  # 3 3 3 3 3 3 2 tokens
    for head in range(4):
        places = [start + head % (end - start) for start, end in pairwise(starts)]
        assert e[0, head].nonzero().tolist() == [[s, place] for s, place in enumerate(places)]
