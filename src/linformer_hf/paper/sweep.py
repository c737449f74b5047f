"""`linformer-hf sweep RECIPE.yaml`: one pretraining recipe, changed along one axis after the other (Figure 3).

A recipe has one section, `sweep` (Sweep). Every cell is a run of `linformer-hf pretrain` in a process of its own, in
`output_dir/<cell>/seed-<seed>`. All cells of a seed see the same rows in the same order with the same masks: these are
functions of the recipe's sections `data` and `training`, which cells should leave alone. Where `start` is given, all
cells of a seed and an N begin with the weights of one run of it (the projections, which it lacks, are new). A finished
cell is not run again, one that was interrupted goes on from its last checkpoint or, without one, is begun anew; one
that fails is shown as failed, and no mean is taken over the rest of its seeds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..training.pretrain import places as readers_of
from ..training.pretrain import read_recipe as read_pretrain
from ..utils.figures import new_figure, plain_ticks, save_figure, shades
from ..utils.files import write_text
from ..utils.recipe import Recipe, RecipeError, load_recipe
from ..utils.runs import Run
from .grid import (
    KEPT,
    TABLE_FILE,
    Cell,
    check_changes,
    check_grid,
    failures,
    finish,
    folder_name,
    key_of,
    measured,
    median_of,
    run_all,
    table,
)


START = "start"
# Pooling windows of one token: exact attention, without a matrix.
FULL_ATTENTION = (
    "model.projection_type=mean_pool",
    "model.projection_sharing=null",
    "model.projection_init=null",
)
STEPS_FILE, SECONDS_FILE, SCALES_FILE = "perplexity-steps.png", "perplexity-seconds.png", "over-scales.png"
MARKERS = "osv^DPX*<>pdh"  # so that curves can be told apart without their colours
MODEL = ("max_position_embeddings", "projected_length", "projection_type", "projection_sharing", "local_window")


@dataclass
class Sweep:
    """Section `sweep`.

    Args:
        output_dir: folder to fill; run the same command again to go on.
        recipe: a pretraining recipe.
        cells: name -> `section.key=value`, applied over it. The first is what the others are compared with: for
            full attention set model.projection_type=mean_pool and model.projected_length to N, which is exact.
        overrides: applied to every cell, before its own.
        scales: name -> `section.key=value`, applied before a cell's own: all cells are run at each, such as a width,
            and compared with the first one there; a third plot has what they are over it.
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
    scales: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    start: str | None = None
    processes: int = 1
    jobs: int = 1

    def __post_init__(self) -> None:
        if min(self.jobs, self.processes) < 1:
            raise ValueError(f"jobs and processes must be at least 1, got {self.jobs} and {self.processes}.")
        if self.start and self.scales:
            raise ValueError("scales change the model's shape, which start has once: leave one of them out.")
        check_changes(chain(self.overrides, *self.cells.values()), {"model.checkpoint": "start"} if self.start else {})
        by_all = set.intersection(*(set(map(key_of, own)) for own in self.cells.values())) if self.cells else set()
        check_changes(chain(*self.scales.values()), dict.fromkeys(by_all, "each cell"))
        check_grid(self, ("cells", "seeds"), [*self.changes, START] if self.start else [*self.changes])

    @property
    def changes(self) -> dict[str, list[str]]:
        """All runs of a seed: name -> what is applied over the recipe."""
        if not self.scales:
            return {name: [*self.overrides, *own] for name, own in self.cells.items()}
        return {
            f"{name}, {scale}": [*self.overrides, *at, *own]
            for scale, at in self.scales.items()
            for name, own in self.cells.items()
        }

    def groups(self, runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """`runs`, which has a value for each name of `changes`, in parts that have a first one to compare with."""
        names, width = list(runs), len(self.cells)
        scales = list(self.scales) or [""]
        return {scale: {name: runs[name] for name in names[i * width :][:width]} for i, scale in enumerate(scales)}

    def cell(self, name: str, seed: int) -> Cell:
        folder = Path(self.output_dir) / folder_name(name) / f"seed-{seed}"
        changes = [*self.changes[name], f"training.seed={seed}"]
        if self.start:
            changes.append(f"model.checkpoint={self.beginning(name, seed).folder}")
        return self._run(self.recipe, folder, changes)

    def beginning(self, name: str, seed: int) -> Cell:
        """The run of `start` that a cell goes on from."""
        assert self.start
        n = read_pretrain(self.recipe, self.changes[name]).values("model")["max_position_embeddings"]
        folder = Path(self.output_dir) / START / f"n-{n}" / f"seed-{seed}"
        changes = [f"model.max_position_embeddings={n}", *FULL_ATTENTION, f"model.projected_length={n}"]
        return self._run(self.start, folder, [*changes, f"training.seed={seed}"])

    def _run(self, recipe: str, folder: Path, changes: list[str]) -> Cell:
        found = read_pretrain(recipe, changes)
        data = found.values("data")
        if data.get("streaming") and not data.get("readers"):  # which it would count, and write into its own recipe
            changes = [*changes, f"data.readers={readers_of(found.values('training'), self.processes)}"]
        return Cell("pretrain", read_pretrain, recipe, folder, changes, self.processes)


SECTIONS = {"sweep": Sweep}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A sweep recipe and each of its cells' pretraining recipes, checked. Raises RecipeError."""
    recipe = load_recipe(path, overrides, sections=SECTIONS)
    section: Sweep = recipe.build("sweep")
    for name, changes in section.changes.items():
        cell = read_pretrain(section.recipe, changes)
        if cell.values("training").get("eval_strategy", "no") == "no":
            raise RecipeError(
                f"the cell {name!r} is never evaluated while it trains, and its curve is made of that: set "
                f"training.eval_strategy=steps and training.eval_steps in {section.recipe} or in sweep.overrides."
            )
        if section.start and "max_position_embeddings" not in cell.values("model"):
            raise RecipeError(f"sweep.start needs model.max_position_embeddings in {section.recipe}.")
    if section.start:
        read_pretrain(section.start)
    return recipe


def sweep(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run, or finish, the cells of a recipe, a YAML file with `section.key=value` applied over it.

    Returns:
        The folder with table.md, two plots (three with scales) and results.json.

    Raises:
        RecipeError: an unknown key or a value of the wrong type, here or in a cell.
        ValueError: a finished cell belongs to another recipe; or, after all others have run, a cell failed.
    """
    recipe = read_recipe(recipe_path, overrides)
    section: Sweep = recipe.build("sweep")
    run = Run("sweep", recipe.raw, Path(section.output_dir))
    cells: dict[str, dict[str, Any]] = {
        name: {str(seed): {"failed": True, "unfinished": True} for seed in section.seeds} for name in section.changes
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    begin(section)
    # Seed by seed: an interrupted sweep has a table of all cells soon.
    places = [(name, seed) for seed in section.seeds for name in section.changes]
    for place, done in run_all([section.cell(*cell) for cell in places], section.jobs, "pretraining cells"):
        name, seed = places[place]
        cells[name][str(seed)] = {"failed": True} if done is None else kept(done)
        write_text(run.folder / TABLE_FILE, shown(section, cells) + "\n")
    plot(run.folder / STEPS_FILE, cells, "step", "optimizer steps")
    plot(run.folder / SECONDS_FILE, cells, "seconds", "training time, s (evaluation included)")
    if section.scales:
        plot_scales(run.folder / SCALES_FILE, list(section.cells), section.groups(cells))
    return finish(run, {"cells": cells}, shown(section, cells), "Table, plots", failures(cells))


def shown(section: Sweep, cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a table for each scale."""
    return "\n\n".join(map(render, section.groups(cells).values()))


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
    wanted = (*KEPT, "trained_tokens", "tokens_per_second")
    return {**{key: content[key] for key in wanted if key in content}, "model": model, "curve": curve}


def render(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each cell, over its seeds."""

    def ratio(runs: list[Any]) -> str:
        return f"{statistics.mean(run['metrics']['perplexity_ratio'] for run in runs):.2f}"

    def outside(runs: list[Any]) -> str:
        return f"{statistics.median(1 - run['train_seconds'] / run['wall_seconds'] for run in runs):.1%}"

    columns = {
        "unigram perplexity / it": ratio,
        "training, s": median_of("train_seconds"),
        "tokens/s": median_of("tokens_per_second"),
        "time outside training": outside,
    }
    over = ("over", lambda mean, base: f"{100 * (mean / base - 1):+.1f} %")
    return table(runs, "validation_perplexity", "validation perplexity", 2, over, columns)


def plot(path: Path, runs: dict[str, dict[str, Any]], x: str, label: str) -> None:
    """Validation perplexity against `x`: the mean over seeds as a line, lowest to highest as a band."""
    figure, axes = new_figure((9.5, 4.8))
    for i, (shade, (name, seeds)) in enumerate(zip(shades(len(runs)), runs.items(), strict=True)):
        curves = [run["curve"] for run in seeds.values() if "failed" not in run]
        points = list(zip(*curves, strict=False))
        if len(curves) < len(seeds) or not points:
            continue
        places = [statistics.mean(row[x] for row in point) for point in points]
        values = [[row["perplexity"] for row in point] for point in points]
        colour, marker = "black" if i == 0 else shade, MARKERS[i % len(MARKERS)]
        means = [statistics.mean(v) for v in values]
        axes.plot(places, means, color=colour, marker=marker, markersize=5, label=name)
        axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
    axes.set(xlabel=label, ylabel="validation perplexity", yscale="log")
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    if axes.has_data():
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside: it would cover the curves
    save_figure(figure, path)


def plot_scales(path: Path, names: Sequence[str], groups: dict[str, dict[str, Any]]) -> None:
    """Of each cell how much higher its perplexity is than the first cell's, in per cent, at each scale.

    Where a seed of either has failed there is no point, as there is no mean in the table.
    """
    figure, axes = new_figure((7.5, 4.2))
    for i, name in enumerate(names[1:], 1):
        places, over = [], []
        for place, runs in enumerate(groups.values()):
            first, *others = runs.values()
            base, found = (measured(seeds, "validation_perplexity") for seeds in (first, others[i - 1]))
            if base and found:
                places.append(place)
                over.append(100 * (statistics.mean(found) / statistics.mean(base) - 1))
        if places:
            axes.plot(places, over, color=shades(len(names))[i], marker=MARKERS[i % len(MARKERS)], label=name)
    axes.set(ylabel=f"perplexity over {names[0]}, %", xticks=range(len(groups)))
    axes.set_xticklabels(groups, fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize=8)
    save_figure(figure, path)
