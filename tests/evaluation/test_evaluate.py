"""`evaluate` from end to end: a random source, a conversion of it, small tasks of known texts."""

import random
import shutil
from functools import partial

import pytest
import torch

from conftest import VOCABULARY
from helpers import error_line, results_of, tree, write_recipe
from linformer_hf import LinformerModel, cli
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.evaluation import evaluate as verb
from linformer_hf.evaluation import needles
from linformer_hf.evaluation.evaluate import measure, read_recipe
from linformer_hf.evaluation.methods import Method, PiecesAlone, read_source_methods
from linformer_hf.evaluation.tasks import Task, probe
from linformer_hf.evaluation.vectors import Store
from linformer_hf.utils.recipe import RecipeError


WORDS = VOCABULARY.split()


def search(documents, sizes) -> Task:
    draw = sizes.draw("search")
    texts = [" ".join(draw.choices(WORDS, k=90)) for _ in range(documents)]
    return Task("search-bible", "words", texts, [(" ".join(text.split()[40:60]), i) for i, text in enumerate(texts)])


def plays(documents, sizes) -> Task:
    draw = random.Random(0)
    texts = {
        kind: {f"{kind}{g}": [" ".join(draw.choices([*WORDS, kind], k=90)) for _ in range(3)] for g in range(3)}
        for kind in ("letter", "window")
    }
    return probe("probe-plays", "kinds", texts, documents, sizes)


SIZES = verb.Sizes


@pytest.fixture(scope="module", autouse=True)
def small_tasks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "TASKS", {"search-bible": search, "probe-plays": plays, "needle": needles.needle})
        patch.setattr(verb, "Sizes", partial(SIZES, shortest=5))
        patch.setattr(needles, "python_topics", lambda: [("topic", "the keeper walked over a river " * 90)])
        yield


@pytest.fixture(scope="module")
def folders(tiny_source, tmp_path_factory):
    """The source (N = 96) and its conversion (N = 192)."""
    place = tmp_path_factory.mktemp("converted")
    source = read_source(str(tiny_source(max_position_embeddings=96)))
    convert_model(source, 192, projected_length=96).save_pretrained(place)
    source.tokenizer.model_max_length = 192
    source.tokenizer.save_pretrained(place)
    return source.name, str(place)


@pytest.fixture(scope="module")
def recipe(folders, tmp_path_factory):
    """Without output_dir."""
    source, converted = folders
    section = {
        "output_dir": "nowhere",
        "source": source,
        "models": {"converted": converted},
        "tasks": {"needle": 5, "probe-plays": 12, "search-bible": 6},
        "length": 192,
        "pieces": [32, 96],
        "needle_lengths": [96, 192],
        "fold_seeds": 2,
        "timed_documents": 1,
        "samples": 1,
    }
    return write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", evaluate=section)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return verb.evaluate(recipe, ["evaluate.full=true", f"evaluate.output_dir={folder}"])


def test_an_evaluation_writes_results_tables_and_a_picture(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"results.json", "long-documents.md", "differences.png", "vectors"}
    found, ways = results_of(finished), ["first", "pieces-32", "pieces-96", "full", "converted"]
    assert found["methods"] == ways
    assert [(task["task"], task["length"], task["documents"]) for task in found["tasks"]] == [
        *(("needle", 96, 5), ("needle", 192, 5), ("probe-plays", None, 12), ("search-bible", None, 6)),
    ]
    keys = ("task", "length", "view", "size", "metric", "method")
    scores = {tuple(row[key] for key in keys): row["value"] for row in found["scores"]}
    # Search and needles: one vector each way, 2 sizes of the source's pieces, 2 x 2 of late and blended ones, by two
    # measures.
    assert len(scores) == len(found["scores"]) == 3 * 2 * (5 + 2 + 4 + 4) + 5
    # A document of one piece, which one pass reads as it is alone: so is what lies between.
    late, between = (scores["needle", 96, view, 96, "first", "full"] for view in ("best piece", "best piece, blended"))
    assert late == between
    rivals = {(row["view"], row["size"]): row["rival"] for row in found["differences"] if row["view"] != "one vector"}
    assert rivals == {
        (view, size): f"pieces-{size}" for view in ("best piece", "best piece, blended") for size in (32, 96)
    }
    # Up to the source's own 96 tokens the conversion and full attention are the source.
    assert len({scores["needle", 96, "one vector", None, "first", name] for name in ways if name != "pieces-32"}) == 1
    assert {row["method"] for row in found["differences"]} == {"first", "full", "converted"}
    assert all(row["low"] <= row["difference"] <= row["high"] for row in found["mean_differences"])
    assert {row["method"] for row in found["over_lengths"]} == set(ways)
    assert [row["method"] for row in found["costs"]] == ways
    assert all(row["wall_s"] > 0 < row["peak_mib"] for row in found["costs"])
    assert found["packages"]["scikit-learn"]
    assert (finished / "differences.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_command_reads_nothing_again_and_gives_the_same(recipe, finished, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    before, vectors = results_of(copy), tree(copy / "vectors")
    (copy / "results.json").unlink()

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(Store, "_make", never)
    assert cli.main(["evaluate", recipe, "evaluate.full=true", f"evaluate.output_dir={copy}"]) == 0
    after = results_of(copy)
    for key in ("tasks", "scores", "differences", "mean_differences", "over_lengths"):
        assert after[key] == before[key]
    assert tree(copy / "vectors") == vectors
    told, table = capsys.readouterr().out.strip(), copy / "long-documents.md"
    assert told.splitlines()[-1] == f"Tables, plot and results.json: {table.resolve()}"
    assert table.read_text(encoding="utf-8").strip() in told


def test_a_further_model_costs_its_own_passes_only(recipe, folders, finished, tmp_path, monkeypatch):
    copy, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, copy)
    shutil.copytree(folders[1], other)
    model = LinformerModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight += 0.1
    model.save_pretrained(other)
    made, real = [], Store._make

    def make(self, path, method, *rest):
        made.append(method.name)
        real(self, path, method, *rest)

    monkeypatch.setattr(Store, "_make", make)
    verb.evaluate(recipe, [f"evaluate.models.adapted={other}", f"evaluate.output_dir={copy}"])
    assert set(made) == {"adapted"}
    assert results_of(copy)["methods"] == ["first", "pieces-32", "pieces-96", "converted", "adapted"]


class Perfect(Method):
    """Knows the answers: a document's vector and its query's are the same corner."""

    def __init__(self, name: str, answers: dict[str, int]):
        self.name, self.answers, self.facts, self.reads_queries = name, answers, {"name": name}, self

    def read(self, text):
        return {"whole": torch.eye(12)[self.answers[text]][None]}


def test_a_perfect_encoder_gets_all_and_what_reads_too_little_is_left_out(tmp_path):
    texts = [f"text {i}" for i in range(12)]
    searched = Task("needle", "", texts, [(f"query {i}", i) for i in range(12)], length=100)
    labels = [f"kind {i % 2}" for i in range(12)]
    probed = Task("probe-plays", "", texts, [], labels, [f"group {i // 2}" for i in range(12)])
    answers = {f"{what} {i}": i for i in range(12) for what in ("text", "query")}
    perfect, short = Perfect("perfect", answers), Perfect("short", answers)
    short.length = 99
    found = measure([searched], [perfect, short], Store(tmp_path), [0])
    assert {(one.method, one.score.mean) for one in found} == {("perfect", 1.0)}
    kinds = Perfect("kinds", {text: i % 2 for i, text in enumerate(texts)})
    (one,) = measure([probed], [kinds], Store(tmp_path), [0, 1])
    assert (one.metric, one.score.mean) == ("accuracy", 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.search-bibel=5", "unknown task 'search-bibel'. Valid: search-bible"),
        ("tasks.needle=1", "tasks.needle must be the number of its documents, 2 at least, got 1"),
        ("tasks={}", "tasks is empty"),
        ("samples=0", "samples must be at least 1"),
        ("pieces=[]", "pieces must be different numbers of tokens, 8 at least"),
        ("pieces=[32, 32]", "pieces must be different numbers"),
        ("needle_lengths=[32]", "needle_lengths must be different numbers of tokens, 64 at least"),
        ("models.first=x", "'first' cannot be the name of a model"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused(recipe, override, message):
    with pytest.raises(RecipeError) as refused:
        read_recipe(recipe, [f"evaluate.{override}"])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.converted=no/such/folder", "there is no folder 'no/such/folder'"),
        ("length=200", "reads 192 tokens, the documents have up to 200"),
        ("pieces=[97]", "pieces of 97 tokens are more than the source"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(recipe, tmp_path, capsys, override, message):
    changes = [f"evaluate.{override}", f"evaluate.output_dir={tmp_path}/run"]
    assert message in error_line(capsys, "evaluate", recipe, *changes)
    assert not (tmp_path / "run").exists()


def test_only_the_pieces_are_rivals(folders):
    _, methods = read_source_methods(folders[0], 192, [32], full=False)
    assert [isinstance(method, PiecesAlone) and not method.first for method in methods] == [False, True]
