"""Many calls and many steps: neither memory nor open files grow.

In a process of its own, after a warm-up, since the allocator and torch fill their caches first.
"""

import json
import os
import subprocess
import sys

import pytest

import torture


CALLS = torture.times(1_200, 100_000)
STEPS = torture.times(800, 100_000)  # at 70 a second about half an hour
# An allocator that settles drifts a little; a tensor of this size kept at each call would be 64 KiB a call.
LIMIT_KIB = {True: 200.0, False: 20_000.0}[torture.LONG]  # of 1,000 calls or steps
SHARED = """
import json, os, random, sys
import numpy, psutil, torch
from linformer_hf import LinformerConfig, LinformerForMaskedLM
torch.set_num_threads(1)
process, draw, samples = psutil.Process(), random.Random(0), []
def sample(i):
    samples.append((i, process.memory_info().rss / 1024, process.num_fds()))
def batch(rows):
    lengths = [draw.randint(1, 128) for _ in range(rows)]
    mask = torch.tensor([[int(i < length) for i in range(max(lengths))] for length in lengths])
    return {"input_ids": torch.randint(5, 99, mask.shape), "attention_mask": mask}
sizes = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
             max_position_embeddings=128, projected_length=32, projection_type=sys.argv[1],
             local_window=4 if sys.argv[1] == "gated_pool" else 0)
model = LinformerForMaskedLM(LinformerConfig(**sizes))
count = float(sys.argv[2])
"""
CALL = """
model.eval()
for i in range(int(count)):
    with torch.no_grad():
        model(**batch(draw.randint(1, 4)))
    if i % max(1, int(count) // 100) == 0:
        sample(i)
"""
TRAIN = """
model.train()
optimizer = torch.optim.AdamW(model.parameters())
for i in range(int(count)):
    given = batch(4)
    model(**given, labels=given["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if i % max(1, int(count) // 100) == 0:
        sample(i)
"""
REPORT = """
kept = samples[len(samples) // 2:]
x, rss, files = map(numpy.array, zip(*kept))
print(json.dumps({"count": int(x[-1]) + 1, "slope_kib_per_1000": 1000 * numpy.polyfit(x, rss, 1)[0],
                  "rss_mib": rss[-1] / 1024, "rss_growth_kib": rss[-1] - rss[0],
                  "files": [int(files[0]), int(files.max())]}))
"""


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["linear", "gated_pool"])
@pytest.mark.parametrize(("what", "program", "count"), [("calls", CALL, CALLS), ("training", TRAIN, STEPS)])
def test_memory_and_open_files_do_not_grow(what, program, count, kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", SHARED + program + REPORT, kind, str(count)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["count"] >= count * 0.98
    assert found["slope_kib_per_1000"] < LIMIT_KIB
    assert found["files"][1] <= found["files"][0] + 1
    torture.record("memory does not grow", what=what, projection_type=kind, **found)
