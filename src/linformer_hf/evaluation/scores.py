"""From vectors to numbers: what a search finds, what a linear probe learns, and how sure a difference is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from ..embedding.encoder import blend
from .methods import WHOLE
from .tasks import Task


FOLDS = 5
RESAMPLES = 10_000
TEN = 10  # found among ten


@dataclass(frozen=True)
class Score:
    """What a method got in a task by one measure.

    Attributes:
        values: [o], of each query or document, 0 to 1; their mean is the score.
        units: [o], what each belongs to: a query to its document, a document to its group. Units are resampled, since
            what is in one is alike.
    """

    values: np.ndarray
    units: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean())


def one_vector(found: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
    """[d, C] of length 1: each document's one vector or, where a method has only pieces, the mean of theirs."""
    pieces = found.get(WHOLE) or next(iter(found.values()))
    return normalize(torch.stack([vectors.mean(0) for vectors in pieces]), dim=-1)


def ranks(nearness: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """How many documents stand before the right one, [q]; one as near as it counts as before it.

    Args:
        nearness: of each query to each document, [q, d].
        truth: the right document of each query, [q].
    """
    return ((nearness >= nearness.gather(1, truth[:, None])).sum(1) - 1).numpy()


def search(task: Task, nearness: torch.Tensor) -> dict[str, Score]:
    """`found first` and `among ten`, from each query's nearness to each document, [q, d]."""
    truth = torch.tensor([document for _, document in task.queries])
    found = ranks(nearness, truth)
    return {
        name: Score((found < most).astype(float), truth.numpy()) for name, most in (("first", 1), ("among ten", TEN))
    }


def nearest_piece(queries: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """A document is as near as its nearest piece: [q, C] and [p, C] of each document -> [q, d]."""
    queries = normalize(queries, dim=-1)
    return torch.stack([(queries @ normalize(vectors, dim=-1).T).amax(1) for vectors in pieces], 1)


def blended(pieces: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each piece half way between one pass over its document and the source's vector of it alone.

    So `embed --blend` makes it where the encoder reads a piece as its source does: up to K tokens, short inputs not
    trained.
    """
    return [blend(one, other) for one, other in zip(pieces, alone, strict=True)]


def probe(task: Task, vectors: torch.Tensor, seeds: Sequence[int]) -> dict[str, Score]:
    """Accuracy of a linear classifier on standardized vectors [d, C], each document by one that saw none of its group.

    A document's value is the mean over `seeds`, each of which makes other folds.
    """
    from sklearn.linear_model import LogisticRegression  # a second
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, groups, features = np.array(task.labels), np.array(task.groups), vectors.double().numpy()
    right = np.zeros(len(labels))
    count = min([FOLDS, *(len(set(groups[labels == label])) for label in set(task.labels))])
    for seed in seeds:
        folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        for train, test in folds.split(features, labels, groups):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            right[test] += model.fit(features[train], labels[train]).predict(features[test]) == labels[test]
    numbers = np.unique(groups, return_inverse=True)[1]
    return {"accuracy": Score(right / len(seeds), numbers)}


def resampled(score: Score, other: Score, seed: Sequence[int], count: int = RESAMPLES) -> np.ndarray:
    """Differences score - other, [count], each over units drawn with replacement, the same for both."""
    assert np.array_equal(score.units, other.units)
    _, numbers = np.unique(score.units, return_inverse=True)
    sums = np.bincount(numbers, score.values - other.values)
    sizes = np.bincount(numbers)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(count, len(sizes)))
    return sums[drawn].sum(1) / sizes[drawn].sum(1)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Of 95 %."""
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)
