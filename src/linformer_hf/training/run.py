"""What a run leaves behind: a folder that `from_pretrained` loads, results.json, a curve and a model card.

Every file is written beside its place and then renamed, and results.json comes last: a folder that has it is whole.
All text goes through `write_text`, which writes the home folder as `~`: such a folder may be published.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..hub.card import write_card
from ..utils import checksums
from ..utils.environment import peak_memory_mib
from ..utils.figures import new_figure, save_figure
from ..utils.files import CURVE_FILE, RECIPE_FILE, RESULTS_FILE, read_json, record, write_json
from ..utils.processes import Interrupted, is_main_process, lost
from ..utils.runs import Run
from ..utils.writing import DiskFull, full_disk
from . import agreement, sharding, trackers
from .callbacks import AlreadyTrained, Watch
from .checkpoints import (
    Seal,
    checkpoints_in,
    ended_in,
    incomplete,
    last_whole_checkpoint,
    random_states_before_state,
    set_aside,
)


logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"


def open_run(verb: str, output_dir: str | None, recipe: Mapping[str, Any], resume: bool = False) -> Run:
    """The run, with its folder checked; nothing is written yet (see `begin_run`).

    Args:
        recipe: the sections of the recipe, JSON-able.
        resume: continue in a folder that holds an interrupted run of the same recipe.

    Raises:
        FileExistsError: the folder holds something and `resume` is False, or it holds a finished run.
        ValueError: `resume` with another `model` or `data` section than the interrupted run had; a tracker that is
            not installed; or the processes that share the run differ.
    """
    if not output_dir:
        raise ValueError("training.output_dir is missing: name the folder that the run may fill.")
    trackers.check(recipe.get("training") or {})
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"training.output_dir {folder} is a file; name a folder.")
    run = Run(verb, recipe, folder)
    agreement.check_start(recipe, folder)
    if not is_main_process():
        return run
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
            for section in ("model", "data", "distillation", "pairs"):
                then, now = ({**(said.get(section) or {}), "cache_dir": None} for said in (before, recipe))
                if then != now:  # but for where the cache is: it may be another machine's
                    raise ValueError(
                        f"--resume: section {section!r} differs from the interrupted run in {folder}: "
                        f"{before.get(section)} then, {recipe.get(section)} now. Use the same recipe, or another "
                        "training.output_dir."
                    )
    return run


def begin_run(run: Run) -> None:
    """Write recipe.json, when data and model are ready: what fails before leaves no folder behind to clear away."""
    if is_main_process():
        folder = run.folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*"):  # what a killed run was writing beside its place
            if re.fullmatch(r"\..+\.\d+(\.png)?", path.name):
                path.unlink()
        with writing(folder):
            write_json(folder / RECIPE_FILE, run.recipe)


def results(run: Run, trainer: Trainer, **measured: Any) -> dict[str, Any]:
    """What results.json says of a training."""
    args, model = trainer.args, trainer.model
    dtype = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else str(model.dtype)[6:]
    shared: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.state.global_step,
        "peak_memory_mib": peak_memory_mib(args.device),
        "history": trainer.state.log_history,
    }
    return run.content(args.seed, args.device, dtype, **{**shared, **measured})


def write_results(run: Run, content: Mapping[str, Any], title: str, lines: Mapping[str, float] | None = None) -> None:
    """curve.png, README.md of what `card` says and, last, results.json."""
    plot_curve(run.folder / CURVE_FILE, content["history"], title, lines or {})
    write_card(run.folder, content["card"])
    write_json(run.folder / RESULTS_FILE, content)


def plot_curve(path: Path, history: Sequence[Mapping[str, float]], title: str, lines: Mapping[str, float]) -> None:
    """Training and validation loss against optimizer steps as PNG; `lines` are horizontal, such as a baseline."""
    figure, axes = new_figure((7, 4.2))
    styles: dict[str, dict[str, Any]] = {"loss": {"label": "training", "linewidth": 1.2}}
    styles["eval_loss"] = {"label": "validation", "marker": "o", "markersize": 3.5}
    for key, style in styles.items():
        if points := [(row["step"], row[key]) for row in history if key in row]:
            axes.plot(*zip(*points, strict=True), **style)
    for label, height in lines.items():
        axes.axhline(height, linestyle="--", linewidth=1, color="gray", label=f"{label} ({height:.3f})")
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    save_figure(figure, path)


def train(trainer: Trainer, folder: Path, run: Run, resume: bool) -> dict[str, float]:
    """`trainer.train()`, from the last whole checkpoint in `folder` if `resume`; its metrics.

    Seconds, the steps that they time and skipped steps are also the interrupted run's up to that checkpoint.

    Args:
        run: `training.logging_nan_inf_filter: true` in its recipe skips, and counts, steps whose gradient is not
            finite; Trainer's default of that name would only hide such a loss.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; a checkpoint has been written.
        FloatingPointError: the loss or a weight is not finite.
        DiskFull: a checkpoint cannot be written.
        ConnectionError: another process does not answer any more.
        ValueError: there are checkpoints and every one is damaged; or what `sharding.prepare` refuses.
    """
    checkpoint = last_whole_checkpoint(folder) if resume else None
    sharding.prepare(trainer, checkpoint)
    if resume:
        _clear_the_way(trainer, folder, checkpoint)
    filtered = bool((run.recipe.get("training") or {}).get("logging_nan_inf_filter"))
    trainer.args.logging_nan_inf_filter = filtered
    watch = Watch(trainer, run, lambda: last_whole_checkpoint(folder), check=not filtered)
    trainer.add_callback(watch)
    trackers.prepare(trainer)
    seal = Seal()
    trainer.add_callback(seal)
    random_states_before_state(trainer)
    with watch.signals(), writing(folder):
        try:
            metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except AlreadyTrained:  # weights, optimizer and state are loaded, and there is nothing to do
            trainer.is_in_train = False
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
            metrics = {"train_runtime": 0.0}
        except Exception as error:
            if lost(error):
                raise ConnectionError(
                    f"another process of this run has died or cannot be reached ({error}). The last whole checkpoint "
                    f"is {last_whole_checkpoint(folder)}. End what still runs, and give the same command with --resume."
                ) from error
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
    seconds, steps = metrics["train_runtime"] + watch.seconds, trainer.state.global_step - watch.untimed
    # Trainer's own rate divides the rows of all steps by the seconds of this process.
    rate = steps * trainer.get_total_train_batch_size(trainer.args) / seconds if seconds else 0.0
    timed = {"train_runtime": seconds, "train_samples_per_second": rate, "timed_steps": steps}
    return {**metrics, **timed, "skipped_steps": watch.skipped}


def _clear_the_way(trainer: Trainer, folder: Path, checkpoint: Path | None) -> None:
    """What lies beyond the checkpoint that is gone on from is set aside; an error where all are damaged."""
    if checkpoint is None and (damaged := {path.name: incomplete(path) for path in ended_in(folder)}):
        raise ValueError(
            f"{folder} has no whole checkpoint to resume from: "
            f"{'; '.join(f'{name}: {problem}' for name, problem in damaged.items())}. Restore one from a copy, or "
            "delete them to begin anew."
        )
    if trainer.is_world_process_zero():
        set_aside(folder, checkpoint)
    logger.warning("Resuming from %s.", checkpoint or f"the beginning: {folder} has no whole checkpoint yet")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into a DiskFull that says what is whole."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        if is_main_process():
            for half in checkpoints_in(folder):
                if incomplete(half):
                    shutil.rmtree(half)  # it takes the room that is missing
        checkpoint = last_whole_checkpoint(folder)
        whole = f"the last whole checkpoint is {checkpoint}" if checkpoint else "there is no whole checkpoint"
        raise DiskFull(
            f"writing to {folder} failed ({reason}); {whole}. Make room and give the same command with --resume."
        ) from error


def save_final(trainer: Trainer, folder: Path, more: Callable[[Path], None] = lambda _: None) -> None:
    """Model, tokenizer and custom code into `folder`: written to a folder inside it first, then moved file by file.

    `more` writes what else belongs to the model.
    """
    beside = folder / ".final"
    with writing(folder):
        trainer.save_model(str(beside))  # every process takes part: a sharded model is gathered here
    if not trainer.is_world_process_zero():
        return
    with writing(folder):
        more(beside)
    checksums.write(beside)
    for path in sorted(beside.iterdir()):
        if path.is_dir():  # what was killed here before may have moved it already
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    shutil.rmtree(beside)


def save_stage(trainer: Trainer, folder: Path, content: Mapping[str, Any]) -> None:
    """The model of a finished stage and, last, `content` in STAGE_FILE."""
    with writing(folder):
        trainer.save_model(str(folder))
        checksums.write(folder, folder.iterdir())
        write_json(folder / STAGE_FILE, content)


def last_evaluation(trainer: Trainer) -> dict[str, float] | None:
    """Metrics of the evaluation at the last step, if these are the weights that it saw: it is not done twice."""
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    if trainer.args.load_best_model_at_end or not rows or rows[-1]["step"] != trainer.state.global_step:
        return None
    return rows[-1]
