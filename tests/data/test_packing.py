"""Packing: what goes into rows and what does not, for documents that hypothesis draws."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linformer_hf.data.packing import Packed, pack, split_tokens


CLS, SEP, FIRST = 1, 2, 10  # every token of text is another number from FIRST on
ACROSS = ("full_sentences", "contiguous")
LOSSLESS = (*ACROSS, "doc_sentences")

lengths_of_documents = st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=6), max_size=8)
row_lengths = st.integers(4, 16)


def numbered(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Documents of sentences of these lengths."""
    numbers = itertools.count(FIRST)
    return [[[next(numbers) for _ in range(n)] for n in document] for document in lengths]


def packed(documents, packing: str, length: int) -> tuple[list[list[int]], Packed]:
    counts = Packed()
    return list(pack(documents, packing, length, CLS, SEP, counts)), counts


def text_of(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row if token >= FIRST]


def flat(documents) -> list[int]:
    return [token for document in documents for sentence in document for token in sentence]


@pytest.mark.parametrize("packing", LOSSLESS)
@given(lengths_of_documents, row_lengths)
def test_no_token_is_lost_or_doubled_or_moved(packing, lengths, length):
    documents = numbered(lengths)
    rows, counts = packed(documents, packing, length)
    assert text_of(rows) == flat(documents)
    assert counts.truncated_tokens == 0


@pytest.mark.parametrize("packing", [*LOSSLESS, "document"])
@given(lengths_of_documents, row_lengths)
def test_rows_are_short_enough_and_closed(packing, lengths, length):
    rows, _ = packed(numbered(lengths), packing, length)
    for row in rows:
        assert len(row) <= length
        assert row[0] == CLS
        assert row[-1] == SEP
        assert CLS not in row[1:]
        assert text_of([row]), "a row without text"


@pytest.mark.parametrize("packing", [*LOSSLESS, "document"])
@given(lengths_of_documents, row_lengths)
def test_counts_are_what_is_there(packing, lengths, length):
    documents = numbered(lengths)
    rows, counts = packed(documents, packing, length)
    assert counts == Packed(
        documents=len(documents),
        rows=len(rows),
        tokens=len(flat(documents)),
        row_tokens=sum(map(len, rows)),
        truncated_tokens=len(flat(documents)) - len(text_of(rows)),
    )


@pytest.mark.parametrize("packing", ACROSS)
@given(lengths_of_documents, row_lengths)
def test_a_separator_stands_between_documents_and_nowhere_within_one(packing, lengths, length):
    documents = numbered(lengths)
    rows, _ = packed(documents, packing, length)
    owner = {token: i for i, document in enumerate(documents) for sentence in document for token in sentence}
    stream = [token for row in rows for token in row]
    places = [i for i, token in enumerate(stream) if token >= FIRST]
    for before, after in itertools.pairwise(places):
        gap = stream[before + 1 : after]
        if owner[stream[before]] == owner[stream[after]]:
            assert gap in ([], [SEP, CLS])
        else:  # the boundary's mark, the row's end, or one after the other
            assert gap in ([SEP], [SEP, CLS], [SEP, SEP, CLS])


@given(lengths_of_documents, row_lengths)
def test_full_sentences_cuts_only_what_no_row_can_hold(lengths, length):
    documents = numbered(lengths)
    rows, _ = packed(documents, "full_sentences", length)
    row_of = {token: i for i, row in enumerate(rows) for token in row if token >= FIRST}
    for sentence in itertools.chain.from_iterable(documents):
        if len(sentence) <= length - 2:
            assert row_of[sentence[0]] == row_of[sentence[-1]]
        else:  # starts a row, and fills it
            assert rows[row_of[sentence[0]]][: length - 1] == [CLS, *sentence[: length - 2]]


@given(lengths_of_documents, row_lengths)
def test_full_sentences_closes_a_row_only_when_the_next_sentence_does_not_fit(lengths, length):
    documents = numbered(lengths)
    rows, _ = packed(documents, "full_sentences", length)
    starts = {sentence[0]: len(sentence) for sentence in itertools.chain.from_iterable(documents)}
    openings = {document[0][0] for document in documents}
    for row, following in itertools.pairwise(rows):
        first = following[1]
        if first in starts:  # else the rest of a sentence that was cut
            marked = row[-2] == SEP
            mark = first in openings and not marked
            assert len(row) + mark + starts[first] > length


@given(lengths_of_documents, row_lengths)
def test_doc_sentences_are_full_sentences_of_each_document_alone(lengths, length):
    documents = numbered(lengths)
    rows, _ = packed(documents, "doc_sentences", length)
    assert rows == [row for document in documents for row in packed([document], "full_sentences", length)[0]]


@given(lengths_of_documents, row_lengths)
def test_contiguous_rows_are_full(lengths, length):
    documents = numbered(lengths)
    rows, _ = packed(documents, "contiguous", length)
    openings = {document[0][0] for document in documents}
    for row, following in itertools.pairwise(rows):
        # One short only where a document ends there: its mark would be the row's last token but one, before nothing.
        assert len(row) == length or (len(row) == length - 1 and following[1] in openings)


@given(lengths_of_documents, row_lengths)
def test_document_packing_truncates_and_counts(lengths, length):
    documents = numbered(lengths)
    rows, counts = packed(documents, "document", length)
    assert rows == [[CLS, *flat([document])[: length - 2], SEP] for document in documents]
    assert counts.truncated_tokens == sum(max(0, sum(sizes) - (length - 2)) for sizes in lengths)


def test_an_example_by_hand():
    documents = [[[10, 11], [12, 13, 14]], [[15], [16]], [[17, 18, 19, 20, 21, 22, 23]]]
    rows, _ = packed(documents, "full_sentences", 7)
    assert rows == [[1, 10, 11, 12, 13, 14, 2], [1, 15, 16, 2, 2], [1, 17, 18, 19, 20, 21, 2], [1, 22, 23, 2]]
    rows, _ = packed(documents, "doc_sentences", 7)
    assert rows == [[1, 10, 11, 12, 13, 14, 2], [1, 15, 16, 2], [1, 17, 18, 19, 20, 21, 2], [1, 22, 23, 2]]
    rows, _ = packed(documents, "contiguous", 7)
    assert rows == [[1, 10, 11, 12, 13, 14, 2], [1, 15, 16, 2, 17, 18, 2], [1, 19, 20, 21, 22, 23, 2]]
    rows, _ = packed(documents, "document", 7)
    assert rows == [[1, 10, 11, 12, 13, 14, 2], [1, 15, 16, 2], [1, 17, 18, 19, 20, 21, 2]]


@pytest.mark.parametrize("packing", LOSSLESS)
def test_documents_without_tokens_make_no_rows(packing):
    rows, counts = packed([[], [[]], [[], [10, 11], []], [[]], [[12]]], packing, 16)
    assert text_of(rows) == [10, 11, 12]
    assert (len(rows), counts.documents) == (2 if packing == "doc_sentences" else 1, 5)
    assert packed([[], [[]]], packing, 16)[0] == []


@pytest.mark.parametrize("packing", [*LOSSLESS, "document"])
@pytest.mark.parametrize("length", [-1, 0, 3])
def test_rows_that_hold_next_to_nothing_are_refused(packing, length):
    with pytest.raises(ValueError, match=rf"rows of {length} tokens .* use at least 4"):
        packed([[[10]]], packing, length)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9)))
def test_split_tokens_gives_the_sentences_back(lengths):
    (document,) = numbered([lengths])
    assert list(split_tokens(flat([document]), lengths)) == document


@pytest.mark.parametrize("packing", LOSSLESS)
def test_a_sentence_of_any_length_is_copied_once(packing):
    """Not once for each row that it fills."""

    class Counted(list):
        copied = 0

        def __getitem__(self, index):
            part = Counted(super().__getitem__(index))
            Counted.copied += len(part)
            return part

    sentence = Counted(range(FIRST, FIRST + 10_000))
    rows, _ = packed([[sentence]], packing, 16)
    assert text_of(rows) == list(sentence)
    assert Counted.copied == len(sentence)
