"""Ranks, probes and intervals, on vectors whose scores are known."""

import numpy as np
import pytest
import torch

from linformer_hf.evaluation import scores
from linformer_hf.evaluation.scores import Score, interval, nearest_piece, one_vector, probe, ranks, resampled, search
from linformer_hf.evaluation.tasks import Task


def searching(*documents: int) -> Task:
    return Task("search", "", ["text"] * 12, [("query", document) for document in documents])


def test_the_rank_is_how_many_stand_before():
    nearness = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert ranks(nearness, torch.tensor([1, 2, 0])).tolist() == [0, 1, 2]


def test_the_same_vector_for_all_finds_nothing():
    assert ranks(torch.ones(2, 12), torch.tensor([0, 5])).tolist() == [11, 11]


def test_a_perfect_encoder_finds_all_and_a_turned_one_nothing():
    task = searching(0, 3, 3, 7, 11)
    documents = torch.eye(12)
    queries = documents[[document for _, document in task.queries]]
    found = search(task, queries @ documents.T)
    assert {name: score.mean for name, score in found.items()} == {"first": 1.0, "among ten": 1.0}
    assert found["first"].units.tolist() == [0, 3, 3, 7, 11]
    worst = search(task, -queries @ documents.T)
    assert {name: score.mean for name, score in worst.items()} == {"first": 0.0, "among ten": 0.0}


def test_among_ten_are_ten():
    nearness = -torch.arange(12.0)[None].repeat(12, 1)
    found = search(searching(*range(12)), nearness)
    assert found["first"].values.tolist() == [1] + [0] * 11
    assert found["among ten"].values.tolist() == [1] * 10 + [0] * 2


def test_a_document_is_as_near_as_its_nearest_piece():
    pieces = [torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 1.0]])]
    found = nearest_piece(torch.tensor([[0.0, 5.0], [1.0, 1.0]]), pieces)
    half = 0.5**0.5
    assert torch.allclose(found, torch.tensor([[1.0, half], [half, 1.0]]))


def test_one_vector_is_the_whole_or_the_mean_of_the_pieces():
    pieces = [torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0]])]
    half = 0.5**0.5
    assert torch.allclose(one_vector({"16": pieces}), torch.tensor([[half, half], [0.0, 1.0]]))
    assert torch.allclose(one_vector({"16": pieces, "whole": [torch.ones(1, 2)]}), torch.tensor([[half, half]]))


def classes(groups: int = 6, each: int = 4) -> Task:
    labels = [f"class {g % 2}" for g in range(groups) for _ in range(each)]
    return Task("probe", "", ["text"] * len(labels), [], labels, [f"g{g}" for g in range(groups) for _ in range(each)])


def test_a_perfect_encoder_is_classified_without_error():
    task = classes()
    vectors = torch.tensor([[1.0, 0.0] if label == "class 0" else [0.0, 1.0] for label in task.labels])
    found = probe(task, vectors + 0.01 * torch.randn(vectors.shape), range(3))["accuracy"]
    assert found.mean == 1.0
    assert len(set(found.units)) == 6


def test_what_tells_the_group_and_not_the_class_is_worth_nothing():
    """With documents of a group on both sides of a fold this would be learned by heart."""
    task = classes(groups=12)
    torch.manual_seed(0)
    vectors = torch.eye(12).repeat_interleave(4, 0) + 0.01 * torch.randn(48, 12)
    assert probe(task, vectors, range(3))["accuracy"].mean < 0.7


def test_no_group_is_on_both_sides(monkeypatch):
    import sklearn.model_selection

    real, seen = sklearn.model_selection.StratifiedGroupKFold, []

    class Spy(real):
        def split(self, features, labels, groups):
            for train, test in super().split(features, labels, groups):
                seen.append((set(groups[train]), set(groups[test]), self.random_state))
                yield train, test

    monkeypatch.setattr(sklearn.model_selection, "StratifiedGroupKFold", Spy)
    task = classes(groups=8)
    probe(task, torch.randn(32, 3), [4, 5])
    assert {seed for _, _, seed in seen} == {4, 5}
    for train, test, _ in seen:
        assert train
        assert test
        assert not train & test
    assert all(set.union(*(test for _, test, seed in seen if seed == one)) == set(task.groups) for one in (4, 5))


def test_the_bootstrap_of_known_data():
    """One value a unit: the resampled means have the mean and the standard error of the data."""
    values = np.array([0.0] * 50 + [1.0] * 50)
    score, other = Score(values, np.arange(100)), Score(np.zeros(100), np.arange(100))
    drawn = resampled(score, other, (0, 1))
    assert len(drawn) == scores.RESAMPLES
    assert drawn.mean() == pytest.approx(0.5, abs=0.005)
    assert drawn.std() == pytest.approx(0.05, rel=0.05)
    low, high = interval(drawn)
    assert (low, high) == (pytest.approx(0.40, abs=0.015), pytest.approx(0.60, abs=0.015))
    assert np.array_equal(drawn, resampled(score, other, (0, 1)))
    assert not np.array_equal(drawn, resampled(score, other, (0, 2)))


def test_units_are_drawn_whole():
    """Ten alike values in each of ten units are ten observations, not a hundred."""
    values = np.repeat([0.0] * 5 + [1.0] * 5, 10)
    alike = resampled(
        Score(values, np.repeat(np.arange(10), 10)), Score(values * 0, np.repeat(np.arange(10), 10)), (0,)
    )
    assert alike.std() == pytest.approx(0.5 / 10**0.5, rel=0.05)


def test_a_unit_counts_as_often_as_it_has_values():
    units = np.array([5, 5, 5, 9])
    drawn = resampled(Score(np.array([1.0, 1, 1, 0]), units), Score(np.zeros(4), units), (0,))
    assert set(np.round(drawn, 3)) == {0.0, 0.75, 1.0}


def test_pairs_stay_together():
    values = np.random.default_rng(0).random(30)
    drawn = resampled(Score(values + 0.1, np.arange(30)), Score(values, np.arange(30)), (0,))
    assert drawn == pytest.approx(0.1)


def test_what_is_blended_lies_half_way_and_keeps_the_length():
    one, other = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 4.0], [1.0, 0.0]])
    (found,) = scores.blended([one], [other])
    torch.testing.assert_close(found, torch.tensor([[3 / 2**0.5, 3 / 2**0.5], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="shorter"):
        scores.blended([one], [])
