"""`linformer-hf benchmark RECIPE.yaml`: time and memory beside every alternative, the paper's Table 3 and Figure 2.

A recipe has one section, `benchmark` (Benchmark). Times are taken in one process for each number of threads and each
allocator setting, all encoders interleaved in random order; memory is the allocator's peak above model and input, each
case in a process of its own. Ours is compared with its plain path first (eager attention, no shortcut), outputs and, in
training, gradients (both without dropout): no ratio is given for a case that fails, and none is taken from contended
samples where enough others are there.
"""

import copy
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from ..utils.environment import processor
from ..utils.files import RESULTS_FILE
from ..utils.recipe import load_recipe
from ..utils.runs import Run, show
from ..utils.timing import interleave, peak_bytes
from .encoders import BUILDERS, DIFFERENCES, FLOOR, OURS, PROJECTED, UNMASKED, Embedded, Shape
from .tables import plot, tables


Mode = Literal["inference", "training"]
# Blocks of more than 32 MiB are otherwise mapped and faulted in anew at every call.
TUNED = {"MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_MMAP_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}
# Largest relative difference from the plain path, which is computed in the same dtype.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclass
class Benchmark:
    """Section `benchmark`.

    Args:
        output_dir: folder to write results.json, tables.md and the plots to.
        lengths, projected_lengths: N and K; a K above N / 2 is left out.
        alternatives: names of the table in encoders.py, beside ours.
        modes: inference, training (forward, backward; bfloat16 by autocast there, as Trainer does it).
        dtypes, dropouts: dropouts are training's (inference has none).
        fills: shares of real tokens in the batch; below 1, rows are padded to N (encoders without a mask are left out).
        gradient_checkpointing: in training, where the encoder offers it.
        hidden_size, num_attention_heads, intermediate_size, num_hidden_layers, projection_sharing: the encoders' sizes.
        batch_size: rows; or tokens: as many rows as hold this many tokens (the paper's way).
        threads: numbers of threads; 0 is all.
        allocators: glibc's as it is, and with thresholds raised so that it keeps large blocks.
        samples: of each case.
        longest: name -> largest N for it, where it would need too much time or memory.
        memory: measure memory too.
        device: cpu or cuda.
    """

    output_dir: str
    lengths: list[int]
    projected_lengths: list[int]
    alternatives: list[str]
    modes: list[Literal["inference", "training"]] = field(default_factory=lambda: ["inference", "training"])
    dtypes: list[Literal["float32", "bfloat16"]] = field(default_factory=lambda: ["bfloat16", "float32"])
    dropouts: list[float] = field(default_factory=lambda: [0.0])
    fills: list[float] = field(default_factory=lambda: [1.0])
    gradient_checkpointing: bool = False
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 1
    projection_sharing: Literal["none", "headwise", "key_value", "layerwise"] = "layerwise"
    batch_size: int = 1
    tokens: int | None = None
    threads: list[int] = field(default_factory=lambda: [1])
    allocators: list[Literal["default", "tuned"]] = field(default_factory=lambda: ["default"])
    samples: int = 7
    longest: dict[str, int] = field(default_factory=dict)
    memory: bool = True
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        for name in ("lengths", "projected_lengths", "modes", "dtypes", "threads", "allocators", "dropouts", "fills"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        for name in (*self.alternatives, *self.longest):
            if name not in BUILDERS:
                raise ValueError(f"no encoder is called {name!r}; there are {', '.join(BUILDERS)}.")
        if self.samples < 3:
            raise ValueError(f"samples must be at least 3, got {self.samples}: a median needs them.")
        if min(*self.lengths, *self.projected_lengths, self.batch_size) < 1 or min(self.threads) < 0:
            raise ValueError("lengths, projected_lengths and batch_size must be at least 1, threads at least 0.")
        if min(self.projected_lengths) > max(self.lengths) // 2:
            raise ValueError(
                f"projected_lengths={self.projected_lengths} are all above half of the longest input "
                f"({max(self.lengths)}): there is nothing to shorten."
            )
        if not all(0.5 <= fill <= 1 for fill in self.fills):
            raise ValueError(f"fills must lie between 0.5 and 1, got {self.fills}.")

    def groups(self) -> list["Group"]:
        """What is timed together: one for each mode, dtype, dropout and N."""
        return [
            Group(mode, dtype, dropout, fill, length, max(1, self.tokens // length) if self.tokens else self.batch_size)
            for mode in self.modes
            for dtype in self.dtypes
            for dropout in (self.dropouts if mode == "training" else [0.0])
            for fill in self.fills
            for length in self.lengths
        ]

    def cases(self, group: "Group") -> dict["Case", Shape]:
        """(encoder, K or None) -> sizes. Ours come first."""
        sizes = {name: getattr(self, name) for name in SIZES}
        return {
            (name, k): Shape(length=group.length, dropout=group.dropout, projected_length=k or 1, **sizes)
            for name in (OURS, *(other for other in self.alternatives if other != OURS))
            if group.length <= self.longest.get(name, group.length) and not (group.fill < 1 and name in UNMASKED)
            for k in (self.projected_lengths if name in PROJECTED else [None])
            if (k or 0) <= group.length // 2
        }


Case = tuple[str, int | None]
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "projection_sharing")


@dataclass(frozen=True)
class Group:
    """Encoders are compared within a group only."""

    mode: str
    dtype: str
    dropout: float
    fill: float
    length: int
    batch: int


SECTIONS = {"benchmark": Benchmark}


read_recipe = partial(load_recipe, sections=SECTIONS, built=("benchmark",))


def benchmark(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Measure as the recipe says: a YAML file, with `section.key=value` applied over it.

    Returns:
        The folder with results.json, tables.md, time.png and memory.png. The last line on stdout is results.json's
        content, without the file's own sum.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        FileExistsError: the folder holds a finished benchmark.
        ImportError: a package that is to be compared is not installed.
        ValueError: there is no such device.
    """
    recipe = read_recipe(recipe_path, overrides)
    section: Benchmark = recipe.build("benchmark")
    if section.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch sees no CUDA device here. Set device: cpu.")
    folder = Path(section.output_dir)
    if (folder / RESULTS_FILE).exists():
        raise FileExistsError(f"{folder} holds a finished benchmark. Set benchmark.output_dir to another folder.")
    for name in section.alternatives:
        BUILDERS[name](Shape(64, 16, 2, 32, 1, 0.0, 16))  # what is not installed says so before anything is measured
    run = Run("benchmark", recipe.raw, folder)
    timings: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    settings = [(threads, allocator) for allocator in section.allocators for threads in section.threads]
    total = len(section.groups()) * (len(settings) + section.memory)
    with tqdm(total=total, desc="benchmark", unit="group", disable=None) as bar:
        for threads, allocator in settings:
            for rows in worker("time", section, threads, allocator):
                timings += [{"threads": threads, "allocator": allocator, **row} for row in rows]
                bar.update()
        if section.memory:
            for rows in worker("memory", section, 0, "default"):
                memory += rows
                bar.update()
    content = run.content(
        0,
        section.device,
        "+".join(section.dtypes),
        processor=processor(),
        cores=os.cpu_count(),
        differences={name: DIFFERENCES[name] for name in (OURS, *section.alternatives)},
        timings=timings,
        memory=memory,
    )
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder, content)
    text = tables(content)
    run.write(content, text, "tables.md")
    show(text)
    print(f"\nTables, plots and {RESULTS_FILE}: {folder.resolve()}")
    print(json.dumps(content, default=str))
    return folder


def worker(task: str, section: Benchmark, threads: int, allocator: str) -> Iterator[list[dict[str, Any]]]:
    """Run `task` in a process of its own; gives the rows of a group as they come. Raises a ValueError if it fails."""
    environment = {**os.environ, **(TUNED if allocator == "tuned" else {})}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment["KINETO_LOG_LEVEL"] = "99"  # the profiler that counts memory says on every start that it starts
    command = [sys.executable, "-P", "-m", f"{__package__}.benchmark"]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"task": task, "threads": threads, "section": asdict(section)}))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith('{"rows": '):
                yield json.loads(line)["rows"]
        if process.wait():
            raise ValueError(f"the process that measures {task} ended with {process.returncode}; see above.")
    finally:
        process.kill()


def work() -> None:
    """The measuring process: a task on stdin; on stdout for each group a line of JSON with a row for each case."""
    task = json.loads(sys.stdin.read())
    section = Benchmark(**task["section"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    measure = {"time": time_group, "memory": memory_group}[task["task"]]
    for group in section.groups():
        found = measure(section, group)
        rows = [{**asdict(group), "encoder": encoder, "k": k, **row} for (encoder, k), row in found.items()]
        print(json.dumps({"rows": rows}), flush=True)


def time_group(section: Benchmark, group: Group) -> dict[Case, dict[str, Any]]:
    """A summary of each case's samples, or {"failed": ..}; of ours with the difference from the plain path."""
    calls: dict[Case, Callable[[], Any]] = {}
    rows: dict[Case, dict[str, Any]] = {}
    cases = section.cases(group)
    for case, shape in cases.items():
        rows[case] = {}
        try:
            model, states, mask = build(case[0], shape, group, section)
            if case[0] == OURS:
                value = difference(model, states, mask, group)
                rows[case] = {"difference_from_plain": value, "fails_check": not value <= TOLERANCE[group.dtype]}
            call = step(model, states, mask, group)
            for _ in range(2):  # a GPU's memory is in pieces after the first
                call()
            calls[case] = call
        except (RuntimeError, ValueError, TypeError) as error:  # an alternative that cannot do this at all
            if case[0] == OURS:
                raise
            rows[case] = {"failed": short(error)}
    if group.mode == "inference" and group.fill == 1 and section.projection_sharing != "none":
        for (name, k), shape in cases.items():
            if name == OURS:
                calls[FLOOR, k] = matmul_floor(shape, group, section.device)
    for case, samples in interleave(calls, section.samples).items():
        rows[case] = {**samples.summary(), **rows.get(case, {})}
    return rows


def short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def build(
    encoder: str, shape: Shape, group: Group, section: Benchmark
) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None]:
    """An encoder with random weights, an input [B, N, C] and its mask [B, N], or None if every token is real."""
    torch.manual_seed(0)
    device = section.device
    model = BUILDERS[encoder](shape).to(device)
    training = group.mode == "training"
    dtype = torch.float32 if training else getattr(torch, group.dtype)
    states = torch.randn(group.batch, group.length, shape.hidden_size, device=device).to(dtype)
    mask = None
    if group.fill < 1:  # lengths from (2 fill - 1) N to N, evenly spaced: their mean is fill N
        shares = torch.linspace(2 * group.fill - 1, 1, group.batch) if group.batch > 1 else torch.tensor([group.fill])
        lengths = (shares * group.length).round().clamp(min=1)
        mask = (torch.arange(group.length) < lengths[:, None]).long().to(device)
    if training and section.gradient_checkpointing and isinstance(model, Embedded):
        model.model.gradient_checkpointing_enable()
    return model.to(dtype).train(training), states.requires_grad_(training), mask


def step(model: nn.Module, states: torch.Tensor, mask: torch.Tensor | None, group: Group) -> Callable[[], Any]:
    """What is measured: a forward pass, or in training a forward and a backward pass."""
    given = (states,) if mask is None else (states, mask)
    if group.mode == "inference":

        def call() -> torch.Tensor:
            with torch.no_grad():
                return model(*given)

        return call

    target = torch.randn_like(states)

    def train() -> None:
        for parameter in (*model.parameters(), states):
            parameter.grad = None
        with torch.autocast(states.device.type, torch.bfloat16, enabled=group.dtype == "bfloat16"):
            output = model(*given)
        # Not the mean square: behind a LayerNorm it is constant, and so the gradient is nothing but rounding.
        (output.float() * target).mean().backward()

    return train


def difference(model: nn.Module, states: torch.Tensor, mask: torch.Tensor | None, group: Group) -> float:
    """The largest relative difference of outputs (and gradients, in training) from the plain path; without dropout.

    At real tokens only: what stands at padding has no meaning.
    """
    assert isinstance(model, Embedded)
    outputs, target = [], torch.randn_like(states)
    training = group.mode == "training"
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for plain in (False, True):
        model.model.set_attn_implementation("eager" if plain else "sdpa")
        # With hidden states asked for, the model takes no shortcut.
        extra = {"output_hidden_states": True} if plain else {}
        with torch.set_grad_enabled(training):
            with torch.autocast(states.device.type, torch.bfloat16, enabled=training and group.dtype == "bfloat16"):
                output = model.model(inputs_embeds=states, attention_mask=mask, **extra).last_hidden_state
            if mask is not None:
                output = output * mask[..., None]
            found = [output]
            if training:
                weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
                used = torch.autograd.grad((output.float() * target).sum(), [states, *weights], allow_unused=True)
                # In one vector: some, as the key bias's, are nothing but rounding.
                found.append(torch.cat([gradient.flatten() for gradient in used if gradient is not None]))
        outputs.append([tensor.detach().float() for tensor in found])
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(*outputs, strict=True))


def matmul_floor(shape: Shape, group: Group, device: str) -> Callable[[], Any]:
    """Nothing but a Linformer's matrix products, each into memory that is there already."""
    dtype = getattr(torch, group.dtype)
    b, n, c, k = group.batch, group.length, shape.hidden_size, shape.projected_length
    h, f = shape.num_attention_heads, shape.intermediate_size
    d = c // h

    def new(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    shared = shape.projection_sharing in ("key_value", "layerwise")
    slots = k if shared else 2 * k
    products = [
        (new(b, slots, n), new(b, n, c)),  # E X, F X
        (new(b * k, c), new(c, c).T),  # keys
        (new(b * k, c), new(c, c).T),  # values
        (new(b * n, c), new(c, c).T),  # queries
        (new(b * h, n, d), new(b * h, k, d).transpose(1, 2)),  # Q K'
        (new(b * h, n, k), new(b * h, k, d)),  # P V'
        (new(b * n, c), new(c, c).T),  # output
        (new(b * n, c), new(f, c).T),
        (new(b * n, f), new(c, f).T),
    ]
    outputs = [left @ right for left, right in products]

    def call() -> None:
        with torch.no_grad():
            for _ in range(shape.num_hidden_layers):
                for (left, right), output in zip(products, outputs, strict=True):
                    torch.matmul(left, right, out=output)

    return call


def memory_group(section: Benchmark, group: Group) -> dict[Case, dict[str, Any]]:
    """Case -> {"peak_bytes": .., "input_bytes": ..} or {"failed": ..}.

    On a CPU each case is measured in a forked process, for it may be ended; an accelerator has a counter of its own.
    """
    found = {}
    for case, shape in section.cases(group).items():
        given = (case[0], shape, group, section)
        if section.device == "cuda":
            found[case] = memory_case(*given)
            torch.cuda.empty_cache()
            continue
        context: Any = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=lambda pipe, *given: pipe.send(memory_case(*given)), args=(sender, *given))
        process.start()
        sender.close()
        try:
            found[case] = receiver.recv()
        except EOFError:
            found[case] = {"failed": "the process was ended: out of memory?"}
        process.join()
    return found


def memory_case(encoder: str, shape: Shape, group: Group, section: Benchmark) -> dict[str, Any]:
    try:
        model, states, mask = build(encoder, shape, group, section)
        call = step(model, states, mask, group)
        call()  # what the first call keeps, such as gradients, is no peak
        for parameter in (*model.parameters(), states):
            parameter.grad = None
        peak = peak_bytes(call, section.device)
        return {"peak_bytes": peak, "input_bytes": states.numel() * states.element_size()}
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        return {"failed": short(error)}


if __name__ == "__main__":
    work()
