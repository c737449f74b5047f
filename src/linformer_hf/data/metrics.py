"""How answers are judged, by kind of task, without a network; and what answers without a model would get.

`evaluate.load("glue")` fetches a script from the Hub; these are the same numbers from installed libraries.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


LONGEST_ANSWER = 30  # tokens, as in transformers' run_qa.py
ERRORS = ("mse",)  # the lower the better
SEQEVAL = ("f1", "precision", "recall")  # what the extra `tagging` is for


def _class_f1(references: Any, answers: Any, classes: int, positive: int = 1) -> float:
    """Of class `positive` for two classes (GLUE's QQP), else the mean over classes."""
    which: dict[str, Any] = {"average": "binary", "pos_label": positive} if classes == 2 else {"average": "macro"}
    return f1_score(references, answers, **which, zero_division=0)


def _correlation(measure: Callable[..., Any], references: Any, answers: Any) -> float:
    """0 if one side is constant."""
    return 0.0 if np.ptp(references) == 0 or np.ptp(answers) == 0 else measure(references, answers).statistic


def _label_f1(average: str, references: Any, answers: Any) -> float:
    return f1_score(references, answers, average=average, zero_division=0)


def _entities(name: str, references: Any, answers: Any) -> float:
    """seqeval's, over whole entities: CoNLL's evaluation."""
    from seqeval import metrics  # of an extra

    return getattr(metrics, f"{name}_score")(references, answers, zero_division=0)


def _tags(references: Any, answers: Any) -> float:
    return accuracy_score(*(list(chain.from_iterable(side)) for side in (references, answers)))


def _normal(text: str) -> list[str]:
    """The words of an answer, as SQuAD's own evaluation compares them."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _exact(answer: str, reference: str) -> float:
    return float(_normal(answer) == _normal(reference))


def _word_f1(answer: str, reference: str) -> float:
    ours, theirs = _normal(answer), _normal(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def _best(measure: Callable[[str, str], float], references: Any, answers: Any) -> float:
    """The mean over the questions of the best over the reference answers."""
    pairs = zip(answers, references, strict=True)
    return float(np.mean([max(measure(answer, text) for text in texts or [""]) for answer, texts in pairs]))


# By kind: (references, answers) -> number. Of vectors: what stands in the key of a sentence-transformers evaluator.
METRICS: dict[str, dict[str, Any]] = {
    "classification": {"accuracy": accuracy_score, "f1": _class_f1, "matthews": matthews_corrcoef},
    "regression": {
        "mse": mean_squared_error,
        "pearson": partial(_correlation, pearsonr),
        "spearman": partial(_correlation, spearmanr),
    },
    "multi-label": {
        "micro_f1": partial(_label_f1, "micro"),
        "macro_f1": partial(_label_f1, "macro"),
        "subset_accuracy": accuracy_score,
    },
    "token-classification": {
        **{name: partial(_entities, name) for name in SEQEVAL},
        "accuracy": _tags,
    },
    "question-answering": {"f1": partial(_best, _word_f1), "exact_match": partial(_best, _exact)},
    "multiple-choice": {"accuracy": accuracy_score},
    "pairs": {
        **{name: f"_{name}" for name in ("accuracy@1", "accuracy@10", "mrr@10", "ndcg@10", "map@100")},
        "triplet_accuracy": "_accuracy",
    },
    "similarity": {"spearman": "spearman_", "pearson": "pearson_"},
}


def build_compute_metrics(
    kind: str,
    names: Sequence[str],
    classes: Sequence[str] = (),
    positive: int = 1,
    rows: Dataset | None = None,
    pieces: Sequence[int] | None = None,
) -> Callable[[Any], dict[str, float]]:
    """Trainer's `compute_metrics`.

    Args:
        kind: of the task, a key of METRICS.
        names: of metrics, keys of METRICS[kind].
        classes: their names, in order.
        positive: of two classes, the one that F1 is about.
        rows: of question-answering: the rows that are judged, in their order, with `pair`, `label` and `spans`.
        pieces: which row each of the judged pieces is of, in their order, where rows are read in pieces.
    """
    metrics = {name: METRICS[kind][name] for name in names}
    if kind == "classification" and "f1" in metrics:  # classes of the task, not what these rows happen to hold
        metrics["f1"] = partial(_class_f1, classes=len(classes), positive=positive)

    def compute(prediction: Any) -> dict[str, float]:
        logits, references = prediction.predictions, prediction.label_ids
        if rows is not None:
            starts, ends = logits[:2]
            answers: Any = list(best_answers(rows, starts, ends, pieces))
            labels = list(rows["label"])
            references = [labels[group[0]]["text"] for group in _groups(pieces, len(rows))]
        else:
            logits = logits[0] if isinstance(logits, tuple) else logits
            answers, references = _answers(kind, logits, references, classes, pieces)
        return {name: float(metric(references, answers)) for name, metric in metrics.items()}

    return compute


def _groups(pieces: Sequence[int] | None, count: int) -> list[range]:
    """The places of each row's pieces, which follow one another; without `pieces` every row is one of `count`."""
    if pieces is None:
        return [range(place, place + 1) for place in range(count)]
    starts = np.flatnonzero(np.diff(pieces, prepend=-1)).tolist()
    return [range(*ends) for ends in pairwise([*starts, len(pieces)])]


def _answers(
    kind: str, logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], pieces: Sequence[int] | None
) -> tuple[Any, Any]:
    """(answers, references) of all kinds whose rows need not be looked up."""
    if kind == "token-classification":
        there = labels >= 0
        sides = list(zip(logits.argmax(-1), labels, there, strict=True))
        rows = [sides[group.start : group.stop] for group in _groups(pieces, len(sides))]
        answers = [[classes[i] for answer, _, kept in row for i in answer[kept]] for row in rows]
        return answers, [[classes[i] for _, label, kept in row for i in label[kept]] for row in rows]
    if pieces is not None:
        groups = _groups(pieces, len(logits))
        starts = [group.start for group in groups]
        logits = np.add.reduceat(logits, starts) / np.array([[len(group)] for group in groups])
        labels = labels[starts]
    if kind == "regression":
        return logits[:, 0], labels
    if kind == "multi-label":
        return (logits > 0).astype(int), labels.astype(int)  # more likely than not
    return logits.argmax(-1), labels


def best_answers(
    rows: Dataset, starts: np.ndarray, ends: np.ndarray, pieces: Sequence[int] | None = None
) -> Iterator[str]:
    """The span of each context with the highest sum of logits; "" where that of the row's first token is higher.

    The latter only if some answers of `rows` are empty: else nothing was learned about the first token. Of a context in
    pieces the first token with the lowest sum counts, as in transformers' run_qa.py: one piece that has an answer is
    enough.

    Args:
        rows: with `pair`, `label` and `spans`, [start, end] of each token's characters or [-1, -1].
        starts, ends: [rows, tokens].
        pieces: as in `build_compute_metrics`.
    """
    nothing = any(not label["text"] for label in rows["label"])
    following = iter(rows)
    for group in _groups(pieces, len(rows)):
        found = [_best_span(row, starts[place], ends[place]) for place, row in zip(group, following, strict=False)]
        score, text = max(found, key=lambda one: one[0])
        none = min(starts[place][0] + ends[place][0] for place in group) if nothing else -np.inf
        yield text if score > none else ""


def _best_span(row: Mapping[str, Any], start: np.ndarray, end: np.ndarray) -> tuple[float, str]:
    spans = np.array(row["spans"])
    start, end = (np.where(spans[:, 0] < 0, -np.inf, side[: len(spans)]) for side in (start, end))
    # [tokens more than one, first token]
    more = range(min(LONGEST_ANSWER, len(spans)))
    scores = np.stack([start + np.pad(end[m:], (0, m), constant_values=-np.inf) for m in more])
    m, first = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[m, first]), row["pair"][spans[first, 0] : spans[first + m, 1]]


def test_metric(metrics: Mapping[str, Any]) -> str:
    """The name of what a fine-tuned model is judged by on the test rows."""
    return next(key for key in metrics if key.startswith("test_") and key != "test_rows")


def baselines(train_rows: Dataset, test_rows: Dataset, classes: int) -> dict[str, float]:
    """Test accuracy of the majority class and, for pairs, of word overlap (thresholds from training rows).

    `shared_words` counts the words that two texts share; `word_overlap` divides them by the words of either (Jaccard).
    """
    labels, answers = np.array(train_rows["label"]), np.array(test_rows["label"])
    result = {"majority": float((answers == np.bincount(labels).argmax()).mean())}
    if "pair" in train_rows.column_names and classes == 2:
        train, test = _overlaps(train_rows), _overlaps(test_rows)
        for name in ("shared_words", "word_overlap"):
            result[name] = _by_threshold(train[name], labels, test[name], answers)
    return result


def by_rules(rules: Mapping[str, Callable[[str], float]], known_rows: Dataset, test_rows: Dataset) -> dict[str, float]:
    """Test accuracy of each rule, a text's score: the threshold is from `known_rows`."""
    result = {}
    for name, rule in rules.items():
        known, test = ([rule(text) for text in rows["text"]] for rows in (known_rows, test_rows))
        result[name] = _by_threshold(np.array(known), known_rows["label"], np.array(test), np.array(test_rows["label"]))
    return result


def _by_threshold(
    known: np.ndarray, labels: Sequence[int] | np.ndarray, test: np.ndarray, answers: np.ndarray
) -> float:
    threshold, sign = best_threshold(known, labels)
    return float(((sign * test >= sign * threshold) == answers).mean())


def _overlaps(rows: Dataset) -> dict[str, np.ndarray]:
    shared, share = [], []
    for text, pair in zip(rows["text"], rows["pair"], strict=True):
        one, two = (set(re.findall(r"\w+", side.lower())) for side in (text, pair))
        shared.append(len(one & two))
        share.append(len(one & two) / max(1, len(one | two)))
    return {"shared_words": np.array(shared, float), "word_overlap": np.array(share)}


def best_threshold(scores: np.ndarray, labels: Sequence[int] | np.ndarray) -> tuple[float, int]:
    """(threshold, sign) that label the most rows right by `sign * score >= sign * threshold`."""
    labels = np.asarray(labels)
    best = (0.0, 0.0, 1)
    for sign in (1, -1):
        for threshold in np.unique(np.quantile(scores, np.linspace(0, 1, 101))):
            right = float(((sign * scores >= sign * threshold) == labels).mean())
            best = max(best, (right, float(threshold), sign))
    return best[1], best[2]
