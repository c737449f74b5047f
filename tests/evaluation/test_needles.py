"""Hidden sentences: where they are, how long the documents are, and what is asked."""

import pytest

from linformer_hf.evaluation import needles
from linformer_hf.evaluation.needles import hidden, needle, passkey
from linformer_hf.evaluation.tasks import Sizes


LENGTHS = (160, 320, 640)


@pytest.fixture
def sizes(tokenizers, monkeypatch):
    topics = [(f"t{i}", f"the keeper of number {i} walked over the river " * 30 + "*" * 400) for i in range(3)]
    monkeypatch.setattr(needles, "python_topics", lambda: topics)
    return Sizes(tokenizers["wordpiece"], needle_lengths=LENGTHS)


def test_every_document_has_its_length_and_its_sentences_at_the_same_depths(sizes):
    tasks = needle(12, sizes)
    assert [task.length for task in tasks] == list(LENGTHS)
    sentences = hidden(12, sizes)
    depths = []
    for task in tasks:
        for text, pair in zip(task.texts, sentences, strict=True):
            assert text.count(pair["needle"]) == text.count(pair["passkey"]) == 1
            tokens = len(sizes.tokenizer(text)["input_ids"])
            assert task.length - needles.LONGEST_WORD <= tokens <= task.length
            assert "*" not in text
        depths.append(
            [text.index(pair["needle"]) / len(text) for text, pair in zip(task.texts, sentences, strict=True)]
        )
    assert depths[2] == pytest.approx(depths[1], abs=0.25)
    assert min(depths[2]) < 0.3
    assert max(depths[2]) > 0.6


def test_one_document_answers_a_query(sizes):
    for task in (needle(40, sizes)[0], passkey(40, sizes)[0]):
        assert [document for _, document in task.queries] == list(range(40))
        assert len({query for query, _ in task.queries}) == 40
    asked = [query for query, _ in needle(40, sizes)[0].queries]
    for pair, query in zip(hidden(40, sizes), asked, strict=True):
        assert query == f"Who keeps {pair['needle'].split(' keeps ')[1][:-1]}?"
        assert pair["passkey?"] == f"What is the pass key for {pair['needle'].split(' from ')[0]}?"


def test_needles_and_keys_share_their_documents_and_are_drawn_by_the_seed(sizes, tokenizers):
    assert [task.texts for task in needle(6, sizes)] == [task.texts for task in passkey(6, sizes)]
    other = Sizes(tokenizers["wordpiece"], needle_lengths=LENGTHS, seed=1)
    assert needle(6, other)[0].texts != needle(6, sizes)[0].texts


def test_more_documents_than_names_are_refused(sizes):
    with pytest.raises(ValueError, match="101 documents are more than there are names for, 100"):
        needle(101, sizes)
