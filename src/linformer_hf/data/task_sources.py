"""Where labelled rows come from: the Hub, files of one's own, the texts of installed packages."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from . import tables
from .demo_tasks import bible_pairs, bible_paraphrase, genre_task, movie_snippets, word_order
from .documents import load_hub
from .metrics import METRICS, SEQEVAL, baselines, by_rules
from .tables import TableError
from .tasks import KINDS, OF_VECTORS, LoadedTask, TaskData, split_off, split_off_by_class, with_labels


_NUMBER = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)
_NEGATIVE = "negative"
_CONLL = (".conll", ".txt")  # a word and its tags in each line
# What lists under kind: classification, the default, are likely to be.
_OTHER_KINDS = (
    "Set data.kind=multi-label (classes of a text), or data.kind=token-classification (words and their tags)."
)
# By kind: the columns that hold a list in each cell.
_LISTS = {"multi-label": ("label",), "token-classification": ("text", "label"), "multiple-choice": ("pair",)}


@dataclass(frozen=True)
class Facts:
    """What a published task is. Named as in TaskData, which may name others."""

    repository: str
    configuration: str | None
    text_column: str
    pair_column: str | None
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int  # which fits its texts
    test_split: str = "validation"
    kind: str = "classification"
    more_tests: Mapping[str, str] = field(default_factory=dict)  # name -> split


def _glue(name: str, texts: str, labels: str, metrics: str, max_length: int = 128, **more: Any) -> Facts:
    text, _, pair = texts.partition(" ")
    return Facts(
        "nyu-mll/glue", name, text, pair or None, tuple(labels.split()), tuple(metrics.split()), max_length, **more
    )


_RTE = "entailment not_entailment"
HUB_TASKS = {
    "imdb": Facts("stanfordnlp/imdb", None, "text", None, ("negative", "positive"), ("accuracy",), 512, "test"),
    "sst2": _glue("sst2", "sentence", "negative positive", "accuracy"),
    "cola": _glue("cola", "sentence", "unacceptable acceptable", "matthews"),
    "mrpc": _glue("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
    "stsb": _glue("stsb", "sentence1 sentence2", "", "pearson spearman", kind="regression"),
    "qqp": _glue("qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1", 256),
    "mnli": _glue(
        "mnli",
        "premise hypothesis",
        "entailment neutral contradiction",
        "accuracy",
        256,
        test_split="validation_matched",
        more_tests={"mismatched": "validation_mismatched"},
    ),
    "qnli": _glue("qnli", "question sentence", _RTE, "accuracy", 256),
    "rte": _glue("rte", "sentence1 sentence2", _RTE, "accuracy", 256),
    "wnli": _glue("wnli", "sentence1 sentence2", "not_entailment entailment", "accuracy"),
}


def load_task(data: TaskData) -> LoadedTask:
    """Rows of the three splits.

    Raises:
        FileNotFoundError: a file or a package is missing; the message holds the command.
        ValueError: a column is missing, a cell is empty or of another type, a file is not UTF-8, or there is one class
            only.
        ConnectionError: a Hub data set cannot be reached.
    """
    if data.task == "bible-paraphrase":
        task = bible_paraphrase()
    elif data.task == "word-order":
        task = word_order()
    elif data.task == "bible-pairs":
        task = bible_pairs()
    elif data.task == "genre":
        task = genre_task(data.passage_words)
    elif data.task == "movie-snippets":
        task = movie_snippets(data)
    else:
        task = _rows_task(data)
    if data.max_train_rows is not None:
        task.train = task.train.shuffle(seed=data.seed).select(range(min(len(task.train), data.max_train_rows)))
    if data.max_test_rows is not None:
        for name in ("test", *(f"test_{name}" for name in task.more_tests)):
            rows = task.splits[name].shuffle(seed=data.seed)
            task.take({**task.splits, name: rows.select(range(min(len(rows), data.max_test_rows)))})
    task.counts = {f"{split}_rows": len(rows) for split, rows in task.splits.items()}
    for split, count in task.counts.items():
        if not count:
            raise ValueError(f"task {task.name!r} has no rows in its {split.removesuffix('_rows')} split.")
    if task.kind == "classification":
        names = task.label_names or []
        seen = sorted(set(task.train["label"]))
        if len(seen) < 2:
            raise ValueError(
                f"task {task.name!r} has a single class ({', '.join(names[i] for i in seen)}) in its "
                f"{len(task.train):,} training rows: there is nothing to learn. Check "
                f"label_column={data.label_column or 'label'!r}."
            )
        task.baselines = baselines(task.train, task.test, len(names)) | by_rules(task.rules, task.validation, task.test)
    return task


def _facts(data: TaskData) -> tuple[TaskData, Facts | None]:
    """The section, with what is published of its task where it says nothing."""
    facts = HUB_TASKS.get(data.task)
    known = {name: getattr(facts, name) for name in Facts.__dataclass_fields__} if facts else {}
    more: dict[str, Any] = {"kind": data.kind or (facts.kind if facts else "classification")}
    for name in known.keys() & TaskData.__dataclass_fields__.keys() - {"kind"}:
        value = getattr(data, name) or known[name]
        more[name] = list(value) if isinstance(value, tuple) else value
    return replace(data, **more), facts


def _rows_task(data: TaskData) -> LoadedTask:
    data, facts = _facts(data)
    kind = str(data.kind)
    if unknown := [name for name in data.metrics if name not in METRICS[kind]]:
        raise ValueError(f"metrics: {', '.join(unknown)} is none of {', '.join(METRICS[kind])} (kind: {kind}).")
    sources = {"train": data.train_file or data.train_split}
    sources |= {
        name: getattr(data, f"{name}_{'file' if data.train_file else 'split'}") for name in ("validation", "test")
    }
    sources |= {f"test_{name}": split for name, split in (facts.more_tests if facts else {}).items()}
    splits: dict[str, Dataset] = {}
    names: list[str] | None = None
    for split, source in sources.items():
        if source:
            table = _table(data, source)
            splits[split] = _read(data, table)
            if kind in ("classification", "multi-label", "token-classification"):
                names, splits[split] = _numbered(data, table, splits[split], split, names)
    by_class = kind == "classification" and len(splits["train"]) > 1
    for split, fraction in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if split not in splits:
            cut = split_off_by_class if by_class and not facts else split_off
            splits["train"], splits[split] = cut(splits["train"], fraction, data.seed)
    more = {name.removeprefix("test_"): splits.pop(name) for name in [*splits] if name.startswith("test_")}
    metrics = tuple(data.metrics) or _metrics(kind, names)
    if kind == "pairs":
        with_negatives = all("negative" in splits[split].column_names for split in ("validation", "test"))
        if "triplet_accuracy" in metrics and not with_negatives:
            raise ValueError("metrics: triplet_accuracy needs a negative_column in the validation and test rows.")
        metrics += ("triplet_accuracy",) if with_negatives and not data.metrics else ()
    return LoadedTask(
        data.title,
        **splits,
        label_names=names,
        metrics=metrics,
        max_length=data.max_length,
        kind=kind,
        more_tests=more,
    )


def _metrics(kind: str, names: list[str] | None) -> tuple[str, ...]:
    """The kind's, but for tags that name no entities (such as parts of speech) those that need none."""
    found = KINDS[kind].metrics
    entities = any(re.match("[BIESLU]-", name) for name in names or ())
    return found if kind != "token-classification" or entities else tuple(name for name in found if name not in SEQEVAL)


@dataclass
class _Table:
    """Rows as they stand, their place for messages, and the classes of the label's column where it names them."""

    title: str
    columns: dict[str, str]  # ours -> theirs
    rows: Iterable[Mapping[str, Any]]
    classes: list[str] | None


def _table(data: TaskData, source: str) -> _Table:
    """Of a file, or of a split on the Hub."""
    given = {ours: getattr(data, f"{ours}_column") for ours in ("text", "pair", "negative", "label")}
    if data.kind == "pairs":
        given.pop("label")
    columns = dict(KINDS[str(data.kind)].columns) | {ours: name for ours, name in given.items() if name}
    if data.choice_columns:
        columns = {ours: name for ours, name in columns.items() if ours != "pair"}
        columns |= {f"choice_{i}": name for i, name in enumerate(data.choice_columns)}
    if data.train_file is None:
        rows = load_hub(str(data.repository), data.configuration, source, data.revision)
        title = f"{data.repository}, {source}"
        if data.kind == "pairs" and _NEGATIVE in rows.column_names:
            columns.setdefault(_NEGATIVE, _NEGATIVE)
        tables.check_columns(title, rows.column_names, columns)
        classes = tables.class_names(rows.features, columns.get("label", ""))
        return _Table(title, columns, tables.rows_of(rows, columns), classes)
    file = Path(source).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file at {source!r}.")
    conll = data.kind == "token-classification" and tables.suffix_of(file) in _CONLL
    if not conll and tables.kind_of(file) in (None, "text"):
        raise ValueError(f"{source!r}: give one of {tables.types('json', 'csv', 'parquet')}.")
    if tables.kind_of(file) != "parquet":
        tables.check_utf8(file)
    if conll:
        return _Table(source, columns, tables.conll_rows(file), None)
    if data.kind == "pairs" and tables.has_column(file, _NEGATIVE):
        columns.setdefault(_NEGATIVE, _NEGATIVE)
    squad = _squad_rows(file) if data.kind == "question-answering" else None
    rows = tables.read_rows(file, columns) if squad is None else squad
    return _Table(source, columns, rows, tables.class_names(tables.features_of(file), columns.get("label", "")))


def _squad_rows(file: Path) -> list[dict[str, Any]] | None:
    """`text`, `pair` and `label` of the questions of a file as SQuAD has it; None if it is another.

    Raises:
        TableError: it begins as SQuAD does, and goes on otherwise.
    """
    try:
        articles = json.loads(tables.read_text(file))["data"] if tables.suffix_of(file) == ".json" else None
    except (ValueError, TypeError, KeyError):  # lines of JSON, or a list of rows
        return None
    try:
        return articles and [
            {"text": asked["question"], "pair": passage["context"], "label": asked.get("answers")}
            for article in articles
            for passage in article["paragraphs"]
            for asked in passage["qas"]
        ]
    except (TypeError, KeyError) as error:
        raise TableError(f"{file} has `data`, but not as SQuAD has it: {error}.") from None


def _read(data: TaskData, table: _Table) -> Dataset:
    """Rows with our column names, each cell of its type."""
    kind, lists = str(data.kind), _LISTS.get(str(data.kind), ())
    listed = partial(tables.as_list, data.separator)
    read: dict[str, Callable[[Any, str, int, str], Any]] = {
        ours: listed if ours in lists else tables.as_text for ours in table.columns
    }
    if "label" not in lists:
        label = {
            "regression": tables.as_number,
            "similarity": tables.as_score,
            "question-answering": lambda value, *_: value or {},
            "classification": tables.one_of(tables.as_class, _OTHER_KINDS),
        }
        read["label"] = label.get(kind, tables.as_class)
    if kind == "classification":
        read["text"] = tables.one_of(tables.as_text, _OTHER_KINDS)
    if kind == "multi-label":
        read["label"] = lambda *cell: listed(*cell) or []  # a row may have none
    content: dict[str, list[Any]] = {}
    for number, row in enumerate(table.rows, 1):
        cells = {ours: read[ours](row[ours], table.title, number, column) for ours, column in table.columns.items()}
        empty = [ours for ours, value in cells.items() if value is None]
        if empty:
            named = [table.columns[ours] if kind in OF_VECTORS else ours for ours in empty]
            raise ValueError(f"{table.title}, row {number}: no {' and no '.join(named)}. Complete or remove the row.")
        if data.choice_columns:
            cells["pair"] = [cells.pop(f"choice_{i}") for i in range(len(data.choice_columns))]
        if kind in _FITTED:
            cells["label"] = _FITTED[kind](cells, f"{table.title}, row {number}")
        for name, value in cells.items():
            content.setdefault(name, []).append(value)
    text, whole = datasets.Value("large_string"), datasets.Value("int64")
    special = {
        "regression": datasets.Value("float32"),
        "similarity": datasets.Value("float32"),
        "question-answering": {"text": datasets.List(text), "answer_start": datasets.List(whole)},
        "multiple-choice": whole,
    }
    names = content or dict.fromkeys(ours for ours in ("text", "pair", "negative", "label") if ours in table.columns)
    features = {ours: datasets.List(text) if ours in lists else text for ours in names}
    features |= {"label": special[kind]} if kind in special else {}
    return Dataset.from_dict(content or {ours: [] for ours in names}, datasets.Features(features))


def _fit_tags(cells: dict[str, Any], place: str) -> list[str]:
    words, tags = cells["text"], cells["label"]
    if len(words) != len(tags) or not words:
        raise TableError(f"{place}: {len(words)} words, but {len(tags)} tags. Give each word one tag.")
    return tags


def _fit_choice(cells: dict[str, Any], place: str) -> int:
    """The right choice: its text, or its number counted from 0, or its letter."""
    choices, label = cells["pair"], cells["label"]
    known = {word: i for i in range(len(choices)) for word in (chr(ord("A") + i), str(i))}
    known |= {text: i for i, text in enumerate(choices)}
    if len(choices) < 2 or label not in known:
        raise TableError(
            f"{place}: {label!r} is none of its {len(choices)} choices. Give the right one's text, its number counted "
            "from 0, or its letter from A on."
        )
    return known[label]


def _fit_answers(cells: dict[str, Any], place: str) -> dict[str, list[Any]]:
    """The answers' texts and places, none where the context has no answer."""
    given, context = cells["label"], cells["pair"]
    try:
        if isinstance(given, str):
            pairs: list[tuple[str, Any]] = [(given, None)]
        elif isinstance(given, dict):  # as the Hub's squad has it
            pairs = list(zip(given.get("text") or (), given.get("answer_start") or (), strict=True))
        else:  # as SQuAD's own files have it
            pairs = [(answer["text"], answer["answer_start"]) for answer in given]
    except (TypeError, KeyError, ValueError):
        raise TableError(
            f"{place}: {str(given)[:60]!r} is no answer. Write {{text: [...], answer_start: [...]}}, or the text alone."
        ) from None
    fitted = [_placed(text, start, context, place) for text, start in pairs]
    return {"text": [text for text, _ in fitted], "answer_start": [start for _, start in fitted]}


def _placed(text: str, start: int | None, context: str, place: str) -> tuple[str, int]:
    """An answer without the blanks around it, and where it begins."""
    found = context.count(text) if text.strip() else 0
    if start is None and found == 1:
        start = context.index(text)
    if start is None or not found or start < 0 or context[start : start + len(text)] != text:
        where = f"at character {start} of" if start is not None else "exactly once in"
        raise TableError(
            f"{place}: the answer {text[:40]!r} does not stand {where} its context ({found} times in all). Correct the "
            "answer or answer_start, which counts characters from 0, or remove the row."
        )
    return text.strip(), start + len(text) - len(text.lstrip())


# By kind: what the label must be to fit the rest of its row.
_FITTED: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "token-classification": _fit_tags,
    "multiple-choice": _fit_choice,
    "question-answering": _fit_answers,
}


def _numbered(
    data: TaskData, table: _Table, rows: Dataset, split: str, names: list[str] | None
) -> tuple[list[str], Dataset]:
    """The names of the classes, which the training rows settle, and the rows with their numbers."""
    lists = isinstance(rows.features["label"], datasets.List)
    if names is None:
        seen = {name for label in rows["label"] for name in (label if lists else (label,))}
        names = data.label_names or table.classes or _class_names(data, seen)
    number = _number(data.label_names, table.classes) | {name: i for i, name in enumerate(names)}

    def number_of(name: str) -> int | None:
        return number.get(name, number.get(name.casefold()) if data.label_names else None)

    for place, label in enumerate(rows["label"], 1):
        unknown = [name for name in (label if lists else (label,)) if number_of(name) is None]
        if unknown and not (data.label_names or table.classes):
            raise ValueError(f"the {split} rows hold classes that no training row has: {unknown[0]}.")
        if unknown:
            raise ValueError(
                f"{table.title}, row {place}: the label {unknown[0]!r} is none of the {len(names)} classes "
                f"({', '.join(names[:8])}). Correct or remove the row, or complete label_names."
            )
    return names, with_labels(rows, number_of)


def _number(names: list[str], theirs: list[str] | None) -> dict[str, int]:
    """What else may stand for names that the recipe lists: their numbers, other names of theirs, other spellings."""
    ours = {name.casefold(): i for i, name in enumerate(names)}
    others = {name: i for i, name in enumerate(theirs or ()) if i < len(names)}
    same = {name.casefold() for name in others} == ours.keys()  # perhaps in another order
    plain = {str(i): i for i in range(len(names))}
    return (plain if not ours.keys() <= plain.keys() else {}) | ({} if same else others) | ours


def _class_names(data: TaskData, found: set[str]) -> list[str]:
    """By value where all are whole numbers, else by letter; of tags, `O` first."""
    numbers = all(_NUMBER.fullmatch(name) for name in found)
    if numbers and not all(float(name).is_integer() for name in found):
        raise ValueError(
            f"label_column={data.label_column or 'label'!r} holds decimal numbers; set data.kind=regression, or give "
            "classes."
        )
    return sorted(
        found,
        key=lambda name: (name != "O" and data.kind == "token-classification", float(name) if numbers else 0, name),
    )
