"""Two machines played by network namespaces: torchrun on each, one output folder, a link that fails."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import HALF, MODEL, TRAINING, results_of, script, tiny_data, write_recipe
from linformer_hf import cli
from linformer_hf.training.checkpoints import last_whole_checkpoint
from waiting import HANG, wait_for


ADDRESSES = ("10.199.0.1", "10.199.0.2")
SECONDS = 120  # that a process waits for another one's answer
# The second machine cuts itself off.
CUT = """
import os, subprocess
from transformers import Trainer
whole = Trainer.training_step
def step(self, *a, **k):
    if self.state.global_step == 6 and os.environ["RANK"] == "1":
        subprocess.run(["ip", "link", "set", "cable", "down"], check=True)
    return whole(self, *a, **k)
Trainer.training_step = step
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """The names of two namespaces, joined by a `cable`."""
    names = [f"lh-{os.getpid()}-{i}" for i in range(2)]
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` to make network namespaces with")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_a_machine_that_is_cut_off_ends_the_run_which_resumes(machines, texts, tmp_path):
    model = {**MODEL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    training = {**TRAINING, "max_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 1}
    recipe = write_recipe(tmp_path / "r.yaml", model=model, data=tiny_data(texts, tmp_path), training=training)
    program = tmp_path / "cut.py"
    program.write_text(script("pretrain", CUT), encoding="utf-8")
    folder = tmp_path / "run"
    running = []
    for i, (name, address) in enumerate(zip(machines, ADDRESSES, strict=True)):
        launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29500"]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *launch]
        ours = [f"training.output_dir={folder}", f"data.cache_dir={tmp_path / f'cache-{i}'}", HALF]
        ours += [f"training.ddp_timeout={SECONDS}", "--expect-processes", "2"]
        command += [f"--rdzv_conf=is_host={1 - i}", f"--local_addr={address}", str(program), recipe, *ours]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"log-{i}").open("wb") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    logs = [tmp_path / f"log-{i}" for i in range(2)]
    error = "error: another process of this run has died or cannot be reached"
    try:
        assert running[0].wait(HANG) != 0
        for log in logs:  # the second torchrun itself goes on looking for the first one
            wait_for(lambda log=log: error in log.read_text(errors="replace"))
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert (tmp_path / "cache-0").is_dir()
    assert (tmp_path / "cache-1").is_dir()
    for log in logs:
        assert f"The last whole checkpoint is {folder / 'checkpoint-4'}" in log.read_text(errors="replace")
    assert last_whole_checkpoint(folder) == folder / "checkpoint-4"
    assert not (folder / "results.json").exists()
    assert cli.main(["pretrain", recipe, f"training.output_dir={folder}", "--resume"]) == 0
    assert results_of(folder)["steps"] == 12
    assert torch.isfinite(torch.tensor(results_of(folder)["metrics"]["validation_loss"]))
