"""The parts of a pretraining that need no run: its configuration, its legs, its numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import MODEL, TRAINING, tiny_data, write_recipe
from linformer_hf import LinformerConfig
from linformer_hf.training.pretrain import (
    build_config,
    card,
    corpus_name,
    keep_predictions,
    masked_accuracy,
    places,
    plan,
    read_recipe,
    streamed,
    tokens_of_a_step,
)
from linformer_hf.training.run import last_evaluation
from linformer_hf.utils.recipe import RecipeError


def test_the_tokenizer_gives_vocabulary_and_special_tokens_and_the_recipe_goes_before_it(tokenizers):
    tokenizer = tokenizers["byte_level_bpe"]
    config = build_config(MODEL, tokenizer)
    assert config.vocab_size == len(tokenizer)
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == special
    assert build_config({**MODEL, "vocab_size": len(tokenizer) + 8}, tokenizer).vocab_size == len(tokenizer) + 8
    with pytest.raises(RecipeError, match=rf"vocab_size=9 is smaller than .* {len(tokenizer)} tokens; leave it out"):
        build_config({**MODEL, "vocab_size": 9}, tokenizer)


def test_the_card_says_what_the_keys_are():
    metrics = dict.fromkeys(("validation_perplexity", "unigram_perplexity", "validation_masked_accuracy"), 2.0)
    metrics |= dict.fromkeys(("unigram_masked_accuracy", "validation_masked_tokens"), 1)
    content = dict.fromkeys(("steps", "trained_tokens", "tokens_per_second", "wall_seconds", "peak_memory_mib"), 1000)

    def said(**changes) -> str:
        return card(
            {**content, "metrics": metrics, "recipe": {"data": {"sources": [{"kind": "demo"}]}}},
            LinformerConfig(**{**MODEL, **changes}),
            "t",
        )["summary"]

    assert "projection `linear`, sharing `layerwise`, K = 8), pretrained" in said()
    banded = said(projection_type="mean_pool", local_window=2)
    assert "projection `mean_pool`, K = 8, of which 6 are a band of single tokens), pretrained" in banded


def test_accuracy_counts_masked_tokens_only():
    labels = np.array([[5, -100, 7], [-100, 8, -100]])
    predictions = np.array([[5, 1, 2], [-100, 8, 3]])
    found = masked_accuracy(SimpleNamespace(label_ids=labels, predictions=predictions))
    assert found == {"masked_accuracy": pytest.approx(2 / 3), "masked_tokens": 3}
    none = masked_accuracy(SimpleNamespace(label_ids=np.full((1, 2), -100), predictions=predictions[:1, :2]))
    assert math.isnan(none["masked_accuracy"])
    assert none["masked_tokens"] == 0


def test_the_most_likely_token_is_kept_whether_or_not_other_outputs_come_with_the_logits():
    logits = torch.tensor([[[0.1, 3.0, 2.0], [5.0, 1.0, 1.0]]])
    assert keep_predictions(logits, None).tolist() == [[1, 0]]
    assert keep_predictions((logits, torch.ones(1)), None).tolist() == [[1, 0]]


def test_the_tokens_of_a_step_are_those_of_all_processes_and_accumulated_batches():
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=3, world_size=2)
    assert tokens_of_a_step(args, 32) == 4 * 3 * 2 * 32


@pytest.mark.parametrize(
    ("steps", "best", "found"),
    [((4, 8), False, 8), ((4,), False, None), ((), False, None), ((4, 8), True, None)],
)
def test_an_evaluation_is_taken_only_where_it_saw_the_final_weights(steps, best, found):
    history = [row for step in steps for row in ({"eval_loss": 2.0, "step": step}, {"loss": 1.0, "step": step + 1})]
    state = SimpleNamespace(log_history=history, global_step=8)
    row = last_evaluation(SimpleNamespace(args=SimpleNamespace(load_best_model_at_end=best), state=state))
    assert (row and row["step"]) == found


def test_a_corpus_is_called_what_its_sources_are():
    named = [{"kind": "hub", "name": "wiki"}, {"kind": "files", "path": "/data/books"}]
    assert corpus_name({"sources": named}) == "wiki + books"
    assert corpus_name({"sources": [{"kind": "demo"}]}) == "demo"


@pytest.fixture
def recipe(texts, tmp_path):
    """Two stages before the main run; a run's folder is not made by planning it."""
    stages = [{"sequence_length": 8, "training": {"max_steps": 2}}]
    stages.append({"sequence_length": 16, "training": {"learning_rate": 0.01, "eval_strategy": "steps"}})
    training = {**TRAINING, "output_dir": str(tmp_path / "run"), "max_steps": 6}
    data = tiny_data(texts, tmp_path)
    return read_recipe(write_recipe(tmp_path / "r.yaml", model=MODEL, data=data, training=training, stages=stages))


def test_stages_come_first_in_folders_of_their_own_and_evaluate_only_where_they_say_so(recipe, tmp_path):
    folder = tmp_path / "run"
    legs = plan(recipe, folder, 32)
    assert [leg.length for leg in legs] == [8, 16, 32]
    assert [leg.folder for leg in legs] == [folder / "stage-1", folder / "stage-2", folder]
    assert [leg.arguments.output_dir for leg in legs] == [str(leg.folder) for leg in legs]
    assert [leg.arguments.max_steps for leg in legs] == [2, 6, 6]
    assert [leg.arguments.learning_rate for leg in legs] == [0.001, 0.01, 0.001]
    assert [leg.arguments.eval_strategy.value for leg in legs] == ["no", "steps", "steps"]


def test_a_stage_of_longer_rows_than_the_main_run_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"stages\[1\].sequence_length=16 is longer than the main rows of 12"):
        plan(recipe, tmp_path / "run", 12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("auto_find_batch_size", {"auto_find_batch_size": True}),
        ("accelerator_config.dispatch_batches", {"dispatch_batches": True}),
        ("accelerator_config.split_batches", {"split_batches": True}),
    ],
)
def test_what_deals_out_a_stream_otherwise_is_refused_for_several_processes(name, change):
    settings = {key: change.get(key) for key in ("dispatch_batches", "split_batches")}
    arguments = SimpleNamespace(
        max_steps=3,
        world_size=2,
        process_index=1,
        train_batch_size=4,
        dataloader_num_workers=0,
        auto_find_batch_size="auto_find_batch_size" in change,
        accelerator_config=SimpleNamespace(**settings),
    )
    with pytest.raises(RecipeError, match=rf"training\.{name} does not go together with a stream.*to 2 processes"):
        streamed(None, None, arguments, 2)
    for key in ("dispatch_batches", "split_batches"):
        setattr(arguments.accelerator_config, key, None)
    arguments.auto_find_batch_size = False
    dealt = streamed(None, None, arguments, 4)
    assert (dealt.readers, dealt.process, dealt.processes, dealt.batch) == (4, 1, 2, 4)
    assert arguments.accelerator_config.dispatch_batches is False


def test_each_process_or_its_workers_need_a_reader(monkeypatch):
    assert [places(training) for training in ({}, {"dataloader_num_workers": 3})] == [1, 3]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [places(training) for training in ({"dataloader_num_workers": 0}, {"dataloader_num_workers": 3})] == [4, 12]
