"""A run that is killed at a change of the file system, and how what is left is compared."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from helpers import results_of
from linformer_hf import cli
from linformer_hf.training.checkpoints import last_whole_checkpoint


STEPS = 16
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR
# A function in the stack of the main thread -> what the run is at; the innermost one counts.
PHASES = {
    "prepare": "corpus",
    "load_task": "corpus",
    "_save_checkpoint": "checkpoint",
    "evaluate": "evaluation",
    "training_step": "step",
    "save_final": "final model",
    "report": "report",
}


def phase() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        if frame.f_code.co_name in PHASES:
            return PHASES[frame.f_code.co_name]
        frame = frame.f_back
    return "between"


def victim(arguments: list[str], change: int | None, seconds: float | None, note: Path, folder: Path) -> None:
    """Run a command and kill this process at the `change`-th change of a file or after `seconds`."""
    log = os.open(note.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.set_start_method(None, force=True)  # as in a run that is started from a shell
    torch.set_num_threads(1)
    os.chdir(folder)
    out = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    seen = 0

    def die(why: str) -> None:
        os.write(out, f"{phase()}: {why}".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, given: tuple) -> None:
        nonlocal seen
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITING):
            seen += 1
            if seen == change:
                die(f"{event} {given[0]}")

    def clock() -> None:
        time.sleep(seconds)
        die(f"after {seconds:.2f} s")

    sys.addaudithook(watch)
    if seconds is not None:
        threading.Thread(target=clock, daemon=True).start()
    status = cli.main(arguments)
    os.write(out, f"ended: {seen} changes".encode())
    sys.stdout.flush()
    os._exit(status)


def assert_equal_runs(folder: Path, other: Path) -> None:
    """Weights, optimizer, losses of every step and metrics, all to the last bit.

    Equal losses of every step mean that the same rows were read with the same masks, none twice and none left out.
    """
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    ours, theirs = last_whole_checkpoint(folder), last_whole_checkpoint(other)
    assert ours.name == theirs.name == f"checkpoint-{STEPS}"
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][key]) for key, value in state.items())
    found, wanted = results_of(folder), results_of(other)
    metrics = [{k: v for k, v in run["metrics"].items() if not k.endswith(", s")} for run in (found, wanted)]
    assert metrics[0] == metrics[1]
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    curves = [
        [{key: row.get(key) for key in kept} for row in run["history"] if "loss" in row or "eval_loss" in row]
        for run in (found, wanted)
    ]
    assert curves[0] == curves[1]
