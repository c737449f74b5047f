"""`linformer-hf push`, and the way back: the real huggingface_hub client against tests/hub_server.py on loopback."""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import linformer_hf
from helpers import BLOCKER, CODE
from hub_server import Hub, run_python
from linformer_hf import cli
from linformer_hf.conversion.convert import convert
from linformer_hf.hub.push import PushError, push, read_folder


TOKEN, OTHERS_TOKEN, WRONG_TOKEN = ("hf_" + letter * 34 for letter in "wox")

# Argv: a JSON list of [repository, revision], the folder for what they give, and whether this package may be imported.
LOAD = (
    BLOCKER
    + """
import json, sys
from pathlib import Path

if sys.argv[3] == "blocked":
    sys.meta_path.insert(0, Blocker)
    options = {"trust_remote_code": True}
else:
    import linformer_hf
    options = {}

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

torch.set_num_threads(1)
folder = Path(sys.argv[2])
inputs = load_file(folder / "inputs.safetensors")
for number, (name, revision) in enumerate(json.loads(sys.argv[1])):
    model = AutoModelForMaskedLM.from_pretrained(name, revision=revision, **options)
    encoder = AutoModel.from_pretrained(name, revision=revision, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **options)
    with torch.no_grad():
        outputs = {"logits": model(**inputs).logits, "hidden": encoder(**inputs).last_hidden_state}
    outputs["ids"] = tokenizer(["the old river", "a garden"], padding=True, return_tensors="pt")["input_ids"]
    save_file({key: value.contiguous() for key, value in outputs.items()}, folder / f"{number}.safetensors")
print(type(model).__module__)
"""
)


@contextlib.contextmanager
def client(hub: Hub, token: str | None = TOKEN):
    """Point this process's huggingface_hub, which has read its environment at import, to the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between the attempts of an upload
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        close_session()
        yield
        close_session()


@pytest.fixture
def hub():
    with Hub() as server, client(server):
        yield server


@pytest.fixture(scope="module")
def model_folder(tiny_source, tmp_path_factory) -> Path:
    """What `linformer-hf convert` leaves."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    return convert(str(tiny_source("BertForMaskedLM")), folder, projected_length=12)


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    """A copy to change: without checksums, which would find every change."""
    without = shutil.ignore_patterns("checksums.json")
    return Path(shutil.copytree(model_folder, tmp_path / "model", ignore=without))


@pytest.fixture(scope="module")
def sharded_folder(model_folder, tmp_path_factory) -> Path:
    """The same model with other weights, in several files."""
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("sharded") / "model"))
    model = linformer_hf.LinformerForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.linformer.embeddings.word_embeddings.weight.add_(0.1)
    model.save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink()
    (folder / "checksums.json").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def expected(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = linformer_hf.LinformerForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        hidden = linformer_hf.LinformerModel.from_pretrained(folder)(**inputs).last_hidden_state
        logits = model(**inputs).logits
    ids = AutoTokenizer.from_pretrained(folder)(["the old river", "a garden"], padding=True, return_tensors="pt")
    return {"logits": logits, "hidden": hidden, "ids": ids["input_ids"]}


@pytest.fixture(scope="module")
def pushed(model_folder, sharded_folder, tmp_path_factory):
    """jane/model: `main` as converted, `next` with shards over it. Gives server, folder, and outputs by revision."""
    place = tmp_path_factory.mktemp("pushed")
    inputs = {"input_ids": torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(0))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 20:] = 0
    save_file(inputs, place / "inputs.safetensors")
    with Hub() as server:
        with client(server):
            first = push(model_folder, "jane/model", private=True)
            push(sharded_folder, "jane/model", revision="next")
        revisions = {"main": model_folder, first.rpartition("/")[2]: model_folder, "next": sharded_folder}
        yield server, place, {revision: expected(folder, inputs) for revision, folder in revisions.items()}


def load(pushed, package: bool, home: str, **environment: str):
    server, place, outputs = pushed
    jobs = json.dumps([["jane/model", revision] for revision in outputs])
    arguments = [jobs, str(place), "installed" if package else "blocked"]
    return run_python(LOAD, *arguments, hub=server, home=place / home, package=package, **environment)


def check_outputs(pushed) -> None:
    _, place, outputs = pushed
    for number, wanted in enumerate(outputs.values()):
        file = place / f"{number}.safetensors"
        given = load_file(file)
        file.unlink()
        assert given.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(given[key], tensor), key


def test_a_clean_process_without_the_package_loads_every_revision_bit_for_bit_and_then_without_a_network(pushed):
    server, _, outputs = pushed
    values = list(outputs.values())
    assert torch.equal(values[0]["logits"], values[1]["logits"])
    assert not torch.equal(values[0]["logits"], values[2]["logits"])
    server.requests.clear()
    ran = load(pushed, False, "clean", HF_TOKEN=TOKEN)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("transformers_modules.")
    check_outputs(pushed)
    assert any(request.host == "localhost" for request in server.requests)
    assert not [request for request in server.requests if request.host == "localhost" and request.token]

    server.requests.clear()
    ran = load(pushed, False, "clean", HF_HUB_OFFLINE="1")
    assert ran.returncode == 0, ran.stderr[-3000:]
    check_outputs(pushed)
    assert server.requests == []


def test_the_package_loads_it_without_trusting_code(pushed):
    ran = load(pushed, True, "installed", HF_TOKEN=TOKEN)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == "linformer_hf.modeling_linformer\n"
    check_outputs(pushed)


RECIPE = """
model: {checkpoint: jane/model}
data: {task: files, train_file: rows.csv}
training: {output_dir: out, max_steps: 1}
"""


def test_an_empty_cache_without_a_network_is_one_error(pushed):
    server, place, _ = pushed
    home = place / "empty"
    home.mkdir()
    (home / "rows.csv").write_text("text,label\n" + "".join(f"river {i},{'ab'[i % 2]}\n" for i in range(40)))
    (home / "recipe.yaml").write_text(RECIPE)
    code = "import sys; from linformer_hf.cli import main; sys.exit(main(['finetune', 'recipe.yaml']))"
    ran = run_python(code, hub=server, home=home, package=True, HF_HUB_OFFLINE="1")
    assert ran.returncode == 2
    (error,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "'jane/model'" in error
    assert "offline" in error or "cached" in error
    assert not (home / "out").exists()


def test_a_push_says_what_it_sends_and_where_it_is(hub, folder, capfd, caplog):
    caplog.set_level(logging.INFO)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    (folder / "stage-1").mkdir()
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "train.csv").write_text("text,label\n")
    assert cli.main(["push", str(folder), "jane/model"]) == 0
    printed = capfd.readouterr().out
    assert "HTTP Request" not in caplog.text
    sha = hub.repositories["models", "jane/model"].branches["main"]
    assert printed.splitlines()[-1].endswith(f"{hub.endpoint}/jane/model at commit {sha}")
    assert "Left out: checkpoint-10/, stage-1/, train.csv, training_args.bin" in printed
    names = {
        *CODE,
        "config.json",
        *("README.md", "results.json", "fidelity.json", "fidelity.md", "fidelity.png"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    files = hub.files("jane/model")
    assert set(files) == names | {".gitattributes"}
    for name in names - {"README.md"}:
        assert files[name] == (folder / name).read_bytes(), name
    assert b'name = "jane/model"' in files["README.md"]
    assert not hub.repositories["models", "jane/model"].private


def test_a_second_push_sends_only_what_changed(hub, folder):
    first = push(folder, "jane/model")
    before = hub.repositories["models", "jane/model"].branches["main"]
    hub.requests.clear()
    assert push(folder, "jane/model") == first
    assert hub.uploads() == []
    assert hub.repositories["models", "jane/model"].branches["main"] == before

    weights = load_file(folder / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert push(folder, "jane/model") != first
    assert hub.uploads() == [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()]
    assert hub.files("jane/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, folder, sharded_folder):
    push(folder, "jane/model")
    push(sharded_folder, "jane/model")
    shards = {path.name for path in sharded_folder.glob("model*")}
    assert {name for name in hub.files("jane/model") if name.startswith("model")} == shards | {"modeling_linformer.py"}
    push(folder, "jane/model")
    names = {name for name in hub.files("jane/model") if name.startswith("model")}
    assert names == {"model.safetensors", "modeling_linformer.py"}


def test_an_earlier_models_pooling_does_not_stay_beside_one_that_has_none(hub, folder):
    hub.create("jane/model", {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "notes/x.txt": b"mine"})
    push(folder, "jane/model")
    assert {name for name in hub.files("jane/model") if "/" in name or name == "modules.json"} == {"notes/x.txt"}


def test_a_branch_by_revision(hub, folder, sharded_folder, capfd):
    push(folder, "jane/model")
    main = dict(hub.files("jane/model"))
    assert cli.main(["push", str(sharded_folder), "jane/model", "--revision", "runs/next"]) == 0
    assert hub.files("jane/model") == main
    assert "model.safetensors.index.json" in hub.files("jane/model", "runs/next")
    assert "model.safetensors" not in hub.files("jane/model", "runs/next")
    sha = hub.repositories["models", "jane/model"].branches["runs/next"]
    assert capfd.readouterr().out.splitlines()[-1].endswith(f"commit {sha}")
    push(sharded_folder, "jane/model", revision="runs/next")  # the branch is there now


def test_an_upload_that_is_cut_once_is_tried_again(hub, folder):
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.drops[weights] = 1
    push(folder, "jane/model")
    assert hub.uploads().count(weights) == 2
    assert hub.files("jane/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_an_upload_that_breaks_off_changes_nothing_and_goes_on_where_it_was(hub, folder, capfd):
    hub.create("jane/model")
    before = hub.repositories["models", "jane/model"].branches["main"]
    weights, picture = (
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.safetensors", "fidelity.png")
    )
    hub.drops[weights] = 100
    assert cli.main(["push", str(folder), "jane/model"]) == 2
    printed = capfd.readouterr()
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    for words in ("jane/model", hub.endpoint, "The branch is as it was", "run the same command again"):
        assert words in error
    assert hub.repositories["models", "jane/model"].branches["main"] == before
    assert set(hub.stored) == {picture}

    hub.drops.clear()
    hub.requests.clear()
    assert cli.main(["push", str(folder), "jane/model"]) == 0
    assert hub.uploads() == [weights]
    assert hub.files("jane/model")["fidelity.png"] == (folder / "fidelity.png").read_bytes()


def test_a_dry_run_lists_the_files_and_sends_nothing(folder, capsys):
    with Hub() as server, client(server, token=None):
        assert cli.main(["push", str(folder), "jane/model", "--dry-run", "--revision", "next"]) == 0
        assert server.requests == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("to jane/model, branch next. Nothing was sent.")
    size = f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert [line.split() for line in lines if "model.safetensors" in line] == [["model.safetensors", size]]


def error_of(capfd, *arguments: str) -> str:
    """The one line that a refused push prints; no token is in it or anywhere else."""
    assert cli.main(["push", *arguments]) == 2
    printed = capfd.readouterr()
    for token in (TOKEN, OTHERS_TOKEN, WRONG_TOKEN, "x\u00fcx"):
        assert token not in printed.out + printed.err
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, "jane/model", ["no access token", "hf auth login", "HF_TOKEN"]),
        (WRONG_TOKEN, "jane/model", ["401", "does not accept the access token", "hf auth login"]),
        (f"{TOKEN}x\u00fcx", "jane/model", ["characters that no token has"]),
        (OTHERS_TOKEN, "jane/public", ["403", "jane/public", "right to write"]),
        (OTHERS_TOKEN, "jane/secret", ["403", "jane/secret", "right to write"]),
        (OTHERS_TOKEN, "jane/none", ["403", "jane/none", "right to write"]),
    ],
    ids=["none", "wrong", "garbled", "another's public", "another's private", "another's new"],
)
def test_a_token_that_does_not_open_the_repository(folder, capfd, token, name, words):
    with Hub() as server, client(server, token):
        server.create("jane/public", {"a.txt": b"a"})
        server.create("jane/secret", {"a.txt": b"a"}, private=True)
        error = error_of(capfd, str(folder), name)
        assert server.stored == {}
        assert server.files("jane/public") == server.files("jane/secret") == {"a.txt": b"a"}
    for text in words:
        assert text in error


def test_a_repository_that_disappears_meanwhile(hub, folder, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    error = error_of(capfd, str(folder), "jane/model")
    assert "404" in error
    assert "no repository jane/model" in error


def test_private_is_what_it_says(hub, folder, capfd):
    hub.create("jane/public")
    error = error_of(capfd, str(folder), "jane/public", "--private")
    assert "jane/public is there already and public" in error
    assert hub.stored == {}
    push(folder, "jane/secret", private=True)
    assert hub.repositories["models", "jane/secret"].private


def test_a_card_that_the_hub_refuses(hub, folder, capfd):
    card = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: none-such\n", 1), encoding="utf-8")
    error = error_of(capfd, str(folder), "jane/model")
    assert '"license" must be one of' in error
    assert hub.stored == {}


def test_no_network(folder, capfd):
    with Hub() as server:
        pass
    with client(server):
        error = error_of(capfd, str(folder), "jane/model")
    assert server.endpoint in error
    assert "Check the network" in error


@pytest.mark.parametrize("kind", [OSError, PermissionError, RuntimeError])
def test_errors_of_the_other_way_to_upload(hub, folder, capfd, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("Network error: xet")  # hf_xet's own errors are such; the server here speaks the older protocol

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fail)
    error = error_of(capfd, str(folder), "jane/model")
    assert "(Network error: xet)" in error
    assert "run the same command again" in error


def test_offline_mode(hub, folder, capfd, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(capfd, str(folder), "jane/model")


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "jane/", "/model", "jane/mo del", "jane/a..b", "https://x/y", "jane/m.git"]
)
def test_a_wrong_name_is_refused_before_the_folder_is_read(name):
    with pytest.raises(PushError, match=f"^{re.escape(repr(name))} is no name of a repository.*jane/linformer-512"):
        push("nowhere", name)


@pytest.mark.parametrize(
    ("revision", "words"), [("a b", "'a b'"), ("-x", "'-x'"), ("a..b", "a..b"), ("0" * 40, "is a commit")]
)
def test_a_wrong_branch_is_refused(revision, words):
    with pytest.raises(PushError, match=f"--revision.*{re.escape(words)}|--revision {words}"):
        push("nowhere", "jane/model", revision=revision)


def change_config(**fields):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])


def index_of_missing_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def weights_twice(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, ["there is no folder", "give the folder"]),
        (remove("config.json"), ["is no model", "config.json"]),
        (write("config.json", b"{"), ["config.json is no JSON"]),
        (write("config.json", b"[]"), ["config.json is no JSON object"]),
        (change_config(model_type="bert"), ["'bert'", "linformer-hf convert"]),
        (change_config(auto_map={"AutoConfig": "x.Y"}), ["auto_map", "AutoModelForMaskedLM", "save_pretrained"]),
        (remove("projection_linformer.py"), ["lacks projection_linformer.py", "save_pretrained"]),
        (remove("modeling_linformer.py"), ["lacks modeling_linformer.py", "save_pretrained"]),
        (remove("model.safetensors"), ["has no weights", "model.safetensors"]),
        (cut_weights, ["model.safetensors cannot be read"]),
        (index_of_missing_shards, ["lacks model-00001-of-00001.safetensors"]),
        (weights_twice, ["weights twice", "Delete"]),
        (remove("tokenizer.json"), ["has no tokenizer", "tokenizer.save_pretrained"]),
        (remove("README.md"), ["has no model card", "README.md"]),
        (write("README.md", b"# Only text\n"), ["README.md", "no library_name"]),
        (write("README.md", b"---\nlibrary_name: transformers\n---\n"), ["README.md", "no pipeline_tag"]),
        (write("README.md", b"---\ntags: [a\n---\n"), ["README.md", "cannot be read"]),
        (write("README.md", b"---\n- a\n---\n"), ["README.md", "cannot be read"]),
        (write("README.md", b"\xff"), ["README.md", "cannot be read"]),
        (write("pytorch_model.bin", b"x"), ["pytorch_model.bin", "pickled", "safetensors"]),
        (write("optimizer.pt", b"x"), ["optimizer.pt", "checkpoint-*"]),
        (write("rng_state.pth", b"x"), ["rng_state.pth"]),
        (write("recipe.json", f'{{"hub_token": "{TOKEN}"}}'.encode()), ["recipe.json", "access token", "revoke"]),
    ],
)
def test_a_folder_that_cannot_be_published_is_one_error_and_no_request(hub, folder, capfd, change, words):
    change(folder)
    error = error_of(capfd, str(folder), "jane/model")
    for text in ("error: ", str(folder), *words):
        assert text in error
    assert hub.requests == []


@pytest.fixture
def adapter(model_folder, tmp_path) -> Path:
    """What PEFT leaves, made fit to publish: with the base model's name on the Hub, and a card with a task."""
    peft = pytest.importorskip("peft", reason="an extra, which `make test-oldest` leaves out")
    model = linformer_hf.LinformerForMaskedLM.from_pretrained(model_folder)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        if path.suffix in (".json", ".md"):
            path.write_text(path.read_text(encoding="utf-8").replace(str(model_folder), "jane/model"), encoding="utf-8")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    if "pipeline_tag" not in card:
        card = card.replace("---\n", "---\npipeline_tag: fill-mask\n", 1)
    (tmp_path / "adapter" / "README.md").write_text(card, encoding="utf-8")
    return tmp_path / "adapter"


def test_an_adapter_goes_to_the_hub_whole(hub, model_folder, adapter, tmp_path):
    push(adapter, "jane/adapter")
    sent = {name: content for name, content in hub.files("jane/adapter").items() if name != ".gitattributes"}
    assert set(sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    (tmp_path / "got").mkdir()
    for name, content in sent.items():
        (tmp_path / "got" / name).write_bytes(content)
    base = linformer_hf.LinformerForMaskedLM.from_pretrained(model_folder)
    peft = pytest.importorskip("peft")
    got = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, tmp_path / "got"))
    wanted = load_file(adapter / "adapter_model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            write("adapter_config.json", b'{"base_model_name_or_path": "/data/model"}'),
            ["/data/model", "Push that model first", "README.md"],
        ),
        (write("adapter_config.json", b"{}"), ["base_model_name_or_path='None'", "Push that model first"]),
        (write("adapter_config.json", b"["), ["adapter_config.json is no JSON"]),
        (write("adapter_model.safetensors", b"x"), ["adapter_model.safetensors cannot be read"]),
        (remove("adapter_model.safetensors"), ["no adapter_model.safetensors"]),
        (write("adapter_model.bin", b"x"), ["adapter_model.bin", "pickled", "safetensors"]),
        (remove("README.md"), ["has no model card"]),
    ],
)
def test_an_adapter_that_cannot_be_published_is_one_error(hub, adapter, capfd, change, words):
    change(adapter)
    error = error_of(capfd, str(adapter), "jane/adapter")
    for text in words:
        assert text in error
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "recipe.json", "adapter_config.json"])
def test_nothing_is_sent_that_names_the_home_folder(hub, adapter, folder, capfd, name, monkeypatch, tmp_path):
    """A card of PEFT's names the base model by its path; an older folder may hold one, too."""
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    place = adapter if name == "adapter_config.json" else folder
    text = (place / name).read_text(encoding="utf-8") if (place / name).exists() else "{}"
    if name == "README.md":
        text += f"From {tmp_path}/jane/models/bert.\n"
    else:
        text = json.dumps({**json.loads(text), "note": f"{tmp_path}/jane/x"})
    (place / name).write_text(text, encoding="utf-8")
    error = error_of(capfd, str(place), "jane/model")
    assert f"{name} holds the path of your home folder ({tmp_path / 'jane'})" in error
    assert hub.requests == []


def test_a_folder_that_is_whole_is_read_without_a_change(model_folder):
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    read_folder(model_folder, "jane/model")
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


TRAIN = """
import sys
from datasets import Dataset
import linformer_hf
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

model = AutoModelForMaskedLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.push_to_hub("jane/by-hand", private=True)
tokenizer.push_to_hub("jane/by-hand")
ids = tokenizer(["the old river"] * 4)["input_ids"]
arguments = TrainingArguments(
    "trained", push_to_hub=True, hub_model_id="jane/by-trainer", max_steps=2, save_steps=1, report_to=[], use_cpu=True
)
rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()  # what Trainer sends while it trains has no code and no card
"""


def test_push_to_hub_and_trainer_reach_the_hub(hub, model_folder, tmp_path):
    ran = run_python(TRAIN, str(model_folder), hub=hub, home=tmp_path / "home", package=True, HF_TOKEN=TOKEN)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert TOKEN not in ran.stdout + ran.stderr
    for name in ("jane/by-hand", "jane/by-trainer"):
        assert CODE | {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files(name))
    assert hub.files("jane/by-hand")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert hub.repositories["models", "jane/by-hand"].private
    assert hub.files("jane/by-trainer")["model.safetensors"] != hub.files("jane/by-hand")["model.safetensors"]


COMMANDS = """
import sys
from linformer_hf.cli import main

sys.exit(main(["convert", "acme/bert", "out", "--projected-length", "12"]) or main(["push", "out", "jane/short"]))
"""


def test_from_a_name_on_the_hub_to_a_name_on_the_hub_with_a_login(hub, tiny_source, tmp_path):
    bert = tiny_source("BertForMaskedLM")
    hub.create("acme/bert", {path.name: path.read_bytes() for path in bert.iterdir()})
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)  # where `hf auth login` leaves it
    ran = run_python(COMMANDS, hub=hub, home=home, package=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert TOKEN not in ran.stdout + ran.stderr
    files = hub.files("jane/short")
    assert ModelCard(files["README.md"].decode()).data.base_model == "acme/bert"
    assert json.loads(files["results.json"])["source"] == "acme/bert"
    sha = hub.repositories["models", "jane/short"].branches["main"]
    assert ran.stdout.splitlines()[-1].endswith(f"{hub.endpoint}/jane/short at commit {sha}")
    assert not [path for path in (home / "out").iterdir() if TOKEN.encode() in path.read_bytes()]
