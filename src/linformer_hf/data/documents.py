"""Where documents come from: files, the Hub, the texts of installed packages."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset, Features, IterableDataset, Value, load_dataset

from . import demo_texts, tables
from .cache import checksum


FORMAT = 7  # raise it when the content of prepared folders changes: old ones are then not found any more


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
        packing: `full_sentences`, `doc_sentences`, `contiguous` or `document` (see `packing.py`).
        sequence_length: tokens in a row; by default the model's max_position_embeddings.
        mlm_probability: share of tokens to predict; `eval_mlm_probability` is validation's, by default the same.
        mask_fractions: shares of these that become [MASK], a random token, or stay.
        whole_word_masking: choose whole words.
        validation_fraction: share of documents that are held out.
        validation_documents: streaming only: so many first documents of the stream are held out.
        max_documents: stop after so many documents of each source.
        streaming: read, tokenise and pack while training, pass after pass in one order, with no prepared copy.
        readers: streaming only: reader i of n tokenises and packs every n-th document from the i-th on, and they give
            rows in turn. Readers are dealt out to processes and their data loaders' workers; by default there is one
            for each. Runs on other numbers of processes train on the same rows in each step if it is the same, and
            divides a step's rows.
        cache_dir: where prepared corpora lie (default: $LINFORMER_HF_CACHE, else ~/.cache/linformer_hf).
        num_proc: processes that tokenise and pack more than 10,000 documents (default: as many as there are cores).
        seed: of masking and of interleaving.
    """

    sources: list[Source]
    tokenizer: str | None = None
    tokenizer_type: Literal["wordpiece", "byte_level_bpe"] = "wordpiece"
    vocab_size: int = 30522
    lowercase: bool = True
    packing: Literal["full_sentences", "doc_sentences", "contiguous", "document"] = "full_sentences"
    sequence_length: int | None = None
    mlm_probability: float = 0.15
    eval_mlm_probability: float | None = None
    mask_fractions: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    whole_word_masking: bool = False
    validation_fraction: float = 0.01
    validation_documents: int = 500
    max_documents: int | None = None
    streaming: bool = False
    readers: int | None = None
    cache_dir: str | None = None
    num_proc: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one, such as {kind: files, path: texts/*.txt}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
        if self.readers is not None and (self.readers < 1 or not self.streaming):
            raise ValueError(
                f"readers are streaming's, and at least 1, got {self.readers}; set streaming or leave it out."
            )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none.")
        if self.streaming and self.tokenizer is None:
            raise ValueError("streaming needs an existing tokenizer: set data.tokenizer to its name or folder.")


def read_documents(data: PretrainingData) -> Dataset:
    """Documents of all sources: columns name, text, source, held_out."""
    parts = [_read_source(source, data) for source in data.sources]
    if data.sources[0].weight is None or len(parts) == 1:
        return datasets.concatenate_datasets(parts)
    return datasets.interleave_datasets(parts, shares(data), seed=data.seed, stopping_strategy="first_exhausted")


def shares(data: PretrainingData) -> list[float]:
    weights = [source.weight or 1.0 for source in data.sources]
    return [weight / sum(weights) for weight in weights]


def _read_source(source: Source, data: PretrainingData) -> Dataset:
    if source.kind == "demo":
        rows = Dataset.from_list(demo_documents(source.name))
    else:
        rows = load_rows(source, streaming=False)
        check_column(source, rows.column_names)
        if data.max_documents is not None:
            rows = rows.select(range(min(len(rows), data.max_documents * source.rows_per_document)))
        rows = documents_from(rows, source, desc=f"reading {source.title}")
    if not len(rows):
        raise ValueError(f"the source {source.title} is empty: it holds no document with text.")
    if data.max_documents is not None and len(rows) > data.max_documents:
        rows = rows.select(range(data.max_documents))
    return rows


def documents_from(rows: Any, source: Source, **options: Any) -> Any:
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


def load_rows(source: Source, streaming: bool) -> Any:
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
    options: dict[str, Any] = {}
    if kind == "text":
        options = {"sample_by": source.sample_by, "encoding": "utf-8-sig"}
        options["features"] = Features({"text": Value("string")})  # a file without rows tells none
    names = [glob.escape(str(file)) for file in files]  # brackets would make a pattern of a name
    try:
        return load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)
    except Exception as error:  # pyarrow has errors of every kind for a damaged file
        if kind == "text" and not streaming and next(iter(load_rows(source, streaming=True)), None) is None:
            return Dataset.from_dict({"text": []})  # `datasets` keeps no split without rows
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
    fingerprint = checksum([FORMAT, column, file_stamps(source)])
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
        ValueError: it has no such configuration or split.
    """
    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except ValueError as error:  # its text names those that there are
        asked = f"configuration {config!r}, split {split!r}"
        raise ValueError(f"the data set {name!r} has no {asked}: {' '.join(str(error).split())[:300]}") from error
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(
            f"the data set {name!r} cannot be loaded from the Hub ({' '.join(str(error).split())[:200]}). Check the "
            "name and the network, or download it elsewhere and use local files: for pretraining a source {kind: "
            "files, path: folder/*.parquet}, for fine-tuning task: files with train_file and test_file."
        ) from error


def find_files(path: str, besides: Sequence[Path] = ()) -> list[Path]:
    """The text files that a file name, a folder or a glob stands for, in order.

    In a folder, what is hidden or macOS packs beside a file's content is none of them.

    Args:
        besides: files that are not looked for, and folders in which nothing is.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are of several types.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        files = [file for file in _all_files(given) if file.is_file() and tables.kind_of(file)]
    elif given.is_file():
        files = [given]
    else:
        anchor = Path(given.anchor or ".")
        pattern = str(given.relative_to(given.anchor)) if given.anchor else str(given)
        files = [file for file in anchor.glob(pattern) if file.is_file()]
    left_out = {one.resolve() for one in besides}
    if left_out:
        files = [file for file in files if left_out.isdisjoint((file.resolve(), *file.resolve().parents))]
    if not files:
        raise FileNotFoundError(f"no files at {path!r}; give a file, a folder with {_types()} files, or a glob.")
    kinds = {tables.kind_of(file) for file in files}
    if len(kinds) > 1 or None in kinds:
        suffixes = sorted({file.suffix for file in files})
        raise ValueError(f"{path!r} stands for {', '.join(suffixes)} files; give one kind of {_types()} per source.")
    return sorted(files)


def _all_files(folder: Path) -> Iterator[Path]:
    """What is in a folder and its folders, linked ones too, but none twice (links may go round) and no hidden one."""
    seen: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := Path(place).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        # A folder under its own name before one that leads to it.
        folders[:] = sorted(
            (name for name in folders if not _hidden(name)), key=lambda name: Path(place, name).is_symlink()
        )
        yield from (Path(place, name) for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _types() -> str:
    return tables.types("text", "json", "csv", "parquet")


def check_column(source: Source, columns: list[str] | None) -> None:
    if columns is not None:
        tables.check_columns(f"the source {source.title}", columns, {"text": source.text_column})


def demo_documents(collection: str | None = None) -> list[dict[str, Any]]:
    """Text of installed packages: one collection, or the demo's three. Books that `bible-paraphrase` and `word-order`
    test on are held out."""
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


def file_stamps(source: Source) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of local files: another content is another corpus."""
    if source.kind != "files":
        return None
    stamps = [(str(file.resolve()), file.stat()) for file in find_files(source.path or "")]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stamps]
