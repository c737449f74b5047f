"""Masking: the shares, what may be chosen, and that masks depend on (seed, epoch, row) and on nothing else."""

import math
import random
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from torch.utils.data import DataLoader

from linformer_hf.data.masking import (
    IGNORE,
    EpochCallback,
    MaskedDataset,
    MaskedStream,
    Masker,
    continues_word,
    pad_collate,
    unigram_baseline,
)


ROWS, LENGTH = 1000, 128


@pytest.fixture(scope="module")
def wordpiece(tokenizers):
    return tokenizers["wordpiece"]


@pytest.fixture(scope="module")
def rows(wordpiece) -> Dataset:
    """Rows of random ordinary tokens between the special ones, with a [SEP] and a [PAD] inside."""
    generator = np.random.default_rng(0)
    ids = generator.integers(5, len(wordpiece), (ROWS, LENGTH))
    ids[:, 0], ids[:, -1], ids[:, 60] = wordpiece.cls_token_id, wordpiece.sep_token_id, wordpiece.sep_token_id
    ids[:, 61] = wordpiece.pad_token_id
    return Dataset.from_dict({"input_ids": ids.tolist()})


def masked(dataset, indices=None) -> dict[int, tuple[list[int], list[int]]]:
    indices = range(len(dataset)) if indices is None else indices
    return {i: (dataset[i]["input_ids"].tolist(), dataset[i]["labels"].tolist()) for i in indices}


def assert_share(hits: int, of: int, share: float) -> None:
    """Within four standard errors: a right implementation fails once in 16,000 draws, and the draw is fixed."""
    assert abs(hits / of - share) <= 4 * math.sqrt(share * (1 - share) / of), f"{hits} of {of} is not {share}"


@pytest.mark.parametrize(("share", "fractions"), [(0.15, (0.8, 0.1, 0.1)), (0.4, (0.5, 0.2, 0.3)), (0.15, (1, 0, 0))])
def test_shares(wordpiece, rows, share, fractions):
    original = np.array(rows["input_ids"])
    batch = MaskedDataset(rows, Masker(wordpiece, 0, share, fractions)).__getitems__(list(range(ROWS)))
    inputs, labels = (np.array([row[key] for row in batch]) for key in ("input_ids", "labels"))
    ordinary = ~np.isin(original, wordpiece.all_special_ids)
    assert ordinary.sum() > 100_000
    chosen = labels != IGNORE
    assert_share(int(chosen.sum()), int(ordinary.sum()), share)
    as_mask = chosen & (inputs == wordpiece.mask_token_id)
    changed = chosen & (inputs != original) & ~as_mask
    same = chosen & (inputs == original)
    lucky = 1 / (len(wordpiece) - len(wordpiece.all_special_ids))  # a random token may be the one that stood there
    for part, expected in (
        (as_mask, fractions[0]),
        (changed, fractions[1] * (1 - lucky)),
        (same, fractions[2] + fractions[1] * lucky),
    ):
        assert_share(int(part.sum()), int(chosen.sum()), expected)
    assert not np.isin(inputs[changed], wordpiece.all_special_ids).any()
    if changed.sum() > 20 * len(wordpiece):  # enough to have seen the whole vocabulary
        assert set(inputs[changed]) == set(range(len(wordpiece))) - set(wordpiece.all_special_ids)


def test_special_tokens_are_never_chosen_and_labels_are_the_original_tokens(wordpiece, rows):
    masker = Masker(wordpiece, 1, 0.9)
    for index, ids in enumerate(rows["input_ids"][:100]):
        inputs, labels = masker(ids, 0, index)
        ids = np.array(ids)
        special = np.isin(ids, wordpiece.all_special_ids)
        assert special.sum() == 4
        assert (labels[special] == IGNORE).all()
        chosen = labels != IGNORE
        assert chosen.any()
        assert (labels[chosen] == ids[chosen]).all()
        assert (inputs[~chosen] == ids[~chosen]).all()


def test_the_row_itself_is_left_alone(wordpiece):
    ids = np.full(50, 20)
    Masker(wordpiece, 0, 0.9)(ids, 0, 0)
    assert (ids == 20).all()


def test_masks_do_not_depend_on_order_batch_or_the_way_rows_are_fetched(wordpiece, rows):
    few = rows.select(range(60))
    expected = masked(MaskedDataset(few, Masker(wordpiece, 3)))
    shuffled = list(range(60))
    random.Random(0).shuffle(shuffled)
    dataset = MaskedDataset(few, Masker(wordpiece, 3))
    assert masked(dataset, shuffled) == expected
    fetched = [dataset.__getitems__(shuffled[start : start + 7]) for start in range(0, 60, 7)]
    batched = dict(zip(shuffled, [row for batch in fetched for row in batch], strict=True))
    assert {i: (row["input_ids"].tolist(), row["labels"].tolist()) for i, row in batched.items()} == expected
    stream = enumerate(islice(MaskedStream(Shared(few), Masker(wordpiece, 3)), 60))
    assert {i: (row["input_ids"].tolist(), row["labels"].tolist()) for i, row in stream} == expected
    collate = pad_collate(wordpiece)
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=collate)
        loaded = [
            pair for batch in loader for pair in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]
        assert dict(enumerate(loaded)) == expected


def test_workers_that_live_on_mask_each_epoch_anew(wordpiece, rows):
    dataset = MaskedDataset(rows.select(range(20)), Masker(wordpiece, 3))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        loaded = [(row["input_ids"].tolist(), row["labels"].tolist()) for row in loader]
        assert loaded == list(masked(dataset).values())


def test_another_epoch_seed_or_row_is_masked_otherwise(wordpiece, rows):
    few = rows.select([0] * 20)  # the same text in every row
    dataset = MaskedDataset(few, Masker(wordpiece, 3))
    first = masked(dataset)
    assert len({tuple(labels) for _, labels in first.values()}) == 20
    dataset.set_epoch(1)
    second = masked(dataset)
    other_seed = masked(MaskedDataset(few, Masker(wordpiece, 4)))
    for i in range(20):
        assert first[i][1] != second[i][1]
        assert first[i][1] != other_seed[i][1]
    dataset.set_epoch(0)
    assert masked(dataset) == first


def test_validation_is_masked_once_and_for_all(wordpiece, rows):
    few = rows.select(range(20))
    dataset = MaskedDataset(few, Masker(wordpiece, 3), static=True)
    before = masked(dataset)
    dataset.set_epoch(5)
    assert masked(dataset) == before
    assert len(dataset) == 20


@pytest.mark.parametrize(("epoch", "expected"), [(None, 0), (0, 0), (0.5, 0), (0.9999999, 1), (1, 1), (2.75, 2)])
def test_callback_tells_the_epoch(wordpiece, rows, epoch, expected):
    dataset = MaskedDataset(rows, Masker(wordpiece, 3))
    dataset.set_epoch(7)
    EpochCallback(dataset).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert dataset.epoch == expected


def words_of(tokenizer, text: str) -> list[list[int]]:
    """Places of the tokens of each word: by BERT's own splitting, or by the spaces in the text (byte-level BPE)."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    words: dict[int, list[int]] = {}
    for place, (word, (start, end)) in enumerate(zip(encoded.word_ids(), encoded["offset_mapping"], strict=True)):
        if word is not None:
            spaces = text[:start].count(" ") + text[start:end].count(" ")
            words.setdefault(word if tokenizer.mask_token == "[MASK]" else spaces, []).append(place)
    return list(words.values())


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_words_are_chosen_whole(tokenizers, texts, kind):
    tokenizer = tokenizers[kind]
    text = " ".join((texts / "00.txt").read_text(encoding="utf-8").split())
    ids = tokenizer(text)["input_ids"]
    words = words_of(tokenizer, text)
    assert sum(len(word) > 1 for word in words) >= 40
    assert sorted(place for word in words for place in word) == list(range(1, len(ids) - 1))
    masker, tokens_alone = Masker(tokenizer, 0, whole_word=True), Masker(tokenizer, 0)
    chosen = 0
    for index in range(40):
        labels = masker(ids, 0, index)[1]
        for word in words:
            assert len({labels[place] == IGNORE for place in word}) == 1, tokenizer.decode([ids[i] for i in word])
            chosen += labels[word[0]] != IGNORE
        assert (labels[[0, -1]] == IGNORE).all()
    assert_share(chosen, 40 * len(words), 0.15)
    labels = tokens_alone(ids, 0, 0)[1]
    assert any(len({labels[place] == IGNORE for place in word}) == 2 for word in words)


def test_continuations_by_hand(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    ids = tokenizer("zzq river", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [token.startswith("##") for token in tokens] == continues_word(tokenizer)[ids].tolist()
    tokenizer = tokenizers["byte_level_bpe"]
    ids = tokenizer(" the river", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "Ġthe" in tokens
    assert [not token.startswith("Ġ") for token in tokens] == continues_word(tokenizer)[ids].tolist()


def fake_tokenizer(**changes):
    """What Masker reads of a tokenizer; a class of its own, so that `len` works."""

    class Fake:
        name_or_path, mask_token_id, all_special_ids = "fake", 4, [0, 1, 2, 3, 4]

        def __len__(self):
            return 10

        def convert_ids_to_tokens(self, ids):
            return [f"t{i}" for i in ids]

    fake = Fake()
    for name, value in changes.items():
        setattr(fake, name, value)
    return fake


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="'fake' has no mask token"):
        Masker(fake_tokenizer(mask_token_id=None), 0)


@pytest.mark.parametrize("probability", [0, 1, -0.1, 15])
def test_bad_probabilities_are_refused(probability):
    with pytest.raises(ValueError, match=f"mlm_probability must lie between 0 and 1, got {probability}"):
        Masker(fake_tokenizer(), 0, probability)


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.2, 0.1), (0.25,) * 4, ()])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="mask_fractions must be three shares that sum to 1"):
        Masker(fake_tokenizer(), 0, 0.15, fractions)


def test_whole_words_need_a_vocabulary_that_marks_them():
    with pytest.raises(ValueError, match=r"whole_word_masking needs a WordPiece .* 'fake' is neither"):
        Masker(fake_tokenizer(), 0, whole_word=True)


def test_unigram_baseline_by_hand():
    counts = np.array([0, 5, 1, 0])  # with one added: 1, 6, 2, 1 of 10
    masked_rows = [{"labels": [IGNORE, 1, 2]}, {"labels": np.array([1, IGNORE, 3])}]
    loss = -(2 * math.log(0.6) + math.log(0.2) + math.log(0.1)) / 4
    result = unigram_baseline(counts, masked_rows)
    assert result == {
        "loss": pytest.approx(loss),
        "perplexity": pytest.approx(math.exp(loss)),
        "accuracy": 0.5,
        "masked_tokens": 4,
    }


class Shared:
    """Rows that readers share one by one; `asked` has the readers of this process."""

    def __init__(self, rows):
        self.rows, self.asked = rows, set()

    def share(self, number, of):
        self.asked.add(number)
        return iter(self.rows.select(range(number, len(self.rows), of)))


def drawn_by(rows, masker, readers: int, processes: int, workers: int, batch: int, batches: int):
    """process -> batch -> row: (ids, labels), as accelerate deals a stream out."""
    found = []
    for process in range(processes):
        stream = MaskedStream(rows, masker, readers, process, processes, batch)
        if processes > 1:
            stream = IterableDatasetShard(stream, batch, num_processes=processes, process_index=process)
        loader = DataLoader(stream, batch_size=batch, num_workers=workers, collate_fn=list)
        found.append(
            [[(row["input_ids"].tolist(), row["labels"].tolist()) for row in b] for b in islice(loader, batches)]
        )
    return found


def test_a_stream_is_read_in_order_pass_after_pass(wordpiece, rows):
    few = rows.select(range(51))
    ((*batches,),) = drawn_by(Shared(few), Masker(wordpiece, 3), 1, 1, 0, 6, 17)
    dataset = MaskedDataset(few, Masker(wordpiece, 3))
    passes = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        passes += masked(dataset).values()
    assert [row for batch in batches for row in batch] == passes


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (3, 0), (6, 0), (2, 1), (1, 2), (3, 2)])
def test_a_stream_is_dealt_out_to_processes_and_workers(wordpiece, rows, processes, workers):
    """51 rows for 6 readers: three have a row less than the others, and begin their second pass before them."""
    few, masker, readers, step = rows.select(range(51)), Masker(wordpiece, 3), 6, 12
    ((*alone,),) = drawn_by(Shared(few), masker, readers, 1, 0, step, 9)
    batch, accumulated = (step // processes // max(1, workers)), max(1, workers)
    found = drawn_by(Shared(few), masker, readers, processes, workers, batch, 9 * accumulated)
    for number, wanted in enumerate(alone):  # as many steps for each, with the rows of one process
        taken = [own[number * accumulated : (number + 1) * accumulated] for own in found]
        assert sorted(row for own in taken for batch in own for row in batch) == sorted(wanted)
    seen = [row for own in found for batch in own for row in batch]
    once = masked(MaskedDataset(few, masker)).values()
    assert [seen.count(row) for row in once] == [1] * 51


def test_a_process_reads_the_documents_of_its_own_readers_only(wordpiece, rows):
    for process in range(3):
        shared = Shared(rows.select(range(20)))
        list(islice(MaskedStream(shared, Masker(wordpiece, 3), 6, process, 3, 4), 60))
        assert shared.asked == {process, process + 3}


def test_a_stream_without_rows_for_a_reader_has_an_end(wordpiece, rows):
    with pytest.raises(ValueError, match=r"the stream holds no rows for reader 2 of 3.*Set data.readers"):
        list(islice(MaskedStream(Shared(rows.select(range(2))), Masker(wordpiece, 3), 3), 60))


def test_collator_pads_labels_with_what_the_loss_ignores(wordpiece):
    batch = pad_collate(wordpiece)(
        [
            {"input_ids": np.array([2, 7, 3]), "labels": np.array([IGNORE, 7, IGNORE])},
            {"input_ids": np.array([2, 7, 8, 9, 3]), "labels": np.array([IGNORE] * 5)},
        ]
    )
    assert batch["input_ids"][0].tolist() == [2, 7, 3, wordpiece.pad_token_id, wordpiece.pad_token_id]
    assert batch["labels"][0].tolist() == [IGNORE, 7, IGNORE, IGNORE, IGNORE]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
