"""kill -9 at drawn moments, and the same command again, until the run ends: it ends as if nothing had been.

A run is forked from a process that has imported everything, so that many can be killed in a minute. It kills itself: at
the n-th change of a file (each one counts: opened for writing, renamed, removed, a folder made), or at a moment that a
clock gives, and notes first what it was at.
"""

import collections
import random
import signal
import time
from pathlib import Path

import pytest

import torture
from forks import SERVER
from helpers import MODEL, TRAINING, tiny_data, write_recipe
from killing import STEPS, assert_equal_runs, victim
from linformer_hf.conversion.convert import convert
from waiting import HANG


TASK = {"task": "files", "train_file": "rows.csv", "test_file": "rows.csv"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def recipes(texts, tiny_source, place) -> dict[str, list[str]]:
    """Command by name of what is run; the folder that it fills is added."""
    every = {"save_steps": 3, "eval_steps": 5, "logging_steps": 1, "save_total_limit": 2, "max_steps": STEPS}
    training = {**TRAINING, **every, "per_device_train_batch_size": 7, "learning_rate": 0.001}
    source = tiny_source()
    # Each run prepares a corpus of its own, with one tokenizer.
    data = {key: value for key, value in tiny_data(texts, place).items() if key not in ("cache_dir", "vocab_size")}
    data["tokenizer"] = str(source)
    pretrain = write_recipe(place / "pretrain.yaml", model=MODEL, data=data, training=training)
    sources = [{"kind": "files", "path": f"{texts}/{half}*.txt"} for half in "01"]
    streams = {"sources": sources, "streaming": True, "validation_documents": 2}
    streaming = write_recipe(place / "streaming.yaml", model=MODEL, data={**data, **streams}, training=training)
    stages = [{"sequence_length": 16, "training": {"max_steps": 8}}]
    staged = write_recipe(place / "stages.yaml", model=MODEL, data=data, training=training, stages=stages)
    draw = random.Random(1)
    rows = [f"{' '.join(draw.choices(['river', 'mountain', 'old', 'window'], k=9))},{i % 2}" for i in range(90)]
    (place / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    student = convert(str(source), place / "student", projected_length=12, length_correction=True)
    task = {"task": "files", "train_file": str(place / "rows.csv"), "max_length": 32}
    tuning = {"checkpoint": str(student)}
    finetune = write_recipe(place / "finetune.yaml", model=tuning, data=task, training=training)
    pair = {"student": str(student), "teacher": str(source)}
    rest = {"distillation": {"validation_rows": 6}, "data": {**data, "packing": "contiguous"}, "training": training}
    distill = write_recipe(place / "distill.yaml", model=pair, **rest)
    return {
        "pretrain": ["pretrain", pretrain],
        "accumulation": ["pretrain", pretrain, "training.gradient_accumulation_steps=2"],
        "bfloat16": ["pretrain", pretrain, "training.bf16=true"],
        "two workers": ["pretrain", pretrain, "training.dataloader_num_workers=2"],
        "streaming": ["pretrain", streaming],
        "passes": ["pretrain", streaming, "data.max_documents=2", "training.dataloader_num_workers=2"],
        "stages": ["pretrain", staged],
        "finetune": ["finetune", finetune],
        "distill": ["distill", distill],
    }


def attempt(command: list[str], folder: Path, change: int | None = None, seconds: float | None = None) -> str:
    """Run a command in a forked process; what it noted at its end. Raises if it failed instead of being killed."""
    note = folder.with_suffix(".note")
    arguments = [*command, f"training.output_dir={folder}"]
    if command[0] != "finetune":
        arguments.append(f"data.cache_dir={folder}-cache")
    process = SERVER.Process(target=victim, args=(arguments, change, seconds, note, folder.parent))
    process.start()
    process.join(HANG)
    if process.exitcode is None:
        process.kill()
    said = note.with_suffix(".log").read_text(errors="replace")
    assert process.exitcode in (0, -signal.SIGKILL), f"{process.exitcode}\n{said}"
    found = note.read_text()
    assert found, said
    return found


@pytest.fixture(scope="module")
def whole(recipes, place):
    """name -> the run that nothing interrupts, and how many changes of files it makes and how long it takes."""
    done: dict[str, tuple[Path, int, float]] = {}

    def make(name: str) -> tuple[Path, int, float]:
        if name not in done:
            folder, started = place / f"whole-{name.replace(' ', '-')}", time.monotonic()
            changes = int(attempt(recipes[name], folder).split()[1])
            done[name] = (folder, changes, time.monotonic() - started)
        return done[name]

    return make


NAMES = ("pretrain", "finetune", "distill", "streaming", "two workers", "accumulation", "bfloat16", "stages", "passes")


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES[: torture.times(4, len(NAMES))])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(name, recipes, whole, place):
    expected, changes, seconds = whole(name)
    draw, phases = random.Random(name), collections.Counter()
    for run in range(torture.times(1, 3)):
        folder = place / f"killed-{name.replace(' ', '-')}-{run}"
        for kill in range(torture.times(1, 4)):
            # Every other one by files, since to write one takes moments only.
            far = draw.uniform(0.02, 0.8)
            moment = {"change": 1 + int(far * changes)} if (kill + run) % 2 == 0 else {"seconds": far * seconds}
            found = attempt([*recipes[name], "--resume"], folder, **moment)
            if not found.startswith("ended"):
                phases[found.partition(":")[0]] += 1
            if (folder / "results.json").exists():
                break
        if not (folder / "results.json").exists():
            assert attempt([*recipes[name], "--resume"], folder).startswith("ended")
        assert_equal_runs(folder, expected)
    assert sum(phases.values()) > 0
    torture.record("killed runs end bit-identical", run=name, kills=sum(phases.values()), phases=dict(phases))
