"""What every test file shares: no network, caches of its own, one thread, and a tiny corpus."""

import atexit
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest


# Set before the first import of transformers and datasets, which read them once.
CACHE = tempfile.mkdtemp(prefix="linformer-hf-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=CACHE,
    HF_HUB_CACHE=f"{CACHE}/hub",
    HF_DATASETS_CACHE=f"{CACHE}/datasets",
    HF_MODULES_CACHE=f"{CACHE}/modules",
    LINFORMER_HF_CACHE=f"{CACHE}/corpora",
    TOKENIZERS_PARALLELISM="false",
)

VOCABULARY = (
    "the a river mountain keeper painter walked walking stood under over quietly Straße café naïve Björn Zoë old new "
    "lantern harbour stone window letter reading written unreadable rewritten garden gardener and or with without 42"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


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
    from linformer_hf.data.corpus import PretrainingData, Source, train_tokenizer

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
