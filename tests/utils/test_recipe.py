"""Recipes: what YAML means here, what is refused, and with which words."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from linformer_hf.data.documents import PretrainingData
from linformer_hf.data.tasks import TaskData
from linformer_hf.training.pretrain import ModelSection
from linformer_hf.utils.recipe import RecipeError, check_type, describe, fields_of, load_recipe, same_recipe


@dataclass
class Part:
    path: str
    share: float = 1.0


@dataclass
class Section:
    rate: float = 0.1
    steps: int = 1
    name: str | None = None
    kind: Literal["linear", "fixed", "conv"] = "linear"
    flag: bool = False
    parts: list[Part] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}.")


SECTIONS = {"main": Section, "entries": list[Part]}


@pytest.fixture
def load(tmp_path):
    def load_text(text: str | bytes, *overrides: str, sections=SECTIONS):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides, sections=sections)

    return load_text


def refused(load, text, *overrides, **kwargs) -> str:
    with pytest.raises(RecipeError) as error:
        load(text, *overrides, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2e-5", 2e-5),
        ("1.0e-6", 1e-6),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("+4.", 4.0),
        ("6.02e+23", 6.02e23),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("3", 3),
        ("0.1", 0.1),
    ],
)
def test_numbers_are_read_as_in_json(load, written, expected):
    for recipe in (load(f"main: {{rate: {written}}}"), load("", f"main.rate={written}")):
        value = recipe.build("main").rate
        assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("written", "expected"),
    [("010", 10), ("-08", -8), ("0x1F", 31), ("0o17", 15), ("+3", 3), ("true", True), ("FALSE", False)],
)
def test_integers_and_truth_values_are_those_of_yaml_1_2(load, written, expected):
    for recipe in (load(f"main: {{more: {{x: {written}}}}}"), load("", f"main.more={{x: {written}}}")):
        value = recipe.build("main").more["x"]
        assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize("text", ["no", "Yes", "on", "OFF", "y", "1:30", "1_000", "0b11", "2026-11-27"])
def test_what_yaml_1_1_takes_for_something_else_is_text(load, text):
    assert load(f"main: {{name: {text}}}").build("main").name == text
    assert load("", f"main.name={text}").build("main").name == text
    assert refused(load, f"main: {{flag: {text}}}") == f"main.flag must be true or false, got the text {text!r}."


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_comes_back(tmp_path_factory, number):
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text(f"main: {{rate: {number!r}, shares: [{number!r}]}}", encoding="utf-8")
    section = load_recipe(path, sections=SECTIONS).build("main")
    assert section.rate == number
    assert section.shares == [number]
    assert math.copysign(1, section.rate) == math.copysign(1, number)
    assert load_recipe(path, [f"main.rate={number!r}"], sections=SECTIONS).build("main").rate == number


@pytest.mark.parametrize("text", ["1_0e", "e5", "2e-5x", "1.2.3", "0x"])
def test_what_only_looks_like_a_number_is_text(load, text):
    assert load(f"main: {{name: {text}}}").build("main").name == text


@pytest.mark.parametrize("number", ["2e-5", "3", "0.5", "1.0e-6"])
def test_quoted_numbers_are_refused(load, number):
    message = refused(load, f"main: {{rate: '{number}'}}")
    assert message == f"main.rate must be a number, got the text '{number}'. Write the number without quotes."


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rate", "fast", "main.rate must be a number, got the text 'fast'."),
        ("rate", "true", "main.rate must be a number, got the truth value True."),
        ("steps", "1.0", "main.steps must be an integer, got the number 1.0."),
        ("steps", "true", "main.steps must be an integer, got the truth value True."),
        ("steps", "null", "main.steps must be an integer, got the value None."),
        ("name", "3", "main.name must be text or null, got the integer 3."),
        ("flag", "1", "main.flag must be true or false, got the integer 1."),
        ("shares", "0.5", "main.shares must be a list of a number, got the number 0.5."),
        ("shares", "[0.5, x]", "main.shares[1] must be a number, got the text 'x'."),
        ("parts", "{path: x}", "main.parts must be a list of a mapping, got the mapping {'path': 'x'}."),
        ("parts", "[x]", "main.parts[0] must be a mapping of keys to values, got the text 'x'."),
        ("more", "[1]", "main.more must be a mapping, got the list [1]."),
        ("kind", "liner", "main.kind must be one of linear, fixed, conv, got the text 'liner'. Did you mean 'linear'?"),
        ("kind", "1", "main.kind must be one of linear, fixed, conv, got the integer 1."),
    ],
)
def test_wrong_types_are_refused_in_words(load, key, value, wanted):
    assert refused(load, f"main: {{{key}: {value}}}") == wanted
    assert refused(load, "", f"main.{key}={value}") == wanted


def test_a_section_that_is_no_mapping_is_refused(load):
    assert refused(load, "main: [1]") == "main must be a mapping of keys to values, got the list [1]."
    assert refused(load, "entries: {path: x}").startswith("entries must be a list of a mapping, got the mapping")


def test_unknown_keys_get_the_nearest_hint(load):
    assert refused(load, "main: {stepz: 1}") == "unknown key 'main.stepz'. Did you mean 'steps'?"
    assert refused(load, "", "main.stepz=1") == "unknown key 'main.stepz'. Did you mean 'steps'?"
    message = refused(load, "main: {zzz: 1}")
    assert message == "unknown key 'main.zzz'. Valid: flag, kind, more, name, parts, rate, shares, steps."
    assert "unknown key 'main.parts[1].pat'. Did you mean 'path'?" in refused(
        load, "main: {parts: [{path: a}, {path: b, pat: c}]}"
    )


def test_unknown_sections_get_the_nearest_hint(load):
    assert "recipe.yaml: unknown section 'mian'. Did you mean 'main'?" in refused(load, "mian: {}")
    assert refused(load, "", "mian.steps=1") == "'mian.steps=1': unknown section 'mian'. Did you mean 'main'?"
    assert "unknown section 1." in refused(load, "1: {}")


def test_a_required_key_that_is_missing_is_named(load):
    assert refused(load, "main: {parts: [{share: 1}]}") == "main.parts[0].path is missing; it must be text."
    assert refused(load, "entries: [{}]") == "entries[0].path is missing; it must be text."


def test_doubled_keys_are_refused(load):
    message = refused(load, "main:\n  steps: 1\n  rate: 2\n  steps: 3\n")
    assert "recipe.yaml: line 4: the key 'steps' is given twice; keep one." in message
    assert "'main' is given twice" in refused(load, "main: {}\nmain: {}\n")
    assert "'a' is given twice" in refused(load, "", "main.more={a: 1, a: 2}")


def test_nested_dataclasses_are_built(load):
    recipe = load("main: {parts: [{path: a}, {path: b, share: 2e-1}]}\nentries: [{path: c}]")
    assert recipe.build("main").parts == [Part("a"), Part("b", 0.2)]
    assert recipe.build("entries") == [Part("c")]
    assert recipe.values_of_list("entries") == [{"path": "c"}]
    assert load("").build("entries") == []


def test_overrides_go_over_the_file(load):
    text = "main: {steps: 1, rate: 0.5, more: {a: {b: 1}}, parts: [{path: a}, {path: b}]}"
    overrides = ["main.steps=2", "main.steps=3", "main.name=x=y", "main.parts.1.path=c", "main.more.a.b=2"]
    section = load(text, *overrides, "main.shares=[1, 2e-1]", "main.more.new.key=null").build("main")
    assert (section.steps, section.rate, section.name, section.shares) == (3, 0.5, "x=y", [1, 0.2])
    assert section.parts == [Part("a"), Part("c")]
    assert section.more == {"a": {"b": 2}, "new": {"key": None}}


def test_overrides_make_sections_that_the_file_lacks(load):
    assert load("", "main.steps=4").build("main").steps == 4
    assert load("main:\n", "main.name=null").build("main").name is None
    assert load("entries: [{path: a}]", "entries.0.path=x").build("entries") == [Part("x")]


@pytest.mark.parametrize(
    "text", ["outs/exp #3", "|", ">", ",", "a: b", "- a", "*a", "&a", "!a", "%", "@x", "a [b]", "=", "<<"]
)
def test_text_on_the_command_line_stands_as_it_is(load, text):
    assert load("", f"main.name={text}").build("main").name == text
    assert load("", f"main.name= {text} ").build("main").name == text
    assert load("", f'main.name="{text} "').build("main").name == f"{text} "


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("main.name=", "has no value: null says none, and quotes hold spaces or nothing"),  # as of a variable not set
        ("main.name= ", "has no value"),
        ("steps=3", "is not of the form section.key=value, such as training.max_steps=100."),
        ("main.steps", "is not of the form section.key=value"),
        ("main.=3", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("main.steps=[1", "the value is not valid YAML"),
        ("main.parts.2.path=x", "'2' is not the number of an entry (0 to 1)."),
        ("main.parts.-1.path=x", "'-1' is not the number of an entry (0 to 1)."),
        ("main.parts.first.path=x", "'first' is not the number of an entry (0 to 1)."),
        ("main.steps.x=1", "main.steps holds the integer, no keys."),
    ],
)
def test_bad_overrides_are_refused(load, override, wanted):
    message = refused(load, "main: {steps: 1, parts: [{path: a}, {path: b}]}", override)
    assert message.startswith(f"{override!r}")
    assert wanted in message


@pytest.mark.parametrize(("content", "kind"), [("[1, 2]", "the list"), ("text", "the text"), ("3", "the integer")])
def test_a_file_that_is_no_mapping_is_refused(load, content, kind):
    assert f"recipe.yaml must hold the sections main, entries, not {kind}." in refused(load, content)


def test_an_empty_file_is_all_defaults(load):
    assert load("").build("main") == Section()
    assert load("# nothing\nmain:\n").build("main") == Section()
    assert load("").values("main") == {}


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="there is no such recipe file") as error:
            load_recipe(path, sections=SECTIONS)
        assert str(path) in str(error.value)


def test_text_that_is_not_utf8_is_named(load):
    assert "recipe.yaml is not UTF-8 text: " in refused(load, "main: {name: Zoë}".encode("latin-1"))


@pytest.mark.parametrize(
    "text",
    ["main: {steps: 1", "main:\n\tsteps: 1", "main: [}", "main: !!python/name:os.system {}", "a: *b", "{[1]: 2}"],
)
def test_broken_yaml_is_refused_in_one_line(load, text):
    message = refused(load, text)
    assert "recipe.yaml is not valid YAML: " in message
    assert "\n" not in message


def test_merged_keys_may_be_overridden(load):
    recipe = load("main: {more: {a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}}")
    assert recipe.build("main").more == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_what_a_section_refuses_carries_its_name(load):
    recipe = load("main: {steps: -1}")
    with pytest.raises(RecipeError, match=r"^section 'main': steps must not be negative, got -1\.$"):
        recipe.build("main")
    with pytest.raises(RecipeError, match=r"^section 'main': steps must not be negative, got -2\.$"):
        load("").build("main", steps=-2)


def test_changes_go_over_what_is_written(load):
    recipe = load("main: {steps: 3, rate: 0.5}")
    assert recipe.build("main", steps=4) == Section(steps=4, rate=0.5)
    assert recipe.build("main").steps == 3


def test_the_real_sections_refuse_in_their_own_words(load):
    sections = {"model": ModelSection, "data": PretrainingData, "training": TrainingArguments}
    head = "data: {sources: [{kind: files, path: x}]}\n"
    recipe = load(head + "model: {projected_length: 600}", sections=sections)
    with pytest.raises(RecipeError, match=r"^section 'model': .*600"):
        recipe.build("model")
    training = "training: {eval_strategy: steps, load_best_model_at_end: true, save_strategy: epoch}"
    recipe = load(head + training, sections=sections)
    with pytest.raises(RecipeError, match=r"^section 'training': "):
        recipe.build("training", output_dir="x")
    recipe = load("data: {sources: [{kind: files}]}", sections=sections)
    with pytest.raises(RecipeError, match=r"^section 'data.sources\[0\]': a source of kind 'files' needs 'path'\.$"):
        recipe.build("data")
    message = refused(load, head + "training: {learning_rat: 1}", sections=sections)
    assert message == "unknown key 'training.learning_rat'. Did you mean 'learning_rate'?"
    recipe = load(head + "training: {lr_scheduler_type: liner}", sections=sections)
    with pytest.raises(RecipeError, match=r"^section 'training': liner is not a valid SchedulerType"):
        recipe.build("training", output_dir="x")
    message = refused(load, "data: {sources: [{kind: file, path: x}]}", sections=sections)
    assert message.startswith("data.sources[0].kind must be one of hub, files, demo, got the text 'file'.")


def test_a_recipe_is_the_same_whatever_empty_sections_it_has():
    """Else each new section makes all finished cells of a comparison another recipe's."""
    asked = {"model": {"checkpoint": "a"}, "card": {}, "pairs": {}, "stages": []}
    assert same_recipe({"model": {"checkpoint": "a"}}, asked)
    assert not same_recipe({"model": {"checkpoint": "a"}, "pairs": {"scale": 20.0}}, asked)
    assert not same_recipe({"model": {"checkpoint": "b"}}, asked)
    assert not same_recipe(None, asked)


def test_an_access_token_is_not_taken_into_a_folder_that_may_be_published(load):
    sections = {"training": TrainingArguments}
    token = "hf_" + "x" * 34
    message = refused(load, f"training: {{hub_token: {token}}}", sections=sections)
    assert message.startswith(
        "training.hub_token would be written into recipe.json and results.json; run `hf auth login`"
    )
    assert token not in message
    assert refused(load, "", f"training.hub_token={token}", sections=sections) == message


def test_a_run_is_pushed_when_it_is_finished(load):
    sections = {"training": TrainingArguments}
    message = refused(load, "training: {push_to_hub: true}", sections=sections)
    assert message.startswith("training.push_to_hub would send the folder before results and model card are in it")
    assert "`linformer-hf push FOLDER USER/NAME`" in message
    load("training: {push_to_hub: false, hub_token: null, dataloader_drop_last: false}", sections=sections)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("dataloader_drop_last: true", "would drop rows of the validation and test files too"),
        ("prediction_loss_only: true", "would leave the run without its metrics"),
        ("batch_eval_metrics: true", "would ask for metrics batch by batch"),
        ("label_names: [label]", "would tell Trainer of other labels"),
    ],
)
def test_settings_under_which_trainer_judges_by_something_else_are_refused(load, change, reason):
    sections = {"training": TrainingArguments, "data": TaskData}
    key, _, value = change.partition(": ")
    assert refused(load, f"training: {{{change}}}", sections=sections).startswith(f"training.{key} {reason}")
    assert refused(load, "training: {}", f"training.{key}={value}", sections=sections).startswith(f"training.{key}")
    load("data: {task: genre, label_names: [a, b]}", sections=sections)


def test_real_types_of_training_arguments_are_known():
    fields = fields_of(TrainingArguments)
    check_type(2e-5, fields["learning_rate"], "training.learning_rate")
    check_type("cosine", fields["lr_scheduler_type"], "training.lr_scheduler_type")
    with pytest.raises(RecipeError, match=r"training\.learning_rate must be a number"):
        check_type("2e-5", fields["learning_rate"], "training.learning_rate")
    with pytest.raises(RecipeError, match=r"training\.max_steps must be an integer"):
        check_type(1.5, fields["max_steps"], "training.max_steps")
    assert not [name for name in fields if name.startswith("_")]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "an integer or null"),
        (list[float], "a list of a number"),
        (Literal["a", "b"], "one of a, b"),
        (int | list[int], "an integer or a list of an integer"),
        (dict[str, Any], "a mapping"),
        (Part, "a mapping"),
    ],
)
def test_types_in_words(hint, words):
    assert describe(hint) == words
