"""Waiting for what must happen, on machines that may be as slow as they please."""

import time
from collections.abc import Callable
from typing import Any

import psutil


HANG = 900  # seconds; ends what hangs, and nothing that is slow


def wait_for(happened: Callable[[], Any], running: Callable[[], bool] = lambda: True) -> Any:
    """What `happened` returns once it is true; fails where it never is, or `running` says that nothing does it."""
    until = time.monotonic() + HANG
    while not (found := happened()) and running() and time.monotonic() < until:
        time.sleep(0.01)
    found = found or happened()  # it may have been the last that the process did
    assert found, "it never happened"
    return found


def assert_gone(processes: list[psutil.Process], why: str) -> None:
    """All of them end by themselves."""
    _, alive = psutil.wait_procs(processes, timeout=HANG)
    for process in alive:
        process.kill()
    assert not alive, why
