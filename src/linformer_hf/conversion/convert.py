"""`linformer-hf convert SOURCE OUTPUT`: make a pretrained BERT or RoBERTa a Linformer, and say how faithful it is.

The defaults are what measured best for its cost (docs/results/fidelity.md has the table): `gated_pool`, a quarter of
the K keys as slots for the whole input and three quarters as the band of single tokens around the query, slots of their
own for the first and the last token and, with `--calibrate`, the closed-form calibration of `calibrate.py`. Rows of at
most K tokens are exact.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ..configuration_linformer import POOLED_TYPES
from ..hub.card import write_card
from ..modeling_linformer import LinformerPreTrainedModel
from ..utils import checksums
from ..utils.environment import environment
from ..utils.files import RESULTS_FILE, write_json
from ..utils.runs import show
from . import fidelity
from .calibrate import calibrate as calibrate_layers
from .huggingface import read_source
from .shorten import exact_twin, shortened
from .sources import ConversionError, Source
from .texts import TextRows, text_rows


logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 131_072
HELD_OUT_ROWS, HELD_OUT_TOKENS = 48, 32_768


def default_projection(
    projected_length: int | list[int],
    projection_type: str = "gated_pool",
    projection_sharing: str | None = None,
    local_window: int | None = None,
    length_correction: bool = False,
) -> dict[str, Any]:
    """Fields of LinformerConfig for a conversion; what is None gets the value that measured best."""
    fields: dict[str, Any] = {"projection_type": projection_type, "projected_length": projected_length}
    smallest = projected_length if isinstance(projected_length, int) else min(projected_length)
    if projection_type in POOLED_TYPES:
        fields["boundary_slots"] = smallest >= 3
        fields["log_count_bias"] = projection_type != "gated_pool"
    else:
        fields["projection_init"] = "mean_pool"  # from windows; nothing is regained in minutes from random E, F
    if projection_sharing is not None:
        fields["projection_sharing"] = projection_sharing
    if local_window is None:
        quarter = smallest // 4
        local_window = quarter if projection_type == "gated_pool" and smallest - 3 * quarter >= 3 else 0
    if local_window or projection_type == "gated_pool":
        fields["local_window"] = local_window
    return fields | {"length_correction": length_correction}


def convert_model(
    source: Source,
    max_length: int | None = None,
    positions: Literal["repeat", "interpolate"] = "repeat",
    rows: list[torch.Tensor] | None = None,
    twin: LinformerPreTrainedModel | None = None,
    strength: float = 0.3,
    **projection: Any,
) -> LinformerPreTrainedModel:
    """A source, read by `read_source`, as a Linformer.

    Args:
        max_length: N (default: the source's); above the source's own, positions are extended as `positions` says.
        rows: token ids to calibrate on, each [n] with K < n <= N; without them nothing is calibrated.
        twin: `exact_twin` of the same length, if there is one already.
        strength: of the calibration's ridge.
        projection: fields of LinformerConfig; see `default_projection`.

    Returns:
        The model in evaluation mode, float32.

    Raises:
        ConversionError, ValueError: the options do not fit; the message names the value, the limit and the way out.
    """
    length = source.length if max_length is None else max_length
    if source.projection:  # an official Linformer brings its own
        if projection:
            raise ConversionError(
                f"{source.name} is a Linformer with {source.projection}; its projection is kept, so leave "
                f"{', '.join(projection)} out."
            )
        model = shortened(source, source.length, positions, source.projection)
        if length != source.length:
            model.resize_position_embeddings(length)
        return model
    fields = {"projected_length": 128, "length_correction": rows is not None, **projection}
    model = shortened(source, length, positions, default_projection(**fields))
    if rows is not None:
        twin = twin or exact_twin(source, length, positions)
        calibrate_layers(twin.base_model, model.base_model, rows, strength)
    return model


def convert(
    source: str,
    output: str | Path,
    *,
    max_length: int | None = None,
    positions: Literal["repeat", "interpolate"] = "repeat",
    calibrate: str | None = None,
    calibration_rows: int | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    **projection: Any,
) -> Path:
    """Convert, measure and write a folder that `from_pretrained` loads.

    Args:
        source: Hub name or folder of a model of one of `key_tables.FAMILIES` (bert, roberta and their kin), or the
            `.pt` file of an official fairseq Linformer.
        output: a folder that does not exist yet, or is empty.
        calibrate: text to calibrate on: a file, a folder or a glob; `hub:NAME`; `demo`, the text of installed packages.
        calibration_rows: rows of N tokens (default: 131,072 tokens' worth).
        tokenizer, revision, cache_dir: as in `read_source` and PretrainingData.
        projection, max_length, positions: as in `convert_model`.

    Returns:
        `output`: weights, tokenizer, code, results.json, fidelity.json, fidelity.md, fidelity.png and a model card.

    Raises:
        FileExistsError: `output` holds something.
        ConversionError, ValueError, OSError: nothing is left behind; the message says what is wrong.
    """
    started = time.time()
    folder = Path(output)
    _check_arguments(folder, calibrate, calibration_rows)
    read = read_source(source, revision, tokenizer)
    length = read.length if max_length is None else max_length
    options = {"max_length": length, "positions": positions, "calibrate": calibrate, "seed": seed, **projection}
    options |= {"calibration_rows": calibration_rows, "tokenizer": tokenizer, "revision": revision}
    report = None
    if read.projection:
        if calibrate:
            raise ConversionError(f"{source} is an exact Linformer already; there is nothing to calibrate.")
        model = convert_model(read, length, positions, **projection)
    else:
        if calibrate:
            projection.setdefault("length_correction", True)
        convert_model(read, length, positions, **projection)  # refuses bad options before any text is read
        texts = _texts(read, calibrate, calibration_rows, length, seed, cache_dir)
        model, report = _shorten(read, texts, length, positions, projection)
    with _whole_folder(folder.resolve()) as beside:  # a link, or the current folder, has another name
        _save(beside, read, model, options, report, started)
    if report is not None:
        show("\n" + fidelity.summary_table(report["lengths"]) + "\n")
    written = RESULTS_FILE if report is None else f"{fidelity.REPORT_FILE} and {RESULTS_FILE}"
    print(f"Converted model, {written}: {folder.resolve()}")
    return folder


def _check_arguments(folder: Path, calibrate: str | None, calibration_rows: int | None) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder. Name another OUTPUT, or delete it.")
    if calibration_rows is not None and not calibrate:
        raise ValueError(f"calibration_rows={calibration_rows} would have no effect without text (--calibrate).")
    if calibration_rows is not None and calibration_rows < 1:
        raise ValueError(f"calibration_rows must be at least 1, got {calibration_rows}.")


def _shorten(
    source: Source,
    texts: TextRows,
    length: int,
    positions: Literal["repeat", "interpolate"],
    projection: dict[str, Any],
) -> tuple[LinformerPreTrainedModel, dict[str, Any]]:
    """The model, calibrated where there are rows for it, and its fidelity report."""
    print(f"Converting {source.name}: {source.architecture}, N = {length}")
    twin = exact_twin(source, length, positions)
    difference = fidelity.check_twin(source, twin, texts.held_out)
    started = time.time()
    model = convert_model(source, length, positions, texts.calibration or None, twin, **projection)
    seconds = time.time() - started if texts.calibration else 0.0
    report = fidelity.report(source, twin, model, texts.held_out, difference)
    return model, report | {"calibration_seconds": seconds, "text": texts.counts}


def _texts(
    source: Source, corpus: str | None, calibration_rows: int | None, length: int, seed: int, cache_dir: str | None
) -> TextRows:
    assert source.tokenizer is not None
    count = calibration_rows or max(8, CALIBRATION_TOKENS // length)
    held_out = max(8, min(HELD_OUT_ROWS, HELD_OUT_TOKENS // length))
    return text_rows(corpus, source.tokenizer, length, count, held_out, seed, cache_dir)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends well, and else disappears."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    beside.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner only
    try:
        yield beside
        if not folder.is_dir():
            os.rename(beside, folder)
            return
        # Empty, as was checked. It stays: it may be a shell's current folder. results.json comes last, as in every run.
        for path in sorted(beside.iterdir(), key=lambda path: path.name == RESULTS_FILE):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _save(
    folder: Path,
    source: Source,
    model: LinformerPreTrainedModel,
    options: dict[str, Any],
    report: dict[str, Any] | None,
    started: float,
) -> None:
    model.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.model_max_length = model.config.max_position_embeddings
        source.tokenizer.save_pretrained(folder)
    checksums.write(folder)
    if report is not None:
        fidelity.write(folder, report)
    content = {
        "verb": "convert",
        "source": source.name,
        "architecture": source.architecture,
        "options": options,
        **environment(options["seed"], torch.device("cpu"), "float32"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fidelity": report,
        "wall_seconds": time.time() - started,
    }
    measured = {"parameters": content["parameters"], "wall time of the conversion, s": content["wall_seconds"]}
    if report is not None:
        measured["calibration, s"] = report["calibration_seconds"]
    content["card"] = fidelity.card(model, source, report, measured)
    write_card(folder, content["card"])
    write_json(folder / RESULTS_FILE, content)
