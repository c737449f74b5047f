"""What the page shows, by stand-ins for the model: every number of it is known before."""

import math
from types import SimpleNamespace

import pytest
import torch
from reference import tiny_model

from linformer_hf import LinformerConfig, LinformerForSequenceClassification
from linformer_hf.app import views
from linformer_hf.app.views import Subject
from linformer_hf.utils.timing import Samples


class Answering:
    """A model that gives these logits for every input."""

    def __init__(self, logits: list[float], **config):
        self.logits = torch.tensor([logits])
        self.config = LinformerConfig(max_position_embeddings=64, projected_length=8, **config)
        self.base_model = self

    def __call__(self, *_, **__):
        return SimpleNamespace(logits=self.logits)


def test_each_kind_of_classifier_gives_its_own_numbers(tokenizers):
    def shown(logits, **config):
        subject = Subject(Answering(logits, **config), tokenizers["wordpiece"])
        return views.classify(subject, "A river.")[0]

    names = {"id2label": {0: "calm", 1: "wild"}}
    odds = math.log(3)
    assert shown([0.0, odds], **names) == pytest.approx({"calm": 0.25, "wild": 0.75})
    several = {"problem_type": "multi_label_classification", **names}
    assert shown([0.0, odds], **several) == pytest.approx({"calm": 0.5, "wild": 0.75})
    assert shown([-3.5], num_labels=1) == {"LABEL_0": -3.5}  # a regression's number


def test_what_was_read_is_said_from_the_last_token_on(tokenizers):
    subject = Subject(Answering([0.0]), tokenizers["wordpiece"])
    assert subject.cut(64) == "All 64 tokens were read."
    assert subject.cut(1065) == "The first 64 of 1,065 tokens were read: N = 64."
    inputs, whole = subject.encode("river " * 1063)
    assert (inputs["input_ids"].shape, whole) == ((1, 64), 1065)


def test_speed_is_measured_at_powers_of_two_and_at_the_end_and_of_the_source_where_it_reads(tokenizers, monkeypatch):
    seconds = {"ours": 0.25, "source": 0.5}

    def interleave(cases, samples):
        assert samples == views.SAMPLES
        return {name: Samples([seconds[name]], [9.0], [False]) for name in cases}

    monkeypatch.setattr(views, "interleave", interleave)
    model = Answering([0.0])
    model.config.max_position_embeddings = 300
    source = SimpleNamespace(reference=model, length=128, name="the source")
    figure, rows = views.speed(Subject(model, tokenizers["wordpiece"], source), "A river.")
    assert rows == [(64, 250, 500), (128, 250, 500), (256, 250, None), (300, 250, None)]
    ours, theirs = figure.axes[0].lines
    assert (list(ours.get_xdata()), list(theirs.get_xdata())) == ([64, 128, 256, 300], [64, 128])
    assert theirs.get_label() == "the source"


def test_a_head_that_is_not_there_is_refused_and_the_model_is_as_before(tokenizers):
    model = tiny_model(LinformerForSequenceClassification, vocab_size=len(tokenizers["wordpiece"]))
    before = model.config._attn_implementation
    heads = model.config.num_attention_heads
    assert before != "eager"
    for layer, head in ((0, heads), (0, -1), (-1, 0)):
        with pytest.raises(ValueError, match=rf"There are layers 0 to \d+ and heads 0 to {heads - 1}\."):
            views.attention(Subject(model, tokenizers["wordpiece"]), "A river.", layer, head)
    assert model.config._attn_implementation == before
