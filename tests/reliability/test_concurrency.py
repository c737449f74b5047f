"""Many processes and one cache: a corpus is prepared once, all read the same, and a killed process blocks nobody."""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tqdm

from linformer_hf.data import corpus as corpus_module
from linformer_hf.data.corpus import prepare
from linformer_hf.data.documents import PretrainingData, Source
from torture import record, times
from waiting import HANG


pytestmark = pytest.mark.torture

READERS = 20
LENGTH = 32
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def data(texts, tmp_path) -> PretrainingData:
    settings = {"tokenizer_type": "byte_level_bpe", "vocab_size": 400, "validation_fraction": 0.2}
    return PretrainingData([Source(kind="files", path=str(texts))], cache_dir=str(tmp_path / "cache"), **settings)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """How often documents and rows were written, by any process: a list of "documents" and "rows"."""
    log = tmp_path / "written"

    def note(name: str, write):
        def noting(*arguments):
            with log.open("a") as file:
                file.write(name + "\n")
            return write(*arguments)

        return noting

    for name in ("documents", "rows"):
        monkeypatch.setattr(corpus_module, f"_write_{name}", note(name, getattr(corpus_module, f"_write_{name}")))
    return lambda: sorted(log.read_text().split()) if log.exists() else []


def answer(data: PretrainingData) -> str:
    found = prepare(data, LENGTH)
    rows = [found.train["input_ids"][:], found.validation["input_ids"][:], found.token_counts.tolist(), found.counts]
    return hashlib.sha256(repr([rows, sorted(found.tokenizer.get_vocab().items())]).encode()).hexdigest()


def put_answer(data: PretrainingData, answers, hold_at: int = 0) -> None:
    """The answer, and how often a file was changed under the lock. At the change `hold_at` it says so and waits."""
    own_progress_lock()
    seen = 0

    def watch(event: str, given: tuple) -> None:
        nonlocal seen
        writes = event in ("os.rename", "os.mkdir") or (event == "open" and isinstance(given[2], int) and given[2] & 3)
        if writes and "/." in str(given[0]) and not str(given[0]).endswith(".lock"):
            seen += 1
            if seen == hold_at:
                answers.put("held")
                time.sleep(HANG)

    sys.addaudithook(watch)
    answers.put((answer(data), seen))


def prepared_by_another(data: PretrainingData) -> tuple[str, int]:
    answers = FORK.SimpleQueue()
    process = FORK.Process(target=put_answer, args=(data, answers))
    process.start()
    process.join(HANG)
    return answers.get()


def own_progress_lock(progress: type = tqdm.tqdm) -> None:
    """tqdm's lock is one for all processes of a fork: a process killed with it would block the tests, not a user."""
    progress.set_lock(threading.RLock())
    for kind in progress.__subclasses__():
        own_progress_lock(kind)


def together(data: PretrainingData, processes: int) -> list[str]:
    """What so many processes get that begin at the same moment."""
    barrier, answers = FORK.Barrier(processes), FORK.Queue()

    def run() -> None:
        barrier.wait(HANG)
        answers.put(answer(data))

    running = [FORK.Process(target=run) for _ in range(processes)]
    for process in running:
        process.start()
    found = [answers.get(timeout=HANG) for _ in running]
    for process in running:
        process.join(HANG)
    assert [process.exitcode for process in running] == [0] * processes
    return found


def remains(data: PretrainingData) -> list[str]:
    """Names of what a preparation writes and clears away."""
    return [path.name for path in Path(data.cache_dir).rglob(".*")]


def test_two_processes_prepare_a_corpus_once(data, written):
    first, second = together(data, 2)
    assert first == second == answer(data)
    assert written() == ["documents", "rows"]
    assert remains(data) == []


def test_twenty_processes_read_one_corpus_whether_or_not_it_is_there(data, written):
    begun = time.monotonic()
    assert len({*together(data, READERS), answer(data)}) == 1  # the first of them makes it
    assert len({*together(data, READERS), answer(data)}) == 1
    assert written() == ["documents", "rows"]
    record("twenty processes read one corpus", processes=READERS, seconds=round(time.monotonic() - begun, 1))


@pytest.mark.parametrize(
    "what", ["rows-*/parts/00000/train.arrow", "tokenizer/tokenizer_config.json", "counts.json", "checksums.json"]
)
def test_twenty_processes_find_the_same_damage(data, written, what):
    """It is put right once; those that waited for it take what the first one made."""
    whole = answer(data)
    (path,) = prepare(data, LENGTH).folder.glob(what)
    content = bytearray(path.read_bytes())
    content[0] ^= 4
    path.write_bytes(content)
    assert set(together(data, READERS)) == {whole}
    again = ["rows"] if what.startswith("rows") else ["documents", "rows"]  # counts are the documents'
    assert written() == sorted(["documents", "rows", *again])
    assert remains(data) == []


def test_damaged_documents_are_noticed_when_other_rows_are_packed(data, written):
    whole = answer(data)
    folder = prepare(data, LENGTH).folder
    expected = prepare(data, LENGTH // 2).train["input_ids"][:]
    shutil.rmtree(folder / f"rows-full_sentences-{LENGTH // 2}")
    (path,) = (folder / "parts").glob("*/train.arrow")
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 1
    path.write_bytes(content)
    assert answer(data) == whole  # rows of this length are there, so documents are not read
    assert written() == ["documents", "rows", "rows"]
    assert prepare(data, LENGTH // 2).train["input_ids"][:] == expected
    assert written() == ["documents", "documents", "rows", "rows", "rows"]


def test_a_reader_keeps_what_it_has_opened_when_the_folder_is_made_again(data):
    opened = prepare(data, LENGTH)
    rows = opened.train["input_ids"][:]
    folder = opened.folder
    (folder / "counts.json").write_text("{}", encoding="utf-8")
    assert prepare(data, LENGTH).train["input_ids"][:] == rows
    assert opened.train[:]["input_ids"] == rows  # mapped from files that have no name any more


def test_a_process_that_is_killed_leaves_no_lock_and_nothing_half_for_ever(data, tmp_path, written):
    """kill -9 while it holds the lock, at a change drawn; the one that waits goes on at once."""
    (whole, changes), draw, rounds = prepared_by_another(data), random.Random(0), times(3, 40)
    for number in range(rounds):
        shutil.rmtree(data.cache_dir)
        told = FORK.SimpleQueue()
        holder = FORK.Process(target=put_answer, args=(data, told, draw.randint(1, changes)))
        holder.start()
        assert told.get() == "held"
        waiter, answers = None, FORK.Queue()
        if number % 2:  # one that waits for the lock already
            waiter = FORK.Process(target=put_answer, args=(data, answers))
            waiter.start()
            time.sleep(0.05)
        os.kill(holder.pid, signal.SIGKILL)
        holder.join(HANG)
        assert holder.exitcode == -signal.SIGKILL
        assert (answers.get(timeout=HANG)[0] if waiter else answer(data)) == whole
        if waiter:
            waiter.join(HANG)
        assert remains(data) == []
    record("no stale lock after kill -9", kills=rounds, rounds=rounds)
