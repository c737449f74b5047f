"""Runs of a verb as cells of a table: each in a process and a folder of its own, none that is finished repeated."""

import concurrent.futures
import logging
import multiprocessing
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..training.checkpoints import last_whole_checkpoint
from ..training.run import STAGE_FILE
from ..utils.files import RECIPE_FILE, RESULTS_FILE, read_json
from ..utils.processes import PARENT, Children, sigterm_raises
from ..utils.recipe import Recipe, same_recipe
from ..utils.reporting import markdown_table
from ..utils.runs import Run


logger = logging.getLogger(__name__)

PACKAGE = "linformer_hf"
TABLE_FILE = "table.md"
# Of a run's results.json, in the table's.
KEPT = (
    *("metrics", "steps", "train_seconds", "wall_seconds", "peak_memory_mib", "parameters"),
    *("threads", "dtype", "versions", "revision", "device_name"),
)
Seeds = Mapping[str, Mapping[str, Any]]  # seed -> its run, or {"failed": True}
Column = Callable[[list[Mapping[str, Any]]], Any]  # of a table, made of the runs of all seeds
Over = tuple[str, Callable[[float, float], str]]  # head of a column, and what it says of a mean and the first name's


class Forked:
    """`linformer-hf ARGUMENTS` in a process forked from one that has imported all it needs: that takes 6 s a run.

    Used as subprocess.Popen is.
    """

    def __init__(self, arguments: Sequence[str], log: Path, threads: int):
        context = multiprocessing.get_context("forkserver")
        modules = ("cli", "training.finetune", "training.pretrain")
        context.set_forkserver_preload([f"{PACKAGE}.{name}" for name in modules])
        self.process = context.Process(target=_main, args=(arguments, log, threads, os.getpid()))
        self.process.start()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("linformer-hf", timeout or 0.0)
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def _main(arguments: Sequence[str], log: Path, threads: int, parent: int) -> None:
    """What a forked process does: as `python -m linformer_hf`, told to `log`."""
    with log.open(_mode(arguments)) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    # The platform's own again: else a DataLoader's workers come from a server that imports all of it anew.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(threads)
    os.environ |= {"OMP_NUM_THREADS": str(threads), PARENT: str(parent)}
    sys.argv = [PACKAGE, *arguments]
    runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)


def _mode(arguments: Sequence[str]) -> str:
    """Of a run's log, which goes on where the run does."""
    return "ab" if "--resume" in arguments else "wb"


@dataclass
class Cell:
    """One run: where it is, and what is changed in its recipe.

    Attributes:
        verb: of the command line.
        read: the verb's reader of recipes.
        recipe: YAML file.
        folder: training.output_dir of the run.
        overrides: `section.key=value`.
        processes: that share a run, started by torchrun; 1: none of it.
    """

    verb: str
    read: Callable[[str, Sequence[str]], Recipe]
    recipe: str
    folder: Path
    overrides: list[str]
    processes: int = 1

    def finished(self) -> dict[str, Any] | None:
        """Its results, or None if it has none yet. Raises a ValueError if they come from another recipe."""
        path = self.folder / RESULTS_FILE
        if not path.exists():
            return None
        content = read_json(path, f"Delete {self.folder}, and the same command makes it again.")
        if not self.is_own(content.get("recipe")):
            raise ValueError(
                f"{self.folder} holds a run of another recipe. Choose another output_dir, or delete that run."
            )
        return content

    @property
    def log(self) -> Path:
        """Where a run that shares the machine with others writes what it has to say."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def run(self, threads: int | None = None, children: Children | None = None) -> dict[str, Any] | None:
        """Its results, from its folder or from a new run; None if that fails.

        Args:
            threads: of the run, which then writes to `log`; None: all, and the terminal.
            children: what the run belongs to, so that it ends with its siblings.
        """
        children = children or Children()
        done = self.finished()
        if done is not None:
            return done
        going_on = False
        if self.folder.exists() and any(self.folder.iterdir()):
            # Its name within it: a run that was killed very early has the file beside its place.
            if not any(RECIPE_FILE in path.name for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} holds something that is no run; choose another output_dir.")
            going_on = self.can_go_on()
            if going_on:
                logger.warning("%s holds an unfinished run: it goes on from its last checkpoint.", self.folder)
            else:
                why = "it has no whole checkpoint of this recipe"
                logger.warning("%s holds an unfinished run: it is begun anew, for %s.", self.folder, why)
                _remove_run(self.folder)
        if self.start(threads, children, resume=going_on):
            if threads is not None and not children.ended:
                tqdm.write(f"failed: {self.folder}: {self.last_words()}", file=sys.stderr)
            return None
        done = self.finished()
        assert done is not None
        return done

    def can_go_on(self) -> bool:
        """Whether its folder holds an interrupted run of this very recipe that has come to a checkpoint."""
        try:
            begun = read_json(self.folder / RECIPE_FILE, "The run is begun anew.")
        except (OSError, ValueError):
            return False
        legs = [self.folder, *self.folder.glob("stage-*")]
        whole = any((leg / STAGE_FILE).exists() or last_whole_checkpoint(leg) for leg in legs)
        return whole and self.is_own(begun)

    def is_own(self, recipe: Mapping[str, Any] | None) -> bool:
        """Whether it is what this run has, all changes included."""
        return same_recipe(recipe, self.read(self.recipe, [*self.overrides, f"training.output_dir={self.folder}"]).raw)

    def start(self, threads: int | None, children: Children, resume: bool = False) -> int:
        """Run it, done before or not; its exit status."""
        arguments = [self.verb, self.recipe, *self.overrides, f"training.output_dir={self.folder}"]
        if resume:
            arguments.append("--resume")
        # -P: what lies in the current folder must not shadow an installed module.
        command = [sys.executable, "-P"]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        command += ["-m", PACKAGE, *arguments]
        environment = {**os.environ, PARENT: str(os.getpid())}
        if threads is None:
            print(f"\n== {self.folder}", flush=True)
            return children.call(command, env=environment)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        tqdm.write(f"== {self.folder}: its progress is in {self.log}")
        if self.processes == 1 and "forkserver" in multiprocessing.get_all_start_methods():
            return children.wait_for(lambda: Forked(arguments, self.log, threads))
        with self.log.open(_mode(arguments)) as log:
            environment["OMP_NUM_THREADS"] = str(threads)
            return children.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"nothing was written to {self.log}"


def _remove_run(folder: Path) -> None:
    """With recipe.json last: killed on the way, the folder is still known as that of a run."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif RECIPE_FILE not in path.name:
            path.unlink()
    shutil.rmtree(folder)


def run_all(cells: Sequence[Cell], jobs: int, title: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Run cells, `jobs` of them at a time, which share the cores; (place in `cells`, results) of each when it ends.

    With one job every run has the machine and the terminal; with more, each writes to a log beside its folder.
    """
    children = Children()
    if jobs == 1:
        with sigterm_raises():
            for place, cell in enumerate(cells):
                yield place, cell.run(children=children)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with sigterm_raises(), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(cell.run, threads, children): place for place, cell in enumerate(cells)}
        try:
            ended = concurrent.futures.as_completed(running)
            for future in tqdm(ended, total=len(running), desc=title, unit="run"):
                yield running[future], future.result()
        except BaseException:  # Ctrl-C or SIGTERM, or the caller has had enough: the waiting ones must not start
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
            raise


def folder_name(name: str) -> str:
    """A name as a folder: its letters, digits and dots."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")


def check_names(names: Sequence[str]) -> None:
    """Raise a ValueError unless every name has a folder of its own."""
    folders = {folder_name(name) for name in names}
    if len(folders) < len(names) or "" in folders:
        raise ValueError(f"the names {', '.join(names)} must differ in their letters and digits.")


def check_grid(section: Any, needed: Sequence[str], names: Sequence[str]) -> None:
    """Raise a ValueError unless a section has all that is needed, every seed once, and names for folders."""
    for name in needed:
        if not getattr(section, name):
            raise ValueError(f"{name} is empty: name at least one.")
    if len(set(section.seeds)) < len(section.seeds):
        raise ValueError(f"a seed is given twice: {', '.join(map(str, section.seeds))}.")
    check_names(names)


def check_changes(changes: Iterable[str], settled: Mapping[str, str]) -> None:
    """Raise a ValueError for a `section.key=value` that would be overwritten.

    Args:
        settled: key -> what says its value, beside the seeds and folders that every grid says.
    """
    settled = {"training.seed": "seeds", "training.output_dir": "output_dir", **settled}
    for change in changes:
        key = key_of(change)
        if key in settled:
            raise ValueError(f"{change!r} would have no effect, for {settled[key]} says {key}. Leave it out.")


def key_of(change: str) -> str:
    return change.partition("=")[0].strip()


def measured(seeds: Seeds, metric: str) -> list[float] | None:
    """A metric of every seed; None if a run failed: no mean is taken around it."""
    if any("failed" in run for run in seeds.values()):
        return None
    return [run["metrics"][metric] for run in seeds.values()]


def missing(seeds: Seeds) -> str:
    """Which seeds failed or are still to come."""
    words = []
    for what, waiting in (("failed", False), ("not run yet", True)):
        found = [seed for seed, run in seeds.items() if "failed" in run and ("unfinished" in run) == waiting]
        words += [f"{what} (seed {', '.join(found)})"] if found else []
    return "; ".join(words)


def median_of(key: str) -> Column:
    return lambda runs: statistics.median(run[key] for run in runs)


def table(
    runs: Mapping[str, Seeds],
    metric: str,
    head: str,
    digits: int,
    over: Over,
    columns: Mapping[str, Column],
) -> str:
    """Markdown: for each name its metric as mean (lowest to highest) over the seeds, that over the first name's, more.

    Args:
        head: of the metric's column.
        over: head of the next one; what stands there for a mean and the first name's.
        columns: head -> what stands there for the runs of all seeds.
    """
    first = next(iter(runs))
    reference = measured(runs[first], metric)
    rows: list[list[Any]] = []
    for name, seeds in runs.items():
        found = measured(seeds, metric)
        if not found:
            rows.append([name, missing(seeds), *[""] * (1 + len(columns))])
            continue
        mean = statistics.mean(found)
        rows.append([name, f"{mean:.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"])
        rows[-1].append(over[1](mean, statistics.mean(reference)) if reference and name != first else "")
        rows[-1] += [column(list(seeds.values())) for column in columns.values()]
    heads = [f"{head}, mean ({len(runs[first])} seeds)", f"{over[0]} {first}"]
    return markdown_table(["", *heads, *columns], rows)


def failures(runs: Mapping[str, Seeds]) -> list[str]:
    return [f"{name} (seed {seed})" for name, seeds in runs.items() for seed, run in seeds.items() if "failed" in run]


def finish(run: Run, found: Mapping[str, Any], table: str, what: str, failed: Sequence[str]) -> Path:
    """Write and show what there is; then raise a ValueError if cells have failed."""
    run.write({"verb": run.verb, "recipe": run.recipe, **found}, table, TABLE_FILE)
    run.tell(table, what)
    if failed:
        raise ValueError(f"{len(failed)} cells failed: {', '.join(failed)}. Run the same command to try them again.")
    return run.folder
