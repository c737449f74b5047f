"""The arithmetic of a long run: against numbers that are counted otherwise, and against the page that shows it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import ROOT
from linformer_hf import LinformerConfig, LinformerForMaskedLM
from linformer_hf.benchmark.budget import SIZES, Size, budget, readers, speed
from linformer_hf.utils.files import RESULTS_FILE, read_json


def results(name: str) -> dict:
    return read_json(ROOT / "reports" / name / RESULTS_FILE, "")


def test_flops_of_a_layer_are_those_that_torch_counts():
    config = LinformerConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        projected_length=256,
        attn_implementation="eager",
    )
    model = LinformerForMaskedLM(config).train()
    ids = torch.randint(5, 64, (2, 512))
    with FlopCounterMode(display=False) as counted:
        model.linformer(input_ids=ids)
    assert counted.get_total_flops() / 1024 == pytest.approx(Size(1, 64, 4, 256).layer_flops, rel=0.02)


def test_the_sizes_are_robertas():
    """124.7 and 355.4 M weights, and E."""
    parameters = {name: Size(*numbers).parameters / 1e6 for name, numbers in SIZES.items()}
    assert parameters == {"base": pytest.approx(124.7, abs=0.2), "large": pytest.approx(355.4, abs=0.2)}


def test_more_readers_are_needed_than_share_the_tokens_evenly_for_each_reads_all():
    tokens = [{"tokens": 1000, "cpu_s": 1}]
    content = {"times": {"prepare": tokens, "stream": [{"cpu_s": 2.0}], "read": [{"cpu_s": 0.1}]}}
    assert [readers(content, rate) for rate in (500, 5000, 10_000)] == ["2", "20", "too many"]


def test_the_page_shows_the_tables_as_they_are_computed():
    page = (ROOT / "docs" / "results" / "long-run.md").read_text(encoding="utf-8")
    for table in budget(results("preparing"), results("benchmark/gpu-training")).split("\n\n"):
        assert table in page
    assert f"{speed(results('benchmark/gpu-training')) / 1e12:.0f} TFLOP/s" in page
