"""Whole runs of a tiny model: what they leave, how they resume, what they refuse."""

import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_callback import DefaultFlowCallback

from helpers import (
    CODE,
    MODEL,
    TRAINING,
    N,
    assert_same_run,
    error_line,
    results_of,
    tiny_data,
    tree,
    weights_of,
    write_recipe,
)
from linformer_hf import LinformerForMaskedLM, LinformerForSequenceClassification, cli
from linformer_hf.data.corpus import prepare
from linformer_hf.data.masking import MaskedDataset, Masker
from linformer_hf.hub.card import model_card
from linformer_hf.training import callbacks
from linformer_hf.training.finetune import finetune
from linformer_hf.training.pretrain import pretrain, read_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretraining(texts, place) -> str:
    """A recipe: 6 steps on rows of 16, then 12 on rows of 32; its output_dir is for the test to name."""
    data = tiny_data(texts, place, seed=3)
    stages = [{"sequence_length": 16, "training": {"max_steps": 6}}]
    return write_recipe(
        place / "pretrain.yaml", model=MODEL, data=data, training={**TRAINING, "max_steps": 12}, stages=stages
    )


@pytest.fixture(scope="module")
def pretrained(pretraining, place) -> Path:
    return pretrain(pretraining, [f"training.output_dir={place / 'pretrained'}"])


@pytest.fixture(scope="module")
def finetuning(pretrained, place) -> str:
    """A recipe for a task that one word decides."""
    rows = [
        f"{'river' if i % 2 else 'stone'} number {i} of the garden,{'water' if i % 2 else 'rock'}" for i in range(80)
    ]
    tests = [row if i % 3 else row.replace("rock", "water") for i, row in enumerate(rows[:9])]  # two are wrong
    for name, lines in (("rows", rows), ("tests", tests)):
        (place / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return write_recipe(
        place / "finetune.yaml",
        model={"checkpoint": str(pretrained)},
        data={
            "task": "files",
            "train_file": str(place / "rows.csv"),
            "test_file": str(place / "tests.csv"),
            "validation_fraction": 0.1,
        },
        training={**TRAINING, "max_steps": 12},
    )


@pytest.fixture(scope="module")
def finetuned(finetuning, place) -> Path:
    return finetune(finetuning, [f"training.output_dir={place / 'finetuned'}"])


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(run, step, in_folder)` stops the run as Ctrl-C would, at the end of that step in that folder."""

    def until(run, step: int, folder: Path) -> None:
        whole = DefaultFlowCallback.on_step_end

        def on_step_end(self, args, state, control, **named):
            if state.global_step == step and Path(args.output_dir) == folder:
                raise KeyboardInterrupt
            return whole(self, args, state, control, **named)

        with monkeypatch.context() as patch:
            patch.setattr(DefaultFlowCallback, "on_step_end", on_step_end)
            with pytest.raises(KeyboardInterrupt):
                run()
        assert not (folder / "results.json").exists()

    return until


@pytest.fixture
def resumed(monkeypatch):
    """`resumed(verb, recipe, overrides, steps)` resumes and checks how many optimizer steps that took."""

    def run(verb, recipe: str, overrides: list[str], steps: int) -> Path:
        whole, taken = DefaultFlowCallback.on_step_end, []

        def on_step_end(self, args, state, control, **named):
            taken.append(state.global_step)
            return whole(self, args, state, control, **named)

        with monkeypatch.context() as patch:
            patch.setattr(DefaultFlowCallback, "on_step_end", on_step_end)
            folder = verb(recipe, overrides, resume=True)
        assert len(taken) == steps
        return folder

    return run


# What a run leaves


def test_a_pretrained_folder_loads(pretrained):
    model, loading = AutoModelForMaskedLM.from_pretrained(pretrained, output_loading_info=True)
    assert type(model) is LinformerForMaskedLM
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == N
    encoded = tokenizer(f"the {tokenizer.mask_token} stood", return_tensors="pt")
    assert model(**encoded).logits.shape == (1, encoded["input_ids"].shape[1], len(tokenizer))
    config = json.loads((pretrained / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in MODEL} == MODEL
    assert config["pad_token_id"] == tokenizer.pad_token_id


def test_a_finetuned_folder_loads(finetuned):
    model, loading = AutoModelForSequenceClassification.from_pretrained(finetuned, output_loading_info=True)
    assert type(model) is LinformerForSequenceClassification
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == {0: "rock", 1: "water"}
    encoded = AutoTokenizer.from_pretrained(finetuned)("river", return_tensors="pt")
    assert model(**encoded).logits.shape == (1, 2)


@pytest.mark.parametrize("run", ["pretrained", "finetuned"])
def test_custom_code_lies_beside_the_weights(request, run):
    folder = request.getfixturevalue(run)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoConfig"] == "configuration_linformer.LinformerConfig"
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_linformer.LinformerForMaskedLM"
    assert {path.name for path in folder.glob("*.py")} == CODE


@pytest.mark.parametrize("run", ["pretrained", "finetuned"])
def test_nothing_half_written_is_left(request, run):
    folder = request.getfixturevalue(run)
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "stage-"))]


COMMON_KEYS = {
    "verb",
    "recipe",
    "versions",
    "revision",
    "device",
    "device_name",
    "threads",
    "processes",
    "dtype",
    "seed",
    "command",
    "date",
    "parameters",
    "data",
    "steps",
    "metrics",
    "train_seconds",
    "skipped_steps",
    "wall_seconds",
    "peak_memory_mib",
    "history",
    "card",
    "sha256",
}


def assert_results(results: dict, verb: str, *more: str) -> None:
    assert set(results) == COMMON_KEYS | set(more)
    assert results["verb"] == verb
    assert (results["seed"], results["device"], results["dtype"]) == (5, "cpu", "float32")
    assert results["versions"]["torch"] == torch.__version__
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in results["metrics"].values())
    assert 0 < results["train_seconds"] < results["wall_seconds"] < 600
    assert results["peak_memory_mib"] > 50


def test_results_of_pretraining(pretrained, pretraining):
    results = results_of(pretrained)
    assert_results(results, "pretrain", "trained_tokens", "tokens_per_second")
    model = AutoModelForMaskedLM.from_pretrained(pretrained)
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["steps"] == 6 + 12
    assert results["trained_tokens"] == 6 * 4 * 16 + 12 * 4 * N
    assert results["tokens_per_second"] == pytest.approx(results["trained_tokens"] / results["train_seconds"])
    assert results["recipe"]["model"] == MODEL
    metrics = results["metrics"]
    assert set(metrics) == {
        "validation_loss",
        "validation_perplexity",
        "validation_masked_accuracy",
        "validation_masked_tokens",
        "validation_rows",
        "unigram_perplexity",
        "unigram_masked_accuracy",
        "perplexity_ratio",
    }
    assert metrics["validation_perplexity"] == pytest.approx(math.exp(metrics["validation_loss"]))
    assert metrics["perplexity_ratio"] == pytest.approx(
        metrics["unigram_perplexity"] / metrics["validation_perplexity"]
    )
    rows = results["data"]["rows"]["validation"]
    assert metrics["validation_rows"] == rows["rows"]
    assert abs(metrics["validation_masked_tokens"] - 0.15 * rows["tokens"]) < 4 * (0.1275 * rows["tokens"]) ** 0.5
    trained = [row["step"] for row in results["history"] if "loss" in row]
    assert trained == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [row["step"] for row in results["history"] if "eval_loss" in row] == [10, 14, 18]


def test_the_validation_numbers_are_those_of_the_saved_model(pretrained, pretraining):
    """Loss, accuracy and the unigram baseline, computed again row by row in a plain loop."""
    recipe = read_recipe(pretraining)
    data = recipe.build("data")
    corpus = prepare(data, N)
    rows = MaskedDataset(corpus.validation, Masker(corpus.tokenizer, data.seed), static=True)
    model = AutoModelForMaskedLM.from_pretrained(pretrained, sparse_prediction=False).eval()
    special = set(corpus.tokenizer.all_special_ids)
    seen = [token for row in corpus.train["input_ids"] for token in row if token not in special]
    counts = np.bincount(seen, minlength=len(corpus.tokenizer)) + 1
    losses, hits, unigram, frequent = [], 0, [], 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor(row["input_ids"])[None]).logits[0]
        for place, label in enumerate(row["labels"].tolist()):
            if label != -100:
                losses.append(-logits[place].log_softmax(0)[label].item())
                hits += logits[place].argmax().item() == label
                unigram.append(-math.log(counts[label] / counts.sum()))
                frequent += label == counts.argmax()
    metrics = results_of(pretrained)["metrics"]
    masked = metrics["validation_masked_tokens"]
    assert masked == len(losses)
    assert metrics["validation_masked_accuracy"] == pytest.approx(hits / masked)
    assert metrics["unigram_perplexity"] == pytest.approx(math.exp(np.mean(unigram)))
    assert metrics["unigram_masked_accuracy"] == pytest.approx(frequent / masked)
    # Trainer weighs every batch alike, so a batch's loss counts by its rows and not by its masked tokens.
    assert metrics["validation_loss"] == pytest.approx(np.mean(losses), rel=0.02)


def test_results_of_finetuning(finetuned):
    results = results_of(finetuned)
    assert_results(results, "finetune", "task", "baselines", "train_rows_per_second")
    assert results["task"] == "files"
    assert results["steps"] == 12
    assert set(results["metrics"]) == {
        "test_accuracy",
        "test_f1",
        "test_rows",
        "validation_accuracy",
        "validation_f1",
        "validation_rows",
    }
    data = results["data"]
    assert (data["train_rows"], data["validation_rows"], data["test_rows"]) == (72, 8, 9)
    assert data["max_length"] == N
    assert data["test_truncated_rows"] == data["test_truncated_tokens"] == 0
    assert (results["metrics"]["test_rows"], results["metrics"]["validation_rows"]) == (9, 8)
    assert set(results["baselines"]) == {"majority"}


def test_a_checkpoint_with_the_same_classes_in_another_order_keeps_its_numbers(finetuned, finetuning, tmp_path):
    """Accuracy, and F1 of the same class, although its number is another one now."""
    checkpoint = shutil.copytree(finetuned, tmp_path / "checkpoint")
    (checkpoint / "checksums.json").unlink()
    weights = weights_of(checkpoint)
    weights |= {name: value.flip(0).contiguous() for name, value in weights.items() if name.startswith("classifier.")}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"id2label": {"0": "Water", "1": "rock"}, "label2id": {"Water": 0, "rock": 1}}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    still = ["training.learning_rate=1.0e-12", "training.max_steps=1", f"training.output_dir={tmp_path / 'run'}"]
    again = finetune(finetuning, [f"model.checkpoint={checkpoint}", *still])
    expected = results_of(finetuned)["metrics"]
    assert expected["test_f1"] != expected["test_accuracy"]
    assert results_of(again)["metrics"] == pytest.approx(expected)
    saved = json.loads((again / "config.json").read_text(encoding="utf-8"))
    assert saved["id2label"] == config["id2label"]


def test_the_test_numbers_are_those_of_the_saved_model(finetuned, place):
    model = AutoModelForSequenceClassification.from_pretrained(finetuned).eval()
    tokenizer, hits = AutoTokenizer.from_pretrained(finetuned), 0
    lines = (place / "tests.csv").read_text(encoding="utf-8").splitlines()[1:]
    for text, label in (line.split(",") for line in lines):
        with torch.no_grad():
            answer = model(**tokenizer(text, return_tensors="pt")).logits.argmax().item()
        hits += model.config.id2label[answer] == label
    assert 0 < hits < len(lines) == 9  # so it is no share of the 8 validation rows
    assert results_of(finetuned)["metrics"]["test_accuracy"] == pytest.approx(hits / 9)


@pytest.mark.parametrize("run", ["pretrained", "finetuned"])
def test_curve_is_a_picture(request, run):
    picture = (request.getfixturevalue(run) / "curve.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", picture[16:24])
    assert 600 < width < 2000
    assert 300 < height < 1500
    assert 10_000 < len(picture) < 300_000


@pytest.mark.parametrize(
    ("run", "pipeline", "auto_class"),
    [
        ("pretrained", "fill-mask", "AutoModelForMaskedLM"),
        ("finetuned", "text-classification", "AutoModelForSequenceClassification"),
    ],
)
def test_model_card(request, run, pipeline, auto_class):
    folder = request.getfixturevalue(run)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", pipeline)
    assert "linformer" in card.data.tags
    assert f"{auto_class}.from_pretrained(" in card.text
    assert "{{" not in card.text
    metrics = results_of(folder)["metrics"]
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(**results_of(folder)["card"])
    reported = {result.metric_type: result.metric_value for result in card.data.eval_results}
    if run == "finetuned":
        assert reported == {"accuracy": metrics["test_accuracy"], "f1": metrics["test_f1"]}
    else:
        masked = metrics["validation_masked_accuracy"]
        assert reported == {"perplexity": metrics["validation_perplexity"], "accuracy": masked}
        assert f"| validation perplexity | {metrics['validation_perplexity']:.4g} |" in card.text


# Folders that hold something


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_folder_that_is_not_empty_is_left_alone(capsys, pretraining, finetuning, tmp_path, verb):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    recipe = {"pretrain": pretraining, "finetune": finetuning}[verb]
    line = error_line(capsys, verb, recipe, f"training.output_dir={tmp_path}")
    assert f"{tmp_path} is not empty" in line
    assert "--resume" in line
    assert tree(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("run", ["pretrained", "finetuned"])
def test_a_finished_run_is_left_alone(request, capsys, pretraining, finetuning, run, resume):
    folder = request.getfixturevalue(run)
    before = tree(folder)
    verb, recipe = ("pretrain", pretraining) if run == "pretrained" else ("finetune", finetuning)
    line = error_line(capsys, verb, recipe, f"training.output_dir={folder}", *resume)
    assert f"{folder} holds a finished run" in line
    assert tree(folder) == before


def test_a_file_is_no_folder(capsys, pretraining, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert "is a file; name a folder" in error_line(
        capsys, "pretrain", pretraining, f"training.output_dir={tmp_path / 'file'}"
    )
    assert "training.output_dir is missing" in error_line(capsys, "pretrain", pretraining)


# Resuming


def test_pretraining_resumes_exactly(pretraining, pretrained, interrupt, resumed, tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: pretrain(pretraining, overrides), 9, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-8").is_dir()
    assert_same_run(resumed(pretrain, pretraining, overrides, 4), pretrained)
    once, again = results_of(pretrained), results_of(tmp_path / "run")
    assert once["tokens_per_second"] * once["train_seconds"] == pytest.approx(once["trained_tokens"])
    # The interrupted run's seconds up to its checkpoint count with its steps.
    assert again["tokens_per_second"] * again["train_seconds"] == pytest.approx(again["trained_tokens"])
    assert again["train_seconds"] < again["wall_seconds"]


def test_seconds_that_a_checkpoint_does_not_say_are_not_guessed(pretraining, interrupt, tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: pretrain(pretraining, overrides), 9, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-8"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    noted = state["stateful_callbacks"].pop(callbacks.NAME)  # an earlier version wrote none
    assert 0 < noted["seconds"] < noted["wall_seconds"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / "checksums.json").unlink()
    found = results_of(pretrain(pretraining, overrides, resume=True))
    step = found["recipe"]["training"]["per_device_train_batch_size"] * N
    timed = found["trained_tokens"] - 8 * step
    assert found["tokens_per_second"] * found["train_seconds"] == pytest.approx(timed)


def test_pretraining_resumes_within_a_stage(pretraining, pretrained, interrupt, resumed, tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: pretrain(pretraining, overrides), 5, tmp_path / "run" / "stage-1")
    assert (tmp_path / "run" / "stage-1" / "checkpoint-4").is_dir()
    assert not (tmp_path / "run" / "stage-1" / "stage.json").exists()
    assert_same_run(resumed(pretrain, pretraining, overrides, 14), pretrained)


def test_pretraining_resumes_after_a_stage_and_before_the_first_checkpoint(
    pretraining, pretrained, interrupt, resumed, tmp_path, caplog
):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: pretrain(pretraining, overrides), 2, tmp_path / "run")
    assert (tmp_path / "run" / "stage-1" / "stage.json").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert_same_run(resumed(pretrain, pretraining, overrides, 12), pretrained)
    assert "has no whole checkpoint yet" in caplog.text


def test_a_half_written_checkpoint_is_skipped(pretraining, pretrained, interrupt, resumed, tmp_path, caplog):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: pretrain(pretraining, overrides), 9, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_same_run(resumed(pretrain, pretraining, overrides, 8), pretrained)
    assert "Skipping" in caplog.text
    assert f"Resuming from {tmp_path / 'run' / 'checkpoint-4'}." in caplog.text


def test_finetuning_resumes_exactly(finetuning, finetuned, interrupt, resumed, tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: finetune(finetuning, overrides), 9, tmp_path / "run")
    assert_same_run(resumed(finetune, finetuning, overrides, 4), finetuned)


def test_resuming_with_another_model_or_corpus_is_refused(capsys, pretraining, interrupt, tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}"]
    interrupt(lambda: pretrain(pretraining, overrides), 1, tmp_path / "run" / "stage-1")
    before = tree(tmp_path / "run")
    for section, change in (("model", "model.projected_length=4"), ("data", "data.mlm_probability=0.2")):
        line = error_line(capsys, "pretrain", pretraining, *overrides, change, "--resume")
        assert f"--resume: section {section!r} differs from the interrupted run in {tmp_path / 'run'}" in line
    assert tree(tmp_path / "run") == before


# Going on from a checkpoint


def test_pretraining_goes_on_from_a_checkpoint(pretraining, pretrained, tmp_path):
    sections = yaml.safe_load(Path(pretraining).read_text(encoding="utf-8"))
    training = {**sections["training"], "max_steps": 1, "learning_rate": 0.0, "output_dir": str(tmp_path / "run")}
    data = {**sections["data"], "vocab_size": 150, "lowercase": False}  # of a tokenizer that is not wanted here
    recipe = write_recipe(tmp_path / "r.yaml", model={"checkpoint": str(pretrained)}, data=data, training=training)
    folder = pretrain(recipe)
    before, after = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (pretrained, folder))
    assert after == before
    assert results_of(folder)["metrics"] == pytest.approx(results_of(pretrained)["metrics"])
    assert not [
        name for name, value in weights_of(folder).items() if not torch.equal(value, weights_of(pretrained)[name])
    ]


def test_random_weights_take_the_configuration_only(finetuning, pretrained, place, tmp_path):
    untrained = ["training.learning_rate=0.0", "training.max_steps=1"]
    folders = {
        random: finetune(
            finetuning, [f"training.output_dir={tmp_path / random}", f"model.random_weights={random}", *untrained]
        )
        for random in ("true", "false")
    }
    encoder = {name: value for name, value in weights_of(pretrained).items() if name.startswith("linformer.encoder")}
    assert encoder
    for random, folder in folders.items():
        weights = weights_of(folder)
        matrices = [name for name, value in encoder.items() if value.ndim > 1]
        assert all(torch.equal(weights[name], encoder[name]) == (random == "false") for name in matrices)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["projected_length"] == MODEL["projected_length"]
    cards = {random: (folder / "README.md").read_text(encoding="utf-8") for random, folder in folders.items()}
    assert "from random weights" in cards["true"]
    assert "from pretrained weights" in cards["false"]


# What is refused


def test_rows_longer_than_the_model_reads_are_refused(capsys, pretraining, finetuning, tmp_path):
    folder = tmp_path / "run"
    line = error_line(capsys, "finetune", finetuning, f"training.output_dir={folder}", f"data.max_length={N + 1}")
    assert f"data.max_length={N + 1} is longer than the checkpoint reads ({N} tokens)" in line
    line = error_line(capsys, "pretrain", pretraining, f"training.output_dir={folder}", f"data.sequence_length={N + 1}")
    assert f"data.sequence_length={N + 1} is longer than the model reads" in line
    assert not folder.exists()
    stage = "stages.0.sequence_length=64"
    line = error_line(capsys, "pretrain", pretraining, f"training.output_dir={folder}", stage)
    assert f"stages[0].sequence_length=64 is longer than the main rows of {N}." in line
    assert not folder.exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(capsys, pretraining, tmp_path):
    line = error_line(capsys, "pretrain", pretraining, f"training.output_dir={tmp_path / 'run'}", "model.vocab_size=10")
    assert "model.vocab_size=10 is smaller than the tokenizer's vocabulary" in line


def test_wrong_keys_of_a_stage_are_refused(capsys, pretraining, tmp_path):
    folder = f"training.output_dir={tmp_path / 'run'}"
    line = error_line(capsys, "pretrain", pretraining, folder, "stages.0.training.max_stepz=3")
    assert line == "error: unknown key 'stages[0].training.max_stepz'. Did you mean 'max_steps'?"


def test_streaming_without_a_number_of_steps_is_refused(capsys, pretraining, pretrained, tmp_path):
    overrides = ["data.streaming=true", f"data.tokenizer={pretrained}", "data.validation_documents=3"]
    line = error_line(
        capsys,
        "pretrain",
        pretraining,
        f"training.output_dir={tmp_path / 'run'}",
        *overrides,
        "training.max_steps=-1",
        "stages.0.training.max_steps=-1",
    )
    assert "data.streaming has no known length: set training.max_steps." in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.readers=3",
            "data.readers=3 cannot be dealt out evenly to 1 processes with 2 data loader's workers each",
        ),
        ("data.readers=10", "holds 9 documents beyond the first 3, which are held out, and 10 readers need one each"),
        ("data.readers=0", "readers are streaming's, and at least 1, got 0"),
    ],
)
def test_readers_that_cannot_be_dealt_out_are_refused(capsys, pretraining, pretrained, tmp_path, override, said):
    stream = ["data.streaming=true", f"data.tokenizer={pretrained}", "data.validation_documents=3", override]
    folder = [f"training.output_dir={tmp_path / 'run'}", "training.dataloader_num_workers=2"]
    assert said in error_line(capsys, "pretrain", pretraining, *folder, *stream)
    assert not (tmp_path / "run").exists()


def broken(pretrained: Path, folder: Path, how: str) -> str:
    """A copy of a checkpoint that cannot be loaded."""
    shutil.copytree(pretrained, folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no safetensors":
        weights.write_bytes(b"<html>not found</html>")
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "missing":
        weights.unlink()
    elif how == "other shapes":
        save_file({name: torch.zeros(3, 3) for name in load_file(weights)}, weights, metadata={"format": "pt"})
    elif how == "no json":
        (folder / "config.json").write_text("{", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("how", ["truncated", "no safetensors", "empty", "missing", "other shapes", "no json"])
@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_broken_checkpoint_is_named_in_one_line(capsys, pretraining, finetuning, pretrained, tmp_path, verb, how):
    checkpoint = broken(pretrained, tmp_path / "broken", how)
    sections = yaml.safe_load(Path({"pretrain": pretraining, "finetune": finetuning}[verb]).read_text(encoding="utf-8"))
    sections["training"]["output_dir"] = str(tmp_path / "run")
    sections["model"] = {"checkpoint": checkpoint}
    recipe = write_recipe(tmp_path / "r.yaml", **sections)
    line = error_line(capsys, verb, recipe)
    assert checkpoint in line
    assert "Traceback" not in line


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_checkpoint_that_does_not_exist_is_named(capsys, pretraining, finetuning, tmp_path, verb):
    sections = yaml.safe_load(Path({"pretrain": pretraining, "finetune": finetuning}[verb]).read_text(encoding="utf-8"))
    sections["training"]["output_dir"] = str(tmp_path / "run")
    sections["model"] = {"checkpoint": "acme/no-such-model"}
    assert "acme/no-such-model" in error_line(capsys, verb, write_recipe(tmp_path / "r.yaml", **sections))


def test_a_run_that_cannot_begin_leaves_no_folder_behind(pretraining, tmp_path, capsys):
    """Else the corrected command would be refused: its output folder is not empty."""
    folder = tmp_path / "run"
    assert cli.main(["pretrain", pretraining, "data.sources.0.path=nowhere", f"training.output_dir={folder}"]) == 2
    recipe = write_recipe(
        tmp_path / "tune.yaml",
        model={"checkpoint": "nowhere"},
        data={"task": "files", "train_file": "nowhere.csv"},
        training={**TRAINING, "output_dir": str(folder)},
    )
    assert cli.main(["finetune", recipe]) == 2
    assert capsys.readouterr().err.count("nowhere") == 2
    assert not folder.exists()


def test_flash_attention_that_is_not_installed_is_one_line(pretraining, tmp_path, capsys):
    asked = ["model.attn_implementation=flash_attention_2", f"training.output_dir={tmp_path / 'run'}"]
    assert cli.main(["pretrain", pretraining, *asked]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "FlashAttention2" in last
