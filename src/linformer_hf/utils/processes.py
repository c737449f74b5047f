"""Processes: what several that share a run need at their start and end, signals, and those that this one has started.

A training notes signals instead of ending at them (see `watch`).
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch.distributed


COUNT = "--expect-processes"
PARENT = "LINFORMER_HF_PARENT"  # in the environment of a run that another one has started: that one's process ID
GRACE_SECONDS = 60  # for a child that writes a checkpoint before it ends


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. A KeyboardInterrupt, so that nothing takes it for an error that it may handle.

    Args:
        number: of the signal.
        checkpoint: what `--resume` goes on from, if training had begun.
    """

    def __init__(self, number: int, checkpoint: Path | None = None):
        super().__init__(signal.Signals(number).name)
        self.number, self.checkpoint = number, checkpoint


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Interrupted, so that what is half made is cleared away, as it is on Ctrl-C."""

    def end(number: int, frame: Any) -> None:
        raise Interrupted(number)

    with handlers({signal.SIGTERM: end}):
        yield


@contextlib.contextmanager
def handlers(handlers: dict[signal.Signals, Callable[[int, Any], None]]) -> Iterator[None]:
    """Other handlers of signals for a while. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():  # Python lets only that one handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Kill this process when the one that $LINFORMER_HF_PARENT names is gone, or the torchrun that started it.

    After a kill -9 of a sweep or of torchrun its runs would write where the next start of it goes on or begins anew.
    """
    parents = [int(os.environ[PARENT])] if PARENT in os.environ else []
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:  # that is, torchrun started this very process
        parents.append(os.getppid())
    if not parents:
        return

    def watch() -> None:
        while True:
            try:
                for parent in parents:
                    os.kill(parent, 0)  # sends nothing
            except OSError:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()


def check_count(expected: int | None, verb: str) -> None:
    """Raise a ValueError unless a launcher has started `expected` processes, if that is given.

    `accelerate launch --cpu --num_processes 2` starts one process without a word.
    """
    started = processes()
    if expected is not None and expected < 1:
        raise ValueError(f"{COUNT} needs the number of processes, such as {COUNT} 2.")
    if expected not in (None, started):
        raise ValueError(
            f"{COUNT} {expected}, but the launcher started {started}; start them with "
            f"torchrun --nproc_per_node {expected} -m linformer_hf {verb} ..."
        )


def lost(error: BaseException) -> bool:
    """Whether it is what torch raises where another process no longer answers."""
    gloo = isinstance(error, RuntimeError) and re.search(r"\bgloo\b|pair closure|by peer", str(error))
    return isinstance(error, torch.distributed.DistError) or bool(gloo)


def leave_group() -> bool:
    """Leave the processes that share a run, when all of them have come so far; whether there are any.

    Together: a process that leaves while another still reports closes the connections under it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return True


def end() -> NoReturn:
    """End with status 0 after all that `sys.exit` runs, but without the interpreter's teardown.

    There threads outlive what they use, and rarely, in a resumed run of two processes that had written everything, one
    aborted with "terminate called without an active exception" (SIGABRT): torchrun then calls the whole run failed.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads and ends executors, as the interpreter does
    atexit._run_exitfuncs()  # trackers, logging, temporary folders
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def forked(tasks: Sequence[Callable[[], None]], number: int, done: Callable[[], Any] = lambda: None) -> None:
    """Run each task in a forked process of its own, at most `number` at a time; `done` is called as each ends.

    One for each, since what it maps and allocates goes with it: memory does not grow with the number of tasks. What a
    task raises is raised here, and the others are ended.

    Raises:
        ChildProcessError: a process has ended without a word, killed or out of memory.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(tasks))
    running: dict[Any, Any] = {}
    with variable("TOKENIZERS_PARALLELISM", "false"):  # their threads do not survive a fork, and would be too many
        try:
            while waiting or running:
                while waiting and len(running) < number:
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_tell_errors, args=(waiting.pop(), sender), daemon=True)
                    process.start()
                    sender.close()
                    running[receiver] = process
                for ended in multiprocessing.connection.wait(list(running)):
                    _raise_told(ended, running)
                    done()
        finally:
            for process in running.values():
                process.kill()
                process.join()


def _tell_errors(task: Callable[[], None], sender: Any) -> None:
    """In the forked process. Signals end it at once: its parent clears away what it has begun."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    error = None
    try:
        task()
    except Exception as raised:
        error = raised
    sender.send(error)


def _raise_told(receiver: Any, running: dict[Any, Any]) -> None:
    try:
        error = receiver.recv()
    except EOFError:
        running[receiver].join()
        code = running.pop(receiver).exitcode
        raise ChildProcessError(
            f"a process that prepares data ended with status {code} (a negative one is a signal; -9 is also what the "
            "system sends where memory runs out). What is finished is kept: give the same command again, with fewer "
            "data.num_proc if it was memory."
        ) from None
    running.pop(receiver).join()
    if error is not None:
        raise error


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable that has another value for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Child(Protocol):
    """What is used of subprocess.Popen."""

    def wait(self, timeout: float | None = None) -> int: ...
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Children:
    """Processes that end with this one: a process that is ended by a signal would leave them running."""

    def __init__(self) -> None:
        self.running: set[Child] = set()
        self.lock = threading.Lock()
        self.ended = False

    def call(self, command: Sequence[str], **options: Any) -> int:
        """Run a command to its end, in any thread; its exit status. `options` are those of Popen.

        Raises:
            Interrupted: `end` has been called; nothing is started.
        """
        return self.wait_for(lambda: subprocess.Popen(command, **options))

    def wait_for(self, start: Callable[[], Child]) -> int:
        """Start a process and wait for its end, in any thread; its exit status. Raises as `call` does."""
        with self.lock:
            if self.ended:
                raise Interrupted(signal.SIGTERM)
            process = start()
            self.running.add(process)
        try:
            return process.wait()
        except BaseException:
            _end([process])
            raise
        finally:
            self.running.discard(process)

    def end(self) -> None:
        """End all that run, and start no more."""
        with self.lock:
            self.ended = True
            running = list(self.running)
        _end(running)


def _end(processes: Sequence[Child]) -> None:
    """SIGTERM, then SIGKILL for what still runs after GRACE_SECONDS or at a second Ctrl-C."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def processes() -> int:
    """How many a launcher has started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
