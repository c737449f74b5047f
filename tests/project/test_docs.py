"""README and docs/: every code block is run or read by what it is for, and the site is built strictly."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, get_origin

import pytest
import torch
import yaml
from reference import add_noise, tiny_model

import linformer_hf
from helpers import PAGES, READERS, ROOT, accept, blocks, commands, path_of, setup_cfg
from linformer_hf import cli
from linformer_hf.benchmark import preparing
from linformer_hf.conversion.convert import convert_model
from linformer_hf.conversion.huggingface import read_source
from linformer_hf.hub.export import export
from linformer_hf.hub.sentence_head import pooled
from linformer_hf.utils.recipe import RecipeError, check_type, fields_of


ALONE = {"docs/guides/ecosystem.md"}  # pages that promise that each Python block runs by itself
LANGUAGES = {"python", "bash", "yaml", "json", "diff"}
# Programs of others, whose arguments nothing here knows.
FOREIGN = {"hf", "source", "pytest", "tensorboard", "trackio"}
SCRIPTS = {"run_mlm.py", "run_glue.py", "run_classification.py"}  # test_example_scripts.py runs these blocks
PLACEHOLDER = "RECIPE.yaml"
# In blocks that take many minutes as they stand.
SHORTER = {"max_steps=30": "max_steps=1", "range(8)": "range(1)", "in web if": "in list(web)[:4000] if"}
RECIPES = {"pretrain": "configs/pretrain/tiny-cpu.yaml", "finetune": "configs/finetune/local-files.yaml"}


@pytest.mark.parametrize("page", PAGES, ids=path_of)
def test_every_block_has_a_language_that_is_tested(page):
    for language, line, _ in blocks(page):
        assert language in LANGUAGES, f"{path_of(page)}:{line}: {language!r}"


@pytest.fixture(scope="module")
def stand_ins(tiny_source, tokenizers, texts, tmp_path_factory):
    """Name in the documentation -> a small folder like it, with N = 512 and K = 128 where it is converted."""
    source = tiny_source(max_position_embeddings=512)
    head = pooled("mean", 24)
    head.write(source, 256)
    model = convert_model(read_source(str(source)), projected_length=128, length_correction=True)
    add_noise(model)
    long = convert_model(read_source(str(source)), max_length=4096, projected_length=256, length_correction=True)
    folders = {".cache/all-MiniLM-L6-v2": source, "my-texts": texts}
    sizes = {"vocab_size": len(tokenizers["wordpiece"]), "max_position_embeddings": 512, "projected_length": 128}
    for names, saved in (
        (("runs/convert/minilm-512-k128", "my-linformer", "runs/finetune/bible-pairs"), model),
        (("runs/convert/minilm-4096",), long),
        (("runs/demo/pretrained", "runs/mine"), tiny_model(linformer_hf.LinformerForMaskedLM, **sizes)),
        (("runs/tuned",), tiny_model(linformer_hf.LinformerForSequenceClassification, **sizes)),
    ):
        folder = tmp_path_factory.mktemp("stand-in")
        saved.save_pretrained(folder)
        tokenizers["wordpiece"].save_pretrained(folder)
        if saved in (model, long):
            head.write(folder, saved.config.max_position_embeddings)
        folders |= dict.fromkeys(names, folder)
    return folders


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=path_of)
def test_python_blocks_run_in_order(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(block for _, _, block in blocks(page, "python"))
    for name, folder in stand_ins.items():
        if name in text:
            shutil.copytree(folder, tmp_path / name)
    if "model.onnx" in text:  # a bash block before it makes it
        export("runs/convert/minilm-512-k128")
    namespace = {}
    for _, line, block in blocks(page, "python"):
        torch.manual_seed(0)
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        code = compile("\n" * line + block, str(page), "exec")  # errors name the page and its line
        exec(code, {} if path_of(page) in ALONE else namespace)


@pytest.mark.parametrize("words", commands())
def test_commands_are_what_the_programs_take(words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = words
    if program == "linformer-hf":
        check_verb(arguments, tmp_path, monkeypatch)
    elif program in ("torchrun", "accelerate"):
        place = next(i for i, word in enumerate(arguments) if word.endswith(".py") or word == "linformer_hf")
        program, *rest = arguments[place:]
        assert program == "linformer_hf" or (ROOT / program).exists()
        check_verb(rest if program == "linformer_hf" else [Path(program).stem, *rest], tmp_path, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(" ".join(targets).split())
    elif program == "pip":
        extras = {extra for word in arguments for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")}
        assert extras <= set(setup_cfg()["options.extras_require"])
    elif arguments[:1] == ["scripts/preparing.py"]:
        preparing.parser().parse_args(arguments[1:])
    elif arguments[:2] == ["-m", "linformer_hf.benchmark.budget"]:
        assert all((ROOT / folder / "results.json").exists() for folder in arguments[2:])
    elif program == "python":
        assert Path(arguments[0]).name in SCRIPTS
    else:
        assert program in FOREIGN, f"nothing checks {program!r}"


def check_verb(arguments, output, monkeypatch):
    """As the command line reads it, up to the call of the verb."""
    if "--help" in arguments:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(arguments)
        return
    seen = []
    monkeypatch.setattr(cli, "_run", seen.append)
    assert cli.main(arguments) == 0
    (options,) = seen
    if options.verb == "reproduce":
        accept("reproduce", f"configs/reproduce/{options.scale}.yaml", options.overrides, output)
    elif options.verb in cli.RECIPE_VERBS:
        path = RECIPES[options.verb] if options.recipe == PLACEHOLDER else options.recipe
        accept(options.verb, path, options.overrides, output)


def section_problem(content: dict, sections: dict) -> str | None:
    """What a verb has against a part of a recipe; keys may be missing in it."""
    if not set(content) <= set(sections):
        return f"it has no section {', '.join(set(content) - set(sections))}"
    for section, values in content.items():
        try:
            if get_origin(sections[section]) is list:
                check_type(values, sections[section], section)
                continue
            fields = fields_of(sections[section])
            for key, value in values.items():
                if key not in fields:
                    return f"{section} has no key {key}"
                check_type(value, fields[key], f"{section}.{key}")
        except RecipeError as error:
            return str(error)
    return None


def module_of(verb):
    return sys.modules[f"linformer_hf.{cli.VERBS[verb].module}"]


YAML = [pytest.param(text, id=f"{path_of(page)}:{line}") for page in PAGES for _, line, text in blocks(page, "yaml")]


@pytest.mark.parametrize("text", YAML)
def test_yaml_blocks_are_parts_of_recipes(text):
    content = yaml.safe_load(text)
    problems = {verb: section_problem(content, module_of(verb).SECTIONS) for verb in READERS}
    assert None in problems.values(), problems


def test_a_wrong_yaml_block_is_refused():
    assert section_problem({"training": {"max_stepz": 1}}, linformer_hf.training.pretrain.SECTIONS)
    assert section_problem({"data": {"sources": "x"}}, linformer_hf.training.pretrain.SECTIONS)
    assert section_problem({"modle": {}}, linformer_hf.training.pretrain.SECTIONS)


def after(hunk: str) -> str:
    """What a hunk leaves in the file: added lines and those around them."""
    return "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[:1] in ("+", " "))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "diff")], ids=lambda page: page.name)
def test_diff_blocks_show_what_the_files_hold(page):
    """Shortened by leaving hunks out, never by changing one."""
    for _, line, text in blocks(page, "diff"):
        for path, hunks in re.findall(r"^\+\+\+ (\S+)\n((?:(?!\+\+\+ ).*\n)+)", text, re.MULTILINE):
            content = (ROOT / path).read_text(encoding="utf-8")
            for hunk in filter(None, re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)):
                assert after(hunk) in content, f"{page.name}:{line}: {path} does not hold\n{after(hunk)}"


def test_json_blocks_are_json():
    assert all(isinstance(json.loads(text), dict) for page in PAGES for _, _, text in blocks(page, "json"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING -" not in built.stderr
    return folder


needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install '.[docs]'")


@needs_mkdocs
def test_site_is_built_strictly_and_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        for tag in re.findall(r"<(?:link|script|img)\b[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag), f"{page.relative_to(site)}: {tag}"


@needs_mkdocs
def test_references_hold_every_option_and_key(site):
    def text(page):
        return re.sub(r"<[^>]+>", "", (site / "reference" / page / "index.html").read_text(encoding="utf-8"))

    parser = cli.build_parser()
    for verb, command in next(action for action in parser._actions if action.dest == "verb").choices.items():
        assert f"linformer-hf {verb}" in text("command-line")
        for option in (name for action in command._actions for name in action.option_strings if name[:2] == "--"):
            assert option in text("command-line")
    for name, hint in linformer_hf.LinformerConfig.__annotations__.items():
        assert name in text("configuration") or get_origin(hint) is ClassVar
    for verb in READERS:
        for hint in module_of(verb).SECTIONS.values():
            if getattr(hint, "__module__", "").startswith("linformer_hf."):
                assert {key for key in fields_of(hint) if key in hint.__annotations__} <= set(
                    re.findall(r"\w+", text("recipes"))
                )
    assert "share of documents that are held out." in text("recipes")  # from the docstring of PretrainingData
    assert "resize_position_embeddings" in text("python")
