"""The classifier of a checkpoint against the classes of a task: kept, replaced or refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn

from linformer_hf.data.tasks import LoadedTask
from linformer_hf.training.finetune import FinetuneModel, load_model
from linformer_hf.utils.files import loading


# Class of the checkpoint -> its last layer; what stands before that is no classifier.
FAMILIES = {
    "LinformerForSequenceClassification": "classifier",
    "BertForSequenceClassification": "classifier",
    "RobertaForSequenceClassification": "classifier.out_proj",
    "DistilBertForSequenceClassification": "classifier",
    "ElectraForSequenceClassification": "classifier.out_proj",
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def task_of(*names: str) -> LoadedTask:
    rows = Dataset.from_dict({"text": list(names) * 2, "label": list(range(len(names))) * 2})
    return LoadedTask("t", rows, rows, rows, list(names) or None, (), kind="classification" if names else "regression")


@pytest.fixture(scope="module")
def checkpoint(tokenizers, tmp_path_factory):
    """(class, classes) -> folder of a random checkpoint."""
    import linformer_hf

    tokenizer = tokenizers["wordpiece"]

    def save(title: str, *names: str, **fields):
        architecture = getattr(linformer_hf, title, None) or getattr(transformers, title)
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16} if "Distil" in title else SIZES
        sizes = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
        sizes |= {"projected_length": 8} if "Linformer" in title else {}
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        folder = tmp_path_factory.mktemp("checkpoint")
        architecture(architecture.config_class(**sizes, **(labels if names else {}), **fields)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def load(folder: str, task: LoadedTask, **options) -> transformers.PreTrainedModel:
    with loading(folder):
        return load_model(FinetuneModel(folder, **options), task)[0]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def refused(folder: str, task: LoadedTask, **options) -> str:
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load(folder, task, **options)
    return str(error.value)


@pytest.mark.parametrize("title", FAMILIES)
def test_the_same_classes_keep_the_classifier_and_its_order(checkpoint, title, caplog):
    folder, task = checkpoint(title, "Spam", "ham", problem_type="multi_label_classification"), task_of("ham", "spam")
    with caplog.at_level(logging.WARNING, "linformer_hf"):
        model = load(folder, task)
    assert model.config.id2label == {0: "Spam", 1: "ham"}
    assert model.config.label2id == {"Spam": 0, "ham": 1}
    assert model.config.problem_type == "single_label_classification"
    assert list(task.train["label"]) == [1, 0] * 2
    assert all(torch.equal(value, weights(folder)[name]) for name, value in model.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize(("title", "last"), FAMILIES.items())
@pytest.mark.parametrize("options", [{}, {"new_classifier": True}])
def test_other_classes_replace_the_classifier_and_nothing_else(checkpoint, title, last, options, caplog):
    names = ("ham", "spam") if options else ("LABEL_0", "LABEL_1")
    folder, task = checkpoint(title, *names), task_of("ham", "spam")
    with caplog.at_level(logging.WARNING, "linformer_hf"):
        model = load(folder, task, **options)
    assert model.config.id2label == {0: "ham", 1: "spam"}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights(folder)[name])}
    assert changed == {f"{last}.weight"}
    assert 0.2 < model.get_submodule(last).weight.std() / model.config.initializer_range < 2
    known = ", ".join(names)
    assert [record.message for record in caplog.records] == [
        f"A new classifier replaces the checkpoint's: its classes are {known}, the task's ham, spam."
    ]


@pytest.mark.parametrize("title", FAMILIES)
@pytest.mark.parametrize("names", [("a", "b"), ()])
def test_another_number_of_classes_is_an_error_with_a_way_out(checkpoint, title, names):
    folder = checkpoint(title, "for", "against", "neither")
    ours = f"{len(names)} ({', '.join(names)})" if names else "1 (a number)"
    message = refused(folder, task_of(*names))
    assert message.startswith(f"the checkpoint {folder!r} cannot be loaded: its classifier is for 3 classes (for, ")
    assert f"the task has {ours}. Set model.new_classifier=true" in message
    model = load(folder, task_of(*names), new_classifier=True)
    assert model.num_labels == model.config.num_labels == (len(names) or 1)
    body = {name: value for name, value in weights(folder).items() if name.startswith(model.base_model_prefix)}
    assert body
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in body.items())
    encoded = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.zeros(1, dtype=torch.long if names else None)}
    assert model(**encoded).logits.shape == (1, len(names) or 1)


def test_a_regression_goes_on_from_one(checkpoint, caplog):
    folder = checkpoint("LinformerForSequenceClassification", "score")
    model = load(folder, task_of())
    assert model.config.problem_type == "regression"
    assert all(torch.equal(value, weights(folder)[name]) for name, value in model.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize("title", ["LinformerForMaskedLM", "LinformerModel", "BertModel"])
@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c"), ()])
def test_an_encoder_without_a_classifier_takes_any_classes(checkpoint, title, names, caplog):
    model = load(checkpoint(title), task_of(*names))
    assert model.num_labels == (len(names) or 1)
    assert not [record for record in caplog.records if record.name.startswith("linformer_hf")]


def test_weights_of_another_shape_than_the_classifier_are_no_new_classifier(checkpoint):
    folder = checkpoint("LinformerForSequenceClassification", "a", "b")
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 24}), encoding="utf-8")
    message = refused(folder, task_of("a", "b", "c"), new_classifier=True)
    assert "weights have another shape than its configuration says: linformer.encoder.layer.0" in message


def test_a_token_classifier_begins_anew(checkpoint, caplog):
    """Its head has the same name; nothing says that its classes are those of whole texts."""
    folder = checkpoint("BertForTokenClassification", "O", "B")
    assert isinstance(load(folder, task_of("a", "b")).classifier, nn.Linear)
    assert "A new classifier replaces the checkpoint's" in caplog.text
