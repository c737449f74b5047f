"""`python -m linformer_hf.benchmark.budget PREPARING GPU`: what a pretraining of the paper's length needs, as tables.

Of two folders with results.json: one of `scripts/preparing.py`, one of `linformer-hf benchmark` with a training step on
a GPU. Nothing is measured anew: every number is one of theirs, or follows from them by the formula beside it.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..configuration_linformer import LinformerConfig
from ..modeling_linformer import LinformerForMaskedLM
from ..utils.files import RESULTS_FILE, read_json
from ..utils.reporting import markdown_table
from .encoders import OURS
from .preparing import rate


STEPS, ROWS, N, K, VOCABULARY, MASKED = 250_000, 256, 512, 256, 50_265, 0.15
CORPUS = 3_300_000_000  # tokens of BookCorpus and Wikipedia
SIZES = {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)}  # layers, C, heads, feed-forward
# Bytes a second at which a GPU sends in a ring: NVLink of one machine with 8; 400 Gb/s of network a GPU for several.
LINKS = {8: 450e9, 64: 50e9}
CORES = (8, 16, 64)


@dataclass(frozen=True)
class Size:
    """The arithmetic of one model; multiplying and adding count as two FLOPs."""

    layers: int
    c: int
    heads: int
    f: int

    @property
    def parameters(self) -> int:
        config = LinformerConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.c,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.f,
            max_position_embeddings=N,
            projected_length=K,
            type_vocab_size=1,
        )
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in LinformerForMaskedLM(config).parameters())

    @property
    def layer_flops(self) -> float:
        """Of a token in a layer, forward: queries and output, E X, keys and values, attention, feed-forward."""
        return 4 * self.c**2 + 2 * K * self.c + 4 * self.c**2 * K / N + 4 * K * self.c + 4 * self.c * self.f

    @property
    def flops(self) -> float:
        """Of a token, forward: the layers, and the head of the masked tokens."""
        return self.layers * self.layer_flops + MASKED * (2 * self.c**2 + 2 * self.c * VOCABULARY)

    @property
    def step_flops(self) -> float:
        """Backward is twice forward."""
        return 3 * self.flops * ROWS * N


def speed(gpu: dict[str, Any]) -> float:
    """FLOPs a second of the layer that was measured in training, at our N and K."""
    (row,) = (
        row
        for row in gpu["timings"]
        if (row["encoder"], row["mode"], row["length"], row["k"]) == (OURS, "training", N, K) and not row["dropout"]
    )
    return 3 * Size(*SIZES["base"]).layer_flops * row["batch"] * N / row["wall_s"]


def readers(preparing: dict[str, Any], tokens: float) -> str:
    """How many, on a core each, keep up with so many tokens a second: each reads all and tokenises its share."""
    left = 1 - tokens / rate(preparing, "read")
    return f"{math.ceil(tokens / rate(preparing, 'stream') / left):,}" if left > 0 else "too many"


def budget(preparing: dict[str, Any], gpu: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    sizes = {name: Size(*numbers) for name, numbers in SIZES.items()}
    rows = [
        ["weights P", *(f"{size.parameters / 1e6:.1f} M" for size in sizes.values())],
        ["FLOPs of a token, forward", *(f"{size.flops / 1e6:.0f} M" for size in sizes.values())],
        [f"FLOPs of a step: 3 x {ROWS} x {N} x", *(f"{size.step_flops / 1e12:.1f} T" for size in sizes.values())],
        [
            "weights, gradients, AdamW in float32: 16 P bytes a GPU",
            *(f"{16 * size.parameters / 2**30:.1f} GiB" for size in sizes.values()),
        ],
        ["gradients all-reduced: 4 P bytes", *(f"{4 * size.parameters / 2**20:,.0f} MiB" for size in sizes.values())],
    ]
    blocks = [markdown_table(["", *sizes], rows)]
    lines: list[list[str]] = []
    for gpus, link in LINKS.items():
        for name, size in sizes.items():
            compute = size.step_flops / speed(gpu) / gpus
            reduce = 2 * (gpus - 1) / gpus * 4 * size.parameters / link
            low, high = max(compute, reduce), compute + reduce  # hidden behind backward, or not at all
            cells = [f"{name}, {gpus} GPUs", f"{ROWS // gpus}", f"{1e3 * compute:.1f}", f"{1e3 * reduce:.1f}"]
            cells += [f"{STEPS * low / 3600:.1f} to {STEPS * high / 3600:.1f}", f"{ROWS * N / low / 1e6:.1f} M"]
            lines.append([*cells, readers(preparing, ROWS * N / low)])
    head = [
        "",
        "rows a GPU",
        "computing, ms",
        "all-reduce, ms",
        "250,000 steps, hours",
        "tokens / s",
        "cores to stream",
    ]
    blocks.append(markdown_table(head, lines))
    done = STEPS * ROWS * N
    seconds = CORPUS / rate(preparing, "prepare")
    read = median(row["read_s"] for row in preparing["times"]["prepare"] if "read_s" in row)
    alone = read / preparing["times"]["prepare"][0]["tokens"] * CORPUS
    lines = [
        ["preparing once, core hours", f"{seconds / 3600:.1f}"],
        ["of which one process reads the documents first, hours", f"{alone / 3600:.1f}"],
        *([f"so on {cores} cores, hours", f"{(alone + (seconds - alone) / cores) / 3600:.1f}"] for cores in CORES),
        [
            f"streaming, core hours to tokenise {done / 1e9:.1f} G tokens, {done / CORPUS:.1f} passes",
            f"{done / rate(preparing, 'stream') / 3600:.1f}",
        ],
        ["and each reader, hours to read over all of it", f"{done / rate(preparing, 'read') / 3600:.1f}"],
    ]
    blocks.append(markdown_table(["3.3 G tokens", ""], lines))
    return "\n\n".join(blocks)


def main(preparing: str, gpu: str) -> None:
    print(budget(*(read_json(Path(folder) / RESULTS_FILE, "Measure again.") for folder in (preparing, gpu))))


if __name__ == "__main__":
    main(*sys.argv[1:])
