"""The metrics one by one: limits, names, and which column of the logits is the answer."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from linformer_hf.data import metrics


def computed(kind: str, name: str, answers: list, labels: list) -> float:
    return metrics.METRICS[kind][name](labels, answers)


@pytest.mark.parametrize(
    ("answers", "labels", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 3.0], [1.0, 0.0, 1.0], 0.0),
        ([1.0, 2.0], [7.0, 7.0], 0.0),  # one side is constant
    ],
)
def test_pearson_at_its_limits(answers, labels, expected):
    assert computed("regression", "pearson", answers, labels) == pytest.approx(expected)


def test_a_third_class_makes_f1_a_mean_wherever_it_stands():
    f1 = metrics.METRICS["classification"]["f1"]
    assert f1([1, 0, 0], [1, 0, 1], classes=2) == pytest.approx(2 / 3)
    # Classes 0, 1 and 2: 2 of 2 + 2, nothing of 1, nothing of 1.
    assert f1([0, 1], [0, 2], classes=3) == pytest.approx(1 / 3)
    assert f1([0, 2], [0, 1], classes=3) == pytest.approx(1 / 3)


def test_numbers_of_a_regression_are_not_rounded_to_whole_ones():
    assert computed("regression", "mse", [0.5, 0.0], [0.0, 0.0]) == pytest.approx(0.125)


def test_one_column_is_a_number_and_several_are_the_largest():
    def prediction(logits, labels):
        return SimpleNamespace(predictions=np.array(logits), label_ids=np.array(labels))

    assert metrics.build_compute_metrics("regression", ["mse"])(prediction([[0.25], [4.0]], [0.25, 2.0])) == {
        "mse": 2.0
    }
    logits = [[0.1, 0.2, 0.9], [5.0, -1.0, 4.0]]
    compute = metrics.build_compute_metrics("classification", ["accuracy"], "abc")
    assert compute(prediction(logits, [2, 0])) == {"accuracy": 1.0}
    # Only of two classes is one the positive one.
    three = metrics.build_compute_metrics("classification", ["accuracy", "f1"], "abc", positive=0)
    assert three(prediction(logits, [2, 1])) == metrics.build_compute_metrics(
        "classification", ["accuracy", "f1"], "abc"
    )(prediction(logits, [2, 1]))


def test_metrics_are_given_in_the_order_in_which_they_were_asked_for():
    prediction = SimpleNamespace(predictions=np.eye(2), label_ids=np.array([0, 1]))
    for names in (["accuracy", "f1"], ["f1", "accuracy"]):
        assert list(metrics.build_compute_metrics("classification", names, "ab")(prediction)) == names


def test_a_model_is_judged_by_its_first_metric_of_the_test_rows():
    found = {"eval_accuracy": 0.1, "test_rows": 9, "test_f1": 0.2, "test_accuracy": 0.3}
    assert metrics.test_metric(found) == "test_f1"


def test_f1_asks_the_task_how_many_classes_there_are_and_not_the_rows():
    logits = np.eye(3)[[0, 1, 1]]  # of three classes; no row here is of the third
    rows = SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 0]))
    found = metrics.build_compute_metrics("classification", ["f1"], "abc")(rows)
    assert found == {"f1": pytest.approx((2 / 3 + 2 / 3) / 2)}
    none = SimpleNamespace(predictions=logits[:, :2], label_ids=np.array([0, 0, 0]))
    assert metrics.build_compute_metrics("classification", ["f1"], "ab")(none) == {"f1": 0.0}


def test_cola_and_sts_b_have_their_own_metrics():
    matthews = metrics.METRICS["classification"]["matthews"]
    assert matthews([1, 1, 1, 0], [1, 0, 1, 1]) == pytest.approx((2 * 0 - 1 * 1) / (3 * 3 * 1 * 1) ** 0.5)
    assert computed("regression", "spearman", [1.0, 2.0, 9.0], [1.0, 4.0, 5.0]) == pytest.approx(1)
    assert computed("regression", "spearman", [1.0, 1.0], [1.0, 4.0]) == 0.0


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The  Keeper!", ["keeper"], 1, 1),  # SQuAD's own evaluation passes over articles, case and punctuation
        ("old keeper", ["keeper", "an old stone"], 0, 2 / 3),
        ("keeper keeper", ["keeper"], 0, 2 / 3),
        ("window", ["keeper"], 0, 0),
        ("", [], 1, 1),
        ("window", [], 0, 0),
    ],
)
def test_an_answer_is_compared_with_the_nearest_reference(answer, references, exact, f1):
    assert computed("question-answering", "exact_match", [answer], [references]) == exact
    assert computed("question-answering", "f1", [answer], [references]) == pytest.approx(f1)


def best(context: str, starts: list, ends: list, none: bool = False) -> str:
    """Of one question about `context`, whose tokens are its characters behind two others."""
    spans = [[-1, -1]] * 2 + [[i, i + 1] for i in range(len(context))]
    labels = [{"text": [] if none else ["a"], "answer_start": [] if none else [0]}]
    rows = Dataset.from_dict({"pair": [context], "label": labels, "spans": [spans]})
    return next(metrics.best_answers(rows, np.array([[*starts, 9.0]]), np.array([[*ends, 9.0]])))  # and padding


def test_the_best_span_ends_behind_its_beginning_and_lies_in_the_context():
    assert best("abcd", [9, 9, 0, 0, 5, 0], [9, 9, 0, 6, 0, 4]) == "cd"  # b as an end would stand before c
    assert best("abcd", [9, 9, 0, 0, 5, 0], [9, 9, 0, 6, 0, 4], none=True) == ""
    assert best("abcd", [1, 9, 0, 0, 5, 0], [1, 9, 0, 6, 0, 4], none=True) == "cd"


def test_an_answer_has_at_most_so_many_tokens():
    n = metrics.LONGEST_ANSWER
    context = "x" * (n + 3)
    starts, ends = ([0.0] * (n + 5) for _ in range(2))
    starts[2], ends[1 + n] = 5.0, 3.0
    assert best(context, starts, ends) == "x" * n
    ends[1 + n], ends[2 + n] = 0.0, 3.0  # one more would be too many
    assert best(context, starts, ends) == "x"


@pytest.mark.parametrize(
    ("kind", "name", "logits", "labels", "expected"),
    [
        # The mean of a row's pieces decides: of the first row's two one alone would be wrong.
        ("classification", "accuracy", [[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0, 0, 1], 1.0),
        ("regression", "mse", [[1.0], [3.0], [5.0]], [2.0, 2.0, 4.0], 0.5),
        ("multi-label", "subset_accuracy", [[3.0, -3.0], [-1.0, 1.0], [-1.0, 1.0]], [[1, 0], [1, 0], [0, 0]], 0.5),
    ],
)
def test_a_row_in_pieces_is_judged_once(kind, name, logits, labels, expected):
    prediction = SimpleNamespace(predictions=np.array(logits), label_ids=np.array(labels))
    compute = metrics.build_compute_metrics(kind, [name], "ab", pieces=[0, 0, 1])
    assert compute(prediction) == {name: pytest.approx(expected)}


def test_a_context_in_pieces_has_an_answer_where_one_piece_has():
    rows = Dataset.from_list(
        [
            {"pair": "a b", "label": {"text": texts, "answer_start": []}, "spans": [[-1, -1], [0, 1], [2, 3]]}
            for texts in (["b"], ["b"], [], [])
        ]
    )
    starts = ends = np.array([[9.0, 0.0, 0.0], [1.0, 0.0, 2.0], [9.0, 8.0, 0.0], [4.0, 0.0, 0.0]])
    assert [*metrics.best_answers(rows, starts, ends, [0, 0, 1, 1])] == ["b", "a"]
    assert [*metrics.best_answers(rows, starts, ends)] == ["", "b", "", ""]
