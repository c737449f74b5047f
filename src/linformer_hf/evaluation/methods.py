"""Ways from a document to vectors: the source on its beginning or on pieces, and one pass over all of it.

Letters: n tokens of a document, p pieces of it, C wide. A way's `read` gives `whole`, the document's one vector [1, C],
or the vectors of its pieces of so many tokens, `pieces` [p, C], or both. Pieces of S tokens are cut at the same places
by every way: S - 2 tokens of the text in a row, since a piece that is encoded alone has two special tokens as well.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.huggingface import read_source
from ..conversion.shorten import exact_twin
from ..conversion.sources import Source
from ..utils.files import loading


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


def weights_sum(model: torch.nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 of weights and configuration."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def describe(model: PreTrainedModel) -> str:
    """What of a model its vectors hang on; where it was loaded from is no part of it."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    return weights_sum(model, config)


class PiecesAlone(Method):
    """The source as sentence-transformers runs it, on each piece of so many tokens.

    Args:
        encoder: a SentenceTransformer.
        first: how the queries are read; without it this is it: the first piece alone, as `whole`.
    """

    def __init__(self, encoder: Any, tokenizer: PreTrainedTokenizerBase, size: int, first: Method | None = None):
        self.encoder, self.tokenizer, self.size, self.first = encoder, tokenizer, size, first is None
        self.name = "first" if self.first else f"pieces-{size}"
        self.facts = {"pieces alone": size, "first": self.first, "weights": weights_sum(encoder, {})}
        self.reads_queries = first or self

    @torch.no_grad()
    def read(self, text: str) -> Vectors:
        cut = self.tokenizer(text, truncation=True, max_length=self.size, return_overflowing_tokens=not self.first)
        rows = [cut["input_ids"]] if self.first else cut["input_ids"]
        found = []
        for start in range(0, len(rows), BATCH):
            batch = self.tokenizer.pad({"input_ids": rows[start : start + BATCH]}, return_tensors="pt")
            found.append(self.encoder(dict(batch))["sentence_embedding"])
        return {WHOLE if self.first else str(self.size): torch.cat(found)}


class OnePass(Method):
    """An encoder's one pass over all of a document: the mean of its last states, and the means over its pieces."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, sizes: Sequence[int]
    ):
        self.name, self.model, self.tokenizer, self.length, self.sizes = name, model.eval(), tokenizer, length, sizes
        self.facts = {"one pass": length, "pieces": list(sizes), "weights": describe(model)}
        self.reads_queries = OnePass(name, model, tokenizer, length, ()) if sizes else self

    @torch.no_grad()
    def read(self, text: str) -> Vectors:
        ids = self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt")["input_ids"]
        states = self.model(ids).last_hidden_state[0]  # [n, C]
        inner = states[1:-1] if len(states) > 2 else states
        return {WHOLE: states.mean(0, keepdim=True)} | {
            str(size): torch.stack([piece.mean(0) for piece in inner.split(size - 2)]) for size in self.sizes
        }


def read_models(source: Source, models: Mapping[str, str], length: int, sizes: Sequence[int]) -> list[Method]:
    """The named encoders, float32.

    Raises:
        ValueError: one cannot be loaded, reads less than `length` tokens, or has another vocabulary than the source.
    """
    assert source.tokenizer is not None
    found: list[Method] = []
    for name, place in models.items():
        with loading(place):
            model = AutoModel.from_pretrained(place, dtype=torch.float32, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        reads = model.config.max_position_embeddings
        if reads < length:
            raise ValueError(
                f"models.{name}: {place!r} reads {reads:,} tokens, the documents have up to {length:,}. Convert it "
                f"with --max-length {length}, or set evaluate.length={reads}."
            )
        if tokenizer.get_vocab() != source.tokenizer.get_vocab():
            raise ValueError(
                f"models.{name}: {place!r} has another vocabulary ({len(tokenizer):,} tokens) than the source "
                f"{source.name!r} ({len(source.tokenizer):,}), so their pieces cannot be compared. Name what was "
                "converted from this source, or its own source."
            )
        found.append(OnePass(name, model, tokenizer, reads, sizes))
    return found


def read_source_methods(name: str, length: int, sizes: Sequence[int], full: bool) -> tuple[Source, list[Method]]:
    """The source, and what it does by itself: its beginning, its pieces and, if asked, full attention over all.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: it cannot be loaded, or reads less than a piece.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            "`evaluate` runs the source as sentence-transformers does, which is not installed: pip install "
            "'linformer_hf[ecosystem]'"
        ) from None
    source = read_source(name)
    if source.tokenizer is None or source.reference is None:
        raise ValueError(f"the source {name!r} is a Linformer already: name the encoder that its rivals' pieces need.")
    if max(sizes) > source.length:
        raise ValueError(f"pieces of {max(sizes)} tokens are more than the source {name!r} reads, {source.length}.")
    with loading(name):
        encoder = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
    encoder.eval()
    first = PiecesAlone(encoder, source.tokenizer, source.length)
    found: list[Method] = [first, *(PiecesAlone(encoder, source.tokenizer, size, first) for size in sizes)]
    if full:
        twin = exact_twin(source, length, "repeat").base_model
        found.append(OnePass("full", twin, source.tokenizer, length, sizes))
    return source, found
