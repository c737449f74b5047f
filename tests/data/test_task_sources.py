"""Labelled rows of one's own: in which order classes are numbered, and what is cut and drawn from the rows."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData


@pytest.fixture
def rows(tmp_path):
    """Writes a file of rows with these labels, their texts numbered, and gives its path."""

    def write(labels, name="rows.jsonl") -> str:
        lines = [json.dumps({"text": f"text {i}", "label": label}) for i, label in enumerate(labels)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def files(train: str, **more) -> TaskData:
    return TaskData("files", train_file=train, **more)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),  # whole numbers by value
        (["1.0", "2e1", "3"], ["1.0", "3", "2e1"]),
        (["10", "9", "B", "a"], ["10", "9", "B", "a"]),  # else all by letter
        (["01", "1"], ["01", "1"]),  # two classes, though one value
        ([True, False], ["False", "True"]),
    ],
)
def test_classes_are_numbered_by_value_or_by_letter(rows, labels, names):
    task = load_task(files(rows(labels * 10)))
    assert task.label_names == names
    for row in task.train:
        assert names[row["label"]] == str(labels[int(row["text"].split()[1]) % len(labels)])


def test_slices_have_every_class_in_its_share(rows):
    task = load_task(files(rows(["a"] * 80 + ["b"] * 20), test_fraction=0.25, validation_fraction=0.2))
    found = [Counter(split["label"]) for split in (task.test, task.validation, task.train)]
    assert found == [{0: 20, 1: 5}, {0: 12, 1: 3}, {0: 48, 1: 12}]


def test_the_seed_alone_decides_which_rows_are_cut(rows):
    file = rows(["a", "b"] * 50)
    first, again, other = (load_task(files(file, seed=seed)).test["text"] for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert set(first) != set(other)


def test_rows_are_drawn_from_the_whole_file_and_counted(rows):
    task = load_task(files(rows(["a", "b"] * 100), max_train_rows=20, max_test_rows=5))
    assert task.counts == {"train_rows": 20, "validation_rows": 9, "test_rows": 5}
    drawn = [int(text.split()[1]) for text in task.train["text"]]
    assert max(drawn) > 100  # not the first ones
    assert drawn != sorted(drawn)


def test_a_regression_keeps_its_numbers_and_has_no_classes(rows):
    task = load_task(files(rows([0.5, "2", -1, 1e-3] * 10), kind="regression"))
    assert (task.label_names, task.metrics, task.baselines) == (None, ("mse", "pearson"), {})
    for row in task.train:
        assert row["label"] == pytest.approx([0.5, 2, -1, 1e-3][int(row["text"].split()[1]) % 4])


@pytest.mark.parametrize("value", ["much", "inf", [1], 10**400])
def test_what_is_no_number_of_a_regression_is_named(rows, value):
    with pytest.raises(ValueError, match=r"row 2, column 'label': kind: regression, but .{1,40} is no number\."):
        load_task(files(rows([0.5, value, 1.0]), kind="regression"))


@pytest.mark.parametrize(
    ("column", "row"), [("label", {"text": "a b", "label": ["x", "y"]}), ("text", {"text": ["a"]})]
)
def test_lists_of_a_classification_name_the_kinds_that_have_them(tmp_path, column, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"label": "x"} | row) + "\n", encoding="utf-8")
    ways = r"Set data\.kind=multi-label \(.*\), or data\.kind=token-classification \(.*\)\.$"
    with pytest.raises(ValueError, match=rf"rows\.jsonl, row 1, column '{column}': \[.* is no text\. {ways}"):
        load_task(files(str(tmp_path / "rows.jsonl")))


def test_a_decimal_number_is_no_class(rows):
    with pytest.raises(ValueError, match=r"row 3, column 'label': 1\.5 is a decimal number; set data\.kind=regression"):
        load_task(files(rows([1, 2, 1.5])))
    with pytest.raises(ValueError, match=r"label_column='label' holds decimal numbers; set data\.kind=regression"):
        load_task(files(rows(["1", "2.5"] * 9)))


def test_a_split_without_rows_is_named(rows):
    empty = rows([], "empty.jsonl")
    for split in ("test", "validation"):
        with pytest.raises(ValueError, match=rf"task 'files' has no rows in its {split} split\."):
            load_task(files(rows(["a", "b"] * 9), **{f"{split}_file": empty}))


# Every kind of task: rows of each form that users have, and what does not fit.


@pytest.fixture
def table(tmp_path):
    """Writes what it is given, rows of JSON or text, and gives the section `data` of that kind."""

    def write(kind: str, content, name="rows.jsonl", **more) -> TaskData:
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        (tmp_path / name).write_text(text, encoding="utf-8")
        return files(str(tmp_path / name), kind=kind, **more)

    return write


def all_rows(data: TaskData) -> list[dict]:
    """Of all splits, in the order of their texts."""
    task = load_task(data)
    return sorted((row for rows in task.splits.values() for row in rows), key=lambda row: str(row["text"]))


def message_of(data: TaskData) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        load_task(data)
    return str(error.value)


def test_labels_stand_in_a_list_or_in_a_text(table):
    listed = [{"text": f"{i}", "label": [["a", "b"], [], ["b"]][i % 3]} for i in range(9)]
    told = "text,label\n" + "".join(f"{i},{['a | b', '', 'b'][i % 3]}\n" for i in range(9))
    expected = [[[0, 1], [], [1]][i % 3] for i in range(9)]
    assert [row["label"] for row in all_rows(table("multi-label", listed))] == expected
    data = table("multi-label", told, "rows.csv", separator="|")
    assert [row["label"] for row in all_rows(data)] == expected
    assert load_task(data).label_names == ["a", "b"]
    message = message_of(table("multi-label", told, "rows.csv"))
    assert "row 1, column 'label': 'a | b' is no list of texts. Write a list, set data.separator" in message


def test_labels_outside_the_names_are_named_with_their_row(table):
    rows = [{"text": f"{i}", "label": ["a"] if i != 4 else ["a", "z"]} for i in range(9)]
    assert "row 5: the label 'z' is none of the 2 classes (b, a)." in message_of(
        table("multi-label", rows, label_names=["b", "a"])
    )
    assert load_task(table("multi-label", rows, label_names=["z", "a"])).label_names == ["z", "a"]
    single = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(9)]
    message = message_of(table("classification", single, label_names=["a", "c"]))
    assert "row 2: the label 'b' is none of the 2 classes (a, c). Correct or remove the row, or complete" in message


@pytest.mark.parametrize("labels", [("bad", "good"), ("Bad", "GOOD"), (0, 1), ("0", "1")])
def test_listed_names_are_found_by_number_and_in_another_spelling(rows, labels):
    task = load_task(files(rows(labels * 9), label_names=["bad", "good"]))
    assert task.label_names == ["bad", "good"]
    for row in task.train:
        assert row["label"] == int(row["text"].split()[1]) % 2


def test_names_that_are_numbers_are_no_places(rows):
    task = load_task(files(rows(["1", "0"] * 9), label_names=["1", "0"]))
    assert all(row["label"] == int(row["text"].split()[1]) % 2 for row in task.train)


def test_another_spelling_of_an_unlisted_class_is_another_class(rows):
    test_file = rows(["a", "B"], "test.jsonl")
    with pytest.raises(ValueError, match="the test rows hold classes that no training row has: B"):
        load_task(files(rows(["a", "b"] * 9), test_file=test_file))


CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\nBlackburn NNP I-PER\n"


def test_words_and_tags_stand_in_lines_in_lists_or_in_texts(table):
    expected = [
        {"text": ["EU", "rejects"], "label": ["B-ORG", "O"]},
        {"text": ["Peter", "Blackburn"], "label": ["B-PER", "I-PER"]},
    ]
    listed = [{"tokens": row["text"], "tags": row["label"]} for row in expected]
    told = "tokens,tags\nEU rejects,B-ORG O\nPeter Blackburn,B-PER I-PER\n"
    for content, name in (
        (CONLL * 3, "rows.conll"),
        (CONLL.replace(" ", "\t") * 3, "rows.txt"),
        (listed * 3, "rows.jsonl"),
        (told + told.partition("\n")[2] * 2, "rows.csv"),
    ):
        task = load_task(table("token-classification", content, name, separator=" "))
        assert task.label_names == ["O", "B-ORG", "B-PER", "I-PER"]
        rows = [row for split in task.splits.values() for row in split]
        named = [{**row, "label": [task.label_names[i] for i in row["label"]]} for row in rows]
        assert sorted(named, key=str) == sorted(expected * 3, key=str)
        assert task.metrics == ("f1", "precision", "recall", "accuracy")


def test_tags_that_name_no_entities_are_judged_one_by_one(table):
    rows = [{"tokens": ["EU", "rejects"], "tags": ["NOUN", "VERB"]}] * 6
    assert load_task(table("token-classification", rows)).metrics == ("accuracy",)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "rows.jsonl", "row 1: 2 words, but 1 tags. Give each word one tag."),
        ([{"tokens": [], "tags": []}], "rows.jsonl", "row 1: 0 words, but 0 tags."),
        ([{"tokens": "a b", "tags": ["O", "O"]}], "rows.jsonl", "column 'tokens': 'a b' is no list of texts. Write a"),
        (
            [{"tokens": ["a", ""], "tags": ["O", "O"]}],
            "rows.jsonl",
            "row 1, column 'tokens': item 2 of its list is empty",
        ),
        (CONLL + "alone\n", "rows.conll", "line 9: 'alone' is no word with a tag; part them by a space or a tab."),
    ],
)
def test_words_without_their_tags_are_named(table, content, name, words):
    assert words in message_of(table("token-classification", content, name))


CONTEXT = "The keeper walked. The keeper slept."
ASKED = {"question": "Who?", "context": CONTEXT}
ANSWERS = {"text": ["keeper"], "answer_start": [4]}


def squad(*answers) -> str:
    questions = [{"question": "Who?", "id": "1", "answers": given} for given in answers]
    return json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]}, indent=1)


def test_answers_stand_as_squad_has_them_as_the_hub_has_them_or_alone(table):
    one = [{"text": " keeper", "answer_start": 3}]  # the blank is no part of it
    told = "question,context,answers\n" + f'Who?,"{CONTEXT}",walked\nWho?,"{CONTEXT}",\n' * 2
    kind = "question-answering"
    assert [row["label"] for row in all_rows(table(kind, squad(one, one, one), "rows.json"))] == [ANSWERS] * 3
    assert [row["label"] for row in all_rows(table(kind, [{**ASKED, "answers": ANSWERS}] * 3))] == [ANSWERS] * 3
    found = [row["label"] for row in all_rows(table(kind, told, "rows.csv"))]
    none, walked = {"text": [], "answer_start": []}, {"text": ["walked"], "answer_start": [11]}
    assert sorted(found, key=str) == sorted([walked, none] * 2, key=str)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            {"text": ["keeper"], "answer_start": [5]},
            "the answer 'keeper' does not stand at character 5 of its context (2 t",
        ),
        (
            {"text": ["painter"], "answer_start": [4]},
            "'painter' does not stand at character 4 of its context (0 times in",
        ),
        ({"text": ["keeper"], "answer_start": [-13]}, "'keeper' does not stand at character -13 of its context"),
        (
            "keeper",
            "row 1: the answer 'keeper' does not stand exactly once in its context (2 times in all). Correct the",
        ),
        (
            {"text": ["keeper"], "answer_start": []},
            "is no answer. Write {text: [...], answer_start: [...]}, or the text",
        ),
        ([7], "'[7]' is no answer."),
    ],
)
def test_an_answer_that_is_not_in_its_context_is_named(table, answers, words):
    assert words in message_of(table("question-answering", [{**ASKED, "answers": answers}]))


def test_a_file_that_begins_as_squad_and_goes_on_otherwise_is_named(table):
    content = json.dumps({"data": [{"paragraphs": [{"text": CONTEXT}]}]})
    message = message_of(table("question-answering", content, "rows.json"))
    assert message.endswith("rows.json has `data`, but not as SQuAD has it: 'qas'.")


@pytest.mark.parametrize("label", [1, "1", "B", "it slept"])
def test_the_right_choice_is_a_number_a_letter_or_its_text(table, label):
    rows = [{"text": f"{i}", "choices": ["it walked", "it slept"], "label": label} for i in range(6)]
    told = "text,one,two,label\n" + f"a,it walked,it slept,{label}\n" * 6
    expected = {"pair": ["it walked", "it slept"], "label": 1}
    for data in (
        table("multiple-choice", rows),
        table("multiple-choice", told, "rows.csv", choice_columns=["one", "two"]),
    ):
        assert all({**row, **expected} == row for row in all_rows(data))


@pytest.mark.parametrize(
    ("choices", "label"), [(["a"], 0), (["a", "b"], 2), (["a", "b"], "C"), (["a", "b"], "both"), (["a", "b"], "c")]
)
def test_a_choice_that_is_none_is_named(table, choices, label):
    message = message_of(table("multiple-choice", [{"text": "x", "choices": choices, "label": label}]))
    assert (
        f"row 1: {str(label)!r} is none of its {len(choices)} choices. Give the right one's text, its number" in message
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "hub"}, "task: hub needs the data set's name: repository."),
        (
            {"task": "files", "train_file": "x", "repository": "a/b"},
            "repository would have no effect with task: files.",
        ),
        ({"task": "genre", "kind": "regression"}, "kind would have no effect with task: genre. Leave it out."),
        (
            {"task": "hub", "repository": "a/b", "choice_columns": ["a", "b"]},
            "choice_columns, two or more, belong to kind",
        ),
    ],
)
def test_keys_without_effect_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TaskData(**fields)


def test_metrics_of_another_kind_are_refused(table):
    message = message_of(table("multi-label", [], metrics=["accuracy", "macro_f1"]))
    assert message == "metrics: accuracy is none of micro_f1, macro_f1, subset_accuracy (kind: multi-label)."


PAIRS = [{"anchor": f"a {i}", "positive": f"b {i}", "negative": f"c {i}"} for i in range(20)]
SCORED = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": round(1 - i / 10, 1)} for i in range(20)]


@pytest.fixture
def written(tmp_path):
    """Writes rows as a file of the ending's type: its path."""

    def write(rows, ending=".jsonl") -> str:
        file = tmp_path / f"rows{ending}"
        frame = Dataset.from_list(rows)
        {".jsonl": frame.to_json, ".csv": frame.to_csv, ".parquet": frame.to_parquet}[ending](file)
        return str(file)

    return write


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_pairs_with_and_without_negatives_and_with_scores(written, ending):
    task = load_task(files(written(PAIRS, ending), kind="pairs"))
    assert (task.kind, task.metrics) == ("pairs", ("accuracy@1", "mrr@10", "ndcg@10", "triplet_accuracy"))
    assert task.train.column_names == ["text", "pair", "negative"]
    assert [row for split in task.splits.values() for row in split if row["text"] == "a 3"] == [
        {"text": "a 3", "pair": "b 3", "negative": "c 3"}
    ]
    two = [{"anchor": row["anchor"], "positive": row["positive"]} for row in PAIRS]
    task = load_task(files(written(two, ending), kind="pairs", metrics=["map@100"]))
    assert (task.train.column_names, task.metrics) == (["text", "pair"], ("map@100",))
    task = load_task(files(written(SCORED, ending), kind="similarity"))
    assert (task.train.column_names, task.metrics) == (["text", "pair", "label"], ("spearman", "pearson"))
    found = {row["text"]: row["label"] for split in task.splits.values() for row in split}
    assert found == {row["sentence1"]: pytest.approx(row["score"]) for row in SCORED}


def test_columns_of_other_names(written):
    rows = [{"q": row["anchor"], "good": row["positive"], "bad": row["negative"]} for row in PAIRS]
    named = {"text_column": "q", "pair_column": "good", "negative_column": "bad"}
    assert load_task(files(written(rows), kind="pairs", **named)).train.column_names == ["text", "pair", "negative"]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("pairs", {"positive": ""}, r"row 3: no positive\. Complete or remove the row\."),
        ("pairs", {"anchor": None, "negative": None}, r"row 3: no anchor and no negative\."),
        ("pairs", {"positive": 7}, r"row 3, column 'positive': 7 \(int\) is no text\."),
        ("similarity", {"sentence2": None}, r"row 3: no sentence2\. Complete"),
        ("similarity", {"score": None}, r"row 3: no score\. Complete"),
        ("similarity", {"score": "high"}, r"row 3, column 'score': kind: similarity, but 'high' is no number\."),
        (
            "similarity",
            {"score": 4.5},
            r"row 3, column 'score': the score 4\.5 is none from -1 to 1\. Divide all scores",
        ),
    ],
)
def test_bad_cells_of_pairs_are_one_line_with_their_row(tmp_path, kind, change, words):
    rows = [dict(row) for row in (PAIRS if kind == "pairs" else SCORED)]
    rows[2] |= change
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {words}") as error:
        load_task(files(str(tmp_path / "rows.jsonl"), kind=kind))
    assert "\n" not in str(error.value)


def test_missing_columns_of_pairs_are_named_with_what_to_set(written):
    with pytest.raises(
        ValueError, match=r"no column 'anchor'; its columns are sentence1, .* Set text_column, pair_column"
    ):
        load_task(files(written(SCORED), kind="pairs"))
    with pytest.raises(ValueError, match=r"no column 'score'; its columns are .* Set text_column, .*label_column"):
        load_task(files(written([{"sentence1": "a", "sentence2": "b"}]), kind="similarity"))
    two = [{"anchor": row["anchor"], "positive": row["positive"]} for row in PAIRS]
    with pytest.raises(ValueError, match="triplet_accuracy needs a negative_column"):
        load_task(files(written(two), kind="pairs", metrics=["triplet_accuracy"]))
    for more in ({"kind": "pairs", "label_column": "score"}, {"kind": "similarity", "negative_column": "n"}):
        with pytest.raises(ValueError, match=r"kind: pairs has no labels|negative_column belongs to kind: pairs"):
            files("rows.jsonl", **more)
