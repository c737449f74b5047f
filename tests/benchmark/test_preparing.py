"""What preparing costs, from end to end at a tiny size (no assertion about time), and the documents that are made."""

import json
import subprocess
import sys
from itertools import islice
from statistics import mean

import pytest

from linformer_hf.benchmark.preparing import BOOK_EVERY, made_documents, main, memory_of, rate, tables
from linformer_hf.utils.files import SUM_KEY
from waiting import wait_for


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    place = tmp_path_factory.mktemp("preparing")
    options = ["--documents", "100", "--timed", "100", "--repeats", "1", "--processes", "1", "--work", str(place)]
    return main([str(place / "out"), *options])


def test_results_hold_every_task_and_the_table_is_made_of_them(measured):
    content = json.loads((measured / "results.json").read_text(encoding="utf-8"))
    assert content.pop(SUM_KEY)
    assert content["verb"] == "preparing"
    tokens = content["times"]["prepare"][0]["tokens"]
    assert content["times"]["map"][0]["tokens"] == tokens  # all of it was tokenised by both
    assert content["times"]["stream"][0]["tokens"] > tokens  # with special tokens
    assert content["times"]["read"][0]["tokens"] == 0
    assert rate(content, "prepare") == tokens / content["times"]["prepare"][0]["cpu_s"]
    (row,) = content["memory"]
    assert row["tokens"] == tokens
    assert 2**24 < row["anonymous_bytes"] <= row["resident_bytes"]
    assert (measured / "tables.md").read_text(encoding="utf-8") == tables(content) + "\n"
    assert [path.name for path in measured.parent.iterdir()] == ["out"]  # what was made meanwhile is gone


def test_a_finished_measurement_is_not_overwritten(measured, capsys):
    for arguments, said in (([], "holds a finished measurement"), (["--timed", "5"], "at least 100")):
        with pytest.raises(SystemExit):
            main([str(measured if not arguments else measured / "new"), *arguments])
        assert said in capsys.readouterr().err


def test_made_documents_are_as_long_as_the_real_ones():
    documents = list(islice(made_documents(10**6), 10 * BOOK_EVERY))
    assert documents == list(made_documents(10 * BOOK_EVERY))
    articles = [text for i, text in enumerate(documents) if i % BOOK_EVERY]
    books = documents[::BOOK_EVERY]
    assert 2_500 < mean(map(len, articles)) < 4_000
    assert {len(text.split()) for text in books} == {13_000}


def test_memory_of_a_process_counts_what_it_starts():
    child = "import subprocess, sys; block = bytearray(2**25); print(len(block), flush=True); input()"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", both], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process, memory_of(process.pid) as peaks:
        process.stdout.readline()
        wait_for(lambda: peaks["anonymous_bytes"] > 2**25)
        process.stdin.close()
    assert peaks["resident_bytes"] >= peaks["anonymous_bytes"]
