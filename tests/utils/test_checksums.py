"""The list of a folder's files: what is on it, and how each kind of damage is named."""

import json

import pytest

from linformer_hf.utils.checksums import CHECKSUMS_FILE, check, damage, sha256, write


ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", from FIPS 180-2


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows" / "train").mkdir(parents=True)
    for name in ("a.txt", "rows/train/b.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(b"abc")
    write(tmp_path)
    return tmp_path


def listed(folder):
    return json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))


def test_the_sum_is_that_of_the_standard(folder):
    assert sha256(folder / "a.txt") == ABC


def test_every_file_is_listed_but_the_list_and_what_nothing_reads(folder):
    entry = {"bytes": 3, "sha256": ABC}
    assert listed(folder) == {"a.txt": entry, "rows/train/b.bin": entry}
    write(folder)  # the list that is there by now is not on itself
    assert CHECKSUMS_FILE not in listed(folder)
    write(folder, [folder / "a.txt", folder / "rows"])
    assert list(listed(folder)) == ["a.txt"]


def test_what_is_not_on_the_list_is_no_damage(folder):
    (folder / "training_args.bin").write_bytes(b"other")
    (folder / "notes.txt").write_bytes(b"mine")
    assert damage(folder) is None


def test_damage_is_named(folder):
    (folder / "a.txt").write_bytes(b"abd")
    assert damage(folder) == f"a.txt is not what was written: its SHA-256 differs from {CHECKSUMS_FILE}"
    (folder / "a.txt").write_bytes(b"abcd" * 300)
    assert damage(folder) == "a.txt has 1,200 bytes, 3 were written"
    (folder / "a.txt").unlink()
    assert damage(folder) == "a.txt cannot be read (No such file or directory)"


def test_only_what_is_asked_for_is_compared_and_must_be_listed(folder):
    (folder / "a.txt").write_bytes(b"abd")
    assert damage(folder, ["rows"]) is None
    assert "a.txt" in damage(folder, ["a.txt"])
    assert damage(folder, ["rows", "z", "y"]) == f"{CHECKSUMS_FILE} does not list y, z"


@pytest.mark.parametrize("text", ["{", "[1]", '{"a.txt": 3}', '{"a.txt": {"bytes": 3}}', "[" * 100_000, b"\xff"])
def test_a_broken_list_is_damage(folder, text):
    (folder / CHECKSUMS_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert damage(folder).startswith(f"{CHECKSUMS_FILE} cannot be read (")


def test_a_folder_without_a_list_passes_unless_it_must_have_one(tmp_path):
    check(tmp_path)
    check("someone/on-the-hub")
    with pytest.raises(FileNotFoundError, match=f"has no {CHECKSUMS_FILE}"):
        damage(tmp_path)


def test_a_damaged_model_is_refused_with_both_ways_out(folder):
    check(folder)
    (folder / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.txt has 0 bytes, 3 were written. Restore it .* delete .*checksums.json"):
        check(str(folder))
