"""Runs of a verb as cells of a table: each in a process and a folder of its own, none that is finished repeated."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import results
from .recipe import Recipe


logger = logging.getLogger(__name__)


@dataclass
class Cell:
    """One run: where it is, and what is changed in its recipe.

    Attributes:
        verb: of the command line.
        read: the verb's reader of recipes.
        recipe: YAML file.
        folder: training.output_dir of the run.
        overrides: `section.key=value`.
    """

    verb: str
    read: Callable[[str, Sequence[str]], Recipe]
    recipe: str
    folder: Path
    overrides: list[str]

    def finished(self) -> dict[str, Any] | None:
        """Its results, or None if it has none yet. Raises a ValueError if they come from another recipe."""
        path = self.folder / results.RESULTS_FILE
        if not path.exists():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        overrides = [*self.overrides, f"training.output_dir={self.folder}"]
        now = json.loads(json.dumps(self.read(self.recipe, overrides).raw, default=str))
        if content["recipe"] != now:
            raise ValueError(
                f"{self.folder} holds a run of another recipe. Choose another output_dir, or delete that run."
            )
        return content

    def run(self) -> dict[str, Any] | None:
        """Its results, from its folder or from a new run; None if that fails (its message is on the terminal)."""
        done = self.finished()
        if done is not None:
            return done
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / results.RECIPE_FILE).exists():
                raise ValueError(f"{self.folder} holds something that is no run; choose another output_dir.")
            logger.warning("%s holds an unfinished run: it is begun anew.", self.folder)
            shutil.rmtree(self.folder)
        print(f"\n== {self.folder}", flush=True)
        # -P: what lies in the current folder must not shadow an installed module.
        command = [sys.executable, "-P", "-m", __package__ or "linformer_hf", self.verb, self.recipe]
        if subprocess.run([*command, *self.overrides, f"training.output_dir={self.folder}"]).returncode:
            return None
        done = self.finished()
        assert done is not None
        return done


def folder_name(name: str) -> str:
    """A name as a folder: its letters, digits and dots."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")


def check_names(names: Sequence[str]) -> None:
    """Raise a ValueError unless every name has a folder of its own."""
    folders = {folder_name(name) for name in names}
    if len(folders) < len(names) or "" in folders:
        raise ValueError(f"the names {', '.join(names)} must differ in their letters and digits.")
