"""A run of a verb: the folder that it fills, its clock, and what it shows at its end."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from .environment import environment
from .files import RESULTS_FILE, write_json, write_text


@dataclass
class Run:
    """What a verb does with a recipe. Its clock starts when it is made; nothing is written before `write`.

    Attributes:
        verb: of the command line.
        recipe: the sections of the recipe, JSON-able.
        folder: to fill.
        earlier: seconds of the interrupted run that it goes on with, up to the checkpoint.
    """

    verb: str
    recipe: Mapping[str, Any]
    folder: Path
    started: float = field(default_factory=time.time)
    earlier: float = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier + time.time() - self.started

    def content(self, seed: int, device: torch.device | str, dtype: str, **measured: Any) -> dict[str, Any]:
        """What results.json says: the recipe, the machine, what was measured, the time it took."""
        facts = {"verb": self.verb, "recipe": self.recipe, **environment(seed, torch.device(device), dtype)}
        return {**facts, **measured, "wall_seconds": self.seconds}

    def write(self, content: Mapping[str, Any], text: str, name: str) -> None:
        """`text` as the file `name`, then results.json: a folder that has it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / name, text + "\n")
        write_json(self.folder / RESULTS_FILE, content)

    def tell(self, text: str, what: str, file: str = "") -> Path:
        """Print what was found and where it is; the folder."""
        show(f"\n{text}\n")
        print(f"{what} and {RESULTS_FILE}: {(self.folder / file).resolve()}")
        return self.folder


def show(markdown: str) -> None:
    """Print Markdown to stdout: drawn, if a person reads it on a terminal; as it is in a file or a pipe."""
    if sys.stdout.isatty():
        Console().print(Markdown(markdown))
    else:
        print(markdown)
