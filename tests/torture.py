"""How much harm a test does: some in every run of the tests, all of it under `make torture` (TORTURE=long)."""

import json
import os
from pathlib import Path
from typing import Any


LONG = os.environ.get("TORTURE") == "long"
FIGURES = Path(os.environ.get("TORTURE_FIGURES", "runs/torture/figures.jsonl"))


def times(short: int, long: int) -> int:
    """How often: `short` in every run of the tests, `long` under `make torture`."""
    return long if LONG else short


def record(promise: str, **figures: Any) -> None:
    """Keep what the long form reached, as a line of JSON; docs/reliability.md quotes it."""
    if LONG:
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        with FIGURES.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"promise": promise, **figures}) + "\n")
