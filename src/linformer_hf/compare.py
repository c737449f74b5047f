"""`linformer-hf compare RECIPE.yaml`: checkpoints x tasks x seeds, fine-tuned alike, in one table.

A recipe has one section, `compare` (Comparison). Every cell is a run of `linformer-hf finetune` in a process of its own
(so its memory is its own), in `output_dir/<task>/<checkpoint>/<learning rate>/<seed>`. A cell that is finished is not
run again; one that was interrupted is begun anew. Where several learning rates are given, each is tried with the first
seed and the one with the best accuracy on validation rows is used; the test rows have no part in the choice.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import results
from .cells import Cell, check_names, folder_name
from .data.tasks import TaskData
from .finetune import read_recipe as read_finetune
from .paper import TABLE_2
from .recipe import Recipe, RecipeError, load_recipe


TABLE_FILE = "table.md"


@dataclass
class Comparison:
    """Section `compare`.

    Args:
        output_dir: folder to fill; run the same command again to go on.
        checkpoints: name in the table -> folder or Hub name. The first is what the others are compared with.
        recipes: fine-tuning recipe, one for each task -> `section.key=value`, applied over it.
        seeds: of the weights of the head and the order of the rows.
        learning_rates: tried with the first seed, chosen by validation accuracy; none: the recipe's own.
    """

    output_dir: str
    checkpoints: dict[str, str]
    recipes: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("checkpoints", "recipes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is given twice: {', '.join(map(str, self.seeds))}.")
        check_names(list(self.checkpoints))


SECTIONS = {"compare": Comparison}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A comparison recipe and the fine-tuning recipes that it names, checked. Raises RecipeError."""
    recipe = load_recipe(path, overrides, SECTIONS)
    section: Comparison = recipe.build("compare")
    tasks = [task_of(*item) for item in section.recipes.items()]
    if len(set(tasks)) < len(tasks):
        raise RecipeError(f"compare.recipes: two recipes are for the same task ({', '.join(tasks)}).")
    return recipe


def task_of(recipe: str, overrides: Sequence[str]) -> str:
    data: TaskData = read_finetune(recipe, overrides).build("data")
    return data.task


def compare(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run, or finish, the cells of a recipe and write table.md and results.json.

    Args:
        recipe_path: YAML file.
        overrides: `section.key=value`, applied over the file.

    Returns:
        The folder of the comparison.

    Raises:
        RecipeError: an unknown key or a value of the wrong type, here or in a fine-tuning recipe.
        ValueError: a finished cell belongs to another recipe, or a run failed; the message names it.
    """
    section: Comparison = read_recipe(recipe_path, overrides).build("compare")
    folder = Path(section.output_dir)
    tasks: dict[str, dict[str, Any]] = {}
    for recipe in section.recipes:
        task = task_of(recipe, section.recipes[recipe])
        tasks[task] = {name: checkpoint_runs(section, recipe, folder / task, name) for name in section.checkpoints}
        # After every task: an interrupted comparison leaves what it has.
        folder.mkdir(parents=True, exist_ok=True)
        table = render(tasks, next(iter(section.checkpoints)))
        results.write_text(folder / TABLE_FILE, table + "\n")
    content = {"verb": "compare", "recipe": {"compare": vars(section)}, "tasks": tasks}
    results.write_json(folder / results.RESULTS_FILE, content)
    print(f"\n{table}\n\nTable and {results.RESULTS_FILE}: {folder.resolve()}")
    return folder


def checkpoint_runs(section: Comparison, recipe: str, folder: Path, name: str) -> dict[str, Any]:
    """All seeds of one checkpoint on one task: {"learning_rate": .., "validation": .., "seeds": {seed: results}}."""

    def cell(seed: int, rate: float | None) -> Cell:
        place = folder / folder_name(name) / (f"lr-{rate:g}" if rate is not None else "own-lr") / f"seed-{seed}"
        changes = [*section.recipes[recipe], f"model.checkpoint={section.checkpoints[name]}", f"training.seed={seed}"]
        changes += [f"training.learning_rate={rate}"] if rate is not None else []
        return Cell("finetune", read_finetune, recipe, place, changes)

    rates: list[float | None] = [*section.learning_rates] or [None]
    validation = {}
    for rate in rates if len(rates) > 1 else []:
        metrics = run(cell(section.seeds[0], rate))["metrics"]
        validation[rate] = metrics[next(key for key in metrics if key.startswith("validation_"))]
    chosen = max(validation, key=lambda rate: validation[rate]) if validation else rates[0]
    seeds = {seed: run(cell(seed, chosen)) for seed in section.seeds}
    kept: tuple[str, ...] = (
        "metrics",
        "baselines",
        "data",
        "steps",
        "train_seconds",
        "wall_seconds",
        "peak_memory_mib",
        "threads",
    )
    kept += ("dtype", "versions", "revision", "device_name", "parameters")
    return {
        "checkpoint": section.checkpoints[name],
        "learning_rate": next(iter(seeds.values()))["recipe"]["training"].get("learning_rate"),
        "validation_by_learning_rate": {str(rate): value for rate, value in validation.items()},
        "seeds": {str(seed): {key: content[key] for key in kept} for seed, content in seeds.items()},
    }


def run(cell: Cell) -> dict[str, Any]:
    """The results of a cell, from its folder or from a new run. Raises a ValueError if the run fails."""
    done = cell.run()
    if done is None:
        raise ValueError(f"the run in {cell.folder} failed; its message is above. Run the same command to go on.")
    return done


def render(tasks: dict[str, dict[str, Any]], first: str) -> str:
    """Markdown: for each task a row for each checkpoint, accuracies as mean (lowest to highest) over the seeds."""
    blocks = []
    for task, checkpoints in tasks.items():
        metric = next(iter(checkpoints[first]["seeds"].values()))["metrics"]
        name = next(key for key in metric if key.startswith("test_") and key != "test_rows")
        values = {
            checkpoint: [content["metrics"][name] for content in runs["seeds"].values()]
            for checkpoint, runs in checkpoints.items()
        }
        base = statistics.mean(values[first])
        rows = []
        for checkpoint, runs in checkpoints.items():
            cells, mean = list(runs["seeds"].values()), statistics.mean(values[checkpoint])
            rows.append(
                [
                    checkpoint,
                    f"{mean:.4f} ({min(values[checkpoint]):.4f} to {max(values[checkpoint]):.4f})",
                    "" if checkpoint == first else f"{100 * (mean - base):+.1f}",
                    statistics.median(content["train_seconds"] for content in cells),
                    statistics.median(content["peak_memory_mib"] for content in cells),
                ]
            )
        header = ["", f"{name.removeprefix('test_')}, mean ({len(values[first])} seeds)", f"points over {first}"]
        header += ["training, s", "peak memory of the process, MiB"]
        one = next(iter(checkpoints[first]["seeds"].values()))
        baselines = "; ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in one["baselines"].items())
        title = f"{task}: {metric['test_rows']:,} test rows, {one['steps']:,} steps, {one['dtype']}"
        blocks.append(f"**{title}**\n\n{results.markdown_table(header, rows)}\n\nBaselines: {baselines}.")
    return "\n\n".join(blocks + paper_rows(list(tasks)))


def paper_rows(tasks: Sequence[str]) -> list[str]:
    """The paper's Table 2 for those of the tasks that it has: no block if it has none of them."""
    known = [task for task in tasks if any(task in row for row in TABLE_2.values())]
    if not known:
        return []
    rows = [[n, model, *(row[task] for task in known)] for (n, model), row in TABLE_2.items()]
    table = results.markdown_table(["N", "model", *known], rows)
    return [f"**The paper's Table 2** (base size, pretrained on BookCorpus and Wikipedia)\n\n{table}"]
