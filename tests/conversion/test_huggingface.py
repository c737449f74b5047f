"""A source as it was read: its head, its positions, its pooler, and what of it is said."""

import pytest
import torch
from transformers import AutoConfig

from encoders import KINDS, PADDING, N, build
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.key_tables import FAMILIES
from linformer_hf.conversion.sources import POSITIONS, ConversionError


@pytest.fixture
def saved(tokenizers, tmp_path):
    def save(kind: str, head: str = "Model", **fields):
        model = build(kind, head, **fields)
        model.save_pretrained(tmp_path)
        tokenizers[KINDS[kind]].save_pretrained(tmp_path)
        return model, str(tmp_path)

    return save


@pytest.mark.parametrize("kind", FAMILIES)
def test_n_is_the_number_of_positions_that_a_text_can_have(kind, saved):
    """RoBERTa and its kin count from the padding token's number + 1 on: the rows before are no positions."""
    model, folder = saved(kind)
    source = read_source(folder)
    unused = PADDING[kind] + 1 if FAMILIES[kind][0].padding_first else 0
    assert source.length == N
    task = model.embeddings.task_type_embeddings.weight[0] if kind == "ernie" else 0
    assert torch.equal(source.weights[POSITIONS], model.embeddings.position_embeddings.weight[unused:] + task)
    assert (source.name, source.architecture, source.head) == (folder, f"{FAMILIES[kind][1]}Model", "Model")
    assert not source.reference.training


@pytest.mark.parametrize(("head", "with_pooler"), [("Model", True), ("Model without pooler", False)])
def test_a_pooler_is_there_if_it_was_saved(head, with_pooler, saved):
    _, folder = saved("bert", head)
    source = read_source(folder)
    assert source.with_pooler == with_pooler
    assert (source.reference.pooler is not None) == with_pooler


def test_a_configuration_that_names_no_class_is_the_bare_encoders(saved):
    _, folder = saved("bert")
    config = AutoConfig.from_pretrained(folder)
    config.architectures = None
    config.save_pretrained(folder)
    assert read_source(folder).architecture == "BertModel"


def test_a_head_with_more_than_we_have_is_read_as_the_one_that_we_have(saved):
    _, folder = saved("bert", "ForPreTraining")
    source = read_source(folder)
    assert (source.architecture, source.head) == ("BertForMaskedLM", "ForMaskedLM")
    assert not [name for name in source.weights if "seq_relationship" in name]


def test_names_of_classes_are_kept_with_the_kind_of_problem(saved):
    names = {0: "calm", 1: "wild", 2: "odd"}
    numbers = {name: number for number, name in names.items()}
    _, folder = saved(
        "distilbert",
        "ForSequenceClassification",
        id2label=names,
        label2id=numbers,
        problem_type="multi_label_classification",
    )
    config = read_source(folder).config
    assert (config["id2label"], config["label2id"]) == (names, numbers)
    assert config["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("name", ["./nothing", "a/b/c"])
def test_what_can_be_no_name_of_the_hub_is_not_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it was asked for"))
    with pytest.raises(ConversionError, match=rf"no file or folder '{name}', and a Hub name has the form owner/name"):
        read_source(name)
