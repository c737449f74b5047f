"""What every test file shares: no network, caches of its own, one thread, fixed draws, and a tiny corpus.

Nothing is left to chance: `LINFORMER_HF_TEST_SEED=7 pytest` draws everything anew (seeds, data, hypothesis, hashes).
"""

import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
import zlib
from pathlib import Path

import pytest


SEED = int(os.environ.get("LINFORMER_HF_TEST_SEED", "0"))
# Set before the first import of torch, transformers and datasets, which read them once; child processes inherit them.
CACHE = tempfile.mkdtemp(prefix="linformer-hf-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(
    OMP_NUM_THREADS="1",
    PYTHONHASHSEED=str(SEED),
    HF_HUB_OFFLINE="1",
    HF_HOME=CACHE,
    HF_HUB_CACHE=f"{CACHE}/hub",
    HF_DATASETS_CACHE=f"{CACHE}/datasets",
    HF_MODULES_CACHE=f"{CACHE}/modules",
    LINFORMER_HF_CACHE=f"{CACHE}/corpora",
    TOKENIZERS_PARALLELISM="false",
)

# A shell that starts the tests in the background has Ctrl-C ignored, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each file is run by one process (--dist loadfile), which makes the fixtures of the file once.
LONGEST = (
    *("compile", "processes", "benchmark", "onnx", "upstream", "interruption", "export", "kills_of_groups"),
    "modeling_linformer",
    "sentence_head",
    *("push", "run", "sources", "convert", "security", "corruption", "distill", "determinism", "numerics", "app"),
    *(
        "kills",
        "boundaries",
        "transforms",
        "compare",
        "endurance",
        "fast_paths",
        "fuzz",
        "full_disk",
        "sweep",
        "grid",
        "concurrency",
        "docs",
    ),
)
VOCABULARY = (
    "the a river mountain keeper painter walked walking stood under over quietly Straße café naïve Björn Zoë old new "
    "lantern harbour stone window letter reading written unreadable rewritten garden gardener and or with without 42"
)


def pytest_xdist_auto_num_workers() -> int:
    """From 2 to 8: one for each thread of a core, and for 4 GiB, which is for all that a test starts."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**32
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(2, min(cores, memory, 8))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Hypothesis draws the same examples in every run: those of its own, or of SEED."""
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=not SEED, database=None, deadline=None)
    settings.load_profile("fixed")
    if SEED:
        config.option.hypothesis_seed = str(SEED)
        other_seeds()


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no process is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


def other_seeds() -> None:
    """Add SEED to each seed that a test gives; those that the package gives must be the same in child processes."""
    import torch

    def given_by_a_test() -> bool:
        return Path(__file__).parent in Path(sys._getframe(2).f_code.co_filename).parents

    class Random(random.Random):
        def __init__(self, seed=None):
            super().__init__(f"{seed} {SEED}" if seed is not None and given_by_a_test() else seed)

    class AnyGenerator(type(torch.Generator)):
        def __instancecheck__(cls, value):
            return isinstance(value, torch._C.Generator)

    class Generator(torch.Generator, metaclass=AnyGenerator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + SEED if given_by_a_test() else seed)

    whole = torch.manual_seed
    torch.manual_seed = lambda seed: whole(seed + SEED if given_by_a_test() else seed)
    random.Random, torch.Generator = Random, Generator


def draw_from(name: str) -> None:
    """What gives no seed draws alike too, whichever tests were run before."""
    import numpy
    import torch

    seed = zlib.crc32(f"{SEED} {name}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    draw_from(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    draw_from(item.nodeid)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with 12 text files of 40 sentences in four paragraphs; the sentences are different everywhere."""
    folder, generator, words = tmp_path_factory.mktemp("texts"), random.Random(0), VOCABULARY.split()
    for number in range(12):
        sentences = [
            " ".join([*generator.choices(words, k=generator.randint(3, 9)), f"{number}x{i}."]) for i in range(40)
        ]
        paragraphs = [" ".join(sentences[start : start + 10]) for start in range(0, 40, 10)]
        (folder / f"{number:02}.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizers(texts) -> dict:
    """A trained tokenizer of each kind."""
    from linformer_hf.data.documents import PretrainingData, Source
    from linformer_hf.data.tokenizer import train_tokenizer

    lines = [file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())]
    source = Source(kind="files", path=str(texts))
    return {
        kind: train_tokenizer(lines, PretrainingData([source], tokenizer_type=kind, vocab_size=size))
        for kind, size in (("wordpiece", 200), ("byte_level_bpe", 400))
    }


@pytest.fixture(scope="session")
def tiny_source(tokenizers, tmp_path_factory):
    """Saves a small random BERT (N = 48) with its tokenizer: class name -> folder."""
    import torch
    import transformers

    def save(architecture: str = "BertModel", **fields) -> Path:
        torch.manual_seed(0)
        tokenizer = tokenizers["wordpiece"]
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.3,
            **{"max_position_embeddings": 48, **fields},
        )
        folder = tmp_path_factory.mktemp("source")
        getattr(transformers, architecture)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
