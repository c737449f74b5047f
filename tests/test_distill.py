"""`linformer-hf distill`: what is trained, what the loss is, and that a resumed run is the uninterrupted one."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from linformer_hf.convert import convert
from linformer_hf.distill import Distillation, distill, distillation_loss, read_recipe
from linformer_hf.recipe import RecipeError


@pytest.fixture(scope="module", params=["BertModel", "BertForMaskedLM"])
def pair(request, tiny_source, texts, tmp_path_factory):
    """A teacher and its converted, calibrated student."""
    source, output = tiny_source(request.param), tmp_path_factory.mktemp("student") / "student"
    return source, convert(str(source), output, projected_length=12, calibrate=str(texts), calibration_rows=4)


@pytest.fixture
def recipe(pair, texts, tmp_path):
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
            "learning_rate": 0.001,
            "logging_steps": 4,
            "eval_strategy": "steps",
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


@pytest.mark.parametrize("trainable", ["shortening", "encoder"])
def test_it_learns_and_trains_what_it_says(pair, recipe, trainable):
    folder = distill(recipe, [f"distillation.trainable={trainable}"])
    found = json.loads((folder / "results.json").read_text())
    losses = [row["eval_loss"] for row in found["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0]
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


def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path):
    whole = distill(recipe)
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
        distill(recipe, [halves])
    patch.undo()
    assert (tmp_path / "halves" / "checkpoint-4").is_dir()
    assert not (tmp_path / "halves" / "results.json").exists()
    resumed = distill(recipe, [halves], resume=True)
    assert changed(weights(whole), weights(resumed)) == set()


def test_accumulation_gives_the_update_of_one_large_batch(pair, recipe, tmp_path):
    steps = ["training.max_steps=2", 'training.save_strategy="no"', 'training.eval_strategy="no"', "training.optim=sgd"]
    steps += ["training.max_grad_norm=0", "training.lr_scheduler_type=constant", "training.learning_rate=1.0"]
    folders = []
    for name, size, accumulation in (("one", 4, 1), ("two", 2, 2)):
        place = tmp_path / name
        more = [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}"]
        folders.append(distill(recipe, [*steps, *more, f"training.output_dir={place}"]))
    start, one, two = (weights(folder) for folder in (pair[1], *folders))
    name = next(name for name in start if name.endswith("layer.1.attention.output.correction.weight"))
    move, other = one[name] - start[name], two[name] - start[name]
    # The loss is relative to each batch's norm, so halves agree nearly, not to the bit; a trap would double the move.
    assert float((move - other).norm() / move.norm()) < 0.2


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


def wider(tiny_source):
    """A teacher with another vocabulary."""
    from transformers import AutoTokenizer, BertConfig, BertModel

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
