"""The kept model cards are what their results say, and the Hub's parser reads their metadata."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from linformer_hf.hub.card import metadata_of, model_card


FOLDER = Path(__file__).parents[2] / "model_cards"
KEPT = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_every_card_has_its_results():
    assert KEPT
    assert sorted(path.stem for path in FOLDER.glob("*.md") if path.name != "README.md") == KEPT


@pytest.mark.parametrize("name", KEPT)
def test_a_card_is_what_its_results_say(name):
    kept = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == model_card(**kept["card"])


@pytest.mark.parametrize("name", KEPT)
def test_it_names_no_folder_of_one_machine(name):
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8") + (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert not re.findall(r'["\s`(](/[a-z]+/[^\s"]*)', text)


@pytest.mark.parametrize("name", KEPT)
def test_the_hub_reads_its_metadata(name):
    kept = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    data = ModelCard.load(FOLDER / f"{name}.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == kept["card"]["pipeline_tag"]
    found = [(one.dataset_name, one.metric_type, one.metric_value) for one in data.eval_results or []]
    assert found == [(one["dataset"], one["metric"], one["value"]) for one in kept["card"].get("evaluated", [])]
    # No number of the metadata comes from elsewhere than the run's own metrics.
    values = {value for value in kept.get("metrics", {}).values() if isinstance(value, float)}
    assert {value for _, _, value in found} <= values


def test_what_only_an_author_knows_comes_from_the_recipe():
    recipe = {"card": {"license": "apache-2.0", "language": ["en"], "datasets": []}}
    facts = {"title": "t", "summary": "s", "metrics": {}, "notes": "", "limits": "", "auto_class": "AutoModel"}
    card = model_card(**facts, pipeline_tag="fill-mask", **metadata_of(recipe))
    data = ModelCard(card).data
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], None)
    assert metadata_of({}) == {}
