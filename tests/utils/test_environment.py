"""What a run notes about where it ran: versions, revision, processor, memory."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linformer_hf.utils import environment as module
from linformer_hf.utils.environment import environment, peak_memory_mib, processor


CPU = torch.device("cpu")


def test_what_was_given_and_where_it_ran(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(sys, "argv", ["/home/jane/bin/linformer-hf", "push", f"--token=hf_{'a' * 30}"])
    found = environment(7, CPU, "bfloat16")
    assert found["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "no-such-package": "not installed as a package",
    }
    assert (found["seed"], found["dtype"], found["device"], found["processes"]) == (7, "bfloat16", "cpu", 3)
    assert found["threads"] == torch.get_num_threads()
    assert found["command"] == ["linformer-hf", "push", "--token=hf_..."]


def test_the_processor_is_named_with_its_instructions_for_matrices(monkeypatch):
    text = "model name\t: Fast 1: A\nflags\t\t: fpu amx_bf16 avx2 avx2x\n\nmodel name\t: Other\nflags\t: avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert processor() == "Fast 1: A (avx2, amx_bf16)"

    def missing(self, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert processor() == "arm"


def test_the_revision_is_that_of_the_packages_own_checkout(monkeypatch, tmp_path):
    file = tmp_path / "environment.py"
    file.write_text("# here")
    monkeypatch.setattr(module, "__file__", str(file))

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's project, in which this package is installed")
    assert module._revision() is None
    git("add", "environment.py")
    git("commit", "-m", "ours")
    git("tag", "v1")  # a tag is no revision
    assert module._revision() == git("rev-parse", "HEAD")
    file.write_text("# changed")
    assert module._revision() == f"{git('rev-parse', 'HEAD')}-dirty"


@pytest.mark.parametrize(("system", "mib"), [("linux", 2048.0), ("darwin", 2.0)])
def test_resident_memory_is_in_mib_whatever_the_system_counts_in(monkeypatch, system, mib):
    monkeypatch.setattr(sys, "platform", system)
    usage = type("Usage", (), {"ru_maxrss": 2 * 2**20})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert peak_memory_mib(CPU) == mib
