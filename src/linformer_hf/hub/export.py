"""`linformer-hf export FOLDER --format onnx`: a checkpoint as one ONNX graph, checked under onnxruntime.

The graph is the head that the folder's config names, in float32, with a dynamic batch and length. Its inputs are
`input_ids`, `attention_mask` and, where the model has token types, `token_type_ids`; its outputs have the names of the
model's own. Padding is exact in it as it is in the model, on either side. A file that does not give what PyTorch gives
is not left behind.
"""

import importlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import modeling_linformer
from ..configuration_linformer import LinformerConfig
from ..modeling_linformer import LinformerPreTrainedModel
from ..utils.files import loading
from ..utils.options import Export, takes
from .sentence_head import MODULES_FILE


logger = logging.getLogger(__name__)

FORMATS = ("onnx",)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LOWEST_OPSET = 18  # below it, torch's exporter writes 18 and leaves the conversion to luck
# Largest difference from PyTorch, over the largest output (or 1): large logits have fewer decimals.
TOLERANCE = 1e-4
# One vector or number for each token: what stands at padding means nothing and is not compared.
TOKEN_OUTPUTS = ("last_hidden_state", "start_logits", "end_logits")
TOKEN_HEADS = ("LinformerForMaskedLM", "LinformerForTokenClassification")


class ExportError(ValueError):
    """What cannot be exported, or was and differs; the message says what to do."""


class _Graph(nn.Module):
    """The model with the graph's inputs in order and its outputs as a tuple."""

    def __init__(self, model: LinformerPreTrainedModel, outputs: list[str]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        answer = self.model(**given)
        return tuple(answer[name] for name in self.outputs)


@takes(Export)
def export(options: Export) -> Path:
    """Write a checkpoint as a file that other runtimes read, and check it.

    Returns:
        The file, of a sentence encoder where sentence-transformers looks for it. An existing one is replaced once the
        new one has passed the check. Weights beyond ONNX's 2 GB go into
        a second file beside it, `<output>.data`.

    Raises:
        ExportError: the format is unknown, a package is missing, the folder's head or weights are not there, the
            exporter fails, or the file does not give what PyTorch gives (then none is left).
        OSError: the folder or the output cannot be read or written.
    """
    folder, opset = options.folder, options.opset
    if options.format not in FORMATS:
        raise ExportError(f"format {options.format!r} is not known; there is: {', '.join(FORMATS)}.")
    if opset is not None and opset < LOWEST_OPSET:
        raise ExportError(f"opset {opset} is too low: the exporter writes {LOWEST_OPSET} or later.")
    _check_packages()
    target = Path(options.output or Path(folder, "onnx" if Path(folder, MODULES_FILE).exists() else "", "model.onnx"))
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file, such as {target / 'model.onnx'}.")
    model = load(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, under its name: a file with external weights holds the name of the second file.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        written = Path(beside, target.name)
        inputs, outputs = signature(model)
        _write(model, inputs, outputs, written, opset)
        difference = largest_difference(model, inputs, outputs, written)
        if not difference <= TOLERANCE:  # also NaN
            raise ExportError(
                f"onnxruntime differs from PyTorch by {difference:.1e}, more than {TOLERANCE:.0e}; no file is left. "
                "Another --opset may help."
            )
        for path in sorted(written.parent.iterdir(), reverse=True):  # weights before the graph that names them
            path.replace(target.parent / path.name)
    logger.info("largest difference between onnxruntime and PyTorch: %.1e (allowed: %.0e)", difference, TOLERANCE)
    logger.info("%s is in %s (%.1f MB)", type(model).__name__, target, target.stat().st_size / 1e6)
    return target


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} not installed: pip install 'linformer_hf[onnx]'.")
    try:  # its library may be of another machine; better known before the graph is made than after
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(
            f"onnxruntime is installed and cannot be imported ({error}): pip install --force-reinstall onnxruntime."
        ) from error


def load(folder: str | os.PathLike) -> LinformerPreTrainedModel:
    """The head that the folder's config names, in evaluation mode and float32.

    Raises:
        ExportError: config.json is not a Linformer's, or names no head of this family, or weights are missing.
        OSError: there is no such checkpoint.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ExportError(f"{folder} is not the folder of a saved model: it has no config.json.")
    with loading(str(folder)):
        raw, _ = LinformerConfig.get_config_dict(folder)
    if raw.get("model_type") != LinformerConfig.model_type:
        raise ExportError(f"{folder} holds a {raw.get('model_type')!r} model, not a Linformer; convert it first.")
    named = (raw.get("architectures") or [None])[0]
    if named not in modeling_linformer.__all__ or named == "LinformerPreTrainedModel":
        raise ExportError(f"architectures in {folder}/config.json names {named!r}, which is no Linformer head.")
    # eager: decomposing sdpa, the exporter loses the strides of a banded layer's output and then cannot reshape it.
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True}
    with loading(str(folder)):
        model_class = getattr(modeling_linformer, named)
        model, found = model_class.from_pretrained(folder, output_loading_info=True, **options)
    missing = set(found["missing_keys"])
    pooler = {name for name in missing if name.startswith("pooler.")}
    if missing - pooler or (pooler and named != "LinformerModel"):
        raise ExportError(f"{folder} lacks weights of {named}: {', '.join(sorted(missing))}.")
    if pooler:  # an encoder saved without one: a random pooler is no output
        model.pooler = None
    return model.eval()


def signature(model: LinformerPreTrainedModel) -> tuple[list[str], list[str]]:
    """The names of the graph's inputs and outputs."""
    inputs = ["input_ids", "attention_mask"]
    if model.config.type_vocab_size > 1:
        inputs.append("token_type_ids")
    if type(model).__name__ == "LinformerForQuestionAnswering":
        return inputs, ["start_logits", "end_logits"]
    if type(model).__name__ == "LinformerModel":
        return inputs, ["last_hidden_state", *(["pooler_output"] if model.pooler is not None else [])]
    return inputs, ["logits"]


def example(model: LinformerPreTrainedModel, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of `rows` rows: the first is full, then padding stands right, left, right, ..."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    shape = [rows, 2, length] if type(model).__name__ == "LinformerForMultipleChoice" else [rows, length]
    mask = torch.ones(shape, dtype=torch.long)
    for number, row in enumerate(mask.view(-1, length)):
        padding = 0 if number == 0 else (length * (1 + number % 3)) // 4
        row[: padding if number % 2 == 0 else 0] = 0
        row[length - padding if number % 2 else length :] = 0
    drawn = {"input_ids": config.vocab_size, "token_type_ids": max(config.type_vocab_size, 1)}
    ids = {name: torch.randint(0, most, shape, generator=generator) for name, most in drawn.items()}
    return {"input_ids": ids["input_ids"], "attention_mask": mask, "token_type_ids": ids["token_type_ids"]}


def _write(
    model: LinformerPreTrainedModel, inputs: list[str], outputs: list[str], path: Path, opset: int | None
) -> None:
    longest = model.config.max_position_embeddings
    if longest < 4:
        raise ExportError(f"max_position_embeddings={longest} leaves no room for a dynamic length (at least 4).")
    given = {name: tensor for name, tensor in example(model, 3, longest // 2 + 1).items() if name in inputs}
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if given["input_ids"].dim() == 3:
        axes[1] = torch.export.Dim("choices", min=1)
    axes[given["input_ids"].dim() - 1] = torch.export.Dim("length", min=2, max=longest)
    with _quiet():
        try:
            program = torch.onnx.export(
                _Graph(model, outputs).eval(),
                (),
                kwargs=given,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamic_shapes=dict.fromkeys(inputs, axes),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = error.__cause__ or error
            raise ExportError(f"torch's ONNX exporter failed: {reason}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():  # the exporter notes which files of this machine each comes from
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    written = program.model.opset_imports.get("")
    if opset is not None and written != opset:
        raise ExportError(f"the exporter cannot write opset {opset}: the graph came out with opset {written}.")
    program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on itself: a line for every node it merges, absent torchvision, deprecated calls."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in noisy]
    for one in noisy:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(noisy, levels, strict=True):
            one.setLevel(level)


def shapes(model: LinformerPreTrainedModel) -> list[tuple[int, int]]:
    """Batches to check, (rows, tokens): around each layer's K and the band's blocks, the shortest and the longest."""
    longest = model.config.max_position_embeddings
    keys = sorted(set(model.config.projected_lengths))
    lengths = [1, 2, longest // 3, longest - 1, *keys, *(k + 1 for k in keys)]
    lengths = sorted({length for length in lengths if 0 < length <= longest})
    return [(1, longest), *((1 + number % 4, length) for number, length in enumerate(lengths))]


@torch.no_grad()
def largest_difference(model: LinformerPreTrainedModel, inputs: list[str], outputs: list[str], path: Path) -> float:
    """Between onnxruntime and PyTorch over `shapes`, relative to the largest output or 1; NaN if one is not finite.

    Raises:
        ExportError: onnxruntime cannot load or run the file.
    """
    import onnxruntime

    differences = [0.0]
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for number, (rows, length) in enumerate(shapes(model)):
            given = {name: tensor for name, tensor in example(model, rows, length, number).items() if name in inputs}
            answers = session.run(outputs, {name: tensor.numpy() for name, tensor in given.items()})
            expected = model(**given)
            for name, answer in zip(outputs, answers, strict=True):
                got, wanted = torch.from_numpy(answer), expected[name]
                if got.shape != wanted.shape:
                    raise ExportError(f"{name} has shape {list(got.shape)}, but PyTorch gives {list(wanted.shape)}.")
                if name in TOKEN_OUTPUTS or type(model).__name__ in TOKEN_HEADS:
                    real = given["attention_mask"].bool()
                    got, wanted = got[real], wanted[real]
                if not bool(got.isfinite().all()):
                    return float("nan")
                differences.append(float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)))
    except ExportError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise ExportError(f"onnxruntime cannot run the exported graph: {error}") from error
    return max(differences)
