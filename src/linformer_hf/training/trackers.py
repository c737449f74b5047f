"""Trackers: what `training.report_to` names (tensorboard, trackio, ...), through Trainer's own callbacks.

A tracker that is not installed is an error before anything is read. One that fails later (a server that is down, a
folder that cannot be written) is left out from then on: a run of days must not end with its dashboard.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks


logger = logging.getLogger(__name__)

EXTRA = ("tensorboard", "trackio")  # what `linformer_hf[trackers]` brings


def names(training: Mapping[str, Any]) -> list[str]:
    """What the section `training` of a recipe reports to; `all` is what is installed."""
    given = training.get("report_to") or []
    given = [given] if isinstance(given, str) else list(given)
    return [] if given == ["none"] else given


def check(training: Mapping[str, Any]) -> None:
    """Raise a ValueError if a tracker that is named is unknown or not installed."""
    for name in names(training):
        try:
            if name != "all":
                get_reporting_integration_callbacks([name])[0]()
        except (RuntimeError, ImportError) as error:  # it is what it needs that is missing
            package = "'linformer_hf[trackers]'" if name in EXTRA else name
            raise ValueError(f"training.report_to: {name} is not installed: pip install {package} ({error})") from None
        except ValueError as error:
            raise ValueError(f"training.report_to: {' '.join(str(error).split())}") from None


def prepare(trainer: Trainer) -> None:
    """Tokens per second among what Trainer logs, and no end of training where a tracker fails."""
    args = trainer.args
    if args.report_to and args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "all"
    for name in args.report_to:
        kind = get_reporting_integration_callbacks([name])[0]
        for callback in trainer.callback_handler.callbacks:
            if type(callback) is kind:
                _guard(callback, name)


def _guard(tracker: TrainerCallback, name: str) -> None:
    """Trainer's events reach `tracker` until one of them fails."""
    failed = False

    def guarded(event: Callable[..., Any]) -> Callable[..., Any]:
        def tell(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return event(*args, **kwargs)
            except Exception as error:  # whatever a tracker's client raises
                failed = True
                reason = " ".join(str(error).split())
                logger.warning("The tracker %s failed (%s): training goes on without it.", name, reason or repr(error))
                return None

        return tell

    for event in dir(TrainerCallback):
        if event.startswith("on_"):
            setattr(tracker, event, guarded(getattr(tracker, event)))
