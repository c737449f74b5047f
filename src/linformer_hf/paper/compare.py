"""`linformer-hf compare RECIPE.yaml`: checkpoints x tasks x seeds, fine-tuned alike, in one table.

A recipe has one section, `compare` (Comparison). Every cell is a run of `linformer-hf finetune` in a process of its own
(so its memory is its own), in `output_dir/<task>/<checkpoint>/<learning rate>/<seed>`. A cell that is finished is not
run again; one that was interrupted goes on from its last checkpoint or, without one, is begun anew; one that fails is
shown as failed, and no mean is taken over the rest of its seeds. Where several learning rates are given, each is tried
with the first seed, and the one that is best by the first metric on validation rows is used; the test rows have no part
in the choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..benchmark.tables import table_2
from ..data.metrics import ERRORS, test_metric
from ..data.tasks import TaskData
from ..training.finetune import read_recipe as read_finetune
from ..utils.files import check_folder, write_text
from ..utils.recipe import Recipe, RecipeError, load_recipe
from ..utils.runs import Run
from .grid import (
    KEPT,
    TABLE_FILE,
    Cell,
    Column,
    Over,
    check_changes,
    check_grid,
    failures,
    finish,
    folder_name,
    key_of,
    median_of,
    run_all,
    table,
)


READING = ("data.max_length", "data.stride")  # how rows are read, and not which


@dataclass
class Comparison:
    """Section `compare`.

    Args:
        output_dir: folder to fill; run the same command again to go on.
        checkpoints: name in the table -> folder or Hub name. The first is what the others are compared with.
        recipes: fine-tuning recipe, one for each task -> `section.key=value`, applied over it.
        seeds: of the weights of the head and the order of the rows.
        learning_rates: tried with the first seed, chosen by the first metric on validation rows; else the recipe's own.
        overrides: name in the table -> `section.key=value`, applied for this checkpoint alone: for one that stands
            there twice and is read in another way the second time.
        jobs: runs at the same time, which share the cores.
    """

    output_dir: str
    checkpoints: dict[str, str]
    recipes: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = field(default_factory=list)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}.")
        if unknown := [name for name in self.overrides if name not in self.checkpoints]:
            names = ", ".join(self.checkpoints)
            raise ValueError(f"overrides: there is no checkpoint {unknown[0]!r}; there are {names}.")
        settled = {"model.checkpoint": "checkpoints"}
        settled |= {"training.learning_rate": "learning_rates"} if self.learning_rates else {}
        check_changes(chain.from_iterable([*self.recipes.values(), *self.overrides.values()]), settled)
        for change in chain.from_iterable(self.overrides.values()):
            key = key_of(change)
            if key.partition(".")[0] == "data" and key not in READING:
                raise ValueError(
                    f"overrides: {change!r} would compare checkpoints on other rows. Of the section data only "
                    f"{' and '.join(READING)} may differ between them."
                )
        check_grid(self, ("checkpoints", "recipes", "seeds"), list(self.checkpoints))

    @property
    def has_choice(self) -> bool:
        return len(self.learning_rates) > 1


SECTIONS = {"compare": Comparison}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A comparison recipe and the fine-tuning recipes that it names, checked. Raises RecipeError."""
    recipe = load_recipe(path, overrides, sections=SECTIONS)
    section: Comparison = recipe.build("compare")
    tasks = [task_of(*item) for item in section.recipes.items()]
    for place, changes in section.recipes.items():
        for own in section.overrides.values():
            read_finetune(place, [*changes, *own])
    if len(set(tasks)) < len(tasks):
        raise RecipeError(f"compare.recipes: two recipes are for the same task ({', '.join(tasks)}).")
    return recipe


def task_of(recipe: str, overrides: Sequence[str]) -> str:
    data: TaskData = read_finetune(recipe, overrides).build("data")
    return data.title


def compare(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run, or finish, the cells of a recipe, a YAML file with `section.key=value` applied over it.

    Returns:
        The folder with table.md and results.json.

    Raises:
        RecipeError: an unknown key or a value of the wrong type, here or in a fine-tuning recipe.
        FileNotFoundError: there is no such checkpoint.
        ValueError: a finished cell belongs to another recipe; or, after all others have run, a cell failed.
    """
    loaded = read_recipe(recipe_path, overrides)
    section: Comparison = loaded.build("compare")
    for checkpoint in section.checkpoints.values():
        check_folder(checkpoint)
    run = Run("compare", loaded.raw, Path(section.output_dir))
    tasks: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for recipe, changes in section.recipes.items():
        task = task_of(recipe, changes)
        tasks[task] = task_runs(section, recipe, run.folder / folder_name(task))
        failed += failures({f"{task}, {name}": runs["seeds"] for name, runs in tasks[task].items()})
        # After every task: an interrupted comparison leaves what it has.
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / TABLE_FILE, render(tasks) + "\n")
    return finish(run, {"tasks": tasks}, render(tasks), "Table", failed)


def make_cell(section: Comparison, recipe: str, folder: Path, name: str, seed: int, rate: float | None) -> Cell:
    place = folder / folder_name(name) / (f"lr-{rate:g}" if rate is not None else "own-lr") / f"seed-{seed}"
    own = section.overrides.get(name, [])
    changes = [*section.recipes[recipe], *own, f"model.checkpoint={section.checkpoints[name]}", f"training.seed={seed}"]
    changes += [f"training.learning_rate={rate}"] if rate is not None else []
    return Cell("finetune", read_finetune, recipe, place, changes)


def try_rates(section: Comparison, recipe: str, folder: Path) -> tuple[dict[str, dict[float, float]], Callable]:
    """The first seed's validation score for every checkpoint and learning rate, where there is a choice.

    Beside it `max`, or `min` where the score is an error: what chooses among them.

    A run that fails has none: its message is on the terminal or in its log. In the recipe's order, whichever run ends
    first: of equally good rates the first is chosen.
    """
    found: dict[str, dict[float, float]] = {name: {} for name in section.checkpoints}
    best: Callable = max
    if section.has_choice:
        places = [(name, rate) for name in section.checkpoints for rate in section.learning_rates]
        cells = [make_cell(section, recipe, folder, name, section.seeds[0], rate) for name, rate in places]
        for place, done in run_all(cells, section.jobs, f"{folder.name}: learning rates"):
            if done is not None:
                name, rate = places[place]
                metrics = done["metrics"]
                key = next(key for key in metrics if key.startswith("validation_"))
                found[name][rate] = metrics[key]
                best = min if key.removeprefix("validation_") in ERRORS else max
    in_order = {name: {rate: v[rate] for rate in section.learning_rates if rate in v} for name, v in found.items()}
    return in_order, best


def task_runs(section: Comparison, recipe: str, folder: Path) -> dict[str, Any]:
    """Checkpoint -> {"learning_rate": .., "validation_by_learning_rate": .., "seeds": {seed: results}} on one task."""
    validation, best = try_rates(section, recipe, folder)
    own = section.learning_rates[0] if section.learning_rates else None
    rates = {name: best(v, key=lambda rate, v=v: v[rate]) if v else own for name, v in validation.items()}
    # Without one of its rates a checkpoint has no choice that equals the others': all its seeds count as failed.
    whole = [name for name, v in validation.items() if len(v) == len(section.learning_rates) or not section.has_choice]
    places = [(name, seed) for seed in section.seeds for name in whole]
    cells = [make_cell(section, recipe, folder, name, seed, rates[name]) for name, seed in places]
    seeds: dict[str, dict[str, Any]] = {
        name: {str(seed): {"failed": True} for seed in section.seeds} for name in section.checkpoints
    }
    for place, done in run_all(cells, section.jobs, folder.name):
        name, seed = places[place]
        if done is not None:
            seeds[name][str(seed)] = {key: done[key] for key in (*KEPT, "baselines", "data")}
            rates[name] = done["recipe"]["training"].get("learning_rate")
    return {
        name: {
            "checkpoint": section.checkpoints[name],
            "learning_rate": rates[name],
            "validation_by_learning_rate": {str(rate): value for rate, value in validation[name].items()},
            "seeds": seeds[name],
        }
        for name in section.checkpoints
    }


def render(tasks: dict[str, dict[str, Any]]) -> str:
    """Markdown: for each task a row for each checkpoint, the first metric as mean (lowest to highest) of the seeds."""
    blocks = []
    columns: dict[str, Column] = {"steps": lambda runs: f"{max(run['steps'] for run in runs):,}"}
    columns["training, s"] = median_of("train_seconds")
    columns["peak memory of the process, MiB"] = median_of("peak_memory_mib")
    points: Over = ("points over", lambda mean, base: f"{100 * (mean - base):+.1f}")
    per_cent: Over = ("over", lambda mean, base: f"{100 * (mean / base - 1):+.1f} %")
    for task, checkpoints in tasks.items():
        runs = {name: found["seeds"] for name, found in checkpoints.items()}
        done = [run for seeds in runs.values() for run in seeds.values() if "failed" not in run]
        if not done:
            blocks.append(f"**{task}**: every run failed.")
            continue
        metric = test_metric(done[0]["metrics"])
        name = metric.removeprefix("test_")
        shown = table(runs, metric, name, 4, per_cent if name in ERRORS else points, columns)
        baselines = (
            "; ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in done[0]["baselines"].items()) or "none"
        )
        rows = done[0]["metrics"]["test_rows"]
        title = f"{task}: {rows:,} test rows, {done[0]['dtype']}"
        blocks.append(f"**{title}**\n\n{shown}\n\nBaselines: {baselines}.")
    return "\n\n".join([*blocks, *table_2(list(tasks))])
