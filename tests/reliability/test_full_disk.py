"""A disk that is really full: a small tmpfs under a run's folder, a corpus cache and the cache of data sets."""

import os
import subprocess
from pathlib import Path

import datasets
import pytest

import torture
from helpers import MODEL, TRAINING, assert_same_run, error_line, tiny_data, tree, write_recipe
from linformer_hf import cli
from linformer_hf.training import pretrain
from linformer_hf.training.checkpoints import last_whole_checkpoint


STEPS = 12


@pytest.fixture
def disk(tmp_path):
    """`disk(size)` mounts a tmpfs of so many bytes, or changes its size; the folder."""
    folder = tmp_path / "disk"

    def sized(size: int) -> Path:
        # In pages, as the system counts: a file of one byte takes one.
        options = f"size={-(-size // 4096) * 4096}"
        mounted = folder.is_mount()
        folder.mkdir(exist_ok=True)
        words = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def recipe(texts, tiny_source, place) -> str:
    every = {"save_steps": 3, "eval_steps": 6, "logging_steps": 1, "save_total_limit": 2, "max_steps": STEPS}
    data = {key: value for key, value in tiny_data(texts, place).items() if key != "vocab_size"}
    data["tokenizer"] = str(tiny_source())
    return write_recipe(place / "r.yaml", model=MODEL, data=data, training={**TRAINING, **every})


@pytest.fixture(scope="module")
def whole(recipe, place) -> Path:
    assert cli.main(["pretrain", recipe, f"training.output_dir={place / 'whole'}"]) == 0
    return place / "whole"


def taken(folder: Path) -> int:
    """Bytes of the pages that a folder's files take."""
    return sum(4096 * -(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def spread(short: int, long: int) -> list[float]:
    """Shares of a size, the same distance apart and at no round number: each has the disk full in another file."""
    count = torture.times(short, long)
    return [round((number + 0.37) / count, 3) for number in range(count)]


# A checkpoint of 12, and three of them until the oldest is removed.
@pytest.mark.torture
@pytest.mark.parametrize("share", [*spread(4, 30), 0.314, 0.95])  # 0.314: in random states, 0.95: in the last files
def test_a_full_disk_costs_the_checkpoint_that_does_not_fit(recipe, whole, disk, capsys, share):
    one = taken(whole / f"checkpoint-{STEPS}")
    folder = disk(int(3 * share * one)) / "run"
    command = ["pretrain", recipe, f"training.output_dir={folder}"]
    line = error_line(capsys, *command)
    last = last_whole_checkpoint(folder)
    stands = f"the last whole checkpoint is {last}" if last else "there is no whole checkpoint"
    assert line.startswith(f"error: writing to {folder} failed (")
    assert line.endswith(f"; {stands}. Make room and give the same command with --resume.")
    assert len(list(folder.glob("checkpoint-*"))) == int(3 * share)
    assert (int(last.name.rpartition("-")[2]) if last else 0) == 3 * int(3 * share)
    kept = tree(last) if last else {}
    disk(100 << 20)
    assert not last or tree(last) == kept
    assert cli.main([*command, "--resume"]) == 0
    assert_same_run(folder, whole)
    torture.record("full disk", what="checkpoint", share=share, reason=line.partition("(")[2].partition(");")[0])


@pytest.mark.torture
@pytest.mark.parametrize("share", [*spread(3, 20), 0.25])  # 0.25: in the tokenizer
def test_a_full_disk_leaves_no_half_corpus(recipe, whole, place, disk, tmp_path, capsys, share):
    cache = disk(int(0.9 * share * taken(place / "cache")))
    command = ["pretrain", recipe, f"training.output_dir={tmp_path / 'run'}", f"data.cache_dir={cache}"]
    line = error_line(capsys, *command)
    assert line.startswith("error: preparing the corpus failed (")
    assert f"): {cache}" in line
    assert [path.name for path in cache.glob(".*")] == []
    assert not (tmp_path / "run").exists()
    kept = tree(cache)
    disk(100 << 20)
    assert cli.main(command) == 0
    assert {name: content for name, content in tree(cache).items() if name in kept} == kept
    assert_same_run(tmp_path / "run", whole)
    torture.record("full disk", what="corpus", share=share, reason=line.partition("(")[2].partition("):")[0])


@pytest.mark.parametrize("pages", [2, 12])
def test_a_full_cache_of_data_sets_is_named(recipe, whole, disk, tmp_path, capsys, monkeypatch, pages):
    """Where `datasets` keeps the texts that it has read; ours may lie on another disk."""
    cache = disk(4096 * pages)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    command = ["pretrain", recipe, f"training.output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    line = error_line(capsys, *command)
    assert line.startswith("error: preparing the corpus failed (")
    assert f" or {cache} is full" in line
    disk(100 << 20)
    assert cli.main(command) == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("left", [0, 3])  # pages: the curve takes some ten, results.json two
def test_a_full_disk_while_results_are_written(recipe, whole, disk, capsys, monkeypatch, left):
    folder = disk(100 << 20) / "run"
    report = pretrain.report

    def fill(*given):
        free = os.statvfs(folder).f_bavail - left
        (folder.parent / "other").write_bytes(bytes(free * os.statvfs(folder).f_frsize))
        report(*given)

    monkeypatch.setattr(pretrain, "report", fill)
    command = ["pretrain", recipe, f"training.output_dir={folder}"]
    line = error_line(capsys, *command)
    assert f"error: writing to {folder} failed (" in line
    assert f"the last whole checkpoint is {folder / f'checkpoint-{STEPS}'}. Make room" in line
    assert not (folder / "results.json").exists()
    (folder.parent / "other").unlink()
    monkeypatch.setattr(pretrain, "report", report)
    assert cli.main([*command, "--resume"]) == 0
    assert [path.name for path in folder.glob(".*")] == []
    assert_same_run(folder, whole)
