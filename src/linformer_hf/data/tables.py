"""Local tables row by row: CSV and TSV, JSON and JSON Lines (each also as .gz), and Parquet.

Nothing is inferred. Readers that infer take the class 01 for 1, the class NA for a missing one and the title 2020-01-01
for a moment, each file on its own, so that training and test rows disagree. Here a cell of a CSV file is text, and a
value of JSON or Parquet is what the file says it is.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import pyarrow
from datasets import ClassLabel, Dataset, Features, LargeList, List
from pyarrow.parquet import ParquetFile


FILE_TYPES = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SEPARATORS = (",", ";", "\t", "|")
READ_ROWS = 1000  # of Parquet and of data sets in memory, at a time
CONLL_U = 10  # columns
DOCUMENT = "-DOCSTART-"  # a line of CoNLL that stands for a document's beginning
PACKED = {b"\x1f\x8b": "It is gzip's: name it .gz.", b"PK\3\4": "It is a zip, as .xlsx and .docx are: save it as CSV."}
HEAD = 1000  # rows of JSON that tell which columns there are: each may lack some


class TableError(ValueError):
    """A table without a column, or with a value that does not belong there; the message names the place."""


def suffix_of(file: Path) -> str:
    """The file's type by its name: `.csv` for rows.CSV and rows.csv.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def kind_of(file: Path) -> str | None:
    """`text`, `json`, `csv` or `parquet`; None for a file of no known type."""
    return FILE_TYPES.get(suffix_of(file))


def types(*kinds: str) -> str:
    """The endings of files of these kinds, for a message."""
    return f"{', '.join(suffix for suffix, kind in FILE_TYPES.items() if kind in kinds)} (or .gz of text)"


def read_rows(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a table: text or None in each cell of CSV, any value of JSON and Parquet.

    Args:
        file: in UTF-8, unless it is Parquet (see `check_utf8`).
        columns: name in the result -> name in the file. A name such as `--column` is what the option is called.

    Raises:
        TableError: a column is missing, or a row of JSON is no object.
        ValueError: the file is damaged, or not what its name says.
    """
    with _reading(file) as kind:
        yield from {"csv": _csv_rows, "json": _json_rows, "parquet": _parquet_rows}[kind](file, columns)


def has_column(file: Path, column: str) -> bool:
    """Whether a table has it. Raises as `read_rows` does, but for a TableError."""
    with contextlib.suppress(TableError):
        next(read_rows(file, {"text": column}), None)
        return True
    return False


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[str]:
    kind = kind_of(file) or ""
    try:
        yield kind
    except TableError:
        raise
    except Exception as error:  # pyarrow has errors of every kind for a damaged file
        reason = error if type(error) is ValueError else error.__cause__ or error  # the former are from here
        raise ValueError(f"{file} cannot be read as {kind}: {reason}") from error


def read_text(file: Path) -> str:
    """The whole of a text file, in UTF-8 (see `check_utf8`)."""
    with text_of(file) as stream:
        return stream.read()


def features_of(file: Path) -> dict[str, Any]:
    """The types of a Parquet file's columns; of other files nothing is known."""
    with _reading(file) as kind:
        if kind != "parquet":
            return {}
        with ParquetFile(file) as table:
            return _features(table, table.schema_arrow.names)


def class_names(features: Mapping[str, Any], column: str) -> list[str] | None:
    """The names of a column of classes, or of lists of them, in the order of their numbers, where it has them."""
    feature = _item(features.get(column))
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def rows_of(table: Dataset, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """As `read_rows`, of a data set in memory."""
    wanted = list(dict.fromkeys(columns.values()))
    for batch in table.select_columns(wanted).iter(READ_ROWS):
        for cells in zip(*(batch[name] for name in wanted), strict=True):
            row = dict(zip(wanted, cells, strict=True))
            yield {ours: _named(row[theirs], table.features[theirs]) for ours, theirs in columns.items()}


def as_text(value: Any, title: str, row: int, column: str) -> str | None:
    """A cell's text; None for an empty one. Raises a TableError that names the place of anything else."""
    if is_empty(value):
        return None
    if not isinstance(value, str):
        raise TableError(
            f"{title}, row {row}, column {column!r}: {repr(value)[:40]} ({type(value).__name__}) is no text. Write it "
            "as text, or name another column."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold half a character: "\ud83d"
        raise TableError(f"{title}, row {row}, column {column!r}: {error.reason} in {value[:40]!r}.") from None
    return value


def as_list(separator: str | None, value: Any, title: str, row: int, column: str) -> list[str] | None:
    """A list of texts, or a text that holds one."""
    if isinstance(value, list | tuple):
        items = [as_class(item, title, row, column) for item in value]
        if None in items:
            raise TableError(
                f"{title}, row {row}, column {column!r}: item {items.index(None) + 1} of its list is empty."
            )
        return [item for item in items if item is not None]
    if is_empty(value):
        return None
    if separator is None or not isinstance(value, str):
        raise TableError(
            f"{title}, row {row}, column {column!r}: {repr(value)[:40]} is no list of texts. Write a list, set "
            "data.separator to what stands between the items of a text, or name another column."
        )
    return [item.strip() for item in value.split(separator) if item.strip()]


def as_class(value: Any, title: str, row: int, column: str) -> str | None:
    """The name of a class: text, a whole number, or True and False."""
    if isinstance(value, float) and not is_empty(value):
        raise TableError(
            f"{title}, row {row}, column {column!r}: {value} is a decimal number; set data.kind=regression, or give "
            "classes."
        )
    return str(value) if isinstance(value, int) else as_text(value, title, row, column)


def one_of(read: Callable[..., Any], hint: str) -> Callable[..., Any]:
    """`read` of a cell that holds no list; a TableError with `hint` for one that does."""

    def checked(value: Any, title: str, row: int, column: str) -> Any:
        if isinstance(value, list | tuple):
            raise TableError(f"{title}, row {row}, column {column!r}: {repr(value)[:40]} (list) is no text. {hint}")
        return read(value, title, row, column)

    return checked


def as_number(value: Any, title: str, row: int, column: str, kind: str = "regression") -> float | None:
    if is_empty(value):
        return None
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TableError(f"{title}, row {row}, column {column!r}: kind: {kind}, but {repr(value)[:40]} is no number.")
    return number


def as_score(value: Any, title: str, row: int, column: str) -> float | None:
    """A number that a cosine can be."""
    number = as_number(value, title, row, column, "similarity")
    if number is not None and not -1 <= number <= 1:
        raise TableError(
            f"{title}, row {row}, column {column!r}: the score {number:g} is none from -1 to 1. Divide all scores by "
            "the highest that there can be (5 of 0 to 5), or set data.kind=regression for a number of two texts."
        )
    return number


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: NaN is what pandas writes for that."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def check_columns(title: object, found: Iterable[str], columns: Mapping[str, str]) -> None:
    """Raise a TableError for a column that is not there, or there twice."""
    names = list(found)
    for ours, column in columns.items():
        if column not in names:
            settings = (name if name.startswith("--") else f"{name}_column" for name in columns)
            setting = ", ".join(dict.fromkeys(re.sub(r"^choice_.*", "choice_columns", name) for name in settings))
            raise TableError(
                f"{title} has no column {column!r}; its columns are {', '.join(map(str, names))}. Set {setting}."
            )
        if names.count(column) > 1:
            raise TableError(f"{title} has {names.count(column)} columns {column!r}: rename all but the {ours}.")


def _binary(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb"))


def text_of(file: Path) -> TextIO:
    """A file's text, line ends as they are, without the byte order mark that spreadsheets begin with."""
    return io.TextIOWrapper(_binary(file), encoding="utf-8-sig", newline="")


def _csv_rows(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(sys.maxsize)  # a document may be a book; the limit is else 128 KiB
    with text_of(file) as stream:
        layout = _layout(stream, "\t" if suffix_of(file) == ".tsv" else ",", set(columns.values()))
        reader = _records(stream, **layout)
        header = next(reader, (0, []))[1]
        if not header:
            raise ValueError("it is empty; its first line must name the columns")
        check_columns(file, header, columns)
        places = {ours: header.index(theirs) for ours, theirs in columns.items()}
        blank: list[list[str]] = []  # rows of empty cells, which spreadsheets leave at the end
        for line, cells in reader:
            if any(cells[len(header) :]):
                raise ValueError(
                    f"line {line} has {len(cells)} cells, but the header {len(header)}: a cell that holds "
                    f"{layout['delimiter']!r} must stand in double quotes"
                )
            blank.append(cells)
            if any(cells):
                for row in blank:
                    yield {ours: row[place] or None if place < len(row) else None for ours, place in places.items()}
                blank = []


def _records(stream: TextIO, **layout: Any) -> Iterator[tuple[int, list[str]]]:
    """(last line, cells) of all records that are no blank line."""
    before = 1 if _to_header(stream) else 0
    reader = csv.reader(stream, strict=True, **layout)
    try:
        yield from ((reader.line_num + before, cells) for cells in reader if cells)
    except csv.Error as error:
        hint = "double the quotes within a quoted cell, and close each cell's"
        raise ValueError(f"line {reader.line_num + before}: {error} ({hint})") from error


def _to_header(stream: TextIO) -> str:
    """Go to the header; the separator that Excel's line `sep=;` before it names, or nothing."""
    stream.seek(0)
    if found := re.fullmatch(r'"?sep=(.)"?\s*', stream.readline(10), re.IGNORECASE):
        return found[1]
    stream.seek(0)
    return ""


def _layout(stream: TextIO, separator: str, wanted: set[str]) -> dict[str, Any]:
    """csv.reader's options: the separator under which the wanted columns are there, and whether quotes are marks.

    Many .tsv files have quotes that are part of the text; with them as marks, lines run together.
    """
    separator = _to_header(stream) or separator
    for candidate in (separator, *SEPARATORS):
        _to_header(stream)
        if wanted <= set(next(filter(None, csv.reader(stream, delimiter=candidate)), [])):
            separator = candidate
            break
    layout = {"delimiter": separator}
    if separator == "\t":
        try:
            records = _records(stream, **layout)
            width = len(next(records, (0, []))[1])
            quoted = all(len(cells) <= width for _, cells in records)
        except ValueError:
            quoted = False
        return layout if quoted else {**layout, "quoting": csv.QUOTE_NONE}
    return layout


def _json_rows(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    rows = _objects(file)
    head = list(itertools.islice(rows, HEAD))
    if head:
        check_columns(file, dict.fromkeys(key for row in head for key in row), columns)
    for row in itertools.chain(head, rows):
        yield {ours: row.get(theirs) for ours, theirs in columns.items()}


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a list, or one in each line."""
    with text_of(file) as stream:
        listed = next((line for line in stream if line.strip()), "").lstrip().startswith("[")
        stream.seek(0)
        for number, row in enumerate(json.load(stream) if listed else map(_parsed, stream, itertools.count(1)), 1):
            if isinstance(row, dict):
                yield row
            elif row is not _NOTHING:
                raise TableError(
                    f"{file}, {'row' if listed else 'line'} {number}: {json.dumps(row)[:40]} is no row. Remove it, or "
                    "write an object with the columns."
                )


_NOTHING = object()


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line) if line.strip() else _NOTHING
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number}: {error.msg} at character {error.pos + 1} (write an object in each line, or a list of them)"
        ) from error


def _parquet_rows(file: Path, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    with ParquetFile(file) as table:
        check_columns(file, table.schema_arrow.names, columns)
        wanted = list(dict.fromkeys(columns.values()))
        features = _features(table, wanted)
        for batch in table.iter_batches(READ_ROWS, columns=wanted):
            for row in batch.to_pylist():
                yield {ours: _named(row[theirs], features[theirs]) for ours, theirs in columns.items()}


def _features(table: ParquetFile, columns: Iterable[str]) -> dict[str, Any]:
    """The types that `datasets` has for columns of a file, None for one that it does not know."""
    schema = table.schema_arrow
    features: dict[str, Any] = dict.fromkeys(columns)
    for name in features:
        with contextlib.suppress(ValueError, NotImplementedError, KeyError):  # the last: a name that stands there twice
            features |= Features.from_arrow_schema(pyarrow.schema([schema.field(name)], schema.metadata))
    return features


def _item(feature: Any) -> Any:
    """Of a list's feature, that of its items."""
    return feature.feature if isinstance(feature, List | LargeList) else feature


def _named(value: Any, feature: Any) -> Any:
    if isinstance(value, list):
        return [_named(item, _item(feature)) for item in value]
    if not isinstance(feature, ClassLabel) or value is None:
        return value
    return feature.names[value] if value >= 0 else None  # -1: not labelled


def conll_rows(file: Path) -> Iterator[dict[str, list[str]]]:
    """`text` and `label` of the sentences between empty lines: a line's first column is a word, its last the tag.

    Comments are left out: lines that begin with `#` and have another number of columns than the words' lines; and, in
    front of a sentence, such as begin with `# ` and end in what is no word's tag.

    Raises:
        TableError: a line has a word only, or more or fewer columns than the others; or the first column numbers the
            words (CoNLL-U), so that it holds none.
    """
    # Nothing else parts lines or words: a word may hold a no-break space.
    lines = [line.strip(" ") if line.strip() else "" for line in re.split(r"\r\n|\r|\n", read_text(file))]
    rows = [re.split("\t" if "\t" in line else " +", line) if line else [] for line in lines]
    full = [cells for cells in rows if cells and cells[0] != DOCUMENT]
    full = [cells for cells in full if not cells[0].startswith("#")] or full
    width = Counter(map(len, full)).most_common(1)[0][0] if full else 0
    tags = {cells[-1] for cells in full}
    words: list[list[str]] = []
    comment = re.compile(r"# [^\t]*$")
    for number, cells in enumerate([*rows, []], 1):
        if cells and cells[0] != DOCUMENT:
            if len(cells) == width > 1 and (words or cells[-1] in tags or not comment.match(lines[number - 1])):
                words.append(cells)
            elif not cells[0].startswith("#"):
                raise TableError(_no_word(file, number, lines[number - 1], len(cells), width))
        elif words:
            if width == CONLL_U and [cells[0] for cells in words] == [str(i) for i in range(1, len(words) + 1)]:
                raise TableError(
                    f"{file}, line {number - 1}: the first column numbers the words, as in CoNLL-U. Write the word "
                    "first and its tag last."
                )
            yield {"text": [cells[0] for cells in words], "label": [cells[-1] for cells in words]}
            words = []


def _no_word(file: Path, number: int, line: str, found: int, width: int) -> str:
    if found == 1:
        return f"{file}, line {number}: {line[:40]!r} is no word with a tag; part them by a space or a tab."
    return (
        f"{file}, line {number}: {line[:40]!r} has {found} columns, and most lines have {width}. Give each as many, "
        "parted by tabs where a cell has blanks."
    )


def check_utf8(file: Path) -> None:
    """Raise a ValueError with the place of the first byte that is not UTF-8, or if a .gz file cannot be unpacked."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _binary(file) as stream:
        while True:
            try:
                block = stream.read(1 << 20)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{file} cannot be unpacked: {error}") from error
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # The decoder counts from the bytes that it kept of a character begun in the block before.
                place = offset - len(decoder.getstate()[0]) + error.start
                utf16 = place == 0 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                convert = f"Convert it, for example with: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8."
                packed = (way_out for mark, way_out in PACKED.items() if not offset and block.startswith(mark))
                raise ValueError(
                    f"{file} is not UTF-8: byte {place:,} cannot be read ({error.reason}). {next(packed, convert)}"
                ) from None
            if not block:
                return
            offset += len(block)
