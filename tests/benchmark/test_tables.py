"""Every cell of the benchmark's tables, from rows written by hand."""

import pytest

from linformer_hf.benchmark.encoders import FLOOR, OURS
from linformer_hf.benchmark.tables import (
    BASELINE,
    beside,
    exponents,
    grouped,
    mark,
    memory_table,
    name_of,
    paper_table,
    savings,
    table_2,
    time_table,
    title,
)


WORK = {"mode": "inference", "dtype": "float32", "dropout": 0.0, "fill": 1.0, "batch": 2, "length": 512}


def timed(encoder: str, k: int | None, seconds: float, **more) -> dict:
    times = {"cpu_s": seconds, "cpu_range_s": [seconds / 2, 2 * seconds], "wall_s": 9.0, "wall_range_s": [9.0, 9.0]}
    times |= {"threads": 1, "allocator": "default", "contended": 0, "samples": 4}
    check = {"fails_check": False} if encoder == OURS else {}
    return {**WORK, **times, **check, "encoder": encoder, "k": k, **more}


def held(encoder: str, k: int | None, inputs: float, **more) -> dict:
    return {**WORK, "encoder": encoder, "k": k, "peak_bytes": 100 * inputs, "input_bytes": 100, **more}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "inference, float32, 1 thread, CPU time, default malloc"),
        (
            {"threads": 0, "fill": 0.625},
            "inference, float32, 62.5 % real tokens, all threads, wall time, default malloc",
        ),
        (
            {"mode": "training", "dtype": "bfloat16", "dropout": 0.1, "threads": 4},
            "training, bfloat16 autocast, dropout 0.1, 4 threads, wall time, default malloc",
        ),
        ({"dtype": "bfloat16"}, "inference, bfloat16, 1 thread, CPU time, default malloc"),
    ],
)
def test_a_title_says_how_it_was_measured(change, wanted):
    assert title(timed(OURS, 128, 1.0, **change)) == wanted


def test_a_row_of_times_cell_by_cell():
    rows = [
        timed(OURS, 128, 0.004, contended=3),
        timed(BASELINE, None, 0.01, contended=2),
        timed("linformer", 256, 1.0),  # another K: not beside ours
        timed("longformer", None, 1.0, failed="out of memory"),
        timed(FLOOR, 128, 0.001),
    ]
    assert time_table(rows).splitlines() == [
        f"| N | K | rows | ours, ms | {BASELINE} | linformer | ours / matmul floor |",
        "|" + " --- |" * 7,
        "| 512 | 128 | 2 | 4 (2 to 8) ! | 2.50 |  | 4.00 |",
    ]
    assert beside([*rows, timed(BASELINE, None, 1.0, length=1024)], rows[0]).keys() == {BASELINE, FLOOR}


def test_a_case_is_marked_where_more_than_half_of_its_samples_were_contended():
    assert [mark(timed(OURS, 128, 1.0, contended=n)) for n in range(5)] == ["", "", "", " !", " !"]


def test_memory_in_inputs_and_its_growth():
    rows = [held(OURS, 128, 3), held(BASELINE, None, 8), held(OURS, 128, 6, length=1024)]
    rows.append({**WORK, "encoder": BASELINE, "k": None, "length": 1024, "failed": "out of memory"})
    lines = memory_table(rows).splitlines()
    assert lines[2] == f"| N | rows | {name_of(rows[0])} | {BASELINE} |"
    assert lines[4:6] == ["| 512 | 2 | 3.00 | 8.00 |", "| 1,024 | 2 | 6.00 | failed |"]
    assert lines[-1] == f"It grows with N to the power: {OURS}, K = 128 1.00."  # one point has no slope


def test_exponents_of_a_row_take_the_batch_out():
    rows = [timed(OURS, 128, 2.0, batch=4), timed(OURS, 128, 2.0, batch=2, length=1024)]
    assert exponents(rows, "cpu_s", True) == f"{OURS}, K = 128 1.00"
    assert exponents(rows, "cpu_s", False) == f"{OURS}, K = 128 0.00"


def test_savings_are_those_of_the_first_setting_with_the_baseline():
    timings = [timed(OURS, 128, 1.0), timed(BASELINE, None, 3.0)]
    timings += [{**row, "threads": 0, "wall_s": 5.0 * row["cpu_s"] ** 2} for row in timings]
    timings.append(timed(OURS, 512, 2.0))
    content = {"timings": timings, "memory": [held(OURS, 128, 2), held(BASELINE, None, 8)]}
    first, times, memory = savings(content)
    assert (first, times, memory) == (timings[1], {(512, 128): 3.0, (512, 512): 1.5}, {(512, 128): 4.0})
    # Time and memory, in brackets the paper's; no memory was measured of K = 512, which the paper does not have.
    assert paper_table(content).splitlines()[-1] == "| 512 | 3.0 / 4.0 [1.5 / 1.7] | 1.5 /  |"
    assert paper_table({"timings": [timed(OURS, 128, 1.0)], "memory": []}) == ""


def test_the_papers_table_2_has_the_tasks_that_it_knows():
    assert table_2(["genre", "files"]) == []
    (block,) = table_2(["qqp", "genre", "sst2"])
    assert "| N | model | qqp | sst2 |" in block
    assert "| 512 | RoBERTa-base | 90.9 | 93.1 |" in block


def test_groups_keep_the_order_of_their_rows():
    rows = [{"a": 2, "b": 0}, {"a": 1, "b": 1}, {"a": 2, "b": 2}]
    assert list(grouped(rows, "a").items()) == [((2,), [rows[0], rows[2]]), ((1,), [rows[1]])]
