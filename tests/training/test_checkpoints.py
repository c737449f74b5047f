"""Which checkpoints are whole, on folders with the least that makes one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from linformer_hf.training.checkpoints import (
    Seal,
    checkpoints_in,
    ended_in,
    incomplete,
    last_whole_checkpoint,
    random_states_before_state,
    set_aside,
)
from linformer_hf.utils import checksums


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a whole one, sealed or not."""

    def make(step, sealed=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({"step": step, "state": torch.ones(2)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if sealed:
            checksums.write(folder)
        return folder

    return make


def names(paths):
    return [path.name for path in paths]


def test_steps_are_numbers_and_other_names_no_checkpoints(checkpoint, tmp_path):
    for step in (100, 20, 3):
        checkpoint(step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert names(checkpoints_in(tmp_path)) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-100"
    assert last_whole_checkpoint(tmp_path / "checkpoint-3") is None


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt"])
def test_what_is_missing_is_named(checkpoint, sealed, name):
    folder = checkpoint(3, sealed)
    assert incomplete(folder) is None
    (folder / name).unlink()
    assert incomplete(folder) == f"{name} is missing"


def test_weights_must_be_there_and_readable(checkpoint):
    folder = checkpoint(3, sealed=False)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert incomplete(folder).startswith("it cannot be read (")
    (folder / "model.safetensors").unlink()
    assert incomplete(folder) == "it holds no *.safetensors"


def test_an_optimizer_may_have_the_name_that_fsdp_gives(checkpoint):
    folder = checkpoint(3, sealed=False)
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    assert incomplete(folder) is None


def test_deepspeed_has_its_states_in_a_folder_that_it_names(checkpoint):
    """Which is searched for code too."""
    folder = checkpoint(3, sealed=False)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    (folder / "latest").write_text("global_step3")
    assert incomplete(folder) == "global_step3 is missing"
    (folder / "global_step3").mkdir()
    assert incomplete(folder) is None
    torch.save(Path("x"), folder / "global_step3" / "mp_rank_00_model_states.pt")
    assert "names pathlib" in incomplete(folder)


def test_the_checkpoints_that_were_written_to_their_end_have_a_state_that_can_be_read_or_a_list(checkpoint, tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint(step, sealed=step == 1)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert names(ended_in(tmp_path)) == ["checkpoint-1", "checkpoint-4"]


def test_beyond_the_one_to_go_on_from_half_ones_go_and_damaged_ones_are_kept_under_another_name(checkpoint, tmp_path):
    for step in (3, 20, 100):
        checkpoint(step)
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()
    set_aside(tmp_path, tmp_path / "checkpoint-3")
    assert sorted(names(tmp_path.iterdir())) == ["checkpoint-3", "damaged-checkpoint-20"]
    checkpoint(20)
    (tmp_path / "checkpoint-20" / "new").touch()
    set_aside(tmp_path, None)  # takes the place of what was set aside before
    assert sorted(names(tmp_path.iterdir())) == ["damaged-checkpoint-20", "damaged-checkpoint-3"]
    assert (tmp_path / "damaged-checkpoint-20" / "new").exists()


def test_a_seal_is_set_by_the_main_process_when_all_have_written(checkpoint, tmp_path):
    folder = checkpoint(3, sealed=False)
    together = SimpleNamespace(wait_for_everyone=lambda: (folder / "of another process").touch())
    args = SimpleNamespace(output_dir=str(tmp_path), distributed_state=together)
    seal = Seal()
    assert not seal.begun
    seal.on_step_begin(args, None, None)
    assert seal.begun
    for main in (False, True):
        seal.on_save(args, SimpleNamespace(global_step=3, is_world_process_zero=main), None)
        assert (folder / checksums.CHECKSUMS_FILE).exists() is main
    assert "of another process" in json.loads((folder / checksums.CHECKSUMS_FILE).read_text())
    seal.on_save(args, SimpleNamespace(global_step=4, is_world_process_zero=True), None)  # nothing was written there


def test_the_others_random_states_are_waited_for():
    done = []
    together = SimpleNamespace(wait_for_everyone=lambda: done.append("waited"))
    trainer = SimpleNamespace(_save_rng_state=done.append, accelerator=together)
    random_states_before_state(trainer)
    trainer._save_rng_state("folder")
    assert done == ["folder", "waited"]
