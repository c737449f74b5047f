"""What the programs in this folder share: a check of the number of processes, then the command line of the package."""

import atexit
import os
import sys
import threading
from typing import NoReturn

import torch

from linformer_hf.cli import main


OPTION = "--expect-processes"
USAGE = f"{OPTION} needs the number of processes, such as {OPTION} 2."


def launch(verb: str) -> int:
    """Run `linformer-hf VERB` with this program's arguments, in each process that torchrun or accelerate started.

    `--expect-processes N` is an error unless there are N: `accelerate launch --cpu --num_processes 2` starts one
    process without a word.
    """
    expected, arguments = split(sys.argv[1:])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and expected != processes:
        sys.exit(
            fail(
                f"{OPTION} {expected}, but the launcher started {processes}; start them with "
                f"torchrun --nproc_per_node {expected} {sys.argv[0]} ..."
            )
        )
    status = main([verb, *arguments])
    if status == 0 and torch.distributed.is_initialized():
        # Together: a process that leaves while another still reports closes the connections under it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        end()
    return status


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


def split(arguments: list[str]) -> tuple[int | None, list[str]]:
    """The value of --expect-processes, if it is there, and the other arguments."""
    rest, expected = [], None
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != OPTION:
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value.isdecimal() or int(value) < 1:
            sys.exit(fail(USAGE))
        expected = int(value)
    return expected, rest


def fail(message: str) -> int:
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    return 2
