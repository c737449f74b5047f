"""Programs in processes that are forked from one that has imported everything: Python's start and the imports take 6 s.

A test of how a process is started, or of what is read at an import, needs subprocess instead.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed

from linformer_hf.utils.processes import PARENT
from waiting import HANG


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["linformer_hf.cli", *(f"linformer_hf.training.{verb}" for verb in ("distill", "finetune", "pretrain"))]
)


def fork(program: str | Path, *arguments: object, log: Path, **environment: str) -> multiprocessing.Process:
    """Start the file `program` as `python program ARGUMENTS` would; both its outputs go to `log`."""
    environment[PARENT] = str(os.getpid())  # it ends with the tests
    process = SERVER.Process(target=_become, args=([str(program), *map(str, arguments)], log, environment))
    process.start()
    return process


def _become(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(log.parent)
    multiprocessing.set_start_method(None, force=True)  # as in a program that is started from a shell
    torch.set_num_threads(1)
    os.environ |= environment
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def ended(process: multiprocessing.Process) -> int:
    """Its exit status, of which a signal is the negative number."""
    process.join(HANG)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("it hangs")
    return process.exitcode


def pair(program: str | Path, *arguments: str | Path, log: Path, count: int = 2, **environment: str) -> list[int]:
    """The exit status of two or `count` processes that share a training, started with what torchrun tells its own."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} | environment
    running = [
        fork(program, *arguments, log=log.with_suffix(f".{rank}.log"), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]
    return [ended(process) for process in running]
