"""What SECURITY.md promises, each promise by doing the harm: hostile files, hostile names, a network, a secret."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers import MODEL, TRAINING, error_line, tiny_data, write_recipe
from linformer_hf import cli
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.data.corpus import prepare
from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData
from linformer_hf.hub.push import PushError, read_folder
from linformer_hf.paper.compare import Comparison
from linformer_hf.paper.grid import check_names, folder_name
from linformer_hf.paper.sweep import Sweep
from linformer_hf.training.checkpoints import last_whole_checkpoint
from linformer_hf.training.pretrain import read_recipe
from linformer_hf.utils.checksums import CHECKSUMS_FILE, damage, write
from linformer_hf.utils.files import read_json
from linformer_hf.utils.recipe import RecipeError
from torture import LONG, record
from waiting import HANG


pytestmark = pytest.mark.torture

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "S3cr3t" * 6  # of no account


class Payload:
    """Pickled as a call that makes a file."""

    def __init__(self, mark: Path, call: str = "exec"):
        code = f"open({str(mark)!r}, 'w').close()"
        self.call = {
            "exec": (exec, (code,)),
            "system": (os.system, (f"touch {mark}",)),
            "import": (__import__("runpy")._run_code, (code, {})),
        }[call]

    def __reduce__(self):
        return self.call


CALLS = ("exec", "system", "import")


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that a payload would make; it must not be there at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the payload ran"


def test_the_payloads_work(tmp_path):
    """Else the tests below show nothing."""
    for call in CALLS:
        path = tmp_path / call
        pickle.loads(pickle.dumps(Payload(path, call)))
        assert path.exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("security")


@pytest.fixture(scope="module")
def recipe(texts, place) -> str:
    training = {**TRAINING, "max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    return write_recipe(place / "run.yaml", model=MODEL, data=tiny_data(texts, place), training=training)


@pytest.fixture(scope="module")
def finished(recipe, place) -> Path:
    assert cli.main(["pretrain", recipe, f"training.output_dir={place / 'run'}"]) == 0
    return place / "run"


@pytest.fixture
def model(finished, tmp_path) -> Path:
    """A copy of the finished model's folder, as somebody else may have made it: without checksums."""
    names = shutil.ignore_patterns("checkpoint-*", CHECKSUMS_FILE)
    return Path(shutil.copytree(finished, tmp_path / "model", ignore=names))


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """A run with one checkpoint to go on from."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "checkpoint-2")
    return folder


@pytest.fixture(scope="module")
def tuning(place) -> str:
    """A fine-tuning recipe without a checkpoint's name."""
    rows = [f"{'river' if i % 2 else 'stone'} number {i},{'water' if i % 2 else 'rock'}" for i in range(40)]
    (place / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    training = {**TRAINING, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    data = {"task": "files", "train_file": str(place / "rows.csv")}
    return write_recipe(place / "tune.yaml", model={"checkpoint": "unset"}, data=data, training=training)


# Pickle


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", ["whole", "sharded", "old file"])
@pytest.mark.parametrize("verb", ["pretrain", "finetune", "distill", "export", "convert"])
def test_pickled_weights_are_refused(
    verb, form, call, model, recipe, tuning, texts, mark, tmp_path, capsys, tiny_source
):
    folder = Path(shutil.copytree(tiny_source(), tmp_path / "bert")) if verb == "convert" else model
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "pytorch_model.bin"
    if form == "sharded":
        name = "pytorch_model-00001-of-00001.bin"
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    hostile = {**weights, "payload": Payload(mark, call)}
    torch.save(hostile, folder / name, _use_new_zipfile_serialization=form != "old file")
    out = f"training.output_dir={tmp_path / 'out'}"
    commands = {
        "pretrain": ["pretrain", recipe, out, f"model.checkpoint={folder}"],
        "finetune": ["finetune", tuning, out, f"model.checkpoint={folder}"],
        "distill": ["distill", distilling(tmp_path, folder, tiny_source(), texts)],
        "export": ["export", str(folder)],
        "convert": ["convert", str(folder), str(tmp_path / "out")],
    }
    line = error_line(capsys, *commands[verb])
    assert str(folder) in line
    assert "safetensors" in line
    assert not (tmp_path / "out").exists()


def distilling(tmp_path: Path, student: Path, teacher: Path, texts: Path) -> str:
    sections = {"student": str(student), "teacher": str(teacher)}
    data = {"sources": [{"kind": "files", "path": str(texts)}], "cache_dir": str(tmp_path / "cache")}
    training = {**TRAINING, "max_steps": 1, "output_dir": str(tmp_path / "out")}
    return write_recipe(tmp_path / "d.yaml", model=sections, data=data, training=training)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin", "old optimizer.pt"]
)
def test_resuming_from_a_hostile_checkpoint_is_refused(name, sealed, call, interrupted, recipe, mark, capsys):
    """Somebody else's checkpoint, with checksums that fit (`sealed`) or with none."""
    checkpoint = interrupted / "checkpoint-4"
    file = checkpoint / name.removeprefix("old ")
    torch.save({"state": {}, "x": Payload(mark, call)}, file, _use_new_zipfile_serialization="old" not in name)
    (checkpoint / CHECKSUMS_FILE).unlink()
    if sealed:
        write(checkpoint)
    assert last_whole_checkpoint(interrupted) is None
    line = error_line(capsys, "pretrain", recipe, f"training.output_dir={interrupted}", "--resume")
    assert f"{interrupted} has no whole checkpoint to resume from: checkpoint-4: " in line
    assert file.name in line or "old" in name
    assert "weights_only" not in line


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_trainer_itself_executes_nothing_either(name, interrupted, recipe, mark, capsys, monkeypatch):
    """The second line: were our look at the file to miss something, torch.load(weights_only=True) refuses it."""
    monkeypatch.setattr("linformer_hf.training.checkpoints._foreign_code", lambda checkpoint: None)
    torch.save({"x": Payload(mark)}, interrupted / "checkpoint-4" / name)
    write(interrupted / "checkpoint-4")
    line = error_line(capsys, "pretrain", recipe, f"training.output_dir={interrupted}", "--resume")
    assert f"{interrupted / 'checkpoint-4'} cannot be resumed from (UnpicklingError" in line
    assert "weights_only" not in line


@pytest.mark.parametrize("call", CALLS)
def test_training_arguments_are_never_loaded(call, interrupted, model, recipe, tuning, mark, tmp_path):
    for folder in (interrupted, interrupted / "checkpoint-4", model):
        torch.save(Payload(mark, call), folder / "training_args.bin")
    assert cli.main(["pretrain", recipe, f"training.output_dir={interrupted}", "--resume"]) == 0
    out = f"training.output_dir={tmp_path / 'out'}"
    assert cli.main(["finetune", tuning, out, f"model.checkpoint={model}"]) == 0
    assert "training_args.bin" not in read_folder(model, "jane/model")


@pytest.mark.parametrize("call", CALLS)
def test_a_fairseq_file_with_a_payload_is_refused(call, mark, tmp_path, capsys):
    torch.save({"args": {"x": Payload(mark, call)}, "model": {}}, tmp_path / "model.pt")
    line = error_line(capsys, "convert", str(tmp_path / "model.pt"), str(tmp_path / "out"))
    assert "Nothing in it was executed" in line


def test_an_array_of_objects_in_the_cache_is_not_unpickled(texts, place, mark, tmp_path, recipe):
    """token_counts.npy with checksums that fit: what somebody who writes the cache could leave there."""
    import numpy as np

    data = read_recipe(recipe, [f"data.cache_dir={tmp_path / 'cache'}"]).build("data")
    rows = prepare(data, 32).folder / "rows-full_sentences-32"
    np.save(rows / "token_counts.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    write(rows)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        prepare(data, 32)


# Code that comes along


EVIL = """import pathlib; pathlib.Path({mark!r}).touch()
class Evil:
    from_pretrained = classmethod(lambda *a, **k: 0)
"""


@pytest.mark.parametrize(
    ("verb", "what"),  # export reads no tokenizer
    [(v, w) for v in ("pretrain", "finetune", "convert", "corpus") for w in ("config", "tokenizer")]
    + [("export", "config")],
)
def test_code_in_a_folder_is_not_run(verb, what, model, recipe, tuning, mark, tmp_path, capsys, tiny_source):
    folder = Path(shutil.copytree(tiny_source(), tmp_path / "bert")) if verb == "convert" else model
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)), encoding="utf-8")
    for path in folder.glob("*_linformer.py"):
        path.write_text(EVIL.format(mark=str(mark)), encoding="utf-8")
    file = folder / ("config.json" if what == "config" else "tokenizer_config.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    content["auto_map"] |= {f"AutoModelFor{kind}": "evil.Evil" for kind in ("MaskedLM", "SequenceClassification")}
    if what == "tokenizer":
        content["tokenizer_class"] = "Evil"
    else:
        content["model_type"] = "evil"
    file.write_text(json.dumps(content), encoding="utf-8")
    out = f"training.output_dir={tmp_path / 'out'}"
    command = {
        "pretrain": ["pretrain", recipe, out, f"model.checkpoint={folder}"],
        "finetune": ["finetune", tuning, out, f"model.checkpoint={folder}"],
        "convert": ["convert", str(folder), str(tmp_path / "out")],
        "export": ["export", str(folder), "--output", str(tmp_path / "model.onnx")],
        "corpus": ["pretrain", recipe, out, f"data.tokenizer={folder}", f"data.cache_dir={tmp_path / 'cache'}"],
    }[verb]
    status = cli.main(command)  # it is refused, or what transformers and this package have is taken instead
    assert status in (0, 2)
    if status:
        assert str(folder) in capsys.readouterr().err.strip().rpartition("\n")[2]


def test_our_code_trusts_nobody_on_its_own():
    """`trust_remote_code=True` stands nowhere in the package but in texts: only a recipe can say it."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) in ("False", "model.trust_remote_code"), path


EXAMPLES = [
    path for folder in ("", "docs/**/", "model_cards/**/", "reports/**/") for path in ROOT.glob(f"{folder}*.md")
]
PINNED = re.compile(r"revision\s*=")


def examples(text: str) -> list[str]:
    """Calls with trust_remote_code=True in a text, each with what stands between its brackets."""
    return re.findall(r"\.from_pretrained\(([^()]*trust_remote_code=True[^()]*)\)", text)


def test_examples_that_trust_code_name_a_revision():
    from linformer_hf.hub.card import CARD_TEMPLATE

    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES]
    found = [call for text in [*texts, CARD_TEMPLATE] for call in examples(text)]
    assert found, "there is no example, so the test shows nothing"
    for call in found:
        local = re.match(r"""\s*["'](runs/)?[\w.-]+["']""", call)  # a folder here, which has no revisions
        assert PINNED.search(call) or local, call
    assert not PINNED.search(examples('AutoModel.from_pretrained("jane/model", trust_remote_code=True)')[0])


# YAML


@pytest.mark.parametrize("where", ["file", "override"])
@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system", "!evil"]
)
def test_yaml_cannot_make_objects(tag, where, recipe, mark, tmp_path, capsys):
    value = f"{tag} ['touch {mark}']" if "name" not in tag else tag
    if where == "file":
        (tmp_path / "r.yaml").write_text(f"model:\n  hidden_size: {value}\n", encoding="utf-8")
        line = error_line(capsys, "pretrain", str(tmp_path / "r.yaml"))
    else:
        plain = error_line(capsys, "pretrain", recipe, f"model.hidden_size={value}")
        assert f"must be an integer, got the text {value!r}" in plain
        line = error_line(capsys, "pretrain", recipe, f"training.lr_scheduler_kwargs={{x: {value}}}")
    assert "not valid YAML" in line


def test_a_recipe_that_holds_itself_is_refused(recipe, capsys):
    line = error_line(capsys, "pretrain", recipe, "training.lr_scheduler_kwargs={x: &a [*a]}")
    assert "holds itself" in line


# Paths


NAMES = ["../../evil", "/etc/evil", "..", "a/../../b", "evil\x00", "~/evil", "\\\\host\\share"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_cells_stay_in_their_folder(name, tmp_path, recipe):
    try:
        check_names([name])
    except ValueError:
        return
    place = (tmp_path / folder_name(name)).resolve()
    assert place.parent == tmp_path.resolve()
    sweep = Sweep(str(tmp_path), recipe, {name: []}, seeds=[0])
    assert sweep.cell(name, 0).folder.resolve().is_relative_to(tmp_path.resolve())


def test_names_that_would_be_no_folder_are_refused():
    for name in ("..", ".", "/", "../.."):
        with pytest.raises(ValueError, match="letters and digits"):
            check_names([name])
        with pytest.raises(ValueError, match="letters and digits"):
            Comparison("out", {name: "x"}, {"r.yaml": []})


def test_a_data_set_cannot_name_a_place_in_the_cache(tmp_path, recipe, capsys):
    """The folder of a corpus is named by a checksum, whatever the source is called."""
    source = 'data.sources=[{kind: hub, name: "../../evil"}]'
    error_line(capsys, "pretrain", recipe, source, f"data.cache_dir={tmp_path / 'in' / 'cache'}")
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}
    assert not list((tmp_path / "in").rglob("*evil*"))


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "a/../../outside.json"])
def test_checksums_name_nothing_outside(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.json").write_text("{}", encoding="utf-8")
    (folder / CHECKSUMS_FILE).write_text(json.dumps({name: {"bytes": 2, "sha256": "0"}}), encoding="utf-8")
    assert "outside of the folder" in (damage(folder) or "")


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "curve.png", "model.safetensors"])
def test_push_does_not_follow_links_out_of_the_folder(name, model, tmp_path):
    secret = tmp_path / "secret"
    (model / name).rename(secret)
    (model / name).symlink_to(secret)
    with pytest.raises(PushError, match=re.escape(f"{model}/{name} is a link to {secret}, outside of the folder")):
        read_folder(model, "jane/model")
    (model / name).unlink()
    secret.rename(model / f"other-{name}")
    (model / name).symlink_to(f"other-{name}")  # within it there is nothing wrong
    assert name in read_folder(model, "jane/model")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname"])
def test_push_sends_no_file_that_an_index_names_elsewhere(shard, model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"a": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(PushError, match="lacks"):
        read_folder(model, "jane/model")


@pytest.mark.parametrize("target", ["../evil.LinformerConfig", "/tmp/evil.LinformerConfig", "sub/evil.LinformerConfig"])
def test_push_sends_no_code_that_a_config_names_elsewhere(target, model, tmp_path):
    (tmp_path / "evil.py").write_text("", encoding="utf-8")
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    content["auto_map"]["AutoConfig"] = target
    (model / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PushError, match="lacks"):
        read_folder(model, "jane/model")


def test_archives_are_read_and_never_unpacked(tmp_path):
    """movie-snippets reads one member by its name; a link or a path of the archive's leads nowhere."""
    import io
    import tarfile

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        link = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with tarfile.open(tmp_path / "vader.tar.gz", mode="w:gz") as archive:
        member = tarfile.TarInfo("vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
        escape = tarfile.TarInfo("../escaped")
        archive.addfile(escape, io.BytesIO())
    with pytest.raises(ValueError, match="holds no hutto_ICWSM_2014"):
        load_task(TaskData(task="movie-snippets", path=str(tmp_path / "vader.tar.gz")))
    assert [path.name for path in tmp_path.iterdir()] == ["vader.tar.gz"]
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"\.extractall\(|unpack_archive\(|\.extract\(", path.read_text(encoding="utf-8")), path


# Network


# Every verb on local input, in a process of its own that is not told to be offline: a look-up of any name, and any
# connection but to this process's own children, ends the process.
ALONE = """
import json, os, socket, sys
def refuse(name):
    def refused(*arguments, **options):
        os.write(2, f"NETWORK: {name} {arguments}\\n".encode())
        os._exit(99)
    return refused
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
from linformer_hf import cli
for command in json.loads(sys.argv[1]):
    status = cli.main(command)
    print(command[0], status, file=sys.stderr)
    if status:
        sys.exit(status)
"""


def test_local_input_needs_no_network(model, recipe, tuning, texts, tmp_path, tiny_source):
    out, cache, bert = tmp_path / "out", f"data.cache_dir={tmp_path / 'cache'}", tiny_source("BertForMaskedLM")
    sections = {"student": str(out / "convert"), "teacher": str(bert)}
    data = {"sources": [{"kind": "files", "path": str(texts)}], "cache_dir": str(tmp_path / "cache")}
    training = {**TRAINING, "max_steps": 1, "eval_strategy": "no", "output_dir": str(out / "distill")}
    distil = write_recipe(
        tmp_path / "d.yaml",
        model=sections,
        data=data,
        training=training,
        distillation={"validation_rows": 2, "trainable": "encoder"},
    )
    section = {"output_dir": str(out / "table"), "checkpoints": {"ours": str(model)}, "recipes": {tuning: []}}
    comparison = write_recipe(tmp_path / "c.yaml", compare={**section, "seeds": [0]})
    commands = [
        ["pretrain", recipe, cache, f"training.output_dir={out / 'pretrain'}"],
        ["pretrain", recipe, cache, f"training.output_dir={out / 'on'}", f"model.checkpoint={model}"],
        ["finetune", tuning, f"training.output_dir={out / 'tune'}", f"model.checkpoint={out / 'pretrain'}"],
        ["convert", str(bert), str(out / "convert"), "--projected-length", "12"],
        ["distill", distil],
        *([["export", str(out / "tune")]] if LONG else []),  # ten seconds
        ["push", str(out / "tune"), "jane/model", "--dry-run"],
        ["compare", comparison],
    ]
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    command = [sys.executable, "-P", "-c", ALONE, json.dumps(commands)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert "NETWORK" not in ran.stderr, ran.stderr[-2000:]
    assert ran.returncode == 0, ran.stderr[-3000:]
    command[-1] = json.dumps([["convert", "jane/no-such-model", str(out / "hub")]])
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert ran.returncode == 99, "a Hub name asks the network, so the block works"
    assert "NETWORK" in ran.stderr


# Secrets


def test_a_token_in_the_environment_or_on_the_command_line_is_written_nowhere(recipe, tuning, tmp_path):
    out = tmp_path / "out"
    program = "import json, sys; from linformer_hf import cli\nfor c in json.loads(sys.argv[1]): assert not cli.main(c)"
    commands = [
        ["pretrain", recipe, f"training.output_dir={out / 'a'}"],
        ["finetune", tuning, f"training.output_dir={out / 'b'}", f"model.checkpoint={out / 'a'}"],
        ["push", str(out / "b"), "jane/model", "--dry-run"],
    ]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN}
    # The last argument is one of a program that calls this package; sys.argv goes into results.json.
    command = [sys.executable, "-P", "-c", program, json.dumps(commands), f"--token={TOKEN}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert TOKEN not in ran.stdout + ran.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert "--token=hf_..." in read_json(out / "a" / "results.json", "")["command"]


@pytest.mark.parametrize(
    "override",
    [
        f"training.hub_token={TOKEN}",
        f"training.run_name={TOKEN}",
        f"model.checkpoint=https://user:{TOKEN}@hub/model",
        f"data.sources.0.path=/x/{TOKEN}",
        f"training.seed={TOKEN}",
        f"training.report_to=[{TOKEN}]",
    ],
)
def test_a_token_in_a_recipe_is_refused_and_not_repeated(override, recipe, tmp_path, capsys):
    line = error_line(capsys, "pretrain", recipe, override, f"training.output_dir={tmp_path / 'run'}")
    assert "would be written into recipe.json" in line
    assert TOKEN not in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError):
        read_recipe(recipe, [override])


# What the project says about itself


def test_every_promise_in_security_md_names_a_test_that_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 8
    for file, function in named:
        (path,) = (ROOT / "tests").rglob(file)
        content = path.read_text(encoding="utf-8")
        assert not function or f"def {function}(" in content, (file, function)


def test_dependencies_are_audited_in_ci():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    steps = [step.get("run", "") for step in jobs["audit"]["steps"]]
    assert any("pip-audit" in step and "constraints.txt" in step for step in steps)


def test_a_hostile_tokenizer_file_is_one_error(model, tuning, tmp_path, capsys, mark):
    """What the library tokenizers raises is a bare Exception; a pickle in its place is not loaded."""
    hostile = [b"", b"{", b"\xff\xfe", b'{"version": "1.0"}', pickle.dumps(Payload(mark)), b"[" * 100_000]
    for number, content in enumerate(hostile):
        (model / "tokenizer.json").write_bytes(content)
        out = f"training.output_dir={tmp_path / f'out-{number}'}"
        line = error_line(capsys, "finetune", tuning, out, f"model.checkpoint={model}")
        assert str(model) in line
    with pytest.raises(Exception, match=r".+"):
        AutoTokenizer.from_pretrained(model)
    record("hostile files are refused", kinds=len(hostile))


def test_weights_with_another_header_are_one_error(tiny_source, tmp_path, capsys):
    """safetensors whose header lies: lengths beyond the file, overlapping tensors, a header of gigabytes."""
    lying = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    for number, header in enumerate((lying, b"{}", b"[]", b"x" * 9)):
        folder = Path(shutil.copytree(tiny_source(), tmp_path / f"bert-{number}"))
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        line = error_line(capsys, "convert", str(folder), str(tmp_path / "out"))
        assert str(folder) in line
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert str(folder) in error_line(capsys, "convert", str(folder), str(tmp_path / "out"))
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not whole"):
        read_source(str(folder))
