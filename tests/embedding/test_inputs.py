"""Documents as they are found in files: names, texts, spans, and what is wrong with them."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from linformer_hf.embedding import inputs
from linformer_hf.embedding.inputs import Document, Inputs


ROWS = [
    {"text": "a river", "spans": [[0, 1], [2, 7]]},
    {"text": "", "spans": []},
    {"text": "Zoë, naïve", "spans": [[0, 3]]},
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with the same rows in a file of each type."""
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        cells = [f'"{row["text"]}"{mark}"{row["spans"]}"' for row in ROWS]
        (tmp_path / name).write_text("\n".join([f"text{mark}spans", *cells]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "texts").mkdir()
    for name, text in (("b.txt", "second\r\nline\n"), ("a.txt", "\ufefffirst"), ("c.txt", " \n")):
        (tmp_path / "texts" / name).write_bytes(text.encode())
    return tmp_path


FILES = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.tsv", "rows.parquet"]


@pytest.mark.parametrize("name", FILES)
def test_rows_of_every_type_are_the_same_documents(place, name):
    spans = [[tuple(span) for span in row["spans"]] for row in ROWS]
    expected = [Document(f"{name}:{i + 1}", row["text"], spans[i]) for i, row in enumerate(ROWS)]
    found = Inputs(name, spans="spans")
    assert list(found) == expected
    assert list(found) == expected  # again, from the beginning
    assert list(Inputs([name])) == [document._replace(spans=[]) for document in expected]


def test_files_folders_and_globs_in_the_order_given(place):
    texts = [("a.txt", "first"), ("b.txt", "second\r\nline\n"), ("c.txt", " \n")]
    expected = [Document(f"texts/{name}", text, []) for name, text in texts]
    assert list(Inputs("texts")) == list(Inputs("texts/*.txt")) == expected
    mixed = Inputs(["texts/b.txt", "rows.csv", "texts/a.txt"])
    assert [document.name for document in mixed] == [
        "texts/b.txt",
        *(f"rows.csv:{i}" for i in (1, 2, 3)),
        "texts/a.txt",
    ]


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load(*given):
        asked.append(given)
        return datasets.Dataset.from_list([{"body": "a river", "other": 1}, {"body": None, "other": 2}])

    monkeypatch.setattr(inputs, "load_hub", load)
    found = list(Inputs("hub:acme/books", column="body"))
    assert found == [Document("hub:acme/books:1", "a river", []), Document("hub:acme/books:2", "", [])]
    assert asked == [("acme/books", None, "train", None)]
    with pytest.raises(ValueError, match=r"data set hub:acme/books has no column 'text'; its columns are body, other"):
        list(Inputs("hub:acme/books"))


def test_the_survey_counts_and_sums_names_texts_and_spans(place):
    assert Inputs("rows.csv").survey()[0] == 3
    sums = {Inputs(name, spans=spans).survey()[1] for name in FILES for spans in (None, "spans")}
    assert len(sums) == 2 * len(FILES)
    assert Inputs("rows.csv").survey() == Inputs(["rows.csv"]).survey()
    (place / "texts" / "a.txt").write_text("changed", encoding="utf-8")
    before = Inputs("texts").survey()
    (place / "texts" / "a.txt").write_text("changes", encoding="utf-8")
    assert Inputs("texts").survey() != before
    with pytest.raises(
        ValueError, match=r"no document has text \(1 are empty\): name other files, or another --column"
    ):
        Inputs("texts/c.txt").survey()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "no files are given"),
        ("none/*.txt", {}, "no files at 'none/"),
        (["texts", "rows.pdf"], {}, r"no files at 'rows\.pdf'; give a file, a folder"),
        (".", {}, "give one kind of"),
        ("texts", {"spans": "spans"}, r"texts/a\.txt has no column 'spans' of spans: put texts and spans into a table"),
        ("rows.csv", {"column": "body"}, r"no column 'body'; its columns are text, spans\. Set --column\."),
        ("rows.parquet", {"spans": "x"}, r"no column 'x'; its columns are text, spans\. Set --column, --spans\."),
        ("rows.parquet", {"column": "spans"}, r"rows\.parquet, row 1, column 'spans': .*is no text\. Write it as text"),
    ],
)
def test_what_is_not_there_is_one_message(place, given, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Inputs(given, **options).survey()


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 8]], r"row 1, column 's': the span \[0, 8\] lies outside of the text\. .* 0 <= start < end <= 7,"),
        ([[-1, 2]], r"span \[-1, 2\] lies outside"),
        ([[3, 3]], r"span \[3, 3\] lies outside"),
        ([[0, 1.5]], r"span \[0, 1\.5\] lies outside"),
        ([[0, True]], r"span \[0, True\] lies outside"),
        ([0, 1], r"\[0, 1\] is no list of spans\. Give a list of \[start, end\]"),
        ("0-1", r"'0-1' is no list of spans"),
        (5, "5 is no list of spans"),
    ],
)
def test_spans_outside_of_the_text_are_refused(tmp_path, spans, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a river", "s": spans}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Inputs(path, spans="s").survey()


def test_a_file_that_is_no_utf_8_is_named(place):
    (place / "texts" / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"texts/d\.txt is not UTF-8: byte 3"):
        Inputs("texts").survey()
