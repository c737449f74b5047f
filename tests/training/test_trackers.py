"""`training.report_to`: what the trackers hold is what Trainer logged; one that is missing or down is no disaster."""

import json
import sqlite3

import pytest
from transformers.integrations import TensorBoardCallback

from helpers import MODEL, TRAINING, tiny_data, write_recipe
from linformer_hf import cli
from linformer_hf.training.pretrain import pretrain


LOGGED = ("loss", "grad_norm", "learning_rate", "train_tokens_per_second")
EVALUATED = ("eval_loss", "eval_masked_accuracy")


@pytest.fixture
def recipe(texts, tmp_path):
    training = {**TRAINING, "max_steps": 4, "save_strategy": "no", "output_dir": str(tmp_path / "run")}
    return write_recipe(tmp_path / "r.yaml", model=MODEL, data=tiny_data(texts, tmp_path), training=training)


def history(folder) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["history"]


def expected(folder, names) -> dict[str, list[float]]:
    return {name: [row[name] for row in history(folder) if name in row] for name in names}


def test_tensorboard_holds_what_was_logged(recipe):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = pretrain(recipe, ["training.report_to=tensorboard"])
    events = next((folder / "runs").rglob("events.out.tfevents.*"))
    reader = accumulator.EventAccumulator(str(events.parent))
    reader.Reload()
    wanted = {f"train/{name}": values for name, values in expected(folder, LOGGED).items()}
    wanted |= {f"eval/{name[5:]}": values for name, values in expected(folder, EVALUATED).items()}
    for tag, values in wanted.items():
        found = [event.value for event in reader.Scalars(tag)]
        assert values, tag
        assert found == pytest.approx(values, rel=1e-6), tag


def test_trackio_holds_what_was_logged(recipe):
    utils = pytest.importorskip("trackio.utils")
    folder = pretrain(recipe, ["training.report_to=trackio", "training.project=tests", "training.run_name=one"])
    with sqlite3.connect(next(utils.TRACKIO_DIR.rglob("*.db"))) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics order by id")]
    for name, values in expected(folder, LOGGED).items():
        assert values, name
        assert [row[f"train/{name}"] for row in rows if f"train/{name}" in row] == pytest.approx(values), name


def test_a_tracker_that_fails_is_left_out(recipe, monkeypatch, caplog):
    calls = []

    def down(self, *args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route to the dashboard")

    monkeypatch.setattr(TensorBoardCallback, "on_log", down)
    folder = pretrain(recipe, ["training.report_to=tensorboard"])
    assert json.loads((folder / "results.json").read_text())["steps"] == 4
    assert len(calls) == 1
    said = [record.message for record in caplog.records if "tracker" in record.message]
    assert said == ["The tracker tensorboard failed (no route to the dashboard): training goes on without it."]


def test_ctrl_c_in_a_tracker_is_no_failure_of_it(recipe, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorBoardCallback, "on_log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, ["training.report_to=tensorboard"])


@pytest.mark.parametrize(
    ("named", "words"),
    [("trackio", "pip install 'linformer_hf[trackers]'"), ("wandb", "pip install wandb"), ("nonsense", "nonsense")],
)
def test_a_tracker_that_is_missing_is_an_error_before_anything_is_read(
    recipe, tmp_path, monkeypatch, capsys, named, words
):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    assert cli.main(["pretrain", recipe, f"training.report_to={named}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training.report_to")
    assert words in error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
