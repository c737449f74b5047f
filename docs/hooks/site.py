"""The pages of the site that nobody writes: the references, from the code, and what lies outside docs/ in the checkout.

mkdocs calls the functions whose names begin with on_.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

import linformer_hf
from linformer_hf import cli
from linformer_hf.utils.options import help_texts
from linformer_hf.utils.recipe import describe, fields_of


ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Example):$", re.MULTILINE)
# A line of `Args:`: names, perhaps with types in brackets as transformers writes them, then the text.
ARGUMENTS = re.compile(r"^(?P<names>\w+(?:, \w+)*)(?: \([^\n]*\))?:(?P<text>.*(?:\n(?:    .*|\s*)$)*)", re.MULTILINE)
TRAINING_ARGUMENTS = (
    "transformers' own [`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer), key for "
    "key. Refused: `hub_token` and `push_to_hub` (see [Publish](../guides/publish.md))."
)
BERT = "[`BertConfig`](https://huggingface.co/docs/transformers/model_doc/bert)"


def on_files(files: Files, config: Any) -> Files:
    pages = {
        "reference/command-line.md": command_line(),
        "reference/recipes.md": recipes(),
        "reference/configuration.md": configuration(),
        "reference/python.md": python(),
        "reports/benchmark/index.md": benchmark_index(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    # Under another name: in mkdocs README.md is a folder's index, and index.md is there.
    files.append(File.generated(config, "readme.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    outside = [
        "CITATION.cff",
        "LICENSE",
        *(path.name for path in sorted(ROOT.glob("*.md")) if path.name != "README.md"),
    ]
    for pattern in ("*.md", "*.png"):
        outside += [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "reports").rglob(pattern))]
    for path in outside:
        file = File(path, str(ROOT), config.site_dir, config.use_directory_urls)
        file.inclusion = InclusionLevel.NOT_IN_NAV  # may be in the navigation; pages of docs/ must
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the checkout, to where the pages are in the site: docs/ is its root."""
    path = page.file.src_uri
    if path == "readme.md" or (page.file.src_dir == str(ROOT) and "/" not in path):
        markdown = markdown.replace("](docs/", "](").replace("](README.md", "](readme.md")
    elif page.file.src_dir == str(ROOT / "docs"):
        up = "../" * path.count("/")
        markdown = markdown.replace(f"](../{up}README.md", f"]({up}readme.md").replace(f"](../{up}", f"]({up}")
    return re.sub(r"\]\(((?:\.\./)*reports/[\w/]+)/\)", r"](\1/index.md)", markdown)


def command_line() -> str:
    """Every verb, its usage and its options."""
    parser = cli.build_parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line", "Made from the parser itself; `linformer-hf VERB --help` prints the same."]
    summaries = {action.dest: action.help for action in verbs._choices_actions}
    parts.append(table(("verb", "what it does"), [(f"[`{verb}`](#{verb})", summaries[verb]) for verb in verbs.choices]))
    for verb, command in verbs.choices.items():
        usage = re.sub(r"\s*\n\s*", "\n    ", command.format_usage().removeprefix("usage: ").strip())
        text = command.description.rstrip(".")
        parts += [f"## {verb}", f"{text[0].upper()}{text[1:]}.", f"```text\n{usage}\n```"]
        rows = [
            (name_of(action), help_of(command, action))
            for action in command._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        parts.append(table(("argument", "what it is"), rows))
    return "\n\n".join(parts) + "\n"


def name_of(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"`{value}`"
    return f"`{action.option_strings[-1]}{'' if action.nargs == 0 else f' {value}'}`"


def help_of(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = command._get_formatter()._expand_help(action) if action.help else ""
    if action.dest == "recipe":
        return "[recipe](recipes.md), one YAML file"
    if action.dest == "overrides":
        return "changes to the recipe, for this run"
    return f"{text} (required)" if action.required and action.option_strings else text


def recipes() -> str:
    """Every section of every verb's recipe."""
    parts = [
        "# Recipes",
        "One YAML file is one run. Its sections are the dataclasses below; `section.key=value` on the command line "
        "changes a key, and `data.sources.0.path=...` reaches into a list. Made from the code.",
    ]
    shown: dict[type, str] = {}
    for verb in (*cli.RECIPE_VERBS, "reproduce"):
        parts += [f"## {verb}"]
        for section, hint in importlib.import_module(f"linformer_hf.{cli.VERBS[verb].module}").SECTIONS.items():
            inner = next(dataclasses_in(hint))
            parts.append(f"### Section `{section}` {{ #{verb}-{section} }}")
            if typing.get_origin(hint) is list:
                parts.append("A list of entries.")
            if inner.__module__.startswith("transformers"):
                parts.append(TRAINING_ARGUMENTS)
            elif inner in shown:
                parts.append(f"As [in {shown[inner].replace('-', ', section ')}](#{shown[inner]}).")
            else:
                shown[inner] = f"{verb}-{section}"
                parts += section_text(inner)
                for nested in nested_in(inner):
                    parts += [f"#### An entry of kind {nested.__name__}", *section_text(nested)]
    return "\n\n".join(parts) + "\n"


def section_text(cls: type) -> list[str]:
    text = re.sub(r"^Section `\w+`[^.]*\.\s*", "", introduction(cls))  # the heading has said it
    if issubclass(cls, linformer_hf.LinformerConfig):
        own = "".join(f"\n- {name}: {kind}" for name, kind, *_ in rows_of(cls, only_own=True))
        return [f"{text}\n\nThe fields of [LinformerConfig](configuration.md), and:\n{own}"]
    return [text, table(("key", "type", "default", "what it is"), rows_of(cls))]


def dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from dataclasses_in(argument)


def nested_in(cls: type) -> list[type]:
    return [nested for hint in fields_of(cls).values() for nested in dataclasses_in(hint)]


def configuration() -> str:
    cls = linformer_hf.LinformerConfig
    described = documented(cls)
    rows = rows_of(cls, only_own=True)
    head = ("field", "type", "default", "what it is")
    return "\n\n".join(
        [
            "# Configuration",
            introduction(cls) + " Made from the code.",
            "## What BERT does not have",
            table(head, [row for row in rows if row[0].strip("`") in described]),
            "## As in BERT",
            f"These mean what they mean in {BERT}.",
            table(head[:3], [row[:3] for row in rows if row[0].strip("`") not in described]),
            "Every other field of transformers' `PreTrainedConfig` (`id2label`, `problem_type`, ...) works as well.\n",
        ]
    )


def python() -> str:
    """Directives that mkdocstrings replaces by signatures and docstrings."""
    functions = [
        "linformer_hf.conversion.convert.convert",
        "linformer_hf.conversion.convert.convert_model",
        "linformer_hf.conversion.huggingface.read_source",
    ]
    verbs = ("pretrain", "finetune", "distill", "embed", "export", "push")
    functions += [f"linformer_hf.{cli.VERBS[verb].module}.{verb}" for verb in verbs]
    parts = [
        "# Python",
        "`import linformer_hf` registers the family with the Auto classes; most programs need nothing else. The heads "
        + ", ".join(f"`{name}`" for name in linformer_hf.__all__ if "For" in name)
        + " take what BERT's heads take; [LinformerConfig](configuration.md) has a page of its own.",
        "::: linformer_hf.LinformerPreTrainedModel.resize_position_embeddings",
        *(f"::: {name}{arguments(name.rpartition('.')[2])}" for name in functions),
    ]
    return "\n\n".join(parts) + "\n"


def arguments(verb: str) -> str:
    """A table of what a verb takes, in place of its signature, which is made at run time from its options."""
    if verb not in cli.VERBS or verb in cli.RECIPE_VERBS:
        return ""
    texts, rows = help_texts(cli.VERBS[verb].options), []
    for name, one in inspect.signature(getattr(linformer_hf, verb)).parameters.items():
        default = "required" if one.default is one.empty else f"`{one.default!r}`"
        rows.append((f"`{name}`", f"`{inspect.formatannotation(one.annotation)}`", default, texts.get(name, "")))
    listed = table(("argument", "type", "default", "what it is"), rows)
    return f"\n    options: {{show_signature: false}}\n\n{listed}"


def benchmark_index() -> str:
    names = sorted(path.parent.name for path in (ROOT / "reports" / "benchmark").glob("*/tables.md"))
    lines = [f"- [{name}]({name}/tables.md): `linformer-hf benchmark configs/benchmark/{name}.yaml`" for name in names]
    return "\n".join(["# Time and memory", "", "The tables of each recipe, as it wrote them.", "", *lines]) + "\n"


def introduction(cls: type) -> str:
    """What the docstring says before its sections."""
    return SECTION.split(inspect.getdoc(cls) or "")[0].strip()


def documented(cls: type) -> dict[str, str]:
    """Name -> text of `Args:`."""
    pieces = SECTION.split(inspect.getdoc(cls) or "")
    if "Args" not in pieces:
        return {}
    found = {}
    for match in ARGUMENTS.finditer(textwrap.dedent(pieces[pieces.index("Args") + 1])):
        names, text = match["names"].split(", "), " ".join(match["text"].split())
        if len(names) > 1:
            text = f"{', '.join(f'`{name}`' for name in names)}: {text}"
        found |= {names[0]: text, **dict.fromkeys(names[1:], f"see `{names[0]}`")}
    return found


def rows_of(cls: type, only_own: bool = False) -> list[tuple[str, str, str, str]]:
    """Key, type, default and text of every field."""
    texts, hints = documented(cls), fields_of(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.name in hints and (not only_own or field.name in inspect.get_annotations(cls)):
            kind = describe(hints[field.name]).replace("one of ", "").replace("list of a mapping", "list of entries")
            rows.append((f"`{field.name}`", kind, default_of(field), texts.get(field.name, "")))
    return rows


def default_of(field: dataclasses.Field) -> str:
    """As YAML has it."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`".replace(
        "None", "null"
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
