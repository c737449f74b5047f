"""Labelled rows for fine-tuning: every kind of task in one table, the section `data`, rows as a model reads them.

GLUE hides its test labels, so there (as in the paper) the published validation rows are the test, and validation is a
slice of the training rows. `bible-paraphrase`, `word-order`, `movie-snippets` and `genre` need no Hub. The labels of
all but `movie-snippets` are constructed: their numbers never belong beside QQP's, CoLA's or anyone's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, List, Value
from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from .tokenizer import (
    Batch,
    Cutter,
    Encoded,
    encode_choices,
    encode_labels,
    encode_pairs,
    encode_questions,
    encode_texts,
    encode_words,
)


PASSAGE_WORDS = 400  # of a passage of `genre`, unless set: 512 tokens and more of most tokenizers


def _right(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Padding on the left would move the answers' places."""
    tokenizer.padding_side = "right"
    return DataCollatorWithPadding(tokenizer)


@dataclass(frozen=True)
class Kind:
    """A head of the family and what its rows are.

    Attributes:
        head: name of the Auto class, without AutoModel.
        pipeline_tag: the Hub's word for it, which is the pipeline's too, where there is one.
        fields: of the configuration.
        columns: ours -> theirs, unless the recipe names them. Without `pair` there is no second column of input.
        metrics: names of METRICS that are computed unless the recipe names others; the first judges the model.
        encode: rows -> the columns that the model reads.
        collator: pads them in a batch; None: what the trainer of such rows brings.
    """

    head: str
    pipeline_tag: str
    fields: Mapping[str, Any]
    columns: Mapping[str, str]
    metrics: tuple[str, ...]
    encode: Callable[[Batch, Cutter, int], Encoded]
    collator: Callable[[PreTrainedTokenizerBase], Any] | None


def _classes(problem_type: str, metrics: tuple[str, ...], encode: Callable[[Batch, Cutter, int], Encoded]) -> Kind:
    fields: dict[str, Any] = {"problem_type": problem_type}
    fields |= {"num_labels": 1} if problem_type == "regression" else {}
    columns = {"text": "text", "label": "label"}
    head = "ForSequenceClassification", "text-classification"
    return Kind(*head, fields, columns, metrics, encode, DataCollatorWithPadding)


def _vectors(columns: Mapping[str, str], metrics: tuple[str, ...]) -> Kind:
    return Kind("", "sentence-similarity", {}, columns, metrics, encode_pairs, None)


KINDS = {
    "classification": _classes("single_label_classification", ("accuracy", "f1"), encode_texts),
    "regression": _classes("regression", ("mse", "pearson"), encode_texts),
    "multi-label": _classes("multi_label_classification", ("micro_f1", "macro_f1", "subset_accuracy"), encode_labels),
    "token-classification": Kind(
        "ForTokenClassification",
        "token-classification",
        {},
        {"text": "tokens", "label": "tags"},
        ("f1", "precision", "recall", "accuracy"),
        encode_words,
        DataCollatorForTokenClassification,
    ),
    "question-answering": Kind(
        "ForQuestionAnswering",
        "question-answering",
        {"num_labels": 2},
        {"text": "question", "pair": "context", "label": "answers"},
        ("f1", "exact_match"),
        encode_questions,
        _right,
    ),
    "multiple-choice": Kind(
        "ForMultipleChoice",
        "multiple-choice",
        {},
        {"text": "text", "pair": "choices", "label": "label"},
        ("accuracy",),
        encode_choices,
        DataCollatorForMultipleChoice,
    ),
    "pairs": _vectors({"text": "anchor", "pair": "positive"}, ("accuracy@1", "mrr@10", "ndcg@10")),
    "similarity": _vectors({"text": "sentence1", "pair": "sentence2", "label": "score"}, ("spearman", "pearson")),
}
OF_VECTORS = ("pairs", "similarity")  # the kinds whose model is a sentence encoder
DEMO_TASKS = ("bible-paraphrase", "word-order", "bible-pairs", "movie-snippets", "genre")
OF_THE_HUB = ("repository", "configuration", "revision", "validation_split", "test_split")
OF_ROWS = (
    *("kind", "text_column", "pair_column", "negative_column", "label_column", "choice_columns", "separator"),
    *("label_names", "metrics"),
)


@dataclass
class TaskData:
    """Section `data` of a fine-tuning recipe.

    Args:
        task: one of the table, `files` for your own rows, or `hub` for any data set of the Hub.
        kind: classification (one class a row), regression (a number), multi-label (a list of classes, which may be
            empty), token-classification (a list of words and a tag for each), question-answering (the answer stands in
            the context) or multiple-choice; of vectors: pairs (two texts that belong together, and perhaps one that
            does not) or similarity (two texts and a score from -1 to 1). By default the task's own, or classification.
        train_file, validation_file, test_file: .csv, .tsv, .jsonl or .json, also as .gz, or .parquet (task: files); of
            tokens also .conll or .txt (a word and, last, its tag in each line, an empty line after a sentence), of
            questions also .json as SQuAD has it. Without a validation or test file, that slice is cut from the
            training rows, in every class alike.
        repository, configuration, revision: of a Hub data set; of a task of the table only to read it from elsewhere.
        train_split, validation_split, test_split: of a Hub data set. Without the latter two, slices are cut.
        text_column, pair_column, label_column: their columns, by default text and label; tokens and tags; question,
            context and answers; text, choices and label; anchor and positive; sentence1, sentence2 and score.
            pair_column is for tasks over two texts, too. What stands in a .csv is text, and so is a class: 01 is not 1,
            NA is not missing.
        negative_column: what belongs not to the anchor (kind: pairs). By default `negative`, where there is one.
        choice_columns: one column for each choice, in place of a list of them (kind: multiple-choice).
        separator: what parts the items of a list that stands in a cell as text, as in a .csv.
        label_names: the classes in the order of their numbers. By default those of the data set, or else of the
            training rows, by letter.
        metrics: of the kind's; the first judges the model. By default the task's own.
        path: the archive that holds the rows (task: movie-snippets).
        max_length: tokens of a row, special tokens included; longer ones are truncated and counted. By default the
            task's own, and at most what the model reads.
        stride: read longer rows in pieces of max_length tokens that share so many with the one before. Every piece is
            trained on as a row; a text is judged by the mean of its pieces' logits, a word in the piece where it stands
            furthest from the edges, and a question by the best span of all. Not for texts in pairs.
        validation_fraction, test_fraction: sizes of slices that are cut from the training rows.
        max_train_rows, max_test_rows: use so many, drawn at random.
        passage_words: words of a row (task: genre); 3,000 are some 4,000 tokens.
        seed: of the slices and draws.
    """

    task: Literal[
        "imdb",
        "sst2",
        "cola",
        "mrpc",
        "stsb",
        "qqp",
        "mnli",
        "qnli",
        "rte",
        "wnli",
        "bible-paraphrase",
        "word-order",
        "bible-pairs",
        "movie-snippets",
        "genre",
        "files",
        "hub",
    ]
    kind: (
        Literal[
            "classification",
            "regression",
            "multi-label",
            "token-classification",
            "question-answering",
            "multiple-choice",
            "pairs",
            "similarity",
        ]
        | None
    ) = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    repository: str | None = None
    configuration: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    negative_column: str | None = None
    label_column: str | None = None
    choice_columns: list[str] = field(default_factory=list)
    separator: str | None = None
    label_names: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    path: str | None = None
    max_length: int | None = None
    stride: int | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.1
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    passage_words: int = PASSAGE_WORDS
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.task == "files") != (self.train_file is not None):
            raise ValueError("train_file belongs to task: files, and task: files needs it.")
        if self.task == "hub" and self.repository is None:
            raise ValueError("task: hub needs the data set's name: repository.")
        foreign = OF_THE_HUB if self.task == "files" else OF_THE_HUB + OF_ROWS if self.task in DEMO_TASKS else ()
        if useless := [name for name in foreign if getattr(self, name)]:
            raise ValueError(f"{', '.join(useless)} would have no effect with task: {self.task}. Leave it out.")
        if self.choice_columns and (self.kind != "multiple-choice" or self.pair_column or len(self.choice_columns) < 2):
            raise ValueError("choice_columns, two or more, belong to kind: multiple-choice without a pair_column.")
        if self.negative_column and self.kind != "pairs":
            raise ValueError("negative_column belongs to kind: pairs.")
        if self.label_column and self.kind == "pairs":
            raise ValueError("kind: pairs has no labels: leave label_column out, or set kind: similarity for scores.")
        if self.max_length is not None and self.max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {self.max_length}.")
        if self.stride is not None and self.stride < 0:
            raise ValueError(f"stride is a number of tokens, at least 0, not {self.stride}.")
        if self.passage_words < 1 or (self.passage_words != PASSAGE_WORDS and self.task != "genre"):
            found = f"got {self.passage_words} for {self.task}"
            raise ValueError(f"passage_words must be at least 1 and belongs to task: genre, {found}.")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")

    @property
    def of_vectors(self) -> bool:
        """Whether the model is a sentence encoder."""
        return self.kind in OF_VECTORS or self.task == "bible-pairs"

    @property
    def title(self) -> str:
        """What tables call it."""
        return " ".join(filter(None, (self.repository, self.configuration))) if self.task == "hub" else self.task


@dataclass
class LoadedTask:
    """Rows with the columns text, pair (where the task has one) and label.

    By kind: `text` is a list of words for token-classification; `pair` the context for question-answering and the list
    of choices for multiple-choice. `label` is a number; a list of numbers for multi-label and token-classification;
    `{"text": [...], "answer_start": [...]}` for question-answering. For pairs there is no `label`, but perhaps a text
    `negative`.

    Attributes:
        label_names: names of the classes in the order of their numbers; None where there are none.
        metrics: names of METRICS; the first judges the model.
        kind: a key of KINDS.
        positive: of two classes, the one that F1 is about.
        baselines: test accuracy of answers that need no model.
        more_tests: further test rows by name.
        rules: of two classes, a text's score by which the second is told from the first, without a model.
        pieces: split -> the row that each of its pieces is of, in their order, where rows are read in pieces.
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
    kind: str = "classification"
    more_tests: dict[str, Dataset] = field(default_factory=dict)
    rules: Mapping[str, Callable[[str], float]] = field(default_factory=dict)
    pieces: dict[str, list[int]] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Dataset]:
        """All rows: train, validation, test, and test_NAME of further ones."""
        more = {f"test_{name}": rows for name, rows in self.more_tests.items()}
        return {"train": self.train, "validation": self.validation, "test": self.test, **more}

    def take(self, splits: Mapping[str, Dataset]) -> None:
        """Put other rows into the place of `splits`."""
        self.train, self.validation, self.test = (splits[name] for name in ("train", "validation", "test"))
        self.more_tests = {name: splits[f"test_{name}"] for name in self.more_tests}

    def take_order(self, names: Sequence[str]) -> bool:
        """Number the classes as `names` does and spell them so; False, and no change, if these are other classes.

        Upper and lower case count only where classes differ in nothing else.
        """
        ours = self.label_names or []
        for key in (str, str.casefold):
            place = {key(name): i for i, name in enumerate(names)}
            if len(ours) == len(names) == len(place) and {key(name) for name in ours} == place.keys():
                number = [place[key(name)] for name in ours]
                self.label_names, self.positive = list(names), number[self.positive] if len(number) > 1 else 0
                self.take({split: with_labels(rows, number.__getitem__) for split, rows in self.splits.items()})
                return True
        return False


def split_off(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} training rows are too few to cut a slice for validation or test from them.")
    parts = rows.train_test_split(test_size=max(1, round(len(rows) * fraction)), seed=seed)
    return parts["train"], parts["test"]


def split_off_by_class(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
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


def with_labels(rows: Dataset, number: Callable[[Any], int | None]) -> Dataset:
    """Every class of the column label, or of the lists in it, replaced by its number."""
    nested = isinstance(rows.features["label"], List)
    labels = [list(map(number, label)) if nested else number(label) for label in rows["label"]]
    feature = Value("int64")
    return rows.remove_columns("label").add_column("label", labels, feature=List(feature) if nested else feature)


def tokenize_task(
    task: LoadedTask, tokenizer: PreTrainedTokenizerBase, max_length: int | None, stride: int | None = None
) -> dict[str, Dataset]:
    """Splits with the columns that the model reads; how many rows lost how many tokens goes into `task.counts`.

    Args:
        stride: as in TaskData. A split then has a row for each piece, and `task.pieces` says of which row it is.

    Raises:
        ValueError: the kind needs to know which characters a token stands for, and the tokenizer does not say; or rows
            of this kind cannot be read in pieces.
    """
    kind = KINDS[task.kind]
    if not tokenizer.is_fast and task.kind in ("token-classification", "question-answering"):
        raise ValueError(f"{task.kind} needs a fast tokenizer, whose tokens have places; this is none. Convert it.")
    if stride is not None:
        _check_pieces(task, kind)
    choices = (
        [len(row) for rows in task.splits.values() for row in rows["pair"]] if task.kind == "multiple-choice" else []
    )
    width = max(choices, default=len(task.label_names or ()))
    cut = Cutter(tokenizer, max_length, stride)
    splits = {}
    for split, rows in task.splits.items():
        lost: list[int] = []
        whose: list[int] = []

        def encode(batch: Batch, places: list[int], lost: list[int] = lost, whose: list[int] = whose) -> dict[str, Any]:
            columns, cut_off, of_batch = kind.encode(batch, cut, width)
            lost += cut_off
            whose += [places[row] for row in of_batch]
            return columns

        options = {"batched": True, "remove_columns": rows.column_names, "load_from_cache_file": False}
        splits[split] = rows.map(encode, with_indices=True, **options, desc=f"tokenising {split}")
        if kind.encode is encode_labels:  # `map` keeps the classes' type, and BERT's loss takes floats only
            splits[split] = splits[split].cast_column("label", List(Value("float32")))
        task.counts[f"{split}_truncated_rows"] = sum(map(bool, lost))
        task.counts[f"{split}_truncated_tokens"] = sum(lost)
        if stride is not None:
            task.pieces[split] = whose
            task.counts[f"{split}_pieces"] = len(whose)
    task.counts["max_length"] = max_length
    return splits


def _check_pieces(task: LoadedTask, kind: Kind) -> None:
    if kind.encode in (encode_choices, encode_pairs):
        raise ValueError(f"data.stride has no meaning for {task.kind}: its rows are not read in pieces. Leave it out.")
    if kind.encode is not encode_questions and "pair" in task.train.column_names:
        raise ValueError(
            "data.stride is for rows of one text, or a question and its context; these are pairs of texts."
        )
