"""Labelled rows of one's own: in which order classes are numbered, and what is cut and drawn from the rows."""

import json
from collections import Counter

import pytest

from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData


@pytest.fixture
def rows(tmp_path):
    """Writes a file of rows with these labels, their texts numbered, and gives its path."""

    def write(labels, name="rows.jsonl") -> str:
        lines = [json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def files(train: str, **more) -> TaskData:
    return TaskData("files", train_file=train, **more)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),  # whole numbers by value
        (["1.0", "2e1", "3"], ["1.0", "3", "2e1"]),
        (["10", "9", "B", "a"], ["10", "9", "B", "a"]),  # else all by letter
        (["01", "1"], ["01", "1"]),  # two classes, though one value
        ([True, False], ["False", "True"]),
    ],
)
def test_classes_are_numbered_by_value_or_by_letter(rows, labels, names):
    task = load_task(files(rows(labels * 10)))
    assert task.label_names == names
    for row in task.train:
        assert names[row["label"]] == str(labels[int(row["text"].split()[1]) % len(labels)])


def test_slices_have_every_class_in_its_share(rows):
    task = load_task(files(rows(["a"] * 80 + ["b"] * 20), test_fraction=0.25, validation_fraction=0.2))
    found = [Counter(split["label"]) for split in (task.test, task.validation, task.train)]
    assert found == [{0: 20, 1: 5}, {0: 12, 1: 3}, {0: 48, 1: 12}]


def test_the_seed_alone_decides_which_rows_are_cut(rows):
    file = rows(["a", "b"] * 50)
    first, again, other = (load_task(files(file, seed=seed)).test["text"] for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert set(first) != set(other)


def test_rows_are_drawn_from_the_whole_file_and_counted(rows):
    task = load_task(files(rows(["a", "b"] * 100), max_train_rows=20, max_test_rows=5))
    assert task.counts == {"train_rows": 20, "validation_rows": 9, "test_rows": 5}
    drawn = [int(text.split()[1]) for text in task.train["text"]]
    assert max(drawn) > 100  # not the first ones
    assert drawn != sorted(drawn)


def test_a_regression_keeps_its_numbers_and_has_no_classes(rows):
    task = load_task(files(rows([0.5, "2", -1, 1e-3] * 10), kind="regression"))
    assert (task.label_names, task.metrics, task.baselines) == (None, ("mse", "pearson"), {})
    for row in task.train:
        assert row["label"] == pytest.approx([0.5, 2, -1, 1e-3][int(row["text"].split()[1]) % 4])


@pytest.mark.parametrize("value", ["much", "inf", [1], 10**400])
def test_what_is_no_number_of_a_regression_is_named(rows, value):
    with pytest.raises(ValueError, match=r"row 2, column 'label': kind: regression, but .{1,40} is no number\."):
        load_task(files(rows([0.5, value, 1.0]), kind="regression"))


def test_a_decimal_number_is_no_class(rows):
    with pytest.raises(ValueError, match=r"row 3, column 'label': 1\.5 is a decimal number; set data\.kind=regression"):
        load_task(files(rows([1, 2, 1.5])))
    with pytest.raises(ValueError, match=r"label_column='label' holds decimal numbers; set data\.kind=regression"):
        load_task(files(rows(["1", "2.5"] * 9)))


def test_a_split_without_rows_is_named(rows):
    empty = rows([], "empty.jsonl")
    for split in ("test", "validation"):
        with pytest.raises(ValueError, match=rf"task 'files' has no rows in its {split} split\."):
            load_task(files(rows(["a", "b"] * 9), **{f"{split}_file": empty}))
