"""Documents of sentences -> rows of at most N tokens, `[CLS] ... [SEP]`, with nothing dropped silently.

- `full_sentences` (RoBERTa's FULL-SENTENCES): whole sentences, across document boundaries, which get a [SEP] of their
  own. A sentence that does not fit starts the next row; one longer than a row is cut, and no token is lost.
- `doc_sentences` (RoBERTa's DOC-SENTENCES): as above, but a row ends where its document does, so that no document reads
  another. Rows differ in length: `training.train_sampling_strategy: group_by_length` wastes less on padding.
- `contiguous`: as `full_sentences`, but sentences are cut at the row's end, so that rows are full (one token less where
  a document's boundary mark would have been all that fits).
- `document`: one row for each document; what does not fit is cut off and counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


Sentence = list[int]


@dataclass
class Packed:
    """What packing did, for the record; every number counts the same split.

    `tokens` are tokens of text, `row_tokens` those that stand in rows (with special tokens), `truncated_tokens` those
    that were cut off.
    """

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    row_tokens: int = 0
    truncated_tokens: int = 0


def split_tokens(ids: list[int], lengths: list[int]) -> Iterator[Sentence]:
    """Cut the flat ids of a document into its sentences."""
    start = 0
    for length in lengths:
        yield ids[start : start + length]
        start += length


def pack(
    documents: Iterable[Iterable[Sentence]], packing: str, length: int, cls: int, sep: int, counts: Packed
) -> Iterator[list[int]]:
    """Rows of at most `length` ids; `counts` is filled while they are drawn."""
    if length < 4:
        raise ValueError(f"rows of {length} tokens hold [CLS], [SEP] and too little text; use at least 4.")
    if packing == "document":
        rows = _documents(documents, length, cls, sep, counts)
    else:
        rows = _across(documents, length, cls, sep, counts, packing)
    for row in rows:
        counts.rows += 1
        counts.row_tokens += len(row)
        yield row


def _documents(
    documents: Iterable[Iterable[Sentence]], length: int, cls: int, sep: int, counts: Packed
) -> Iterator[list[int]]:
    for document in documents:
        ids = [token for sentence in document for token in sentence]
        counts.documents += 1
        counts.tokens += len(ids)
        counts.truncated_tokens += max(0, len(ids) - (length - 2))
        yield [cls, *ids[: length - 2], sep]


def _across(
    documents: Iterable[Iterable[Sentence]], length: int, cls: int, sep: int, counts: Packed, packing: str
) -> Iterator[list[int]]:
    row, room = [cls], length - 1  # one place is kept for the closing [SEP]
    whole = packing != "contiguous"  # sentences are
    for document in documents:
        counts.documents += 1
        # The document boundary; a row that has room for the mark only is closed instead.
        if 1 < len(row) < room - 1 and packing != "doc_sentences":
            row.append(sep)
        elif len(row) > 1:
            yield [*row, sep]
            row = [cls]
        for sentence in document:
            counts.tokens += len(sentence)
            if whole and len(row) > 1 and len(row) + len(sentence) > room:
                yield [*row, sep]
                row = [cls]
            start = 0  # not what is left as a list of its own: a line of 100 MB would be copied row by row
            while start < len(sentence):
                taken = sentence[start : start + room - len(row)]
                row += taken
                start += len(taken)
                if len(row) == room and (start < len(sentence) or not whole):
                    yield [*row, sep]
                    row = [cls]
    if len(row) > 1:
        yield [*row, sep]
