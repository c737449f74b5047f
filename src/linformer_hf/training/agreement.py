"""What the processes of a run must have in common, compared before its first step.

It goes through the launcher's key-value store, as JSON, and not through collectives: a process without a GPU would open
another kind of group than the others, and all would wait for each other.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from datasets import Dataset

from ..utils.files import is_path, record


VERSIONS = ("torch", "transformers", "accelerate")
LOOKS, LOOK_SECONDS = 50, 0.2  # a network file system may show a new file late
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_numbers = itertools.count()


def check_start(recipe: Mapping[str, Any], folder: Path) -> None:
    """Compare recipe, versions and devices, and whether all see the same `folder`, which need not be there yet.

    Strings that can only be paths may differ: what lies there is compared when it has been read (`check_rows`).

    Raises:
        ValueError: on every process, with what differs and where; or the launcher's port is in use.
    """
    if _place()[1] == 1:
        return
    training = recipe.get("training") or {}
    with _seen(folder) as seen:
        compare(
            {**_masked(record(recipe)), **_versions(), "device": _device(training), "training.output_dir, seen,": seen},
            "Give the same command with the same recipe and versions on every machine, with one output_dir that all "
            "share, and start at most as many processes on a machine as it has GPUs (training.use_cpu=true: on none).",
        )


def check_rows(**rows: Dataset | tuple[int, str]) -> None:
    """Compare what is trained on: tokenised rows, or their number and a checksum. Raises as `check_start` does."""
    if _place()[1] > 1:
        facts = {name: _digest(part) if isinstance(part, Dataset) else part for name, part in rows.items()}
        compare(
            {name: f"{count} rows ({checksum[:16]})" for name, (count, checksum) in facts.items()},
            "The files and the tokenizer that the recipe names must hold the same on every machine.",
        )


def compare(facts: Mapping[str, Any], way_out: str) -> None:
    """Raise a ValueError on every process unless all give the same `facts`, JSON-able and nested.

    All processes must come here, in the same order of calls.
    """
    rank, count = _place()
    if count == 1:
        return
    store, key = _store(), f"linformer_hf/{next(_numbers)}"
    store.set(f"{key}/{rank}", json.dumps(dict(_flat(facts))))
    if rank == 0:  # it alone reads all of them: the others ask it for the verdict
        store.set(key, _differences([json.loads(store.get(f"{key}/{other}")) for other in range(count)]))
    differ = store.get(key).decode()
    store.set(f"{key}/{rank}/read", "")
    if rank == 0:  # which may hold the store, so it leaves last
        store.wait([f"{key}/{other}/read" for other in range(count)])
    if differ:
        raise ValueError(f"the processes of this run differ: {differ}. {way_out}")


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if any(name not in os.environ for name in _LAUNCHED):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@functools.cache
def _store() -> torch.distributed.Store:
    try:
        return next(torch.distributed.rendezvous("env://"))[0]
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" not in str(error):
            raise ValueError(f"no process answers at {where} (MASTER_ADDR:MASTER_PORT): {error}") from error
        raise ValueError(
            f"the port of {where} (MASTER_PORT) is in use, by another run perhaps. Choose another, the same for all; "
            "torchrun --standalone finds a free one by itself."
        ) from error


def _flat(facts: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts by dotted names, as `section.key=value` has them."""
    if isinstance(facts, Mapping | list) and facts:
        for key, value in facts.items() if isinstance(facts, Mapping) else enumerate(facts):
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(facts)


def _differences(found: Sequence[Mapping[str, str]]) -> str:
    """What differs in the facts of each rank, in words; empty if nothing does."""
    parts = []
    for name in dict.fromkeys(name for facts in found for name in facts):
        by_value: dict[str, list[int]] = {}
        for rank, facts in enumerate(found):
            by_value.setdefault(facts.get(name, "not given"), []).append(rank)
        if len(by_value) > 1:
            parts.append(f"{name} is " + ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items()))
    return "; ".join(parts)


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-7, 9`."""
    spans = []
    for _, group in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        spans.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(spans)}"


def _masked(content: Any) -> Any:
    """Without the paths, which may differ between machines."""
    if isinstance(content, dict):
        return {key: _masked(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_masked(value) for value in content]
    return "a path" if isinstance(content, str) and is_path(content) else content


def _versions() -> dict[str, str]:
    """Of what computes; of this package its source, since two checkouts of one version may differ."""
    package = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        package.update(path.read_bytes())
    versions = {name: metadata.version(name) for name in VERSIONS}
    return {f"version of {name}": version for name, version in versions.items()} | {
        "source of linformer_hf": package.hexdigest()[:12]
    }


def _device(training: Mapping[str, Any]) -> str:
    """What this process would train on."""
    if training.get("use_cpu") or not torch.accelerator.is_available():
        return "cpu"
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return str(kind) if local < count else f"missing (process {local + 1} on a machine with {count} of {kind})"


def _digest(rows: Dataset) -> tuple[int, str]:
    """The number of rows and a checksum of all their columns' values."""
    checksum = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(1000):
        for column in sorted(batch):
            for row in batch[column]:
                for part in _bytes(row):
                    checksum.update(part)
    return len(rows), checksum.hexdigest()


def _bytes(row: Any) -> Iterator[bytes]:
    """Shape and content of a number, a text, None, or of lists of them, which numpy may hold as objects."""
    row = np.asarray(row)
    yield str(row.shape).encode()
    if row.dtype != object:
        yield row.tobytes()
    elif row.shape:
        for part in row:
            yield from _bytes(part)
    else:
        yield str(row).encode()


@contextlib.contextmanager
def _seen(folder: Path) -> Iterator[str]:
    """What this process sees of a file that rank 0 writes, for the while, where `folder` is or is to be made."""
    rank, _ = _place()
    key = f"linformer_hf/{next(_numbers)}"
    missing: list[str] = []
    above = folder.absolute()
    while not above.is_dir():
        missing, above = [above.name, *missing], above.parent
    if rank == 0:
        file = above / f".shared.{uuid.uuid4().hex}"
        file.touch()
        _store().set(key, json.dumps([missing, file.name]))
        try:
            yield "the folder of rank 0"
        finally:
            file.unlink(missing_ok=True)
        return
    told, name = json.loads(_store().get(key))
    for _ in range(LOOKS if told == missing else 0):
        if name in os.listdir(above):  # asked for all its names, a network file system looks anew
            yield "the folder of rank 0"
            return
        time.sleep(LOOK_SECONDS)
    yield f"another folder, {folder} of {os.uname().nodename},"
