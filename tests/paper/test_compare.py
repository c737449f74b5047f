"""`linformer-hf compare`: cells, the choice of the learning rate, the table, and going on."""

import json
import re
import shutil

import pytest

from linformer_hf import cli
from linformer_hf.paper import compare as verb
from linformer_hf.paper import grid as cells
from linformer_hf.paper.compare import Comparison, read_recipe, render, task_of
from linformer_hf.training.finetune import read_recipe as read_finetune
from linformer_hf.utils.recipe import RecipeError


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_source):
    """Two sources, fine-tuning and comparison recipes."""
    folder = tmp_path_factory.mktemp("compare")
    lines = [f"{'river' if i % 2 else 'stone'} number {i},{'water' if i % 2 else 'rock'}" for i in range(40)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    source = tiny_source()
    content = {
        "model": {"checkpoint": str(source)},
        "data": {"task": "files", "train_file": str(folder / "rows.csv"), "validation_fraction": 0.2},
        "training": {
            "output_dir": str(folder / "own"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "use_cpu": True,
            "learning_rate": 0.001,
        },
    }
    (folder / "task.yaml").write_text(json.dumps(content), encoding="utf-8")
    comparison = {
        "compare": {
            "output_dir": str(folder / "out"),
            "checkpoints": {"source": str(source), "K = 8": str(tiny_source(hidden_act="relu"))},
            "recipes": {str(folder / "task.yaml"): ["training.disable_tqdm=true"]},
            "overrides": {"K = 8": ["data.max_length=6", "data.stride=1"]},
            "seeds": [3, 4],
            "learning_rates": [0.0, 0.01],
            "jobs": 2,  # which are forked; test_sweep.py starts them one by one, which takes seconds for each
        }
    }
    (folder / "r.yaml").write_text(json.dumps(comparison), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ran(place):
    return verb.compare(place / "r.yaml")


def test_every_cell_is_a_run_with_its_seed_and_the_chosen_rate(ran):
    content = json.loads((ran / "results.json").read_text(encoding="utf-8"))
    runs = content["tasks"]["files"]
    assert list(runs) == ["source", "K = 8"]
    for name, checkpoint in runs.items():
        tried = checkpoint["validation_by_learning_rate"]
        assert set(tried) == {"0.0", "0.01"}
        assert tried[str(checkpoint["learning_rate"])] == max(tried.values())
        assert list(checkpoint["seeds"]) == ["3", "4"]
        for seed, results in checkpoint["seeds"].items():
            rate = f"lr-{checkpoint['learning_rate']:g}"
            cell = ran / "files" / cells.folder_name(name) / rate / f"seed-{seed}" / "results.json"
            own = json.loads(cell.read_text(encoding="utf-8"))
            assert own["metrics"] == results["metrics"]
            assert own["recipe"]["training"]["seed"] == int(seed)
            assert own["recipe"]["model"]["checkpoint"] == checkpoint["checkpoint"]
            assert ("test_pieces" in own["data"]) == (own["recipe"]["data"].get("stride") == 1) == (name == "K = 8")
    table = (ran / "table.md").read_text(encoding="utf-8")
    assert "| source |" in table
    assert "| K = 8 |" in table
    assert "majority" in table


def test_of_equally_good_rates_the_first_is_chosen_whichever_run_ends_first(place, tmp_path, monkeypatch):
    def backwards(made, jobs, title):
        yield from ((number, {"metrics": {"validation_accuracy": 0.5}}) for number in reversed(range(len(made))))

    monkeypatch.setattr(verb, "run_all", backwards)
    section, path = read_recipe(place / "r.yaml").build("compare"), str(place / "task.yaml")
    found, best = verb.try_rates(section, path, tmp_path)
    assert [list(tried) for tried in found.values()] == [[0.0, 0.01]] * 2
    assert best is max


def test_of_errors_the_lowest_is_chosen(place, tmp_path, monkeypatch):
    def run_all(made, jobs, title):
        yield from ((number, {"metrics": {"validation_mse": 1.0 + number}}) for number in range(len(made)))

    monkeypatch.setattr(verb, "run_all", run_all)
    found, best = verb.try_rates(read_recipe(place / "r.yaml").build("compare"), str(place / "task.yaml"), tmp_path)
    (tried, _) = found.values()
    assert best(tried, key=tried.get) == 0.0


def test_finished_cells_are_not_run_again_and_unfinished_ones_are(ran, place, monkeypatch):
    called = []
    monkeypatch.setattr(cells.Children, "wait_for", lambda self, start: called.append(start))
    before = (ran / "results.json").read_bytes()
    verb.compare(place / "r.yaml")
    assert not called
    assert (ran / "results.json").read_bytes() == before


def test_an_unfinished_cell_without_a_checkpoint_is_begun_anew(ran, place, monkeypatch):
    cell = ran / "files" / "source" / "lr-0.01" / "seed-3"
    kept = (cell / "results.json").read_bytes()
    (cell / "results.json").unlink()
    (cell / "left over").touch()
    (checkpoint,) = cell.glob("checkpoint-*")
    shutil.rmtree(checkpoint)

    monkeypatch.setattr(cells.Children, "wait_for", lambda self, start: 1)
    with pytest.raises(ValueError, match=r"2 cells failed: files, source \(seed 3\), files, source"):
        verb.compare(place / "r.yaml")
    assert not (cell / "left over").exists()
    table = (ran / "table.md").read_text(encoding="utf-8")
    assert "| source | failed (seed 3, 4) |" in table  # and nothing is averaged around it
    assert re.search(r"\| K = 8 \| [01]\.\d{4} ", table)
    content = json.loads((ran / "results.json").read_text(encoding="utf-8"))
    assert content["tasks"]["files"]["source"]["seeds"]["3"] == {"failed": True}
    cell.mkdir(parents=True, exist_ok=True)
    (cell / "results.json").write_bytes(kept)


def test_an_interrupted_cell_goes_on_from_its_checkpoint(place, tmp_path, monkeypatch):
    changes = [f"compare.output_dir={tmp_path}", "compare.seeds=[3]", "compare.learning_rates=[]"]
    saving = "[training.disable_tqdm=true, training.save_strategy=steps, training.save_steps=1]"
    changes.append(f"compare.recipes={{{place / 'task.yaml'}: {saving}}}")
    begun = []
    start = cells.Cell.start

    def noted(self, threads, children, resume=False):
        begun.append((self.folder, resume))
        return start(self, threads, children, resume)

    monkeypatch.setattr(cells.Cell, "start", noted)
    verb.compare(place / "r.yaml", changes)
    once = (tmp_path / "results.json").read_bytes()
    assert {resume for _, resume in begun} == {False}
    (folder, _), (other, _) = begun
    begun.clear()
    for cell in (folder, other):
        (cell / "results.json").unlink()
        shutil.rmtree(cell / "checkpoint-2")
    (other / "checkpoint-1" / "model.safetensors").unlink()  # nothing to go on from
    verb.compare(place / "r.yaml", changes)
    assert dict(begun) == {folder: True, other: False}
    log = folder.with_name(f"{folder.name}.log").read_text(encoding="utf-8")
    assert "Resuming from" in log
    before, after = (
        {name: cell["seeds"]["3"]["metrics"] for name, cell in json.loads(content)["tasks"]["files"].items()}
        for content in (once, (tmp_path / "results.json").read_bytes())
    )
    assert after == before

    own = [*saving.strip("[]").split(", "), "training.seed=3"]
    for change, same in ((), True), (("training.max_steps=3",), False):
        cell = cells.Cell("finetune", read_finetune, str(place / "task.yaml"), folder, [*own, *change])
        assert cell.can_go_on() is same


def test_a_cell_of_another_recipe_is_refused(ran, place, capsys):
    changed = "compare.recipes={" + json.dumps(str(place / "task.yaml")) + ": [training.max_steps=3]}"
    assert cli.main(["compare", str(place / "r.yaml"), changed]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": []}, "seeds is empty"),
        ({"checkpoints": {}}, "checkpoints is empty"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"checkpoints": {"a b": "x", "a-b": "y"}}, "must differ in their letters and digits"),
        ({"checkpoints": {"..": "x"}}, "must differ"),
    ],
)
def test_bad_sections_are_refused(change, words):
    fields = {"output_dir": "out", "checkpoints": {"one": "x"}, "recipes": {"r.yaml": []}, **change}
    with pytest.raises(ValueError, match=words):
        Comparison(**fields)


def test_a_checkpoint_that_is_not_there_is_one_error_before_any_run(place, tmp_path):
    gone, output = tmp_path / "gone" / "seed-0", tmp_path / "out"
    changes = [f"compare.checkpoints={{source: {gone}}}", f"compare.output_dir={output}", "compare.overrides={}"]
    with pytest.raises(FileNotFoundError, match=f"no folder '{gone}', and a Hub name has the form owner/name"):
        verb.compare(place / "r.yaml", changes)
    assert not output.exists()


def test_a_recipe_that_is_missing_or_given_for_the_same_task_is_refused(place, tmp_path):
    path = tmp_path / "r.yaml"
    section = {"output_dir": "out", "checkpoints": {"one": "x"}, "recipes": {str(tmp_path / "none.yaml"): []}}
    path.write_text(json.dumps({"compare": section}), encoding="utf-8")
    with pytest.raises(RecipeError, match="no such recipe file"):
        read_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_bytes((place / "task.yaml").read_bytes())
    section["recipes"] = {str(place / "task.yaml"): [], str(copy): []}
    path.write_text(json.dumps({"compare": section}), encoding="utf-8")
    with pytest.raises(RecipeError, match="two recipes are for the same task"):
        read_recipe(path)


def test_data_sets_of_the_hub_are_tasks_by_their_names(place):
    def title(*changes: str) -> str:
        recipe = str(place / "task.yaml")
        return task_of(recipe, ["data.task=hub", "data.train_file=null", *changes])

    assert title("data.repository=acme/reviews") == "acme/reviews"
    assert title("data.repository=acme/reviews", "data.configuration=films") == "acme/reviews films"


def test_the_table_compares_means_with_the_first_checkpoint():
    def run(accuracy):
        return {
            "metrics": {"test_accuracy": accuracy, "test_rows": 10, "validation_accuracy": 0.0},
            "baselines": {"majority": 0.5},
            "steps": 7,
            "dtype": "float32",
            "train_seconds": 1.0,
            "peak_memory_mib": 2.0,
        }

    one = {"seeds": {"0": run(0.8), "1": run(0.9)}}
    two = {"seeds": {"0": run(0.7), "1": run(0.8)}}
    text = render({"task": {"one": one, "two": two}})
    assert "0.8500 (0.8000 to 0.9000)" in text
    assert "| two | 0.7500 (0.7000 to 0.8000) | -10.0 | 7 |" in text
    assert "task: 10 test rows, float32" in text
    assert "Table 2" not in text  # its numbers belong beside the paper's tasks only
    text = render({"sst2": {"one": one}, "task": {"one": one}})
    assert "| N | model | sst2 |" in text
    assert "| 512 | RoBERTa-base | 93.1 |" in text


def test_an_error_has_no_points_and_steps_are_those_of_each_checkpoint():
    def runs(error, steps):
        metrics = {"test_mse": error, "test_rows": 10}
        facts = {"baselines": {}, "dtype": "float32", "train_seconds": 1.0, "peak_memory_mib": 2.0}
        return {"seeds": {"0": {"metrics": metrics, "steps": steps, **facts}}}

    text = render({"task": {"one": runs(0.4, 1000), "two": runs(0.5, 90)}})
    assert "points" not in text
    assert "| one | 0.4000 (0.4000 to 0.4000) |  | 1,000 |" in text
    assert "| two | 0.5000 (0.5000 to 0.5000) | +25.0 % | 90 |" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"K = 9": []}, "there is no checkpoint 'K = 9'; there are source, K = 8"),
        (
            {"source": ["data.seed=1"]},
            "'data.seed=1' would compare checkpoints on other rows.* data.max_length and data",
        ),
        ({"source": ["data={task: genre}"]}, "would compare checkpoints on other rows"),
        ({"source": ["training.max_step=1"]}, "max_step"),
        ({"source": ["training.seed=1"]}, "'training.seed=1' would have no effect, for seeds says training.seed"),
        ({"source": ["model.checkpoint=x"]}, "for checkpoints says model.checkpoint"),
        ({"source": [" data.max_train_rows=5"]}, "would compare checkpoints on other rows"),
    ],
)
def test_overrides_that_do_not_fit_are_refused_before_the_first_run(place, overrides, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(place / "r.yaml", [f"compare.overrides={json.dumps(overrides)}"])
