"""What a run leaves behind: a folder that `from_pretrained` loads, results.json, a curve and a model card.

Every file is written beside its place and then renamed, and results.json comes last: a folder that has it is whole.
All text goes through `write_text`, which writes the home folder as `~`: such a folder may be published.
"""

import contextlib
import hashlib
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
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from . import checksums, full_disk, trackers
from .full_disk import DiskFull
from .interruption import Interrupted
from .places import from_home
from .recipe import ACCESS_TOKEN
from .watch import AlreadyTrained, Watch


logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.json"
CURVE_FILE = "curve.png"
CARD_FILE = "README.md"
SUM_KEY = "sha256"
PACKAGES = ("linformer_hf", "torch", "transformers", "datasets", "tokenizers", "accelerate", "evaluate", "numpy")

OTHER_NAMES = {"optimizer.pt": ("optimizer.bin", "optimizer_0")}

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

name = "<this folder or repository>"
commit = "<the commit whose code you have read>"  # trust_remote_code runs it; in a folder of yours it is ignored
tokenizer = AutoTokenizer.from_pretrained(name, revision=commit)
model = {{ auto_class }}.from_pretrained(name, revision=commit, trust_remote_code=True)
```

With the package `linformer_hf` installed, `import linformer_hf` replaces `trust_remote_code=True`.

## Limits

{{ limits }}

Everything that was run is in `results.json`: options, versions, seed, data counts, metrics.
"""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, without the name of the home folder, beside `path`, then rename: nobody sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(from_home(text), encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of it as the last key, which `read_json` compares."""
    plain = record(content)
    plain[SUM_KEY] = _json_sum(path, plain)
    write_text(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def record(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of `write_json` holds of `content`, which may be compared with it."""
    return from_home(json.loads(json.dumps(content, default=str)))


def read_json(path: Path, way_out: str, needs: Sequence[str] = ()) -> dict[str, Any]:
    """What `write_json` wrote; a file without a checksum is taken as it is.

    Args:
        way_out: what to do about a damaged file, for the message.
        needs: keys without which it is another file.

    Raises:
        ValueError: the file is damaged, or holds no JSON object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, no JSON object")
        if SUM_KEY in content and content.pop(SUM_KEY) != _json_sum(path, content):
            raise ValueError(f"its content differs from its {SUM_KEY}")
        if missing := set(needs) - content.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {way_out}") from error
    return content


def _json_sum(path: Path, plain: Mapping[str, Any]) -> str:
    """Of content and file name: one file put in another's place is damage too."""
    return hashlib.sha256(json.dumps([path.name, plain], sort_keys=True).encode()).hexdigest()


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
    recipe = record(recipe)
    if folder.exists() and any(folder.iterdir()):
        if not resume:
            raise FileExistsError(
                f"{folder} is not empty. Choose another training.output_dir, add --resume to continue the run in it, "
                "or delete it."
            )
        if (folder / RECIPE_FILE).exists():
            way_out = "Delete it, and --resume goes on without comparing the recipes."
            before = read_json(folder / RECIPE_FILE, way_out)
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
        with writing(folder):
            write_json(folder / RECIPE_FILE, recipe)


@contextlib.contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises into a ValueError that names the checkpoint: few of its errors do.

    A folder with a checksums.json is compared with it first.
    """
    try:
        checksums.check(checkpoint)
        yield
    except Exception as error:  # damaged files set off anything: tokenizers, for one, raises bare Exceptions
        reason = " ".join(str(error).split())
        way_out = checksums.safer(checkpoint, reason)
        raise ValueError(f"the checkpoint {checkpoint!r} cannot be loaded: {reason}{way_out}") from error


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    """Whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest `checkpoint-<step>` that is whole, or None. Half-written and damaged ones are named in the log."""
    for checkpoint in reversed(_checkpoints(folder)):
        problem = _incomplete(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("Skipping %s: %s.", checkpoint, problem)
    return None


def _incomplete(checkpoint: Path) -> str | None:
    """What is missing or damaged, in words; None for a whole checkpoint."""
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
        if not weights:
            return "it holds no *.safetensors"
        sealed = (checkpoint / checksums.CHECKSUMS_FILE).exists()  # if not, the run was ended before that
        return (checksums.damage(checkpoint) if sealed else None) or _foreign_code(checkpoint)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        return f"it cannot be read ({error})"


def _foreign_code(checkpoint: Path) -> str | None:
    """What in the states that Trainer reads is neither tensor nor plain data, in words.

    Trainer reads them with `weights_only=True`, which refuses the same, by an error that advises to switch it off.
    """
    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")):
        if path.name == checksums.NEVER_READ:
            continue
        with safe_globals():  # what transformers lets a state of random numbers name
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return f"{path.name} names {', '.join(sorted(names))}, which no state needs; it was not executed"
    return None


def _ended(folder: Path) -> list[Path]:
    """The checkpoints that Trainer has written to their end, damaged since or not: trainer_state.json is its last."""
    ended = []
    for state in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        with contextlib.suppress(OSError, ValueError):
            if not (state.parent / checksums.CHECKSUMS_FILE).exists():
                json.loads(state.read_text(encoding="utf-8"))
            ended.append(state.parent)
    return ended


def _set_aside(folder: Path, checkpoint: Path | None) -> None:
    """Clear away what lies beyond the checkpoint that a run goes on from: half-written ones, and damaged ones renamed.

    Trainer counts them for `save_total_limit`, as the newest ones, and would remove the run's next checkpoint instead.
    """
    ended = _ended(folder)
    for other in _checkpoints(folder):
        if checkpoint is None or _step(other) > _step(checkpoint):
            aside = folder / f"damaged-{other.name}"
            shutil.rmtree(aside if other in ended else other, ignore_errors=True)
            if other in ended:
                other.rename(aside)


class _Seal(TrainerCallback):
    """Lists the files of every checkpoint, once all processes have written theirs; notes that training has begun."""

    begun = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            checksums.write(checkpoint)


def _random_states_before_state(trainer: Trainer) -> None:
    """Let the main process wait for the others' files of a checkpoint before it writes trainer_state.json.

    That file is what a checkpoint is known by as written to its end, and older ones are removed after it.
    """
    save = trainer._save_rng_state  # what the other processes write, and the last thing before that

    def save_together(output_dir: str) -> None:
        save(output_dir)
        trainer.accelerator.wait_for_everyone()

    trainer._save_rng_state = save_together


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
        "command": [Path(sys.argv[0]).name, *(ACCESS_TOKEN.sub("hf_...", word) for word in sys.argv[1:])],
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


@dataclass
class CardMetadata:
    """Section `card` of a recipe: what only its author knows, for the model card's metadata.

    Args:
        license: of the weights, by the Hub's identifier, such as apache-2.0.
        language: codes such as en.
        datasets: Hub names of what it was trained on.
    """

    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)


def metadata_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section `card`, as model_card takes it."""
    return {key: value for key, value in (recipe.get("card") or {}).items() if value}


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """README.md; `facts` are the arguments of model_card."""
    write_text(folder / CARD_FILE, model_card(**facts))


def _evaluation(task: str, dataset: str, split: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_value=value,
        verified=False,
    )


def model_card(
    *,
    title: str,
    summary: str,
    metrics: Mapping[str, Any],
    notes: str,
    limits: str,
    auto_class: str,
    pipeline_tag: str,
    evaluated: Sequence[Mapping[str, Any]] = (),
    picture: Sequence[str] | None = ("training curve", CURVE_FILE),
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> str:
    """The README.md of a checkpoint, with the Hub's metadata block.

    A function of plain data, which results.json keeps as `card`: the page can be rendered again from that.

    Args:
        metrics: becomes the table, in order.
        evaluated: for the metadata's model-index; `dataset` (a name), `split`, `metric` and `value` of each number.
        picture: its description and its file in the same folder.
        base_model: Hub name of the model that this one was made from.
        license, language, datasets: as the recipe's section `card` says.
    """
    found = [_evaluation(pipeline_tag, **one) for one in evaluated]
    data = ModelCardData(
        library_name="transformers",
        license=license,
        language=list(language) if language else None,
        pipeline_tag=pipeline_tag,
        tags=["linformer", "efficient-attention"],
        datasets=list(datasets) if datasets else None,
        base_model=base_model,
        model_name=title if found else None,
        eval_results=found or None,
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
        recipe: the sections of the recipe. `training.logging_nan_inf_filter: true` in it skips, and counts, steps
            whose gradient is not finite; Trainer's default of that name would only hide such a loss.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; a checkpoint has been written.
        FloatingPointError: the loss or a weight is not finite.
        DiskFull: a checkpoint cannot be written.
        ValueError: FSDP is asked for and would not be used; or there are checkpoints and every one is damaged.
    """
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            "training.fsdp: accelerate shards no model on CPUs (it would train whole copies without a word). Leave "
            "training.fsdp out, or train on GPUs."
        )
    checkpoint = last_whole_checkpoint(folder) if resume else None
    if resume:
        if checkpoint is None and (damaged := {path.name: _incomplete(path) for path in _ended(folder)}):
            raise ValueError(
                f"{folder} has no whole checkpoint to resume from: "
                f"{'; '.join(f'{name}: {problem}' for name, problem in damaged.items())}. Restore one from a copy, or "
                "delete them to begin anew."
            )
        if trainer.is_world_process_zero():
            _set_aside(folder, checkpoint)
        logger.warning("Resuming from %s.", checkpoint or f"the beginning: {folder} has no whole checkpoint yet")
    filtered = bool((recipe.get("training") or {}).get("logging_nan_inf_filter"))
    trainer.args.logging_nan_inf_filter = filtered
    watch = Watch(trainer, lambda: last_whole_checkpoint(folder), check=not filtered)
    trainer.add_callback(watch)
    trackers.prepare(trainer)
    seal = _Seal()
    trainer.add_callback(seal)
    _random_states_before_state(trainer)
    with watch.signals(), writing(folder):
        try:
            metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except AlreadyTrained:  # weights, optimizer and state are loaded, and there is nothing to do
            trainer.is_in_train = False
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
            metrics = {"train_runtime": 0.0, "train_samples_per_second": 0.0}
        except Exception as error:
            if checkpoint is None or seal.begun or isinstance(error, OSError):
                raise
            # Its text may advise to read the file without protection; --traceback shows it.
            raise ValueError(
                f"{checkpoint} cannot be resumed from ({type(error).__name__} while it was read). Delete it to go on "
                "from the one before it."
            ) from error
    trainer.remove_callback(watch)
    trainer.remove_callback(seal)
    if watch.number:
        raise Interrupted(watch.number, last_whole_checkpoint(folder))
    return {**metrics, "skipped_steps": watch.skipped}


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into a DiskFull that says what is whole."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        reason = full_disk.reason(error)
        if reason is None:
            raise
        if is_main_process():
            for half in _checkpoints(folder):
                if _incomplete(half):
                    shutil.rmtree(half)  # it takes the room that is missing
        checkpoint = last_whole_checkpoint(folder)
        whole = f"the last whole checkpoint is {checkpoint}" if checkpoint else "there is no whole checkpoint"
        raise DiskFull(
            f"writing to {folder} failed ({reason}); {whole}. Make room and give the same command with --resume."
        ) from error


def save_final(trainer: Trainer, folder: Path) -> None:
    """Model, tokenizer and custom code into `folder`: written to a folder inside it first, then moved file by file."""
    beside = folder / ".final"
    with writing(folder):
        trainer.save_model(str(beside))  # every process takes part: a sharded model is gathered here
    if not trainer.is_world_process_zero():
        return
    checksums.write(beside)
    for path in sorted(beside.iterdir()):
        os.replace(path, folder / path.name)
    shutil.rmtree(beside)
