"""Passages that a row's vectors must find: how they are drawn, batched, and what the loss is."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import normalize

from linformer_hf.data.masking import DrawnDataset
from linformer_hf.hub.sentence_head import pooled
from linformer_hf.training.passages import (
    Draw,
    PassageCollator,
    Search,
    mean_state,
    pieces_loss,
    search_loss,
    taken,
)


SECTION = Search(weight=1.0, passages=4, shortest=3, longest=12, kept=0.5, pieces=[8])
ROW = [1, *range(100, 220), 2]  # every token once


def drawn(index: int, epoch: int = 0, section: Search = SECTION) -> dict:
    return Draw(section, seed=5)(ROW, epoch, index)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_passages_are_taken_out_or_left_and_their_places_are_right(kept):
    left = total = 0
    for index in range(50):
        section = Search(weight=1.0, passages=4, shortest=3, longest=12, kept=kept, pieces=[8])
        item = drawn(index, section=section)
        row = item["input_ids"]
        assert (row[0], row[-1], len(item["passages"])) == (1, 2, 4)
        for passage, place in zip(item["passages"], item["places"], strict=True):
            inner = passage[1:-1]
            assert (passage[0], passage[-1]) == (1, 2)
            assert 3 <= len(inner) <= 12
            assert inner == list(range(inner[0], inner[0] + len(inner)))  # a stretch of the row
            total += 1
            if inner[0] in row:
                left += 1
                assert row[1 + place] in inner
            else:
                assert not set(inner) & set(row)
                before = [token for token in row[1 : 1 + place] if token != 2]
                assert all(token < inner[0] for token in before)
                assert all(token > inner[-1] for token in row[1 + place : -1])
        inside = [token for passage in item["passages"] for token in passage[1:-1]]
        assert len(inside) == len(set(inside))  # none overlaps with another
        assert sorted({*row, *inside}) == sorted(ROW)  # nothing else is lost
    assert left == {0.0: 0, 1.0: total}.get(kept, left)
    assert kept != 0.5 or 60 < left < 140


def test_a_row_and_an_epoch_have_their_own_draw_and_a_repetition_the_same():
    rows = Dataset.from_dict({"input_ids": [ROW, ROW]})
    moving, still = (DrawnDataset(rows, Draw(SECTION, 5), static=static) for static in (False, True))
    first = moving[0]
    assert first == drawn(0) == moving[0]
    assert moving[1] != first
    for dataset in (moving, still):
        dataset.set_epoch(3)
    assert moving[0] == drawn(0, epoch=3) != first
    assert still[0] == first


def test_a_short_row_gives_fewer_passages_and_keeps_a_quarter():
    for length in range(30):
        section = Search(weight=1.0, kept=0.0, shortest=3, longest=6)
        item = Draw(section, 0)([1, *range(9, 9 + length), 2], 0, length)
        assert len(item["input_ids"]) - 2 >= length / 4
        assert len(item["passages"]) <= length // 4


def test_batches_are_padded_and_what_is_not_the_models_can_be_taken_out(tokenizers):
    collate = PassageCollator(tokenizers["wordpiece"])
    items = [drawn(0), Draw(SECTION, 5)([1, 9, 2], 0, 0), drawn(1)]
    batch = collate(items)
    assert batch["rows"].tolist() == [0] * 4 + [2] * 4  # the short row has no passage
    assert batch["places"].tolist() == items[0]["places"] + items[2]["places"]
    for i, item in enumerate(items):
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == item["input_ids"]
    flat = [passage for item in items for passage in item["passages"]]
    for ids, mask, passage in zip(batch["passages"], batch["passages_mask"], flat, strict=True):
        assert ids[mask == 1].tolist() == passage
    found = taken(batch)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert set(found) == {"passages", "passages_mask", "rows", "places", "piece"}
    assert "passages" not in taken(collate(items[1:2]))


def written_out(states, mask, passages, found, scale):
    """The three contrasts as loops."""

    def cosine(a, b):
        return scale * float(torch.cosine_similarity(a, b, dim=0))

    real = [row[keep == 1] for row, keep in zip(states, mask, strict=True)]
    whole = [row.mean(0) for row in real]
    size, owner, total = found["piece"], found["rows"].tolist(), 0.0
    pieces = [(i, start // size, row[1:-1][start : start + size].mean(0)) for i, row in enumerate(real)
              for start in range(0, len(row) - 2, size)]  # fmt: skip
    for m, (row, place) in enumerate(zip(owner, found["places"].tolist(), strict=True)):
        to_rows = [cosine(passages[m], vector) for vector in whole]
        total += math.log(sum(map(math.exp, to_rows))) - to_rows[row]
        others = [cosine(passages[j], whole[row]) for j in range(len(owner)) if j == m or owner[j] != row]
        total += 0.5 * (math.log(sum(map(math.exp, others))) - to_rows[row])
        last = max(number for i, number, _ in pieces if i == row)
        scores = [cosine(passages[m], vector) for _, _, vector in pieces]
        right = [(i, number) for i, number, _ in pieces].index((row, min(place // size, last)))
        total += math.log(sum(map(math.exp, scores))) - scores[right]
    return total / len(owner)


def test_the_loss_is_the_three_contrasts_written_out():
    torch.manual_seed(0)
    states = torch.randn(3, 21, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, 17:] = 0
    mask[2, :5] = 0  # padding on the left
    passages = torch.randn(5, 6, dtype=torch.float64)
    found = {"rows": torch.tensor([0, 0, 1, 2, 2]), "places": torch.tensor([0, 15, 7, 8, 13]), "piece": 4}
    loss = search_loss(states, mask, passages, found, 7.0)
    assert float(loss.detach()) == pytest.approx(written_out(states.detach(), mask, passages, found, 7.0), rel=1e-9)
    loss.backward()
    assert not states.grad[mask == 0].any()
    assert states.grad[mask == 1].any(-1).all()
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "max"])
def test_vectors_are_what_the_folder_makes_of_states(mode):
    """One token alone learns where one token is read; the pieces of such a folder have no vector."""
    torch.manual_seed(0)
    head = pooled(mode, 6)
    states, mask = torch.randn(2, 12, 6), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    states.requires_grad_()
    found = {"rows": torch.tensor([0, 1]), "places": torch.tensor([0, 4]), "piece": 4}
    passages = torch.randn(2, 6)
    assert head.reads_one_token == (mode != "max")
    loss = search_loss(states, mask, passages, found, 7.0, head, not head.reads_one_token)
    loss.backward()
    learned = [set(row.any(-1).nonzero().flatten().tolist()) for row in states.grad]
    whole = torch.nn.functional.normalize(head(states.detach(), mask), dim=-1)
    scores = 7.0 * torch.nn.functional.normalize(passages, dim=-1) @ whole.T
    two = torch.nn.functional.cross_entropy(scores, found["rows"])
    two = two + 0.5 * torch.nn.functional.cross_entropy(scores.T, found["rows"])
    if mode == "max":
        assert float(loss.detach()) > float(two)
    else:
        assert learned == ([{0}, {0}] if mode == "cls" else [{11}, {8}])
        torch.testing.assert_close(loss.detach(), two)


def test_finding_is_rewarded():
    """Rows that are their own passages' vectors have nearly no loss; rows that are another's have much."""
    vectors = torch.eye(3, dtype=torch.float32)
    passages, mask = vectors.repeat_interleave(2, 0), torch.ones(3, 10)
    found = {"rows": torch.arange(3).repeat_interleave(2), "places": torch.zeros(6, dtype=torch.long), "piece": 64}
    right = search_loss(vectors[:, None].expand(-1, 10, -1), mask, passages, found, 20.0)
    wrong = search_loss(vectors.roll(1, 0)[:, None].expand(-1, 10, -1), mask, passages, found, 20.0)
    assert float(right) < 1e-4
    assert float(wrong) > 20


class Blended:
    """A teacher whose states are of each token and, half as much, of all that is read with it."""

    def __init__(self):
        self.table = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))

    def __call__(self, ids, attention_mask):
        states = self.table[ids]
        return SimpleNamespace(last_hidden_state=states + 0.5 * mean_state(states, attention_mask)[:, None])


def pieces_by_hand(teacher, ids: list[int], states: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    loss, means = torch.zeros(()), []
    for size in sizes:
        inner, mean = ids[1:-1], torch.zeros(6)
        for start in range(0, len(inner), size - 2):
            piece = inner[start : start + size - 2]
            read = torch.tensor([[ids[0], *piece, ids[-1]]])
            goal = normalize(teacher(read, torch.ones_like(read)).last_hidden_state[0].mean(0), dim=0)
            own = states[1 + start : 1 + start + len(piece)].mean(0)
            share = len(piece) / len(inner)
            loss = loss + share * (1 - torch.cosine_similarity(own, goal, dim=0)) / len(sizes)
            mean = mean + share * goal
        means.append(normalize(mean, dim=0))
    return loss + 1 - torch.cosine_similarity(states.mean(0), torch.stack(means).mean(0), dim=0)


def test_the_pieces_loss_is_what_it_says_and_leaves_short_rows_out():
    teacher, sizes = Blended(), [8, 12]
    generator = torch.Generator().manual_seed(2)
    lengths = [31, 12, 23]  # the second is no longer than a piece
    ids = torch.randint(3, 60, (3, 31), generator=generator)
    mask = torch.arange(31).flip(0) < torch.tensor(lengths)[:, None]  # padding on the left
    states = torch.randn(3, 31, 6, generator=generator).requires_grad_()
    found = pieces_loss(teacher, ids, states, mask, sizes)
    rows = [(ids[i, -n:].tolist(), states[i, -n:]) for i, n in enumerate(lengths)]
    by_hand = sum(pieces_by_hand(teacher, *rows[i], sizes) for i in (0, 2)) / 3
    torch.testing.assert_close(found, by_hand)
    found.backward()
    assert states.grad[1].eq(0).all()
    assert states.grad[~mask].eq(0).all()
    short = pieces_loss(teacher, ids[1:2], states[1:2], mask[1:2], sizes)
    assert short == 0
    assert short.requires_grad
    with_pieces, without = (pieces_loss(teacher, ids, states, mask, sizes, with_pieces=told) for told in (True, False))
    assert with_pieces > without > 0


def test_mean_state_leaves_padding_out():
    states = torch.tensor([[[1.0], [3.0], [9.0]]], dtype=torch.bfloat16)
    mean = mean_state(states, torch.tensor([[1, 1, 0]]))
    assert (mean.item(), mean.dtype) == (2.0, torch.float32)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"weight": -1}, "search.weight must be at least 0, got -1"),
        ({"passages": 0}, "search.passages must be above 0, got 0"),
        ({"shortest": 9, "longest": 8}, "search.longest=8 is below search.shortest=9"),
        ({"kept": 1.5}, "from 0 to 1; got 1.5"),
        ({"pieces": []}, "at least one size"),
        ({"pieces": [0]}, "at least 1 token"),
    ],
)
def test_a_bad_section_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        Search(**values)
