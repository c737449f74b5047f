"""FSDP2 on CPUs over gloo, where accelerate is made to take it: it looks for FSDP among accelerators only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from forks import pair
from helpers import BLOCKER, MODEL, TRAINING, assert_same_run, results_of, script, tiny_data, write_recipe
from linformer_hf import LinformerConfig, LinformerForMaskedLM, cli
from linformer_hf.training import sharding
from linformer_hf.training.checkpoints import last_whole_checkpoint
from waiting import HANG


STEPS = 20
PLAIN = SimpleNamespace(fsdp=[], deepspeed=None, world_size=1, use_cpu=False)  # training arguments
# What accelerate finds where there are accelerators; and each process notes how many numbers of the weights it holds.
DOUBLE = """
import os
import accelerate.state as state
from transformers import Trainer
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
state.PartialState._prepare_backend = lambda self, *_: ("gloo", state.DistributedType.MULTI_GPU)
whole = Trainer.training_step
def step(self, *a, **k):
    if self.state.global_step == 0:
        weights = list(self.model.parameters())
        held = [sum(p.to_local().numel() for p in weights), sum(p.numel() for p in weights)]
        open(f"held-{os.environ['RANK']}", "w").write(str(held))
    if self.state.global_step == 14 and os.environ.get("DIE"):
        os._exit(9)
    return whole(self, *a, **k)
Trainer.training_step = step
"""
CLEAN = f"""
import sys
{BLOCKER}
sys.meta_path.insert(0, Blocker)
from transformers import AutoModelForMaskedLM
model, info = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert type(model).__name__ == "LinformerForMaskedLM"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def recipe(texts, place) -> str:
    """Less than an epoch, whose last step two processes fill up and one does not."""
    model = {**MODEL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    training = {**TRAINING, "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 10}
    return write_recipe(place / "r.yaml", model=model, data=tiny_data(texts, place), training=training)


def sharded(recipe: str, folder: Path, *more: str, **environment: str) -> list[int]:
    program = folder.parent / "double.py"
    program.write_text(script("pretrain", DOUBLE), encoding="utf-8")
    ours = ["training.use_cpu=false", "training.fsdp=true", "training.per_device_train_batch_size=2"]
    arguments = [recipe, f"training.output_dir={folder}", *ours, *more]
    return pair(program, *arguments, log=folder.with_suffix(".log"), **environment)


def said(folder: Path) -> str:
    return folder.with_suffix(".0.log").read_text(errors="replace")[-3000:]


@pytest.fixture(scope="module")
def two(recipe, place) -> Path:
    assert sharded(recipe, place / "two") == [0, 0], said(place / "two")
    return place / "two"


def test_sharded_processes_train_as_one_and_leave_a_whole_model(recipe, two, place):
    """Each with its share of the weights; the saved model has our code, and loads without this package."""
    assert cli.main(["pretrain", recipe, f"training.output_dir={place / 'one'}"]) == 0
    losses = [
        [row["loss"] for row in results_of(folder)["history"] if "loss" in row] for folder in (place / "one", two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-5)
    assert len(losses[0]) == STEPS
    held = [json.loads((place / f"held-{rank}").read_text()) for rank in range(2)]
    assert sum(own for own, _ in held) == held[0][1]
    assert max(own for own, _ in held) < 0.55 * held[0][1]
    for folder in (two, two / f"checkpoint-{STEPS}"):
        one, saved = load_file(place / "one" / "model.safetensors"), load_file(folder / "model.safetensors")
        assert one.keys() == saved.keys()
        for name in one:
            torch.testing.assert_close(one[name], saved[name], rtol=0, atol=1e-4)
        assert not list(folder.glob("_*.py"))
        config = [json.loads((path / "config.json").read_text()) for path in (place / "one", folder)]
        assert config[0] == config[1]
    home = {**os.environ, "HF_HOME": str(place / "home")}
    ran = subprocess.run(
        [sys.executable, "-c", CLEAN, str(two)], capture_output=True, text=True, timeout=HANG, check=False, env=home
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_sharded_processes_that_die_resume_to_the_last_bit(recipe, two, place):
    """And a checkpoint of theirs is refused to a run without FSDP, with the way out."""
    folder = place / "killed"
    assert sharded(recipe, folder, DIE="1") == [9, 9]
    assert last_whole_checkpoint(folder) == folder / "checkpoint-10"
    trainer = SimpleNamespace(
        args=PLAIN,
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )
    with pytest.raises(ValueError, match=r"checkpoint-10 was written under FSDP and resumes so only\. Use the recipe"):
        sharding.prepare(trainer, folder / "checkpoint-10")
    assert sharded(recipe, folder, "--resume") == [0, 0], said(folder)
    assert "Resuming from" in folder.with_suffix(".0.log").read_text(errors="replace")
    assert_same_run(folder, two)


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    """As accelerate has it where there is neither an accelerator nor use_cpu."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=1))
    with pytest.raises(ValueError, match=r"2 processes were started, .* set training\.use_cpu=true"):
        sharding.prepare(trainer, None)


def test_deepspeed_that_would_shard_nothing_is_refused():
    """With use_cpu accelerate leaves it out; FSDP is refused so in test_processes.py."""
    ours = SimpleNamespace(fsdp=[], deepspeed="ds.json", world_size=1, use_cpu=True)
    trainer = SimpleNamespace(args=ours, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match=r"training\.deepspeed: accelerate shards no model on CPUs"):
        sharding.prepare(trainer, None)


def test_only_layers_are_wrapped():
    """What holds the words is left to accelerate, which groups them with the decoder that is tied to them."""
    model = LinformerForMaskedLM(LinformerConfig(**MODEL, vocab_size=50))
    assert sharding.layer_names(model) == ["LinformerLayer"]


def test_shards_alone_are_refused():
    """They hold neither configuration nor tokenizer."""
    plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    trainer = SimpleNamespace(
        args=PLAIN,
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )
    with pytest.raises(ValueError, match=r"Set training\.fsdp_config\.state_dict_type"):
        sharding.prepare(trainer, None)
