"""Every recipe under configs/ is one that the verbs accept, and says on its first line how to run it."""

import re

import pytest
import yaml

from helpers import ONE_SECTION, ROOT, accept
from linformer_hf import cli


RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*/*.yaml"))
GPUS = 8  # the pretraining recipes for whole machines are written for this number
PAPER_SHAPES = [path for path in RECIPES if re.fullmatch(r"(base|large)-\d+-k\d+", path.stem)]


def test_every_verb_that_reads_recipes_has_one():
    assert {path.parent.name for path in RECIPES} == {*cli.RECIPE_VERBS, "reproduce"}


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_is_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # a comparison names recipes from there
    accept(path.parent.name, path, [], tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_first_line_is_a_command_that_names_the_file(path):
    verb = path.parent.name
    first = (ROOT / path).read_text(encoding="utf-8").splitlines()[0]
    if verb == "reproduce":  # the scale names the file
        assert first == f"# linformer-hf reproduce --scale {path.stem}"
        return
    command = rf"# (linformer-hf {verb}|torchrun --nproc_per_node {GPUS} scripts/{verb}\.py) {re.escape(str(path))}"
    assert re.fullmatch(rf"{command}( \S+=\S+)*", first), first


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_output_folder_is_the_recipes_own(path):
    recipe = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    section = path.parent.name if path.parent.name in ONE_SECTION else "training"
    assert recipe[section]["output_dir"] == f"runs/{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PAPER_SHAPES, ids=str)
def test_name_says_the_shape_and_every_update_holds_robertas_tokens(path):
    recipe = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    model, training = recipe["model"], recipe["training"]
    size, n, k = re.fullmatch(r"(\w+)-(\d+)-k(\d+)", path.stem).groups()
    assert (model["max_position_embeddings"], model["projected_length"]) == (int(n), int(k))
    assert model["num_hidden_layers"] == {"base": 12, "large": 24}[size]
    sequences = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * GPUS
    assert sequences * int(n) == 8192 * 512


def test_all_twelve_paper_shapes_are_there():
    shapes = {f"{size}-{n}-k{k}" for size in ("base", "large") for n in (512, 1024, 4096) for k in (128, 256)}
    assert {path.stem for path in PAPER_SHAPES} == shapes
