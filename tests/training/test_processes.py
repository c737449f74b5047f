"""Two processes on CPUs, as torchrun starts them: the same training as one, checkpoints for either, deaths and signals.

torchrun itself, whose start takes twenty seconds of work, starts those of the first test and those of which one dies.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from reference import TYPES, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from forks import ended, fork, pair
from helpers import (
    HALF,
    MODEL,
    SCRIPTS,
    TORCHRUN,
    TRAINING,
    assert_same_run,
    results_of,
    script,
    tiny_data,
    tree,
    write_recipe,
)
from linformer_hf import LinformerForMaskedLM, cli
from linformer_hf.data.corpus import prepare
from linformer_hf.training.checkpoints import last_whole_checkpoint
from linformer_hf.training.pretrain import read_recipe
from waiting import HANG


# A loss is a sum in float32 whose order differs: 5e-7 was measured at losses of 5, here over 12 steps.
TOLERANCE = 2e-6


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Two processes, whose number the program itself checks."""
    command = [*TORCHRUN, *map(str, arguments), "--expect-processes", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)


def both(program: Path, folder: Path, recipe: str, *overrides: str) -> tuple[list[int], str]:
    """Two forked processes that fill `folder`: their exit status, and what they said."""
    arguments = [recipe, f"training.output_dir={folder}", HALF, *overrides, "--expect-processes", "2"]
    codes = pair(program, *arguments, log=folder.with_suffix(".log"))
    logs = [folder.with_suffix(f".{rank}.log").read_text(errors="replace") for rank in range(2)]
    return codes, "\n".join(log[-3000:] for log in logs)


def succeeded(*arguments: str | Path) -> None:
    codes, said = both(*arguments)
    assert codes == [0, 0], said


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def recipe(texts, place) -> str:
    """Without dropout, whose random numbers differ between processes; 8 rows a step in one process."""
    model = {**MODEL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    training = {**TRAINING, "max_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 1}
    return write_recipe(place / "r.yaml", model=model, data=tiny_data(texts, place), training=training)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in results_of(folder)["history"] if "loss" in row]


def assert_close(folder: Path, other: Path) -> None:
    ours, theirs = losses(folder), losses(other)
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, 13))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=0, abs=TOLERANCE)
    one, two = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)  # Adam: a tiny gradient's sign counts


@pytest.fixture(scope="module")
def one(recipe, place) -> Path:
    assert cli.main(["pretrain", recipe, f"training.output_dir={place / 'one'}"]) == 0
    return place / "one"


@pytest.fixture(scope="module")
def two(recipe, place) -> Path:
    """Two processes that note the rows they train on, by the number that seeds a row's masks."""
    noting = (
        "import json, os; from linformer_hf.data.masking import MaskedDataset as D; whole = D.__getitems__\n"
        "def get(self, indices):\n"
        f"    with open({str(place)!r} + f'/rows-{{self.static}}-' + os.environ['RANK'], 'a') as file:\n"
        "        file.write(json.dumps([self.epoch, list(indices)]) + '\\n')\n"
        "    return whole(self, indices)\n"
        "D.__getitems__ = get\n"
        "import atexit, sys, torch.distributed; path, end = sys.argv[0] + '-group-' + os.environ['RANK'], os._exit\n"
        "at_exit = []; atexit.register(at_exit.append, 'at exit')\n"
        "def leave(status):\n"
        "    with open(path, 'w') as file: file.write(str([torch.distributed.is_initialized(), *at_exit]))\n"
        "    end(status)\n"
        "os._exit = leave"
    )
    program = place / "noting.py"
    program.write_text(script("pretrain", noting), encoding="utf-8")
    ran = torchrun(program, recipe, f"training.output_dir={place / 'two'}", HALF, "training.max_steps=12")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return place / "two"


def test_two_processes_train_as_one(one, two):
    assert (results_of(one)["processes"], results_of(two)["processes"]) == (1, 2)
    assert_close(two, one)
    assert results_of(two)["trained_tokens"] == results_of(one)["trained_tokens"]


def test_the_processes_end_before_the_interpreters_teardown(two, place):
    """Out of their group, after all that runs at exit: in the teardown one aborted, rarely, and the run had failed."""
    found = [(place / f"noting.py-group-{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert found == ["[False, 'at exit']"] * 2


def test_the_saved_model_is_whole(two):
    model, info = AutoModelForMaskedLM.from_pretrained(two, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_every_row_is_seen_once_in_an_epoch(recipe, place, two):
    """Except that what the last step lacks is filled up with rows of the epoch's beginning, by less than a step."""
    rows = len(prepare(read_recipe(recipe).build("data"), 32).train)
    program = place / "noting.py"
    for path in place.glob("rows-*"):
        path.unlink()
    steps = -(-rows // 8)
    once = [f"training.max_steps={2 * steps}", 'training.save_strategy="no"', 'training.eval_strategy="no"']
    succeeded(program, place / "epochs", recipe, *once)
    seen: dict[int, list[Counter]] = {0: [], 1: []}
    for rank in "01":
        notes = [json.loads(line) for line in (place / f"rows-False-{rank}").read_text().splitlines()]
        for epoch, ranks in seen.items():
            ranks.append(Counter(index for at, indices in notes if at == epoch for index in indices))
    for ranks in seen.values():
        total = ranks[0] + ranks[1]
        assert set(total) == set(range(rows))
        repeated = {index: count for index, count in total.items() if count > 1}
        assert sum(total.values()) == steps * 8
        assert sum(count - 1 for count in repeated.values()) == steps * 8 - rows < 8
    assert list(seen[0][0]) != list(seen[1][0])  # another order


STOP = (  # SIGTERM to one process, which all must heed at the same step
    "import os, signal; from transformers.trainer_callback import DefaultFlowCallback as F; whole = F.on_step_end\n"
    "def end(self, args, state, control, **named):\n"
    "    if state.global_step == 6 and os.environ.get('RANK', '0') == '{rank}':\n"
    "        os.kill(os.getpid(), signal.SIGTERM)\n"
    "    return whole(self, args, state, control, **named)\n"
    "F.on_step_end = end"
)


def test_a_stream_is_shared_as_one_process_reads_it(recipe, one, tmp_path, capsys):
    """Pass after pass: its rows are fewer than those of the steps, and one of the readers has fewer than the other.

    Interrupted in the middle, two go on to the last bit, and one goes on as well, if it has the same readers.
    """
    stream = ["data.streaming=true", f"data.tokenizer={one}", "data.validation_documents=2", "data.max_documents=5"]
    alone, shared, stopped, fewer = (tmp_path / name for name in ("alone", "shared", "stopped", "fewer"))
    assert cli.main(["pretrain", recipe, *stream, "data.readers=2", f"training.output_dir={alone}"]) == 0
    ran = torchrun(SCRIPTS / "pretrain.py", recipe, *stream, HALF, f"training.output_dir={shared}")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_close(shared, alone)
    program = tmp_path / "stop.py"
    program.write_text(script("pretrain", STOP.format(rank=1)), encoding="utf-8")
    assert both(program, stopped, recipe, *stream)[0] == [143, 143]
    shutil.copytree(stopped, fewer)
    succeeded(SCRIPTS / "pretrain.py", stopped, recipe, *stream, "--resume")
    assert_same_run(stopped, shared)
    resume = ["pretrain", recipe, *stream, f"training.output_dir={fewer}", "--resume"]
    assert cli.main(resume) == 2
    assert "'readers': 2} then" in capsys.readouterr().err
    assert cli.main([*resume, "data.readers=2"]) == 0
    assert_close(fewer, alone)


@pytest.mark.parametrize("first", [1, 2])
def test_a_checkpoint_of_one_number_of_processes_resumes_on_another(recipe, one, tmp_path, first):
    program = tmp_path / "stop.py"
    program.write_text(script("pretrain", STOP.format(rank=first - 1)), encoding="utf-8")
    folder = tmp_path / "run"
    arguments = [recipe, f"training.output_dir={folder}"]
    if first == 2:
        assert both(program, folder, recipe)[0] == [143, 143]
        assert (folder / "checkpoint-6" / "rng_state_1.pth").exists()
    else:
        assert ended(fork(program, *arguments, log=tmp_path / "log")) == 143
    assert last_whole_checkpoint(folder) == folder / "checkpoint-6"
    if first == 2:
        assert cli.main(["pretrain", *arguments, "--resume"]) == 0
    else:
        succeeded(SCRIPTS / "pretrain.py", folder, recipe, "--resume")
    assert_close(folder, one)


def test_a_process_that_dies_ends_the_command_and_the_last_checkpoint_stands(recipe, one, tmp_path):
    die = (
        "import os; from transformers import Trainer as T; whole = T.training_step\n"
        "def step(self, *a, **k):\n"
        "    if self.state.global_step == 6 and os.environ['RANK'] == '1': os._exit(9)\n"
        "    return whole(self, *a, **k)\n"
        "T.training_step = step"
    )
    program = tmp_path / "die.py"
    program.write_text(script("pretrain", die), encoding="utf-8")
    folder = tmp_path / "run"
    ran = torchrun(program, recipe, f"training.output_dir={folder}", HALF)
    assert ran.returncode != 0
    assert "exitcode  : 9" in ran.stderr
    assert last_whole_checkpoint(folder) == folder / "checkpoint-4"
    assert not (folder / "results.json").exists()
    succeeded(SCRIPTS / "pretrain.py", folder, recipe, "--resume")
    assert_close(folder, one)


@pytest.mark.parametrize("path", sorted((SCRIPTS / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_its_files(path):
    """Which say on their first line how they are used, and for how many processes."""
    config = load_config_from_file(str(path))
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith(f"# accelerate launch --config_file scripts/launch/{path.name} ")
    assert first.endswith(f" --expect-processes {config.num_processes}")
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_accelerate_starts_two_processes_on_a_cpu(recipe, one, tmp_path):
    config = ["--config_file", str(SCRIPTS / "launch" / "cpu.yaml"), str(SCRIPTS / "pretrain.py"), recipe]
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", *config, HALF, "--expect-processes", "2"]
    command.append(f"training.output_dir={tmp_path / 'run'}")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert results_of(tmp_path / "run")["processes"] == 2
    assert_close(tmp_path / "run", one)


@pytest.mark.parametrize("program", [[str(SCRIPTS / "pretrain.py")], ["-P", "-m", "linformer_hf", "pretrain"]])
def test_another_number_of_processes_than_expected_is_refused(recipe, program):
    command = [sys.executable, *program, recipe, "--expect-processes", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ran.returncode == 2
    assert "error: --expect-processes 2, but the launcher started 1" in ran.stderr


def test_fsdp_that_would_shard_nothing_is_refused(recipe, tmp_path):
    fsdp = ["training.fsdp=true", "training.fsdp_config.transformer_layer_cls_to_wrap=[LinformerLayer]"]
    codes, said = both(SCRIPTS / "pretrain.py", tmp_path / "run", recipe, *fsdp)
    assert codes == [2, 2]
    assert said.count("error: training.fsdp: accelerate shards no model on CPUs") == 2


@pytest.fixture(scope="module")
def finetuning(one, place) -> str:
    rows = [f"{'river' if i % 2 else 'stone'} number {i},{'water' if i % 2 else 'rock'}" for i in range(160)]
    for name, lines in (("rows", rows), ("tests", rows[:21])):
        (place / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    files = {name: str(place / f"{file}.csv") for name, file in (("train_file", "rows"), ("test_file", "tests"))}
    training = {**TRAINING, "max_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 1}
    return write_recipe(
        place / "f.yaml",
        model={"checkpoint": str(one), **dropout},
        data={"task": "files", **files, "validation_fraction": 0.1},
        training=training,
    )


def test_two_processes_fine_tune_as_one(finetuning, place):
    folder = place / "tuned-1"
    assert cli.main(["finetune", finetuning, f"training.output_dir={folder}"]) == 0
    succeeded(SCRIPTS / "finetune.py", place / "tuned-2", finetuning)
    assert results_of(place / "tuned-2")["processes"] == 2
    assert_close(place / "tuned-2", folder)
    metrics = results_of(folder)["metrics"]
    assert results_of(place / "tuned-2")["metrics"] == pytest.approx(metrics)  # each of the 21 test rows counts once
    before = tree(place / "tuned-2")
    assert AutoModelForSequenceClassification.from_pretrained(place / "tuned-2").config.num_labels == 2
    assert tree(place / "tuned-2") == before


TENSOR_PARALLEL = """
import sys

import torch
from transformers.distributed import DistributedConfig

from linformer_hf import LinformerForMaskedLM
from reference import TYPES, tiny_batch

torch.distributed.init_process_group("gloo")
for place, kind in zip(sys.argv[1:], TYPES, strict=True):
    whole = LinformerForMaskedLM.from_pretrained(place).eval()
    half = LinformerForMaskedLM.from_pretrained(place, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2))
    layer, size = half.eval().linformer.encoder.layer[1], whole.config.intermediate_size
    cut = [layer.intermediate.dense.weight.to_local().shape[0], layer.output.dense.weight.to_local().shape[1]]
    assert cut == [size / 2] * 2
    ids, _, mask = tiny_batch()
    results = [model(ids, attention_mask=mask, labels=ids) for model in (half, whole)]
    torch.testing.assert_close(results[0].logits, results[1].logits, atol=2e-5, rtol=2e-5, msg=str(kind))
    for result in results:
        result.loss.backward()
    gradients = [model.linformer.embeddings.word_embeddings.weight.grad for model in (half, whole)]
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-4, msg=str(kind))
"""


def test_two_processes_cut_the_feed_forward_weights(tmp_path):
    """`base_model_tp_plan`: each holds half of them; outputs and gradients are those of the whole model."""
    program = tmp_path / "program.py"
    program.write_text(TENSOR_PARALLEL, encoding="utf-8")
    places = [tmp_path / str(number) for number in range(len(TYPES))]
    for place, kind in zip(places, TYPES, strict=True):
        tiny_model(LinformerForMaskedLM, **kind).save_pretrained(place)
    codes = pair(program, *places, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log.0.log").read_text(encoding="utf-8")[-3000:]
