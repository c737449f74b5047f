"""Runs as cells of a table: several at a time, their logs, failures, and an end on Ctrl-C."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys

import pytest

from linformer_hf.paper import grid as cells
from linformer_hf.paper.grid import Cell, run_all
from linformer_hf.utils.recipe import Recipe
from waiting import HANG, wait_for


def recipe(path, overrides=()):
    return Recipe({"training": dict(item.removeprefix("training.").split("=") for item in overrides)}, {}, path)


@pytest.fixture
def started(monkeypatch):
    """Runs are not started but noted: (folder, command, options of Children.call or number of threads)."""
    calls = []

    def run(children, command, **options):
        folder = command[-1].removeprefix("training.output_dir=")
        calls.append((folder, command, options))
        if "fail" in folder:
            return 1
        path = cells.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        content = {"recipe": recipe("", command[command.index("r.yaml") + 1 :]).raw, "n": path.name}
        (path / "results.json").write_text(json.dumps(content))
        return 0

    class Forked:
        def __init__(self, arguments, log, threads):
            log.write_bytes(b"much\nerror: no such thing\n")
            self.code = run(None, arguments, threads=threads)

        def wait(self):
            return self.code

    monkeypatch.setattr(cells.Children, "call", run)
    monkeypatch.setattr(cells, "Forked", Forked)
    return calls


def make(folder, **options):
    return Cell("pretrain", recipe, "r.yaml", folder, ["training.seed=1"], **options)


def test_several_at_a_time_share_the_cores_and_write_logs(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells.os, "cpu_count", lambda: 6)
    folders = [tmp_path / name for name in ("a", "fail", "b")]
    found = dict(run_all([make(folder) for folder in folders], 3, "runs"))
    assert found[0]["n"] == "a"
    assert found[1] is None
    assert found[2]["n"] == "b"
    assert {options["threads"] for _, _, options in started} == {2}
    assert (tmp_path / "fail.log").read_bytes().endswith(b"error: no such thing\n")
    assert f"failed: {tmp_path / 'fail'}: error: no such thing" in capsys.readouterr().err


def test_a_forked_run_is_the_command(tmp_path):
    """Its arguments, its log, its threads, its exit status; and it can be ended."""
    log = tmp_path / "run.log"
    forked = cells.Forked(["pretrain", str(tmp_path / "missing.yaml")], log, 1)
    assert forked.wait() == 2
    assert log.read_text().startswith("error: ")
    assert "missing.yaml" in log.read_text()
    program = tmp_path / "endless.yaml"
    os.mkfifo(program)  # reading the recipe never ends
    forked = cells.Forked(["pretrain", str(program)], log, 1)

    def writing_end() -> int | None:
        with contextlib.suppress(OSError):  # nobody reads yet
            return os.open(program, os.O_WRONLY | os.O_NONBLOCK)

    end = wait_for(writing_end, lambda: forked.poll() is None)
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.1)
    assert forked.poll() is None
    forked.terminate()
    assert forked.wait(HANG) == 128 + signal.SIGTERM
    os.close(end)


def test_several_processes_that_share_the_machine_get_their_threads(started, tmp_path):
    make(tmp_path / "a", processes=2).run(threads=3)
    assert started[0][2]["env"]["OMP_NUM_THREADS"] == "3"


def test_one_at_a_time_has_the_terminal(started, tmp_path):
    assert [place for place, _ in run_all([make(tmp_path / "a"), make(tmp_path / "b")], 1, "runs")] == [0, 1]
    assert all("stdout" not in options for _, _, options in started)


def test_a_run_of_several_processes_is_started_by_torchrun(started, tmp_path):
    make(tmp_path / "a", processes=4).run()
    command = started[0][1]
    assert command[:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert command[4:8] == ["--standalone", "--nproc_per_node=4", "-m", "linformer_hf"]


def test_what_waits_is_not_started_after_an_interruption(started, tmp_path, monkeypatch):
    def interrupted(cell, threads=None, children=None):
        started.append(cell)
        if cell is not started[0]:
            wait_for(lambda: children.ended)
        raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run_all([make(tmp_path / str(i)) for i in range(50)], 2, "runs"))
    assert len(started) <= 3  # the other one at work, and what the first one's thread took up next


def _note_start_method(log) -> None:
    runpy.run_module = lambda *given, **named: print(multiprocessing.get_start_method(), flush=True)
    cells._main([], log, 1, os.getpid())


def test_a_forked_run_starts_its_data_workers_as_any_other(tmp_path):
    """Not as it was started itself: each worker would then import everything anew, which takes seconds."""
    process = multiprocessing.get_context("forkserver").Process(target=_note_start_method, args=(tmp_path / "log",))
    process.start()
    process.join(HANG)
    assert (tmp_path / "log").read_text(encoding="utf-8").strip() == multiprocessing.get_start_method()


@pytest.mark.parametrize("killed_at", range(8))
def test_a_run_that_was_killed_while_it_was_removed_is_begun_anew(tmp_path, started, monkeypatch, killed_at):
    folder = tmp_path / "run"
    for name in ("checkpoint-3/optimizer.pt", "checkpoint-6/optimizer.pt", "curve.png", "recipe.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    removed = []

    def until(remove):
        def one(*given, **named):
            if len(removed) == killed_at:
                raise KeyboardInterrupt
            removed.append(given)
            remove(*given, **named)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", until(os.unlink))
        patch.setattr(os, "rmdir", until(os.rmdir))
        with contextlib.suppress(KeyboardInterrupt):
            make(folder).run()
    assert len(removed) == min(killed_at, 7)
    assert make(folder).run()["n"] == "run"


def test_a_run_that_was_killed_as_it_began_is_begun_anew(tmp_path, started):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.json.123").write_text("{", encoding="utf-8")
    assert make(tmp_path / "run").run()["n"] == "run"


def test_the_log_of_a_run_that_goes_on_is_kept(tmp_path):
    cell = Cell("convert", None, "--help", tmp_path / "run", [])
    cell.log.write_text("before\n", encoding="utf-8")
    cell.start(1, cells.Children(), resume=True)
    assert cell.log.read_text(encoding="utf-8").startswith("before\nusage:")
    cell.start(1, cells.Children())
    assert cell.log.read_text(encoding="utf-8").startswith("usage:")
