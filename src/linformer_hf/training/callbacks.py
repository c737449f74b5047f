"""What ends a training before its last step: a signal, or a loss that is no number.

SIGTERM and Ctrl-C are answered at the end of the optimizer step, with a checkpoint that `--resume` goes on from. Before
and after training they end the program at once.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..utils.processes import handlers
from ..utils.runs import Run


logger = logging.getLogger(__name__)

SHOWN_ROWS, SHOWN_TOKENS = 8, 12
NAME = "linformer_hf"  # in a checkpoint's trainer_state.json


class AlreadyTrained(Exception):
    """The checkpoint that training was to go on from is that of its last step."""


class Watch(TrainerCallback):
    """Ends training with a checkpoint on a signal, and with an error where the loss or a weight is not finite.

    Args:
        trainer: whose callback it is.
        run: its clock goes on from the checkpoint's.
        last_checkpoint: names the newest whole checkpoint, for the message.
        check: whether a loss that is not finite is an error. If not, a step whose gradient is not finite changes
            nothing: it is skipped and counted.
    """

    def __init__(self, trainer: Trainer, run: Run, last_checkpoint: Callable[[], Path | None], check: bool):
        self.trainer, self.run, self.last_checkpoint, self.check = trainer, run, last_checkpoint, check
        self.number = 0  # of the signal
        self.stopping = False
        self.skipped = 0  # steps
        self.began = time.monotonic()
        self.seconds = 0.0  # of training before this process's
        self.untimed = 0  # steps before this process's whose seconds are not known
        self.rows: list[torch.Tensor] = []  # input_ids of the step's batches
        self._note_rows()
        save = trainer._save_checkpoint  # behind the evaluation, which may be what asks for it

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note(trainer.state)
            return save(*args, **kwargs)

        trainer._save_checkpoint = noted

    def _note_rows(self) -> None:
        """Trainer shows a step's rows to no callback."""
        step = self.trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.rows += [ids for name, ids in inputs.items() if name.endswith("input_ids")]  # of pairs one for each
            return step(model, inputs, *args, **kwargs)

        self.trainer.training_step = training_step

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Take note of SIGTERM and the first Ctrl-C; a second Ctrl-C ends the process at once."""
        with handlers({signal.SIGTERM: self._notice, signal.SIGINT: self._notice}):
            yield

    def _notice(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number = number
            name = signal.Signals(number).name
            # Not print: a signal may arrive in the middle of another one.
            os.write(2, f"\n{name}: writing a checkpoint after this step (Ctrl-C now ends at once)\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        before = state.stateful_callbacks.get(NAME)
        if before is None:
            self.untimed = state.global_step
            return
        self.skipped, self.seconds, self.untimed = before["skipped"], before["seconds"], before["untimed"]
        self.run.earlier = max(self.run.earlier, before["wall_seconds"])

    def _note(self, state: Any) -> None:
        """Into the checkpoint that is to be written."""
        seconds = self.seconds + time.monotonic() - self.began
        noted = {"skipped": self.skipped, "seconds": seconds, "untimed": self.untimed}
        state.stateful_callbacks[NAME] = {**noted, "wall_seconds": self.run.seconds}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.clear()
        if state.global_step >= state.max_steps:  # Trainer looks for this at a step's end only, so it would train one
            raise AlreadyTrained

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step, so that the weights are still good. Trainer hands the loss to no callback."""
        if self.check:
            if not torch.isfinite(self.trainer._tr_loss):
                self._refuse("the loss", state.global_step + 1)
            return
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            kwargs["model"].zero_grad(set_to_none=True)
            self.skipped += 1
            logger.warning(
                "Step %s is skipped: its gradient is not finite. %s", state.global_step + 1, self._examples()
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._agreed(args):
            control.should_save = control.should_training_stop = True
        if (
            control.should_save
            and self.check
            and not all(torch.isfinite(parameter.detach()).all() for parameter in model.parameters())
        ):
            self._refuse("a weight", state.global_step)  # rather than write a checkpoint that is worth nothing

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping and abs(state.epoch - round(state.epoch)) > 1e-9:
            # Trainer comes here from any step that it stops at. The checkpoint is written; what belongs to the end of
            # an epoch is for the resumed run.
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._agreed(args):  # at the end of an epoch, perhaps after it was evaluated
            control.should_save = control.should_training_stop = True

    def _agreed(self, args: Any) -> bool:
        """Whether any process has had a signal: all must stop at the same step, or the others wait for it forever."""
        if args.world_size > 1:
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        self.stopping = self.number > 0
        return self.stopping

    def _refuse(self, what: str, step: int) -> None:
        checkpoint = self.last_checkpoint()
        raise FloatingPointError(
            f"{what} is not finite at step {step}; training was stopped. "
            + (f"The last checkpoint is {checkpoint}. " if checkpoint else "There is no checkpoint yet. ")
            + self._examples()
            + " Lower training.learning_rate, or set training.logging_nan_inf_filter=true to skip such steps."
        )

    def _examples(self) -> str:
        """How the rows of the step begin."""
        tokenizer = self.trainer.processing_class
        if tokenizer is None or not self.rows:
            return "Its rows are not known."
        rows = [row for batch in self.rows for row in batch]
        beginnings = [
            repr(tokenizer.decode(row[:SHOWN_TOKENS], skip_special_tokens=False)) for row in rows[:SHOWN_ROWS]
        ]
        return f"Its {len(rows)} rows begin with {', '.join(beginnings)}{', ...' if len(rows) > SHOWN_ROWS else '.'}"
