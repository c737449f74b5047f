"""`linformer-hf reproduce --scale quick|cpu|paper`: the paper's evidence, run or reused, on one page with verdicts.

A scale is a recipe, `configs/reproduce/<scale>.yaml`, with one section, `reproduce` (Reproduction), which names the
recipes of the other verbs. Each runs into the folder that it names, or is taken from there if it has run already; one
that fails is shown as failed. Then claims.py judges what is there. The page is report.html, with its figures inside,
and README.md, with the figures beside it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from ..benchmark import benchmark
from ..configuration_linformer import LinformerConfig
from ..conversion.convert import convert
from ..modeling_linformer import LinformerModel
from ..utils.files import RESULTS_FILE, read_json
from ..utils.recipe import Recipe, RecipeError, load_recipe, same_recipe
from ..utils.runs import Run
from ..utils.timing import longest_chain
from . import compare, spectrum, sweep, theory
from .page import Step, write_report
from .verdicts import Evidence


logger = logging.getLogger(__name__)

FOLDER = Path("configs") / "reproduce"
LENGTHS = (64, 128, 256, 512)  # of the graphs whose longest chain is counted
VERBS: dict[str, tuple[Callable[..., Recipe], Callable[..., Path]]] = {
    "spectrum": (spectrum.read_recipe, spectrum.spectrum),
    "theory": (theory.read_recipe, theory.theory),
    "sweep": (sweep.read_recipe, sweep.sweep),
    "compare": (compare.read_recipe, compare.compare),
    "benchmark": (benchmark.read_recipe, benchmark.benchmark),
}
GO_ON = ("sweep", "compare")  # these keep their finished cells and run what is missing


@dataclass
class Conversion:
    """A model that comparisons need.

    Args:
        source, output, projected_length, calibrate: as `linformer-hf convert` takes them.
    """

    source: str
    output: str
    projected_length: int
    calibrate: str | None = None


@dataclass
class Reproduction:
    """Section `reproduce`.

    Args:
        output_dir: folder of the report.
        convert: models to make first, where they are not there yet.
        spectrum, theory, sweep, compare, benchmark: recipes of these verbs.
    """

    output_dir: str
    convert: list[Conversion] = field(default_factory=list)
    spectrum: list[str] = field(default_factory=list)
    theory: list[str] = field(default_factory=list)
    sweep: list[str] = field(default_factory=list)
    compare: list[str] = field(default_factory=list)
    benchmark: list[str] = field(default_factory=list)


SECTIONS = {"reproduce": Reproduction}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A reproduction recipe and the recipes that it names, checked. Raises RecipeError."""
    recipe = load_recipe(path, overrides, sections=SECTIONS)
    steps(recipe.build("reproduce"))
    return recipe


def steps(section: Reproduction) -> list[Step]:
    """Every recipe that is named, in the order in which they run."""
    found = []
    for verb, (read, _) in VERBS.items():
        for path in getattr(section, verb):
            found.append(Step(verb, path, Path(read(path).values(verb)["output_dir"])))
    if not found:
        raise RecipeError("section 'reproduce' names no recipe: nothing would be measured.")
    return found


def reproduce(scale: str, overrides: Sequence[str] = (), run: bool = True) -> Path:
    """Run or reuse what a scale names and write the report.

    Args:
        scale: quick, cpu or paper: the name of a recipe in configs/reproduce.
        overrides: `reproduce.key=value`, applied over it.
        run: False: report what is there.

    Returns:
        The folder with README.md, report.html, results.json and the figures.

    Raises:
        RecipeError: no such recipe here, an unknown key or a value of the wrong type.
        ValueError: `run` is False and there are no results; or, after the report is written, a step has failed.
    """
    path = FOLDER / f"{scale}.yaml"
    if not path.exists():
        raise RecipeError(f"{path} is not here: go to the folder of the repository first, where configs/ lies.")
    recipe = read_recipe(path, overrides)
    section: Reproduction = recipe.build("reproduce")
    began = Run("reproduce", recipe.raw, Path(section.output_dir))
    done = steps(section)
    if run:
        problems = conversions(section.convert)
        for step in done:
            execute(step)
    else:
        problems = []
        for step in done:
            collect(step)
        if not any(step.content for step in done):
            folders = ", ".join(str(step.folder) for step in done)
            raise ValueError(f"there are no results in {folders}. Leave --no-run out to make them.")
    evidence: Evidence = {"depth": [depths()]}
    for step in done:
        if step.content:
            evidence.setdefault(step.verb, []).append(step.content)
    page = began.content(0, "cpu", "see each part", scale=scale, depth=evidence["depth"][0])
    table = write_report(began.folder, page, done, evidence)
    began.tell(table, "Report, figures", "report.html")
    problems += [f"{step.verb} {step.recipe}: {step.status}" for step in done if step.status.startswith("failed")]
    if problems:
        raise ValueError(f"{len(problems)} steps failed, and the report says so: {'; '.join(problems)}")
    return began.folder


def conversions(wanted: Sequence[Conversion]) -> list[str]:
    """Convert what is not there yet; the failures, in words: what needs the model fails after it, by its own words."""
    problems = []
    for one in wanted:
        if (Path(one.output) / RESULTS_FILE).exists():
            continue
        print(f"\n== convert {one.source}: K = {one.projected_length}", flush=True)
        try:
            convert(one.source, one.output, projected_length=one.projected_length, calibrate=one.calibrate)
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            problems.append(f"convert {one.source}: {error}")
    return problems


def collect(step: Step) -> None:
    """Take a step's results from its folder. Raises a ValueError if they are of another recipe, or no JSON."""
    path = step.folder / RESULTS_FILE
    if not path.exists():
        step.status = "not run"
        return
    content = read_json(path, f"Delete {step.folder}, and it is made again.", ("recipe",))
    read, _ = VERBS[step.verb]
    if not same_recipe(content["recipe"], read(step.recipe).raw):
        raise ValueError(
            f"{step.folder} holds results of another recipe than {step.recipe}: delete it or move it away."
        )
    step.content, step.status = content, "reused"


def execute(step: Step) -> None:
    """Run a step, or reuse it; a failure is kept in its status, and the others go on."""
    started = time.time()
    try:
        collect(step)
        if step.content is None or step.verb in GO_ON:
            print(f"\n== {step.verb} {step.recipe}", flush=True)
            step.status = "run"
            VERBS[step.verb][1](step.recipe)
            collect(step)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        reason = " ".join(str(error).split())
        try:
            collect(step)  # a sweep of which some cells failed has results
        except ValueError:
            step.content = None
        step.status = f"failed: {reason}"
    step.seconds = time.time() - started


def depths() -> dict[str, dict[str, int]]:
    """Longest chain of operations of one layer at every N of LENGTHS: ours with K = N / 4, and BERT's; both eager."""
    found: dict[str, dict[str, int]] = {"linformer": {}, "full attention": {}}
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for n in LENGTHS:
        shared = {**sizes, "intermediate_size": 32, "max_position_embeddings": n, "attn_implementation": "eager"}
        ours = LinformerModel(LinformerConfig(**shared, projected_length=n // 4), add_pooling_layer=False)
        bert = BertModel(BertConfig(**shared), add_pooling_layer=False)
        for name, model in (("linformer", ours), ("full attention", bert)):
            found[name][str(n)] = longest_chain(model.eval(), torch.zeros(1, n, dtype=torch.long))
    return found
