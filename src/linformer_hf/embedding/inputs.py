"""The documents that vectors are made of: text files, rows of tables, data sets of the Hub."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..data import tables
from ..data.documents import find_files, load_hub
from ..utils.places import from_home


HUB = "hub:"
TEXT, SPANS = "--column", "--spans"  # as the options are called, for the message about a missing one


class Document(NamedTuple):
    """A document: its file, or FILE:ROW with rows counted from 1; its text; the spans of characters that were given."""

    name: str
    text: str
    spans: list[tuple[int, int]]


class Inputs:
    """Documents one after the other, in the same order each time.

    Args:
        given: text files (one document in each), tables, folders, globs, and hub:NAME (its split `train`).
        column: of the text, in all but text files.
        spans: of the spans of characters, lists of [start, end] (text in CSV, as JSON writes them); None: there are
            none.
        besides: files and folders that are no inputs wherever they lie, such as what is made of these.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: something given is not there, or is no file of a known type.
    """

    def __init__(
        self,
        given: str | Path | Sequence[str | Path],
        column: str = "text",
        spans: str | None = None,
        besides: Sequence[Path] = (),
    ):
        self.columns = {TEXT: column} | ({SPANS: spans} if spans is not None else {})
        self.sources: list[tuple[str, Any]] = []  # files, and data sets of the Hub
        for one in [given] if isinstance(given, str | Path) else given:
            name = str(one)
            if name.startswith(HUB):
                self.sources.append((name, load_hub(name.removeprefix(HUB), None, "train", None)))
            else:
                self.sources += [(from_home(str(file)), file) for file in find_files(name, besides)]
        once: dict[Any, tuple[str, Any]] = {}  # a folder and a glob may both stand for a file
        for name, source in self.sources:
            once.setdefault(os.path.abspath(source) if isinstance(source, Path) else name, (name, source))
        self.sources = list(once.values())
        if not self.sources:
            raise FileNotFoundError("no files are given; give files, folders, globs, or hub:NAME.")
        texts = [name for name, source in self.sources if isinstance(source, Path) and tables.kind_of(source) == "text"]
        if texts and spans is not None:
            raise ValueError(f"{texts[0]} has no column {spans!r} of spans: put texts and spans into a table.")

    def __iter__(self) -> Iterator[Document]:
        """Raises a ValueError that names the place of what cannot be read; empty documents have the text ''."""
        for name, source in self.sources:
            if isinstance(source, Path) and tables.kind_of(source) != "parquet":
                tables.check_utf8(source)
            if isinstance(source, Path) and tables.kind_of(source) == "text":
                yield Document(name, tables.read_text(source), [])
                continue
            for number, row in enumerate(self._rows(name, source), 1):
                text = tables.as_text(row[TEXT], name, number, self.columns[TEXT]) or ""
                spans = self._spans(row[SPANS], text, name, number) if SPANS in self.columns else []
                yield Document(f"{name}:{number}", text, spans)

    def survey(self) -> tuple[int, str]:
        """Read all once, so that what is wrong is said before anything is made of it.

        Returns:
            How many documents there are, and a checksum of their names, texts and spans.

        Raises:
            ValueError: as `__iter__`, or no document has text.
        """
        count, with_text, summed = 0, False, hashlib.sha256()
        for document in tqdm(self, desc="reading", unit="doc"):
            count += 1
            with_text = with_text or bool(document.text.strip())
            summed.update(json.dumps(document).encode())
        if not with_text:
            raise ValueError(f"no document has text ({count:,} are empty): name other files, or another --column.")
        return count, summed.hexdigest()

    def _rows(self, name: str, source: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(source, Path):
            yield from tables.read_rows(source, self.columns)
            return
        tables.check_columns(f"the data set {name}", source.column_names, self.columns)
        for row in source.select_columns(list(self.columns.values())):
            yield {ours: row[theirs] for ours, theirs in self.columns.items()}

    def _spans(self, value: Any, text: str, title: str, row: int) -> list[tuple[int, int]]:
        place = f"{title}, row {row}, column {self.columns[SPANS]!r}"
        way_out = f"Give a list of [start, end] with 0 <= start < end <= {len(text)}, the characters of the text."
        if tables.is_empty(value):
            return []
        try:
            value = json.loads(value) if isinstance(value, str) else value
            spans = [(start, end) for start, end in value]
        except (TypeError, ValueError):
            raise tables.TableError(f"{place}: {repr(value)[:40]} is no list of spans. {way_out}") from None
        for start, end in spans:
            if not (type(start) is type(end) is int and 0 <= start < end <= len(text)):
                raise tables.TableError(f"{place}: the span {[start, end]!r} lies outside of the text. {way_out}")
        return spans
