"""A verb's options stand once: the function's arguments, its help and the command line's all come from them."""

import inspect
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import pytest

from linformer_hf.utils import options
from linformer_hf.utils.options import Argument, Option, help_texts, marks, takes


@dataclass
class Cook:
    dish: Annotated[str, Argument("DISH", "what is cooked")]
    _: KW_ONLY
    minutes: Annotated[int, Option("how long (default: %(default)s)", "N")] = 5
    salted: Annotated[bool, Option()] = True
    pot: str | None = None  # for Python only


@takes(Cook)
def cook(given: Cook) -> list[str]:
    """Cook a dish.

    Slowly.
    """
    return [given.dish, str(given.minutes), str(given.pot)]


def test_a_verb_is_called_with_its_fields():
    assert cook("soup", minutes=9, pot="iron") == ["soup", "9", "iron"]
    assert cook(dish="soup") == ["soup", "5", "None"]


def test_what_is_no_field_is_refused_as_by_any_function():
    for arguments, named in (((), {}), (("soup", 9), {}), (("soup",), {"minute": 9})):
        with pytest.raises(TypeError):
            cook(*arguments, **named)


def test_help_shows_the_fields():
    expected = "(dish: str, *, minutes: int = 5, salted: bool = True, pot: str | None = None) -> list[str]"
    assert str(inspect.signature(cook)) == expected
    text = "Cook a dish.\n\nSlowly.\n\nArgs:\n    dish: what is cooked\n    minutes: how long (default: 5)\n"
    assert cook.__doc__ == text
    assert cook.__name__ == "cook"


def test_the_command_line_knows_what_is_marked():
    assert list(marks(Cook)) == ["dish", "minutes", "salted"]
    assert marks(Cook)["minutes"] == (int, 5, Option("how long (default: %(default)s)", "N"))
    assert help_texts(Cook) == {"dish": "what is cooked", "minutes": "how long (default: 5)"}


VERBS = [one for one in vars(options).values() if isinstance(one, type) and hasattr(one, "__dataclass_fields__")]


@pytest.mark.parametrize("kind", VERBS, ids=lambda kind: kind.__name__)
def test_truth_values_are_named_and_have_a_default(kind):
    for type_, default, mark in marks(kind).values():
        assert type_ is not bool or (isinstance(mark, Option) and isinstance(default, bool))
    assert marks(kind).keys() <= inspect.signature(kind).parameters.keys()
