"""`linformer-hf distill`: what is trained, what the loss is, and that a resumed run is the uninterrupted one."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from linformer_hf import cli
from linformer_hf.conversion.convert import convert
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import Windows, exact_twin
from linformer_hf.hub import sentence_head
from linformer_hf.hub.sentence_head import SentenceHead
from linformer_hf.hub.sentence_head import read as read_head
from linformer_hf.training.distill import (
    Distillation,
    DistillModel,
    choose_trainable,
    distill,
    distillation_loss,
    load_student,
    read_recipe,
    read_windows,
)
from linformer_hf.training.passages import search_loss
from linformer_hf.utils.recipe import RecipeError


# With these the validation loss fell to .33-.85 of what it was in 8 draws of each kind; at 0.01 it rose in one.
LEARNING = ["training.learning_rate=0.003", "training.max_steps=48", "distillation.validation_rows=24"]
LEARNING += ["training.eval_steps=12", "training.save_steps=12"]
SEARCH = ["search.weight=1", "search.passages=3", "search.shortest=2", "search.longest=6", "search.pieces=[4, 8]"]
ONLY_SEARCH = [
    *SEARCH,
    "distillation.hidden_weight=0",
    "distillation.embedding_weight=0",
    "distillation.answer_weight=0",
]
ONLY_PIECES = ["distillation.pieces_weight=1", "distillation.pieces=[8, 16]", *ONLY_SEARCH[5:]]


@pytest.fixture(scope="module", params=["BertModel", "BertForMaskedLM"])
def pair(request, tiny_source, tmp_path_factory):
    """A teacher and its converted student, which nothing has calibrated yet."""
    source, output = tiny_source(request.param), tmp_path_factory.mktemp("student") / "student"
    return source, convert(str(source), output, projected_length=12, length_correction=True)


@pytest.fixture
def recipe(pair, texts, tmp_path):
    return write_recipe(pair, texts, tmp_path)


@pytest.fixture(scope="module")
def encoders(tiny_source, tmp_path_factory):
    """A pair of bare encoders; the teacher's dropout rates are no defaults."""
    source = tiny_source(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    output = tmp_path_factory.mktemp("student") / "student"
    return source, convert(str(source), output, projected_length=12, length_correction=True)


@pytest.fixture
def encoder_recipe(encoders, texts, tmp_path):
    return write_recipe(encoders, texts, tmp_path)


def write_recipe(pair, texts, tmp_path):
    content = {
        "model": {"student": str(pair[1]), "teacher": str(pair[0])},
        "distillation": {"validation_rows": 6},
        "data": {
            "sources": [{"kind": "files", "path": str(texts)}],
            "packing": "contiguous",
            "validation_fraction": 0.2,
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.003,
            "logging_steps": 4,
            "eval_strategy": "steps",
            "eval_on_start": True,
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "report_to": "none",
            "seed": 0,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_students_own_vectors_are_aimed_at_and_stay(tiny_source, texts, tmp_path, monkeypatch):
    source, student = tiny_source(), tmp_path / "student"
    convert(str(source), student, projected_length=12, length_correction=True, sentence_head="cls")
    head = read_head(student)
    states = torch.randn(2, 2, 6, 24)
    given, goal = (SimpleNamespace(hidden_states=(part, part)) for part in states)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    loss = distillation_loss(given, goal, mask, None, Distillation(hidden_weight=0), head)
    first = [part[torch.arange(2), [0, 2]] for part in states]
    torch.testing.assert_close(loss, (1 - torch.cosine_similarity(*first)).mean())

    seen = []

    def watched(*arguments):
        seen.append(str(arguments[-1]))
        return distillation_loss(*arguments)

    monkeypatch.setattr("linformer_hf.training.distill.distillation_loss", watched)
    recipe = write_recipe((source, student), texts, tmp_path)
    folder = distill(recipe, ["training.max_steps=1"])
    assert set(seen) == {"cls"}
    (folder / "results.json").unlink()  # killed while the model was moved to its place
    distill(recipe, ["training.max_steps=1"], resume=True)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (folder / name).read_bytes() == (student / name).read_bytes()
    assert "1_Pooling/config.json" in json.loads((folder / "checksums.json").read_text())
    assert "library_name: sentence-transformers" in (folder / "README.md").read_text()
    assert "folder says (cls)" in (folder / "fidelity.md").read_text()


@pytest.mark.parametrize("trainable", ["shortening", "encoder"])
def test_it_learns_and_trains_what_it_says(pair, recipe, trainable):
    folder = distill(recipe, [f"distillation.trainable={trainable}", *LEARNING])
    found = json.loads((folder / "results.json").read_text())
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert losses[-1] < 0.97 * losses[0]
    names = changed(weights(pair[1]), weights(folder))
    assert names
    added = {name for name in names if ".projection." in name or ".correction." in name}
    if trainable == "shortening":
        assert names == added
    else:
        assert any(name.endswith("attention.self.query.weight") for name in names - added)
        assert not any("embeddings" in name or "cls." in name for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == (0.1, 0.1)
    for name in ("fidelity.json", "fidelity.md", "fidelity.png", "curve.png", "README.md", "tokenizer.json"):
        assert (folder / name).exists()
    assert found["fidelity"]["dtype"] == "float32"
    if trainable == "shortening":  # inputs of K tokens are still the source's
        auto = AutoModelForMaskedLM if "masked" in found["fidelity"]["lengths"]["48"] else AutoModel
        ids = torch.arange(12)[None] + 5
        with torch.no_grad():
            ours, theirs = (auto.from_pretrained(place).eval()(ids)[0] for place in (folder, pair[0]))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [[], SEARCH], ids=["states", "search"])
def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path, more):
    whole = distill(recipe, more)
    halves = f"training.output_dir={tmp_path / 'halves'}"

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    # Trainer's own progress bar is told of every step's end; it dies at the sixth, two behind the checkpoint.
    seen = []
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "transformers.trainer_callback.DefaultFlowCallback.on_step_begin",
        lambda *_, **__: seen.append(1) if len(seen) < 6 else stop(),
        raising=False,
    )
    with pytest.raises(Stop):
        distill(recipe, [halves, *more])
    patch.undo()
    assert (tmp_path / "halves" / "checkpoint-4").is_dir()
    assert not (tmp_path / "halves" / "results.json").exists()
    resumed = distill(recipe, [halves, *more], resume=True)
    assert changed(weights(whole), weights(resumed)) == set()


def test_accumulation_gives_the_update_of_one_large_batch(pair, recipe, tmp_path):
    # A mean over masked tokens weighs halves by how many each has: only the other parts of the loss count here.
    steps = [
        "training.max_steps=1",
        "distillation.answer_weight=0",
        'training.save_strategy="no"',
        'training.eval_strategy="no"',
        "training.eval_on_start=false",
        "training.optim=sgd",
    ]
    steps += ["training.max_grad_norm=0", "training.lr_scheduler_type=constant", "training.learning_rate=0.1"]
    folders = []
    for name, size, accumulation in (("one", 4, 1), ("two", 2, 2)):
        place = tmp_path / name
        more = [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}"]
        folders.append(distill(recipe, [*steps, *more, f"training.output_dir={place}"]))
    start, one, two = (weights(folder) for folder in (pair[1], *folders))
    name = next(name for name in start if name.endswith("layer.1.attention.output.correction.weight"))
    move, other = one[name] - start[name], two[name] - start[name]
    # The loss is relative to each batch's norm, so halves agree nearly, not to the bit; a trap would double the move.
    assert float((move - other).norm() / move.norm()) < 0.1


def test_the_loss_is_nothing_for_equal_outputs_and_sees_each_part():
    generator = torch.Generator().manual_seed(0)
    states = tuple(torch.randn(2, 5, 4, generator=generator) for _ in range(3))
    logits = torch.randn(2, 5, 7, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    labels = torch.tensor([[-100, 3, -100, -100, -100], [-100, 2, -100, -100, -100]])
    goal = SimpleNamespace(hidden_states=states, logits=logits)
    weights = Distillation()

    def loss(hidden=states, answers=logits, given=weights):
        return float(
            distillation_loss(SimpleNamespace(hidden_states=hidden, logits=answers), goal, mask, labels, given)
        )

    assert loss() == pytest.approx(0, abs=1e-6)
    scaled = (states[0], states[1] * 1.5, states[2])  # one of two layers is off by half: (0.25 + 0) / 2
    assert loss(hidden=scaled) == pytest.approx(0.125, rel=1e-5)
    padded = tuple(state.clone() for state in states)
    padded[2][1, 3] += 100  # padding
    assert loss(hidden=padded) == pytest.approx(0, abs=1e-6)
    turned = (states[0], states[1], -states[2])  # relative error 4, over two layers; cosine -1
    assert loss(hidden=turned) == pytest.approx(2 + 2, rel=1e-5)
    assert loss(hidden=turned, given=Distillation(embedding_weight=0)) == pytest.approx(2, rel=1e-5)
    elsewhere, masked = logits.clone(), logits.clone()
    elsewhere[0, 0] += torch.arange(7.0)
    masked[0, 1] += torch.arange(7.0)
    assert loss(answers=elsewhere) == pytest.approx(0, abs=1e-6)  # no mask stands there
    assert loss(answers=masked) > 0.1


def test_a_student_of_another_teacher_is_refused(recipe, tiny_source):
    with pytest.raises(ValueError, match="not converted from this teacher"):
        distill(recipe, [f"model.teacher={wider(tiny_source)}"])


def test_a_teacher_of_the_same_size_is_told_apart(encoder_recipe, tiny_source, tmp_path):
    other = tiny_source()
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(other)).save_pretrained(other)
    with pytest.raises(ValueError, match=r"has other word_embeddings than the teacher .* not converted from this"):
        distill(encoder_recipe, [f"model.teacher={other}"])
    with pytest.raises(ValueError, match=r"lacks weights that the teacher has: classifier\.bias"):
        distill(encoder_recipe, [f"model.teacher={tiny_source('BertForSequenceClassification')}"])
    assert not (tmp_path / "run").exists()


def test_a_student_whose_classes_have_another_order_is_refused(tiny_source, tmp_path):
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    teacher = str(tiny_source("BertForSequenceClassification", **labels))
    student = convert(teacher, tmp_path / "student", projected_length=12)
    section, source = DistillModel(student=str(student), teacher=teacher), read_source(teacher)
    assert load_student(section, source)[0].config.id2label == labels["id2label"]
    (student / "checksums.json").unlink()
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (student / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has the classes yes, no, the teacher .* no, yes"):
        load_student(section, source)


def test_positions_that_were_extended_otherwise(encoders, encoder_recipe, tmp_path):
    for positions in ("repeat", "interpolate"):
        convert(str(encoders[0]), tmp_path / positions, projected_length=12, max_length=64, positions=positions)
    options = [f"model.student={tmp_path / 'interpolate'}", "training.max_steps=2"]
    with pytest.raises(ValueError, match=r"other position_embeddings .* set model\.positions"):
        distill(encoder_recipe, options)
    folder = distill(encoder_recipe, [*options, "model.positions=interpolate"])
    found = json.loads((folder / "fidelity.json").read_text())
    assert list(found["lengths"])[-1] == "64"
    assert found["source_difference"] < 1e-5


def test_dropout_is_off_while_training_and_saved_again(tiny_source, tmp_path):
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4}
    source = tiny_source("BertForSequenceClassification", **rates)
    convert(str(source), tmp_path / "student", projected_length=12)
    section = DistillModel(str(tmp_path / "student"), str(source))
    student, kept = load_student(section, read_source(str(source)))
    assert kept == rates
    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        assert torch.equal(student.train()(ids).logits, student.eval()(ids).logits)


@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"]
)
def test_task_heads(head, tiny_source, texts, tmp_path):
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4}
    source = tiny_source(f"Bert{head}", **rates)
    student = convert(str(source), tmp_path / "student", projected_length=12, length_correction=True)
    folder = distill(write_recipe((source, student), texts, tmp_path), LEARNING)
    found = json.loads((folder / "results.json").read_text())
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in rates} == rates
    assert config["architectures"] == [f"Linformer{head}"]


def test_bfloat16_trains_and_the_report_is_float32s(encoder_recipe):
    """Trainer wraps the model's forward in autocast for good; inputs of K = 12 tokens would no longer be exact."""
    folder = distill(encoder_recipe, ["training.bf16=true", "training.max_steps=2"])
    found = json.loads((folder / "results.json").read_text())
    assert (found["dtype"], found["fidelity"]["dtype"]) == ("bfloat16 autocast", "float32")
    assert found["fidelity"]["lengths"]["12"]["final_error"] < 1e-5


def test_rows_that_are_seldom_full_and_one_to_validate_on(encoder_recipe):
    """The report needs rows of exactly N tokens, which whole sentences seldom fill."""
    options = ["data.packing=full_sentences", "distillation.validation_rows=1", "training.max_steps=2"]
    found = json.loads((distill(encoder_recipe, options) / "fidelity.json").read_text())
    assert found["lengths"]["48"]["genres"]["python topics"]["rows"] == 1


def test_a_frozen_student_has_nothing_to_train(encoders, encoder_recipe, tmp_path):
    convert(str(encoders[0]), tmp_path / "bare", projected_length=12, projection_type="mean_pool")
    with pytest.raises(ValueError, match=r"Convert it with --calibrate, or set distillation\.trainable=encoder"):
        distill(encoder_recipe, [f"model.student={tmp_path / 'bare'}"])
    student = load_student(DistillModel(str(tmp_path / "bare"), ""), read_source(str(encoders[0])))[0]
    choose_trainable(student, "encoder")
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if name.startswith("encoder.layer.")}


def outputs(states, **answers):
    return SimpleNamespace(hidden_states=(states, states), **answers)


def test_the_loss_of_a_batch_without_a_masked_token_is_finite():
    states, logits = torch.ones(1, 4, 2), torch.zeros(1, 4, 3)
    loss = distillation_loss(
        outputs(states, logits=logits),
        outputs(states, logits=logits),
        torch.ones(1, 4),
        torch.full((1, 4), -100),
        Distillation(),
    )
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_answers_at_padding_do_not_count():
    states, mask = torch.ones(2, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    goal, same = torch.zeros(2, 4), torch.zeros(2, 4)
    same[1, 2:] = 9
    other = same.clone()
    other[1, 0] = 2

    def loss(given):
        pair = (outputs(states, start_logits=logits, end_logits=goal) for logits in (given, goal))
        return float(distillation_loss(*pair, mask, None, Distillation()))

    assert loss(same) == pytest.approx(0, abs=1e-6)
    # KL of (1/2, 1/2) from softmax(2, 0), over two rows
    expected = 0.5 * sum(math.log(0.5 / q) for q in torch.tensor([2.0, 0.0]).softmax(0).tolist()) / 2
    assert loss(other) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distillation.trainabel=encoder", "Did you mean 'trainable'?"),
        ("distillation.trainable=all", "must be one of shortening, encoder"),
        ("distillation.hidden_weight=-1", "at least 0"),
        ("data.sequence_length=49", "data.sequence_length=49 is longer than the student reads (48)"),
        ("data.streaming=true", "data.streaming"),
        ("model.student=nowhere", "'nowhere' cannot be loaded"),
        ("model.teacher=nowhere", "'nowhere' cannot be loaded"),
        ("data.sources.0.path=nowhere", "no files at 'nowhere'"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_folder(override, words, encoder_recipe, tmp_path, capsys):
    options = [override, "data.tokenizer=x"] if "streaming" in override else [override]
    assert cli.main(["distill", str(encoder_recipe), *options]) == 2
    written = capsys.readouterr().err
    last = written.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in written
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone(encoder_recipe, capsys):
    options = ["training.max_steps=1"]
    assert cli.main(["distill", str(encoder_recipe), *options]) == 0
    assert cli.main(["distill", str(encoder_recipe), *options, "--resume"]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def wider(tiny_source):
    """A teacher with another vocabulary."""
    folder = tiny_source()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer) + 1,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=48,
        )
    ).save_pretrained(folder)
    return folder


def test_a_misspelt_key_is_refused(recipe):
    with pytest.raises(RecipeError, match="trainable"):
        read_recipe(recipe, ["distillation.trainabel=encoder"])
    with pytest.raises(RecipeError, match="validation_rows must be at least 1"):
        read_recipe(recipe, ["distillation.validation_rows=0"])


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("reach", [1, 2], ids=["all of N", "half of N"])
def test_the_teacher_of_a_long_row_is_the_source_over_windows(head, reach, tiny_source):
    """Every token has the states of the window in whose midst it stands; padding has 0."""
    source = read_source(str(tiny_source(head)))
    n, window = source.length, source.length // reach
    if reach > 1:  # a sentence encoder that was last trained on shorter texts
        sentence = sentence_head.pooled("mean", source.config["hidden_size"])
        source = replace(source, sentence=replace(sentence, length=window))
    teacher = exact_twin(source, 3 * n, "repeat")
    ids = torch.arange(3 * n)[None] % 20 + 5
    ids = torch.cat([ids, ids.roll(1)])
    mask = torch.ones_like(ids)
    mask[1, : n + 3] = 0  # padding on the left
    read = read_windows(teacher, {"input_ids": ids, "attention_mask": mask}, source)
    assert len(read.hidden_states) == source.config["num_hidden_layers"] + 1
    for i, row in enumerate([ids[0], ids[1, n + 3 :]]):
        windows = Windows.over(len(row), window)
        with torch.no_grad():
            alone = teacher(windows.split(row[None]), output_hidden_states=True)
        for whole, part in zip(read.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(whole[i, mask[i] == 1], windows.join(part)[0])
            assert not whole[i, mask[i] == 0].any()
        if head == "BertForMaskedLM":
            torch.testing.assert_close(read.logits[i, mask[i] == 1], windows.join(alone.logits)[0])
    if head == "BertForSequenceClassification":
        assert read.logits is None
    short = {"input_ids": ids[:, :n], "attention_mask": mask[:, :n].clone().fill_(1)}
    with torch.no_grad():
        plain = teacher(**short, output_hidden_states=True)
    assert torch.equal(read_windows(teacher, short, source).hidden_states[-1], plain.hidden_states[-1])


def test_a_sentence_encoders_windows_are_those_of_its_texts(tiny_source, texts, tmp_path, monkeypatch):
    """As in `convert`, and whatever length the student's own folder says."""
    source, read = tiny_source(), set()
    sentence_head.pooled("mean", 24).write(source, 12)
    student = convert(str(source), tmp_path / "student", projected_length=12, max_length=64, length_correction=True)

    def watched(teacher, inputs, source):
        read.add(source.reach)
        return read_windows(teacher, inputs, source)

    monkeypatch.setattr("linformer_hf.training.distill.read_windows", watched)
    folder = distill(write_recipe((source, student), texts, tmp_path), ["training.max_steps=1"])
    assert read == {12}
    for each in (student, folder):
        told = json.loads((each / "sentence_bert_config.json").read_text())
        assert told["max_seq_length"] == 64
    found = json.loads((folder / "fidelity.json").read_text())
    assert (found["source_length"], found["window"]) == (48, 12)


@pytest.mark.parametrize("part", [ONLY_SEARCH, ONLY_PIECES], ids=["passages", "pieces"])
def test_a_rows_vector_learns_from_its_text_alone(pair, recipe, part):
    """To be found by the row's passages, or to be the mean of its pieces' vectors."""
    folder = distill(recipe, [*part, *LEARNING])
    history = json.loads((folder / "results.json").read_text())["history"]
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert losses[-1] < 0.97 * losses[0]
    names = changed(weights(pair[1]), weights(folder))
    assert names
    assert all(".projection." in name or ".correction." in name for name in names)


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        ([*SEARCH, "training.per_device_train_batch_size=1"], RecipeError, "must be at least 2, got 1"),
        (ONLY_SEARCH[5:], RecipeError, "search.weight too: nothing is left to learn"),
        ([*ONLY_PIECES, "distillation.pieces=[4]"], RecipeError, r"at least 8 tokens, got \[4\]"),
        ([*ONLY_PIECES, "distillation.pieces=[8, 50]"], ValueError, r"pieces=\[8, 50\]: the source reads at most 48"),
        ([*SEARCH, "search.longest=600"], ValueError, "search.longest=600: the source reads passages of at most 46"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(encoder_recipe, overrides, error, told):
    with pytest.raises(error, match=told):
        distill(encoder_recipe, overrides)


@pytest.mark.parametrize("mode", ["cls", "max"])
def test_search_is_for_the_vectors_of_the_students_folder(mode, tiny_source, texts, tmp_path, monkeypatch):
    source = tiny_source()
    student = convert(
        str(source), tmp_path / "student", projected_length=12, length_correction=True, sentence_head=mode
    )
    seen = []

    def look(states, mask, passages, found, scale, vectors, with_pieces):
        seen.append((str(vectors), with_pieces, passages))
        return search_loss(states, mask, passages, found, scale, vectors, with_pieces)

    monkeypatch.setattr("linformer_hf.training.distill.search_loss", look)
    read = []
    head = SentenceHead.__call__
    monkeypatch.setattr(SentenceHead, "__call__", lambda *given: (read.append(head(*given)), read[-1])[1])
    distill(write_recipe((source, student), texts, tmp_path), [*ONLY_SEARCH, "training.max_steps=1"])
    assert {(told, pieces) for told, pieces, _ in seen} == {(mode, mode != "cls")}
    for _, _, passages in seen:
        assert any(passages is vectors for vectors in read)
