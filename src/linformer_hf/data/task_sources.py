"""Where labelled rows come from: the Hub, files of one's own, the texts of installed packages."""

import math
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from . import tables
from .demo_tasks import bible_paraphrase, genre_task, movie_snippets
from .documents import load_hub
from .tasks import HUB_TASKS, Facts, LoadedTask, TaskData, baselines, split_off, with_labels


_NUMBER = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)


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
        task = bible_paraphrase()
    elif data.task == "genre":
        task = genre_task(data.passage_words)
    elif data.task == "movie-snippets":
        task = movie_snippets(data)
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


def _split_off_by_class(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """As `split_off`, in every class alike. A class keeps a row for training, however rare it is."""
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
    train, validation = split_off(splits["train"], data.validation_fraction, data.seed)
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
    return with_labels(rows, labels)


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
            cut = split_off if data.regression or len(splits["train"]) < 2 else _split_off_by_class
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
        splits[split] = with_labels(rows, [number[label] for label in rows["label"]])
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
