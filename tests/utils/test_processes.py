"""Processes: counts, signals, and children that end with the one that started them."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch.distributed

from linformer_hf.utils.processes import (
    Children,
    Interrupted,
    check_count,
    forked,
    handlers,
    is_main_process,
    leave_group,
    lost,
    sigterm_raises,
    variable,
)
from waiting import wait_for


def test_an_interruption_names_its_signal_and_is_no_error_that_may_be_handled():
    interrupted = Interrupted(signal.SIGTERM)
    assert str(interrupted) == "SIGTERM"
    assert (interrupted.number, interrupted.checkpoint) == (15, None)
    assert not isinstance(interrupted, Exception)


def test_sigterm_raises_and_the_former_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with handlers({signal.SIGTERM: print}):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_process_alone_is_the_main_one_and_has_no_group(monkeypatch):
    for rank, main in ((None, True), ("0", True), ("1", False)):
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        assert is_main_process() is main
    assert leave_group() is False


def test_a_process_that_is_lost_is_known_by_what_torch_raises():
    gloo = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation"
    assert lost(RuntimeError(gloo))
    assert lost(RuntimeError("Application timeout caused pair closure"))
    assert lost(torch.distributed.DistBackendError("NCCL error"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost(ValueError(gloo))


def test_another_number_of_processes_is_refused_with_the_command_that_starts_them(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_count(None, "pretrain")
    check_count(1, "pretrain")
    with pytest.raises(ValueError, match=r"needs the number of processes, such as --expect-processes 2"):
        check_count(0, "pretrain")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_count(4, "pretrain")
    with pytest.raises(ValueError, match=r"es 2, but the launcher started 4; .* --nproc_per_node 2 -m .* finetune"):
        check_count(2, "finetune")


class Stubborn:
    """A child that answers SIGTERM or does not."""

    def __init__(self, obeys: bool):
        self.obeys, self.status, self.signals, self.started = obeys, None, [], threading.Event()

    def wait(self, timeout=None):
        self.started.set()
        while self.status is None:
            if timeout is not None:
                raise subprocess.TimeoutExpired("child", timeout)
            threading.Event().wait(0.01)
        return self.status

    def poll(self):
        return self.status

    def terminate(self):
        self.signals.append("TERM")
        self.status = -15 if self.obeys else None

    def kill(self):
        self.signals.append("KILL")
        self.status = -9


def test_children_end_with_sigterm_and_only_those_that_do_not_are_killed():
    children, both = Children(), [Stubborn(True), Stubborn(False)]
    starts = [lambda child=child: child for child in both]
    threads = [threading.Thread(target=children.wait_for, args=(start,), daemon=True) for start in starts]
    for thread, child in zip(threads, both, strict=True):
        thread.start()
        assert child.started.wait(10)
    children.end()
    for thread in threads:
        thread.join(10)
    assert [child.signals for child in both] == [["TERM"], ["TERM", "KILL"]]
    assert not children.running
    started = []
    with pytest.raises(Interrupted):
        children.wait_for(lambda: started.append(1))
    assert not started


def test_a_child_whose_parent_is_interrupted_is_ended():
    children, child = Children(), Stubborn(True)
    waits = [KeyboardInterrupt]

    def wait(timeout=None, wait=child.wait):
        if waits:
            raise waits.pop()
        return wait(timeout)

    child.wait = wait
    with pytest.raises(KeyboardInterrupt):
        children.wait_for(lambda: child)
    assert child.signals == ["TERM"]
    assert not children.running


def test_a_command_is_run_to_its_end():
    program = "import os, sys; sys.exit(3 + (os.environ['A'] == 'b'))"
    assert Children().call([sys.executable, "-I", "-S", "-c", program], env={**os.environ, "A": "b"}) == 4


def test_tasks_run_in_processes_of_their_own_a_few_at_a_time(tmp_path):
    """Each waits for the file of the one that runs beside it, and for those before to be gone."""

    def task(number):
        def run():
            (tmp_path / f"{number}.{os.getpid()}").touch()
            wait_for(lambda: list(tmp_path.glob(f"{number ^ 1}.*")))
            assert os.environ["TOKENIZERS_PARALLELISM"] == "false"

        return run

    ended = []
    forked([task(number) for number in range(6)], 2, lambda: ended.append(1))
    assert len(ended) == 6
    processes = [path.suffix for path in sorted(tmp_path.iterdir())]
    assert len(set(processes)) == 6
    assert f".{os.getpid()}" not in processes


def test_what_a_task_raises_ends_the_others_and_is_raised(tmp_path):
    def fail():
        wait_for((tmp_path / "begun").exists)
        raise ValueError("row 3 is no text")

    def hang():
        (tmp_path / "begun").touch()
        threading.Event().wait()

    with pytest.raises(ValueError, match="row 3 is no text"):
        forked([hang, fail], 2)
    with pytest.raises(ChildProcessError, match=r"ended with status -9 .*give the same command again"):
        forked([lambda: os.kill(os.getpid(), signal.SIGKILL)], 1)


def test_an_environment_variable_comes_back(monkeypatch):
    monkeypatch.delenv("OURS", raising=False)
    for before in (None, "1"):
        if before:
            monkeypatch.setenv("OURS", before)
        with variable("OURS", "2"):
            assert os.environ["OURS"] == "2"
        assert os.environ.get("OURS") == before
