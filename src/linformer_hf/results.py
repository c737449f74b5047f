"""What a run leaves behind: a folder that `from_pretrained` loads, results.json, a curve and a model card.

Every file is written beside its place and then renamed, and results.json comes last: a folder that has it is whole.
"""

import contextlib
import errno
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from . import trackers
from .interruption import Interrupted
from .watch import AlreadyTrained, Watch


logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.json"
CURVE_FILE = "curve.png"
CARD_FILE = "README.md"
PACKAGES = ("linformer_hf", "torch", "transformers", "datasets", "tokenizers", "accelerate", "evaluate", "numpy")

OTHER_NAMES = {"optimizer.pt": ("optimizer.bin", "optimizer_0")}
# How a full disk or quota appears: to the operating system, in safetensors (Rust) and in torch.save.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = (
    *(f"os error {number}" for number in FULL),
    *(os.strerror(number) for number in FULL),
    "PytorchStreamWriter failed",
    "unexpected pos",
)

CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Measured

{{ table }}

{{ notes }}

{{ picture }}

## Use

```python
from transformers import AutoTokenizer, {{ auto_class }}

tokenizer = AutoTokenizer.from_pretrained("<this folder or repository>")
model = {{ auto_class }}.from_pretrained("<this folder or repository>", trust_remote_code=True)
```

With the package `linformer_hf` installed, `import linformer_hf` replaces `trust_remote_code=True`.

## Limits

{{ limits }}

Everything that was run is in `results.json`: options, versions, seed, data counts, metrics.
"""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path`, then rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def open_run(output_dir: str | None, recipe: Mapping[str, Any], resume: bool) -> Path:
    """The run's folder, checked; nothing is written yet (see `begin_run`).

    Args:
        recipe: the sections of the recipe, JSON-able.
        resume: continue in a folder that holds an interrupted run of the same recipe.

    Raises:
        FileExistsError: the folder holds something and `resume` is False, or it holds a finished run.
        ValueError: `resume` with another `model` or `data` section than the interrupted run had; a tracker that is
            not installed.
    """
    if not output_dir:
        raise ValueError("training.output_dir is missing: name the folder that the run may fill.")
    trackers.check(recipe.get("training") or {})
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"training.output_dir {folder} is a file; name a folder.")
    if not is_main_process():
        return folder
    if (folder / RESULTS_FILE).exists():
        raise FileExistsError(
            f"{folder} holds a finished run ({RESULTS_FILE} is there). Choose another output_dir, or delete it."
        )
    recipe = json.loads(json.dumps(recipe, default=str))
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            raise FileExistsError(
                f"{folder} is not empty. Choose another training.output_dir, add --resume to continue the run in it, "
                "or delete it."
            )
        if (folder / RECIPE_FILE).exists():
            before = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
            for section in ("model", "data", "distillation"):
                if before.get(section) != recipe.get(section):
                    raise ValueError(
                        f"--resume: section {section!r} differs from the interrupted run in {folder}: "
                        f"{before.get(section)} then, {recipe.get(section)} now. Use the same recipe, or another "
                        "training.output_dir."
                    )
    return folder


def begin_run(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write recipe.json, when data and model are ready: what fails before leaves no folder behind to clear away."""
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*"):  # what a killed run was writing beside its place
            if re.fullmatch(r"\..+\.\d+(\.png)?", path.name):
                path.unlink()
        write_json(folder / RECIPE_FILE, recipe)


@contextlib.contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises into a ValueError that names the checkpoint: few of its errors do."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint {checkpoint!r} cannot be loaded: {reason}") from error


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-<step>` that was written to its end, or None. Half-written ones are named in the log."""
    steps = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(steps, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        problem = _incomplete(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("Skipping %s: %s.", checkpoint, problem)
    return None


def _incomplete(checkpoint: Path) -> str | None:
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        # FSDP writes optimizer.bin, or with sharded states a folder.
        if not any((checkpoint / other).exists() for other in (name, *OTHER_NAMES.get(name, ()))):
            return f"{name} is missing"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (SafetensorError, ValueError, OSError) as error:
        return f"it cannot be read ({error})"
    return None if weights else "it holds no *.safetensors"


def environment(seed: int, device: torch.device, dtype: str) -> dict[str, Any]:
    """Versions, revision, machine, seed: what somebody needs to run it again."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "versions": versions,
        "revision": _revision(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "dtype": dtype,
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor() -> str:
    """The processor's name and its instructions for matrices."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(known)})"


def _revision() -> str | None:
    """The commit of the checkout this package runs from, with a mark if it has uncommitted changes; None elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Only a tracked source file tells that the repository around it is this project's.
        subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            check=True,
            capture_output=True,
        )
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def training_dtype(trainer: Trainer) -> str:
    args = trainer.args
    return "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else str(trainer.model.dtype)[6:]


def plot_curve(
    path: Path, history: Sequence[Mapping[str, float]], title: str, lines: Mapping[str, float] | None = None
) -> None:
    """Training and validation loss against optimizer steps as PNG; `lines` are horizontal, such as a baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    valid = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), label="training", linewidth=1.2)
    if valid:
        axes.plot(*zip(*valid, strict=True), label="validation", marker="o", markersize=3.5)
    for label, height in (lines or {}).items():
        axes.axhline(height, linestyle="--", linewidth=1, color="gray", label=f"{label} ({height:.3f})")
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.3)
    if train or valid or lines:
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG and close it."""
    from matplotlib import pyplot as plt

    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(beside, dpi=120)
    plt.close(figure)
    os.replace(beside, path)


def loss_of(perplexity: float) -> float:
    """Nats per token."""
    return math.log(perplexity)


def test_metric(metrics: Mapping[str, Any]) -> str:
    """The name of what a fine-tuned model is judged by on the test rows."""
    return next(key for key in metrics if key.startswith("test_") and key != "test_rows")


def format_number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(format_number(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def model_card(
    *,
    title: str,
    summary: str,
    metrics: Mapping[str, Any],
    notes: str,
    limits: str,
    auto_class: str,
    pipeline_tag: str,
    datasets: Sequence[str] | None = None,
    results: list[EvalResult] | None = None,
    picture: tuple[str, str] | None = ("training curve", CURVE_FILE),
    base_model: str | None = None,
) -> str:
    """The README.md of a checkpoint, with the Hub's metadata block.

    Args:
        metrics: becomes the table, in order.
        picture: its description and its file in the same folder.
        base_model: Hub name of the model that this one was made from.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["linformer", "efficient-attention"],
        datasets=list(datasets) if datasets else None,
        base_model=base_model,
        model_name=title if results else None,
        eval_results=results,
    )
    table = markdown_table(["", ""], list(metrics.items()))
    card = ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE,
        title=title,
        summary=summary,
        table=table,
        notes=notes,
        limits=limits,
        auto_class=auto_class,
        picture=f"![{picture[0]}]({picture[1]})" if picture else "",
    )
    return str(card)


def train(trainer: Trainer, folder: Path, recipe: Mapping[str, Any], resume: bool) -> dict[str, float]:
    """`trainer.train()`, from the last whole checkpoint in `folder` if `resume`; its metrics.

    Args:
        recipe: the sections of the recipe. `training.logging_nan_inf_filter: true` in it trains on where the loss is
            not finite; Trainer's default of that name would hide such a loss.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; a checkpoint has been written.
        FloatingPointError: the loss or a weight is not finite.
        OSError: a checkpoint cannot be written.
        ValueError: FSDP is asked for and would not be used.
    """
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            "training.fsdp: accelerate shards no model on CPUs (it would train whole copies without a word). Leave "
            "training.fsdp out, or train on GPUs."
        )
    checkpoint = last_whole_checkpoint(folder) if resume else None
    if resume:
        logger.warning("Resuming from %s.", checkpoint or f"the beginning: {folder} has no whole checkpoint yet")
    filtered = bool((recipe.get("training") or {}).get("logging_nan_inf_filter"))
    trainer.args.logging_nan_inf_filter = filtered
    watch = Watch(trainer, lambda: last_whole_checkpoint(folder), check=not filtered)
    trainer.add_callback(watch)
    trackers.prepare(trainer)
    with watch.signals(), writing(folder):
        try:
            metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except AlreadyTrained:  # weights, optimizer and state are loaded, and there is nothing to do
            trainer.is_in_train = False
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
            metrics = {"train_runtime": 0.0, "train_samples_per_second": 0.0}
    trainer.remove_callback(watch)
    if watch.number:
        raise Interrupted(watch.number, last_whole_checkpoint(folder))
    return metrics


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises, which is different for every writer, into an OSError that says what is whole."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if getattr(error, "errno", None) not in FULL and not any(text in reason for text in FULL_TEXTS):
            raise
        if is_main_process():
            for half in folder.glob("checkpoint-*"):
                if half.is_dir() and _incomplete(half):
                    shutil.rmtree(half)  # it takes the room that is missing
        checkpoint = last_whole_checkpoint(folder)
        whole = f"the last whole checkpoint is {checkpoint}" if checkpoint else "there is no whole checkpoint"
        raise OSError(
            f"writing to {folder} failed ({reason}); {whole}. Make room and give the same command with --resume."
        ) from error


def save_final(trainer: Trainer, folder: Path) -> None:
    """Model, tokenizer and custom code into `folder`: written to a folder inside it first, then moved file by file."""
    beside = folder / ".final"
    with writing(folder):
        trainer.save_model(str(beside))  # every process takes part: a sharded model is gathered here
    if not trainer.is_world_process_zero():
        return
    for path in sorted(beside.iterdir()):
        os.replace(path, folder / path.name)
    shutil.rmtree(beside)
