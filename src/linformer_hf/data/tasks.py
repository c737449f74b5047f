"""Labelled rows for fine-tuning: a table of facts, and the readers behind it.

GLUE hides its test labels, so there (as in the paper) the published validation rows are the test, and validation is a
slice of the training rows. `bible-paraphrase`, `movie-snippets` and `genre` need no Hub. The labels of
`bible-paraphrase` and `genre` are constructed: their numbers never belong beside QQP's or anyone's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


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
PASSAGE_WORDS = 400  # of a passage of `genre`, unless set: 512 tokens and more of most tokenizers


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
                    setattr(self, split, with_labels(rows, [number[label] for label in rows["label"]]))
                return True
        return False


def split_off(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} training rows are too few to cut a slice for validation or test from them.")
    parts = rows.train_test_split(test_size=max(1, round(len(rows) * fraction)), seed=seed)
    return parts["train"], parts["test"]


def with_labels(rows: Dataset, labels: list[int]) -> Dataset:
    return rows.remove_columns("label").add_column("label", labels)


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
