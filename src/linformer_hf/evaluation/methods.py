"""Ways from a document to vectors: the source on its beginning or on pieces, and one pass over all of it.

Letters: n tokens of a document, p pieces of it, C wide. A way's `read` gives `whole`, the document's one vector [1, C],
or the vectors of its pieces of so many tokens, `pieces` [p, C], or both. Pieces of S tokens are cut at the same places
by every way: S - 2 tokens of the text in a row, since a piece that is encoded alone has two special tokens as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..conversion.huggingface import read_source
from ..conversion.shorten import exact_twin
from ..conversion.sources import Source
from ..embedding.encoder import DocumentEncoder


BATCH = 32  # pieces that are encoded together
WHOLE = "whole"
Vectors = Mapping[str, torch.Tensor]  # "whole" or a number of tokens, as text -> [p, C]


class Method:
    """A way from a text to vectors.

    Attributes:
        name: in the tables.
        facts: all that the vectors hang on besides the text, JSON-able: they are kept under its checksum.
        length: the most tokens that it reads; None: any number.
        reads_queries: the way that the queries for its documents are read.
    """

    name: str
    facts: dict[str, Any]
    length: int | None = None
    reads_queries: "Method"

    def read(self, text: str) -> Vectors:
        raise NotImplementedError


class PiecesAlone(Method):
    """The source as sentence-transformers runs it, on each piece of so many tokens.

    Args:
        encoder: the source.
        first: how the queries are read; without it this is it: the first piece alone, as `whole`.
    """

    def __init__(self, encoder: DocumentEncoder, size: int, first: Method | None = None):
        self.model: Any = encoder.model
        self.size, self.first = size, first is None
        self.name = "first" if self.first else f"pieces-{size}"
        self.facts = {"pieces alone": size, "first": self.first, "encoder": encoder.fingerprint()}
        self.reads_queries = first or self

    @torch.inference_mode()
    def read(self, text: str) -> Vectors:
        tokenizer = self.model.tokenizer
        cut = tokenizer(text, truncation=True, max_length=self.size, return_overflowing_tokens=not self.first)
        rows = [cut["input_ids"]] if self.first else cut["input_ids"]
        found = []
        for start in range(0, len(rows), BATCH):
            batch = tokenizer.pad({"input_ids": rows[start : start + BATCH]}, return_tensors="pt")
            found.append(self.model(dict(batch))["sentence_embedding"])
        return {WHOLE if self.first else str(self.size): torch.cat(found)}


class OnePass(Method):
    """An encoder's one pass over all of a document, pooled over all of it and over each piece of so many tokens."""

    def __init__(self, name: str, encoder: DocumentEncoder, sizes: Sequence[int]):
        self.name, self.encoder, self.length = name, encoder, encoder.length
        special = encoder.model.tokenizer.num_special_tokens_to_add()
        self.sizes = {str(size): size - special for size in sizes}
        self.facts = {"one pass": encoder.length, "pieces": list(sizes), "encoder": encoder.fingerprint()}
        self.reads_queries = OnePass(name, encoder, ()) if sizes else self

    def read(self, text: str) -> Vectors:
        (read,) = self.encoder.read([text])
        found = {WHOLE: self.encoder.vectors([read.states], self.encoder.prompt_length)}
        for size, tokens in self.sizes.items():
            parts = self.encoder.pieces(read, tokens)
            found[size] = self.encoder.vectors([read.states[part.first : part.stop] for part in parts])
        return found


def read_models(source: Source, models: Mapping[str, str], length: int, sizes: Sequence[int]) -> list[Method]:
    """The named encoders, float32.

    Raises:
        FileNotFoundError, ValueError: one cannot be loaded, reads less than `length` tokens, or has another vocabulary
            than the source.
    """
    assert source.tokenizer is not None
    found: list[Method] = []
    for name, place in models.items():
        encoder = DocumentEncoder.load(place, "cpu")
        if encoder.length < length:
            raise ValueError(
                f"models.{name}: {place!r} reads {encoder.length:,} tokens, the documents have up to {length:,}. "
                f"Convert it with --max-length {length}, or set evaluate.length={encoder.length}."
            )
        vocabulary = encoder.model.tokenizer.get_vocab()
        if vocabulary != source.tokenizer.get_vocab():
            raise ValueError(
                f"models.{name}: {place!r} has another vocabulary ({len(vocabulary):,} tokens) than the source "
                f"{source.name!r} ({len(source.tokenizer):,}), so their pieces cannot be compared. Name what was "
                "converted from this source, or its own source."
            )
        encoder.check_parts()
        found.append(OnePass(name, encoder, sizes))
    return found


def read_source_methods(name: str, length: int, sizes: Sequence[int], full: bool) -> tuple[Source, list[Method]]:
    """The source, and what it does by itself: its beginning, its pieces and, if asked, full attention over all.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: it cannot be loaded, or reads less than a piece.
    """
    source = read_source(name, sentence="source")
    if source.reference is None:
        raise ValueError(f"the source {name!r} is a Linformer already: name the encoder whose pieces are its rivals.")
    if max(sizes) > source.length:
        raise ValueError(f"pieces of {max(sizes)} tokens are more than the source {name!r} reads, {source.length}.")
    encoder = DocumentEncoder.load(name, "cpu", source.length)
    first = PiecesAlone(encoder, source.length)
    found: list[Method] = [first, *(PiecesAlone(encoder, size, first) for size in sizes)]
    if full:
        whole: Any = DocumentEncoder.load(name, "cpu", source.length).model
        whole[0].model = exact_twin(source, length, "repeat").base_model
        found.append(OnePass("full", DocumentEncoder(whole, length), sizes))
    return source, found
