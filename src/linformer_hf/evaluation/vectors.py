"""Documents' vectors, kept in the run's folder so that an interrupted evaluation goes on.

A file holds what one method made of one list of texts. Its name ends in a checksum of the texts, the method and its
weights, so that nothing is taken for what it is not.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..utils.writing import beside
from .methods import Method


class Store:
    """Vectors by method and texts, in a folder.

    Args:
        folder: made when the first vectors are kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, method: Method, texts: Sequence[str]) -> Path:
        found = hashlib.sha256(json.dumps([method.facts, list(texts)], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{method.name}-{found[:24]}.safetensors"

    def fill(self, jobs: Sequence[tuple[Method, Sequence[str]]]) -> None:
        """Read what is not there yet, with a progress bar over the texts."""
        missing = {path: job for job in jobs if not (path := self.path(*job)).exists()}
        with tqdm(total=sum(len(texts) for _, texts in missing.values()), desc="reading", unit="text") as bar:
            for path, (method, texts) in missing.items():
                bar.set_postfix_str(method.name)
                self._make(path, method, texts, bar)

    def _make(self, path: Path, method: Method, texts: Sequence[str], bar: tqdm) -> None:
        rows = []
        for text in texts:
            found = method.read(text)
            if not all(vectors.isfinite().all() for vectors in found.values()):
                raise ValueError(
                    f"{method.name} gives vectors that are not finite: damaged weights? Text: {text[:60]!r}"
                )
            rows.append(found)
            bar.update()
        tensors = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        counts = {f"{key} counts": torch.tensor([len(row[key]) for row in rows]) for key in rows[0]}
        self.folder.mkdir(parents=True, exist_ok=True)
        with beside(path) as written:
            save_file(tensors | counts, written)

    def get(self, method: Method, texts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """`whole` or a number of tokens -> [p, C] of each text.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(method, texts)
        try:
            found = load_file(path)
        except Exception as error:  # safetensors has an error of its own
            raise ValueError(f"{path} is damaged ({error}). Delete it, and it is made again.") from error
        return {
            key: list(vectors.split(found[f"{key} counts"].tolist()))
            for key, vectors in found.items()
            if not key.endswith(" counts")
        }
