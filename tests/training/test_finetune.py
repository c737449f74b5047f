"""The classifier of a checkpoint against the classes of a task: kept, replaced or refused. Runs of every kind."""

import functools
import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from helpers import TRAINING, results_of, write_recipe
from linformer_hf.data.tasks import KINDS, LoadedTask
from linformer_hf.training.finetune import FinetuneModel, finetune, load_model, settle_best, truncation
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


# Every kind of task: one command on a file, and the saved folder gives the numbers that were reported.

WORDS = ("keeper", "painter", "gardener", "window", "letter", "mountain", "harbour", "lantern")


def sentence(i: int) -> list[str]:
    """`the keeper walked under the old stone`: of some rows with a river in it, of some with a stone."""
    thing = [["the", "river"], ["a", "garden"]][i % 2] + [["or", "the", "old", "stone"], ["and", "a", "new", "window"]][
        i % 3 % 2
    ]
    return ["the", WORDS[i % 8], "walked", "under", *thing]


def conll(count: int) -> str:
    tags = {"river": "B-PLACE", "old": "B-THING", "stone": "I-THING"}
    rows = ["\n".join(f"{word} {tags.get(word, 'O')}" for word in sentence(i)) for i in range(count)]
    return "-DOCSTART- -X- O O\n\n" + "\n\n".join(rows) + "\n"


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def topics(count: int) -> str:
    rows = [(" ".join(words), words) for words in map(sentence, range(count))]
    return lines({"text": text, "label": [w for w in ("river", "stone") if w in words]} for text, words in rows)


def squad(count: int) -> str:
    """Who walked? Of every fourth context nobody says it."""
    asked = []
    for i in range(count):
        context, who = " ".join(sentence(i)), WORDS[i % 8]
        answers = [{"text": who, "answer_start": 4}, {"text": f"the {who}", "answer_start": 0}] if i % 4 else []
        context = context if i % 4 else context.replace(who, "river")
        question = {"id": str(i), "question": "walked or stood", "answers": answers, "is_impossible": not answers}
        asked.append({"context": context, "qas": [question]})
    return json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": asked}]})


def choices(count: int) -> str:
    """The continuation that names the same word; of every third row there are three, else two."""
    rows = []
    for i in range(count):
        right, *wrong = (f"and the {WORDS[(i + j) % 8]} stood" for j in range(3 if i % 3 == 0 else 2))
        given = [*wrong, right] if i % 2 else [right, *wrong]
        rows.append(
            {"text": f"the {WORDS[i % 8]} walked", "choices": given, "label": right if i % 5 else given.index(right)}
        )
    return lines(rows)


RUNS = {
    "multi-label": ("rows.jsonl", topics),
    "token-classification": ("rows.conll", conll),
    "question-answering": ("rows.json", squad),
    "multiple-choice": ("rows.jsonl", choices),
}


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """kind -> folder of a run of that kind, on 40 rows of training and 12 of test."""
    start = checkpoint("LinformerForMaskedLM")

    @functools.cache
    def run(kind: str) -> Path:
        place, (name, rows) = tmp_path_factory.mktemp("tuned"), RUNS[kind]
        for split, count in (("train", 40), ("test", 12)):
            (place / f"{split}-{name}").write_text(rows(count), encoding="utf-8")
        data = {f"{split}_file": str(place / f"{split}-{name}") for split in ("train", "test")}
        training = TRAINING | {"max_steps": 30, "learning_rate": 0.01, "eval_steps": 30, "save_strategy": "no"}
        recipe = write_recipe(
            place / "recipe.yaml",
            model={"checkpoint": start},
            data={"task": "files", "kind": kind, **data},
            training={**training, "output_dir": str(place / "run")},
        )
        return finetune(recipe)

    return run


def reported(folder: Path) -> dict[str, float]:
    metrics = results_of(folder)["metrics"]
    names = [name for name in metrics if name.startswith("test_") and name != "test_rows"]
    return {name.removeprefix("test_"): metrics[name] for name in names}


@pytest.mark.parametrize(("kind", "metric"), [("multi-label", "micro_f1"), ("multiple-choice", "accuracy")])
def test_head_metric_and_card_are_those_of_the_kind(tuned, kind, metric):
    folder, facts = tuned(kind), KINDS[kind]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [f"Linformer{facts.head}"]
    assert config["metric"] == metric == next(iter(reported(folder)))
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == facts.pipeline_tag
    assert f"AutoModel{facts.head}.from_pretrained(" in (folder / "README.md").read_text(encoding="utf-8")


def test_several_labels_a_row(tuned):
    pipe = transformers.pipeline("text-classification", model=str(tuned("multi-label")), device="cpu")
    expected, found = [], []
    for row in map(json.loads, topics(12).splitlines()):
        answers = {answer["label"]: answer["score"] for answer in pipe(row["text"], top_k=None)}
        assert answers.keys() == {"river", "stone"}
        found.append([int(answers[name] > 0.5) for name in sorted(answers)])
        expected.append([int(name in row["label"]) for name in sorted(answers)])
    assert pipe.model.config.problem_type == "multi_label_classification"
    assert 0 < sum(map(sum, found)) < 24  # neither always nor never
    right = sum(a == b for a, b in zip(expected, found, strict=True)) / 12
    assert reported(tuned("multi-label"))["subset_accuracy"] == pytest.approx(right)
    pairs = [(a, b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)]
    hits = pairs.count((1, 1))
    f1 = 2 * hits / (2 * hits + pairs.count((1, 0)) + pairs.count((0, 1)))
    assert reported(tuned("multi-label"))["micro_f1"] == pytest.approx(f1)


def test_words_and_tags(tuned):
    seqeval = pytest.importorskip("seqeval.metrics")
    folder = tuned("token-classification")
    pipe = transformers.pipeline("token-classification", model=str(folder), device="cpu")
    assert pipe.model.config.id2label == {0: "O", 1: "B-PLACE", 2: "B-THING", 3: "I-THING"}
    expected, found = [], []
    for block in conll(12).split("\n\n")[1:]:
        words, tags = zip(*map(str.split, block.splitlines()), strict=True)
        starts = [sum(len(word) + 1 for word in words[:i]) for i in range(len(words))]
        answers = {answer["start"]: answer["entity"] for answer in pipe(" ".join(words))}
        found.append([answers.get(start, "O") for start in starts])
        expected.append(list(tags))
    numbers = reported(folder)
    assert list(numbers) == ["f1", "precision", "recall", "accuracy"]
    assert 0 < numbers["f1"] == pytest.approx(seqeval.f1_score(expected, found))
    assert numbers["recall"] == pytest.approx(seqeval.recall_score(expected, found))
    flat = [(a, b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)]
    assert numbers["accuracy"] == pytest.approx(sum(a == b for a, b in flat) / len(flat))


def test_answers_out_of_their_context(tuned):
    folder = tuned("question-answering")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right, answered = 0, 0
    for paragraph in json.loads(squad(12))["data"][0]["paragraphs"]:
        (asked,), context = paragraph["qas"], paragraph["context"]
        encoded = tokenizer(asked["question"], context, return_tensors="pt", return_offsets_mapping=True)
        spans, sides = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
        with torch.no_grad():
            output = model(**encoded)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        inside = [i for i, side in enumerate(sides) if side == 1]
        best = max((start[i] + end[j], i, j) for i in inside for j in inside if i <= j)
        answer = context[spans[best[1]][0] : spans[best[2]][1]] if best[0] > start[0] + end[0] else ""
        wanted = {given["text"].removeprefix("the ") for given in asked["answers"]} or {""}
        right += answer.removeprefix("the ") in wanted
        answered += bool(answer)
    assert answered > 0
    assert reported(folder)["exact_match"] == pytest.approx(right / 12)
    assert reported(folder)["f1"] >= reported(folder)["exact_match"]


def test_one_of_several_choices(tuned):
    folder = tuned("multiple-choice")
    model = transformers.AutoModelForMultipleChoice.from_pretrained(folder).eval()
    tokenizer, right = transformers.AutoTokenizer.from_pretrained(folder), 0
    for row in map(json.loads, choices(12).splitlines()):
        encoded = tokenizer([row["text"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**{name: tensor[None] for name, tensor in encoded.items()}).logits.argmax().item()
        right += row["label"] in (best, row["choices"][best])
    assert reported(folder)["accuracy"] == pytest.approx(right / 12)


def test_rows_in_pieces_are_judged_as_rows(tuned, tmp_path):
    """By hand: the mean of the logits of a row's pieces, as the tokenizer cuts them."""
    before = results_of(tuned("multi-label"))["recipe"]
    before["data"] |= {"max_length": 5, "stride": 1}
    before["training"] |= {"output_dir": str(tmp_path / "run"), "max_steps": 20}
    folder = finetune(write_recipe(tmp_path / "recipe.yaml", **before))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows, right, several = [json.loads(line) for line in topics(12).splitlines()], 0, 0
    for row in rows:
        cut = {"truncation": True, "max_length": 5, "stride": 1, "return_overflowing_tokens": True}
        pieces = tokenizer(row["text"], **cut)["input_ids"]
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([piece])).logits for piece in pieces]).mean(0)
        found = {model.config.id2label[i] for i, logit in enumerate(logits.tolist()) if logit > 0}
        right, several = right + (found == set(row["label"])), several + (len(pieces) > 1)
    data, metrics = results_of(folder)["data"], results_of(folder)["metrics"]
    assert several
    assert data["test_pieces"] > metrics["test_rows"] == data["test_rows"] == 12
    told = "pieces of at most 5 tokens (1 of them shared with the piece in front) and judged whole: 12 test rows in "
    assert f"{told}{data['test_pieces']} pieces" in (folder / "README.md").read_text(encoding="utf-8")
    assert metrics["test_subset_accuracy"] == pytest.approx(right / 12)


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
def test_long_rows_that_fit_into_one_piece_are_as_without(tuned, tmp_path, kind):
    if kind == "token-classification":
        pytest.importorskip("seqeval.metrics")
    before = results_of(tuned(kind))["recipe"]
    before["data"] |= {"stride": 1}
    before["training"] |= {"output_dir": str(tmp_path / "run")}
    assert reported(finetune(write_recipe(tmp_path / "recipe.yaml", **before))) == reported(tuned(kind))


def test_truncation_is_told_in_one_line(tuned, caplog):
    counts = results_of(tuned("question-answering"))["data"]
    assert truncation(counts) == ""
    counts |= {"max_length": 1024, "test_truncated_rows": 3, "test_truncated_tokens": 4567}
    assert truncation(counts) == "max_length=1,024 cuts off the end of 3 of 12 test rows (4,567 tokens)."
    counts |= {"train_truncated_rows": 1, "train_truncated_tokens": 2}
    assert truncation(counts).endswith(" of 1 of 38 train rows (2 tokens), 3 of 12 test rows (4,567 tokens).")


def test_a_run_tells_what_it_cut_and_so_does_its_card(tuned, tmp_path, caplog):
    before = results_of(tuned("multi-label"))["recipe"]
    before["data"]["max_length"] = 8
    before["training"] |= {"max_steps": 1, "eval_strategy": "no", "output_dir": str(tmp_path / "run")}
    with caplog.at_level(logging.WARNING, "linformer_hf"):
        folder = finetune(write_recipe(tmp_path / "recipe.yaml", **before))
    (told,) = [record.message for record in caplog.records if "max_length" in record.message]
    assert told.startswith("max_length=8 cuts off the end of ")
    assert told in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("title", "reads"), [("RobertaForMaskedLM", 30), ("BertForMaskedLM", 32), ("NystromformerForMaskedLM", 32)]
)
def test_long_rows_are_cut_to_what_the_checkpoint_reads(tuned, checkpoint, title, reads, tmp_path, caplog):
    """Of RoBERTa's 32 positions two are padding's, and Nyströmformer has two more than it reads."""
    before = results_of(tuned("multi-label"))["recipe"]
    long = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in topics(6).splitlines()]
    for row in rows:
        row["text"] = "river stone " * 30
    long.write_text(lines(rows), encoding="utf-8")
    before["model"]["checkpoint"] = checkpoint(title)
    before["data"] |= {"train_file": str(long), "test_file": str(long)}
    before["training"] |= {"max_steps": 1, "eval_strategy": "no", "output_dir": str(tmp_path / "run")}
    recipe = write_recipe(tmp_path / "recipe.yaml", **before)
    with caplog.at_level(logging.WARNING, "linformer_hf"):
        finetune(recipe)
    assert any(record.message.startswith(f"max_length={reads} cuts off") for record in caplog.records)
    with pytest.raises(ValueError, match=rf"data.max_length={reads + 1} .* \({reads} tokens\)"):
        finetune(recipe, [f"data.max_length={reads + 1}", f"training.output_dir={tmp_path / 'other'}"])


def test_what_would_fail_after_the_training_is_refused_before(tuned, tmp_path, monkeypatch):
    def refusal(kind: str, data=None, **training) -> str:
        before = results_of(tuned(kind))["recipe"]
        before["data"] |= data or {}
        before["training"] |= {"output_dir": str(tmp_path / "run"), **training}
        with pytest.raises(ValueError, match=r"\w") as error:
            finetune(write_recipe(tmp_path / "recipe.yaml", **before))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    message = refusal("question-answering", train_sampling_strategy="group_by_length")
    assert "group_by_length changes the order of test rows too" in message
    message = refusal("multi-label", {"stride": 1}, train_sampling_strategy="group_by_length")
    assert "by which the pieces of a row belong together" in message
    pytest.importorskip("seqeval")
    tuned("token-classification")
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "seqeval" else whole(name, *more)
    )
    assert "pip install 'linformer_hf[tagging]', or set metrics: [accuracy]" in refusal("token-classification")


@pytest.mark.parametrize("kind", ["question-answering", "multiple-choice"])
def test_a_head_without_classes_is_kept_where_the_checkpoint_has_it(tuned, kind):
    folder = str(tuned(kind))
    rows = Dataset.from_dict({"text": ["x"]})
    task = LoadedTask("t", rows, rows, rows, None, (), kind=kind)
    with loading(folder):
        model, other = (load_model(FinetuneModel(folder, new_classifier=new), task)[0] for new in (False, True))
    saved = load_file(tuned(kind) / "model.safetensors")
    last = "qa_outputs.weight" if kind == "question-answering" else "classifier.weight"
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert not torch.equal(other.state_dict()[last], saved[last])


@pytest.mark.parametrize(
    ("given", "greater"),
    [
        ({"metric_for_best_model": "mse"}, False),
        ({"metric_for_best_model": "eval_mse"}, False),
        ({"metric_for_best_model": "mse", "greater_is_better": True}, True),  # as the recipe says
        ({"metric_for_best_model": "pearson"}, True),
        ({"metric_for_best_model": "loss"}, False),
    ],
)
def test_of_an_error_the_lowest_is_the_best(given, greater, tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **given)
    settle_best(arguments, given)
    assert arguments.greater_is_better is greater


def test_the_best_of_a_regression_has_the_lowest_error(checkpoint, tmp_path):
    rows = "".join(json.dumps({"text": " ".join(sentence(i)), "label": i % 2}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    training = TRAINING | {"max_steps": 12, "learning_rate": 0.05, "load_best_model_at_end": True}
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model={"checkpoint": checkpoint("LinformerForMaskedLM")},
        data={"task": "files", "kind": "regression", "train_file": str(tmp_path / "rows.jsonl")},
        training={**training, "metric_for_best_model": "mse", "output_dir": str(tmp_path / "run")},
    )
    content = results_of(finetune(recipe))
    errors = [row["eval_mse"] for row in content["history"] if "eval_mse" in row]
    assert min(errors) < max(errors)
    assert content["metrics"]["validation_mse"] == pytest.approx(min(errors))
