"""Vectors that are kept: what was read is not read again, and nothing is taken for what it is not."""

import pytest
import torch

from linformer_hf.evaluation import vectors
from linformer_hf.evaluation.methods import Method
from linformer_hf.evaluation.vectors import Store


class Counting(Method):
    """A way whose vectors are the text's length, and which fails at a text."""

    name = "counting"

    def __init__(self, weights: int = 0, fails_at: str | None = None, value: float = 1.0):
        self.facts, self.fails_at, self.value = {"weights": weights}, fails_at, value
        self.reads_queries, self.seen = self, []

    def read(self, text):
        if text == self.fails_at:
            raise KeyboardInterrupt
        self.seen.append(text)
        return {"whole": torch.full((1, 3), len(text) * self.value), "16": torch.ones(len(text), 3) * self.value}


TEXTS = ["a", "bbb", "cc"]


def test_what_comes_out_is_what_went_in(tmp_path):
    store, method = Store(tmp_path / "v"), Counting()
    store.fill([(method, TEXTS)])
    found = store.get(method, TEXTS)
    for i, text in enumerate(TEXTS):
        fresh = method.read(text)
        assert {key: kept[i].tolist() for key, kept in found.items()} == {k: v.tolist() for k, v in fresh.items()}


def test_an_interrupted_evaluation_goes_on_without_reading_again(tmp_path):
    store = Store(tmp_path)
    jobs = [TEXTS, ["d", "e"]]
    method = Counting(fails_at="e")
    with pytest.raises(KeyboardInterrupt):
        store.fill([(method, texts) for texts in jobs])
    assert len(list(tmp_path.iterdir())) == 1  # and nothing half
    again = Counting()
    store.fill([(again, texts) for texts in jobs])
    assert again.seen == ["d", "e"]
    store.fill([(again, texts) for texts in jobs])
    assert again.seen == ["d", "e"]


def test_a_file_that_cannot_be_written_is_not_left_half(tmp_path, monkeypatch):
    def fails(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(vectors, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        Store(tmp_path).fill([(Counting(), TEXTS)])
    assert not list(tmp_path.iterdir())


def test_other_weights_and_other_texts_are_read_anew(tmp_path):
    store, method, other = Store(tmp_path), Counting(), Counting(weights=1, value=2.0)
    store.fill([(method, TEXTS), (method, TEXTS)])
    assert method.seen == TEXTS
    store.fill([(other, TEXTS), (method, TEXTS[:2])])
    assert (other.seen, method.seen) == (TEXTS, TEXTS + TEXTS[:2])
    assert store.get(other, TEXTS)["whole"][0].tolist() == [[2.0] * 3]
    assert store.get(method, TEXTS)["whole"][0].tolist() == [[1.0] * 3]


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="counting gives vectors that are not finite"):
        Store(tmp_path).fill([(Counting(value=float("nan")), TEXTS)])
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path):
    store, method = Store(tmp_path), Counting()
    store.fill([(method, TEXTS)])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"is damaged .* Delete it"):
        store.get(method, TEXTS)
