"""The data sets that the recipes name, read by the real `datasets` client from tests/hub_server.py on loopback.

The repositories stand there under their real names with the layout, columns and labels they have on the Hub, a few
rows each; everything runs in one process of its own, since `datasets` reads its environment at import.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from hub_server import Hub, run_python


CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
ROWS = {"train": 40, "validation": 10, "test": 10, "unsupervised": 5}
NAMES = {
    "stanfordnlp/imdb": ["neg", "pos"],
    "sst2": ["negative", "positive"],
    "qnli": ["entailment", "not_entailment"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
}
TEXTS = {
    "sst2": ["sentence"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
}

REVIEWS = {"configuration": "films", "train_split": "fit", "text_column": "body", "label_column": "stars"}

# Argv: the folder with jobs.json; writes report.json.
READ = """
import json, sys
from pathlib import Path

from linformer_hf.data.corpus import prepare
from linformer_hf.data.documents import PretrainingData, Source
from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData
from linformer_hf.embedding.inputs import Inputs
from linformer_hf.training.pretrain import read_recipe

folder = Path(sys.argv[1])
jobs = json.loads((folder / "jobs.json").read_text())
report = {}
for title, (recipe, overrides) in jobs["pretrain"].items():
    data = read_recipe(recipe, overrides).build("data")
    corpus = prepare(data, 32)
    rows = list(corpus.train)
    text = " ".join(corpus.tokenizer.decode(row["input_ids"]) for row in [*rows, *corpus.validation])
    report[title] = {"rows": len(rows), "validation": len(corpus.validation), "text": text, "counts": corpus.counts}
for name, options in jobs["tasks"].items():
    task = load_task(TaskData(options.pop("task"), **options))
    splits = {split: list(getattr(task, split)) for split in ("train", "validation", "test")}
    report[name] = {"splits": splits, "labels": task.label_names, "name": task.name, "metrics": task.metrics}
    report[name]["mismatched"] = list(task.more_tests.get("mismatched", []))
try:
    prepare(PretrainingData([Source("hub", name="acme/none")]), 32)
except ConnectionError as error:
    report["missing"] = str(error)
for name, options in jobs["refused"].items():
    try:
        load_task(TaskData("hub", repository="acme/reviews", **options))
    except ValueError as error:
        report[name] = str(error)
report["embed"] = [document.name + " " + document.text for document in Inputs("hub:stanfordnlp/imdb")]
(folder / "report.json").write_text(json.dumps(report, default=str))
"""


def parquet(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=16)
    return buffer.getvalue()


def card(configs: dict[str, dict[str, list]], label_names: dict[str, list[str]], default: str | None = None) -> bytes:
    """README.md of a data set: configurations -> split -> files, and features where there is a label."""
    entries, infos = [], []
    for name, splits in configs.items():
        files = [{"split": split, "path": path} for split, path in splits.items()]
        entries.append({"config_name": name, "data_files": files} | ({"default": True} if name == default else {}))
        if name in label_names:
            texts = [{"name": text, "dtype": "string"} for text in TEXTS.get(name, ["text"])]
            classes = dict(enumerate(label_names[name]))
            label = {"name": "label", "dtype": {"class_label": {"names": {str(k): v for k, v in classes.items()}}}}
            index = [{"name": "idx", "dtype": "int32"}] if name in TEXTS else []
            infos.append({"config_name": name, "features": [*texts, label, *index]})
    content = {"configs": entries} | ({"dataset_info": infos} if infos else {})
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n".encode()


def labelled(name: str, split: str) -> bytes:
    """`train sentence 3`, labelled by whether its number is odd; GLUE's test labels are hidden (-1)."""
    count = ROWS[split.partition("_")[0]]
    columns = {text: [f"{split} {text} {i}" for i in range(count)] for text in TEXTS.get(name, ["text"])}
    hidden = split == "unsupervised" or (split == "test" and name in TEXTS)
    columns["label"] = pa.array([-1 if hidden else i % len(NAMES.get(name, "ab")) for i in range(count)], pa.int64())
    if name in TEXTS:
        columns["idx"] = pa.array(range(count), pa.int32())
    return parquet(columns)


def fill(hub: Hub, tokenizer: dict[str, bytes]) -> None:
    own = {"mnli": ("train", "validation_matched", "validation_mismatched")}
    splits = ("train", "validation", "test")
    glue = {
        name: {split: f"{name}/{split}-00000-of-00001.parquet" for split in own.get(name, splits)} for name in TEXTS
    }
    files = {path: labelled(name, split) for name, paths in glue.items() for split, path in paths.items()}
    hub.create("nyu-mll/glue", {"README.md": card(glue, NAMES), **files}, "datasets")

    imdb = {split: f"plain_text/{split}-00000-of-00001.parquet" for split in ("train", "test", "unsupervised")}
    readme = card({"plain_text": imdb}, {"plain_text": NAMES["stanfordnlp/imdb"]}, "plain_text")
    files = {path: labelled("imdb", split) for split, path in imdb.items()}
    hub.create("stanfordnlp/imdb", {"README.md": readme, **files}, "datasets")

    columns = {"body": [f"body {i}" for i in range(30)], "stars": [i % 3 for i in range(30)]}
    columns |= {"parts": [[f"part {i}", "more"] for i in range(30)], "topics": [[i % 3] * (i % 2) for i in range(30)]}
    reviews = {name: {"fit": f"{name}/fit.parquet", "held": f"{name}/held.parquet"} for name in ("books", "films")}
    files = {path: parquet(columns) for paths in reviews.values() for path in paths.values()}
    hub.create("acme/reviews", {"README.md": card(reviews, {}), **files}, "datasets")

    articles = {name: {"train": f"{name}/train-*"} for name in ("20231101.de", "20231101.en")}
    files = {"README.md": card(articles, {})}
    for name in articles:
        for shard in range(2):
            ids = [f"{shard}{i}" for i in range(20)]
            columns = {"id": ids, "url": ids, "title": ids}
            columns["text"] = [f"the {name[-2:]} river {i}. a stone." for i in ids]
            files[f"{name}/train-0000{shard}-of-00002.parquet"] = parquet(columns)
    hub.create("wikimedia/wikipedia", files, "datasets")

    sentences = {f"data/train-0000{i}-of-00002.parquet": {"text": ["a garden gate ."] * 1500} for i in range(2)}
    readme = card({"default": {"train": "data/train-*"}}, {})
    files = {"README.md": readme, **{path: parquet(columns) for path, columns in sentences.items()}}
    hub.create("rojagtap/bookcorpus", files, "datasets")
    hub.create("FacebookAI/roberta-base", tokenizer)


@pytest.fixture(scope="module")
def report(tokenizers, tmp_path_factory) -> dict:
    """What the process read; it costs seconds to start, so there is one for all tests."""
    place = tmp_path_factory.mktemp("hub-data")
    tokenizers["byte_level_bpe"].save_pretrained(place / "tokenizer")
    cache = f"data.cache_dir={place / 'corpora'}"
    fewer = [cache, "data.num_proc=1", "data.validation_fraction=0.2"]
    jobs = {
        "pretrain": {
            "base": [str(CONFIGS / "base-512-k128.yaml"), fewer],
            "streaming": [str(CONFIGS / "streaming.yaml"), ["data.validation_documents=4"]],
        },
        "tasks": {name: {"task": name} for name in ("imdb", *TEXTS)},
        "refused": {
            "no configuration": {"train_split": "fit"},
            "no split": {"configuration": "books"},
            "no column": {"configuration": "books", "train_split": "fit"},
            "a list": {**REVIEWS, "text_column": "parts"},
            "no list": {**REVIEWS, "kind": "multi-label"},
            "no name": {**REVIEWS, "label_names": ["bad", "good"]},
        },
    }
    named = {"repository": "acme/reviews", "label_names": ["bad", "fair", "good"], **REVIEWS}
    jobs["tasks"]["reviews"] = {"task": "hub", "metrics": ["f1"], "test_split": "held", **named}
    jobs["tasks"]["topics"] = {"task": "hub", **named, "kind": "multi-label", "label_column": "topics"}
    with Hub() as hub:
        fill(hub, {path.name: path.read_bytes() for path in (place / "tokenizer").iterdir()})
        glue = hub.repositories["datasets", "nyu-mll/glue"]
        old = glue.branches["main"]
        later = {"sentence": [f"later {i}" for i in range(40)], "label": [i % 2 for i in range(40)], "idx": [0] * 40}
        changed = hub.keep({"sst2/train-00000-of-00001.parquet": parquet(later)})
        glue.commit("main", glue.commits[old] | changed)
        jobs["tasks"]["sst2 before"] = {"task": "sst2", "revision": old}
        (place / "jobs.json").write_text(json.dumps(jobs))
        ran = run_python(READ, str(place), hub=hub, home=place / "home", package=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert not [request for request in hub.requests if request.token]
    return json.loads((place / "report.json").read_text())


def test_the_base_recipe_reads_bookcorpus_and_wikipedia(report):
    found = report["base"]
    assert found["text"].count("garden gate") == 3000  # each row of each shard, once
    assert found["text"].count("the en river") == 40
    assert " de river" not in found["text"]
    assert found["rows"] > 0
    assert found["validation"] > 0


def test_the_streaming_recipe_reads_wikipedia_without_preparing_it(report):
    found = report["streaming"]
    assert found["counts"]["streaming"] is True
    assert found["text"].count("the en river") == 40
    assert " de river" not in found["text"]


def test_embed_reads_a_data_set(report):
    assert report["embed"] == [f"hub:stanfordnlp/imdb:{i + 1} train text {i}" for i in range(40)]


@pytest.mark.parametrize(("name", "columns"), [("imdb", ["text"]), *TEXTS.items()])
def test_a_task_has_its_own_rows_labels_and_test_split(report, name, columns):
    splits = report[name]["splits"]
    test = {"imdb": "test", "mnli": "validation_matched"}.get(name, "validation")
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [38, 2, 10]
    assert [row["text"] for row in splits["test"]] == [f"{test} {columns[0]} {i}" for i in range(10)]
    assert [row["label"] for row in splits["test"]] == [i % len(report[name]["labels"]) for i in range(10)]
    assert [row.get("pair") for row in splits["test"]] == [
        f"{test} {columns[1]} {i}" if len(columns) == 2 else None for i in range(10)
    ]


def test_mnli_is_tested_on_both_validations(report):
    assert [row["text"] for row in report["mnli"]["mismatched"]] == [
        f"validation_mismatched premise {i}" for i in range(10)
    ]


def test_any_data_set_is_read_by_its_own_names(report):
    found = report["reviews"]
    assert (found["name"], found["labels"]) == ("acme/reviews films", ["bad", "fair", "good"])
    assert found["metrics"] == ["f1"]
    assert [row["text"] for row in found["splits"]["test"]] == [f"body {i}" for i in range(30)]  # of the split `held`
    assert len(found["splits"]["train"]) + len(found["splits"]["validation"]) == 30
    for rows in found["splits"].values():
        assert all(row["label"] == int(row["text"].split()[1]) % 3 for row in rows)
    for rows in report["topics"]["splits"].values():
        for row in rows:
            i = int(row["text"].split()[1])
            assert row["label"] == [i % 3] * (i % 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "no configuration",
            "the data set 'acme/reviews' has no configuration None, split 'fit': Config name is missing",
        ),
        ("no split", "has no configuration 'books', split 'train': Unknown split \"train\". Should be one of ['fit'"),
        (
            "no column",
            "acme/reviews, fit has no column 'text'; its columns are body, stars, parts, topics. Set text_col",
        ),
        ("a list", "acme/reviews, fit, row 1, column 'parts': ['part 0', 'more'] (list) is no text. Set data.kind="),
        ("no list", "acme/reviews, fit, row 1, column 'stars': 0 is no list of texts. Write a list, set"),
        ("no name", "acme/reviews, fit, row 3: the label '2' is none of the 2 classes (bad, good). Correct or"),
    ],
)
def test_what_a_data_set_has_not_is_one_message_that_says_what_it_has(report, name, words):
    assert words in report[name]


def test_a_revision_is_what_stood_there_then(report):
    def texts(name: str) -> set[str]:
        return {row["text"] for split in ("train", "validation") for row in report[name]["splits"][split]}

    assert texts("sst2 before") == {f"train sentence {i}" for i in range(40)}
    assert texts("sst2") == {f"later {i}" for i in range(40)}


def test_a_name_that_is_not_there_is_one_message(report):
    assert report["missing"].startswith("the data set 'acme/none' cannot be loaded from the Hub")
    assert "task: files" in report["missing"]
