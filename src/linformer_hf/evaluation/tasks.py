"""What a task of an evaluation is, and how its documents are cut and drawn."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase


SHORTEST = 1500  # tokens of a document; the needles' have lengths of their own


@dataclass(frozen=True)
class Sizes:
    """How large tasks are made, and for which tokenizer.

    Args:
        tokenizer: the source's.
        length: most tokens of a document, special tokens included; what is longer is cut, for every method alike.
        words: of a passage of a book or play.
        queries: for each document of a search, if it has as many.
        needle_lengths: tokens of the documents that hide a sentence.
        seed: of all that is drawn.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int = 4096
    words: int = 2500
    queries: int = 4
    needle_lengths: Sequence[int] = (256, 512, 1024, 2048, 4096)
    seed: int = 0
    shortest: int = SHORTEST

    def draw(self, name: str) -> random.Random:
        """A task's own random numbers, which do not hang on the other tasks."""
        return random.Random(f"{self.seed} {name}")


@dataclass(frozen=True)
class Task:
    """Documents, and what is asked of their vectors: either `queries`, or `labels` with `groups`.

    Attributes:
        name: of the recipe.
        about: what the documents and the question are, in words.
        texts: the documents.
        queries: (text, index of the document that answers it).
        labels, groups: of each document; a group is held out whole, and is what is resampled.
        length: tokens of every document, where the task is given at several lengths.
    """

    name: str
    about: str
    texts: list[str]
    queries: list[tuple[str, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    length: int | None = None

    def facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What results.json says of it."""
        tokens = [len(ids) for ids in tokenizer(self.texts, verbose=False)["input_ids"]]
        return {
            "task": self.name,
            "length": self.length,
            "about": self.about,
            "documents": len(self.texts),
            "tokens": {"median": statistics.median(tokens), "lowest": min(tokens), "highest": max(tokens)},
            "queries": len(self.queries),
            "searched_documents": len({document for _, document in self.queries}),
            "classes": {label: self.labels.count(label) for label in dict.fromkeys(self.labels)},
            "groups": len(set(self.groups)),
        }


def cut(text: str, sizes: Sizes) -> str | None:
    """The text's beginning, of at most `sizes.length` tokens and ending with a whole word; None if it is too short."""
    found = sizes.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = sizes.length - sizes.tokenizer.num_special_tokens_to_add()
    ends = [end for _, end in found["offset_mapping"]]
    if len(ends) < sizes.shortest:
        return None
    if len(ends) <= room:
        return text
    end = ends[room - 1]
    return text[:end] if text[end].isspace() else text[:end].rsplit(None, 1)[0]


def passages(text: str, words: int) -> list[str]:
    """All passages of so many words in a row, without overlap; the rest is left out."""
    found = text.split()
    return [" ".join(found[start : start + words]) for start in range(0, len(found) - words + 1, words)]


def probe(
    name: str, about: str, texts: Mapping[str, Mapping[str, Sequence[str]]], documents: int, sizes: Sizes
) -> Task:
    """A task of classes, drawn evenly over the classes and, within a class, over its groups.

    Args:
        texts: class -> group -> documents; those that are too short are left out.
        documents: of all classes together; fewer where a class has not as many.

    Raises:
        ValueError: a class with fewer than two groups that can be held out.
    """
    draw = sizes.draw(name)
    rows: list[tuple[str, str, str]] = []
    for label, groups in texts.items():
        waiting = [(group, draw.sample(list(found), len(found))) for group, found in sorted(groups.items())]
        draw.shuffle(waiting)
        taken: list[tuple[str, str, str]] = []
        wanted = documents // len(texts)
        while len(taken) < wanted and any(found for _, found in waiting):
            for group, found in waiting:
                text = cut(found.pop(), sizes) if found and len(taken) < wanted else None
                if text is not None:
                    taken.append((text, label, group))
        if len({group for _, _, group in taken}) < 2:
            raise ValueError(
                f"{name}: the class {label!r} has documents in {len({group for _, _, group in taken})} group(s); two "
                f"are needed, one to learn from and one to test on. Ask for more than {documents} documents."
            )
        rows += taken
    return Task(name, about, [row[0] for row in rows], [], [row[1] for row in rows], [row[2] for row in rows])
