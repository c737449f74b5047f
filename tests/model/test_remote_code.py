"""A saved model travels with its code: `trust_remote_code=True` loads every head where this package is not there."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from reference import tiny_batch, tiny_config, tiny_model

import linformer_hf
from helpers import BLOCKER, CODE
from waiting import HANG


HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
AUTO_CLASSES = {
    "LinformerModel": "AutoModel",
    **{f"LinformerFor{head}": f"AutoModelFor{head}" for head in HEADS},
}
# No two folders have the same options, so that each of the code's branches runs from a copy too.
OPTIONS = {
    "LinformerModel": {},
    "LinformerForMaskedLM": {"projection_sharing": "none"},
    "LinformerForSequenceClassification": {"projection_type": "fixed", "num_labels": 3},
    "LinformerForTokenClassification": {"projection_type": "conv", "projection_sharing": "headwise"},
    "LinformerForQuestionAnswering": {"projection_type": "mean_pool", "log_count_bias": True, "boundary_slots": True},
    "LinformerForMultipleChoice": {"projection_type": "max_pool"},
}

# Runs in a process of its own: argv is the saved models' folder and AUTO_CLASSES; writes report.json.
CHILD = (
    f"""
import importlib.util, json, sys
from pathlib import Path
{BLOCKER}
sys.meta_path.insert(0, Blocker)
"""
    + """
try:
    import linformer_hf
except ModuleNotFoundError as error:
    assert "is blocked" in str(error), error
else:
    raise SystemExit("linformer_hf could be imported")

import torch, transformers
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
torch.set_num_threads(1)
report = {}
for name, auto in json.loads(sys.argv[2]).items():
    auto_class = getattr(transformers, auto)
    entry = report[name] = {}
    try:
        auto_class.from_pretrained(folder / name)
        entry["refused"] = None
    except ValueError as error:
        entry["refused"] = str(error)
    model = auto_class.from_pretrained(folder / name, trust_remote_code=True)
    entry["class"], entry["module"] = type(model).__name__, type(model).__module__
    entry["training"] = model.training
    with torch.no_grad():
        outputs = model(**load_file(folder / name / "inputs.safetensors"))
    save_file({key: value.contiguous() for key, value in outputs.items()}, folder / name / "outputs.safetensors")

# A configuration saved with one head, read alone, opens any other head.
config = transformers.AutoConfig.from_pretrained(folder / "LinformerForMaskedLM", trust_remote_code=True)
report["crossed"] = [type(config).__name__]
for auto in json.loads(sys.argv[2]).values():
    built = getattr(transformers, auto).from_config(config, trust_remote_code=True)
    loaded = getattr(transformers, auto).from_pretrained(folder / "LinformerForMaskedLM", trust_remote_code=True)
    assert type(built).__name__ == type(loaded).__name__
    report["crossed"].append(type(loaded).__name__)
report["imported"] = sorted(name for name in sys.modules if name.partition(".")[0] == "linformer_hf")
(folder / "report.json").write_text(json.dumps(report))  # stdout also has the question whether to trust the code
"""
)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    ids, types, mask = tiny_batch()
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    if name == "LinformerForMultipleChoice":
        return {key: tensor[:4].reshape(2, 2, -1) for key, tensor in inputs.items()}
    return inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder for each class, beside its inputs."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("remote")
    torch.set_num_threads(1)
    expected = {}
    for name in AUTO_CLASSES:
        model = tiny_model(getattr(linformer_hf, name), **OPTIONS[name])
        model.save_pretrained(folder / name)
        with torch.no_grad():
            expected[name] = dict(model(**inputs_of(name)).items())
        save_file(inputs_of(name), folder / name / "inputs.safetensors")
    return folder, expected


@pytest.fixture(scope="module")
def report(saved, tmp_path_factory):
    """What the other process says. It costs seconds to start, so there is one for all tests."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1"}
    # -I: no PYTHONPATH, no user site, no script folder on sys.path.
    command = [sys.executable, "-I", "-c", CHILD, str(saved[0]), json.dumps(AUTO_CLASSES)]
    run = subprocess.run(
        command, cwd=elsewhere, env=environment, input="", capture_output=True, text=True, timeout=HANG, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads((saved[0] / "report.json").read_text())


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_the_folder_holds_the_code_files_and_no_others(name, saved):
    files = {path.name for path in (saved[0] / name).iterdir()}
    assert {file for file in files if file.endswith(".py")} == CODE
    assert files - CODE - {"inputs.safetensors", "outputs.safetensors"} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_the_saved_code_is_the_packages_own(name, saved):
    for file in CODE:
        source = os.path.join(os.path.dirname(linformer_hf.__file__), file)
        with open(source, "rb") as ours, open(saved[0] / name / file, "rb") as copy:
            assert copy.read() == ours.read()


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_every_class_loads_without_the_package_and_gives_the_same_bits(name, saved, report):
    from safetensors.torch import load_file

    assert report["imported"] == []
    assert report[name]["class"] == name
    assert report[name]["module"].startswith("transformers_modules.")
    assert report[name]["training"] is False
    outputs = load_file(saved[0] / name / "outputs.safetensors")
    expected = saved[1][name]
    assert outputs.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(outputs[key], tensor), key


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_code_is_not_run_unless_it_is_trusted(name, report):
    assert "trust_remote_code=True" in (report[name]["refused"] or "it was loaded")


def test_a_configuration_saved_with_one_head_opens_every_other(report):
    assert report["crossed"] == ["LinformerConfig", *AUTO_CLASSES]


SUBCLASS = """
from linformer_hf import LinformerForMaskedLM

class Mine(LinformerForMaskedLM):
    pass

class Registered(LinformerForMaskedLM):
    pass

Registered.register_for_auto_class("AutoModelForMaskedLM")
"""


def encoder_decoder(encoder):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=50, is_decoder=True, add_cross_attention=True, **sizes)
    return transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(config))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", ["Mine", "Registered", "encoder-decoder", "configuration"])
def test_no_folder_names_code_that_is_not_there_or_another_class(kind, loaded, tmp_path, monkeypatch):
    """`loaded`: from a folder with the code, whose config.json names every head."""
    (tmp_path / "own_classes.py").write_text(SUBCLASS)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_classes")
    full, target = tmp_path / "full", tmp_path / "target"
    tiny_model(linformer_hf.LinformerForMaskedLM).save_pretrained(full)
    if kind == "encoder-decoder":
        encoder = linformer_hf.LinformerModel.from_pretrained(full) if loaded else tiny_model()
        encoder_decoder(encoder).save_pretrained(target)
    elif kind == "configuration":
        config = linformer_hf.LinformerConfig.from_pretrained(full) if loaded else tiny_config()
        config.save_pretrained(target)
    else:
        subclass = getattr(own, kind)
        (subclass.from_pretrained(full) if loaded else tiny_model(subclass)).save_pretrained(target)
    text = (target / "config.json").read_text()
    named = json.loads(text).get("auto_map", {})
    assert text.count("auto_map") == bool(named)
    assert all((target / f"{name.partition('.')[0]}.py").exists() for name in named.values())
    heads = {"AutoModelForMaskedLM": "own_classes.Registered"} if kind == "Registered" else {}
    config = {} if kind == "encoder-decoder" else {"AutoConfig": "configuration_linformer.LinformerConfig"}
    assert named == config | heads
    sys.modules.pop("own_classes")


def test_a_model_of_ours_in_a_folder_of_its_own_names_every_head_again(tmp_path):
    """Taken out of another model, or made from a configuration that came without code."""
    tiny_model().save_pretrained(tmp_path / "one")
    encoder_decoder(linformer_hf.LinformerModel.from_pretrained(tmp_path / "one")).save_pretrained(tmp_path / "both")
    both = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "both")
    both.encoder.save_pretrained(tmp_path / "again")
    one, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "again"))
    assert set(one["auto_map"]) == {"AutoConfig", *AUTO_CLASSES.values()}
    assert again["auto_map"] == one["auto_map"]
    assert {path.name for path in (tmp_path / "again").iterdir()} >= CODE
