"""Files of a run: JSON that is known to be whole when it is read back, errors that name the checkpoint."""

import json
from pathlib import Path

import pytest

from linformer_hf.utils.files import SUM_KEY, is_path, loading, read_json, record, write_json


WAY_OUT = "Run it again."


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"steps": 3, "name": "Zoë", "folder": Path("a/b"), "pair": (1, 2.5)})
    return path


def test_what_is_written_is_read_back_and_can_be_compared(path):
    plain = {"steps": 3, "name": "Zoë", "folder": "a/b", "pair": [1, 2.5]}
    assert read_json(path, WAY_OUT) == plain
    assert record({"steps": 3, "name": "Zoë", "folder": Path("a/b"), "pair": (1, 2.5)}) == plain
    text = path.read_text(encoding="utf-8")
    assert "Zoë" in text  # for people
    assert list(json.loads(text))[-1] == SUM_KEY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("3", "4", 1), "its content differs from its sha256"),
        (lambda text: text[:-3], "Expecting"),
        (lambda text: "[1]", "it holds list, no JSON object"),
        (lambda text: "[" * 100_000, "recursion"),
        (lambda text: "{}", "it lacks name, steps"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason_and_the_way_out(path, change, words):
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path, WAY_OUT, ("steps", "name"))
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith(f"). {WAY_OUT}")


def test_a_file_in_anothers_place_is_damage_in_another_folder_it_is_not(path, tmp_path):
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / path.name)
    assert read_json(moved, WAY_OUT)["steps"] == 3
    with pytest.raises(ValueError, match="differs from its sha256"):
        read_json(moved.rename(tmp_path / "recipe.json"), WAY_OUT)


def test_a_file_without_a_sum_is_taken_as_it_is_and_one_that_is_missing_is_not_damaged(tmp_path):
    (tmp_path / "old.json").write_text('{"steps": 3}')
    assert read_json(tmp_path / "old.json", WAY_OUT, ["steps"]) == {"steps": 3}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", WAY_OUT)


def test_whatever_a_load_raises_names_the_checkpoint_in_one_line():
    with (
        pytest.raises(ValueError, match="the checkpoint 'a/b' cannot be loaded: first second") as caught,
        loading("a/b"),
    ):
        raise Exception("first\n   second")
    assert str(caught.value.__cause__) == "first\n   second"
    with pytest.raises(KeyboardInterrupt), loading("a/b"):
        raise KeyboardInterrupt


def test_a_sum_that_came_with_the_content_is_not_summed(path):
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "steps": 4})
    assert read_json(path, WAY_OUT)["steps"] == 4


@pytest.mark.parametrize("name", ["/a/b", "./a", "~/a", "a/b/c", ".cache"])
def test_what_can_only_be_a_path(name):
    assert is_path(name)
    assert not any(map(is_path, ("bert-base-uncased", "owner/name")))


def test_an_adapter_s_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds an adapter, no model: .*merge_and_unload"), loading(str(tmp_path)):
        pass
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # what was merged beside it
    with loading(str(tmp_path)):
        pass


def test_loading_says_that_a_folder_is_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "gone"), "runs/sweep/gone", str(tmp_path / "file")):
        with pytest.raises(FileNotFoundError, match=f"no folder '{name}'"), loading(name):
            raise AssertionError("nothing is read")
    with loading("owner/name"), loading(str(tmp_path)):
        pass
