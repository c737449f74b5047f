"""Read a pretrained encoder, BERT's kin or an official fairseq Linformer, as a Linformer's configuration and weights.

`read_source` loads and renames; nothing is approximated here. `exact_twin` gives the source's own function as a
Linformer with K = N, whose every query sees every token; `shortened` gives the Linformer with K < N.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..hub.sentence_head import SentenceHead, SentenceHeadError
from ..utils import checksums
from .key_tables import Family, dropped, rename


logger = logging.getLogger(__name__)

POSITIONS = "embeddings.position_embeddings.weight"
WORDS = "embeddings.word_embeddings.weight"
FIRST_FEED_FORWARD = "encoder.layer.0.intermediate.dense.bias"


class ConversionError(ValueError):
    """A source that cannot be converted; the message says why and what could be."""


@dataclass
class Source:
    """A pretrained encoder in a Linformer's terms.

    Attributes:
        name: what the user called it.
        architecture: the source's class.
        head: our class without `Linformer`: `Model`, `ForMaskedLM`, ...
        config: fields of LinformerConfig, without those of the projection.
        projection: for a fairseq Linformer, its projection's fields; else empty, and K is free.
        weights: our names -> tensors; E and F are among them for a fairseq Linformer.
        reference: the source's own model in evaluation mode; None for fairseq.
        tokenizer: None where a fairseq checkpoint came without one.
        sentence: what makes vectors of its states, where that is to come along.
    """

    name: str
    architecture: str
    head: str
    config: dict[str, Any]
    projection: dict[str, Any]
    weights: dict[str, torch.Tensor]
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    sentence: SentenceHead | None = None

    @property
    def length(self) -> int:
        """N, the longest input."""
        return self.config["max_position_embeddings"]

    @property
    def reach(self) -> int:
        """Tokens that it was last trained to read: what a sentence encoder's settings say, if that is less than N."""
        told = self.sentence.length if self.sentence else None
        return min(told, self.length) if told and told > 3 else self.length

    @property
    def with_pooler(self) -> bool:
        return any(name.startswith(("pooler.", "linformer.pooler.")) for name in self.weights)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """What transformers raises, as one line that names the source."""
    try:
        yield
    except ConversionError:
        raise
    except SentenceHeadError as error:
        way_out = "--sentence-head none converts the encoder alone, --sentence-head mean puts a pooling behind it."
        raise ConversionError(f"{error} {way_out}") from error
    except Exception as error:  # damaged files set off anything, bare Exceptions included
        reason = " ".join(str(error).split())
        way_out = checksums.safer(name, reason)
        raise ConversionError(f"the source {name!r} cannot be loaded: {reason[:400]}{way_out}") from error


def rename_all(name: str, state: dict[str, torch.Tensor], family: Family, head: str) -> dict[str, torch.Tensor]:
    with_pooler = any("pooler." in key for key in state) and bool(family.pooler)
    renamed, leftover = rename(state, family.table(head, with_pooler))
    added = {theirs: ours for theirs, ours in family.added(head).items() if theirs in state}
    leftover = [key for key in leftover if not (dropped(key, family) or key in added or key.endswith("position_ids"))]
    if leftover:
        raise ConversionError(f"{name}: {names_listed('weights have no place', leftover)}")
    weights = {ours: state[theirs].detach() for theirs, ours in renamed.items()}
    for theirs, ours in added.items():
        weights[ours] = weights[ours] + state[theirs][0]
    return weights


def names_listed(title: str, names: Any) -> str:
    names = sorted(names)
    return (
        f"{title}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}. " if names else ""
    )


def load_source_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        # Where there is no vocabulary at all, transformers makes up a tokenizer of special tokens.
        if set(found.get_vocab().values()) <= set(found.all_special_ids):
            raise ValueError("it holds no vocabulary")
    except Exception as error:  # as in `explained`
        raise ConversionError(
            f"no tokenizer can be loaded from {name!r} ({' '.join(str(error).split())[:200]}). Name one with "
            "--tokenizer."
        ) from error
    return found


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the model {vocab_size}: they do "
            "not belong together. Name the model's own with --tokenizer."
        )
