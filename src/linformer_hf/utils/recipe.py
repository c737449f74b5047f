"""YAML recipes -> typed arguments. An unknown key or a value of the wrong type is an error that says what to write.

A recipe is one YAML file = one run. Its sections are dataclasses (`LinformerConfig`, `TrainingArguments`, our own);
`section.key=value` on the command line is applied over the file and checked in the same way.

PyYAML reads YAML 1.1, in which `2e-5` is text, `no` and `off` are truth values, and 010 is 8. Here these are read as in
YAML 1.2: JSON's numbers, `true` and `false`. A number that was quoted is refused rather than guessed at.
"""

import dataclasses
import difflib
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from huggingface_hub.errors import StrictDataclassError

from .files import record
from .places import ACCESS_TOKEN


# Fields of TrainingArguments that a run's folder cannot keep its promises with.
_REFUSED = {
    "hub_token": "would be written into recipe.json and results.json; run `hf auth login`, or set HF_TOKEN, instead",
    "push_to_hub": "would send the folder before results and model card are in it; run `linformer-hf push FOLDER "
    "USER/NAME` when the run is finished",
    "dataloader_drop_last": "would drop rows of the validation and test files too, and judge the model by the rest; "
    "leave it out",
    "prediction_loss_only": "would leave the run without its metrics; leave it out",
    "batch_eval_metrics": "would ask for metrics batch by batch, which are no means of the rows'; leave it out",
    "label_names": "would tell Trainer of other labels than the collator makes; names of classes are data.label_names",
}


class RecipeError(ValueError):
    """A recipe that cannot be run as it is written."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers and truth values and without silently doubled keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before `<<: *name` is filled in, which may be overridden
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise RecipeError(f"line {line}: the key {key.value!r} is given twice; keep one.")
                seen.add((key.tag, key.value))
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)  # PyYAML's takes 010 for 8


_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].removeprefix(_TAG) not in (*_PLAIN, "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _PLAIN.items():  # ints before floats, of which they are some
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)


@dataclasses.dataclass
class Recipe:
    """A checked recipe.

    Attributes:
        raw: section -> what the file and the command line say, JSON-able.
        types: section -> the dataclass it builds, or `list[dataclass]`.
        name: the file's name, for messages.
    """

    raw: dict[str, Any]
    types: dict[str, Any]
    name: str

    def values(self, section: str) -> dict[str, Any]:
        """The keys of a section as written (an empty dict if the recipe does not have it)."""
        return dict(self.raw.get(section) or {})

    def values_of_list(self, section: str) -> list[dict[str, Any]]:
        """The entries of a section that is a list, as written."""
        return list(self.raw.get(section) or [])

    def build(self, section: str, **changes: Any) -> Any:
        """The section as an instance of its dataclass, with `changes` over the written values.

        Raises:
            RecipeError: the dataclass refuses the values.
        """
        hint = self.types[section]
        if get_origin(hint) is list:
            return _build(hint, self.raw.get(section) or [], section)
        return _build(hint, {**self.values(section), **changes}, section)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, sections: Mapping[str, Any], built: Sequence[str] = ()
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file in UTF-8.
        overrides: `section.key=value`; lists, mappings and quoted text are read as YAML.
        sections: section name -> dataclass, or `list[dataclass]`.
        built: sections that are built once now, so that a value which their dataclass refuses is refused here.

    Raises:
        RecipeError: no such file, broken YAML, an unknown section or key, a wrong type; the message names the nearest
            valid key.
    """
    raw = _read(Path(path), sections)
    for override in overrides:
        _override(raw, override, sections)
    for section, hint in sections.items():
        if raw.get(section) is None:
            raw[section] = [] if get_origin(hint) is list else {}
        _check_no_token(raw[section], section)
        check_type(raw[section], hint, section)
    recipe = Recipe(raw, dict(sections), str(path))
    for section in built:
        recipe.build(section)
    return recipe


def _read(path: Path, sections: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader: plain data only
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(f"{path}: there is no such recipe file.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold the sections {', '.join(sections)}, not {_kind(content)}.")
    for section in content:
        if section not in sections:
            raise RecipeError(f"{path}: unknown section {section!r}. {_nearest(str(section), sections)}")
    return content


def same_recipe(found: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> bool:
    """Whether a results file's recipe says what is asked. Empty sections say nothing: earlier versions had fewer."""
    kept, wanted = ({name: said for name, said in each.items() if said} for each in (found or {}, record(asked)))
    return kept == wanted


def _override(raw: dict[str, Any], override: str, sections: Mapping[str, Any]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"{override!r} is not of the form section.key=value, such as training.max_steps=100.")
    if section not in sections:
        raise RecipeError(f"{override!r}: unknown section {section!r}. {_nearest(section, sections)}")
    if not text.strip():
        raise RecipeError(
            f"{override!r} has no value: null says none, and quotes hold spaces or nothing ({key}='\" \"')."
        )
    try:
        value = _value(text.strip())
    except (yaml.YAMLError, RecipeError) as error:
        raise RecipeError(f"{override!r}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    target = raw.get(section)
    if target is None:
        target = raw[section] = [] if get_origin(sections[section]) is list else {}
    *parents, last = key.split(".")  # data.sources.0.path=... reaches into lists
    for i, part in enumerate([*parents, last]):
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise RecipeError(f"{override!r}: {part!r} is not the number of an entry (0 to {len(target) - 1}).")
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
        else:
            raise RecipeError(f"{override!r}: {'.'.join([section, *parents[:i]])} holds {_kind(target)}, no keys.")
        if i == len(parents):
            target[index] = value
        else:
            target = target[index] if isinstance(target, list) else target.setdefault(index, {})


def _value(text: str) -> Any:
    """A value from the command line: YAML where it begins with a bracket or quote, else one plain scalar as it stands.

    Of `runs/a #3` a whole YAML document would keep `runs/a`, and of `|` nothing.
    """
    if text[0] in "[{\"'":
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    plain = tag.rpartition(":")[2] in ("null", "bool", "int", "float")  # and not YAML's own `=` and `<<`
    return loader.construct_object(yaml.ScalarNode(tag, text)) if plain else text


def fields_of(cls: type) -> dict[str, Any]:
    """Name -> type of every field that a recipe may set (Any where a type is known to type checkers only)."""
    hints: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        names = {**vars(typing), **vars(sys.modules[owner.__module__])}
        for name, hint in inspect.get_annotations(owner).items():
            try:
                hints[name] = eval(hint, names) if isinstance(hint, str) else hint  # our own or transformers' source
            except NameError:
                hints[name] = Any
        # Annotated `str | None` for the sake of transformers' command line; it wants true or false.
        if owner.__name__ == "TrainingArguments":
            hints["fsdp"] = bool | str | None
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.init and not field.name.startswith("_")
    }


def check_type(value: Any, hint: Any, where: str) -> None:
    """Raise a RecipeError unless `value`, as YAML gives it, fits the type `hint`."""
    if hint is Any or _fits(value, hint):
        return
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _check_dataclass(value, hint, where)
        return
    if get_origin(hint) is list and isinstance(value, list):
        for i, item in enumerate(value):
            check_type(item, get_args(hint)[0], f"{where}[{i}]")
        return
    message = f"{where} must be {describe(hint)}, got {_kind(value)} {value!r}."
    if isinstance(value, str) and re.fullmatch(_PLAIN["float"][0], value):
        message += " Write the number without quotes."
    elif isinstance(value, str) and (choices := _choices(hint)):
        message += f" {_nearest(value, [str(c) for c in choices])}"
    raise RecipeError(message)


def _check_no_token(value: Any, where: str, above: tuple[int, ...] = (), seen: set[int] | None = None) -> None:
    """Raise a RecipeError where a value looks like an access token, or holds itself.

    Args:
        above, seen: containers around this one and those that were looked at: YAML's aliases make one stand many times.
    """
    seen = set() if seen is None else seen
    if isinstance(value, str) and ACCESS_TOKEN.search(value):
        raise RecipeError(f"{where} {_REFUSED['hub_token']} (it looks like an access token).")
    if isinstance(value, dict | list):
        if id(value) in above:
            raise RecipeError(f"{where} holds itself, by an alias (*name); write out what it stands for.")
        if id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                _check_no_token(item, f"{where}.{key}", (*above, id(value)), seen)


def _check_dataclass(value: Any, cls: type, where: str) -> None:
    if not isinstance(value, dict):
        raise RecipeError(f"{where} must be a mapping of keys to values, got {_kind(value)} {value!r}.")
    fields = fields_of(cls)
    for key, item in value.items():
        if key not in fields:
            raise RecipeError(f"unknown key {f'{where}.{key}'!r}. {_nearest(str(key), fields)}")
        if where.endswith("training") and key in _REFUSED and item not in (None, False):
            raise RecipeError(f"{where}.{key} {_REFUSED[key]}.")
        check_type(item, fields[key], f"{where}.{key}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.init and field.name not in value:
            raise RecipeError(f"{where}.{field.name} is missing; it must be {describe(fields[field.name])}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value fits a plain type; False for whatever needs a closer look (dataclasses, lists of them)."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, (get_args(hint) or (Any,))[0]) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if hint in (str, bool, list):
        return isinstance(value, hint)
    return False


def _build(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is list:
        return [_build(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not dataclasses.is_dataclass(hint):
        return value
    fields = fields_of(typing.cast(type, hint))
    built = {key: _build(fields[key], item, f"{where}.{key}") for key, item in value.items()}
    try:
        return typing.cast(type, hint)(**built)
    except (ValueError, TypeError, ImportError, StrictDataclassError) as error:
        raise RecipeError(f"section {where!r}: {error.__cause__ or error}") from error


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [member.value for member in hint]
    return [choice for option in get_args(hint) for choice in _choices(option)]


def describe(hint: Any) -> str:
    """A type in words: `int or null`, `one of linear, fixed`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in get_args(hint)))
    if choices := _choices(hint):
        return "one of " + ", ".join(map(str, choices))
    if hint is None or hint is type(None):
        return "null"
    if origin is list:
        return f"a list of {describe(get_args(hint)[0])}"
    names = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        dict: "a mapping",
        list: "a list",
    }
    return names.get(origin or hint, "a mapping" if dataclasses.is_dataclass(hint) else str(hint))


def _kind(value: Any) -> str:
    kinds = {bool: "the truth value", str: "the text", int: "the integer", float: "the number", list: "the list"}
    return kinds.get(type(value), "the mapping" if isinstance(value, dict) else "the value")


def _nearest(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Valid: {', '.join(sorted(valid))}."
