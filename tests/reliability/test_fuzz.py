"""Drawn input, sensible and not: what is valid gives a finite result, what is not gives our error, nothing else.

"Our error" is what the command line prints as one line: a ValueError (of which RecipeError is one), an OSError, or the
strict check of a configuration's fields, which from_pretrained's callers see too.
"""

import collections
import json
import math
import random

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torture
from linformer_hf import LinformerConfig, LinformerForMaskedLM, LinformerForSequenceClassification
from linformer_hf.data.corpus import prepare
from linformer_hf.data.documents import PretrainingData, Source
from linformer_hf.data.task_sources import load_task
from linformer_hf.data.tasks import TaskData
from linformer_hf.training.finetune import read_recipe as read_finetune
from linformer_hf.training.pretrain import read_recipe as read_pretrain
from linformer_hf.utils.recipe import fields_of


pytestmark = pytest.mark.torture
OURS = (ValueError, OSError, StrictDataclassError)
COUNTS: collections.Counter = collections.Counter()


def cases(short: int, long: int):
    """Reproducible in every run of the tests; new ones under `make torture`."""
    return settings(
        max_examples=torture.times(short, long),
        derandomize=not torture.LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def counted():
    yield
    torture.record("fuzzing", cases=sum(COUNTS.values()), **COUNTS)


def tried(what: str, action):
    """The result of `action`, or None where it raises an error of ours."""
    COUNTS[what] += 1
    try:
        result = action()
    except OURS as error:
        if not str(error).strip():
            raise AssertionError("an error without a word") from error
        COUNTS[f"{what}, refused"] += 1
        return None
    return result


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**63), 10**30, 0.0, -0.5, 0.1, 1.0, 1e30, math.nan, math.inf, -math.inf]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["linear", "mean_pool", "conv", "dense_conv", "gated_pool", "none", "headwise", "layerwise", "normal", "gelu"]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "projected_length": 4,
}
# What transformers itself reads from a configuration, in ways of its own.
OWN_FIELDS = sorted(name for name in fields_of(LinformerConfig) if name in LinformerConfig.__annotations__)
LARGEST = 4096  # beyond it a valid model would take the machine's memory


def small(config: LinformerConfig) -> bool:
    lengths = config.projected_length
    numbers = [getattr(config, name) for name in SIZES if name != "projected_length"]
    numbers += lengths if isinstance(lengths, list) else [lengths]
    return max([*numbers, config.type_vocab_size]) <= LARGEST


@cases(900, 70_000)
@given(st.dictionaries(st.sampled_from(OWN_FIELDS), VALUES, max_size=4))
def test_configurations(fields):
    config = tried("configurations", lambda: LinformerConfig(**{**SIZES, **fields}))
    if config is None or not small(config):
        return
    again = LinformerConfig.from_dict(json.loads(json.dumps(config.to_dict(), default=str)))
    assert again.projected_length == config.projected_length
    if COUNTS["configurations"] % 20 == 0:
        COUNTS["models"] += 1
        model = LinformerForMaskedLM(config).eval()
        with torch.no_grad():
            output = model(torch.zeros(1, 1, dtype=torch.long) + min(1, config.vocab_size - 1))
        assert output.logits.shape == (1, 1, config.vocab_size)


SECTION_KEYS = {
    "model": ["checkpoint", "projected_length", "hidden_size", "projection_type", "max_position_embeddings"],
    "data": ["sources", "packing", "mlm_probability", "mask_fractions", "validation_fraction", "streaming", "task"],
    "training": ["output_dir", "max_steps", "learning_rate", "report_to", "save_strategy", "optim", "fsdp"],
    "stages": ["sequence_length"],
    "other": ["a"],
}
SECTIONS = st.sampled_from(sorted(SECTION_KEYS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.dictionaries(st.sampled_from(SECTION_KEYS[name]), VALUES, max_size=4) | VALUES
    )
)
KEYS = st.sampled_from([f"{section}.{key}" for section, keys in SECTION_KEYS.items() for key in keys])
OVERRIDES = st.builds(
    lambda key, sign, text: f"{key}{sign}{text}",
    KEYS | st.text(max_size=9),
    st.just("=") | st.just(""),
    st.text(max_size=9),
)


@pytest.mark.parametrize("read", [read_pretrain, read_finetune])
def test_recipes(read, tmp_path):
    @cases(150, 12_000)
    @given(st.lists(SECTIONS, max_size=4).map(dict), st.lists(OVERRIDES, max_size=2), st.text(max_size=6))
    def check(sections, overrides, noise):
        path = tmp_path / "recipe.yaml"
        text = yaml.safe_dump(sections, allow_unicode=True)
        draw = random.Random(len(text))
        if noise and draw.random() < 0.3:  # somewhere in the file
            place = draw.randrange(len(text))
            text = text[:place] + noise + text[place:]
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        recipe = tried("recipes", lambda: read(path, overrides))
        assert recipe is None or json.dumps(recipe.raw, default=str)

    check()


MODELS = {
    kind: {**SIZES, "projection_type": kind, **more}
    for kind, more in {
        "linear": {"projection_sharing": "none"},
        "fixed": {},
        "mean_pool": {"projection_sharing": None, "projection_init": None},
        "max_pool": {"projection_sharing": None, "projection_init": None},
        "conv": {"projection_init": None},
        "dense_conv": {"projection_init": None, "local_window": 1},
        "gated_pool": {"projection_sharing": None, "projection_init": None, "local_window": 1},
    }.items()
}
ROWS = st.integers(1, 3)
LENGTHS = st.integers(1, 20)  # N is 16


def tensor(low: int, high: int, shape) -> st.SearchStrategy:
    """Mostly numbers that are allowed, in mostly the right shape."""
    rows, length = shape
    shapes = st.sampled_from(
        [shape] * 8 + [(rows + 1, length), (rows, length + 1), (length,), (rows, length, 1), (1, 0)]
    )
    numbers = st.sampled_from([low, high - 1, (low + high) // 2] * 6 + [-1, high, -100, 2**40])
    return st.tuples(shapes, st.integers(0, 2**32), st.lists(numbers, min_size=1, max_size=5)).map(
        lambda drawn: torch.tensor(
            random.Random(drawn[1]).choices(drawn[2], k=math.prod(drawn[0])), dtype=torch.long
        ).reshape(drawn[0])
    )


@st.composite
def batches(draw):
    shape = (draw(ROWS), draw(LENGTHS))
    wanted = {"input_ids": tensor(0, SIZES["vocab_size"], shape)}
    optional = {
        "attention_mask": tensor(0, 2, shape),
        "token_type_ids": tensor(0, 2, shape),
        "position_ids": tensor(0, 16, shape),
        "labels": tensor(0, SIZES["vocab_size"], shape),
    }
    wanted |= {name: each for name, each in optional.items() if draw(st.booleans())}
    return {name: draw(each) for name, each in wanted.items()}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_batches(kind):
    torch.manual_seed(0)
    config = LinformerConfig(**MODELS[kind])
    heads = [LinformerForMaskedLM(config).eval(), LinformerForSequenceClassification(config).eval()]

    @cases(100, 3_000)
    @given(batches(), st.sampled_from(heads))
    def check(batch, head):
        if head is heads[1] and "labels" in batch:
            batch["labels"] = batch["labels"].flatten()[: len(batch["input_ids"])].clamp(-101, 3)
        output = tried("batches", lambda: head(**batch))
        if output is None:
            return
        assert torch.isfinite(output.logits).all()
        if "labels" in batch and (batch["labels"] >= 0).any():
            assert torch.isfinite(output.loss)

    check()


# What breaks readers: other encodings, control characters, separators of every kind, quotes, right-to-left, emoji.
PIECES = st.sampled_from(
    [
        *(b"river ", b"text", b"label", b"1", b"NaN", b"null", b'{"text": "a", "label": 1}\n'),
        *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\x85", b"\xc3", b"\xed\xa0\x80"),
        *(b"\r", b"\n", b"\r\n", b",", b'"', b"'", b"\t", b"{", b"}", b"[", b"]", b":"),
        *(text.encode() for text in ("\u0633\u0644\u0627\u0645 ", "\U0001f980", "\u2028", "e\u0301")),
    ]
)
NOISE = st.lists(PIECES, max_size=30).map(b"".join)
CELLS = st.one_of(
    st.text(max_size=12), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)
)
TABLES = st.lists(st.dictionaries(st.sampled_from(["text", "label", "pair", "text "]), CELLS, max_size=3), max_size=12)


def rows_as_file(kind: str, rows: list[dict]) -> bytes:
    if kind == "csv":
        lines = ["text,label", *(f'"{row.get("text")}",{row.get("label")}' for row in rows)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(rows).encode()
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_files_of_rows(kind, tmp_path):
    drawn = st.one_of(NOISE, TABLES.map(lambda rows: rows_as_file(kind, rows)))

    @cases(40, 600)
    @given(drawn)
    def check(content):
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(content)
        task = tried("files of rows", lambda: load_task(TaskData("files", train_file=str(path))))
        for row in task.train if task else ():
            assert isinstance(row["text"], str)

    check()


def test_text(tmp_path, tokenizers):
    tokenizers["wordpiece"].save_pretrained(tmp_path / "tokenizer")

    @cases(40, 600)
    @given(st.lists(NOISE, min_size=1, max_size=4), st.sampled_from(["line", "paragraph", "document"]))
    def check(files, sample_by):
        folder = tmp_path / f"texts-{COUNTS['text']}"
        folder.mkdir()
        for number, content in enumerate([*files, b"A river. And a mountain."]):
            (folder / f"{number}.txt").write_bytes(content)
        source = Source(kind="files", path=str(folder), sample_by=sample_by)
        data = PretrainingData(
            [source], tokenizer=str(tmp_path / "tokenizer"), validation_fraction=0.4, cache_dir=str(tmp_path / "cache")
        )
        corpus = tried("text", lambda: prepare(data, 16))
        for row in corpus.train if corpus else ():
            assert 0 < len(row["input_ids"]) <= 16

    check()


@pytest.mark.skipif(not torture.LONG, reason="reads 100 MB; under `make torture` only")
def test_a_line_of_100_megabytes(tmp_path, tokenizers):
    tokenizers["wordpiece"].save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"river mountain " * (100_000_000 // 15))
    (tmp_path / "texts" / "b.txt").write_bytes(b"A window.")
    source = Source(kind="files", path=str(tmp_path / "texts"))
    shared = {"tokenizer": str(tmp_path / "tokenizer"), "cache_dir": str(tmp_path / "cache")}
    corpus = tried("text", lambda: prepare(PretrainingData([source], validation_fraction=0.5, **shared), 128))
    assert corpus is None or len(corpus.train) + len(corpus.validation) > 100_000
