"""The command line: exit status, one line for what the user can put right, and verbs that are imported when called."""

import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from linformer_hf import LinformerConfig, cli
from linformer_hf.utils.options import marks
from linformer_hf.utils.processes import Interrupted
from waiting import HANG


@pytest.fixture
def calls(monkeypatch):
    """Verbs record their arguments instead of running; setting `calls.error` lets the next one fail."""

    class Calls(list):
        error: BaseException | None = None

        def module(self, name, package):
            assert package == "linformer_hf"
            verb = name.rpartition(".")[2]

            def run(*positional, **named):
                if self.error:
                    raise self.error
                self.append((verb, positional, named))

            return type("Module", (), {verb: staticmethod(run)})

    recorder = Calls()
    monkeypatch.setattr(cli.importlib, "import_module", recorder.module)
    return recorder


def stopped(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return stop.value.code


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "distill"])
@pytest.mark.parametrize(
    ("arguments", "overrides", "resume"),
    [
        (["r.yaml"], [], False),
        (["r.yaml", "--resume"], [], True),
        (["--resume", "r.yaml", "a.b=1"], ["a.b=1"], True),
        (["r.yaml", "a.b=1", "--resume", "c.d=x=y"], ["a.b=1", "c.d=x=y"], True),
        (["r.yaml", "--resume", "--traceback", "a.b=-1", "c.d=[1, 2]"], ["a.b=-1", "c.d=[1, 2]"], True),
    ],
)
def test_options_stand_before_or_after_overrides(calls, verb, arguments, overrides, resume):
    assert cli.main([verb, *arguments]) == 0
    assert calls == [(verb, ("r.yaml", overrides), {"resume": resume})]


@pytest.mark.parametrize(
    ("arguments", "output", "force"),
    [([], "runs/demo", False), (["--force"], "runs/demo", True), (["--output", "x", "--force"], "x", True)],
)
def test_demo_passes_its_options(calls, arguments, output, force):
    assert cli.main(["demo", *arguments]) == 0
    assert calls == [("demo", (), {"output": output, "force": force})]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--projected-length", "64"], {"projected_length": 64}),
        (["--max-length", "99", "--positions", "interpolate"], {"max_length": 99, "positions": "interpolate"}),
        (["--projection-sharing", "none", "--local-window", "0"], {"projection_sharing": "none", "local_window": 0}),
        (["--calibration-rows", "7", "--tokenizer", "t"], {"calibration_rows": 7, "tokenizer": "t"}),
        (["--revision", "abc", "--traceback"], {"revision": "abc"}),
        (["--sentence-head", "none"], {"sentence_head": "none"}),
        (["--projected-length", "64,32", "--seed", "5"], {"projected_length": [64, 32], "seed": 5}),
        (
            ["--calibrate", "demo", "--projection-type", "mean_pool"],
            {"calibrate": "demo", "projection_type": "mean_pool"},
        ),
    ],
)
def test_convert_passes_what_is_given_and_leaves_the_rest_to_its_defaults(calls, arguments, given):
    assert cli.main(["convert", "bert", "out", *arguments]) == 0
    expected = {"source": "bert", "output": "out", "positions": "repeat", "sentence_head": "source", "seed": 0} | given
    assert calls == [("convert", (), expected)]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--private", "--dry-run"], {"private": True, "dry_run": True}),
        (["--revision", "v2", "--traceback"], {"revision": "v2"}),
    ],
)
def test_push_passes_its_options(calls, arguments, given):
    assert cli.main(["push", "folder", "jane/model", *arguments]) == 0
    expected = {"folder": "folder", "repository": "jane/model", "private": False, "dry_run": False} | given
    assert calls == [("push", (), expected)]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["a.txt"], {"files": ["a.txt"]}),
        (
            ["a.txt", "b/", "--pieces", "512", "--column", "body"],
            {"files": ["a.txt", "b/"], "pieces": 512, "column": "body"},
        ),
        (["hub:acme/books", "--sentences", "--alone"], {"files": ["hub:acme/books"], "sentences": True, "alone": True}),
    ],
)
def test_embed_passes_its_files_and_options(calls, arguments, given):
    assert cli.main(["embed", "model", *arguments, "--output", "v.parquet"]) == 0
    expected = {
        "folder": "model",
        "output": "v.parquet",
        "column": "text",
        "sentences": False,
        "alone": False,
        "blend": False,
    }
    assert calls == [("embed", (), expected | {"batch_tokens": 8192, "dtype": "float32"} | given)]


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FileExistsError, ConnectionError])
def test_what_the_user_can_put_right_is_one_line_and_status_2(calls, capsys, error):
    calls.error = error("no files at 'x';\n  give a file.")
    assert cli.main(["pretrain", "r.yaml"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: no files at 'x'; give a file.\n")


def test_traceback_shows_where_it_arose(calls):
    calls.error = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["pretrain", "r.yaml", "--traceback"])


def test_an_interruption_ends_with_the_usual_status_and_says_how_to_go_on(calls, capsys):
    calls.error = KeyboardInterrupt()
    assert cli.main(["convert", "source", "output"]) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    calls.error = Interrupted(signal.SIGTERM, Path("run/checkpoint-7"))
    assert cli.main(["pretrain", "my recipe.yaml", "data.seed=1"]) == 143
    line = (
        "stopped by SIGTERM; run/checkpoint-7 is whole. Go on with: linformer-hf pretrain 'my recipe.yaml' data.seed=1"
    )
    assert capsys.readouterr().err == f"{line} --resume\n"


@pytest.mark.parametrize("error", [ZeroDivisionError, AttributeError])
def test_a_fault_of_the_program_is_not_hidden(calls, error):
    calls.error = error()
    with pytest.raises(error):
        cli.main(["pretrain", "r.yaml"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["pretrian", "r.yaml"], "pretrian"),
        (["pretrain"], "RECIPE.yaml"),
        (["pretrain", "r.yaml", "--resum3"], "--resum3"),
        (["pretrain", "r.yaml", "a.b=1", "--typo", "c.d=2"], "--typo"),
        (["demo", "x"], "unrecognized arguments: x"),
        (["demo", "--resume"], "--resume"),
        (["convert", "bert"], "OUTPUT"),
        (["convert", "bert", "out", "more"], "unrecognized arguments: more"),
        (["convert", "bert", "out", "--projected-length", "x"], "'x' is neither a number nor numbers"),
        (["convert", "bert", "out", "--projection-type", "magic"], "magic"),
        (["distill"], "RECIPE.yaml"),
        (["push", "folder"], "USER/NAME"),
        (["embed", "model", "--output", "v.parquet"], "FILES"),
        (["embed", "model", "a.txt"], "--output"),
        (["push", "folder", "jane/model", "--token", "x"], "--token"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(calls, capsys, arguments, words):
    assert stopped(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert "--help" in printed.err
    assert printed.err.count("\n") == 1
    assert not calls


def test_errors_of_a_real_verb_arrive(capsys, tmp_path):
    missing = tmp_path / "none.yaml"
    for verb in cli.RECIPE_VERBS:
        assert cli.main([verb, str(missing)]) == 2
        assert capsys.readouterr().err == f"error: {missing}: there is no such recipe file.\n"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {sources: [{kind: files, path: x}]}\ntraining: {max_stepz: 1}\n", encoding="utf-8")
    assert cli.main(["pretrain", str(recipe)]) == 2
    assert capsys.readouterr().err == "error: unknown key 'training.max_stepz'. Did you mean 'max_steps'?\n"
    with pytest.raises(ValueError, match="max_stepz"):
        cli.main(["pretrain", "--traceback", str(recipe)])


@pytest.mark.parametrize(
    ("verb", "named"),
    [
        ("pretrain", ["RECIPE.yaml", "section.key=value", "--resume", "--traceback"]),
        ("finetune", ["RECIPE.yaml", "section.key=value", "--resume", "--traceback"]),
        ("distill", ["RECIPE.yaml", "section.key=value", "--resume", "--traceback"]),
        ("compare", ["RECIPE.yaml", "section.key=value", "--traceback"]),
        ("spectrum", ["RECIPE.yaml", "section.key=value", "--traceback"]),
        ("sweep", ["RECIPE.yaml", "section.key=value", "--traceback"]),
        ("theory", ["RECIPE.yaml", "section.key=value", "--traceback"]),
        ("benchmark", ["RECIPE.yaml", "section.key=value", "--traceback"]),
        ("reproduce", ["--scale {quick,cpu,paper}", "--no-run", "reproduce.key=value", "--traceback"]),
        ("demo", ["--output FOLDER", "runs/demo", "--force", "--traceback"]),
        ("convert", ["SOURCE OUTPUT", "--projected-length K", "--max-length N", "--calibrate CORPUS", "--traceback"]),
        ("embed", ["FOLDER FILES [FILES ...]", "--output FILE", "--pieces TOKENS", "--spans COLUMN", "--traceback"]),
        ("push", ["FOLDER USER/NAME", "--private", "--revision R", "--dry-run", "--traceback"]),
    ],
)
def test_help_of_a_verb_names_its_arguments_and_imports_no_verb(calls, capsys, monkeypatch, verb, named):
    def refuse(*_):
        raise AssertionError("--help imported a verb")

    monkeypatch.setattr(cli.importlib, "import_module", refuse)
    assert stopped(verb, "--help") == 0
    text = capsys.readouterr().out
    for words in named:
        assert words in text


def test_every_verb_is_a_function_of_its_module():
    parser = cli.build_parser()
    (verbs,) = (action.choices for action in parser._actions if action.dest == "verb")
    assert set(verbs) == set(cli.VERBS)
    for verb in cli.VERBS:
        assert re.search(rf"\n    {verb}\s", parser.format_help())
        module = __import__(f"linformer_hf.{cli.VERBS[verb].module}", fromlist=[verb])
        taken = inspect.signature(getattr(module, verb)).parameters
        assert verb in cli.RECIPE_VERBS or set(marks(cli.VERBS[verb].options)) <= set(taken)


@pytest.mark.parametrize("name", ["projection_type", "projection_sharing"])
def test_convert_offers_every_projection(name):
    (verbs,) = (action.choices for action in cli.build_parser()._actions if action.dest == "verb")
    (option,) = (action for action in verbs["convert"]._actions if action.dest == name)
    hint = LinformerConfig.__annotations__[name]
    words = {word for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for word in get_args(kind)}
    assert set(option.choices) == words


def test_python_m_lists_the_verbs_and_torchs_threads_sleep_when_they_wait():
    command = [sys.executable, "-X", "importtime", "-m", "linformer_hf", "--help"]
    environment = {**os.environ, "OMP_DISPLAY_ENV": "TRUE"}  # libgomp then says what it has read
    environment.pop("OMP_WAIT_POLICY", None)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG, env=environment)
    if "OPENMP DISPLAY ENVIRONMENT" in ran.stderr:
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in ran.stderr
    assert ran.returncode == 0, ran.stderr[-2000:]
    verbs = (*cli.RECIPE_VERBS, "demo", "convert", "reproduce", "push")
    for verb in verbs:
        assert re.search(rf"\n    {verb}\s", ran.stdout)
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "linformer_hf.cli" in imported
    assert not imported & {
        f"linformer_hf.{name}" for name in (*(verb.module for verb in cli.VERBS.values()), "utils.files", "data")
    }


def test_json_is_one_line_on_stdout_and_quiet_is_where_the_results_are(tmp_path, capfd, monkeypatch):
    (tmp_path / "results.json").write_text('{"verb": "spectrum",\n "a": 1}', encoding="utf-8")

    def run(recipe, overrides):
        print("progress")
        print("a bar", file=sys.stderr)
        subprocess.run([sys.executable, "-c", "print('of a child')"], check=True)
        return tmp_path

    monkeypatch.setattr(cli.importlib, "import_module", lambda *_: type("Module", (), {"spectrum": staticmethod(run)}))
    assert cli.main(["spectrum", "r.yaml", "--json"]) == 0
    printed = capfd.readouterr()
    assert printed.out == '{"verb": "spectrum", "a": 1}\n'
    assert {"progress", "of a child"} <= set(printed.err.splitlines())
    assert cli.main(["spectrum", "--quiet", "r.yaml"]) == 0
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == (f"{tmp_path}\n", "")
    assert stopped("spectrum", "r.yaml", "--quiet", "--json") == 2
