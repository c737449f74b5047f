"""Checkpoints of a run: which are whole, and what is done with the others."""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer import safe_globals

from ..utils import checksums


logger = logging.getLogger(__name__)

# FSDP's optimizer; DeepSpeed's `latest` names the folder of its states, and Trainer writes it no scheduler.
OTHER_NAMES = {"optimizer.pt": ("optimizer.bin", "latest"), "scheduler.pt": ("latest",)}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-<step>` that is whole, or None. Half-written and damaged ones are named in the log."""
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = incomplete(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("Skipping %s: %s.", checkpoint, problem)
    return None


def incomplete(checkpoint: Path) -> str | None:
    """What is missing or damaged, in words; None for a whole checkpoint."""
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        if not any((checkpoint / other).exists() for other in (name, *OTHER_NAMES.get(name, ()))):
            return f"{name} is missing"
    try:
        latest = checkpoint / "latest"
        if latest.exists() and not (states := checkpoint / latest.read_text(encoding="utf-8").strip()).is_dir():
            return f"{states.name} is missing"
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as file:
                file.keys()
        if not weights:
            return "it holds no *.safetensors"
        sealed = (checkpoint / checksums.CHECKSUMS_FILE).exists()  # if not, the run was ended before that
        return (checksums.damage(checkpoint) if sealed else None) or _foreign_code(checkpoint)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        return f"it cannot be read ({error})"


def _foreign_code(checkpoint: Path) -> str | None:
    """What in the states that Trainer reads is neither tensor nor plain data, in words.

    Trainer reads them with `weights_only=True`, which refuses the same, by an error that advises to switch it off.
    """
    for path in sorted(path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth", ".bin")):
        if path.name == checksums.NEVER_READ:
            continue
        with safe_globals():  # what transformers lets a state of random numbers name
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return f"{path.name} names {', '.join(sorted(names))}, which no state needs; it was not executed"
    return None


def ended_in(folder: Path) -> list[Path]:
    """The checkpoints that Trainer has written to their end, damaged since or not: trainer_state.json is its last."""
    ended = []
    for state in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        with contextlib.suppress(OSError, ValueError):
            if not (state.parent / checksums.CHECKSUMS_FILE).exists():
                json.loads(state.read_text(encoding="utf-8"))
            ended.append(state.parent)
    return ended


def set_aside(folder: Path, checkpoint: Path | None) -> None:
    """Clear away what lies beyond the checkpoint that a run goes on from: half-written ones, and damaged ones renamed.

    Trainer counts them for `save_total_limit`, as the newest ones, and would remove the run's next checkpoint instead.
    """
    ended = ended_in(folder)
    for other in checkpoints_in(folder):
        if checkpoint is None or _step(other) > _step(checkpoint):
            aside = folder / f"damaged-{other.name}"
            shutil.rmtree(aside if other in ended else other, ignore_errors=True)
            if other in ended:
                other.rename(aside)


class Seal(TrainerCallback):
    """Lists the files of every checkpoint, once all processes have written theirs; notes that training has begun."""

    begun = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            checksums.write(checkpoint)


def random_states_before_state(trainer: Trainer) -> None:
    """Let the main process wait for the others' files of a checkpoint before it writes trainer_state.json.

    That file is what a checkpoint is known by as written to its end, and older ones are removed after it.
    """
    save = trainer._save_rng_state  # what the other processes write, and the last thing before that

    def save_together(output_dir: str) -> None:
        save(output_dir)
        trainer.accelerator.wait_for_everyone()

    trainer._save_rng_state = save_together
