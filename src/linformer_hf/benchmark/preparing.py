"""`python scripts/preparing.py FOLDER`: what preparing a corpus costs, in time and memory, on made documents.

They are as long as Wikipedia's and BookCorpus's (see `made_documents`), in Parquet files as on the Hub. Preparing is
measured whole (`prepare`: read, hold out, tokenise, write, pack, checksums) beside `datasets.map` with the same
tokenizer, which does nothing else: in new processes with empty caches, on one core, in turn, CPU time beside wall time.
Memory is sampled over all processes of a preparation. FOLDER gets results.json and tables.md.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.corpus import StreamedRows, prepare
from ..data.documents import PretrainingData, Source, documents_from, load_rows, read_documents
from ..data.tokenizer import load_tokenizer, train_tokenizer
from ..utils.environment import processor
from ..utils.files import RESULTS_FILE
from ..utils.reporting import markdown_table
from ..utils.runs import Run


FILE_DOCUMENTS = 10_000
# Of Wikipedia's 6,407,814 articles and BookCorpus's 74,004,228 sentences, 1,000 to a document, one in 88 is of these.
BOOK_EVERY, BOOK_WORDS = 88, 13_000
# English Wikipedia of 2023: 3.1 kB an article in the mean, half of them shorter than 1.6 kB; words have 5.2 bytes here.
ARTICLE_WORDS = (5.6, 1.15)  # mean and spread of their logarithm
WORDS, RANK_SHIFT = 60_000, 3  # Zipf's law: the r-th word has a share of 1 / (r + 3)
ROW = 512


def made_documents(count: int, seed: int = 0) -> Iterator[str]:
    """Documents of made words and sentences; the same in every call."""
    generator = np.random.default_rng(0)
    syllables = [c + v for c in (*"bcdfghklmnprstvw", "st", "tr") for v in (*"aeiou", "an", "er", "in")]
    chosen = generator.integers(0, len(syllables), (WORDS, 4))
    lengths = generator.integers(1, 5, WORDS)
    words = np.array(["".join(syllables[i] for i in row[:n]) for row, n in zip(chosen, lengths, strict=True)])
    shares = np.cumsum(1 / np.arange(RANK_SHIFT, WORDS + RANK_SHIFT))
    generator = np.random.default_rng((1, seed))
    for i in range(count):
        n = BOOK_WORDS if i % BOOK_EVERY == 0 else int(np.clip(generator.lognormal(*ARTICLE_WORDS), 20, 30_000))
        drawn = words[np.searchsorted(shares[:-1], generator.random(n) * shares[-1])]
        ends = np.cumsum(generator.integers(5, 40, n // 5 + 1))
        sentences = np.split(drawn, ends[ends < n])
        yield " ".join(f"{' '.join(sentence).capitalize()}." for sentence in sentences)


def write_corpus(folder: Path, count: int) -> None:
    """Parquet files with the column `text`."""
    folder.mkdir(parents=True)
    documents = made_documents(count)
    for number in itertools.count():
        if not (texts := list(itertools.islice(documents, FILE_DOCUMENTS))):
            return
        Dataset.from_dict({"text": texts}).to_parquet(folder / f"{number:05}.parquet")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    found.add_argument("folder", type=Path, help="to write results.json and tables.md to")
    found.add_argument("--documents", type=int, nargs="+", default=[10_000, 50_000, 200_000], help="memory is of these")
    found.add_argument("--timed", type=int, default=12_000, help="documents of which time is measured")
    found.add_argument("--repeats", type=int, default=3, help="of the times")
    found.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="of the runs for memory")
    found.add_argument("--work", type=Path, help="where the made corpora lie meanwhile (default: the system's place)")
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure as the command line says; the folder."""
    asked = parser().parse_args(arguments)
    if (asked.folder / RESULTS_FILE).exists():
        parser().error(f"{asked.folder} holds a finished measurement ({RESULTS_FILE}); name another folder.")
    if min(*asked.documents, asked.timed) < 100 or min(asked.repeats, asked.processes) < 1:
        parser().error("--documents and --timed must be at least 100, --repeats and --processes at least 1.")
    options = {name: value for name, value in vars(asked).items() if name not in ("folder", "work")}
    run = Run("preparing", {"preparing": options}, asked.folder)
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        measured = measure(Path(work), **options)
    content = run.content(0, "cpu", "int32", processor=processor(), cores=os.cpu_count(), **measured)
    text = tables(content)
    run.write(content, text, "tables.md")
    return run.tell(text, "Tables", "tables.md")


def measure(work: Path, documents: list[int], timed: int, repeats: int, processes: int) -> dict[str, Any]:
    """`times`: task -> a row for each repeat; `memory`: a row for each number of documents."""
    tokenizer = str(work / "tokenizer")
    data = PretrainingData([Source("files", path="-")])
    train_tokenizer(list(made_documents(min(timed, 2_000))), data).save_pretrained(tokenizer)
    corpora = {count: work / f"made-{count}" for count in {*documents, timed}}
    for count, folder in corpora.items():
        write_corpus(folder, count)
    tasks = {"prepare": 1, "map": 1, "stream": 1, "read": 1}
    times: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    for repeat in range(repeats):  # in turn, forwards and backwards, so that no task is always behind the same other
        for task in list(tasks)[:: -1 if repeat % 2 else 1]:
            times[task].append(apart(work, task, corpora[timed], tokenizer, 1))
    memory = [
        {"documents": count, **apart(work, "prepare", corpora[count], tokenizer, processes)} for count in documents
    ]
    return {"times": times, "memory": memory}


def apart(work: Path, task: str, corpus: Path, tokenizer: str, processes: int) -> dict[str, Any]:
    """Run a task in a process of its own with empty caches: its times, counts, and the peaks of memory."""
    with tempfile.TemporaryDirectory(dir=work) as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", "-m", __name__, task, str(corpus), tokenizer, cache, str(processes)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert process.stdout is not None
        with process, memory_of(process.pid) as peaks:
            lines = process.stdout.read().splitlines()
        if process.returncode:
            raise ValueError(f"the process that measures {task} ended with {process.returncode}; see above.")
        written = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return {**json.loads(lines[-1]), **peaks, "written_bytes": written}


@contextlib.contextmanager
def memory_of(pid: int) -> Iterator[dict[str, int]]:
    """Peaks, in bytes, of a process with all that it starts.

    `anonymous_bytes` is what they have allocated (pages that forked processes share count in each), `resident_bytes`
    has the pages of mapped files too, which the system may take back.
    """
    peaks = {"anonymous_bytes": 0, "resident_bytes": 0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.05):
            found = [status for one in _family(pid) if (status := _status(one))]
            for name, field in (("anonymous_bytes", "RssAnon"), ("resident_bytes", "VmRSS")):
                peaks[name] = max(peaks[name], sum(status.get(field, 0) for status in found))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _family(pid: int) -> list[int]:
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [one for child in path.read_text().split() for one in _family(int(child))]
    return found


def _status(pid: int) -> dict[str, int]:
    """Name -> bytes of what /proc says in kB; empty if the process has ended."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}
    return {}


def work() -> None:
    """The measured process: a line of JSON on stdout."""
    task, corpus, tokenizer, cache, processes = sys.argv[1:]
    source = Source("files", path=corpus)
    given: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": cache, "num_proc": int(processes)}
    call: Any = {"prepare": _prepare, "map": _map, "stream": _stream, "read": _stream}[task]
    if task == "map":  # what it reads is there before the clock starts, and what `prepare` reads is not
        given["rows"] = load_rows(source, streaming=False)
    given["of"] = 10**9 if task == "read" else 1
    load_tokenizer(tokenizer)
    before, wall = _cpu_seconds(), time.perf_counter()
    counts = call(source, **given)
    spent = {"wall_s": time.perf_counter() - wall, "cpu_s": _cpu_seconds() - before}
    print(json.dumps({**spent, **counts}))


def _cpu_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _prepare(source: Source, of: int, **given: Any) -> dict[str, Any]:
    """`read_s` is the wall time of what one process does before the others begin: `prepare` finds it done."""
    data, begun = PretrainingData([source], **given), time.perf_counter()
    read_documents(data)
    reading = time.perf_counter() - begun
    counts = prepare(data, ROW).counts["rows"]
    tokens = sum(split["tokens"] for split in counts.values())
    return {"tokens": tokens, "rows": counts["train"]["rows"], "read_s": reading}


def _map(source: Source, tokenizer: str, rows: Dataset, **given: Any) -> dict[str, int]:
    loaded = load_tokenizer(tokenizer)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": loaded(batch["text"], add_special_tokens=False)["input_ids"]}

    found = rows.map(tokenise, batched=True, remove_columns=rows.column_names)
    return {"tokens": sum(len(chunk.flatten()) for chunk in found.data.column("input_ids").chunks)}


def _stream(source: Source, tokenizer: str, of: int, **given: Any) -> dict[str, int]:
    """All documents read by one reader, which tokenises and packs them (`of` 1) or none of them."""
    data = PretrainingData([source], tokenizer=tokenizer, streaming=True)
    documents = documents_from(load_rows(source, streaming=True), source)
    rows = StreamedRows(documents, 0, data, ROW, load_tokenizer(tokenizer)).share(of - 1, of)
    return {"tokens": sum(len(row["input_ids"]) for row in rows)}


def rate(content: dict[str, Any], task: str, clock: str = "cpu_s") -> float:
    """Tokens a second of one core: those of the text over the median of the repeats."""
    tokens = content["times"]["prepare"][0]["tokens"]
    return tokens / median(row[clock] for row in content["times"][task])


TASKS = {
    "prepare": "prepared: read, held out, tokenised, written, packed into rows of 512, summed",
    "map": "`datasets.map`, tokenised and written only",
    "stream": "streamed: read, tokenised, packed",
    "read": "streamed: read only (documents of another reader)",
}


def tables(content: dict[str, Any]) -> str:
    """Markdown: times beside datasets.map, and memory."""
    rows = []
    for task, said in TASKS.items():
        cells = [said]
        for clock in ("cpu_s", "wall_s"):
            values = [row[clock] for row in content["times"][task]]
            cells.append(f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        over = median(
            a["cpu_s"] / b["cpu_s"] for a, b in zip(content["times"][task], content["times"]["map"], strict=True)
        )
        rows.append([*cells, f"{over:.2f}", f"{rate(content, task):,.0f}"])
    asked, tokens = content["recipe"]["preparing"], content["times"]["prepare"][0]["tokens"]
    head = ["one core", "CPU s", "wall s", "CPU time over map's", "tokens / CPU s"]
    blocks = [
        f"{content['processor']}, {content['cores']} cores; revision {(content['revision'] or 'unknown')[:12]}; "
        + ", ".join(f"{name} {content['versions'][name]}" for name in ("datasets", "tokenizers", "transformers")),
        f"{asked['timed']:,} made documents of {tokens:,} tokens, {asked['repeats']} repeats in turn, median (range):",
        markdown_table(head, rows),
    ]
    if content["memory"]:
        blocks += memory_table(content)
    return "\n\n".join(blocks)


def memory_table(content: dict[str, Any]) -> list[str]:
    mib = [
        [f"{row['documents']:,}", f"{row['tokens']:,}"]
        + [f"{row[name] / 2**20:,.0f}" for name in ("anonymous_bytes", "resident_bytes", "written_bytes")]
        + [f"{row['wall_s']:,.0f}", f"{row['read_s']:,.0f}", f"{row['cpu_s']:,.0f}"]
        + [f"{row['tokens'] / row['wall_s']:,.0f}"]
        for row in content["memory"]
    ]
    head = [
        "documents",
        "tokens",
        "allocated, MiB",
        "and mapped files",
        "on disk",
        "wall s",
        "reading",
        "CPU s",
        "tokens / s",
    ]
    return [
        f"Peak memory of all processes together, {content['recipe']['preparing']['processes']} of which tokenise:",
        markdown_table(head, mib),
    ]


if __name__ == "__main__":
    work()
