"""Runs as cells of a table: several at a time, their logs, failures, and an end on Ctrl-C."""

import json
import sys
import time

import pytest

from linformer_hf import cells
from linformer_hf.cells import Cell, run_all
from linformer_hf.recipe import Recipe


def recipe(path, overrides=()):
    return Recipe({"training": dict(item.removeprefix("training.").split("=") for item in overrides)}, {}, path)


@pytest.fixture
def started(monkeypatch):
    """Runs are not started but noted: (folder, arguments of Children.call)."""
    calls = []

    def run(children, command, **options):
        folder = command[-1].removeprefix("training.output_dir=")
        calls.append((folder, command, options))
        if "fail" in folder:
            options["stdout"].write(b"much\nerror: no such thing\n")
            return 1
        path = cells.Path(folder)
        path.mkdir(parents=True)
        content = {"recipe": recipe("", command[command.index("r.yaml") + 1 :]).raw, "n": path.name}
        (path / "results.json").write_text(json.dumps(content))
        return 0

    monkeypatch.setattr(cells.Children, "call", run)
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
    assert {options["env"]["OMP_NUM_THREADS"] for _, _, options in started} == {"2"}
    assert (tmp_path / "fail.log").read_bytes().endswith(b"error: no such thing\n")
    assert f"failed: {tmp_path / 'fail'}: error: no such thing" in capsys.readouterr().err


def test_one_at_a_time_has_the_terminal(started, tmp_path):
    assert [place for place, _ in run_all([make(tmp_path / "a"), make(tmp_path / "b")], 1, "runs")] == [0, 1]
    assert all(options == {} for _, _, options in started)


def test_a_run_of_several_processes_is_started_by_torchrun(started, tmp_path):
    make(tmp_path / "a", processes=4).run()
    command = started[0][1]
    assert command[:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert command[4:8] == ["--standalone", "--nproc_per_node=4", "-m", "linformer_hf"]


def test_what_waits_is_not_started_after_an_interruption(started, tmp_path, monkeypatch):
    def interrupted(cell, threads=None, children=None):
        started.append(cell)
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run_all([make(tmp_path / str(i)) for i in range(50)], 2, "runs"))
    assert len(started) < 10
