"""`linformer-hf export`: what onnxruntime computes from the file is what PyTorch computes from the folder."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from reference import BANDS, name_of, tiny_config, tiny_model
from sentence_transformers import SentenceTransformer
from transformers.modeling_outputs import BaseModelOutput

import linformer_hf
from linformer_hf import cli
from linformer_hf.hub import export
from linformer_hf.hub.sentence_head import pooled


PROJECTIONS = [
    *({"projection_type": "linear", "projection_sharing": s} for s in ("none", "headwise", "key_value", "layerwise")),
    {"projection_type": "linear", "projection_init": "mean_pool", "length_correction": True},
    {"projection_type": "fixed"},
    {"projection_type": "mean_pool", "log_count_bias": True, "boundary_slots": True},
    {"projection_type": "max_pool"},
    {"projection_type": "conv"},
    {"projection_type": "conv", "projection_sharing": "none"},
    {"projection_type": "dense_conv"},
    {"projection_type": "dense_conv", "projection_sharing": "none"},
    {"projection_type": "dense_conv", "projected_length": 8, "local_window": 2},
    {"projection_type": "linear", "projected_length": 8, "local_window": 2},
    {"projection_type": "gated_pool"},
    {"projection_type": "gated_pool", **BANDS[2], "length_correction": True},  # what `convert --calibrate` makes
]
SEQUENCE_HEADS = {
    "LinformerModel": ["last_hidden_state", "pooler_output"],
    "LinformerForSequenceClassification": ["logits"],
    "LinformerForTokenClassification": ["logits"],
    "LinformerForQuestionAnswering": ["start_logits", "end_logits"],
    "LinformerForMultipleChoice": ["logits"],
}
SMALL = {"num_hidden_layers": 1, "projected_length": 4}


def saved(folder, head="LinformerForMaskedLM", **options):
    """A tiny model in `folder`; logits of a learned E are inflated, so its weights start smaller."""
    model = tiny_model(getattr(linformer_hf, head), initializer_range=0.2, **options)
    model.save_pretrained(folder)
    return model


def batch(rows: int, length: int, side: str):
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(length))
    types = torch.randint(0, 2, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        padding = row * length // (rows + 1)
        mask[row, : padding if side == "left" else 0] = 0
        mask[row, length - padding if side == "right" else length :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def run(path, given):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(a) for a in session.run(None, {name: given[name].numpy() for name in given})]


@pytest.mark.parametrize("projection", PROJECTIONS, ids=name_of)
def test_onnxruntime_gives_what_pytorch_gives(projection, tmp_path, caplog):
    # A second layer is one more of the same and doubles the time; where all layers share E it is another case.
    layers = 2 if "layerwise" in projection.values() or "local_window" in projection else 1
    model = saved(tmp_path / "model", num_hidden_layers=layers, **projection)
    with caplog.at_level(logging.INFO):
        path = export.export(tmp_path / "model")
    assert path == tmp_path / "model" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, length, side in ((4, 20, "right"), (3, 7, "left"), (1, 3, "right"), (2, 13, "left"), (5, 1, "right")):
        given = batch(rows, length, side)
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            expected = model(**given).logits
        real = given["attention_mask"].bool()
        torch.testing.assert_close(torch.from_numpy(got)[real], expected[real], atol=1e-4, rtol=1e-4)
    said = [record.getMessage() for record in caplog.records if record.name == "linformer_hf.hub.export"]
    assert len(said) == 2
    assert "largest difference" in said[0]
    assert str(path) in said[1]


def test_a_sentence_encoders_file_is_where_sentence_transformers_looks(tmp_path):
    """Its ONNX backend reads onnx/model.onnx, gives what the tokenizer gives, and takes the first output's states."""
    model = saved(tmp_path, "LinformerModel", projection_type="mean_pool", **SMALL)
    pooled("mean", model.config.hidden_size).write(tmp_path, 20)
    path = export.export(tmp_path)
    assert path == tmp_path / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert session.get_outputs()[0].name == "last_hidden_state"


@pytest.mark.parametrize(("head", "outputs"), SEQUENCE_HEADS.items(), ids=list(SEQUENCE_HEADS))
def test_every_head_has_its_own_outputs(head, outputs, tmp_path):
    model = saved(tmp_path, head, projection_type="mean_pool", **SMALL)
    path = export.export(tmp_path, output=tmp_path / "new" / "graph.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == outputs
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    given = batch(2, 9, "right")
    if head == "LinformerForMultipleChoice":
        given = {name: tensor.repeat(3, 1).view(2, 3, 9) for name, tensor in given.items()}
    with torch.no_grad():
        expected = model(**given)
    real = given["attention_mask"].bool()
    for name, got in zip(outputs, run(path, given), strict=True):
        wanted = expected[name]
        if wanted.shape[:2] == real.shape:
            got, wanted = got[real], wanted[real]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert sorted(p.name for p in path.parent.iterdir()) == ["graph.onnx"]


@pytest.mark.parametrize("types", [0, 1])
def test_inputs_and_outputs_follow_the_model(types, tmp_path):
    """Without token types there is no such input; an encoder saved without a pooler gets no random one."""
    config = tiny_config(projection_type="mean_pool", type_vocab_size=types, **SMALL)
    linformer_hf.LinformerModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(export.export(tmp_path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [one.name for one in session.get_outputs()] == ["last_hidden_state"]


def test_the_command_writes_the_opset_that_was_asked_for(tmp_path, capsys):
    saved(tmp_path, "LinformerForSequenceClassification", projection_type="mean_pool", **SMALL)
    target = tmp_path / "opset.onnx"
    given = ["export", str(tmp_path), "--format", "onnx", "--output", str(target), "--opset", "20"]
    assert cli.main(given) == 0
    assert [one.version for one in onnx.load(target).opset_import if not one.domain] == [20]
    assert capsys.readouterr().err.count("val_") == 0  # the exporter's notes on itself


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    saved(tmp_path, projection_type="mean_pool", **SMALL)
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    write = export._write

    def spoilt(model, inputs, outputs, path, opset):
        write(model, inputs, outputs, path, opset)
        graph = onnx.load(path)
        for one in graph.graph.initializer:
            if list(one.dims) == [20, 16]:  # the positions
                more = onnx.numpy_helper.to_array(one) * np.float32(1.01)
                one.CopyFrom(onnx.numpy_helper.from_array(more, one.name))
        onnx.save(graph, path)

    monkeypatch.setattr(export, "_write", spoilt)
    with pytest.raises(export.ExportError, match="differs from PyTorch by"):
        export.export(tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_way_out(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(export.ExportError, match=rf"{package} not installed: pip install 'linformer_hf\[onnx\]'"):
        export.export(tmp_path)


def test_an_onnxruntime_that_cannot_be_imported_is_said_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libonnxruntime.so')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(export.ExportError, match=r"imported \(libonnxruntime\.so\): pip install --force-reinstall"):
        export.export(tmp_path)


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"format": "gguf"}, "format 'gguf' is not known; there is: onnx"),
        ({}, {"opset": 11}, "opset 11 is too low"),
        ({}, {"opset": 99}, "cannot write opset 99"),
        ({"model_type": "bert"}, {}, "holds a 'bert' model"),
        ({"architectures": ["SomethingElse"]}, {}, "names 'SomethingElse', which is no Linformer head"),
        ({"architectures": None}, {}, "names None"),
        ({"architectures": ["LinformerForQuestionAnswering"]}, {}, "lacks weights of LinformerForQuestionAnswering"),
    ],
    ids=["format", "opset-low", "opset-high", "bert", "head", "no-head", "weights"],
)
def test_what_cannot_be_exported_is_refused(fields, options, message, tmp_path):
    saved(tmp_path, projection_type="mean_pool", **SMALL)
    edited(tmp_path, **fields)
    with pytest.raises(export.ExportError, match=message):
        export.export(tmp_path, **options)
    assert not (tmp_path / "model.onnx").exists()


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not the folder of a saved model")


class Stand(torch.nn.Module):
    """What sentence-transformers' ONNX backend asks of optimum, which cannot be imported beside transformers 5.

    As ORTModelForFeatureExtraction of optimum-onnx 0.1.0: these three inputs, token types of zeros where the graph has
    them and the tokenizer does not, and the output `last_hidden_state`.
    """

    asked: ClassVar[list] = []

    def __init__(self, file, config):
        super().__init__()
        self.config, self._save_pretrained = config, None
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    @classmethod
    def from_pretrained(cls, name, config, export, provider, subfolder="", file_name="model.onnx", **_):
        cls.asked.append((export, subfolder, file_name))
        return cls(Path(name, subfolder, file_name), config)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **_):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if token_type_ids is None:
            given["token_type_ids"] = torch.zeros_like(input_ids)
        names = [one.name for one in self.session.get_inputs()]
        answers = self.session.run(None, {name: given[name].numpy() for name in names})
        found = dict(zip([one.name for one in self.session.get_outputs()], map(torch.from_numpy, answers), strict=True))
        return BaseModelOutput(last_hidden_state=found["last_hidden_state"])


@pytest.mark.parametrize(("mode", "types"), [("mean", 1), ("cls", 2)])
def test_the_backend_of_sentence_transformers_finds_and_reads_the_file(mode, types, tokenizers, tmp_path, monkeypatch):
    optimum = ModuleType("optimum.onnxruntime")
    optimum.ONNX_WEIGHTS_NAME = "model.onnx"
    for task in ("CausalLM", "FeatureExtraction", "MaskedLM", "SequenceClassification"):
        setattr(optimum, f"ORTModelFor{task}", Stand)
    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", optimum)
    monkeypatch.setattr(Stand, "asked", [])
    tokenizer = tokenizers["wordpiece"]
    model = saved(tmp_path, "LinformerModel", **SMALL, vocab_size=len(tokenizer), type_vocab_size=types)
    tokenizer.save_pretrained(tmp_path)
    pooled(mode, model.config.hidden_size).write(tmp_path, model.config.max_position_embeddings)
    export.export(tmp_path)
    assert Stand.asked == []
    texts = ["a river", "the old keeper walked under the stone and over the river", ""]
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    encoder = SentenceTransformer(str(tmp_path), device="cpu", backend="onnx")
    assert Stand.asked == [(False, "onnx", "model.onnx")]
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
