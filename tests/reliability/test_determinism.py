"""The same seed, run to run and with other numbers of threads."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import torture
from helpers import MODEL, TRAINING, results_of, tiny_data, write_recipe


STEPS = 30
# Of a loss; a sum in float32 has another order with other threads. 1e-7 was measured on two.
TOLERANCE = 1e-6
# More threads than cores are not started.
THREADS = [number for number in (2, 4) if number <= (os.cpu_count() or 1)] or [1]


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """(threads, number of the run) -> the folder of a pretraining in a process of its own."""
    place = tmp_path_factory.mktemp("determinism")
    # Wide enough that torch splits the work: small tensors stay on one thread.
    model = {**MODEL, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    training = {**TRAINING, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    data = tiny_data(texts, place)
    recipe = write_recipe(place / "r.yaml", model=model, data=data, training={**training, "learning_rate": 1e-4})
    done = {}

    def train(threads: int, number: int = 0):
        if (threads, number) not in done:
            folder = place / f"{threads}-{number}"
            command = [sys.executable, "-P", "-m", "linformer_hf", "pretrain", recipe, f"training.output_dir={folder}"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert ran.returncode == 0, ran.stderr
            done[threads, number] = folder
        return done[threads, number]

    return train


def losses(folder) -> list[float]:
    return [row["loss"] for row in results_of(folder)["history"] if "loss" in row]


@pytest.mark.torture
def test_the_same_seed_gives_the_same_bytes(run):
    first, second = run(1), run(1, 1)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert losses(first) == losses(second)
    assert results_of(first)["metrics"] == results_of(second)["metrics"]


@pytest.mark.torture
@pytest.mark.parametrize("threads", THREADS)
def test_other_numbers_of_threads_give_nearly_the_same(run, threads):
    one, more = losses(run(1)), losses(run(threads))
    assert results_of(run(threads))["threads"] == threads
    apart = max(abs(a - b) / a for a, b in zip(one, more, strict=True))
    weights = [load_file(run(number) / "model.safetensors") for number in (1, threads)]
    moved = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    torture.record("threads", threads=threads, steps=STEPS, loss_apart=apart, weights_apart=moved)
    assert apart < TOLERANCE
