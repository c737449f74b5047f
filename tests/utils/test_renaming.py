"""A file that is written beside its place is there whole, or not at all."""

import contextlib

from linformer_hf.utils.renaming import beside


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
