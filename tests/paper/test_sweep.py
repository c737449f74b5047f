"""`linformer-hf sweep`: cells, what is kept of them, failures that stay visible."""

import errno
import json

import pytest

from linformer_hf import cli
from linformer_hf.paper import grid as cells
from linformer_hf.paper import sweep as verb
from linformer_hf.paper.sweep import Sweep, read_recipe, render
from linformer_hf.utils.recipe import RecipeError


@pytest.fixture(scope="module")
def place(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("sweep")
    base = {
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "projected_length": 8,
        },
        "data": {
            "sources": [{"kind": "files", "path": str(texts)}],
            "vocab_size": 200,
            "validation_fraction": 0.3,
        },
        "training": {
            "output_dir": str(folder / "own"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
        },
    }
    (folder / "base.yaml").write_text(json.dumps(base), encoding="utf-8")
    section = {
        "output_dir": str(folder / "out"),
        "recipe": str(folder / "base.yaml"),
        "overrides": ["training.disable_tqdm=true"],
        "cells": {"K = 8": [], "K = 16": ["model.projected_length=16"]},
        "seeds": [5],
    }
    (folder / "r.yaml").write_text(json.dumps({"sweep": section}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ran(place):
    return verb.sweep(place / "r.yaml")


def test_cells_differ_in_their_overrides_only(ran):
    content = json.loads((ran / "results.json").read_text(encoding="utf-8"))
    recipes = {}
    for name, k in (("K = 8", 8), ("K = 16", 16)):
        own = json.loads((ran / cells.folder_name(name) / "seed-5" / "results.json").read_text(encoding="utf-8"))
        assert own["recipe"]["model"].pop("projected_length") == k
        assert own["recipe"]["training"].pop("output_dir").endswith("seed-5")
        recipes[name] = own["recipe"]
        run = content["cells"][name]["5"]
        assert run["metrics"] == own["metrics"]
        assert [point["step"] for point in run["curve"]] == [1, 2]
        assert run["curve"][0]["seconds"] == pytest.approx(own["train_seconds"] / 2)
    assert recipes["K = 8"] == recipes["K = 16"]
    assert "| K = 16 |" in (ran / "table.md").read_text(encoding="utf-8")
    for picture in (verb.STEPS_FILE, verb.SECONDS_FILE):
        assert (ran / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("processes", "workers", "said", "readers"), [(1, 0, None, 1), (2, 3, None, 6), (2, 0, 4, 4)])
def test_a_cell_says_the_readers_of_a_stream(place, processes, workers, said, readers):
    """Else its run would count them and write another recipe than the cell has."""
    stream = [
        "data.streaming=true",
        "data.validation_fraction=0.05",
        "data.validation_documents=2",
        "data.vocab_size=512",
    ]
    stream += [
        "data.tokenizer=one",
        f"training.dataloader_num_workers={workers}",
        *([f"data.readers={said}"] if said else []),
    ]
    section = Sweep("out", str(place / "base.yaml"), {"a": stream}, processes=processes)
    cell = section.cell("a", 0)
    assert cell.read(cell.recipe, cell.overrides).values("data")["readers"] == readers
    section = Sweep("out", str(place / "base.yaml"), {"a": []}, processes=processes)
    assert not any("readers" in change for change in section.cell("a", 0).overrides)


def test_a_streamed_sweep_knows_its_own_runs(place, tokenizers, tmp_path, monkeypatch):
    tokenizers["wordpiece"].save_pretrained(tmp_path / "tokenizer")
    data = {"sources": [{"kind": "files", "path": str(tmp_path / "t.jsonl")}], "streaming": True}
    data |= {"tokenizer": str(tmp_path / "tokenizer"), "validation_documents": 5}
    lines = [json.dumps({"text": f"the river is {i} miles long and the stone is old. " * 4}) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = json.loads((place / "base.yaml").read_text(encoding="utf-8"))
    (tmp_path / "base.yaml").write_text(json.dumps({**base, "data": data}), encoding="utf-8")
    section = {"output_dir": str(tmp_path / "out"), "recipe": str(tmp_path / "base.yaml"), "cells": {"a": []}}
    (tmp_path / "r.yaml").write_text(json.dumps({"sweep": {**section, "seeds": [0], "jobs": 2}}), encoding="utf-8")
    verb.sweep(tmp_path / "r.yaml")
    before = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr(cells.Cell, "start", lambda *_, **__: pytest.fail("a finished cell was run again"))
    verb.sweep(tmp_path / "r.yaml")
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_cells_are_run_at_every_scale_and_compared_there(place, tmp_path, monkeypatch):
    asked, failing = [], []

    def run_all(made, *_):
        for number, cell in enumerate(made):
            folder = cell.folder.relative_to(tmp_path).parent.name
            asked.append((folder, [change for change in cell.overrides if change.startswith("model.")]))
            perplexity = {"K-8-wide": 10.0, "K-16-wide": 11.0, "K-8-deep": 20.0, "K-16-deep": 18.0}[folder]
            metrics = {"validation_perplexity": perplexity, "perplexity_ratio": 2.0}
            history = [{"step": 1, "eval_loss": 1.0}]
            done = {"metrics": metrics, "history": history, "train_seconds": 1.0, "wall_seconds": 2.0, "steps": 1}
            yield (
                number,
                None
                if (folder, cell.folder.name) in failing
                else {**done, "recipe": {"model": {}}, "tokens_per_second": 3.0},
            )

    monkeypatch.setattr(verb, "run_all", run_all)
    drawn = {}
    monkeypatch.setattr(verb, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    scales = {"wide": ["model.hidden_size=32"], "deep": ["model.num_hidden_layers=2"]}
    ran = verb.sweep(place / "r.yaml", [f"sweep.output_dir={tmp_path}", f"sweep.scales={json.dumps(scales)}"])
    assert asked == [
        ("K-8-wide", ["model.hidden_size=32"]),
        ("K-16-wide", ["model.hidden_size=32", "model.projected_length=16"]),
        ("K-8-deep", ["model.num_hidden_layers=2"]),
        ("K-16-deep", ["model.num_hidden_layers=2", "model.projected_length=16"]),
    ]
    table = (ran / "table.md").read_text(encoding="utf-8")
    assert ("| over K = 8, wide |" in table, "| over K = 8, deep |" in table) == (True, True)
    assert "| K = 16, wide | 11.00 (11.00 to 11.00) | +10.0 % |" in table
    assert "| K = 16, deep | 18.00 (18.00 to 18.00) | -10.0 % |" in table
    (axes,) = drawn[verb.SCALES_FILE].axes
    assert [list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())] == [[0, 1], pytest.approx([10, -10])]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["wide", "deep"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["K = 16"]
    # No mean is taken around a seed that failed, in the plot neither.
    failing += [("K-16-wide", "seed-6")]
    changes = [f"sweep.output_dir={tmp_path}", f"sweep.scales={json.dumps(scales)}", "sweep.seeds=[5, 6]"]
    with pytest.raises(ValueError, match=r"1 cells failed: K = 16, wide \(seed 6\)"):
        verb.sweep(place / "r.yaml", changes)
    (axes,) = drawn[verb.SCALES_FILE].axes
    assert list(axes.lines[0].get_xdata()) == [1]


def test_a_scale_that_is_wrong_is_refused_before_the_first_run(place):
    for scales, wanted in (({"wide": ["model.hiden_size=32"]}, "hiden_size"), ({"a b": [], "a-b": []}, "must differ")):
        with pytest.raises(RecipeError, match=wanted):
            read_recipe(place / "r.yaml", [f"sweep.scales={json.dumps(scales)}"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("sweep.overrides=[training.seed=9]", "'training.seed=9' would have no effect, for seeds says training.seed"),
        ("sweep.cells={a: [' training.output_dir=x']}", "for output_dir says training.output_dir"),
        ("sweep.cells={a: [' training.seed=9']}", "for seeds says training.seed"),
    ],
)
def test_what_would_be_overwritten_is_refused(place, change, reason):
    with pytest.raises(RecipeError, match=reason):
        read_recipe(place / "r.yaml", [change])


def test_what_every_cell_says_cannot_be_a_scale(place):
    scales = "sweep.scales={s: [model.hidden_size=32]}"
    with pytest.raises(RecipeError, match=r"for each cell says model\.hidden_size"):
        read_recipe(place / "r.yaml", ["sweep.cells={a: [model.hidden_size=48], b: [model.hidden_size=16]}", scales])
    read_recipe(place / "r.yaml", ["sweep.cells={a: [model.hidden_size=48], b: []}", scales])


def test_a_start_has_one_shape_and_scales_have_several(place):
    with pytest.raises(RecipeError, match="scales change the model's shape, which start has once"):
        read_recipe(place / "r.yaml", [f"sweep.start={place / 'base.yaml'}", "sweep.scales={wide: []}"])


def test_seeds_stand_in_the_recipes_order_whichever_run_ends_first(ran, place, tmp_path, monkeypatch):
    done = json.loads((ran / "K-8" / "seed-5" / "results.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(verb, "run_all", lambda made, *_: [(number, done) for number in reversed(range(len(made)))])
    verb.sweep(place / "r.yaml", ["sweep.seeds=[5, 6, 7]", f"sweep.output_dir={tmp_path / 'out'}"])
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [list(seeds) for seeds in content["cells"].values()] == [["5", "6", "7"]] * 2


def test_finished_cells_are_not_run_again(ran, place, monkeypatch):
    monkeypatch.setattr(cells.Children, "call", lambda self, command, env: pytest.fail("a finished cell was run again"))
    before = (ran / "results.json").read_bytes()
    verb.sweep(place / "r.yaml")
    assert (ran / "results.json").read_bytes() == before


def test_a_failed_cell_is_shown_and_named_after_the_others_have_run(ran, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells.Children, "call", lambda self, command, env: 1)
    overrides = ["sweep.seeds=[5, 6]"]
    assert cli.main(["sweep", str(place / "r.yaml"), *overrides]) == 2
    printed = capsys.readouterr()
    assert "2 cells failed: K = 8 (seed 6), K = 16 (seed 6)" in printed.err
    table = (ran / "table.md").read_text(encoding="utf-8")
    assert table.count("failed (seed 6)") == 2
    content = json.loads((ran / "results.json").read_text(encoding="utf-8"))
    assert content["cells"]["K = 8"]["6"] == {"failed": True}
    assert "metrics" in content["cells"]["K = 8"]["5"]


def test_a_full_disk_costs_no_finished_cell(ran, place, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(cells.Cell, "start", lambda *given: pytest.fail("a finished cell was run again"))
    before = (ran / "results.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(verb, "write_text", full)
        assert cli.main(["sweep", str(place / "r.yaml")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (ran / "results.json").read_bytes() == before
    verb.sweep(place / "r.yaml")


def test_cells_go_on_from_a_common_start_of_their_seed_and_n(place, texts, tmp_path):
    start = json.loads((place / "base.yaml").read_text(encoding="utf-8"))
    start["data"]["sequence_length"] = 16
    (tmp_path / "start.yaml").write_text(json.dumps(start), encoding="utf-8")
    overrides = [
        f"sweep.output_dir={tmp_path / 'out'}",
        f"sweep.start={tmp_path / 'start.yaml'}",
        "sweep.jobs=2",
        "sweep.cells={a: [], b: [model.max_position_embeddings=16]}",
    ]
    folder = verb.sweep(place / "r.yaml", overrides)
    for name, n in (("a", 32), ("b", 16)):
        own = json.loads((folder / name / "seed-5" / "results.json").read_text(encoding="utf-8"))
        begun = folder / "start" / f"n-{n}" / "seed-5"
        assert own["recipe"]["model"]["checkpoint"] == str(begun)
        assert (folder / name / "seed-5.log").stat().st_size
        model = json.loads((begun / "results.json").read_text(encoding="utf-8"))["recipe"]["model"]
        assert (model["projection_type"], model["projected_length"], model["max_position_embeddings"]) == (
            "mean_pool",
            n,
            n,
        )
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["cells"]["b"]["5"]["model"] == {"max_position_embeddings": 16, "projected_length": 8}


def test_what_has_not_run_yet_is_no_failure():
    waiting = {"failed": True, "unfinished": True}
    text = render({"full": {"0": run_of(10.0), "1": waiting}, "K": {"0": {"failed": True}, "1": waiting}})
    assert "| full | not run yet (seed 1) |" in text
    assert "| K | failed (seed 0); not run yet (seed 1) |" in text


def run_of(perplexity: float) -> dict:
    metrics = {"validation_perplexity": perplexity, "perplexity_ratio": 2.0}
    return {"metrics": metrics, "train_seconds": 9.0, "wall_seconds": 10.0, "tokens_per_second": 5.0, "curve": []}


def test_the_table_compares_with_the_first_cell_and_takes_no_mean_around_a_failure():
    runs = {
        "full": {"0": run_of(10.0), "1": run_of(12.0)},
        "K": {"0": run_of(12.0), "1": run_of(12.1)},
        "bad": {"0": run_of(1.0), "1": {"failed": True}},
    }
    text = render(runs)
    assert "| full | 11.00 (10.00 to 12.00) |  |" in text
    assert "| K | 12.05 (12.00 to 12.10) | +9.5 % |" in text
    assert "| bad | failed (seed 1) |" in text
    assert "10.0%" in text  # of the time is outside training
    runs["full"]["0"] = {"failed": True}
    assert "+9.5 %" not in render(runs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cells": {}}, "cells is empty"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"cells": {"a b": [], "a-b": []}}, "must differ in their letters and digits"),
    ],
)
def test_bad_sections_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Sweep(**{"output_dir": "out", "recipe": "r.yaml", "cells": {"one": []}, **change})


def test_a_cell_that_cannot_be_is_refused_before_anything_runs(place):
    with pytest.raises(RecipeError, match="projected_lenght"):
        read_recipe(place / "r.yaml", ["sweep.cells={a: [model.projected_lenght=3]}"])


def test_a_sweep_without_evaluations_is_refused_before_anything_runs(place):
    without = ["sweep.cells={a: [], never: ['training.eval_strategy=\"no\"']}"]
    with pytest.raises(RecipeError, match=r"^the cell 'never' is never evaluated .* set training\.eval_strategy=steps"):
        read_recipe(place / "r.yaml", without)
