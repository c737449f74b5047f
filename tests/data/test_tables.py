"""Tables row by row: the text that was written is the text that is read, and nothing is inferred."""

import csv
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linformer_hf.data import tables


@pytest.mark.parametrize(
    ("name", "suffix", "kind"),
    [
        ("rows.CSV", ".csv", "csv"),
        ("rows.v2.tsv.GZ", ".tsv", "csv"),
        ("rows.jsonl", ".jsonl", "json"),
        ("rows.parquet", ".parquet", "parquet"),
        ("rows.txt.gz", ".txt", "text"),
        ("rows.gz", "", None),
        ("rows.xlsx", ".xlsx", None),
    ],
)
def test_a_file_is_what_its_name_ends_in(name, suffix, kind):
    assert (tables.suffix_of(Path("a.csv") / name), tables.kind_of(Path("a.csv") / name)) == (suffix, kind)


def test_types_for_a_message():
    assert tables.types("csv", "parquet") == ".csv, .tsv, .parquet (or .gz of text)"


cells = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\ufeff"), max_size=8)


@settings(max_examples=40)
@given(st.lists(st.tuples(cells.filter(bool), cells), min_size=1, max_size=4), st.sampled_from([",", ";", "\t", "|"]))
def test_every_cell_of_a_csv_is_the_text_that_was_written(tmp_path_factory, rows, separator):
    file = tmp_path_factory.getbasetemp() / "drawn.csv.gz"
    with gzip.open(file, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *rows])
    read = list(tables.read_rows(file, {"first": "a", "second": "b"}))
    assert read == [{"first": first, "second": second or None} for first, second in rows]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_empty_lines_before_the_header_hide_no_separator(tmp_path, separator):
    file = tmp_path / "rows.csv"
    file.write_text(f"\n\r\na{separator}b\n1{separator}2\n", encoding="utf-8", newline="")
    assert list(tables.read_rows(file, {"first": "a", "second": "b"})) == [{"first": "1", "second": "2"}]


@pytest.mark.parametrize("separator", [" ", "  ", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_words_are_parted_by_their_ends_and_words_by_blanks_or_a_tab(tmp_path, separator, end):
    words = [("10\u00a0000", "O"), ("a\u2028b", "B-X"), ("c\x85", "O")]
    text = end.join([*(separator.join(pair) for pair in words), " ", "d" + separator + "O"])
    (tmp_path / "rows.conll").write_text(text, encoding="utf-8", newline="")
    first, second = zip(*words, strict=True)
    assert list(tables.conll_rows(tmp_path / "rows.conll")) == [
        {"text": list(first), "label": list(second)},
        {"text": ["d"], "label": ["O"]},
    ]


CONLL = "berlin _ _ B-LOC\nis _ _ O\n"


@pytest.mark.parametrize(
    "text",
    [
        "# id 0001-aa domain=train\n" + CONLL,
        "#newdoc\n# a comment\n\n" + CONLL + "\n# the end\n",
        CONLL.replace(" ", "\t").replace("is", "# more\nis"),
    ],
)
def test_comments_of_conll_are_no_words(tmp_path, text):
    (tmp_path / "rows.conll").write_text(text, encoding="utf-8")
    assert list(tables.conll_rows(tmp_path / "rows.conll")) == [{"text": ["berlin", "is"], "label": ["B-LOC", "O"]}]


def test_a_number_sign_may_be_a_word(tmp_path):
    (tmp_path / "rows.conll").write_text("# O\n#one B\n\n# O\n", encoding="utf-8")
    assert [row["text"] for row in tables.conll_rows(tmp_path / "rows.conll")] == [["#", "#one"], ["#"]]
    for text, words in (
        ("so D\n#fail HT\ntoday N\n", ["so", "#fail", "today"]),
        ("#fail HT\ntoday N\n", ["#fail", "today"]),
        ("a\tD\n#\tSYM\nb\tD\n", ["a", "#", "b"]),
        ("#\tSYM\nb\tD\n", ["#", "b"]),
        ("a D\n# SYM\n", ["a", "#"]),
    ):
        (tmp_path / "rows.conll").write_text(text, encoding="utf-8")
        assert [row["text"] for row in tables.conll_rows(tmp_path / "rows.conll")] == [words]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nNew York B\nc O\n", "line 2: 'New York B' has 3 columns, and most lines have 2. Give each as many"),
        ("1\tA" + "\t_" * 8 + "\n2\tB" + "\t_" * 8 + "\n", "line 2: the first column numbers the words, as in CoNLL-U"),
    ],
)
def test_lines_whose_words_are_elsewhere_are_refused(tmp_path, text, message):
    (tmp_path / "rows.conll").write_text(text, encoding="utf-8")
    with pytest.raises(tables.TableError, match=re.escape(message)):
        list(tables.conll_rows(tmp_path / "rows.conll"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"a": "x"}\n' * 9 + '{"a": "x" "b"}\n', "line 10: Expecting ',' delimiter at character 11"),
        ("rows.csv", 'a,b\n"x",y\n"x"z,y\n', "line 3: ',' expected after '\"' (double the quotes within"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        list(tables.read_rows(tmp_path / name, {"text": "a"}))


def test_parquet_without_rows_and_with_columns_of_other_types(tmp_path):
    file = tmp_path / "rows.parquet"
    others = {
        "m": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "c": pa.array(["a", "b"]).dictionary_encode(),
    }
    table = pa.table({"text": ["one", None], **others})
    pq.write_table(table, file)
    assert list(tables.read_rows(file, {"x": "text", "y": "c"})) == [{"x": "one", "y": "a"}, {"x": None, "y": "b"}]
    assert tables.features_of(file)["m"] is None
    pq.write_table(pa.table([pa.array(["x"])] * 3, names=["text", "more", "more"]), file)
    assert tables.features_of(file)["more"] is None
    assert list(tables.read_rows(file, {"x": "text"})) == [{"x": "x"}]
    pq.write_table(table.slice(0, 0), file)
    assert list(tables.read_rows(file, {"x": "text"})) == []
    pq.write_table(pa.table({"text": [f"{i}" for i in range(2500)]}), file, row_group_size=700)
    assert [row["x"] for row in tables.read_rows(file, {"x": "text"})] == [f"{i}" for i in range(2500)]


def test_a_value_of_json_is_what_the_file_says_and_a_key_may_be_missing(tmp_path):
    rows = [{"a": "01", "b": 1}, {"b": None}, {"a": True, "b": [1.5]}]
    expected = [{"x": "01", "y": 1}, {"x": None, "y": None}, {"x": True, "y": [1.5]}]
    for text in (json.dumps(rows, indent=1), "\n\n".join(map(json.dumps, rows))):
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        assert list(tables.read_rows(tmp_path / "rows.json", {"x": "a", "y": "b"})) == expected


@pytest.mark.parametrize(("text", "place"), [('[{"a": 1}, 7]', "row 2: 7"), ('{"a": 1}\n\n["b"]', r'line 3: \["b"\]')])
def test_what_is_no_row_is_named_with_its_place(tmp_path, text, place):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(tables.TableError, match=rf"rows\.json, {place} is no row\. Remove it, or write an object"):
        list(tables.read_rows(tmp_path / "rows.json", {"x": "a"}))


@pytest.mark.parametrize(("value", "empty"), [(None, True), ("", True), (float("nan"), True), (0, False), (" ", False)])
def test_only_nothing_is_empty(value, empty):
    assert tables.is_empty(value) == empty


def test_a_cell_is_text_or_is_refused_with_its_place():
    assert tables.as_text("NA", "t", 3, "c") == "NA"
    assert tables.as_text(float("nan"), "t", 3, "c") is None
    with pytest.raises(tables.TableError, match=r"^t, row 3, column 'c': 7 \(int\) is no text\. Write it as text"):
        tables.as_text(7, "t", 3, "c")
    with pytest.raises(tables.TableError, match=r"^t, row 3, column 'c': surrogates not allowed in"):
        tables.as_text("\ud83d", "t", 3, "c")


def test_columns_that_are_not_there_or_there_twice():
    tables.check_columns("t", ["a", "b", "b"], {"text": "a"})
    with pytest.raises(tables.TableError, match=r"t has no column 'c'; its columns are a, b\. Set text_column, label_"):
        tables.check_columns("t", ["a", "b"], {"text": "a", "label": "c"})
    with pytest.raises(tables.TableError, match=r"t has 2 columns 'b': rename all but the label\."):
        tables.check_columns("t", ["a", "b", "b"], {"text": "a", "label": "b"})


def test_a_row_with_more_cells_than_the_header_is_named_by_its_line(tmp_path):
    (tmp_path / "rows.csv").write_text('a,b\n"1\n1",2\n3,4,5\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be read as csv: line 4 has 3 cells, but the header 2: .*',' must"):
        list(tables.read_rows(tmp_path / "rows.csv", {"x": "a"}))


def test_files_that_number_no_classes_name_none(tmp_path):
    (tmp_path / "rows.csv").write_text("label\nb\na\n", encoding="utf-8")
    assert tables.class_names(tables.features_of(tmp_path / "rows.csv"), "label") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [(gzip.compress(b"a", mtime=0), "name it .gz"), (b"PK\3\4\xff", "as .xlsx")],
    ids=["gzip", "zip"],
)
def test_packed_files_under_another_name_are_told(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv is not UTF-8: .* {words}"):
        tables.check_utf8(tmp_path / "a.csv")


def test_an_error_behind_excel_s_line_names_the_line(tmp_path):
    (tmp_path / "rows.csv").write_text("sep=;\na;b\n1;2\n3;4;5\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 4 has 3 cells"):
        list(tables.read_rows(tmp_path / "rows.csv", {"x": "a"}))


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "SEP=;"])
def test_a_column_that_is_not_there_is_missed_among_those_that_excel_s_line_parts(tmp_path, line):
    (tmp_path / "rows.csv").write_text(f"{line}\na;b\n1;2\n", encoding="utf-8")
    assert list(tables.read_rows(tmp_path / "rows.csv", {"x": "b"})) == [{"x": "2"}]
    with pytest.raises(tables.TableError, match="has no column 'c'; its columns are a, b"):
        list(tables.read_rows(tmp_path / "rows.csv", {"x": "c"}))


def test_utf_16_is_told_from_latin_1(tmp_path):
    for encoding, known in (("utf-16", "UTF-16"), ("latin-1", "LATIN1")):
        (tmp_path / "a.txt").write_text("é", encoding=encoding)
        with pytest.raises(ValueError, match=rf"byte 0 cannot be read .* iconv -f {known} -t UTF-8\.$"):
            tables.check_utf8(tmp_path / "a.txt")
