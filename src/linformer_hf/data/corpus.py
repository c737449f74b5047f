"""Corpora for pretraining: sources -> documents -> tokens -> rows, prepared once and cached.

A prepared corpus lies in `<cache>/corpus-<checksum of its recipe>`: tokenizer, tokenised documents and, for each
packing and length, rows. Every folder is written beside its place and renamed, by one process at a time, and carries
checksums: a damaged one is made again. Validation is held out by whole documents, chosen by a hash of the document's
name: never by line, and the same in every run.
"""

import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.arrow_writer import ArrowWriter
from tokenizers import normalizers
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from .. import checksums, full_disk
from . import demo_texts, tables
from .packing import Packed, pack, split_tokens


logger = logging.getLogger(__name__)

# Else `load_dataset` tells a server about every load, of local files too.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
FORMAT = 4  # raise it when the content of prepared folders changes: old ones are then not found any more
# Prose ends a sentence with one of .!? and closing quotes before white space; a blank line ends one anywhere.
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+|\n\s*\n")
_TOKEN_FEATURES = Features({"ids": List(Value("int32")), "lengths": List(Value("int32"))})  # lengths of sentences
_ROW_FEATURES = Features({"input_ids": List(Value("int32"))})


@dataclass
class Source:
    """Where documents come from.

    Args:
        kind: `hub` (a data set repository), `files` (local .txt, .jsonl, .json, .csv or .tsv, also as .gz, or
            .parquet), `demo` (text of installed packages).
        name, config, split, revision: the repository, its configuration, split and commit (hub). For `demo`, `name` is
            one of demo_texts.COLLECTIONS; left out, it means the demo's own three.
        path: a file, a folder or a glob (files).
        text_column: the column that holds the text (hub, and files other than .txt).
        sample_by: what one document of a .txt file is.
        rows_per_document: so many rows in a row make one document (BookCorpus has a sentence in each row).
        weight: chance of drawing the next document here, relative to the other sources. If every source has one, they
            are interleaved until the first is exhausted; else each source is read whole, one after the other.
    """

    kind: Literal["hub", "files", "demo"]
    name: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    path: str | None = None
    text_column: str = "text"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    rows_per_document: int = 1
    weight: float | None = None

    def __post_init__(self) -> None:
        needed = {"hub": "name", "files": "path"}.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"a source of kind {self.kind!r} needs {needed!r}.")
        if self.kind == "demo" and self.name is not None and self.name not in demo_texts.COLLECTIONS:
            known = ", ".join(demo_texts.COLLECTIONS)
            raise ValueError(f"a source of kind 'demo' has the names {known}, not {self.name!r}.")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}; leave out a source that is not wanted.")
        if self.rows_per_document < 1:
            raise ValueError(f"rows_per_document must be at least 1, got {self.rows_per_document}.")

    @property
    def title(self) -> str:
        return {"hub": f"{self.name}", "files": f"{self.path}", "demo": self.name or "demo"}[self.kind]


@dataclass
class PretrainingData:
    """Section `data` of a pretraining recipe.

    Args:
        sources: where documents come from.
        tokenizer: name or folder of an existing tokenizer; left out, one is trained on the training documents.
        tokenizer_type, vocab_size, lowercase: the tokenizer to train.
        packing: `full_sentences`, `contiguous` or `document` (see `packing.py`).
        sequence_length: tokens in a row; by default the model's max_position_embeddings.
        mlm_probability: share of tokens to predict; `eval_mlm_probability` is validation's, by default the same.
        mask_fractions: shares of these that become [MASK], a random token, or stay.
        whole_word_masking: choose whole words.
        validation_fraction: share of documents that are held out.
        validation_documents: streaming only: so many first documents of the stream are held out.
        max_documents: stop after so many documents of each source.
        streaming: read, tokenise and pack while training, pass after pass in one order, with no prepared copy.
        cache_dir: where prepared corpora lie (default: $LINFORMER_HF_CACHE, else ~/.cache/linformer_hf).
        num_proc: processes for tokenising.
        seed: of masking and of interleaving.
    """

    sources: list[Source]
    tokenizer: str | None = None
    tokenizer_type: Literal["wordpiece", "byte_level_bpe"] = "wordpiece"
    vocab_size: int = 30522
    lowercase: bool = True
    packing: Literal["full_sentences", "contiguous", "document"] = "full_sentences"
    sequence_length: int | None = None
    mlm_probability: float = 0.15
    eval_mlm_probability: float | None = None
    mask_fractions: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    whole_word_masking: bool = False
    validation_fraction: float = 0.01
    validation_documents: int = 500
    max_documents: int | None = None
    streaming: bool = False
    cache_dir: str | None = None
    num_proc: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one, such as {kind: files, path: texts/*.txt}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none.")
        if self.streaming and self.tokenizer is None:
            raise ValueError("streaming needs an existing tokenizer: set data.tokenizer to its name or folder.")


@dataclass
class StreamedRows:
    """Rows of a stream of tokenised documents, from the beginning in each `iter`, also in a DataLoader's worker."""

    tokens: IterableDataset
    data: PretrainingData
    length: int
    tokenizer: PreTrainedTokenizerBase

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        # Not iter(tokens): in a worker that is a share of the files, and nothing where there are fewer than workers.
        batches = self.tokens.iter(16)
        documents = (
            {"ids": ids, "lengths": lengths}
            for batch in batches
            for ids, lengths in zip(batch["ids"], batch["lengths"], strict=True)
        )
        for row in _rows(documents, self.data, self.length, self.tokenizer, Packed()):
            yield {"input_ids": row}


@dataclass
class PreparedCorpus:
    """Rows for training and validation (column `input_ids`, with special tokens).

    Attributes:
        token_counts: [V], how often each token stands in the training rows (streaming: in its first rows).
        counts: documents, tokens and truncated tokens of each split, for the record.
        folder: where it is cached; None for a stream.
    """

    train: Dataset | StreamedRows
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    token_counts: np.ndarray
    counts: dict[str, Any]
    folder: Path | None = None


def cache_folder(cache_dir: str | None) -> Path:
    return Path(cache_dir or os.environ.get("LINFORMER_HF_CACHE") or Path.home() / ".cache" / "linformer_hf")


def _beside(target: Path) -> str:
    """How the names begin that this machine writes `target` under; another's work is not cleared away."""
    return f".{target.name}.{platform.node()}."


@contextlib.contextmanager
def _room_named(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into a DiskFull that names the folders that are written to."""
    try:
        yield
    except full_disk.DiskFull:
        raise
    except Exception as error:
        reason = full_disk.reason(error)
        if reason is None:
            raise
        raise full_disk.DiskFull(
            f"preparing the corpus failed ({reason}): {folder} or {datasets.config.HF_DATASETS_CACHE} is full, and "
            "nothing half was left there. Make room and give the same command again, or set data.cache_dir and the "
            "environment variable HF_DATASETS_CACHE to folders with more of it."
        ) from error


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` when the block ends well. The first process to finish wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=_beside(target), dir=target.parent))
    try:
        yield beside
        checksums.write(beside)
        try:
            os.rename(beside, target)
        except OSError:
            if not target.is_dir():  # else another process has written the same meanwhile
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _whole(folder: Path, only: Iterable[str] | None = None) -> bool:
    """Whether `folder` is there and what it was (of it `only` these files and folders); else the log says why not."""
    if not folder.is_dir():
        return False
    try:
        problem = checksums.damage(folder, only)
    except FileNotFoundError as error:
        problem = str(error)
    if problem:
        logger.warning("The cached %s is damaged (%s): it is made again.", folder, problem)
    return problem is None


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time makes `target`; others wait here. Readers need no lock: a whole folder never changes.

    The system takes the lock from a process that dies, however it dies; what that process was writing is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    try:
        file = _locked(path)
    except OSError as error:  # a file system without locks: then two may prepare the same, and the first one wins
        logger.warning("%s cannot be locked (%s).", target, error.strerror)
        yield
        return
    with file:
        try:
            for half in target.parent.glob(glob.escape(_beside(target)) + "*/"):
                shutil.rmtree(half, ignore_errors=True)
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> Any:
    """The file, opened and locked. Not flock: processes that this one forks would hold on to that."""
    while True:
        with contextlib.ExitStack() as unless_kept:
            file = unless_kept.enter_context(path.open("a"))
            fcntl.lockf(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # else the process that had it has removed it meanwhile
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    unless_kept.pop_all()
                    return file


def _make(target: Path, write: Callable[[Path, Path | None], None], only: Iterable[str] | None = None) -> None:
    """Make the folder `target`, unless it is there and, as far as it is read (`only`), whole.

    Args:
        write: is given the folder to fill and, where there was a damaged one, where that is now.
    """
    if _whole(target, only):
        return
    with _room_named(target.parent), _alone(target), contextlib.ExitStack() as last:
        if _whole(target, only):  # another process has made it meanwhile
            return
        damaged = None
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=_beside(target), dir=target.parent))
            last.callback(shutil.rmtree, aside, ignore_errors=True)
            damaged = target.rename(aside / target.name)
        with written_whole(target) as beside:
            write(beside, damaged)


def checksum(recipe: Any) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


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
        "sources": [{**asdict(source), "files": _file_stamps(source)} for source in data.sources],
        **{key: getattr(data, key) for key in ("tokenizer_type", "vocab_size", "lowercase")},
        **{key: getattr(data, key) for key in ("tokenizer", "validation_fraction", "max_documents", "seed")},
    }
    folder = cache_folder(data.cache_dir) / f"corpus-{checksum(recipe)}"

    def write_documents(beside: Path, damaged: Path | None) -> None:
        kept = None  # one trained again by another version of the library may have other ids
        with contextlib.suppress(FileNotFoundError):
            if data.tokenizer is None and damaged and not checksums.damage(damaged, ("tokenizer",)):
                kept = str(damaged / "tokenizer")
        _write_documents(replace(data, tokenizer=kept or data.tokenizer), beside)
        _write_json(beside / "recipe.json", recipe)

    rows = folder / f"rows-{data.packing}-{length}"
    packed_already = _whole(rows)  # then the documents are not read
    _make(folder, write_documents, ("tokenizer", "counts.json") if packed_already else None)
    if not packed_already or not rows.exists():
        _make(rows, lambda beside, _: _write_rows(data, length, folder, beside))
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
        train=Dataset.from_file(str(rows / "train.arrow")),
        validation=Dataset.from_file(str(rows / "validation.arrow")),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        token_counts=np.load(rows / "token_counts.npy", allow_pickle=False),
        counts=counts,
        folder=folder,
    )


def _write_documents(data: PretrainingData, folder: Path) -> None:
    """Tokenizer, tokenised documents of both splits, and their counts."""
    documents = read_documents(data)
    if len(documents) < 2:
        raise ValueError(
            f"{_titles(data)} holds {len(documents)} document, but pretraining needs at least 2: whole documents are "
            "held out for validation. Add files, or split a long one with sample_by: paragraph."
        )
    place = np.array([_place(name) for name in documents["name"]])
    held = (place < data.validation_fraction) | np.array(documents["held_out"])
    if not held.any():
        held[place.argmin()] = True
    if held.all():
        held[place.argmax()] = False
    splits = {
        "train": documents.select(np.flatnonzero(~held)),
        "validation": documents.select(np.flatnonzero(held)),
    }
    if data.tokenizer is None:
        tokenizer = train_tokenizer(splits["train"]["text"], data)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    counts: dict[str, Any] = {"sources": _count_sources(documents)}
    for split, rows in splits.items():
        tokens = rows.map(
            _tokenize,
            batched=True,
            batch_size=16,  # documents may be whole books
            num_proc=data.num_proc,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": tokenizer},
            features=_TOKEN_FEATURES,
            load_from_cache_file=False,
            desc=f"tokenising {split}",
        )
        tokens.save_to_disk(folder / split)
        counts[split] = {"documents": len(rows), "characters": sum(map(len, rows["text"]))}
    text = splits["train"][0]["text"][:200]
    logger.info("before tokenising: %r", text)
    logger.info("after: %s", tokenizer.tokenize(text))
    _write_json(folder / "counts.json", counts)


def _write_rows(data: PretrainingData, length: int, folder: Path, beside: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    counts = {}
    for split in ("train", "validation"):
        packed = Packed()
        documents = Dataset.load_from_disk(str(folder / split))
        with ArrowWriter(path=str(beside / f"{split}.arrow"), features=_ROW_FEATURES) as writer:
            for row in _rows(documents, data, length, tokenizer, packed):
                writer.write({"input_ids": row})
            writer.finalize()
        if not packed.tokens:
            raise ValueError(f"{_titles(data)}: the {split} documents hold no text.")
        counts[split] = asdict(packed)
        if split == "train":
            rows = Dataset.from_file(str(beside / "train.arrow"))
            np.save(beside / "token_counts.npy", count_tokens(rows, tokenizer), allow_pickle=False)
    _write_json(beside / "counts.json", counts)


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
    total = len(documents) if isinstance(documents, Dataset) else None
    progress = tqdm(sentences, total=total, desc=f"packing rows of {length}", unit="doc", disable=total is None)
    return pack(progress, data.packing, length, tokenizer.cls_token_id, tokenizer.sep_token_id, packed)


def _tokenize(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Ids and sentence lengths of each document."""
    documents = [[s for s in SENTENCE_END.split(text) if s and not s.isspace()] for text in batch["text"]]
    # Byte-level BPE writes the space in front of a word into its token; WordPiece ignores it.
    flat = [(" " if i else "") + sentence for document in documents for i, sentence in enumerate(document)]
    encoded = iter(tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
    ids: list[list[int]] = []
    lengths: list[list[int]] = []
    for document in documents:
        sentences = [next(encoded) for _ in document]
        ids.append([token for sentence in sentences for token in sentence])
        lengths.append([len(sentence) for sentence in sentences])
    return {"ids": ids, "lengths": lengths}


def train_tokenizer(texts: Iterable[str], data: PretrainingData) -> PreTrainedTokenizerBase:
    """A new WordPiece (BERT's) or byte-level BPE (RoBERTa's) tokenizer; equal texts, which are read twice, give one."""
    if data.tokenizer_type == "wordpiece":
        tokenizer = _train_wordpiece(texts, data)
    else:
        base = RobertaTokenizer(add_prefix_space=False)
        if data.lowercase:
            texts = (text.lower() for text in texts)
            base.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer = base.train_new_from_iterator(texts, data.vocab_size, show_progress=True)
    if data.tokenizer_type == "byte_level_bpe" and data.lowercase:
        # RobertaTokenizer builds itself anew when it is loaded, without a normalizer; this class keeps what is saved.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            model_input_names=tokenizer.model_input_names,
            **tokenizer.special_tokens_map,
        )
    logger.info("trained a %s tokenizer of %s tokens", data.tokenizer_type, f"{len(tokenizer):,}")
    return tokenizer


def _train_wordpiece(texts: Iterable[str], data: PretrainingData) -> BertTokenizer:
    """The library numbers single characters within words (`##a`) as its hash tables happen to, and ties go by number.

    So these come first, in order, given as if they were special tokens.
    """
    base = BertTokenizer(do_lower_case=data.lowercase)
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    written = set(base.backend_tokenizer.normalizer.normalize_str("".join(sorted(characters))))
    split = base.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    within = [f"##{one}" for one in sorted(written) if split(f"a{one}")[0][0] == f"a{one}"]
    trained = base.train_new_from_iterator(texts, data.vocab_size, new_special_tokens=within, show_progress=True)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=data.lowercase)


def stored(tokenizer: PreTrainedTokenizerBase, cache_dir: str | None) -> str:
    """The cache's folder of this very tokenizer: prepared corpora are found again by its name, so it names the content.

    The tokenizer's own name does not: a folder may hold another one later, and a Hub name has many revisions.
    """
    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        content = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(written).iterdir()}
        folder = cache_folder(cache_dir) / f"tokenizer-{checksum(content)}"

        def write(beside: Path, damaged: Path | None) -> None:
            shutil.copytree(written, beside, dirs_exist_ok=True)

        _make(folder, write)
    return str(folder)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """An existing tokenizer by name or folder.

    Raises:
        ValueError: it has no [CLS] or [SEP] (or RoBERTa's <s>, </s>), so it cannot mark rows and documents.
        ValueError: the folder is damaged, or needs code of its own.
        ConnectionError: a Hub name that cannot be reached.
    """
    checksums.check(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files set off anything: the library tokenizers raises bare Exceptions
        if Path(name).is_dir() or not isinstance(error, OSError):
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer {name!r} cannot be loaded: {reason[:400]}") from error
        raise ConnectionError(
            f"the tokenizer {name!r} is neither a local folder nor reachable on the Hub. Set data.tokenizer to a "
            "folder, or leave it out to train one from the corpus."
        ) from error
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"the tokenizer {name!r} has no cls_token and sep_token; BERT's and RoBERTa's kinds do.")
    return tokenizer


def read_documents(data: PretrainingData) -> Dataset:
    """Documents of all sources: columns name, text, source, held_out."""
    parts = [_read_source(source, data) for source in data.sources]
    if data.sources[0].weight is None or len(parts) == 1:
        return datasets.concatenate_datasets(parts)
    return datasets.interleave_datasets(parts, _weights(data), seed=data.seed, stopping_strategy="first_exhausted")


def _weights(data: PretrainingData) -> list[float]:
    weights = [source.weight or 1.0 for source in data.sources]
    return [weight / sum(weights) for weight in weights]


def _read_source(source: Source, data: PretrainingData) -> Dataset:
    if source.kind == "demo":
        rows = Dataset.from_list(demo_documents(source.name))
    else:
        rows = _load(source, streaming=False)
        _check_column(source, rows.column_names)
        if data.max_documents is not None:
            rows = rows.select(range(min(len(rows), data.max_documents * source.rows_per_document)))
        rows = _documents_of(rows, source, desc=f"reading {source.title}")
    if not len(rows):
        raise ValueError(f"the source {source.title} is empty: it holds no document with text.")
    if data.max_documents is not None and len(rows) > data.max_documents:
        rows = rows.select(range(data.max_documents))
    return rows


def _documents_of(rows: Any, source: Source, **options: Any) -> Any:
    """Rows of one source, on disk or streamed, as documents."""
    size = source.rows_per_document
    return rows.map(
        _as_documents,
        with_indices=True,
        batched=True,
        batch_size=size * max(1, 256 // size),  # a multiple, so that no document is cut at a batch's end
        remove_columns=rows.column_names,
        fn_kwargs={"column": source.text_column, "size": size, "title": source.title},
        **options,
    )


def _as_documents(
    batch: dict[str, list[Any]], indices: list[int], column: str, size: int, title: str
) -> dict[str, list[Any]]:
    texts = [
        tables.as_text(text, title, index + 1, column) or "" for index, text in zip(indices, batch[column], strict=True)
    ]
    joined = ["\n".join(texts[i : i + size]) for i in range(0, len(texts), size)]
    kept = [(indices[i * size], text) for i, text in enumerate(joined) if text.strip()]
    return {
        "name": [f"{title}:{index}" for index, _ in kept],
        "text": [text for _, text in kept],
        "source": [title] * len(kept),
        "held_out": [False] * len(kept),
    }


def _load(source: Source, streaming: bool) -> Any:
    """The rows of a Hub repository or of local files, with errors that say what to do."""
    if source.kind == "hub":
        return load_hub(source.name or "", source.config, source.split, source.revision, streaming)
    files = find_files(source.path or "")
    kind = tables.kind_of(files[0])
    if kind != "parquet":
        for file in files:
            tables.check_utf8(file)
    if kind in ("csv", "json"):
        return _load_tables(source, files, streaming)
    options = {"sample_by": source.sample_by} if kind == "text" else {}
    names = [tables.literal(file) for file in files]
    try:
        return load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)
    except Exception as error:  # pyarrow has errors of every kind for a damaged file
        raise ValueError(f"{source.path} cannot be read as {kind}: {error.__cause__ or error}") from error


def _load_tables(source: Source, files: list[Path], streaming: bool) -> Any:
    column = source.text_column
    options: dict[str, Any] = {
        "features": Features({column: Value("string")}),
        "gen_kwargs": {"files": tuple(map(str, files)), "column": column},
    }
    if streaming:
        return IterableDataset.from_generator(_texts, **options)
    # Other content of the files, or another reader, is not to be found in the cache.
    fingerprint = checksum([FORMAT, column, _file_stamps(source)])
    try:
        return Dataset.from_generator(_texts, fingerprint=fingerprint, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise ValueError(str(error.__cause__)) from error


def _texts(files: tuple[str, ...], column: str) -> Iterator[dict[str, str | None]]:
    for name in files:
        for number, row in enumerate(tables.read_rows(Path(name), {"text": column}), 1):
            yield {column: tables.as_text(row["text"], name, number, column)}


def load_hub(name: str, config: str | None, split: str, revision: str | None, streaming: bool = False) -> Any:
    """`datasets.load_dataset` with an error that names the data set and the way around the Hub.

    Raises:
        ConnectionError: the repository cannot be reached (no network, or no such name).
    """
    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(
            f"the data set {name!r} cannot be loaded from the Hub ({' '.join(str(error).split())[:200]}). Check the "
            "name and the network, or download it elsewhere and use local files: for pretraining a source {kind: "
            "files, path: folder/*.parquet}, for fine-tuning task: files with train_file and test_file."
        ) from error


def find_files(path: str) -> list[Path]:
    """The text files that a file name, a folder or a glob stands for, in order.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are of several types.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        files = [file for file in given.rglob("*") if file.is_file() and tables.kind_of(file)]
    elif given.is_file():
        files = [given]
    else:
        anchor = Path(given.anchor or ".")
        pattern = str(given.relative_to(given.anchor)) if given.anchor else str(given)
        files = [file for file in anchor.glob(pattern) if file.is_file()]
    if not files:
        raise FileNotFoundError(f"no files at {path!r}; give a file, a folder with {_types()} files, or a glob.")
    kinds = {tables.kind_of(file) for file in files}
    if len(kinds) > 1 or None in kinds:
        suffixes = sorted({file.suffix for file in files})
        raise ValueError(f"{path!r} stands for {', '.join(suffixes)} files; give one kind of {_types()} per source.")
    return sorted(files)


def _types() -> str:
    return tables.types("text", "json", "csv", "parquet")


def _check_column(source: Source, columns: list[str] | None) -> None:
    if columns is not None:
        tables.check_columns(f"the source {source.title}", columns, {"text": source.text_column})


def demo_documents(collection: str | None = None) -> list[dict[str, Any]]:
    """Text of installed packages: one collection, or the demo's three. Books that `bible-paraphrase` tests on are held
    out."""
    chosen = demo_texts.DEMO if collection is None else (collection,)
    documents = [(source, name, text) for source in chosen for name, text in demo_texts.COLLECTIONS[source]()]
    return [
        {
            "name": f"{source}:{name}",
            "text": text,
            "source": source,
            "held_out": source == "world english bible" and name in demo_texts.TEST_BOOKS,
        }
        for source, name, text in documents
    ]


def _stream(data: PretrainingData, length: int) -> PreparedCorpus:
    """Rows that are read, tokenised and packed while training. No shuffling buffer: it would not resume exactly."""
    parts = []
    for source in data.sources:
        if source.kind == "demo":
            part = Dataset.from_list(demo_documents(source.name)).to_iterable_dataset()
        else:
            part = _load(source, streaming=True)
            _check_column(source, part.column_names)
            part = _documents_of(part, source)
        parts.append(part if data.max_documents is None else part.take(data.max_documents))
    if data.sources[0].weight is None or len(parts) == 1:
        documents = datasets.concatenate_datasets(parts)
    else:
        documents = datasets.interleave_datasets(parts, _weights(data), seed=data.seed)
    tokenizer = load_tokenizer(data.tokenizer or "")
    tokens = documents.map(
        _tokenize,
        batched=True,
        batch_size=16,
        remove_columns=["name", "text", "source", "held_out"],
        fn_kwargs={"tokenizer": tokenizer},
    )
    packed = Packed()
    rows = list(_rows(tokens.take(data.validation_documents), data, length, tokenizer, packed))
    if not packed.tokens:
        raise ValueError(f"{_titles(data)}: the first {data.validation_documents} documents hold no text.")
    train = StreamedRows(tokens.skip(data.validation_documents), data, length, tokenizer)
    first = [row["input_ids"] for row in itertools.islice(train, 2000)]
    head = Dataset.from_dict({"input_ids": first}, features=_ROW_FEATURES)
    if not len(head):
        raise ValueError(
            f"{_titles(data)} holds no document beyond the first {data.validation_documents}, which are held out: "
            "lower data.validation_documents."
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
    )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, and not on where a folder stands on this machine."""
    name = os.path.basename(name) if os.path.isabs(name) else name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _count_sources(documents: Dataset) -> dict[str, int]:
    names, counts = np.unique(np.array(documents["source"]), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _file_stamps(source: Source) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of local files: another content is another corpus."""
    if source.kind != "files":
        return None
    stamps = [(str(file.resolve()), file.stat()) for file in find_files(source.path or "")]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stamps]


def _titles(data: PretrainingData) -> str:
    return " + ".join(source.title for source in data.sources)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
