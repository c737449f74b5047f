"""Time and memory of code (interleaved samples, other processes noticed, the allocator's peak), and modules watched."""

import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch


# A sample lasts about this long at least: shorter code runs several times in it.
SAMPLE_SECONDS = 0.1
# A sample is contended if other processes took more than this share of one core's time, and more than 30 ms.
CONTENDED = 0.1


@dataclass
class Samples:
    """Repeated measurements of one case, in seconds per call.

    Attributes:
        wall, cpu: elapsed time, and CPU time of this process over all its threads.
        contended: whether other processes were busy during the sample.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    contended: list[bool] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians and spreads over the samples without contention (over all, if there are fewer than three)."""
        quiet = [i for i, busy in enumerate(self.contended) if not busy]
        used = quiet if len(quiet) >= 3 else range(len(self.wall))
        wall, cpu = [self.wall[i] for i in used], [self.cpu[i] for i in used]
        return {
            "wall_s": statistics.median(wall),
            "wall_range_s": [min(wall), max(wall)],
            "cpu_s": statistics.median(cpu),
            "cpu_range_s": [min(cpu), max(cpu)],
            "samples": len(self.wall),
            "contended": sum(self.contended),
        }


def busy_seconds() -> float | None:
    """CPU time that all processes of the machine have used (None where /proc/stat does not tell)."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq = (int(part) for part in file.readline().split()[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], calls: int) -> tuple[float, float, bool]:
    """(wall, CPU, contended) of one sample of `calls` calls; seconds per call."""
    synchronize()
    others, wall, cpu = busy_seconds(), time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    contended = False
    if others is not None:
        # /proc/stat counts in steps of 10 ms on every core: below a tenth of a second it tells nothing.
        foreign = (busy_seconds() or 0) - others - cpu
        contended = foreign > max(CONTENDED * wall, 0.03)
    return wall / calls, cpu / calls, contended


def interleave(
    cases: dict[Any, Callable[[], Any]], samples: int, seed: int = 0, warm_up: int = 2
) -> dict[Any, Samples]:
    """Time every case `samples` times, in an order that is drawn anew for each round.

    Drifts of the machine (heat, other processes) then meet all cases alike. The number of calls in a sample is settled
    in the warm-up.
    """
    order = random.Random(seed)
    calls, found = {}, {name: Samples() for name in cases}
    for name, call in cases.items():
        for _ in range(warm_up):
            wall, _, _ = timed(call, 1)
            if wall > 1:  # so long a call has little left to warm up
                break
        calls[name] = max(1, round(SAMPLE_SECONDS / max(wall, 1e-6)))
    for _ in range(samples):
        names = list(cases)
        order.shuffle(names)
        for name in names:
            wall, cpu, contended = timed(cases[name], calls[name])
            found[name].wall.append(wall)
            found[name].cpu.append(cpu)
            found[name].contended.append(contended)
    return found


@contextlib.contextmanager
def watched(modules: Iterable[Any], keep: Callable[..., None]) -> Iterator[None]:
    """Call `keep(number, module, arguments, output)` after every forward pass of the modules, in order 0, 1, ..."""
    handles = [module.register_forward_hook(partial(keep, number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that `call` held at one moment above what was allocated before it.

    On CUDA the device's own counter. On the CPU every allocation of torch's allocator, as its profiler records them
    (what a library takes behind torch's back is not seen).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def peak_resident_mib(run: Callable[[], Any]) -> float | None:
    """Peak resident memory above the start of `run`, in MiB; None where /proc does not tell (outside Linux)."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before counts as resident
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        run()
        return (status("VmHWM") - before) / 1024
    except (OSError, AttributeError, StopIteration):
        return None


def longest_chain(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """How many operations wait for each other, one after the other, in the exported graph of a call."""
    graph = torch.export.export(model, inputs, strict=False).graph
    depth: dict[torch.fx.Node, int] = {}
    for node in graph.nodes:  # in the order in which they run
        before = max((depth[other] for other in node.all_input_nodes), default=0)
        depth[node] = before + (node.op == "call_function")
    return max(depth.values())
