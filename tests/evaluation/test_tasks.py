"""How documents are cut and drawn."""

import pytest

from linformer_hf.evaluation.tasks import Sizes, Task, cut, passages, probe


WORDS = "the old keepers walked rewrittenly over the river and the painterly 4242 stood under a stone "


def sizes(tokenizers, **changes) -> Sizes:
    return Sizes(tokenizers["wordpiece"], **{"length": 40, "shortest": 10, **changes})


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_a_document_is_cut_behind_a_word_and_fits(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for length in range(12, 40):
        text = cut(WORDS * 9, Sizes(tokenizer, length=length, shortest=10))
        assert (WORDS * 9).startswith(text)
        assert (WORDS * 9)[len(text)] == " "
        tokens = len(tokenizer(text)["input_ids"])
        longest_word = max(len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) for word in WORDS.split())
        assert length - longest_word <= tokens <= length


def test_what_fits_is_left_whole_and_what_is_short_is_left_out(tokenizers):
    assert cut(WORDS, sizes(tokenizers)) == WORDS
    assert cut("the old keeper", sizes(tokenizers)) is None


def test_passages_do_not_overlap_and_the_rest_is_left_out():
    assert passages("a b c d e f g", 3) == ["a b c", "d e f"]
    assert passages("a b", 3) == []


def kinds(groups: int, each: int) -> dict:
    return {
        label: {f"{label}{g}": [f"{label} {g} {i} {WORDS}" for i in range(each)] for g in range(groups)}
        for label in ("river", "stone")
    }


def test_a_probe_is_drawn_evenly_over_classes_and_groups(tokenizers):
    task = probe("p", "", kinds(groups=3, each=5), 12, sizes(tokenizers))
    assert [task.labels.count(label) for label in ("river", "stone")] == [6, 6]
    assert {group: task.groups.count(group) for group in task.groups} == dict.fromkeys(
        [f"{label}{g}" for label in ("river", "stone") for g in range(3)], 2
    )
    assert len(set(task.texts)) == 12
    assert all(
        text.startswith(f"{label} {group[-1]} ")
        for text, label, group in zip(task.texts, task.labels, task.groups, strict=True)
    )
    again = probe("p", "", kinds(groups=3, each=5), 12, sizes(tokenizers))
    assert again == task
    assert probe("p", "", kinds(groups=3, each=5), 12, sizes(tokenizers, seed=1)) != task


def test_a_class_in_one_group_is_refused(tokenizers):
    with pytest.raises(ValueError, match=r"'river' has documents in 1 group\(s\); two .* more than 4 documents"):
        probe("p", "", kinds(groups=1, each=5), 4, sizes(tokenizers))


def test_the_facts_are_counted(tokenizers):
    task = Task("s", "what", ["the river", WORDS], [("a", 1), ("b", 1)])
    found = task.facts(tokenizers["wordpiece"])
    assert (found["documents"], found["queries"], found["searched_documents"]) == (2, 2, 1)
    assert found["tokens"]["lowest"] == 4
    assert found["tokens"]["highest"] == len(tokenizers["wordpiece"](WORDS)["input_ids"])
