"""Sources: what they are called, which files they stand for, and what names their documents have."""

import os

import pytest
from datasets import Dataset

from linformer_hf.data import demo_texts
from linformer_hf.data.documents import (
    PretrainingData,
    Source,
    demo_documents,
    documents_from,
    file_stamps,
    find_files,
    load_rows,
    read_documents,
    shares,
)


@pytest.mark.parametrize(
    ("source", "title"),
    [
        (Source("hub", name="acme/books"), "acme/books"),
        (Source("files", path="texts/*.txt", name="unread"), "texts/*.txt"),
        (Source("demo"), "demo"),
        (Source("demo", name="wikipedia leads"), "wikipedia leads"),
    ],
)
def test_a_source_is_called_what_the_recipe_says(source, title):
    assert source.title == title


def test_an_unknown_demo_text_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"has the names .*wikipedia leads, not 'wikipedia'\."):
        Source("demo", name="wikipedia")


def test_shares_are_the_weights_over_their_sum():
    weighted = [Source("demo", weight=weight) for weight in (3.0, 1.0, 4.0)]
    assert shares(PretrainingData(weighted)) == [0.375, 0.125, 0.5]
    assert shares(PretrainingData([Source("demo")] * 4)) == [0.25] * 4


def test_a_folder_is_read_to_its_depths_and_other_files_are_left(tmp_path):
    for name in ("b/deep/2.TXT", "b/1.txt.gz", "a.txt", "README.md", "b/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "folder.txt").mkdir()
    assert find_files(str(tmp_path)) == [tmp_path / name for name in ("a.txt", "b/1.txt.gz", "b/deep/2.TXT")]
    assert find_files(str(tmp_path / "*.txt")) == [tmp_path / "a.txt"]
    assert find_files(str(tmp_path / "**" / "*.txt")) == [tmp_path / "a.txt"]
    assert find_files(str(tmp_path), [tmp_path / "b" / "deep", tmp_path / "a.txt"]) == [tmp_path / "b/1.txt.gz"]


def test_linked_folders_are_read_and_none_twice(tmp_path):
    for name in ("texts/a.txt", "other/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    texts = tmp_path / "texts"
    (texts / "part").symlink_to("../other")
    (texts / "again").symlink_to("../other")
    (texts / "round").symlink_to(".")
    (tmp_path / "other" / "back").symlink_to("../texts")
    found = find_files(str(texts))
    assert [file.name for file in found] == ["a.txt", "b.txt"]
    (texts / "z").mkdir()
    (texts / "z" / "c.txt").write_text("text")
    (texts / "b").symlink_to("z")
    assert find_files(str(texts))[-1] == texts / "z" / "c.txt"  # under its own name
    assert len(find_files(str(texts))) == 3


def test_a_byte_order_mark_is_no_text_and_an_empty_file_has_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhello\n\nthere".encode())
    for sample_by, texts in (("document", ["hello\n\nthere"]), ("paragraph", ["hello", "there"])):
        data = PretrainingData([Source("files", path=str(tmp_path / "a.txt"), sample_by=sample_by)])
        assert list(read_documents(data)["text"]) == texts
    for content in (b"", b"\n\n"):
        (tmp_path / "a.txt").write_bytes(content)
        for sample_by in ("document", "paragraph", "line"):
            with pytest.raises(ValueError, match=r"a.txt is empty: it holds no document with text\."):
                read_documents(PretrainingData([Source("files", path=str(tmp_path / "a.txt"), sample_by=sample_by)]))


def test_what_is_hidden_in_a_folder_is_no_text_of_it(tmp_path):
    for name in (".ipynb_checkpoints/a.txt", "__MACOSX/._a.txt", "b/.c.txt", ".git/d.txt", "b/e.txt"):
        (tmp_path / ".home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".home" / name).write_text("text")
    assert find_files(str(tmp_path / ".home")) == [tmp_path / ".home/b/e.txt"]
    assert find_files(str(tmp_path / ".home" / "b" / ".c.txt")) == [tmp_path / ".home/b/.c.txt"]


def test_nothing_there_and_several_kinds_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no files at 'nowhere/\*\.txt'; give a file, a folder with \.txt,"):
        find_files("nowhere/*.txt")
    for name in ("a.csv", "a.md"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=r"stands for \.csv, \.md files; give one kind of"):
        find_files(str(tmp_path / "a.*"))


def test_documents_are_named_by_their_first_row_and_join_their_rows_by_lines():
    rows = Dataset.from_dict({"body": ["a", None, " ", "", "b", "c", "d"], "more": range(7)})
    source = Source("hub", name="acme/books", text_column="body", rows_per_document=2)
    documents = documents_from(rows, source)
    assert documents.column_names == ["name", "text", "source", "held_out"]
    assert list(documents["name"]) == ["acme/books:0", "acme/books:4", "acme/books:6"]
    assert list(documents["text"]) == ["a\n", "b\nc", "d"]
    assert set(documents["source"]) == {"acme/books"}
    assert set(documents["held_out"]) == {False}


@pytest.mark.parametrize(("sample_by", "count"), [("document", 1), ("paragraph", 2), ("line", 3)])
def test_a_text_file_is_sampled_as_asked_and_its_brackets_are_no_pattern(tmp_path, sample_by, count):
    (tmp_path / "a[1].txt").write_text("One.\nTwo.\n\nThree.\n", encoding="utf-8")
    rows = load_rows(Source("files", path=str(tmp_path / "a[1].txt"), sample_by=sample_by), streaming=True)
    assert len([row for row in rows if row["text"].strip()]) == count


def test_stamps_change_with_size_and_time_and_are_of_files_alone(tmp_path):
    path, source = tmp_path / "a.txt", Source("files", path=str(tmp_path))
    path.write_text("text")
    os.utime(path, ns=(0, 5))
    assert file_stamps(source) == [(str(path.resolve()), 4, 5)]
    os.utime(path, ns=(0, 6))
    assert file_stamps(source) == [(str(path.resolve()), 4, 6)]
    assert file_stamps(Source("demo")) is None


def test_only_the_world_english_bible_holds_books_out(monkeypatch):
    texts = {name: lambda: iter([("Ruth", "of the test"), ("Job", "of training")]) for name in demo_texts.COLLECTIONS}
    monkeypatch.setattr(demo_texts, "COLLECTIONS", texts)
    held = [document["name"] for document in demo_documents() if document["held_out"]]
    assert held == ["world english bible:Ruth"]
    assert [document["name"] for document in demo_documents("python topics")] == [
        "python topics:Ruth",
        "python topics:Job",
    ]
