"""Tasks made of Python source: the standard library's, and that of packages which this one requires."""

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .tasks import Sizes, Task, cut, probe


# Tests, tables, and what later versions of Python have no more.
LEFT_OUT = (
    *("site-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "turtledemo", "pydoc_data", "encodings"),
    *("ensurepip", "__pycache__"),
)
QUERY_WORDS = 8  # of a docstring's first paragraph, at least
# Package -> how its name is written in code, which would give it away.
PACKAGES = {
    "matplotlib": "matplotlib|mpl|plt|pyplot|pylab",
    "networkx": "networkx|nx",
    "numpy": "numpy|np",
    "pandas": "pandas|pd",
    "scipy": "scipy|sp",
    "sklearn": "scikit[- ]?learn|sklearn",
    "sympy": "sympy",
    "transformers": "transformers|hugging ?face",
}
Docstring = tuple[int, str]  # place in the text without docstrings, in characters; the docstring


def without_docstrings(text: str) -> tuple[str, list[Docstring]]:
    """A module's source without the docstrings of its functions and classes, and these.

    Raises:
        SyntaxError: it is no source of this Python.
    """
    starts = [0]  # of each line, in bytes, as ast counts columns
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    spans = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = ast.get_docstring(node)
            if found is not None:
                place = node.body[0]
                assert place.end_lineno is not None
                assert place.end_col_offset is not None
                begin = starts[place.lineno - 1] + place.col_offset
                spans.append((begin, starts[place.end_lineno - 1] + place.end_col_offset, found))
    content, kept, at = text.encode(), "", 0
    docstrings = []
    for begin, end, found in sorted(spans):
        kept += content[at:begin].decode()
        docstrings.append((len(kept), found))
        at = end
    return kept + content[at:].decode(), docstrings


def first_paragraph(docstring: str) -> str:
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def modules(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below the folder, source) of every module that is no test, in order."""
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if not set(inside.parts) & set(LEFT_OUT) and not re.match(r"_sysconfigdata|test_|conftest", path.name):
            yield inside.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def search_python(documents: int, sizes: Sizes) -> Task:
    """Modules of the standard library without docstrings, each searched by those docstrings' first paragraphs."""
    draw = sizes.draw("search-python")
    library = list(modules(Path(sysconfig.get_paths()["stdlib"])))
    draw.shuffle(library)
    texts: list[str] = []
    asked: list[list[str]] = []
    for _, source in library:
        if len(texts) == documents:
            break
        try:
            bare, docstrings = without_docstrings(source)
        except SyntaxError:
            continue
        text = cut(bare, sizes)
        if text is None:
            continue
        found = [first_paragraph(docstring) for place, docstring in docstrings if place < len(text)]
        found = [query for query in dict.fromkeys(found) if len(query.split()) >= QUERY_WORDS and query not in text]
        if found:
            texts.append(text)
            asked.append(draw.sample(found, len(found)))
    everywhere = [query for found in asked for query in found]
    queries = [
        (query, number)
        for number, found in enumerate(asked)
        for query in [query for query in found if everywhere.count(query) == 1][: sizes.queries]
    ]
    about = (
        "modules of Python's standard library without the docstrings of functions and classes, found by the first "
        f"paragraphs of these ({QUERY_WORDS} words or more)"
    )
    return Task("search-python", about, texts, queries)


def anonymous(text: str, names: str) -> str | None:
    """Source without its imports and its package's names; None if it cannot be parsed."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return re.sub(rf"(?<![a-z])({names})(?![a-z])", "package", "\n".join(lines), flags=re.IGNORECASE)


def probe_python(documents: int, sizes: Sizes) -> Task:
    """Which package does a module come from? Sub-packages are held out whole."""
    texts: dict[str, dict[str, list[str]]] = {}
    draw = sizes.draw("probe-python modules")
    for package, names in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"probe-python reads the source of the package {package!r}, which is not installed: pip install "
                f"{'scikit-learn' if package == 'sklearn' else package}"
            )
        groups: dict[str, list[str]] = {}
        for inside, source in modules(Path(spec.submodule_search_locations[0])):
            if "/" in inside and len(source) > 3 * sizes.shortest:  # fewer characters are too few tokens
                groups.setdefault(f"{package}/{inside.split('/')[0]}", []).append(source)
        # Few of many: parsing them all takes a minute.
        few = {name: draw.sample(found, min(len(found), 4)) for name, found in groups.items()}
        bare = {name: [anonymous(source, names) for source in found] for name, found in few.items()}
        texts[package] = {name: [text for text in found if text is not None] for name, found in bare.items()}
    about = (
        f"modules of {', '.join(PACKAGES)}, without imports and these names: which package? Sub-packages held out whole"
    )
    return probe("probe-python", about, texts, documents, sizes)
