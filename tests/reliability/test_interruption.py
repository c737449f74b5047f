"""Runs that are killed, stopped by a signal, out of disk or out of numbers: what stands, and how they go on."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_callback import DefaultFlowCallback, TrainerState

from forks import ended, fork
from helpers import MODEL, TRAINING, assert_same_run, error_line, results_of, tiny_data, tree, write_recipe
from linformer_hf import cli
from linformer_hf.data import corpus
from linformer_hf.training.checkpoints import last_whole_checkpoint
from linformer_hf.utils.processes import PARENT
from waiting import HANG, assert_gone, wait_for


STEPS = 40
KILLS = 6
PYTHON = [sys.executable, "-P"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("interruption")


@pytest.fixture(scope="module")
def recipe(texts, place) -> str:
    """40 steps in two to three epochs, a checkpoint every third, with dropout: random numbers must go on too."""
    every = {"save_steps": 3, "eval_steps": 10, "logging_steps": 1, "per_device_train_batch_size": 7}
    training = {**TRAINING, **every, "max_steps": STEPS, "save_total_limit": 2}
    return write_recipe(place / "r.yaml", model=MODEL, data=tiny_data(texts, place), training=training)


@pytest.fixture(scope="module")
def whole(recipe, place) -> Path:
    """The run that nothing interrupts."""
    assert cli.main(["pretrain", recipe, f"training.output_dir={place / 'whole'}"]) == 0
    return place / "whole"


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, act)` calls `act()` at the end of the n-th optimizer step."""

    before = DefaultFlowCallback.on_step_end

    def patch(step: int, act) -> None:
        def on_step_end(self, args, state, control, **named):
            if state.global_step == step:
                act()
            return before(self, args, state, control, **named)

        monkeypatch.setattr(DefaultFlowCallback, "on_step_end", on_step_end)

    return patch


# The process kills itself at a drawn moment of the four steps after its first whole checkpoint: at one of the calls of
# Python's functions, which it counts first in a step.
KILL = """
import os, signal, sys
from transformers import Trainer as T
far, calls, counts, step, save = float(sys.argv.pop(1)), 0, [], T.training_step, T._save_checkpoint
def count(frame, event, given):
    global calls
    calls += 1
    if counts and calls == counts[-1]: os.kill(os.getpid(), signal.SIGKILL)
def counting(*given):
    if not calls: sys.setprofile(count)
    return step(*given)
def saving(*given):
    save(*given)
    if not counts: counts.append(calls + max(1, int(far * 4 * calls / given[0].args.save_steps)))
T.training_step, T._save_checkpoint = counting, saving
from linformer_hf.cli import main; sys.exit(main(sys.argv[1:]))
"""


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(recipe, whole, tmp_path):
    """kill -9 at moments drawn from the start of the first checkpoint on, each time the same command."""
    folder, draw = tmp_path / "run", random.Random(0)
    command = ["pretrain", recipe, f"training.output_dir={folder}", "--resume"]
    program = tmp_path / "kill.py"
    program.write_text(KILL, encoding="utf-8")
    reached = []
    for _ in range(KILLS):
        run = fork(program, draw.uniform(0, 1), *command, log=tmp_path / "log")
        assert ended(run) == -signal.SIGKILL, (tmp_path / "log").read_text()
        reached.append(last_step(folder))
    assert reached == sorted(reached)
    assert 0 < reached[0] < reached[-1] < STEPS
    ran = subprocess.run(
        [*PYTHON, "-m", "linformer_hf", *command], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert f"Resuming from {folder / 'checkpoint-'}" in ran.stderr
    assert_same_run(folder, whole)


def last_step(folder: Path) -> int:
    """Of the newest checkpoint that is whole; 0 without one."""
    checkpoint = last_whole_checkpoint(folder)
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def test_half_checkpoints_do_not_cost_the_next_whole_one(recipe, whole, at_step, tmp_path):
    """Trainer keeps the `save_total_limit` newest by number, whole or not."""
    folder = tmp_path / "run"
    command = ["pretrain", recipe, f"training.output_dir={folder}", "--resume", "training.save_total_limit=1"]
    at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(command) == 143
    for step in (11, 39):
        half = folder / f"checkpoint-{step}"
        half.mkdir()
        (half / "model.safetensors").write_bytes((folder / "checkpoint-8" / "model.safetensors").read_bytes()[:-8])
    at_step(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(command) == 143
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-10"]
    assert last_step(folder) == 10
    at_step(STEPS + 1, lambda: None)
    assert cli.main(command) == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [8, "epoch", STEPS])  # within an epoch, at its end, at the run's end
def test_a_signal_leaves_a_checkpoint_to_go_on_from(recipe, whole, at_step, tmp_path, capfd, number, status, step):
    if step == "epoch":
        step = next(row["step"] for row in results_of(whole)["history"] if row["epoch"] == 1)
    command = ["pretrain", recipe, f"training.output_dir={tmp_path / 'run'}"]
    at_step(step, lambda: os.kill(os.getpid(), number))
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert cli.main(command) == status
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert last_whole_checkpoint(tmp_path / "run") == checkpoint
    assert not (tmp_path / "run" / "results.json").exists()
    name = signal.Signals(number).name
    line = f"stopped by {name}; {checkpoint} is whole. Go on with: linformer-hf {' '.join(command)} --resume"
    assert capfd.readouterr().err.splitlines()[-1] == line
    at_step(step, lambda: pytest.fail("a finished step was trained again"))
    assert cli.main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_second_ctrl_c_ends_at_once(recipe, tmp_path):
    program = (
        "import os, signal, sys, time; from transformers.trainer_callback import DefaultFlowCallback as F\n"
        "def twice(*a, **k):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    print('still here')\n"
        "F.on_step_end = twice\n"
        "from linformer_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [*PYTHON, "-c", program, "pretrain", recipe, f"training.output_dir={tmp_path / 'run'}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ran.returncode == -signal.SIGINT  # which a shell shows as 130
    assert "SIGINT: writing a checkpoint after this step" in ran.stderr
    assert "still here" not in ran.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_leaves_nothing_half(recipe, tmp_path, monkeypatch, capsys, number, status):
    cache = tmp_path / "cache"
    during = []

    def packed(*arguments, **options):
        during.extend(path.name for path in cache.rglob(".*"))
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not answered")

    monkeypatch.setattr(corpus, "pack", packed)
    command = ["pretrain", recipe, f"data.cache_dir={cache}", f"training.output_dir={tmp_path / 'run'}"]
    assert cli.main(command) == status
    assert during, "nothing was being written, so the test shows nothing"
    assert [path.name for path in cache.rglob(".*")] == []
    assert not (tmp_path / "run").exists()
    assert f"stopped by {signal.Signals(number).name}\n" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["limit", "device", "state"])
def test_a_full_disk_is_named_and_the_last_checkpoint_stands(
    recipe, whole, tmp_path, at_step, capsys, monkeypatch, how
):
    folder, kept = tmp_path / "run", {}
    command = ["pretrain", recipe, f"training.output_dir={folder}"]
    size = (whole / f"checkpoint-{STEPS}" / "optimizer.pt").stat().st_size
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill() -> None:
        kept.update(tree(folder / "checkpoint-6"))
        if how == "limit":  # the system then refuses to let a file grow: EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        elif how == "device":  # writing to /dev/full is ENOSPC
            (folder / "checkpoint-9").mkdir()
            (folder / "checkpoint-9" / "optimizer.pt").symlink_to("/dev/full")
        else:  # in the last file of a checkpoint
            patch.setattr(TrainerState, "save_to_json", half)

    def half(self, path: str) -> None:
        Path(path).write_text("{", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(9, fill)
    try:
        with monkeypatch.context() as patch:
            line = error_line(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert f"writing to {folder} failed" in line
    assert f"the last whole checkpoint is {folder / 'checkpoint-6'}. Make room" in line
    assert tree(folder / "checkpoint-6") == kept
    assert not (folder / "checkpoint-9").exists()
    at_step(9, lambda: None)
    assert cli.main([*command, "--resume"]) == 0
    assert_same_run(folder, whole)


def test_what_is_no_full_disk_is_not_called_one(recipe, tmp_path, at_step, capsys):
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    at_step(2, fail)
    line = error_line(capsys, "pretrain", recipe, f"training.output_dir={tmp_path / 'run'}")
    assert line == "error: [Errno 5] Input/output error"


@pytest.fixture
def no_number(monkeypatch):
    """`no_number(n, value)`: the loss of the n-th step is `value`."""

    def patch(step: int, value: float) -> None:
        compute = Trainer.compute_loss

        def loss(self, *arguments, **options):
            result = compute(self, *arguments, **options)
            return result * value if self.state.global_step == step - 1 and self.is_in_train else result

        monkeypatch.setattr(Trainer, "compute_loss", loss)

    return patch


@pytest.mark.parametrize(("step", "last"), [(2, None), (8, 6), (9, 6)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, no_number, capsys, value, step, last):
    no_number(step, value)
    folder = tmp_path / "run"
    line = error_line(capsys, "pretrain", recipe, f"training.output_dir={folder}", "training.logging_steps=7")
    assert line.startswith(f"error: the loss is not finite at step {step}; training was stopped.")
    assert (f"The last checkpoint is {folder / f'checkpoint-{last}'}." if last else "There is no checkpoint") in line
    assert last_step(folder) == (last or 0)
    assert line.count("Its 7 rows begin with '[CLS]") == 1


def test_a_weight_that_is_not_finite_is_not_saved(recipe, tmp_path, at_step, monkeypatch, capsys):
    """A finite loss with a gradient that is none: the weights are spoilt before the next loss shows it."""
    step = torch.optim.AdamW.step

    def spoil(self, *arguments, **options):
        result = step(self, *arguments, **options)
        if spoiling:
            self.param_groups[0]["params"][0].data[0] = float("nan")
        return result

    spoiling: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    at_step(5, lambda: spoiling.append(1))
    line = error_line(capsys, "pretrain", recipe, f"training.output_dir={tmp_path / 'run'}")
    assert line.startswith("error: a weight is not finite at step 6;")
    assert last_step(tmp_path / "run") == 3


def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(recipe, tmp_path, no_number, caplog):
    no_number(2, float("nan"))
    off = ["training.logging_nan_inf_filter=true", "training.max_steps=3", "training.save_steps=1"]
    assert cli.main(["pretrain", recipe, f"training.output_dir={tmp_path / 'run'}", *off]) == 0
    results = results_of(tmp_path / "run")
    assert (results["steps"], results["skipped_steps"]) == (3, 1)
    assert "Step 2 is skipped: its gradient is not finite. Its 7 rows begin with '[CLS]" in caplog.text
    kept = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3)]
    first = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in first.values())
    assert any(not torch.equal(kept[0][name], value) for name, value in kept[1].items())


def all_started(folder: Path, jobs: int) -> bool:
    return sum(path.stat().st_size > 0 for path in folder.iterdir()) == jobs


def test_the_runs_of_a_table_end_with_it(tmp_path):
    """SIGTERM to the process that runs cells reaches what it has started, and what waits is not started."""
    program = (
        "import sys; from linformer_hf.paper import grid as cells\n"
        "class Sleep(cells.Cell):\n"
        "    def run(self, threads=None, children=None):\n"
        "        code = 'import os, sys, time; open(sys.argv[1], \"w\").write(str(os.getpid())); time.sleep(9000)'\n"
        "        children.call([sys.executable, '-c', code, str(self.folder)])\n"
        "try:\n"
        "    made = [Sleep('pretrain', None, '', sys.argv[2] + '/' + str(i), []) for i in range(4)]\n"
        "    list(cells.run_all(made, int(sys.argv[1]), 'runs'))\n"
        "except KeyboardInterrupt as error: sys.exit(128 + error.number)\n"
    )
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folder.mkdir()
        with subprocess.Popen([*PYTHON, "-c", program, str(jobs), str(folder)]) as run:
            wait_for(partial(all_started, folder, jobs), lambda run=run: run.poll() is None)
            pids = [int(path.read_text()) for path in folder.iterdir()]
            run.terminate()
            assert run.wait(HANG) == 143
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert len(list(folder.iterdir())) == jobs


def test_a_run_ends_with_the_process_that_started_it_though_that_was_killed(tmp_path):
    """kill -9 lets the first process end nothing: the second one notices."""
    child = (
        "import os, sys, time; from linformer_hf.utils.processes import end_with_parent\n"
        "end_with_parent(); open(sys.argv[1] + '/part', 'w').write(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '/part', sys.argv[1] + '/pid'); time.sleep(9000)"
    )
    parent = "import os, subprocess, sys; os.environ[sys.argv[3]] = str(os.getpid())\n"
    parent += "subprocess.run([sys.executable, '-P', '-c', sys.argv[1], sys.argv[2]])"
    with subprocess.Popen([*PYTHON, "-c", parent, child, str(tmp_path), PARENT]) as run:
        wait_for((tmp_path / "pid").exists, lambda: run.poll() is None)
        left = psutil.Process(int((tmp_path / "pid").read_text()))
        time.sleep(0.5)
        assert left.is_running()
        run.kill()
    assert_gone([left], "it goes on without the process that started it")
