"""Tokenizers that are trained here: what their vocabularies hold, and that the cache gives back what was put in."""

from pathlib import Path

import pytest

from linformer_hf.data.documents import PretrainingData, Source
from linformer_hf.data.tokenizer import Cutter, load_tokenizer, stored, train_tokenizer


TEXTS = ["Zebras eat grass.", "A zebra ate; the Grass grew, grew, grew."]


def trained(kind: str, texts=TEXTS, size: int = 300, **options):
    return train_tokenizer(texts, PretrainingData([Source("demo")], tokenizer_type=kind, vocab_size=size, **options))


def test_characters_within_words_come_first_and_in_order():
    tokenizer = trained("wordpiece", size=60)
    ordered = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    within = [f"##{letter}" for letter in sorted(set("zebraseatgrassatethegrassgrew"))]
    first = ordered.index(within[0])
    assert ordered[first : first + len(within)] == within
    assert set(ordered[:first]) == set(tokenizer.all_special_tokens)
    assert "##." not in ordered  # a mark is a word of its own
    assert set(tokenizer.all_special_ids) == set(range(first))  # none of the characters is special in the end


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_case_is_kept_or_not_also_after_loading(kind, lowercase, tmp_path):
    tokenizer = trained(kind, lowercase=lowercase)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in ("Zebras eat Grass", "A zebra"):
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert (ids == tokenizer(text.lower())["input_ids"]) == lowercase
        assert (ids[0], ids[-1]) == (loaded.cls_token_id, loaded.sep_token_id)
        assert tokenizer.unk_token_id not in ids


def test_a_frequent_word_is_one_token_and_the_size_is_kept():
    for kind, size in (("wordpiece", 40), ("byte_level_bpe", 275)):
        tokenizer = trained(kind, ["grew " * 50, *TEXTS], size)
        assert len(tokenizer) == size
        assert len(tokenizer("we grew")["input_ids"]) < len(tokenizer("we werg")["input_ids"])


def test_the_cache_names_the_content_and_gives_it_back(tmp_path):
    cache = str(tmp_path / "cache")
    one, same, other = (stored(trained("wordpiece", size=size), cache) for size in (40, 40, 36))
    assert one == same
    assert one != other
    assert sorted(path.name for path in Path(cache).iterdir()) == sorted([Path(one).name, Path(other).name])
    assert load_tokenizer(one).get_vocab() == trained("wordpiece", size=40).get_vocab()


def test_a_damaged_one_in_the_cache_is_refused_and_stored_anew(tmp_path):
    tokenizer = trained("wordpiece", size=60)
    folder = stored(tokenizer, str(tmp_path))
    (Path(folder) / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{folder} is damaged: tokenizer\.json has 2 bytes"):
        load_tokenizer(folder)
    assert stored(tokenizer, str(tmp_path)) == folder
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()


def test_a_folder_that_holds_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^the tokenizer '{tmp_path}' cannot be loaded: .+") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


class Counted:
    """A tokenizer that notes how many rows it is given."""

    def __init__(self, tokenizer, fast=True):
        self.tokenizer, self.is_fast, self.rows = tokenizer, fast, []

    def __call__(self, *texts, **options):
        self.rows.append(len(texts[0]))
        return self.tokenizer(*texts, **options)


ROWS = ["a river", "the old keeper walked under the stone " * 6, "", "a garden and a new window over the harbour"]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
@pytest.mark.parametrize(
    ("sides", "options", "fast", "read"),
    [
        ((ROWS,), {}, True, [4]),  # once
        ((ROWS,), {}, False, [4, 1]),
        ((ROWS, ROWS), {}, True, [4, 2]),  # only the long pairs again
        ((["who"] * 4, ROWS), {"truncation": "only_second", "return_offsets_mapping": True}, True, [4, 2]),
    ],
)
def test_rows_are_cut_as_the_tokenizer_cuts_them_and_what_they_lose_is_counted(
    tokenizers, kind, sides, options, fast, read
):
    tokenizer = tokenizers[kind]
    counted = Counted(tokenizer, fast)
    found, lost, whose = Cutter(counted, 12)(*sides, **options)
    assert whose == [0, 1, 2, 3]
    expected = tokenizer(*sides, max_length=12, **{"truncation": True, **options})
    assert dict(found) == dict(expected)
    assert lost == [max(0, len(ids) - 12) for ids in tokenizer(*sides)["input_ids"]]
    assert counted.rows == read
    places = [[encoded.char_to_token(row, 4, len(sides) - 1) for row in range(4)] for encoded in (found, expected)]
    assert places[0] == places[1]
    assert [found.sequence_ids(row) for row in range(4)] == [expected.sequence_ids(row) for row in range(4)]


def test_without_a_length_nothing_is_cut(tokenizers):
    found, lost, whose = Cutter(tokenizers["wordpiece"], None)(ROWS)
    assert dict(found) == dict(tokenizers["wordpiece"](ROWS))
    assert (lost, whose) == ([0] * 4, [0, 1, 2, 3])
