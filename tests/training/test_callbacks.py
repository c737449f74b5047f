"""What ends a training, on a trainer of which only the parts that are looked at exist."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linformer_hf.training.callbacks import NAME, AlreadyTrained, Watch
from linformer_hf.utils.runs import Run


class Words:
    @staticmethod
    def decode(ids, skip_special_tokens):
        return " ".join(map(str, ids.tolist()))


@pytest.fixture
def trainer():
    return SimpleNamespace(
        processing_class=Words(),
        _tr_loss=torch.tensor(1.0),
        training_step=lambda model, inputs: inputs["labels"],
        _save_checkpoint=lambda model, trial: None,
    )


def watch_of(trainer, check=True):
    return Watch(trainer, Run("pretrain", {}, Path("run")), lambda: None, check)


def state(step=3, most=9, epoch=0.5):
    return SimpleNamespace(global_step=step, max_steps=most, epoch=epoch, stateful_callbacks={})


def control():
    return SimpleNamespace(should_save=False, should_training_stop=False, should_log=True, should_evaluate=True)


ALONE = SimpleNamespace(world_size=1)


def test_the_rows_of_a_step_are_those_of_all_its_batches_and_of_no_other_step(trainer):
    watch = watch_of(trainer)
    watch.on_step_begin(ALONE, state(), control())
    for batch in (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])):
        assert trainer.training_step(None, {"input_ids": batch, "labels": 7}) == 7
    assert watch._examples() == "Its 3 rows begin with '1 2', '3 4', '5 6'."
    watch.on_step_begin(ALONE, state(4), control())
    assert watch._examples() == "Its rows are not known."


def test_of_many_and_long_rows_the_beginnings_are_shown(trainer):
    watch = watch_of(trainer)
    watch.rows.append(torch.arange(180).view(9, 20))
    text = watch._examples()
    assert text.startswith("Its 9 rows begin with '0 1 2 3 4 5 6 7 8 9 10 11', '20 21")
    assert text.endswith(" 151', ...")
    assert text.count("'") == 2 * 8


def test_where_steps_may_be_skipped_only_those_with_a_bad_gradient_are(trainer, caplog):
    watch, model = watch_of(trainer, check=False), torch.nn.Linear(2, 1)
    trainer._tr_loss = torch.tensor(float("nan"))  # not looked at
    for value, kept, skipped in ((1.0, True, 0), (float("nan"), False, 1), (float("inf"), False, 2)):
        model.weight.grad = torch.tensor([[0.0, value]])
        watch.on_pre_optimizer_step(ALONE, state(), control(), model=model)
        assert (model.weight.grad is not None, watch.skipped) == (kept, skipped)
    assert "Step 4 is skipped" in caplog.text


def test_a_weight_that_is_no_number_is_looked_for_before_it_is_saved(trainer):
    watch, model, now = watch_of(trainer), torch.nn.Linear(2, 1), control()
    model.weight.data[0, 1] = float("nan")
    watch.on_step_end(ALONE, state(), now, model=model)  # looking costs time: not at every step
    now.should_save = True
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 3"):
        watch.on_step_end(ALONE, state(), now, model=model)


def test_a_signal_is_answered_at_the_end_of_the_step_and_the_next_ctrl_c_is_not_caught(trainer, capfd):
    watch, model, now = watch_of(trainer), torch.nn.Linear(2, 1), control()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with watch.signals():
        watch.on_step_end(ALONE, state(), now, model=model)
        assert not now.should_training_stop
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        watch.on_step_end(ALONE, state(), now, model=model)
    assert (now.should_save, now.should_training_stop, watch.number) == (True, True, signal.SIGTERM)
    assert capfd.readouterr().err == "\nSIGTERM: writing a checkpoint after this step (Ctrl-C now ends at once)\n"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_belongs_to_the_end_of_an_epoch_waits_for_it(trainer):
    for epoch, evaluated in ((0.5, False), (2.0, True)):
        watch, now = watch_of(trainer), control()
        watch.number = signal.SIGTERM
        watch.on_step_end(ALONE, state(epoch=epoch), now, model=torch.nn.Linear(2, 1))
        watch.on_epoch_end(ALONE, state(epoch=epoch), now)
        assert (now.should_evaluate, now.should_save, now.should_training_stop) == (evaluated, evaluated, True)


def test_a_checkpoint_of_the_last_step_is_not_trained_on(trainer):
    watch = watch_of(trainer)
    watch.on_step_begin(ALONE, state(8), control())
    with pytest.raises(AlreadyTrained):
        watch.on_step_begin(ALONE, state(9), control())


def test_a_checkpoint_says_what_a_run_took_and_skipped_and_the_next_goes_on_from_there(trainer):
    first, told = watch_of(trainer), state()
    first.on_train_begin(ALONE, told, control())
    first.skipped, first.run.started = 2, first.run.started - 50
    first.began -= 30
    trainer.state = told
    trainer._save_checkpoint(None, None)
    assert told.stateful_callbacks[NAME]["seconds"] == pytest.approx(30, abs=5)

    trainer = SimpleNamespace(**{**vars(trainer), "_save_checkpoint": lambda model, trial: None})
    second = watch_of(trainer)
    second.on_train_begin(ALONE, told, control())
    assert (second.skipped, second.untimed) == (2, 3)  # its own first three steps had come from elsewhere
    second.began -= 10
    trainer._save_checkpoint(None, None)
    noted = told.stateful_callbacks[NAME]
    assert (noted["seconds"], noted["wall_seconds"]) == (pytest.approx(40, abs=5), pytest.approx(50, abs=5))
