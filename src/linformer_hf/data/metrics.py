"""Metrics that need no network: `evaluate.Metric` subclasses over scikit-learn.

`evaluate.load("accuracy")` fetches a script from the Hub; these are the same numbers from an installed library.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error


class _OfflineMetric(evaluate.Metric):
    value_type = "int64"

    def _info(self) -> evaluate.MetricInfo:
        column = datasets.Value(self.value_type)
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions and references of equal length",
            features=datasets.Features({"predictions": column, "references": column}),
        )


class Accuracy(_OfflineMetric):
    """Share of equal labels."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_OfflineMetric):
    """F1 of class 1 for two classes (GLUE's QQP), else the mean over classes."""

    def _compute(self, predictions: Any, references: Any, classes: int | None = None) -> dict[str, float]:
        two = classes == 2 if classes else set(np.unique([*references, *predictions])) <= {0, 1}
        average = "binary" if two else "macro"
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}


class MeanSquaredError(_OfflineMetric):
    """Mean squared error of a regression."""

    value_type = "float64"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"mse": float(mean_squared_error(references, predictions))}


class Pearson(_OfflineMetric):
    """Pearson correlation of a regression; 0 if one side is constant."""

    value_type = "float64"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        constant = np.std(predictions) == 0 or np.std(references) == 0
        return {"pearson": 0.0 if constant else float(np.corrcoef(predictions, references)[0, 1])}


METRICS: dict[str, type[_OfflineMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "mse": MeanSquaredError,
    "pearson": Pearson,
}


def build_compute_metrics(names: Sequence[str], positive: int = 1) -> Callable[[Any], dict[str, float]]:
    """Trainer's `compute_metrics` for metrics by name (keys of METRICS); `positive` of two classes is F1's."""
    # Each process has all gathered predictions already, so the metric itself always runs alone.
    metrics = [METRICS[name](keep_in_memory=True) for name in names]

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        answers = logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(-1)
        labels = prediction.label_ids
        if logits.shape[-1] == 2 and positive == 0:
            answers, labels = 1 - answers, 1 - labels
        result: dict[str, float] = {}
        for metric in metrics:
            more = {"classes": logits.shape[-1]} if isinstance(metric, F1) else {}  # not what these rows happen to hold
            result |= metric.compute(predictions=answers, references=labels, **more) or {}
        return result

    return compute


def test_metric(metrics: Mapping[str, Any]) -> str:
    """The name of what a fine-tuned model is judged by on the test rows."""
    return next(key for key in metrics if key.startswith("test_") and key != "test_rows")
