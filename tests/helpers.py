"""What several test files share: tiny recipes and runs, what the project's files say, programs of several processes."""

import configparser
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from linformer_hf import cli
from linformer_hf.benchmark import benchmark
from linformer_hf.evaluation import evaluate
from linformer_hf.paper import compare, reproduce, spectrum, sweep, theory
from linformer_hf.training import distill, finetune, pretrain


N = 32
MODEL = {
    "max_position_embeddings": N,
    "projected_length": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "sparse_prediction": True,
}
TRAINING = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 5,
}


def write_recipe(path: Path, **sections) -> str:
    path.write_text(yaml.safe_dump(sections, allow_unicode=True), encoding="utf-8")
    return str(path)


def tiny_data(texts: Path, place: Path, **more) -> dict:
    """Section `data`: the tests' texts, prepared in a cache of the test file's own."""
    sources = [{"kind": "files", "path": str(texts)}]
    cache = str(place / "cache")
    return {"sources": sources, "vocab_size": 200, "validation_fraction": 0.2, "cache_dir": cache, **more}


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit-equal weights, the same metrics, the same losses at the same steps."""
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    results, expected = results_of(folder), results_of(other)
    assert results["metrics"] == expected["metrics"]
    assert results["steps"] == expected["steps"]

    def curve(history):
        return [(row["step"], key, row[key]) for row in history for key in ("loss", "eval_loss") if key in row]

    assert curve(results["history"]) == curve(expected["history"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_line(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    line = error.strip().rpartition("\n")[2]  # transformers may log above it
    assert line.startswith("error: ")
    return line


ROOT = Path(__file__).parents[1]
READERS = {
    "pretrain": pretrain.read_recipe,
    "finetune": finetune.read_recipe,
    "distill": distill.read_recipe,
    "compare": compare.read_recipe,
    "benchmark": benchmark.read_recipe,
    "spectrum": spectrum.read_recipe,
    "theory": theory.read_recipe,
    "sweep": sweep.read_recipe,
    "evaluate": evaluate.read_recipe,
    "reproduce": reproduce.read_recipe,
}
ONE_SECTION = ("compare", "evaluate", "benchmark", "spectrum", "theory", "sweep", "reproduce")  # named as the verb


def accept(verb, path, overrides, output):
    """Read a recipe as its verb does and build every section, or raise. The current folder must be the repository's."""
    # TrainingArguments refuses bf16 where there is no GPU for it, unless told to use the CPU.
    ours = [f"{verb}.output_dir={output}"] if verb in ONE_SECTION else ["training.use_cpu=true"]
    if verb not in ONE_SECTION:
        ours.append(f"training.output_dir={output}")
    recipe = READERS[verb](ROOT / path, [*overrides, *ours])
    for section in recipe.types:
        recipe.build(section)


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "linformer_hf"
MODULES = {path.relative_to(SOURCE).with_suffix("").as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}


# save_pretrained copies these beside the weights, where transformers loads them without this package.
COPIED = tuple(f"{name}_linformer" for name in ("configuration", "tokens", "projection", "attention", "modeling"))
CODE = {f"{name}.py" for name in COPIED}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def path_of(page: Path) -> str:
    """A page's path in the checkout: names occur in several folders."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None) -> list[tuple[str, int, str]]:
    """(language, line, text) of a page's fenced blocks."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    found = [(token.info, token.map[0] + 1, token.content) for token in tokens if token.type == "fence"]
    return [block for block in found if language in (None, block[0])]


def commands() -> list:
    """The lines of every bash block, continued lines joined."""
    found = []
    for page in PAGES:
        for _, line, text in blocks(page, "bash"):
            for command in text.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    found.append(pytest.param(words, id=f"{path_of(page)}:{line}: {' '.join(words)[:60]}"))
    return found


SCRIPTS = Path(__file__).parents[1] / "scripts"
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def script(verb: str, before: str = "") -> str:
    """A program that is `linformer-hf VERB`, behind other statements."""
    return f"{before}\nimport sys; from linformer_hf.cli import main; sys.argv.insert(1, {verb!r}); sys.exit(main())\n"


HALF = "training.per_device_train_batch_size=4"

# Also where the package is installed: a path hook of an editable install would find it otherwise.
BLOCKER = """
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "linformer_hf":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
"""
