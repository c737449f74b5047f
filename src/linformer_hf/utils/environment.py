"""Versions, revision, machine and memory: what somebody needs to run it again."""

import os
import platform
import resource
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .places import ACCESS_TOKEN


PACKAGES = ("linformer_hf", "torch", "transformers", "datasets", "tokenizers", "accelerate", "evaluate", "numpy")


def environment(seed: int, device: torch.device, dtype: str) -> dict[str, Any]:
    """Versions, revision, machine, seed: what somebody needs to run it again."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "versions": versions,
        "revision": _revision(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "dtype": dtype,
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *(ACCESS_TOKEN.sub("hf_...", word) for word in sys.argv[1:])],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor() -> str:
    """The processor's name and its instructions for matrices."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", "").split())
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(known)})"


def _revision() -> str | None:
    """The commit of the checkout this package runs from, with a mark if it has uncommitted changes; None elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Only a tracked source file tells that the repository around it is this project's.
        subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            check=True,
            capture_output=True,
        )
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
