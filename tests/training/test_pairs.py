"""Sentence encoders on pairs of texts: what is learned, what is measured, and what stands in the folder."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

import linformer_hf
from helpers import ROOT, TRAINING, assert_same_run, error_line, results_of, write_recipe
from linformer_hf.data.tasks import TaskData
from linformer_hf.hub import sentence_head
from linformer_hf.hub.push import push
from linformer_hf.training import pairs
from linformer_hf.training.finetune import finetune, read_recipe


NAMES = ("keeper", "painter", "gardener", "window", "letter", "mountain", "harbour", "lantern")
DEEDS = ("walked under", "stood over", "walked or stood")
N = 32


def rows_of(kind: str) -> list[dict]:
    """Of pairs, who and what they do are the same in both texts; of scored ones the less so, the lower the score."""
    rows = []
    for i in range(24):
        name, deed = NAMES[i % 8], DEEDS[i // 8]
        one, other = f"the {name} {deed} the old stone", f"and {deed} with a {name} quietly"
        if kind == "pairs":
            rows.append({"anchor": one, "positive": other, "negative": f"a {NAMES[(i + 3) % 8]} {deed} quietly"})
        else:
            away = i % 3
            other = other.replace(name, NAMES[(i + away) % 8]) if away else other
            rows.append({"sentence1": one, "sentence2": other, "score": [1.0, 0.2, -0.4][away]})
    return rows


@pytest.fixture(scope="module")
def checkpoint(tokenizers, tmp_path_factory):
    """A small encoder with random weights and no sentence head."""
    torch.manual_seed(0)
    tokenizer, folder = tokenizers["wordpiece"], tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": N, "projected_length": 8}
    linformer_hf.LinformerForMaskedLM(linformer_hf.LinformerConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recipe(checkpoint, tmp_path_factory):
    """(kind, keys by section) -> a recipe on the rows of that kind, which are training and test alike."""

    def write(kind: str, training=None, data=None, model=None, **sections) -> str:
        place = tmp_path_factory.mktemp("pairs")
        file = place / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)), encoding="utf-8")
        files = {f"{split}_file": str(file) for split in ("train", "validation", "test")}
        changes = {"max_steps": 30, "learning_rate": 0.01, "eval_steps": 15, "save_steps": 15, "logging_steps": 1}
        changes |= {"per_device_train_batch_size": 8, "output_dir": str(place / "run"), **(training or {})}
        return write_recipe(
            place / "recipe.yaml",
            model={"checkpoint": checkpoint, **(model or {})},
            data={"task": "files", "kind": kind, "max_length": 16, **files, **(data or {})},
            training=TRAINING | changes,
            **sections,
        )

    return write


@pytest.fixture(scope="module")
def tuned(recipe):
    """(kind, loss) -> the folder of a run."""
    steps = {"pairs": 30, "similarity": 60}
    return functools.cache(
        lambda kind, loss: finetune(recipe(kind, training={"max_steps": steps[kind]}, pairs={"loss": loss}))
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in results_of(folder)["history"] if "loss" in row]


def encoded(folder: Path, texts: list[str], length: int = 16) -> torch.Tensor:
    encoder = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    assert encoder.max_seq_length == N  # not what it was trained with
    encoder.max_seq_length = length
    return encoder.encode(texts, convert_to_tensor=True, normalize_embeddings=True)


def test_pairs_are_learned_and_measured_as_by_hand(tuned, checkpoint):
    folder, rows = tuned("pairs", None), rows_of("pairs")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    texts = list(dict.fromkeys(columns["positive"] + columns["negative"]))

    def ranks(place) -> tuple[torch.Tensor, torch.Tensor]:
        encoder = functools.partial(encoded, place) if place == folder else first
        anchors, others = encoder(columns["anchor"]), encoder(texts)
        cosines = anchors @ others.T
        right = torch.tensor([texts.index(text) for text in columns["positive"]])
        wrong = torch.tensor([texts.index(text) for text in columns["negative"]])
        of_right = cosines.gather(1, right[:, None])
        return (cosines > of_right).sum(1) + 1, of_right[:, 0] > cosines.gather(1, wrong[:, None])[:, 0]

    def first(given):
        encoder = SentenceTransformer(checkpoint, device="cpu")
        encoder.max_seq_length = 16
        return encoder.encode(given, convert_to_tensor=True, normalize_embeddings=True)

    rank, beats = ranks(folder)
    metrics = results_of(folder)["metrics"]
    assert metrics["test_accuracy@1"] == pytest.approx((rank == 1).float().mean().item())
    assert metrics["test_mrr@10"] == pytest.approx((1 / rank).where(rank <= 10, 0.0).mean().item(), abs=1e-6)
    assert metrics["test_triplet_accuracy"] == pytest.approx(beats.float().mean().item())
    assert (1 / rank).mean() > 0.2 + (1 / ranks(checkpoint)[0]).mean()  # it has learned who belongs to whom
    assert losses(folder)[-1] < 0.6 * losses(folder)[0]


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_scores_are_learned_and_measured_as_by_hand(tuned, loss):
    from scipy.stats import pearsonr, spearmanr

    folder, rows = tuned("similarity", loss), rows_of("similarity")
    sides = [encoded(folder, [row[name] for row in rows]) for name in ("sentence1", "sentence2")]
    cosines, scores = (sides[0] * sides[1]).sum(1).tolist(), [row["score"] for row in rows]
    metrics = results_of(folder)["metrics"]
    assert metrics["test_spearman"] == pytest.approx(spearmanr(scores, cosines).statistic, abs=1e-4)
    assert metrics["test_pearson"] == pytest.approx(pearsonr(scores, cosines).statistic, abs=1e-4)
    assert metrics["test_spearman"] > 0.6
    if loss == "cosine":  # it is the score itself that is learned
        assert max(abs(a - b) for a, b in zip(cosines, scores, strict=True)) < 0.7


def test_the_losses_are_those_of_the_library(recipe, checkpoint):
    """The first batch by hand: all rows, cosines times the scale, the anchors' positives before all else."""
    options = {"max_steps": 1, "per_device_train_batch_size": 24, "save_strategy": "no", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    rows, encoder = rows_of("pairs"), SentenceTransformer(checkpoint, device="cpu")
    anchors, positives, negatives = (
        encoder.encode([row[name] for row in rows], convert_to_tensor=True, normalize_embeddings=True)
        for name in ("anchor", "positive", "negative")
    )
    cosines = anchors @ torch.cat([positives, negatives]).T
    for scale in (20.0, 5.0):
        expected = torch.nn.functional.cross_entropy(cosines * scale, torch.arange(24)).item()
        for more in ({}, {"mini_batch_size": 5}):
            path = recipe("pairs", training=options, model=quiet, pairs={"scale": scale, **more})
            assert losses(finetune(path))[0] == pytest.approx(expected, rel=1e-3)


def test_the_folder_is_one_of_ours(tuned, tmp_path):
    folder = tuned("pairs", None)
    assert str(sentence_head.read(folder)) == "mean"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["metric"]) == (["LinformerModel"], "accuracy@1")
    assert (folder / "modeling_linformer.py").exists()
    assert not (folder / "eval").exists()
    assert not [name for name in load_names(folder) if name.startswith("pooler")]  # nothing that was drawn at random
    card = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert {result.metric_type for result in data.eval_results} >= {"accuracy@1", "mrr@10", "triplet_accuracy"}
    assert "SentenceTransformer(name, revision=commit, trust_remote_code=True)" in card
    assert "generated_from_trainer" not in card
    push(folder, "jane/pairs", dry_run=True)


def load_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_a_clean_process_without_the_package_gives_the_same_vectors(tuned, tmp_path):
    folder, texts = tuned("pairs", None), ["the keeper walked", "a garden and a new window"]
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        "sys.modules['linformer_hf'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"encoder = SentenceTransformer({str(folder)!r}, device='cpu', trust_remote_code=True)\n"
        f"torch.save(encoder.encode({texts!r}, convert_to_tensor=True), {str(tmp_path / 'vectors.pt')!r})\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, str(program)], check=True, capture_output=True)
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    assert torch.equal(torch.load(tmp_path / "vectors.pt"), expected)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(recipe):
    """Stopped by its own limit, half way."""
    whole = finetune(recipe("pairs", pairs={"loss": "ranking"}))
    path = recipe("pairs", pairs={"loss": "ranking"})
    half = finetune(path)
    for name in ("results.json", "model.safetensors", "checkpoint-30"):
        (shutil.rmtree if name.startswith("checkpoint") else os.remove)(half / name)
    with pytest.raises(ValueError, match="section 'pairs' differs"):
        finetune(path, ["pairs.scale=10"], resume=True)
    assert_same_run(finetune(path, resume=True), whole)


def test_a_head_of_its_own_is_kept_with_prompts_and_length(recipe, checkpoint, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(1)
    modules = [Transformer(checkpoint), Pooling(32, "max"), Dense(32, 12), Normalize()]
    prompts = {"query": "a letter: ", "document": "the river: "}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(tmp_path / "source"))
    source = {"checkpoint": str(tmp_path / "source")}
    folder = finetune(recipe("pairs", model=source, training={"max_steps": 2}))
    before, after = sentence_head.read(tmp_path / "source"), sentence_head.read(folder)
    assert str(after) == "max, dense 32 to 12, normalised" == str(before)
    assert not torch.equal(after.modules[1].weights["linear.weight"], before.modules[1].weights["linear.weight"])
    assert after.settings["prompts"] == prompts
    encoder = SentenceTransformer(str(folder), device="cpu")
    assert encoder.max_seq_length == N
    assert pairs.prompts(encoder, "pairs") == {"text": "a letter: ", "pair": "the river: ", "negative": "the river: "}
    assert pairs.prompts(encoder, "similarity") == {}
    with pytest.raises(ValueError, match=r"has a sentence head of its own \(max, dense .*\): leave pairs\.pooling out"):
        finetune(recipe("pairs", model=source, pairs={"pooling": "cls"}))


def test_prompts_go_before_the_texts_in_training_and_in_the_metrics(recipe, checkpoint, tmp_path):
    """By hand: the first batch's loss, and which positive is nearest, of vectors that were asked for with prompts."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    prompts = {"query": "a letter written: ", "document": "or the river: "}
    encoder = SentenceTransformer(modules=[Transformer(checkpoint), Pooling(32)], prompts=prompts, device="cpu")
    encoder.save(str(tmp_path / "source"))
    model = {"checkpoint": str(tmp_path / "source"), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {"max_steps": 1, "per_device_train_batch_size": 24, "save_strategy": "no", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False, "learning_rate": 0.0}
    folder = finetune(recipe("pairs", model=model, training=options, data={"max_length": N}))
    columns = {name: [row[name] for row in rows_of("pairs")] for name in ("anchor", "positive", "negative")}

    def by_hand(query, document) -> tuple[float, float]:
        given = {"convert_to_tensor": True, "normalize_embeddings": True}
        anchors = query(columns["anchor"], **given)
        others = document(columns["positive"] + columns["negative"], **given)
        cosines = anchors @ others.T
        loss = torch.nn.functional.cross_entropy(20 * cosines, torch.arange(24)).item()
        texts = columns["positive"] + columns["negative"]
        first = [texts[place] for place in cosines.argmax(1).tolist()]
        return loss, sum(a == b for a, b in zip(first, columns["positive"], strict=True)) / 24

    loss, accuracy = by_hand(encoder.encode_query, encoder.encode_document)
    assert loss != pytest.approx(by_hand(encoder.encode, encoder.encode)[0], rel=1e-3)  # without prompts
    assert losses(folder)[0] == pytest.approx(loss, rel=1e-3)
    assert results_of(folder)["metrics"]["test_accuracy@1"] == pytest.approx(accuracy)


@pytest.mark.parametrize("pooling", [None, "cls", "max"])
def test_an_encoder_without_a_head_gets_a_pooling_and_the_log_says_so(checkpoint, pooling, caplog):
    model = pairs.load_encoder(
        checkpoint, pairs.Pairs(pooling=pooling), {}, None, revision=None, trust_remote_code=False
    )
    assert model[1].pooling_mode in (pooling or "mean", (pooling or "mean",))
    told = (
        f"{checkpoint} has no sentence head: its vectors are made of its tokens' states by {pooling or 'mean'} pooling."
    )
    assert told in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["pairs.loss=cosine"], "pairs.loss=cosine is none of data.kind=pairs: set ranking, or data.kind=similarity"),
        (["training.per_device_train_batch_size=1"], "per_device_train_batch_size must be at least 2, got 1"),
        (["training.fsdp=true"], "training.fsdp: each process trains a sentence encoder whole. Leave it out."),
        (["model.random_weights=true"], "model.random_weights would have no effect with data.kind=pairs"),
        (["pairs.mini_batch_size=0"], "mini_batch_size must be at least 1, got 0."),
        (["pairs.scale=0"], "scale must be above 0, got 0."),
        (["pairs.temperature=1"], "unknown key 'pairs.temperature'"),
        (["data.max_length=40"], "data.max_length=40 is longer than the checkpoint reads (32 tokens)"),
        (["data.metrics=[f1]"], "metrics: f1 is none of accuracy@1, accuracy@10, mrr@10"),
        (
            [
                "data.kind=similarity",
                "data.text_column=anchor",
                "data.pair_column=positive",
                "data.label_column=negative",
            ],
            "row 1, column 'negative': kind: similarity, but 'a window walked under quietly' is no number.",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(recipe, change, words, capsys):
    path = recipe("pairs")
    assert words in error_line(capsys, "finetune", path, *change)
    assert not (Path(path).parent / "run").exists()


def test_the_section_belongs_to_vectors(recipe, capsys):
    path = recipe("similarity", pairs={"mini_batch_size": 4})
    assert "it belongs to pairs.loss=ranking" in error_line(capsys, "finetune", path)
    words = ["data.kind=regression", "data.text_column=sentence1", "data.pair_column=sentence2"]
    line = error_line(capsys, "finetune", path, *words, "data.label_column=score")
    assert "section pairs would have no effect with data.kind=regression. Leave it out." in line


def test_without_the_library_one_line_says_what_to_install(recipe, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    line = error_line(capsys, "finetune", recipe("pairs"))
    assert line.startswith("error: pairs of texts need sentence-transformers (")
    assert line.endswith("pip install 'linformer_hf[ecosystem]'.")


def test_the_recipe_in_the_repository_is_of_vectors():
    recipe = read_recipe(ROOT / "configs" / "finetune" / "bible-pairs.yaml")
    assert recipe.build("data").of_vectors
    assert recipe.build("pairs").for_kind("pairs").loss == "ranking"
    assert not TaskData("files", train_file="rows.csv").of_vectors
