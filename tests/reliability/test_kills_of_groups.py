"""kill -9 where several processes are at work: two that share a run, the torchrun above them, a sweep's cells."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

import torture
from forks import SERVER, pair
from helpers import HALF, MODEL, TORCHRUN, TRAINING, results_of, script, tiny_data, write_recipe
from killing import STEPS, assert_equal_runs, victim
from linformer_hf import cli
from linformer_hf.paper.grid import folder_name
from linformer_hf.training.checkpoints import last_whole_checkpoint
from waiting import HANG, assert_gone, wait_for


# One of the two processes kills itself, as KILL says: [rank, event, number]. Each "open" counts that writes.
# With "hold" none does, and both wait at that step to be killed.
HOOK = """
import json, os, signal, sys, time
from transformers import Trainer as T
rank, event, number = json.loads(os.environ.get("KILL", '[-1, "", 0]'))
seen = 0
def count():
    global seen
    seen += 1
    if seen == number: os.kill(os.getpid(), signal.SIGKILL)
def audit(name, given):
    if name == "os.rename" or (name == "open" and isinstance(given[2], int) and given[2] & 3): count()
if event == "hold":
    step = T.training_step
    T.training_step = lambda *given: (given[0].state.global_step == number and time.sleep(9000), step(*given))[1]
elif rank == int(os.environ["RANK"]):
    if event == "change":
        sys.addaudithook(audit)
    else:
        whole = getattr(T, event)
        setattr(T, event, lambda *given: (count(), whole(*given))[1])
"""


HOLD = """
import time
from transformers import Trainer as T
step = T.training_step
T.training_step = lambda *given: (given[0].state.global_step >= 5 and time.sleep(9000), step(*given))[1]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def recipe(texts, place) -> str:
    """With dropout: the random numbers of both processes must go on too."""
    every = {"save_steps": 3, "eval_steps": 5, "logging_steps": 1, "save_total_limit": 2, "max_steps": STEPS}
    return write_recipe(place / "r.yaml", model=MODEL, data=tiny_data(texts, place), training={**TRAINING, **every})


@pytest.fixture(scope="module")
def program(place) -> Path:
    program = place / "program.py"
    program.write_text(script("pretrain", HOOK), encoding="utf-8")
    return program


@pytest.fixture(scope="module")
def start(program, recipe):
    """`start(folder, kill)` lets torchrun start two processes on a run, with a log of their own."""

    def begin(folder: Path, kill: list | None = None) -> subprocess.Popen:
        command = [*TORCHRUN, str(program), recipe, f"training.output_dir={folder}", HALF, "--resume"]
        environment = {**os.environ, **({"KILL": json.dumps(kill)} if kill else {})}
        with folder.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    return begin


def log_of(folder: Path) -> str:
    return folder.with_suffix(".log").read_text(errors="replace")[-3000:]


def step_of(folder: Path) -> int:
    checkpoint = last_whole_checkpoint(folder)
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def ends(run: subprocess.Popen) -> int:
    try:
        return run.wait(HANG)
    finally:
        run.kill()


@pytest.fixture(scope="module")
def finish(program, recipe):
    """`finish(folder)` does so in two processes without a torchrun, whose start takes longer than the run."""

    def end(folder: Path) -> None:
        log = folder.with_suffix(".log")
        codes = pair(program, recipe, f"training.output_dir={folder}", HALF, "--resume", log=log)
        assert codes == [0, 0], [log.with_suffix(f".{rank}.log").read_text(errors="replace") for rank in range(2)]

    return end


@pytest.fixture(scope="module")
def whole(finish, place) -> Path:
    """The run of two processes that nothing interrupts."""
    finish(place / "whole")
    return place / "whole"


def killed_launcher(start, folder: Path, step: int) -> None:
    """kill -9 of torchrun itself, at that step after a new checkpoint; its processes end with it."""
    before = step_of(folder)
    run = start(folder, [-1, "hold", step])
    wait_for(lambda: step_of(folder) > before, lambda: run.poll() is None)
    processes = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert len(processes) >= 2, log_of(folder)
    assert_gone(processes, "processes train on without their torchrun")


@pytest.mark.torture
def test_two_processes_killed_one_or_all_end_as_if_they_had_not_been(start, finish, whole, place):
    draw, folder = random.Random(0), place / "killed"
    # The second process dies before its random numbers are in checkpoint-6, which must then not be taken for whole.
    assert ends(start(folder, [1, "_save_rng_state", 2])) != 0
    assert (folder / "checkpoint-6").exists(), log_of(folder)
    assert step_of(folder) == 3
    killed_launcher(start, folder, draw.randint(7, STEPS - 1))
    assert 3 < step_of(folder) < STEPS
    finish(folder)
    assert_equal_runs(folder, whole)
    kills, where = 2, {"random state of the second process": 1, "torchrun": 1}
    for number in range(torture.times(0, 8)):
        folder = place / f"killed-{number}"
        events = [("change", draw.randint(1, 120)), ("training_step", draw.randint(1, STEPS))]
        events += [("_save_checkpoint", draw.randint(1, 5)), ("evaluate", draw.randint(1, 3))]
        event, count = events[number % len(events)]
        rank = draw.randint(0, 1) if event != "change" else 0
        status = ends(start(folder, [rank, event, count]))
        assert status != 0 or (folder / "results.json").exists(), log_of(folder)
        if status:
            kills, where[event] = kills + 1, where.get(event, 0) + 1
            finish(folder)
        assert_equal_runs(folder, whole)
    torture.record("killed runs end bit-identical", run="two processes", kills=kills, phases=where)


@pytest.fixture(scope="module")
def sweep(recipe, place) -> tuple[str, dict[str, Path]]:
    """A sweep of two cells that share the machine, and each of its cells run by itself."""
    cells = {"K = 8": [], "K = 16": ["model.projected_length=16"]}
    section = {"output_dir": str(place / "out"), "recipe": recipe, "cells": cells, "seeds": [5], "jobs": 2}
    alone = {name: place / f"alone-{len(changes)}" for name, changes in cells.items()}
    for name, folder in alone.items():
        overrides = [*cells[name], "training.seed=5", f"training.output_dir={folder}"]
        assert cli.main(["pretrain", recipe, *overrides]) == 0
    return write_recipe(place / "sweep.yaml", sweep=section), alone


def held_victim(arguments: list[str], change: int | None, seconds: float | None, note: Path, folder: Path) -> None:
    """With `seconds`, the cells, which come from a server that the sweep starts, wait from step 5 on to be killed."""
    if seconds is not None:
        hook = folder / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOLD, encoding="utf-8")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")]))
    victim(arguments, change, None, note, folder)


def swept(recipe: str, folder: Path, change: int | None = None, seconds: float | None = None) -> str:
    """Run the sweep in a forked process; where it was killed, or how it ended.

    Args:
        change: of the sweep's own files, at which it is killed.
        seconds: after the first checkpoint of a cell, when it is killed; the cells do not come to their end before.
    """
    note = folder.with_suffix(".note")
    arguments = ["sweep", recipe, f"sweep.output_dir={folder}"]
    process = SERVER.Process(target=held_victim, args=(arguments, change, seconds, note, folder.parent))
    process.start()
    children = []

    def noted() -> bool:
        nonlocal children
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True) or children
        return process.exitcode is not None or (seconds is not None and any(folder.glob("*/*/checkpoint-*")))

    wait_for(noted)
    if seconds is not None:
        time.sleep(seconds)
    process.kill()
    process.join()
    assert_gone(children, "cells train on without their sweep")
    assert process.exitcode in (0, -signal.SIGKILL), note.with_suffix(".log").read_text(errors="replace")
    return note.read_text() or "cells: by the clock"


@pytest.mark.torture
def test_a_sweep_that_is_killed_ends_as_if_it_had_not_been(sweep, place):
    recipe, alone = sweep
    draw, phases = random.Random(0), Counter()
    for run in range(torture.times(1, 3)):
        folder = place / f"sweep-{run}"
        for kill in range(torture.times(1, 3)):
            # At a change of the sweep's own files (it makes 18), or while its cells run.
            moment = {"change": draw.randint(1, 17)} if (kill + run) % 2 else {"seconds": draw.uniform(0, 0.5)}
            found = swept(recipe, folder, **moment)
            phases[found.partition(":")[0]] += not found.startswith("ended")
            if (folder / "results.json").exists():
                break
        if not (folder / "results.json").exists():
            assert swept(recipe, folder).startswith("ended")
        cells = results_of(folder)["cells"]
        for name, one in alone.items():
            assert_equal_runs(folder / folder_name(name) / "seed-5", one)
            assert cells[name]["5"]["metrics"] == results_of(one)["metrics"]
    assert sum(phases.values()) > 0
    torture.record("killed runs end bit-identical", run="sweep", kills=sum(phases.values()), phases=dict(phases))
