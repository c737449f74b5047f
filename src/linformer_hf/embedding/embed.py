"""`linformer-hf embed FOLDER FILES... --output vectors.parquet`: vectors of documents, or of parts of them.

Each document is read in one pass, whatever its parts are, so that the vector of a piece, a sentence or a span knows the
whole document (see `encoder.py`); with `alone` each part is read by itself instead, with `blend` it is read both ways
and its vector lies half way between. Finished documents lie in `<output>.parts/` until all are: a run that was stopped
goes on when the same command is given again, and ends with the same bytes. Nothing grows with the number of documents.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..utils.files import read_json, record, write_json
from ..utils.options import Embed, takes
from ..utils.writing import beside
from .encoder import POOLED_TOKENS, DocumentEncoder, Part, Read, blend, grouped
from .inputs import Document, Inputs


logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same inputs give another file
PLAN_FILE = "plan.json"
KEY = b"linformer_hf"  # of the metadata of a .parquet file
BATCHES_A_PART = 16  # a killed run loses at most so much
# What is asked of the documents; where the results and the model are is not.
ASKED = ("column", "pieces", "sentences", "spans", "batch_tokens", "prompt_name", "dtype")
CUTS = ("pieces", "sentences", "spans")
WAYS = ("alone", "blend")  # in which a part is read, beside one pass over its document

# What a file says about itself -> how it is told.
COUNTED = {
    "documents": "documents",
    "empty": "of them without text, and so without a vector",
    "vectors": "vectors",
    "missed": "spans without a token that was read, and so without a vector",
    "tokens": "tokens read",
    "cut": "documents that were cut",
    "lost": "tokens cut off",
}


@takes(Embed)
def embed(options: Embed) -> Path:
    """Write one vector for each document, piece, sentence or span.

    Returns:
        `output`, a .parquet file with the columns document (its file, or FILE:ROW), piece, start and end (characters),
        tokens, and vector (float32).

    Raises:
        FileExistsError: `output` is there, and this run did not make it.
        ImportError: sentence-transformers is not installed.
        ValueError, OSError: an option, a file or the model is wrong, or another run's parts are there; what is
            finished stays.
    """
    target = Path(options.output)
    parts = target.with_name(f"{target.name}.parts")
    _check(options, target)
    inputs = Inputs(options.files, options.column, options.spans, besides=(target, parts))
    total, content = inputs.survey()
    encoder = DocumentEncoder.load(
        options.folder, options.device, options.max_length, options.revision, options.prompt_name, options.dtype
    )
    if options.alone or options.blend:
        _check_room(options, encoder)
    if _cuts(options) and not options.alone:
        encoder.check_parts()
    asked = {name: getattr(options, name) for name in ASKED} | {way: True for way in WAYS if getattr(options, way)}
    made_by = {"model": encoder.fingerprint(), "max_length": encoder.length}  # of both, for what is told to differ
    plan = record({"format": FORMAT, **made_by, "inputs": content, **asked})
    if not target.exists():
        _claim(parts, plan)
        done = _fill(parts, inputs, total, encoder, options)
        _join(parts, target, plan, done, _schema(encoder))
    elif _noted(target)["plan"] != plan:
        raise FileExistsError(f"{target} is there, made from something else: name another --output, or delete it.")
    else:
        logger.info("%s holds these vectors already.", target)
    shutil.rmtree(parts, ignore_errors=True)
    return target


def told(target: Path) -> tuple[str, str]:
    """What a finished file says about itself, and where it is."""
    counts = Counter(_noted(target)["counts"])
    told_always = ("documents", "vectors")
    lines = [f"- {title}: {counts[name]:,}" for name, title in COUNTED.items() if counts[name] or name in told_always]
    return "\n".join(lines), f"vectors: {target.resolve()}"


def _check(options: Embed, target: Path) -> None:
    """Raise a ValueError for what can be seen before anything is loaded."""
    chosen = _cuts(options)
    if len(chosen) > 1:
        names = " and ".join(f"--{name}" for name in chosen)
        raise ValueError(f"{names} exclude each other: choose one of them for each file of vectors.")
    ways = [way for way in WAYS if getattr(options, way)]
    if len(ways) > 1:
        raise ValueError("--alone and --blend exclude each other: a part's vector is its own alone, or half of it.")
    if ways and not chosen:
        raise ValueError(f"--{ways[0]} would have no effect on whole documents: add --pieces, --sentences or --spans.")
    for name in ("pieces", "max_length", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is a number of tokens, at least 1, not {value}.")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name a file, such as {target / 'vectors.parquet'}.")
    if target.exists() and "plan" not in _noted(target):
        raise FileExistsError(f"{target} is there, and was not made here: name another --output, or delete it.")


def _cuts(options: Embed) -> list[str]:
    """The options that ask for parts of documents."""
    return [name for name in CUTS if getattr(options, name) not in (None, False)]


def _check_room(options: Embed, encoder: DocumentEncoder) -> None:
    around = encoder.model.tokenizer.num_special_tokens_to_add() + encoder.prompt_length
    if (options.pieces or 0) > encoder.length - around:
        raise ValueError(
            f"--pieces={options.pieces} leaves no room for the tokens around a piece that is read alone: the folder "
            f"reads {encoder.length}. Choose at most {encoder.length - around}."
        )


def _claim(parts: Path, plan: dict[str, Any]) -> None:
    """Make the folder of the parts, or find in it what is made from the same."""
    way_out = f"Give the command that began it, or delete {parts} to begin anew."
    if (parts / PLAN_FILE).exists():
        found = read_json(parts / PLAN_FILE, way_out)
        if different := [name for name in plan | found if found.get(name) != plan.get(name)]:
            raise ValueError(f"{parts} holds the beginning of another run: {', '.join(different)} differ. {way_out}")
        return
    shutil.rmtree(parts, ignore_errors=True)  # what a kill left of one that was being cleared away
    parts.mkdir(parents=True)
    write_json(parts / PLAN_FILE, plan)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.parquet"


def _finished(parts: Path) -> list[Counter[str]]:
    """The counts of each finished part, up to the first that is not there or not whole."""
    done: list[Counter[str]] = []
    while (path := _part(parts, len(done))).exists() and (noted_in := path.with_suffix(".json")).exists():
        noted = read_json(noted_in, f"Delete {path}, and give the same command again.")
        if noted["rows"] != _sum(path):
            logger.warning("%s is damaged: it, and what follows, is made again.", path)
            break
        done.append(Counter(noted["counts"]))
    return done


def _noted(path: Path) -> dict[str, Any]:
    """What a file of ours says about itself; nothing for one that is not there, or another's."""
    try:
        return json.loads((pq.read_schema(path).metadata or {}).get(KEY, b"{}"))
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}


def _fill(parts: Path, inputs: Inputs, total: int, encoder: DocumentEncoder, options: Embed) -> list[Counter[str]]:
    """Embed all documents that are in no finished part; the counts of each part."""
    began, counts = time.time(), Counter[str]()
    done = _finished(parts)
    before = sum(part["documents"] for part in done)
    if before:
        logger.info("%s documents are finished; going on behind them.", f"{before:,}")
    # By their text alone, so that a run that goes on has the batches, and so the bits, of one that was not stopped.
    groups = grouped(
        itertools.islice(inputs, before, None),
        lambda document: encoder.size(document.text),
        BATCHES_A_PART * options.batch_tokens,
    )
    with tqdm(desc="embedding", unit="doc", total=total, initial=before) as bar, _kept(parts, done):
        for number, group in enumerate(groups, len(done)):
            table, found = _embedded(group, encoder, options, bar)
            _write(_part(parts, number), table, found)
            done.append(found)
            counts += found
    seconds = time.time() - began
    speed = f"{counts['tokens']:,} tokens in {seconds:.1f} s ({counts['tokens'] / max(seconds, 1e-9):,.0f} a second)"
    counts = sum(done, Counter())
    logger.info("%s vectors of %s documents: %s", f"{counts['vectors']:,}", f"{counts['documents']:,}", speed)
    if counts["cut"]:
        what = "hold parts that are" if options.alone else "or parts of them are" if options.blend else "are"
        logger.warning(
            "%s of %s documents %s longer than %s tokens: %s tokens were cut off. A larger --max-length reads more, "
            "up to the model's positions.",
            *(f"{counts['cut']:,}", f"{counts['documents']:,}", what, f"{encoder.length:,}", f"{counts['lost']:,}"),
        )
    return done


@contextlib.contextmanager
def _kept(parts: Path, done: Sequence[Counter[str]]) -> Iterator[None]:
    """Say what is kept of a run that ends too early; nothing half is left of one that has finished nothing."""
    try:
        yield
    except BaseException:
        if documents := sum(part["documents"] for part in done):
            logger.warning("%s documents are kept in %s: the same command goes on behind them.", documents, parts)
        else:
            shutil.rmtree(parts)
        raise


def _embedded(
    group: Sequence[Document], encoder: DocumentEncoder, options: Embed, bar: Any
) -> tuple[pa.Table, Counter[str]]:
    """The rows of some documents, and what is counted of them."""
    real = [document for document in group if document.text.strip()]
    counts = Counter(documents=len(group), empty=len(group) - len(real))
    columns: dict[str, list[Any]] = {name: [] for name in ("document", "piece", "start", "end", "tokens")}
    vectors = []
    bar.update(len(group) - len(real))
    read = _alone if options.alone else _blended if options.blend else _late
    for document, found, made, counted in read(real, encoder, options):
        counts += Counter({"vectors": len(found), **counted})
        for part in found:
            row = (document.name, part.number, part.start, part.end, part.stop - part.first)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
        vectors += [] if made is None else [made]
        bar.update()
    flat = pa.concat_arrays([pa.array(one.flatten().numpy()) for one in vectors] or [pa.array([], pa.float32())])
    schema = _schema(encoder)
    width = schema.field("vector").type.list_size
    arrays = [pa.array(columns[name], schema.field(name).type) for name in columns]
    return pa.Table.from_arrays([*arrays, pa.FixedSizeListArray.from_arrays(flat, width)], schema=schema), counts


# A document, its parts, their vectors [parts, D] if there are any, and what is counted of it.
Made = tuple[Document, list[Part], torch.Tensor | None, dict[str, int]]


def _late(documents: Sequence[Document], encoder: DocumentEncoder, options: Embed) -> Iterator[Made]:
    """One pass over each document, and the vectors of its parts from the states of their tokens."""
    prompt = 0 if _cuts(options) else encoder.prompt_length
    texts = (document.text for document in documents)
    for document, read in zip(documents, encoder.read(texts, options.batch_tokens), strict=True):
        found, wanted = _wanted(document, read, encoder, options)
        states = [read.states[part.first : part.stop] for part in found]
        made = encoder.vectors(states, prompt) if found else None
        counted = {"tokens": len(read.ids), "cut": int(read.lost > 0), "lost": read.lost}
        yield document, found, made, {**counted, "missed": wanted - len(found)}


def _alone(documents: Sequence[Document], encoder: DocumentEncoder, options: Embed) -> Iterator[Made]:
    """A pass over each part, from its characters, as if it were a document. No document is too long for that."""
    asked = [(document, *_wanted(document, encoder.cut(document.text), encoder, options)) for document in documents]
    return _each_alone(asked, encoder, options)


def _blended(documents: Sequence[Document], encoder: DocumentEncoder, options: Embed) -> Iterator[Made]:
    """The parts that one pass over each document reads, each read alone, too."""
    late = list(_late(documents, encoder, options))
    asked = [(document, parts, len(parts) + counted["missed"]) for document, parts, _, counted in late]
    for (document, parts, one, counted), (*_, other, more) in zip(
        late, _each_alone(asked, encoder, options), strict=True
    ):
        both = {name: counted[name] + more[name] for name in ("tokens", "lost")}
        made = None if one is None or other is None else blend(one, other)
        yield document, parts, made, {**both, "cut": int(both["lost"] > 0), "missed": counted["missed"]}


def _each_alone(
    asked: Sequence[tuple[Document, list[Part], int]], encoder: DocumentEncoder, options: Embed
) -> Iterator[Made]:
    """A pass over each of some documents' parts; `asked`: with how many were wanted."""
    texts = (document.text[part.start : part.end] for document, parts, _ in asked for part in parts)
    reads = encoder.read(texts, options.batch_tokens)
    for document, parts, wanted in asked:
        made, counted = [], Counter(missed=wanted - len(parts), tokens=0, lost=0)
        # Some at a time: a document may be far longer than what is read at once.
        for own in grouped(itertools.islice(reads, len(parts)), lambda read: len(read.ids), POOLED_TOKENS):
            made.append(encoder.vectors([read.states for read in own], encoder.prompt_length))
            counted += Counter(tokens=sum(len(read.ids) for read in own), lost=sum(read.lost for read in own))
        counted["cut"] = int(counted["lost"] > 0)
        yield document, parts, torch.cat(made) if made else None, counted


def _wanted(document: Document, read: Read, encoder: DocumentEncoder, options: Embed) -> tuple[list[Part], int]:
    """The parts of a document that get a vector, and how many were asked for."""
    if options.pieces is not None:
        parts = encoder.pieces(read, options.pieces)
    elif options.sentences:
        parts = encoder.sentences(read, document.text)
    elif options.spans is not None:
        return encoder.spans(read, document.spans), len(document.spans)
    else:
        parts = [encoder.whole(read)]
    return parts, len(parts)


def _schema(encoder: DocumentEncoder) -> pa.Schema:
    width = encoder.model.get_embedding_dimension()
    columns = {"document": pa.string(), "piece": pa.int32(), "start": pa.int64(), "end": pa.int64()}
    return pa.schema({**columns, "tokens": pa.int32(), "vector": pa.list_(pa.float32(), width)})


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, table: pa.Table, counts: Counter[str]) -> None:
    """A part, and then what tells that it is whole."""
    with beside(path) as written:
        pq.write_table(table, written)
    write_json(path.with_suffix(".json"), {"rows": _sum(path), "counts": counts})


def _join(parts: Path, target: Path, plan: dict[str, Any], done: list[Counter[str]], schema: pa.Schema) -> None:
    """All parts as one file, which takes its place when it is whole."""
    noted = {"plan": plan, "counts": sum(done, Counter())}
    written = parts / "whole.parquet"
    with pq.ParquetWriter(
        written, schema.with_metadata({KEY: json.dumps(noted)}), use_dictionary=["document"]
    ) as writer:
        for number in range(len(done)):
            writer.write_table(pq.read_table(_part(parts, number)))
    os.replace(written, target)
