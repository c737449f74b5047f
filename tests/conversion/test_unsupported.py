"""What cannot become a Linformer is refused by its configuration, with the reason and a source that can."""

import json

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from encoders import build
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.key_tables import FAMILIES
from linformer_hf.conversion.sources import ConversionError
from linformer_hf.conversion.unsupported import UNSUPPORTED


def refused(folder, *parts: str) -> None:
    with pytest.raises(ConversionError) as caught:
        read_source(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_each_is_told_why_and_what_to_take(kind, tmp_path):
    """Before transformers is asked, which may not know it: no code of the model's own is ever run."""
    auto_map = {"AutoConfig": "configuration.Config"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": auto_map}), encoding="utf-8")
    reason, nearest = UNSUPPORTED[kind]
    refused(tmp_path, repr(kind), reason, f"Take {nearest}.")


def test_each_is_a_kind_of_model_and_no_family():
    assert not UNSUPPORTED.keys() & FAMILIES.keys()
    later = {"eurobert", "nomic_bert", "gte", "jina_embeddings_v3"}  # than transformers 5.0
    assert {"new"} <= UNSUPPORTED.keys() - CONFIG_MAPPING_NAMES.keys() <= {"new", *later}


@pytest.mark.parametrize("kind", ["strange", "gpt2"])
def test_any_other_is_told_what_there_is(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    refused(tmp_path, repr(kind), *FAMILIES, "fairseq")


@pytest.mark.parametrize(("kind", "positions"), [("bert", "alibi"), ("xlm-roberta", "rotary")])
def test_other_positions_under_the_name_of_a_family(kind, positions, tmp_path):
    """As Jina's encoders, whose own code a reader without it would pass by."""
    config = transformers.AutoConfig.for_model(kind, position_embedding_type=positions).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(tmp_path, repr(positions), "Only absolute positions", "bge-m3")


@pytest.mark.parametrize(("field", "value"), [("use_bias", False), ("rescale_embeddings", True)])
def test_a_big_bird_with_other_embeddings_or_attention(field, value, tmp_path):
    build("big_bird", "ForMaskedLM", **{field: value}).save_pretrained(tmp_path)
    refused(tmp_path, f"{field}={value}", f"{not value} only")


def test_answers_of_a_big_bird_have_a_layer_of_their_own(tmp_path):
    build("big_bird", "ForQuestionAnswering").save_pretrained(tmp_path)
    refused(tmp_path, "BigBirdForQuestionAnswering", "BigBirdForMaskedLM")
