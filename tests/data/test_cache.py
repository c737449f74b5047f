"""The cache's folders: made once, whole or not at all, and made again where they were damaged."""

import errno
import json

import pytest

from linformer_hf.data import cache
from linformer_hf.utils.writing import DiskFull


def folder_of(text: str, given: list):
    def write(beside, damaged):
        given.append(damaged and (damaged / "a").read_text())
        (beside / "a").write_text(text)
        (beside / "rows").mkdir()
        (beside / "rows" / "b").write_text(text)

    return write


def test_a_folder_is_made_once_and_again_from_its_damaged_self(tmp_path, caplog):
    given, target = [], tmp_path / "place" / "corpus"
    for text in ("first", "second"):
        cache.made_once(target, folder_of(text, given))
    assert (given, (target / "a").read_text()) == ([None], "first")
    (target / "a").write_text("other")
    cache.made_once(target, folder_of("third", given))
    assert (given, (target / "a").read_text()) == ([None, "other"], "third")
    assert f"The cached {target} is damaged" in caplog.text
    assert list(target.parent.iterdir()) == [target]  # no lock, nothing half and nothing set aside


def test_damage_beside_what_is_read_makes_nothing_anew(tmp_path, caplog):
    given, target = [], tmp_path / "corpus"
    cache.made_once(target, folder_of("first", given))
    (target / "rows" / "b").write_text("other")
    cache.made_once(target, folder_of("second", given), only=["a"])
    assert not caplog.text
    assert cache.is_whole(target, ["a"])
    assert not cache.is_whole(target, ["a", "rows"])
    assert not cache.is_whole(tmp_path / "nothing")
    assert given == [None]


def test_a_folder_without_its_list_is_not_whole(tmp_path, caplog):
    (tmp_path / "corpus").mkdir()
    assert not cache.is_whole(tmp_path / "corpus")
    assert "has no checksums.json" in caplog.text


@pytest.mark.parametrize("error", [ValueError("no text"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_and_is_raised_as_it_is(tmp_path, error):
    def write(beside, damaged):
        (beside / "half").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        cache.made_once(tmp_path / "corpus", write)
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_the_first_to_finish_wins(tmp_path):
    target = tmp_path / "corpus"
    with cache.written_whole(target) as slow:
        (slow / "a").write_text("slow")
        with cache.written_whole(target) as fast:
            (fast / "a").write_text("fast")
    assert (target / "a").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [target]


def test_what_this_machine_left_half_is_cleared_away_and_anothers_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.platform, "node", lambda: "here")
    ours, theirs, other = (tmp_path / name for name in (".corpus.here.1", ".corpus.there.1", ".corpus2.here.1"))
    for half in (ours, theirs, other):
        half.mkdir()
    cache.made_once(tmp_path / "corpus", folder_of("first", []))
    assert sorted(tmp_path.iterdir()) == [theirs, other, tmp_path / "corpus"]


def test_a_full_disk_is_named_with_the_folder_and_the_way_out(tmp_path):
    def write(beside, damaged):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"No space left on device.*set data\.cache_dir and") as caught:
        cache.made_once(tmp_path / "corpus", write)
    assert f": {tmp_path} or " in str(caught.value)


def test_a_checksum_is_of_the_content_and_not_of_its_order(tmp_path):
    assert cache.checksum({"a": 1, "b": [2, 3]}) == cache.checksum({"b": [2, 3], "a": 1})
    assert len({cache.checksum(recipe) for recipe in ({"a": [1, 2]}, {"a": [2, 1]}, {"a": "1"}, {"a": None})}) == 4
    # The folders of earlier runs are found under it: sha256 of {"a": 1}, its first 16 digits.
    assert cache.checksum({"a": 1}) == "f9d86028c6e0d64e"
    cache.write_plain_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": 1, "a": "é"}
