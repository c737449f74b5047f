"""Many calls and many steps: neither memory nor open files grow.

Counted is what is held (bytes that malloc has given out, Python's own blocks), not what the system has lent: that grows
and shrinks with the machine's load. In a process of its own, after a warm-up, since caches are filled first.
"""

import ctypes
import gc
import json
import random
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import torture
from forks import SERVER
from linformer_hf import LinformerConfig, LinformerForMaskedLM
from waiting import HANG


COUNTS = {
    "calls": torture.times(500, 100_000),
    "training": torture.times(300, 100_000),  # steps; at 70 a second about half an hour
}
SAMPLES = 100
# Of 1,000 calls or steps. A tensor of this size kept at each call would be 64 KiB a call; an object is a block or more,
# and Python keeps some hundreds of its own until it has seen them all.
LIMIT_KIB, LIMIT_BLOCKS = 200.0, {True: 500.0, False: 5_000.0}[torture.LONG]


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: the 5th number is of bytes in blocks of their own, the 8th of those in its arenas."""

    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def held_kib() -> float:
    """What malloc has given out and not got back."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    numbers = mallinfo().numbers
    return (numbers[4] + numbers[7]) / 1024


def endure(what: str, kind: str, count: int, report: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw, process = random.Random(0), psutil.Process()
    samples = np.zeros((0, 4))  # no objects of Python's own, which are counted
    model = LinformerForMaskedLM(
        LinformerConfig(
            vocab_size=100,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=128,
            projected_length=32,
            projection_type=kind,
            local_window=4 if kind == "gated_pool" else 0,
        )
    ).train(what == "training")
    optimizer = torch.optim.AdamW(model.parameters())
    # A few shapes that come again and again: the library behind torch keeps something for each of the last 1,024.
    batches = [[draw.randint(1, 128) for _ in range(1 + shape % 4)] for shape in range(16)]
    gc.freeze()  # what was there before is not looked through again
    for i in range(count):
        lengths = draw.choice(batches)
        mask = torch.tensor([[int(i < length) for i in range(max(lengths))] for length in lengths])
        given = {"input_ids": torch.randint(5, 99, mask.shape), "attention_mask": mask}
        if what == "training":
            model(**given, labels=given["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            with torch.no_grad():
                model(**given)
        del lengths, mask, given
        if i % max(1, count // SAMPLES) == 0:
            gc.collect()
            samples = np.vstack((samples, (i, held_kib(), sys.getallocatedblocks(), process.num_fds())))
    at, held, blocks, files = samples[len(samples) // 2 :].T
    found = {
        "count": int(at[-1]) + 1,
        "kib_per_1000": 1000 * np.polyfit(at, held, 1)[0],
        "blocks_per_1000": 1000 * np.polyfit(at, blocks, 1)[0],
        "files": [int(files[0]), int(files.max())],
    }
    report.write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.torture
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not tell what it has given"
)
@pytest.mark.parametrize("kind", ["linear", "gated_pool"])
@pytest.mark.parametrize("what", COUNTS)
def test_memory_and_open_files_do_not_grow(what, kind, tmp_path):
    process = SERVER.Process(target=endure, args=(what, kind, COUNTS[what], tmp_path / "report.json"))
    process.start()
    process.join(None if torture.LONG else HANG)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    torture.record("memory does not grow", what=what, projection_type=kind, **found)
    assert found["count"] >= COUNTS[what] * 0.98
    assert found["kib_per_1000"] < LIMIT_KIB
    assert found["blocks_per_1000"] < LIMIT_BLOCKS
    assert found["files"][1] <= found["files"][0] + 1
