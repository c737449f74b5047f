"""Tasks of Python source: docstrings are gone from what is searched, imports and names from what is classified."""

import ast
import sys

import pytest

from linformer_hf.evaluation import python_code
from linformer_hf.evaluation.python_code import anonymous, first_paragraph, modules, without_docstrings
from linformer_hf.evaluation.tasks import Sizes


SOURCE = '''"""The module's own."""

import os


class Keeper:
    """Keeps naïve lanterns.

    More.
    """

    name = "a string, no docstring"

    async def walk(self): "walks over the river"

    def read(self):
        r"""reads the \\letter"""
        "a second string"
        return 'é'


def old():
    return 1
'''


def test_docstrings_of_functions_and_classes_are_cut_out_and_nothing_else():
    bare, found = without_docstrings(SOURCE)
    assert [text for _, text in found] == [
        "Keeps naïve lanterns.\n\nMore.",
        "walks over the river",
        "reads the \\letter",
    ]
    expected = SOURCE
    for part in (
        '"""Keeps naïve lanterns.\n\n    More.\n    """',
        '"walks over the river"',
        'r"""reads the \\letter"""',
    ):
        expected = expected.replace(part, "")
    assert bare == expected
    for (place, _), around in zip(found, ("class Keeper:", "async def walk(self):", "def read(self):"), strict=True):
        assert bare[:place].rstrip().endswith(around)


def test_no_docstring_of_a_real_module_is_left():
    with open(ast.__file__, encoding="utf-8") as file:
        source = file.read()
    bare, found = without_docstrings(source)
    assert len(found) > 20
    assert not [text for _, text in found if text.count("\n") and text.split("\n")[0] in bare]
    assert len(bare) < len(source) - sum(len(text) for _, text in found)


def test_the_first_paragraph_is_one_line():
    assert first_paragraph("\n  Walk\n  over it.\n\n  More.") == "Walk over it."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of these modules, name -> source."""

    def make(**sources):
        (tmp_path / "test").mkdir()
        for name, source in {"test/hidden": "x = 1", "test_seen": "x = 1", **sources}.items():
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(python_code.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        return tmp_path

    return make


def function(docstring: str, name: str = "walk") -> str:
    return f'def {name}():\n    """{docstring}"""\n    return "river stone lantern" * 3\n\n'


LONG = "the {} keeper walked over the old river and stood"


def test_tests_and_tables_are_no_modules(library):
    folder = library(river="a = 1")
    assert list(modules(folder)) == [("river.py", "a = 1")]


def test_a_search_asks_for_what_one_module_alone_says(library, tokenizers):
    shared = function(LONG.format("same"), "same")
    library(
        river=function(LONG.format("first")) + shared + function("too short"),
        stone=function(LONG.format("second"))
        + shared
        + f"x = {LONG.format('third')!r}\n"
        + function(LONG.format("third")),
        broken="def (",
    )
    task = python_code.search_python(9, Sizes(tokenizers["wordpiece"], length=2000, shortest=5))
    assert sorted(query for query, _ in task.queries) == [LONG.format("first"), LONG.format("second")]
    assert len(task.texts) == 2
    for query, document in task.queries:
        assert query not in task.texts[document]
        assert ("third" in task.texts[document]) == ("second" in query)


def test_a_search_asks_for_nothing_behind_the_cut(library, tokenizers):
    library(river="".join(function(LONG.format(f"{i}x"), f"f{i}") for i in range(30)), stone=function(LONG.format("a")))
    sizes = Sizes(tokenizers["wordpiece"], length=250, shortest=5, queries=99)
    task = python_code.search_python(9, sizes)
    for query, document in task.queries:
        if "x keeper" in query:
            assert f"def f{query.split()[1][:-1]}()" in task.texts[document]
    assert 1 < len(task.queries) < 20


def test_a_package_is_not_told_by_its_name():
    source = "import numpy as np\nfrom numpy import (\n    sin,\n)\n\nx = np.array(numpy.pi)  # Numpy\nsnap = nps\n"
    bare = anonymous(source, python_code.PACKAGES["numpy"])
    assert bare.split() == ["x", "=", "package.array(package.pi)", "#", "package", "snap", "=", "nps"]
    assert anonymous("def (", "numpy") is None


def test_modules_are_classified_by_package_and_held_out_by_sub_package(tmp_path, monkeypatch, tokenizers):
    for package in ("one", "two"):
        for inside in ("a", "b", "tests"):
            (tmp_path / package / inside).mkdir(parents=True)
            (tmp_path / package / inside / "code.py").write_text(f"import {package}\n" + f"{package}.river()\n" * 9)
        (tmp_path / package / "__init__.py").write_text("x = 1\n" * 99)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(python_code, "PACKAGES", {"one": "one", "two": "two"})
    task = python_code.probe_python(4, Sizes(tokenizers["wordpiece"], shortest=5))
    assert task.labels == ["one", "one", "two", "two"]
    assert sorted(task.groups) == ["one/a", "one/b", "two/a", "two/b"]
    assert not any("one" in text or "two" in text for text in task.texts)
    assert "one" not in sys.modules
    monkeypatch.setattr(python_code, "PACKAGES", {"no_such_package": "x"})
    with pytest.raises(
        FileNotFoundError, match="'no_such_package', which is not installed: pip install no_such_package"
    ):
        python_code.probe_python(4, Sizes(tokenizers["wordpiece"], shortest=5))
