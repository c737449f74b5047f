"""The modules behind a sentence encoder: read, computed, written and sent as sentence-transformers itself does."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import _CACHED_NO_EXIST, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from helpers import BLOCKER
from hub_server import Hub, run_python
from linformer_hf import cli
from linformer_hf.conversion.convert import convert
from linformer_hf.conversion.huggingface import _sentence
from linformer_hf.conversion.sources import ConversionError
from linformer_hf.hub.push import PushError, read_folder
from linformer_hf.hub.sentence_head import pooled, read
from linformer_hf.utils.files import read_json


TEXTS = ["the old River walked", "a garden", "Zoë stood under the stone"]
K = 24
PROMPTS = {"query": "the letter: ", "document": "a window: "}
# Argv: JSON lists of names and of texts, and the folder for what they give.
ENCODE = (
    BLOCKER
    + """
import json, sys, warnings
from pathlib import Path

sys.meta_path.insert(0, Blocker)
warnings.simplefilter("error", FutureWarning)

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

torch.set_num_threads(1)
names, texts = map(json.loads, sys.argv[1:3])
for number, name in enumerate(names):
    encoder = SentenceTransformer(name, device="cpu", trust_remote_code=True)
    vectors = {"vectors": encoder.encode(texts, convert_to_tensor=True)}
    vectors["queries"] = encoder.encode_query(texts, convert_to_tensor=True)
    save_file(vectors, Path(sys.argv[3], f"{number}.safetensors"))
    assert type(encoder[0].auto_model).__module__.startswith("transformers_modules.")
    print(encoder.max_seq_length)
"""
)
# Argv: the folder between.
CONVERT = """
import sys

from linformer_hf.conversion.convert import convert
from linformer_hf.conversion.huggingface import _sentence
from linformer_hf.conversion.sources import ConversionError
from linformer_hf.hub.push import push

convert("them/encoder", sys.argv[1], projected_length=24)
push(sys.argv[1], "jane/model")
"""


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def made(tiny_source, tmp_path_factory):
    """Saves a random sentence encoder (N = 48, 24 channels): pooling, further modules -> folder."""
    source = str(tiny_source())

    def save(pooling="mean", dense=None, normalize=False, lower=False, **more):
        torch.manual_seed(1)
        modules = [Transformer(source), Pooling(24, pooling)]
        modules += [Dense(modules[1].pooling_output_dimension, 10, **dense)] if dense is not None else []
        modules += [Normalize()] if normalize else []
        folder = tmp_path_factory.mktemp("sentence") / "encoder"
        SentenceTransformer(modules=modules, device="cpu", **more).save(str(folder))
        if lower:  # as older versions have written it; today's writes it into the tokenizer
            change(folder / "sentence_bert_config.json", do_lower_case=True)
        return folder

    return save


HEADS = {
    "mean": {},
    "max": {"pooling": "max"},
    "cls, normalised": {"pooling": "cls", "normalize": True},
    "last token": {"pooling": "lasttoken"},
    "weighted": {"pooling": "weightedmean"},
    "by the root": {"pooling": "mean_sqrt_len_tokens"},
    "two, not in the flags' order": {"pooling": ("mean", "cls")},
    "dense": {"dense": {}, "normalize": True, "lower": True},
    "dense, no bias": {"dense": {"bias": False, "activation_function": torch.nn.Identity()}},
    "prompts": {"prompts": PROMPTS, "similarity_fn_name": "dot", "normalize": True},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_it_computes_and_writes_what_sentence_transformers_does(made, options, tmp_path):
    folder = made(**options)
    theirs = SentenceTransformer(str(folder), device="cpu")
    head = read(folder)
    states = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    features = {"token_embeddings": states, "attention_mask": mask}
    with torch.no_grad():
        for module in list(theirs)[1:]:
            features = module(features)
        torch.testing.assert_close(head(states, mask), features["sentence_embedding"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(head(states)[:1], head(states, mask)[:1], rtol=1e-6, atol=1e-6)

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path in [*copy.glob("*_*/"), *copy.glob("*sentence*.json")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    head.write(copy, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SentenceTransformer(str(copy), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS), theirs.encode(TEXTS), rtol=0, atol=0)
    assert (again.prompts, again.similarity_fn_name) == (theirs.prompts, theirs.similarity_fn_name)
    assert again[0].do_lower_case == options.get("lower", False)
    assert str(read(copy)) == str(head)


def test_the_files_are_what_every_server_reads(made, tmp_path):
    read(made(pooling="cls", dense={}, normalize=True, prompts=PROMPTS)).write(tmp_path, 96)
    found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.json")}
    content = {name: json.loads(path.read_text()) for name, path in found.items()}
    assert [(one["path"], one["type"]) for one in content["modules.json"]] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Dense", "sentence_transformers.models.Dense"),
        ("3_Normalize", "sentence_transformers.models.Normalize"),
    ]
    assert content["1_Pooling/config.json"] == {
        "word_embedding_dimension": 24,
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
        "pooling_mode": "cls",
    }
    assert content["sentence_bert_config.json"] == {"max_seq_length": 96, "do_lower_case": False}
    assert content["config_sentence_transformers.json"] == {
        "prompts": PROMPTS,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    assert content["2_Dense/config.json"]["activation_function"] == "torch.nn.modules.activation.Tanh"


def test_flags_alone_are_read(made):
    folder = made()
    config = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    assert str(read(folder)) == "cls"
    config = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    assert str(read(folder)) == "cls and mean"


def clean_vectors(names, hub, place: Path) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """What each name gives in a process without this package, and the most tokens that it reads."""
    place.mkdir(exist_ok=True)
    arguments = [json.dumps([str(name) for name in names]), json.dumps(TEXTS), str(place)]
    ran = run_python(ENCODE, *arguments, hub=hub, home=place / "home", package=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "WARN" not in ran.stderr.upper()
    given = [load_file(place / f"{number}.safetensors") for number in range(len(names))]
    return given, [int(length) for length in ran.stdout.split()]


def check_vectors(given: dict[str, torch.Tensor], folder: Path) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu")
    longest = max(len(ids) for ids in theirs.tokenizer([PROMPTS["query"] + text for text in TEXTS])["input_ids"])
    assert longest <= K
    for name, encode in (("vectors", theirs.encode), ("queries", theirs.encode_query)):
        assert torch.equal(given[name], encode(TEXTS, convert_to_tensor=True))


def test_a_clean_process_gets_the_sources_own_vectors_bit_for_bit(made, texts, tmp_path):
    folders = [made(normalize=True), made(pooling="cls", lower=True), made(pooling=("mean", "max"), dense={})]
    for number, (folder, length) in enumerate(zip(folders, (48, 96, 48), strict=True)):
        output = tmp_path / str(number)
        options = {"projected_length": K, "max_length": length, "calibrate": str(texts), "calibration_rows": 8}
        convert(str(folder), output, **options)
    with Hub() as hub:
        given, lengths = clean_vectors([tmp_path / str(number) for number in range(3)], hub, tmp_path / "given")
        assert not hub.requests
    assert lengths == [48, 96, 48]
    for vectors, folder in zip(given, folders, strict=True):
        check_vectors(vectors, folder)


def test_from_the_hub_to_the_hub(made, tmp_path):
    folder, output = made(pooling="max", dense={}, normalize=True, prompts=PROMPTS), tmp_path / "linformer"
    sent = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Hub() as hub:
        hub.create("them/encoder", {**sent, "onnx/model.onnx": b"large", "2_Dense/pytorch_model.bin": b"pickled"})
        home = tmp_path / "home"
        ran = run_python(CONVERT, str(output), hub=hub, home=home, package=True, HF_TOKEN="hf_" + "w" * 34)
        assert ran.returncode == 0, ran.stderr[-3000:]
        asked = [request.path for request in hub.requests if request.path.startswith("/them/encoder/resolve")]
        assert not [path for path in asked if path.endswith((".onnx", ".bin", "README.md"))]
        sent = set(hub.files("jane/model"))
        (given,), _ = clean_vectors(["jane/model"], hub, tmp_path / "given")
    written = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert written - sent == {"checksums.json"}
    check_vectors(given, folder)


def test_the_report_measures_the_folders_own_vectors(made, tmp_path):
    """A random encoder whose first token means little has other means than first states."""
    found = {}
    for pooling in ("mean", "cls"):
        convert(str(made(pooling=pooling, normalize=True)), tmp_path / pooling, projected_length=12)
        found[pooling] = read_json(tmp_path / pooling / "fidelity.json", "")
        assert f"source's folder says ({pooling}, normalised)" in (tmp_path / pooling / "fidelity.md").read_text()
    chosen = tmp_path / "chosen"
    convert(str(made(pooling="mean")), chosen, projected_length=12, sentence_head="cls")
    assert json.loads((chosen / "1_Pooling/config.json").read_text())["pooling_mode"] == "cls"
    longest = {name: content["lengths"]["48"] for name, content in found.items()}
    longest["chosen"] = read_json(chosen / "fidelity.json", "")["lengths"]["48"]
    assert longest["mean"]["final_error"] == longest["cls"]["final_error"]
    assert longest["cls"]["cosine"] == pytest.approx(longest["chosen"]["cosine"], abs=1e-6)
    assert longest["cls"]["cosine"] < longest["mean"]["cosine"] - 1e-3


def test_no_head_where_there_is_none(tiny_source, made, tmp_path):
    assert read(tiny_source()) is None
    folder = made()
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listed[:1]))  # as a cross-encoder is saved
    assert read(folder) is None
    convert(str(folder), tmp_path / "plain", projected_length=12)
    convert(str(made()), tmp_path / "none", projected_length=12, sentence_head="none")
    for name in ("plain", "none"):
        assert not list((tmp_path / name).glob("*entence*")) + list((tmp_path / name).glob("1_*"))
        assert "library_name: transformers" in (tmp_path / name / "README.md").read_text()
        assert "means over tokens" in (tmp_path / name / "fidelity.md").read_text()


def test_the_card_says_how_to_encode(made, tmp_path):
    convert(str(made(pooling="cls", prompts=PROMPTS)), tmp_path / "prompts", projected_length=12)
    text = (tmp_path / "prompts" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name) == ("sentence-similarity", "sentence-transformers")
    assert {"linformer", "sentence-transformers", "feature-extraction"} <= set(data.tags)
    order = ["- `query`: `the letter: `", "SentenceTransformer(name, revision=commit, trust_remote_code=True)"]
    order += ["states of the tokens: cls.", "AutoModel.from_pretrained(name"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    card = read_folder(tmp_path / "prompts", "jane/model")["README.md"].decode()
    assert "encoder.encode_document(" in card
    assert card.count('name = "jane/model"') == 2
    convert(str(made()), tmp_path / "plain", projected_length=12)
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "prompt" not in text
    assert "encoder.encode(" in text


def other_module(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["type"] = "sentence_transformers.models.LSTM"
    (folder / "modules.json").write_text(json.dumps(listed))


def foreign_module(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["type"] = "pylate.models.Pooling"
    (folder / "modules.json").write_text(json.dumps(listed))


def no_pooling(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([listed[0], listed[2]]))


def outside(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = "../1_Pooling"
    (folder / "modules.json").write_text(json.dumps(listed))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "2_Dense/model.safetensors"), folder / "2_Dense/pytorch_model.bin")
    (folder / "2_Dense/model.safetensors").unlink()


def narrow(folder: Path) -> None:
    weights = {"linear.weight": torch.ones(10, 23), "linear.bias": torch.ones(10)}
    save_file(weights, folder / "2_Dense/model.safetensors")


def wide(folder: Path) -> None:
    """Whole in itself, behind a pooling of 24 channels."""
    change(folder / "2_Dense/config.json", in_features=48)
    save_file(
        {"linear.weight": torch.ones(10, 48), "linear.bias": torch.ones(10)}, folder / "2_Dense/model.safetensors"
    )


def config(name: str, **fields):
    return lambda folder: change(folder / name, **fields)


BAD = {
    "another module": (other_module, ["LSTM", "Pooling, Dense, Normalize"]),
    "a module of others": (foreign_module, ["pylate.models.Pooling"]),
    "no pooling": (no_pooling, ["one pooling", "Dense in '2_Dense'"]),
    "outside": (outside, ["'../1_Pooling'", "outside"]),
    "no such pooling": (config("1_Pooling/config.json", pooling_mode="median"), ["median", "lasttoken"]),
    "pooling of another width": (config("1_Pooling/config.json", word_embedding_dimension=23), ["23"]),
    "dense of another width": (wide, ["2_Dense is 48 to 10", "24 channels"]),
    "other dense weights": (narrow, ["linear.weight [10, 23]", "24 channels"]),
    "pickled dense": (
        pickled,
        ["2_Dense has no model.safetensors", "pickled", ".save(FOLDER)"],
    ),
    "someone's activation": (config("2_Dense/config.json", activation_function="os.system"), ["os.system"]),
    "dense of tokens": (config("2_Dense/config.json", module_input_name="token_embeddings"), ["2_Dense"]),
    "a residual": (config("2_Dense/config.json", use_residual=True), ["use_residual"]),
    "vectors of the encoder": (
        config("sentence_bert_config.json", module_output_name="sentence_embedding"),
        ["in the encoder"],
    ),
    "settings that are none": (
        lambda folder: (folder / "sentence_bert_config.json").write_text("[1]"),
        ["sentence_bert_config.json is damaged"],
    ),
    "damaged": (lambda folder: (folder / "modules.json").write_text("["), ["modules.json is damaged"]),
    "no list": (
        lambda folder: (folder / "modules.json").write_text('{"a": 1, "b": 2}'),
        ["modules.json is damaged", "no list"],
    ),
}


@pytest.mark.parametrize(("harm", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_carried_along_is_one_line(harm, words, made, tmp_path, capsys):
    folder = Path(shutil.copytree(made(dense={}, normalize=True), tmp_path / "source"))
    harm(folder)
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--projected-length", "12"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for text in (*words, "--sentence-head none"):
        assert text in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("harm", ["another module", "pickled dense", "pooling of another width", "damaged"])
def test_push_checks_it_too(harm, made, tmp_path):
    output = convert(str(made(dense={}, normalize=True)), tmp_path / "out", projected_length=12)
    (output / "checksums.json").unlink()
    (output / "onnx").mkdir()
    (output / "onnx" / "model.onnx").write_bytes(b"onnx")
    sent = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert read_folder(output, "jane/model").keys() == sent
    BAD[harm][0](output)
    with pytest.raises(PushError, match=r"delete modules\.json to publish the encoder alone"):
        read_folder(output, "jane/model")


def test_a_head_of_ones_own_choice():
    states = torch.randn(2, 5, 24)
    assert torch.equal(pooled("max", 24)(states), states.amax(1))


def test_without_a_network_no_repository_is_taken_for_one_without_a_pooling(monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("linformer_hf.hub.sentence_head.hf_hub_download", unreachable)
    with pytest.raises(LocalEntryNotFoundError):
        read("them/encoder")
    with pytest.raises(ConversionError, match=r"cannot be asked without a network.*--sentence-head none"):
        _sentence("them/encoder", "source", 24, None)
    monkeypatch.setattr("linformer_hf.hub.sentence_head.try_to_load_from_cache", lambda *_, **__: _CACHED_NO_EXIST)
    assert read("them/encoder") is None  # the Hub has said so before
