"""A sentence, or a number, hidden in text that has nothing to do with it, at several lengths.

The manner of LongEmbed's synthetic tasks (https://arxiv.org/abs/2404.12096). Each document holds both, at depths that
are drawn once for all lengths; so `needle` and `passkey` share their documents, and a document's shorter forms begin as
its longer ones do.
"""

import itertools
from bisect import bisect_right

from ..data.demo_texts import python_topics
from .tasks import Sizes, Task


FIRST = (
    *("Thomas", "Anna", "Peter", "Clara", "Robert", "Helen", "Oscar", "Julia", "Martin", "Sofia", "Walter", "Emma"),
    *("Victor", "Laura", "Simon", "Alice"),
)
LAST = ("Reed", "Hale", "Marsh", "Stone", "Finch", "Brook", "Thorne", "Vale", "Cole", "Winter", "Lane", "Moss", "Baker")
TOWNS = (
    "Arden",
    "Corwen",
    "Varna",
    "Ostrava",
    "Hexham",
    "Kelso",
    "Savona",
    "Dunmore",
    "Halden",
    "Narvik",
    "Ripon",
    "Sligo",
)
COLOURS = ("blue", "red", "green", "white", "silver", "yellow", "black", "golden", "brown", "purple")
THINGS = ("lanterns", "kites", "clocks", "goats", "violins", "maps", "bells", "boats", "roses", "carpets")
LONGEST_WORD = 8  # tokens


def hidden(documents: int, sizes: Sizes) -> list[dict[str, str]]:
    """A sentence, a number and the questions for them, for each document; no two share a name or a thing."""
    draw = sizes.draw("needles")
    most = min(len(FIRST) * len(LAST), len(COLOURS) * len(THINGS))
    if documents > most:
        raise ValueError(f"needle and passkey: {documents} documents are more than there are names for, {most}.")
    people = draw.sample(list(itertools.product(FIRST, LAST)), documents)
    things = draw.sample(list(itertools.product(COLOURS, THINGS)), documents)
    found = []
    for (first, last), (colour, thing) in zip(people, things, strict=True):
        person = f"{first} {last}"
        found.append(
            {
                "needle": f"{person} from the town of {draw.choice(TOWNS)} keeps {colour} {thing}.",
                "needle?": f"Who keeps {colour} {thing}?",
                "passkey": f"The pass key for {person} is {draw.randrange(10000, 100000)}.",
                "passkey?": f"What is the pass key for {person}?",
            }
        )
    return found


def haystacks(documents: int, sizes: Sizes) -> dict[int, list[str]]:
    """Length -> texts of so many tokens, at most and nearly, each with its two sentences."""
    tokenizer = sizes.tokenizer
    topics = [text for _, text in python_topics()]
    draw = sizes.draw("haystacks")
    draw.shuffle(topics)

    def costs(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    words = " ".join(topics).split()
    # Lines of asterisks are no words, and leave a document shorter than it may be.
    hay = [(word, cost) for word, cost in zip(words, costs(words), strict=True) if cost <= LONGEST_WORD]
    found: dict[int, list[str]] = {length: [] for length in sizes.needle_lengths}
    for number, sentences in enumerate(hidden(documents, sizes)):
        pair = [sentences["needle"], sentences["passkey"]]
        depths = [draw.random() for _ in pair]
        # In a circle: there may be less text than is asked for.
        around = list(
            itertools.islice(itertools.cycle(hay), (start := len(hay) * number // documents), start + max(found))
        )
        ends = list(itertools.accumulate(cost for _, cost in around))
        for length, texts in found.items():
            room = length - sum(costs(pair)) - tokenizer.num_special_tokens_to_add()
            items = [word for word, _ in around[: bisect_right(ends, room)]]
            for sentence, depth in zip(pair, depths, strict=True):
                items.insert(int(depth * (len(items) + 1)), sentence)  # one item, which stays whole
            texts.append(" ".join(items))
    return found


def _tasks(name: str, about: str, documents: int, sizes: Sizes) -> list[Task]:
    queries = [(sentences[f"{name}?"], number) for number, sentences in enumerate(hidden(documents, sizes))]
    about = f"Python's reference topics with {about} at a random depth"
    found = haystacks(documents, sizes)
    return [Task(name, about, texts, queries, length=length) for length, texts in found.items()]


def needle(documents: int, sizes: Sizes) -> list[Task]:
    """Who keeps blue lanterns? Among documents of the same length, for each length."""
    return _tasks("needle", "a sentence about a person, found by what is asked of it,", documents, sizes)


def passkey(documents: int, sizes: Sizes) -> list[Task]:
    """What is the pass key for Thomas Reed? Among documents of the same length, for each length."""
    return _tasks("passkey", "a person's pass key, found by the person's name,", documents, sizes)
