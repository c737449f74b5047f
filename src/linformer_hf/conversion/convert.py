"""`linformer-hf convert SOURCE OUTPUT`: make a pretrained BERT or RoBERTa a Linformer, and say how faithful it is.

The defaults are what measured best for its cost (docs/results/fidelity.md has the table): `gated_pool`, a quarter of
the K keys as slots for the whole input and three quarters as the band of single tokens around the query, slots of their
own for the first and the last token and, with `--calibrate`, the closed-form calibration of `calibrate.py`. Rows of at
most K tokens are exact. What is made longer than its source has K = the source's N, so that all that the source reads
stays exact, and slots that weigh no more in longer rows than in one of N tokens (docs/results/long-documents.md).
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..configuration_linformer import POOLED_TYPES
from ..hub.card import write_card
from ..modeling_linformer import LinformerPreTrainedModel
from ..utils import checksums
from ..utils.environment import environment
from ..utils.files import RESULTS_FILE, read_json, write_json
from ..utils.options import Convert, takes
from . import fidelity, fidelity_page
from .calibrate import calibrate
from .huggingface import read_source
from .shorten import exact_twin, shortened
from .sources import ConversionError, Source
from .texts import text_rows


logger = logging.getLogger(__name__)

CALIBRATION_TOKENS = 131_072
HELD_OUT_ROWS, HELD_OUT_TOKENS = 48, 32_768
# Options that are fields of LinformerConfig; see `default_projection`.
PROJECTION = ("projected_length", "projection_type", "projection_sharing", "local_window", "length_correction")
# Options that say where things are on this machine, and not what was made.
PLACES = ("source", "output", "cache_dir")


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
    longer = length > source.length
    fields = {"projected_length": source.length if longer else 128, "length_correction": rows is not None, **projection}
    fields = default_projection(**fields)
    k = fields["projected_length"]
    if longer and fields["projection_type"] in POOLED_TYPES and (k if isinstance(k, int) else max(k)) <= source.length:
        fields["original_max_position_embeddings"] = source.length
    model = shortened(source, length, positions, fields)
    if rows is not None:
        twin = twin or exact_twin(source, length, positions)
        calibrate(twin.base_model, model.base_model, rows, strength, source)
    return model


@takes(Convert)
def convert(options: Convert) -> Path:
    """Convert, measure and write a folder that `from_pretrained` loads.

    Returns:
        `output`: weights, tokenizer, code, results.json, fidelity.json, fidelity.md, fidelity.png and a model card.

    Raises:
        FileExistsError: `output` holds something.
        ConversionError, ValueError, OSError: nothing is left behind; the message says what is wrong.
    """
    started = time.time()
    folder = Path(options.output)
    _check(folder, options)
    source = read_source(options.source, options.revision, options.tokenizer, options.sentence_head)
    projection = {name: value for name in PROJECTION if (value := getattr(options, name)) is not None}
    if options.max_length is None:
        options = replace(options, max_length=source.length)
    if not source.projection:
        projection.setdefault("length_correction", bool(options.calibrate))
        options = replace(options, length_correction=projection["length_correction"])
    elif options.calibrate:
        raise ConversionError(f"{options.source} is an exact Linformer already; there is nothing to calibrate.")
    # Refuses what does not fit before any text is read.
    model = convert_model(source, options.max_length, options.positions, **projection)
    report = None if source.projection else _calibrated(source, model, options)
    with _whole_folder(folder.resolve()) as beside:  # a link, or the current folder, has another name
        _save(beside, source, model, options, report, started)
    return folder


def told(folder: Path) -> tuple[str, str]:
    """What the command line says of a conversion: Markdown, and a last line."""
    report = read_json(folder / RESULTS_FILE, "Convert again.")["fidelity"]
    if report is None:
        return "", f"Converted model, {RESULTS_FILE}: {folder.resolve()}"
    written = f"{fidelity_page.REPORT_FILE} and {RESULTS_FILE}"
    return fidelity_page.summary_table(report["lengths"]), f"Converted model, {written}: {folder.resolve()}"


def _check(folder: Path, options: Convert) -> None:
    rows = options.calibration_rows
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder. Name another OUTPUT, or delete it.")
    if rows is not None and not options.calibrate:
        raise ValueError(f"calibration_rows={rows} would have no effect without text (--calibrate).")
    if rows is not None and rows < 1:
        raise ValueError(f"calibration_rows must be at least 1, got {rows}.")


def _calibrated(source: Source, model: LinformerPreTrainedModel, options: Convert) -> dict[str, Any]:
    """Calibrate the model where there are rows for it; its fidelity report."""
    assert source.tokenizer is not None
    assert options.max_length is not None
    length = options.max_length
    count = options.calibration_rows or max(8, CALIBRATION_TOKENS // length)
    held_out = max(8, min(HELD_OUT_ROWS, HELD_OUT_TOKENS // length))
    texts = text_rows(options.calibrate, source.tokenizer, length, count, held_out, options.seed, options.cache_dir)
    logger.info("Converting %s: %s, N = %s", source.name, source.architecture, length)
    twin = exact_twin(source, length, options.positions)
    difference = fidelity.check_twin(source, twin, texts.held_out)
    started = time.time()
    if texts.calibration:
        calibrate(twin.base_model, model.base_model, texts.calibration, source=source)
    seconds = time.time() - started if texts.calibration else 0.0
    report = fidelity.report(source, twin, model, texts.held_out, difference)
    return report | {"calibration_seconds": seconds, "text": texts.counts}


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends well, and else disappears."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as owners:
        beside = Path(owners, folder.name)  # with the permissions of any new folder: the one around it is its owner's
        beside.mkdir()
        yield beside
        if not folder.is_dir():
            os.rename(beside, folder)
            return
        # Empty, as was checked. It stays: it may be a shell's current folder. results.json comes last, as in every run.
        for path in sorted(beside.iterdir(), key=lambda path: path.name == RESULTS_FILE):
            os.replace(path, folder / path.name)


def _save(
    folder: Path,
    source: Source,
    model: LinformerPreTrainedModel,
    options: Convert,
    report: dict[str, Any] | None,
    started: float,
) -> None:
    model.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.model_max_length = model.config.max_position_embeddings
        source.tokenizer.save_pretrained(folder)
    if source.sentence is not None:
        source.sentence.write(folder, model.config.max_position_embeddings)
    checksums.write(folder)
    if report is not None:
        fidelity_page.write(folder, report)
    content = {
        "verb": "convert",
        "source": source.name,
        "architecture": source.architecture,
        "options": {name: value for name, value in asdict(options).items() if name not in PLACES},
        **environment(options.seed, torch.device("cpu"), "float32"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fidelity": report,
        "wall_seconds": time.time() - started,
    }
    measured = {"parameters": content["parameters"], "wall time of the conversion, s": content["wall_seconds"]}
    if report is not None:
        measured["calibration, s"] = report["calibration_seconds"]
    content["card"] = fidelity_page.card(model, source, report, measured)
    write_card(folder, content["card"])
    write_json(folder / RESULTS_FILE, content)
