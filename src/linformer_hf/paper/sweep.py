"""`linformer-hf sweep RECIPE.yaml`: one pretraining recipe, changed along one axis after the other (Figure 3).

A recipe has one section, `sweep` (Sweep). Every cell is a run of `linformer-hf pretrain` in a process of its own, in
`output_dir/<cell>/seed-<seed>`. All cells of a seed see the same rows in the same order with the same masks: these are
functions of the recipe's sections `data` and `training`, which cells should leave alone. Where `start` is given, all
cells of a seed and an N begin with the weights of one run of it (the projections, which it lacks, are new). A finished
cell is not run again, one that was interrupted is begun anew; one that fails is shown as failed, and no mean is taken
over the rest of its seeds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipe import Recipe, RecipeError, load_recipe
from ..training.pretrain import read_recipe as read_pretrain
from ..utils.files import RESULTS_FILE, write_json, write_text
from ..utils.reporting import markdown_table, save_figure, show
from .grid import Cell, check_names, folder_name, run_all


START = "start"
# Pooling windows of one token: exact attention, without a matrix.
FULL_ATTENTION = (
    "model.projection_type=mean_pool",
    "model.projection_sharing=null",
    "model.projection_init=null",
)
TABLE_FILE, STEPS_FILE, SECONDS_FILE = "table.md", "perplexity-steps.png", "perplexity-seconds.png"
MARKERS = "osv^DPX*<>pdh"  # so that curves can be told apart without their colours
KEPT = (
    *("metrics", "steps", "train_seconds", "wall_seconds", "trained_tokens", "tokens_per_second", "parameters"),
    *("peak_memory_mib", "threads", "dtype", "versions", "revision", "device_name"),
)
MODEL = ("max_position_embeddings", "projected_length", "projection_type", "projection_sharing")


@dataclass
class Sweep:
    """Section `sweep`.

    Args:
        output_dir: folder to fill; run the same command again to go on.
        recipe: a pretraining recipe.
        cells: name -> `section.key=value`, applied over it. The first is what the others are compared with: for
            full attention set model.projection_type=mean_pool and model.projected_length to N, which is exact.
        overrides: applied to every cell, before its own.
        seeds: of weights and of the order of rows.
        start: a pretraining recipe, run once for each seed and each N of the cells, which go on from its weights; none:
            cells start at random weights.
        processes: of a cell, by torchrun: one for each GPU.
        jobs: cells that run at the same time and share the cores. Small models gain by it: twice the cells an hour.
    """

    output_dir: str
    recipe: str
    cells: dict[str, list[str]]
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    start: str | None = None
    processes: int = 1
    jobs: int = 1

    def __post_init__(self) -> None:
        for name in ("cells", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is given twice: {', '.join(map(str, self.seeds))}.")
        if min(self.jobs, self.processes) < 1:
            raise ValueError(f"jobs and processes must be at least 1, got {self.jobs} and {self.processes}.")
        check_names([*self.cells, START] if self.start else list(self.cells))

    def cell(self, name: str, seed: int) -> Cell:
        folder = Path(self.output_dir) / folder_name(name) / f"seed-{seed}"
        changes = [*self.overrides, *self.cells[name], f"training.seed={seed}"]
        if self.start:
            changes.append(f"model.checkpoint={self.beginning(name, seed).folder}")
        return Cell("pretrain", read_pretrain, self.recipe, folder, changes, self.processes)

    def beginning(self, name: str, seed: int) -> Cell:
        """The run of `start` that a cell goes on from."""
        assert self.start
        n = read_pretrain(self.recipe, [*self.overrides, *self.cells[name]]).values("model")["max_position_embeddings"]
        folder = Path(self.output_dir) / START / f"n-{n}" / f"seed-{seed}"
        changes = [f"model.max_position_embeddings={n}", *FULL_ATTENTION, f"model.projected_length={n}"]
        return Cell("pretrain", read_pretrain, self.start, folder, [*changes, f"training.seed={seed}"], self.processes)


SECTIONS = {"sweep": Sweep}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A sweep recipe and each of its cells' pretraining recipes, checked. Raises RecipeError."""
    recipe = load_recipe(path, overrides, SECTIONS)
    section: Sweep = recipe.build("sweep")
    for changes in section.cells.values():
        values = read_pretrain(section.recipe, [*section.overrides, *changes]).values("model")
        if section.start and "max_position_embeddings" not in values:
            raise RecipeError(f"sweep.start needs model.max_position_embeddings in {section.recipe}.")
    if section.start:
        read_pretrain(section.start)
    return recipe


def sweep(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run, or finish, the cells of a recipe; write table.md, two plots and results.json.

    Args:
        recipe_path: YAML file.
        overrides: `section.key=value`, applied over the file.

    Returns:
        The folder of the sweep.

    Raises:
        RecipeError: an unknown key or a value of the wrong type, here or in a cell.
        ValueError: a finished cell belongs to another recipe; or, after all others have run, a cell failed.
    """
    recipe = read_recipe(recipe_path, overrides)
    section: Sweep = recipe.build("sweep")
    folder = Path(section.output_dir)
    runs: dict[str, dict[str, Any]] = {
        name: {str(seed): {"failed": True, "unfinished": True} for seed in section.seeds} for name in section.cells
    }
    folder.mkdir(parents=True, exist_ok=True)
    begin(section)
    # Seed by seed: an interrupted sweep has a table of all cells soon.
    places = [(name, seed) for seed in section.seeds for name in section.cells]
    for place, done in run_all([section.cell(*cell) for cell in places], section.jobs, "pretraining cells"):
        name, seed = places[place]
        found = {**runs[name], str(seed): {"failed": True} if done is None else kept(done)}
        runs[name] = {one: found[one] for one in map(str, section.seeds) if one in found}  # whichever ends first
        write_text(folder / TABLE_FILE, render(runs) + "\n")
    table = render(runs)
    plot(folder / STEPS_FILE, runs, "step", "optimizer steps")
    plot(folder / SECONDS_FILE, runs, "seconds", "training time, s (evaluation included)")
    write_json(folder / RESULTS_FILE, {"verb": "sweep", "recipe": recipe.raw, "cells": runs})
    show(f"\n{table}\n")
    print(f"Table, plots and {RESULTS_FILE}: {folder.resolve()}")
    failed = [f"{name} (seed {seed})" for name, seeds in runs.items() for seed in seeds if "failed" in seeds[seed]]
    if failed:
        raise ValueError(f"{len(failed)} cells failed: {', '.join(failed)}. Run the same command to try them again.")
    return folder


def begin(section: Sweep) -> None:
    """Run what the cells go on from. A run that fails is left to them: they say what they miss."""
    if section.start:
        starts = {
            cell.folder: cell for seed in section.seeds for cell in (section.beginning(n, seed) for n in section.cells)
        }
        for _ in run_all(list(starts.values()), section.jobs, "runs to start from"):
            pass


def kept(content: dict[str, Any]) -> dict[str, Any]:
    """What of a run's results.json is kept: the numbers, and the validation curve over steps and seconds."""
    pace = content["train_seconds"] / max(1, content["steps"])
    curve = [
        {"step": row["step"], "seconds": row["step"] * pace, "perplexity": math.exp(row["eval_loss"])}
        for row in content["history"]
        if "eval_loss" in row
    ]
    model = {key: value for key, value in content["recipe"]["model"].items() if key in MODEL}
    return {**{key: content[key] for key in KEPT if key in content}, "model": model, "curve": curve}


def perplexities(seeds: dict[str, Any]) -> list[float] | None:
    """Of every seed; None if one of them failed."""
    if any("failed" in run for run in seeds.values()):
        return None
    return [run["metrics"]["validation_perplexity"] for run in seeds.values()]


def render(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each cell, over its seeds."""
    first = next(iter(runs))
    reference = perplexities(runs[first])
    base = statistics.mean(reference) if reference else None
    rows = []
    for name, seeds in runs.items():
        found = perplexities(seeds)
        if found is None:
            rows.append([name, missing(seeds), *[""] * 5])
            continue
        mean, cells = statistics.mean(found), list(seeds.values())
        over = "" if base is None or name == first else f"{100 * (mean / base - 1):+.1f} %"
        ratio = statistics.mean(run["metrics"]["perplexity_ratio"] for run in cells)
        outside = statistics.median(1 - run["train_seconds"] / run["wall_seconds"] for run in cells)
        rows.append(
            [
                name,
                f"{mean:.2f} ({min(found):.2f} to {max(found):.2f})",
                over,
                f"{ratio:.2f}",
                statistics.median(run["train_seconds"] for run in cells),
                statistics.median(run["tokens_per_second"] for run in cells),
                f"{outside:.1%}",
            ]
        )
    count = len(runs[first])
    header = ["", f"validation perplexity, mean ({count} seeds)", f"over {first}", "unigram perplexity / it"]
    header += ["training, s", "tokens/s", "time outside training"]
    return markdown_table(header, rows)


def missing(seeds: dict[str, Any]) -> str:
    """Which seeds failed or are still to come."""
    failed = [seed for seed, run in seeds.items() if "failed" in run and "unfinished" not in run]
    waiting = [seed for seed, run in seeds.items() if "unfinished" in run]
    words = [f"failed (seed {', '.join(failed)})"] if failed else []
    return "; ".join([*words, *([f"not run yet (seed {', '.join(waiting)})"] if waiting else [])])


def plot(path: Path, runs: dict[str, dict[str, Any]], x: str, label: str) -> None:
    """Validation perplexity against `x`: the mean over seeds as a line, lowest to highest as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 4.8), layout="constrained")
    for i, (name, seeds) in enumerate(runs.items()):
        curves = [run["curve"] for run in seeds.values() if "failed" not in run]
        if len(curves) < len(seeds):
            continue
        points = list(zip(*curves, strict=False))
        places = [statistics.mean(row[x] for row in point) for point in points]
        values = [[row["perplexity"] for row in point] for point in points]
        colour = "black" if i == 0 else colormaps["viridis"](i / max(1, len(runs) - 1) * 0.95)
        means, marker = [statistics.mean(v) for v in values], MARKERS[i % len(MARKERS)]
        axes.plot(places, means, color=colour, marker=marker, markersize=5, label=name)
        axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
    axes.set(xlabel=label, ylabel="validation perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.has_data():
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside: it would cover the curves
    save_figure(figure, path)
