"""Where the real tokens stand, and what is refused, on batches that fit on a line."""

import pytest
import torch

from linformer_hf.tokens_linformer import (
    RealTokens,
    at_least,
    check_range,
    check_shape,
    exact,
    holds,
    ignore_padding,
    readable,
    shut,
)


HOLES = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
CPU = HOLES.device


def numbered() -> torch.Tensor:
    """[3, 5, 1]: 1 to 15, with NaN where no token is real."""
    states = torch.arange(1.0, 16.0).view(3, 5)
    return torch.where(HOLES.bool(), states, torch.nan)[..., None]


def test_places_by_hand():
    tokens = RealTokens.from_mask(HOLES, 5, CPU)
    assert tokens.place[0].tolist() == [0, 0, 1, 1, 2]
    assert tokens.length.tolist() == [3, 1, 0]
    assert tokens.order[0, :3].tolist() == [1, 3, 4]
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in tokens.order.tolist())


def test_rows_of_real_tokens_need_no_mask_and_rows_padded_behind_no_order():
    for mask in (None, torch.ones(2, 4)):
        tokens = RealTokens.from_mask(mask, 4, CPU)
        assert (tokens.mask, tokens.order) == (None, None)
        assert (tokens.place.tolist(), tokens.length.tolist()) == ([[0, 1, 2, 3]], [4])
    tokens = RealTokens.from_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]), 3, CPU)
    assert tokens.order is None
    assert tokens.length.tolist() == [2, 1]


def test_what_stands_at_padding_never_counts_not_even_nan():
    tokens = RealTokens.from_mask(HOLES, 5, CPU)
    assert tokens.select(numbered())[..., 0].tolist() == [[0, 2, 0, 4, 5], [6, 0, 0, 0, 0], [0] * 5]
    assert tokens.to_front(numbered())[..., 0].tolist() == [[2, 4, 5, 0, 0], [6, 0, 0, 0, 0], [0] * 5]
    assert tokens.first(numbered())[:2, 0].tolist() == [2, 6]
    torch.testing.assert_close(tokens.mean(numbered())[:, 0], torch.tensor([11 / 3, 6.0, 0.0]))


def test_a_mean_in_half_precision_is_summed_in_float32():
    tokens = RealTokens.from_mask(None, 4096, CPU)
    mean = tokens.mean(torch.full((1, 4096, 1), 40.0, dtype=torch.float16))  # their sum is beyond float16
    assert (mean.item(), mean.dtype) == (40.0, torch.float16)
    assert [exact(dtype) for dtype in (torch.bfloat16, torch.float64)] == [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_shut_gets_nothing_and_a_row_that_is_shut_whole_is_no_nan(dtype):
    logits = torch.tensor([[0.0, 50.0], [1.0, 2.0]], dtype=dtype)
    where = torch.tensor([[False, True], [True, True]])
    assert shut(logits, where).softmax(-1).tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_numbers_are_read_where_that_is_free_and_a_size_is_at_least_what_is_asked():
    assert readable(HOLES)
    assert not readable(HOLES.to("meta"))
    seen = []
    torch.func.vmap(lambda row: seen.append(readable(row)) or row)(HOLES)
    assert seen == [False]
    assert (holds(3 > 2), holds(torch.tensor(3) < 2)) == (True, False)
    assert (at_least(1, 2), at_least(5, 2), at_least(torch.tensor(1), 2).item()) == (2, 5, 2)


def test_labels_of_padding_are_ignored():
    labels = torch.arange(15).view(3, 5)
    assert ignore_padding(labels, HOLES)[0].tolist() == [-100, 1, -100, 3, 4]
    assert ignore_padding(labels, None) is labels


def test_ids_out_of_range_are_named_with_the_limit():
    for fine in (None, torch.tensor([0, 9]), torch.tensor([], dtype=torch.long), torch.tensor([10]).to("meta")):
        check_range("ids", fine, 10, "the vocabulary")
    with pytest.raises(ValueError, match=r"^ids holds 10, but the vocabulary allows 0 to 9\.$"):
        check_range("ids", torch.tensor([3, 10, 11]), 10, "the vocabulary")
    check_range("labels", torch.tensor([-100, 9]), 10, "the head", ignore_index=-100)
    with pytest.raises(ValueError, match=r"^labels holds -1, but the head allows 0 to 9 or -100 \(ignored\)\.$"):
        check_range("labels", torch.tensor([-100, -1]), 10, "the head", ignore_index=-100)


def test_a_shape_is_one_of_those_that_are_allowed():
    check_shape("labels", None, (2, 3))
    check_shape("labels", torch.ones(3), (2, 3), (3,))
    with pytest.raises(ValueError, match=r"^labels must be of shape \[2, 3\] or \[3\], got \[2\]\.$"):
        check_shape("labels", torch.ones(2), (2, 3), (3,))
