"""Every file that is read back is cut, emptied, altered by bits or put in another's place: none is used unnoticed.

Each case runs in a process of its own, forked from one that has imported everything, so that a crash of the interpreter
is seen and counted. A case ends in one of these ways: `error` (one line that names the file's folder, exit status 2),
`made again` (a cache is written anew, or an older checkpoint is taken, and the log says so) or `unaffected` (the answer
is that of the whole files). What comes from elsewhere carries no checksums: there, `unnoticed` is counted, not refused.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

from helpers import MODEL, TRAINING, tiny_data, write_recipe
from torture import record, times
from waiting import HANG


pytestmark = pytest.mark.torture

TESTS = Path(__file__).parent
HARMS = ("cut", "empty", "bits", "swap")
STEPS = 4


# The process that forks, and what its children do


def serve() -> None:
    """For each line on stdin, fork a child that reads what was damaged, and print the child's exit status."""
    import torch

    for module in ("cli", "paper.compare", "hub.push"):  # which children then need not do
        importlib.import_module(f"linformer_hf.{module}")
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            become(task)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(task: dict) -> None:
    signal.alarm(HANG)
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    status = 1
    try:
        answer = READERS[task["kind"]](Path(task["place"]))
        if isinstance(answer, int):  # the exit status of a command that did not come to its end
            status = answer
        else:
            Path(task["answer"]).write_text(json.dumps(answer), encoding="utf-8")
            status = 0
    except (ValueError, OSError) as error:  # as in cli.main
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def digest(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_for_finetuning(place: Path):
    """Hidden states of the model, whose head is new and random, and the tokenizer's answer."""
    import torch

    from linformer_hf.data.tasks import LoadedTask
    from linformer_hf.training.finetune import FinetuneModel, load_model
    from linformer_hf.utils.files import loading

    folder = str(place / "model")
    with loading(folder):
        model, tokenizer = load_model(FinetuneModel(folder), LoadedTask("t", None, None, None, ["a", "b"], ()))
    encoded = tokenizer("the old river walked 4x7.", return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval().base_model(**encoded).last_hidden_state
    return digest(encoded["input_ids"].tolist(), sorted(tokenizer.get_vocab().items()), hidden.tolist())


def dry_push(place: Path):
    from linformer_hf import cli

    return cli.main(["push", str(place / "model"), "jane/model", "--dry-run"]) or "listed"


def prepare_corpus(place: Path):
    import logging

    from linformer_hf.data.corpus import prepare
    from linformer_hf.training.pretrain import read_recipe

    logging.basicConfig(level=logging.WARNING)
    data = read_recipe(str(place.parent / "corpus.yaml"), [f"data.cache_dir={place / 'cache'}"]).build("data")
    corpus = prepare(data, 32)
    rows = [corpus.train["input_ids"], corpus.validation["input_ids"], corpus.token_counts.tolist()]
    counts = {key: value for key, value in corpus.counts.items() if key != "folder"}
    return digest(
        rows, counts, sorted(corpus.tokenizer.get_vocab().items()), corpus.tokenizer("The old Zoë 4x7.")["input_ids"]
    )


def resume(place: Path):
    from safetensors.torch import load_file

    from linformer_hf import cli

    folder = place / "run"
    status = cli.main(["pretrain", str(place.parent / "run.yaml"), f"training.output_dir={folder}", "--resume"])
    weights = load_file(folder / "model.safetensors") if not status else {}
    return status or digest(sorted((name, value.tolist()) for name, value in weights.items()))


def compare_again(place: Path):
    from linformer_hf import cli

    status = cli.main(["compare", str(place.parent / "compare.yaml"), f"compare.output_dir={place / 'table'}"])
    return status or (place / "table" / "table.md").read_text(encoding="utf-8")


def read_bert(place: Path):
    from linformer_hf.conversion.huggingface import read_source
    from linformer_hf.conversion.shorten import exact_twin

    source = read_source(str(place / "bert"))
    twin = exact_twin(source, source.length, "repeat")
    sums = [value.double().sum().item() for value in twin.state_dict().values()]
    return digest(sums, sorted(source.tokenizer.get_vocab().items()))


def read_fairseq(place: Path):
    from linformer_hf.conversion.huggingface import read_source
    from linformer_hf.conversion.shorten import shortened

    source = read_source(str(place / "fairseq" / "model.pt"))
    model = shortened(source, source.length, "repeat", source.projection)
    return digest([value.double().sum().item() for value in model.state_dict().values()])


def read_rows(place: Path):
    from linformer_hf.data.task_sources import load_task
    from linformer_hf.data.tasks import TaskData

    task = load_task(TaskData(task="files", train_file=str(place / "rows" / "rows.parquet"), text_column="text"))
    return digest(task.train["text"], task.train["label"])


READERS = {
    "model": load_for_finetuning,
    "push": dry_push,
    "corpus": prepare_corpus,
    "checkpoint": resume,
    "checkpoints": resume,
    "stage": resume,
    "cell": compare_again,
    "bert": read_bert,
    "fairseq": read_fairseq,
    "parquet": read_rows,
}


# What is damaged


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corruption")


@pytest.fixture(scope="module")
def server():
    program = (
        f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent)]!r}; from test_corruption import serve; serve()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def run(place, texts) -> Path:
    """A pretraining run of a stage and the main training, finished; its recipe is run.yaml, its cache for `corpus`."""
    from linformer_hf import cli
    from linformer_hf.training import pretrain

    often = {"save_steps": 2, "eval_strategy": "no", "max_steps": STEPS}
    recipe = write_recipe(
        place / "run.yaml",
        model=MODEL,
        data=tiny_data(texts, place),
        training={**TRAINING, **often},
        stages=[{"sequence_length": 16, "training": {"max_steps": 2}}],
    )
    report = pretrain.report

    def report_and_end(*arguments) -> None:  # before the stage's folder is removed
        report(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "report", report_and_end)
        assert cli.main(["pretrain", recipe, f"training.output_dir={place / 'whole'}"]) == 130
    return place / "whole"


@pytest.fixture(scope="module")
def whole(request, place, run, texts, tiny_source) -> dict[str, Path]:
    """Kind of case -> a folder that holds what is to be damaged."""
    from linformer_hf import cli

    unfinished = place / "unfinished" / "run"
    shutil.copytree(run, unfinished)
    for name in ("results.json", "README.md", "curve.png"):
        (unfinished / name).unlink()
    single = Path(shutil.copytree(place / "unfinished", place / "single"))
    shutil.rmtree(single / "run" / "checkpoint-2")
    stage = Path(shutil.copytree(place / "unfinished", place / "stage"))
    for path in (stage / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    model = place / "model" / "model"
    shutil.copytree(run, model, ignore=shutil.ignore_patterns("checkpoint-*", "stage-*"))
    return {
        "model": place / "model",
        "push": place / "model",
        "checkpoints": place / "unfinished",
        "checkpoint": single,
        "stage": stage,
        "corpus": corpus_of(place, texts, model),
        "cell": cell_of(place, model, cli),
        "bert": Path(shutil.copytree(tiny_source("BertForMaskedLM"), place / "foreign" / "bert")).parent,
        "fairseq": fairseq_of(place),
        "parquet": parquet_of(place),
    }


def corpus_of(place: Path, texts: Path, model: Path) -> Path:
    write_recipe(place / "corpus.yaml", data={**tiny_data(texts, place), "tokenizer": str(model)})
    # The cache's place is in its recipe, since the tokenizer is: it is made where the cases are.
    (place / "case").mkdir()
    prepare_corpus(place / "case")
    return Path(shutil.move(place / "case", place / "corpus"))


def cell_of(place: Path, model: Path, cli) -> Path:
    rows = [f"{'river' if i % 2 else 'stone'} number {i},{'water' if i % 2 else 'rock'}" for i in range(40)]
    (place / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    training = {**TRAINING, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    data = {"task": "files", "train_file": str(place / "rows.csv")}
    tune = write_recipe(place / "tune.yaml", model={"checkpoint": str(model)}, data=data, training=training)
    section = {"output_dir": "unset", "checkpoints": {"ours": str(model)}, "recipes": {tune: []}, "seeds": [0]}
    write_recipe(place / "compare.yaml", compare=section)
    # Cells are found by their folder, which is in their recipe: it is run where the cases are.
    assert cli.main(["compare", str(place / "compare.yaml"), f"compare.output_dir={place / 'case' / 'table'}"]) == 0
    return Path(shutil.move(place / "case", place / "cell"))


def fairseq_of(place: Path) -> Path:
    import torch

    from encoders import ARGUMENTS, OfficialLinformer

    (place / "official" / "fairseq").mkdir(parents=True)
    content = {"args": ARGUMENTS, "model": OfficialLinformer().state_dict()}
    torch.save(content, place / "official" / "fairseq" / "model.pt")
    return place / "official"


def parquet_of(place: Path) -> Path:
    from datasets import Dataset

    rows = Dataset.from_dict(
        {"text": [f"row {i} of the table" for i in range(60)], "label": [i % 3 for i in range(60)]}
    )
    (place / "table" / "rows").mkdir(parents=True)
    rows.to_parquet(place / "table" / "rows" / "rows.parquet")
    return place / "table"


# Cases: kind -> what may be damaged in it (short and long number, the ways it may end)
def files_of(kind: str, folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind in ("checkpoint", "checkpoints"):
        last = {path.parent.name for path in found if path.parent.name.startswith("checkpoint-")}
        newest = max(last, key=lambda name: int(name.rpartition("-")[2]))
        return [p for p in found if (p.parent.name == newest and "stage-1" not in p.parts) or p.name == "recipe.json"]
    if kind == "stage":
        return [path for path in found if path.parent.name == "stage-1"]
    if kind == "cell":
        return [path for path in found if path.name == "results.json" and path.parent.name.startswith("seed-")]
    return found


def pairs_of(kind: str, folder: Path, draw: random.Random) -> list[tuple[Path, str]]:
    """Every file with every harm, mixed; first the one that nothing but a checksum notices: bits of the largest."""
    files = [path for path in files_of(kind, folder) if path.stat().st_size]
    pairs = [(path, how) for path in files for how in HARMS]
    draw.shuffle(pairs)
    first = max(files, key=lambda path: (path.suffix != ".png", path.stat().st_size)), "bits"
    return [first, *(pair for pair in pairs if pair != first)]


def harm(path: Path, how: str, draw: random.Random, others: list[Path]) -> None:
    content = path.read_bytes()
    if how == "cut":
        content = content[: draw.randrange(1, max(2, len(content)))]
    elif how == "empty":
        content = b""
    elif how == "bits":
        changed = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        content = bytes(changed)
    else:
        content = draw.choice([other for other in others if other.read_bytes() != content]).read_bytes()
    path.write_bytes(content)


OURS = {"error", "made again", "unaffected"}
CASES = {
    # kind: (cases in the short form, in the long form, how they may end)
    "model": (12, 500, OURS),
    "push": (16, 400, OURS),
    "corpus": (24, 450, {"made again", "unaffected"}),
    "checkpoint": (10, 250, OURS),
    "checkpoints": (2, 100, OURS),
    "stage": (4, 100, OURS),
    "cell": (6, 150, OURS),
    "bert": (10, 250, {*OURS, "unnoticed"}),
    "fairseq": (6, 150, {*OURS, "unnoticed"}),
    "parquet": (4, 100, {*OURS, "unnoticed"}),
}
MADE_AGAIN = ("it is made again", "Skipping ")


def answer_of(server, kind: str, place: Path) -> tuple[int, str | None, str]:
    """Exit status, answer and log of one child."""
    answer, log = place / "answer.json", place / "log"
    answer.unlink(missing_ok=True)
    task = {"kind": kind, "place": str(place / "case"), "answer": str(answer), "log": str(log)}
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    found = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else None
    return status, found, log.read_text(encoding="utf-8", errors="replace")


def outcome(status: int, answer: str | None, expected: str, log: str, path: Path) -> str:
    if status < 0:
        return f"crash by {signal.Signals(-status).name}"
    if status == 2:
        line = log.strip().rpartition("\n")[2]
        named = any(part in line for part in (path.name, path.parent.name, path.parent.parent.name))
        return "error" if line.startswith("error: ") and named and len(line) > 60 else "an error that names nothing"
    if status:
        return "a traceback"
    if answer != expected:
        return "unnoticed"
    return "made again" if any(words in log for words in MADE_AGAIN) else "unaffected"


@pytest.mark.parametrize("kind", CASES)
def test_damage_is_an_error_or_put_right(kind, whole, place, server):
    short, long, allowed = CASES[kind]
    draw, ended, seconds = random.Random(f"damage {kind}"), Counter(), time.monotonic()
    case, wrong = place / "case", []
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(whole[kind], case)
    pairs = pairs_of(kind, case, draw)
    status, expected, log = answer_of(server, kind, place)
    assert status == 0, log
    for number in range(times(short, long)):
        shutil.rmtree(case)
        shutil.copytree(whole[kind], case)
        path, how = pairs[number % len(pairs)]
        others = [other for folder in (case, whole["model"]) for other in folder.rglob("*") if other.is_file()]
        harm(path, how, draw, others)
        status, answer, log = answer_of(server, kind, place)
        end = outcome(status, answer, expected, log, path)
        ended[end, path.name] += 1
        if end not in allowed:
            wrong.append((number, how, path.relative_to(case).as_posix(), end, log[-1500:]))
    by_end = Counter()
    for (end, _), count in ended.items():
        by_end[end] += count
    by_file = {}
    for (end, name), count in sorted(ended.items()):
        by_file.setdefault(name, {})[end] = count
    record(
        "damaged files are noticed",
        kind=kind,
        cases=sum(by_end.values()),
        ended=dict(by_end),
        files=by_file,
        seconds=round(time.monotonic() - seconds, 1),
    )
    assert not wrong, "\n\n".join(f"{len(wrong)} wrong" if i == 0 else str(w) for i, w in enumerate([None, *wrong[:5]]))
    assert sum(count for end, count in by_end.items() if end != "unaffected"), "no case did harm"


def test_a_resumed_run_trains_on_with_its_own_tokenizer(texts, tmp_path, caplog, monkeypatch):
    """The cache is gone, and the tokenizer that is trained again has other ids, as another library's may."""
    from transformers import BertTokenizer

    from helpers import assert_same_run
    from linformer_hf import cli
    from linformer_hf.data import corpus

    training = {**TRAINING, "max_steps": STEPS, "save_steps": 2, "eval_strategy": "no"}
    data = tiny_data(texts, tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", model=MODEL, data=data, training=training)
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert cli.main(["pretrain", recipe, f"training.output_dir={run}"]) == 0
    shutil.copytree(run, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    shutil.rmtree(data["cache_dir"])
    whole = corpus.train_tokenizer

    def train_otherwise(*given):
        vocabulary = whole(*given).get_vocab()
        vocabulary["river"], vocabulary["stone"] = vocabulary["stone"], vocabulary["river"]
        return BertTokenizer(vocab=vocabulary)

    monkeypatch.setattr(corpus, "train_tokenizer", train_otherwise)
    assert cli.main(["pretrain", recipe, f"training.output_dir={copy}", "--resume"]) == 0
    assert "The tokenizer is not that of the interrupted run" in caplog.text
    assert_same_run(copy, run)
    assert (copy / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
