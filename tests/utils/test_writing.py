"""A full disk is known by what any writer says of it; a file takes its place whole or not at all."""

import contextlib
import errno
import os

import pytest

from linformer_hf.utils.writing import DiskFull, beside, full_disk


FULL = OSError(errno.ENOSPC, "no\n  room")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "a", "/x"), f"[Errno {errno.ENOSPC}] a: '/x'"),
        (OSError(errno.EDQUOT, "b"), f"[Errno {errno.EDQUOT}] b"),
        (OSError(errno.EFBIG, "c"), f"[Errno {errno.EFBIG}] c"),
        (RuntimeError(f"I/O error: {os.strerror(errno.EDQUOT)}"), f"I/O error: {os.strerror(errno.EDQUOT)}"),
        (Exception("Error while serializing: (os error 28)"), "Error while serializing: (os error 28)"),
        (RuntimeError("PytorchStreamWriter failed\n writing file"), "PytorchStreamWriter failed writing file"),
    ],
)
def test_every_writers_words_are_known_and_given_in_one_line(error, words):
    assert full_disk(error) == words


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), ValueError("disk"), KeyError(28), OSError("os error 2")]
)
def test_other_errors_are_none(error):
    assert full_disk(error) is None


def test_it_is_found_behind_other_errors():
    cause, context = ValueError("cannot save"), RuntimeError("cannot close")
    cause.__cause__ = FULL
    context.__context__ = cause
    assert full_disk(context) == f"[Errno {errno.ENOSPC}] no room"


def test_a_cause_goes_before_what_was_being_handled():
    error = ValueError("cannot save")
    error.__context__ = RuntimeError("os error 28, of the one that is handled")
    error.__cause__ = FULL
    assert full_disk(error) == f"[Errno {errno.ENOSPC}] no room"


def test_a_chain_that_leads_back_to_itself_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert full_disk(first) is None


def test_the_sentence_about_it_is_an_error_of_the_system():
    assert isinstance(DiskFull("no room in a/b"), OSError)


def test_a_file_takes_its_place_whole_and_what_fails_leaves_the_former_one(tmp_path):
    path = tmp_path / "a.txt"
    with beside(path) as written:
        written.write_text("first")
        assert not path.exists()
    for error in (OSError, KeyboardInterrupt):
        with contextlib.suppress(error), beside(path) as written:
            written.write_text("half")
            raise error
    with contextlib.suppress(OSError), beside(path):
        raise OSError  # before anything was written
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
