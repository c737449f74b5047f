"""What the processes of a run must have in common: threads play them here, and once two processes."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset

from forks import ended, fork, pair
from helpers import MODEL, SCRIPTS, TRAINING, script, tiny_data, write_recipe
from linformer_hf.data.corpus import prepare
from linformer_hf.training import agreement
from linformer_hf.training.pretrain import read_recipe


@pytest.fixture
def ranks(monkeypatch):
    """Calls a function of the rank in as many threads as there are ranks; the errors' text, or None, of each."""
    mine = threading.local()
    monkeypatch.setattr(agreement, "_place", lambda: mine.place)
    monkeypatch.setattr(agreement, "LOOKS", 2)

    class Numbers:
        """Every process counts for itself."""

        def __next__(self):
            mine.number += 1
            return mine.number

    monkeypatch.setattr(agreement, "_numbers", Numbers())

    def call(function, count):
        store = torch.distributed.HashStore()
        monkeypatch.setattr(agreement, "_store", lambda: store)

        def one(rank):
            mine.place, mine.number = (rank, count), 0
            try:
                return function(rank)
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(one, range(count)))

    return call


def test_every_process_names_what_differs_and_where(ranks):
    facts = {"model": {"hidden_size": 32}, "stages": [{"sequence_length": 8}]}
    other = {"model": {"hidden_size": 64}, "stages": [{"sequence_length": 8}, {"sequence_length": 16}]}
    assert ranks(lambda rank: agreement.compare(facts, "Way out."), 3) == [None] * 3
    said = ranks(lambda rank: agreement.compare(other if rank in (1, 2, 3, 5) else facts, "Way out."), 6)
    assert set(said) == {
        "the processes of this run differ: model.hidden_size is 32 on ranks 0, 4, 64 on ranks 1-3, 5; "
        "stages.1.sequence_length is not given on ranks 0, 4, 16 on ranks 1-3, 5. Way out."
    }


def test_paths_and_folders_may_differ_if_all_see_the_same_folder(ranks, tmp_path):
    """Which need not be there yet, and is not made. What is not seen by all is not one folder."""
    recipe = {"data": {"cache_dir": "/cache", "sources": [{"path": "a/b/c"}]}, "training": {"use_cpu": True}}
    here = tmp_path / "runs" / "mine"
    names = [here, tmp_path / "link" / "runs" / "mine"]
    (tmp_path / "link").symlink_to(tmp_path)
    theirs = {**recipe, "data": {"cache_dir": "/other", "sources": [{"path": "/b"}]}}
    assert ranks(lambda rank: agreement.check_start([recipe, theirs][rank], names[rank]), 2) == [None] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    (tmp_path / "elsewhere").mkdir()
    said = ranks(lambda rank: agreement.check_start(recipe, (here, tmp_path / "elsewhere" / "mine")[rank]), 2)
    assert said[0] == said[1]
    assert "training.output_dir, seen, is the folder of rank 0 on rank 0, another folder," in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]


def test_a_process_without_a_gpu_is_named(ranks, monkeypatch):
    """Without one at all, or beyond those of its machine."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    found = []
    for local in "01":
        monkeypatch.setenv("LOCAL_RANK", local)
        found.append(agreement._device({}))
    assert found == ["cuda", "missing (process 2 on a machine with 1 of cuda)"]
    assert agreement._device({"use_cpu": True}) == "cpu"


def test_rows_are_compared_by_their_content(ranks):
    rows = {"input_ids": [[1, 2], [3]], "label": [0, 1]}
    changed = {**rows, "label": [1, 0]}
    made = [Dataset.from_dict(rows), Dataset.from_dict(rows), Dataset.from_dict(changed)]
    assert ranks(lambda rank: agreement.check_rows(train=made[rank]), 2) == [None] * 2
    said = ranks(lambda rank: agreement.check_rows(train=made[rank]), 3)
    assert "train is 2 rows (" in said[0]
    assert "on ranks 0-1, 2 rows (" in said[0]


def test_rows_of_any_kind_are_compared_by_what_they_hold():
    """Choices are lists of lists, which numpy holds as objects: these have no bytes of their own."""
    columns = {"input_ids": [[[1, 2], [3]], [[4]]], "label": [0, 1], "text": ["a", None]}
    same, other = Dataset.from_dict(columns), Dataset.from_dict(columns | {"input_ids": [[[1], [2, 3]], [[4]]]})
    assert agreement._digest(Dataset.from_dict(columns)) == agreement._digest(same)
    assert agreement._digest(same) != agreement._digest(other)
    assert agreement._digest(same) != agreement._digest(Dataset.from_dict(columns | {"text": ["a", "b"]}))


def test_corpora_have_one_checksum_wherever_they_are_prepared(texts, tmp_path):
    recipes = [
        write_recipe(tmp_path / "r.yaml", model=MODEL, data=tiny_data(texts, tmp_path / name), training=TRAINING)
        for name in "ab"
    ]
    first, second = (prepare(read_recipe(recipe).build("data"), 32).checksum for recipe in recipes)
    assert first == second
    assert first[0] == len(prepare(read_recipe(recipes[0]).build("data"), 32).train)
    fewer = read_recipe(recipes[0], ["data.max_documents=3"]).build("data")
    assert prepare(fewer, 32).checksum != first


def test_two_processes_that_differ_end_before_they_begin(texts, tmp_path):
    """Recipe, versions, devices and folder in one error of both; nothing is left behind."""
    training = {name: value for name, value in TRAINING.items() if name != "use_cpu"}
    recipe = write_recipe(tmp_path / "r.yaml", model=MODEL, data=tiny_data(texts, tmp_path), training=training)
    (tmp_path / "local").mkdir()
    other = (
        "import os, sys, torch\n"
        "from linformer_hf.training import agreement\n"
        "agreement.LOOKS = 1\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv += ['training.learning_rate=0.5', 'training.output_dir=local/run']\n"
        "    whole = agreement.metadata.version\n"
        "    agreement.metadata.version = lambda name: '1.0' if name == 'torch' else whole(name)\n"
        "    torch.accelerator.is_available = lambda: True\n"
        "    torch.accelerator.current_accelerator = lambda: torch.device('cuda')\n"
        "    torch.accelerator.device_count = lambda: 1\n"
    )
    program = tmp_path / "other.py"
    program.write_text(script("pretrain", other), encoding="utf-8")
    codes = pair(program, recipe, f"training.output_dir={tmp_path / 'run'}", log=tmp_path / "log")
    assert codes == [2, 2]
    lines = {(tmp_path / f"log.{rank}.log").read_text().strip().rpartition("\n")[2] for rank in range(2)}
    (line,) = lines
    for part in (
        "error: the processes of this run differ: training.learning_rate is 0.001 on rank 0, 0.5 on rank 1; ",
        "training.output_dir is a path on rank 0, local/run on rank 1; ",
        "version of torch is ",
        "device is cpu on rank 0, missing (process 2 on a machine with 1 of cuda) on rank 1; ",
        "training.output_dir, seen, is the folder of rank 0 on rank 0, another folder, local/run of ",
        "start at most as many processes on a machine as it has GPUs",
    ):
        assert part in line
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "local").iterdir())


def test_a_port_in_use_is_named(texts, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", model=MODEL, data=tiny_data(texts, tmp_path), training=TRAINING)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        shared = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = [recipe, f"training.output_dir={tmp_path / 'run'}"]
        process = fork(SCRIPTS / "pretrain.py", *arguments, log=tmp_path / "log", **shared)
        assert ended(process) == 2
    assert f"error: the port of 127.0.0.1:{port} (MASTER_PORT) is in use" in (tmp_path / "log").read_text()
