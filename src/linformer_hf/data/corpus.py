"""Corpora for pretraining: sources -> documents -> tokens -> rows, prepared once and cached.

A prepared corpus lies in `<cache>/corpus-<checksum of its recipe>`: tokenizer, tokenised documents and, for each
packing and length, rows. Every folder is written beside its place and renamed, by one process at a time, and carries
checksums: a damaged one is made again. Validation is held out by whole documents, chosen by a hash of the document's
name: never by line, and the same in every run.

Both are made in parts of PART_DOCUMENTS documents, each by a process of its own and packed for itself. So memory does
not grow with the corpus (but for a byte a document, which says what is held out), all cores work, and what a kill
leaves finished is not done again. A part's last row is not full: one of some ten thousand.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..utils import checksums
from .cache import cache_folder, checksum, in_parts, is_whole, kept_parts, made_once, write_plain_json, written_whole
from .documents import (
    FORMAT,
    PretrainingData,
    check_column,
    demo_documents,
    documents_from,
    file_stamps,
    load_rows,
    read_documents,
    shares,
)
from .packing import Packed, pack, split_tokens
from .tokenizer import load_tokenizer, stored, train_tokenizer


logger = logging.getLogger(__name__)

# Else `load_dataset` tells a server about every load, of local files too.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
# Prose ends a sentence with one of .!? and up to two closing quotes or brackets, which stay in it, before white space.
# A blank line ends one anywhere.
_CLOSED = r"[\"'\u201d\u2019)\]]"
SENTENCE_END = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?]{_CLOSED})|(?<=[.!?]{_CLOSED}{_CLOSED}))\s+|\n\s*\n")
_TOKEN_FEATURES = Features({"ids": List(Value("int32")), "lengths": List(Value("int32"))})  # lengths of sentences
_ROW_FEATURES = Features({"input_ids": List(Value("int32"))})
SPLITS = ("train", "validation")
PART_DOCUMENTS = 10_000  # another number gives other rows: raise FORMAT with it


@dataclass
class StreamedRows:
    """Rows of a stream of documents but the first `skipped`, from the beginning in each `iter`, and in a worker too."""

    documents: IterableDataset
    skipped: int
    data: PretrainingData
    length: int
    tokenizer: PreTrainedTokenizerBase

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return self.share(0, 1)

    def share(self, number: int, of: int) -> Iterator[dict[str, list[int]]]:
        """Rows of every `of`-th document from the `number`-th on: the others are read, and not tokenised."""
        texts = itertools.islice(_texts(self.documents), self.skipped + number, None, of)
        for row in _rows(_tokens(texts, self.tokenizer), self.data, self.length, self.tokenizer, Packed()):
            yield {"input_ids": row}


def _texts(documents: IterableDataset) -> Iterator[str]:
    # Not iter(documents): in a worker that is a share of the files, and nothing where there are fewer than workers.
    return (text for batch in documents.iter(64) for text in batch["text"])


def _tokens(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, list[int]]]:
    """Tokenised documents as they are needed."""
    while batch := list(itertools.islice(texts, 16)):
        tokens = _tokenize({"text": batch}, tokenizer)
        for ids, lengths in zip(tokens["ids"], tokens["lengths"], strict=True):
            yield {"ids": ids, "lengths": lengths}


@dataclass
class PreparedCorpus:
    """Rows for training and validation (column `input_ids`, with special tokens).

    Attributes:
        token_counts: [V], how often each token stands in the training rows (streaming: in its first rows).
        counts: documents, tokens and truncated tokens of each split, for the record.
        checksum: the number of training rows, and a checksum of both splits' files (streaming: of the first rows).
        folder: where it is cached; None for a stream.
    """

    train: Dataset | StreamedRows
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    token_counts: np.ndarray
    counts: dict[str, Any]
    checksum: tuple[int, str]
    folder: Path | None = None


def prepare(data: PretrainingData, length: int) -> PreparedCorpus:
    """Rows of at most `length` tokens, from the cache or prepared now.

    Raises:
        ValueError: a source is empty, not UTF-8, or lacks the column; the message names it.
        FileNotFoundError: no file at `path`.
        ConnectionError: a Hub data set cannot be reached.
    """
    if data.streaming:
        return _stream(data, length)
    if data.tokenizer is not None:  # by its content: the folder may hold another one later
        data = replace(data, tokenizer=stored(load_tokenizer(data.tokenizer), data.cache_dir))
    recipe = {
        "format": FORMAT,
        "sources": [{**asdict(source), "files": file_stamps(source)} for source in data.sources],
        **{key: getattr(data, key) for key in ("tokenizer_type", "vocab_size", "lowercase")},
        **{key: getattr(data, key) for key in ("tokenizer", "validation_fraction", "max_documents", "seed")},
    }
    folder = cache_folder(data.cache_dir) / f"corpus-{checksum(recipe)}"

    def write_documents(beside: Path, damaged: Path | None) -> None:
        kept = None  # one trained again by another version of the library may have other ids
        with contextlib.suppress(FileNotFoundError):
            if data.tokenizer is None and damaged and not checksums.damage(damaged, ("tokenizer",)):
                kept = str(damaged / "tokenizer")
        _write_documents(replace(data, tokenizer=kept or data.tokenizer), folder, beside)
        write_plain_json(beside / "recipe.json", recipe)

    rows = _rows_folder(folder, data, length)
    packed_already = is_whole(rows)  # then the documents are not read
    made_once(folder, write_documents, ("tokenizer", "counts.json") if packed_already else None)
    if not packed_already or not rows.exists():
        made_once(rows, lambda beside, _: _write_rows(data, length, folder, beside))
    counts = {
        "folder": str(folder.absolute()),
        **json.loads((folder / "counts.json").read_text()),
        "row_length": length,
        "packing": data.packing,
        "rows": json.loads((rows / "counts.json").read_text()),
    }
    for split, packed in counts["rows"].items():
        logger.info(
            "%s: %s documents, %s tokens in %s rows of at most %s, %s tokens cut off",
            *(split, *(f"{packed[key]:,}" for key in ("documents", "tokens", "rows")), length),
            f"{packed['truncated_tokens']:,}",
        )
    return PreparedCorpus(
        train=datasets.concatenate_datasets(
            [Dataset.from_file(str(part / "train.arrow")) for part in sorted((rows / "parts").iterdir())]
        ),
        validation=Dataset.from_file(str(rows / "validation.arrow")),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        token_counts=np.load(rows / "token_counts.npy", allow_pickle=False),
        counts=counts,
        checksum=(counts["rows"]["train"]["rows"], checksums.sha256(rows / checksums.CHECKSUMS_FILE)),
        folder=folder,
    )


def _write_documents(data: PretrainingData, target: Path, beside: Path) -> None:
    """Tokenizer, tokenised documents of both splits, and their counts."""
    documents = read_documents(data)
    if len(documents) < 2:
        raise ValueError(
            f"{_titles(data)} holds {len(documents)} document, and at least 2 are needed, for whole documents are held "
            "out to measure on. Add files, or part a long one by empty lines (a recipe's sample_by: paragraph)."
        )
    held, sources = _hold_out(documents, data.validation_fraction)
    starts = range(0, len(documents), PART_DOCUMENTS)
    tokenizer = _tokenizer(data, documents, held, kept_parts(target) if len(starts) > 1 else None)
    tokenizer.save_pretrained(beside / "tokenizer")

    def write(number: int, folder: Path) -> None:
        part = slice(starts[number], starts[number] + PART_DOCUMENTS)
        _write_tokens(documents.select(range(*part.indices(len(documents)))), held[part], tokenizer, folder)

    parts = in_parts(target, beside, len(starts), write, _processes(data))
    text = documents[int(held.argmin())]["text"][:200]
    logger.info("before tokenising: %r", text)
    logger.info("after: %s", tokenizer.tokenize(text))
    write_plain_json(beside / "counts.json", {"sources": sources, **_added_up(parts)})


def _hold_out(documents: Dataset, fraction: float) -> tuple[np.ndarray, dict[str, int]]:
    """[documents] bool: which are held out, at least one and not all of them; and how many each source has."""
    held, sources = np.zeros(len(documents), dtype=bool), Counter[str]()
    first, last = (1.0, 0), (0.0, 0)  # the extreme places, and whose they are
    start = 0
    for batch in documents.select_columns(["name", "source", "held_out"]).iter(10_000):
        place = np.array([_place(name) for name in batch["name"]])
        held[start : start + len(place)] = (place < fraction) | np.array(batch["held_out"])
        first = min(first, (place.min(), start + int(place.argmin())))
        last = max(last, (place.max(), start + int(place.argmax())))
        sources.update(batch["source"])
        start += len(place)
    if not held.any():
        held[first[1]] = True
    if held.all():
        held[last[1]] = False
    return held, dict(sorted(sources.items()))


def _tokenizer(
    data: PretrainingData, documents: Dataset, held: np.ndarray, kept: Path | None
) -> PreTrainedTokenizerBase:
    """The one that the recipe names, or one trained on the training documents, or by an earlier try (in `kept`)."""
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if kept and is_whole(kept / "tokenizer"):
        return load_tokenizer(str(kept / "tokenizer"))
    tokenizer = train_tokenizer(documents.select(np.flatnonzero(~held))["text"], data)
    if kept:
        shutil.rmtree(kept / "tokenizer", ignore_errors=True)
        with written_whole(kept / "tokenizer") as folder:
            tokenizer.save_pretrained(folder)
    return tokenizer


def _write_tokens(documents: Dataset, held: np.ndarray, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A part of the corpus: its tokenised documents of both splits, and their counts."""
    counts = {split: {"documents": 0, "characters": 0} for split in SPLITS}
    with contextlib.ExitStack() as files:
        writers = {split: files.enter_context(_writer(folder, split, _TOKEN_FEATURES)) for split in SPLITS}
        splits = (SPLITS[is_held] for is_held in held.tolist())
        for batch in documents.iter(16):  # documents may be whole books
            tokens = _tokenize(batch, tokenizer)
            for text, ids, lengths in zip(batch["text"], tokens["ids"], tokens["lengths"], strict=True):
                split = next(splits)
                writers[split].write({"ids": ids, "lengths": lengths})
                counts[split]["documents"] += 1
                counts[split]["characters"] += len(text)
        for writer in writers.values():
            writer.finalize()
    write_plain_json(folder / "counts.json", counts)


def _write_rows(data: PretrainingData, length: int, folder: Path, beside: Path) -> None:
    """Rows of the documents in `folder`: of training in parts, of validation, which is little, in one file."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents = sorted((folder / "parts").iterdir())

    def write(number: int, part: Path) -> None:
        tokens = Dataset.from_file(str(documents[number] / "train.arrow"))
        packed = {"train": _pack_into(part, "train", tokens, data, length, tokenizer)}
        rows = Dataset.from_file(str(part / "train.arrow"))
        np.save(part / "token_counts.npy", count_tokens(rows, tokenizer), allow_pickle=False)
        write_plain_json(part / "counts.json", packed)

    parts = in_parts(_rows_folder(folder, data, length), beside, len(documents), write, _processes(data))
    held = datasets.concatenate_datasets([Dataset.from_file(str(part / "validation.arrow")) for part in documents])
    counts = {**_added_up(parts), "validation": _pack_into(beside, "validation", held, data, length, tokenizer)}
    for split in SPLITS:
        if not counts[split]["tokens"]:
            raise ValueError(f"{_titles(data)}: the {split} documents hold no text.")
    token_counts = sum(np.load(part / "token_counts.npy", allow_pickle=False) for part in parts)
    np.save(beside / "token_counts.npy", token_counts, allow_pickle=False)
    write_plain_json(beside / "counts.json", counts)


def _pack_into(
    folder: Path, split: str, documents: Dataset, data: PretrainingData, length: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    packed = Packed()
    with _writer(folder, split, _ROW_FEATURES) as writer:
        for row in _rows(documents, data, length, tokenizer, packed):
            writer.write({"input_ids": row})
        writer.finalize()
    return asdict(packed)


def _writer(folder: Path, split: str, features: Features) -> ArrowWriter:
    return ArrowWriter(path=str(folder / f"{split}.arrow"), features=features, writer_batch_size=256)


def _added_up(parts: Iterable[Path]) -> dict[str, dict[str, int]]:
    """The sums of the parts' counts: split -> what -> how many."""
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for split, counts in json.loads((part / "counts.json").read_text()).items():
            total[split] = Counter({name: total.get(split, Counter())[name] + count for name, count in counts.items()})
    return {split: dict(counts) for split, counts in total.items()}


def _rows_folder(folder: Path, data: PretrainingData, length: int) -> Path:
    return folder / f"rows-{data.packing}-{length}"


def _processes(data: PretrainingData) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return data.num_proc or usable or 1


def count_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[V]: how often each token stands in the rows; 0 for special tokens."""
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for chunk in rows.data.column("input_ids").chunks:
        counts += np.bincount(chunk.flatten().to_numpy(), minlength=len(counts))
    counts[list(tokenizer.all_special_ids)] = 0
    return counts


def _rows(
    documents: Iterable[dict[str, Any]],
    data: PretrainingData,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    packed: Packed,
) -> Iterator[list[int]]:
    sentences = (split_tokens(document["ids"], document["lengths"]) for document in documents)
    shown = multiprocessing.parent_process() is None  # a process that packs a part has no bar of its own
    total = len(documents) if shown and isinstance(documents, Dataset) else None  # nor has a stream an end
    progress = tqdm(sentences, total=total, desc=f"packing rows of {length}", unit="doc", disable=total is None)
    return pack(progress, data.packing, length, tokenizer.cls_token_id, tokenizer.sep_token_id, packed)


def _tokenize(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Ids and sentence lengths of each document."""
    documents = [[s for s in SENTENCE_END.split(text) if s and not s.isspace()] for text in batch["text"]]
    # Byte-level BPE writes the space in front of a word into its token; WordPiece ignores it.
    flat = [(" " if i else "") + sentence for document in documents for i, sentence in enumerate(document)]
    encoded = iter(_ids(flat, tokenizer) if flat else [])
    ids: list[list[int]] = []
    lengths: list[list[int]] = []
    for document in documents:
        sentences = [next(encoded) for _ in document]
        ids.append([token for sentence in sentences for token in sentence])
        lengths.append([len(sentence) for sentence in sentences])
    return {"ids": ids, "lengths": lengths}


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """`tokenizer(texts)["input_ids"]` without special tokens, and where that can be, without the rest that it makes."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what calling the tokenizer sets
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _stream(data: PretrainingData, length: int) -> PreparedCorpus:
    """Rows that are read, tokenised and packed while training. No shuffling buffer: it would not resume exactly."""
    parts = []
    for source in data.sources:
        if source.kind == "demo":
            part = Dataset.from_list(demo_documents(source.name)).to_iterable_dataset()
        else:
            part = load_rows(source, streaming=True)
            check_column(source, part.column_names)
            part = documents_from(part, source)
        parts.append(part if data.max_documents is None else part.take(data.max_documents))
    if data.sources[0].weight is None or len(parts) == 1:
        documents = datasets.concatenate_datasets(parts)
    else:
        documents = datasets.interleave_datasets(parts, shares(data), seed=data.seed)
    tokenizer = load_tokenizer(data.tokenizer or "")
    packed, held = Packed(), data.validation_documents
    rows = list(_rows(_tokens(itertools.islice(_texts(documents), held), tokenizer), data, length, tokenizer, packed))
    if not packed.tokens:
        raise ValueError(f"{_titles(data)}: the first {held} documents hold no text.")
    train = StreamedRows(documents, held, data, length, tokenizer)
    first = [row["input_ids"] for row in itertools.islice(train, 2000)]
    head = Dataset.from_dict({"input_ids": first}, features=_ROW_FEATURES)
    if not len(head):
        raise ValueError(
            f"{_titles(data)} holds no document beyond the first {data.validation_documents}, which are held out: "
            "lower data.validation_documents."
        )
    readers = data.readers or 1
    left = len(list(itertools.islice(_texts(documents), held, held + readers)))
    if left < readers:
        raise ValueError(
            f"{_titles(data)} holds {left} documents beyond the first {held}, which are held out, and "
            f"{readers} readers need one each: lower data.readers (or the processes and data loaders' workers), or "
            "prepare the corpus (data.streaming=false)."
        )
    return PreparedCorpus(
        train=train,
        validation=Dataset.from_dict({"input_ids": rows}, features=_ROW_FEATURES),
        tokenizer=tokenizer,
        token_counts=count_tokens(head, tokenizer),
        counts={
            "streaming": True,
            "row_length": length,
            "packing": data.packing,
            "rows": {"validation": asdict(packed)},
        },
        checksum=(len(first), checksum([first, rows])),
    )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, and not on where a folder stands on this machine."""
    name = os.path.basename(name) if os.path.isabs(name) else name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _titles(data: PretrainingData) -> str:
    return " + ".join(source.title for source in data.sources)
