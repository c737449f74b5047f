"""What can be published names no home folder, and what reads such a record back still finds the place."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from helpers import MODULES
from linformer_hf import cli
from linformer_hf.app import app
from linformer_hf.paper.grid import Cell
from linformer_hf.utils.files import record
from linformer_hf.utils.places import from_home, own_name


# What `push` leaves out, and nothing that loads a model reads: Trainer's own state, which is needed to go on.
NOT_PUBLISHED = ("checkpoint-", "training_args.bin", "cache")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TRAINING = {"use_cpu": True, "report_to": "none", "max_steps": 1, "save_steps": 1, "disable_tqdm": True}


@pytest.fixture(scope="module")
def home(tiny_source, texts, tmp_path_factory):
    """A home folder with a source, texts and what every verb that is cheap has left there."""
    home = tmp_path_factory.mktemp("home") / "jane"
    source = Path(shutil.copytree(tiny_source("BertForMaskedLM"), home / "models" / "bert"))
    shutil.copytree(texts, home / "texts")
    lines = [f"the {'river' if i % 2 else 'stone'} {i},{'water' if i % 2 else 'rock'}\n" for i in range(40)]
    (home / "rows.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
    out = {name: str(home / "out" / name) for name in (*RECIPES, "convert", "tuned")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr(Cell, "start", lambda cell, *_, **__: cli.main(command(cell)))  # a process for each takes seconds
        corpus = ["--calibrate", str(home / "texts"), "--calibration-rows", "9"]
        assert cli.main(["convert", str(source), out["convert"], "--projected-length", "12", *corpus]) == 0
        for verb, sections in RECIPES.items():
            filled = yaml.safe_dump(sections).replace("HOME", str(home))
            (home / f"{verb}.yaml").write_text(filled, encoding="utf-8")
        for verb in RECIPES:
            assert cli.main([verb, str(home / f"{verb}.yaml")]) == 0
        assert cli.main(["export", out["convert"]]) == 0
        yield home


def command(cell: Cell) -> list[str]:
    return [cell.verb, cell.recipe, *cell.overrides, f"training.output_dir={cell.folder}"]


CORPUS = {"sources": [{"kind": "files", "path": "HOME/texts"}], "packing": "contiguous"}
MEASURED = {"model": "HOME/models/bert", "corpus": "HOME/texts", "rows": 2}
RECIPES = {
    "finetune": {
        "model": {"checkpoint": "HOME/out/convert"},
        "data": {"task": "files", "train_file": "HOME/rows.csv"},
        "training": {**TRAINING, "output_dir": "HOME/out/finetune"},
    },
    "pretrain": {
        "model": {**SIZES, "max_position_embeddings": 32, "projected_length": 8},
        "data": {**CORPUS, "vocab_size": 200, "cache_dir": "HOME/cache"},
        "training": {**TRAINING, "output_dir": "HOME/out/pretrain", "eval_strategy": "steps", "eval_steps": 1},
    },
    "distill": {
        "model": {"student": "HOME/out/convert", "teacher": "HOME/models/bert"},
        "distillation": {"validation_rows": 4},
        "data": CORPUS,
        "training": {**TRAINING, "output_dir": "HOME/out/distill"},
    },
    "spectrum": {"spectrum": {**MEASURED, "output_dir": "HOME/out/spectrum"}},
    "theory": {
        "theory": {**MEASURED, "output_dir": "HOME/out/theory", "lengths": [16], "projected_lengths": [8], "draws": 1}
    },
    "compare": {
        "compare": {
            "output_dir": "HOME/out/compare",
            "checkpoints": {"ours": "HOME/out/convert"},
            "recipes": {"HOME/finetune.yaml": ["training.weight_decay=0.1"]},
            "seeds": [1],
        }
    },
    "sweep": {
        "sweep": {
            "output_dir": "HOME/out/sweep",
            "recipe": "HOME/pretrain.yaml",
            "cells": {"K = 4": ["model.projected_length=4"]},
            "seeds": [1],
        }
    },
}


def test_no_file_that_a_verb_leaves_names_the_home_folder(home):
    left = [path for path in (home / "out").rglob("*") if path.is_file()]
    left = [path for path in left if not any(part in str(path) for part in NOT_PUBLISHED)]
    assert {path.parts[len(home.parts) + 1] for path in left} == {*RECIPES, "convert"}
    assert {"README.md", "fidelity.md", "results.json", "recipe.json", "model.onnx"} <= {path.name for path in left}
    assert [str(path) for path in left if str(home).encode() in path.read_bytes()] == []


def test_the_source_has_its_own_name_where_people_read_it_and_is_found_again(home):
    converted = home / "out" / "convert"
    assert json.loads((converted / "results.json").read_text())["source"] == "~/models/bert"
    for name in ("README.md", "fidelity.md"):
        assert "`bert`" in (converted / name).read_text(encoding="utf-8")
    assert app._noted_source(converted) == str(home / "models" / "bert")


def test_a_run_is_known_again_by_its_recipe(home, capsys, monkeypatch):
    """What is finished in a table is not run again, and an interrupted run of the same recipe goes on."""
    monkeypatch.setattr(Cell, "start", lambda *_, **__: pytest.fail("a finished cell was run again"))
    for verb in ("compare", "sweep"):
        assert cli.main([verb, str(home / f"{verb}.yaml")]) == 0
    run = home / "out" / "finetune"
    trained, finished = load_file(run / "model.safetensors"), (run / "results.json").read_bytes()
    (run / "results.json").unlink()
    assert cli.main(["finetune", str(home / "finetune.yaml"), "--resume"]) == 0
    assert all((load_file(run / "model.safetensors")[name] == weight).all() for name, weight in trained.items())
    (run / "results.json").unlink()
    other = ["--resume", f"data.train_file={home / 'else.csv'}"]
    assert cli.main(["finetune", str(home / "finetune.yaml"), *other]) == 2
    assert "'data' differs" in capsys.readouterr().err
    (run / "results.json").write_bytes(finished)


# Whose text is no record: tables of sums with names inside the folder, and a cache that is never published.
WRITERS = {"utils/files", "utils/checksums", "data/cache"}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in WRITERS])
def test_text_is_written_by_results_alone(module):
    """It is where the home folder's name is taken out, also for the verbs that no test here runs."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    called -= {"results.write_text", "Path('/proc/self/clear_refs').write_text"}
    assert not [name for name in called if name.endswith(".write_text")]
    assert "json.dump" not in called


@pytest.mark.parametrize(
    ("home", "text", "shown"),
    [
        ("/home/jane", "a=/home/jane/x, /home/jane, `/home/jane`. /home/jane.", "a=~/x, ~, `~`. ~."),
        ("/home/jane", "/home/jane2/x /home/jane.old /home/jane-2 /mnt/home/jane", None),
        (
            "/home/jane",
            {"/home/jane/k": ["/home/jane", 1, None, ("file:///home/jane/x",)]},
            {"~/k": ["~", 1, None, ["file://~/x"]]},
        ),
        ("/home/j(ne", "/home/j(ne/x", "~/x"),
        ("/", "/a/b", None),
        ("", "/a/b", None),
        ("jane", "jane/x", None),
    ],
)
def test_the_home_folder_is_a_tilde(home, text, shown, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert from_home(text) == (text if shown is None else shown)


def test_a_home_folder_that_is_a_link_is_known_by_both_names(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "jane").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    assert from_home(f"{tmp_path}/jane/x {tmp_path}/disk/x") == "~/x ~/x"
    assert record({"place": tmp_path / "disk" / "y"}) == {"place": "~/y"}


def test_own_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "bert").mkdir(parents=True)
    names = ["runs/bert", str(tmp_path / "runs" / "bert"), "/gone/bert", "acme/bert", "hub:acme/texts"]
    assert [own_name(name) for name in names] == ["bert", "bert", "bert", "acme/bert", "hub:acme/texts"]
