"""`linformer-hf theory RECIPE.yaml`: the paper's two theorems, measured with the proofs' own projections.

Both are about random projections R [K, N] with entries N(0, 1/K), drawn anew for every measurement.

**Theorem 1** (attention maps are low rank): P~ = P R^T R stands for the map P. As stated, for a column w of the
values, |P~ w - P w| <= eps |P w|. As proved, by Johnson-Lindenstrauss for every row p of P: |p R^T R w - p w| <=
eps |p| |w| with probability at least 1 - 2 exp(-(eps^2 - eps^3) K / 4); all N rows together fail with at most 2 N times
that exponential.

**Theorem 2** (linear self-attention): E = delta R and F = exp(-delta) R, so softmax(w E^T) F V stands for softmax(w) V,
w a row of Q K^T / sqrt(D); the error is measured against |softmax(w)| |V|, as stated.

Beside each stands the answer zero, which no projection has to beat by construction: where it scores better than the
construction does, the theorem says nothing about a useful choice of K, E or F.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..conversion.huggingface import read_source
from ..conversion.shorten import exact_twin
from ..conversion.texts import text_rows
from ..modeling_linformer import LinformerModel
from ..training.run import open_run
from ..utils.figures import new_figure, save_figure, shades
from ..utils.recipe import load_recipe
from ..utils.reporting import markdown_table
from ..utils.timing import watched


FIRST_FILE, SECOND_FILE, LENGTH_FILE = "theorem-1.png", "theorem-2.png", "length.png"
RANDOM = "random maps"
Pair = tuple[torch.Tensor, torch.Tensor]  # scores [N, N] of queries and keys, values [N, D]


@dataclass
class Theory:
    """Section `theory`.

    Args:
        output_dir: folder to fill.
        model, revision: a model of a kind that `linformer-hf convert` takes; its maps are used.
        corpus: text, as `linformer-hf convert --calibrate` takes it.
        rows: texts; each gives one map for every layer, of a head drawn at random.
        lengths: N; each map is of a text of so many tokens.
        projected_lengths: K.
        draws: random projections of each map.
        epsilon: the error that counts as failure.
        delta: of theorem 2's construction.
        seed: of texts, heads and projections.
    """

    output_dir: str
    model: str
    corpus: str
    revision: str | None = None
    rows: int = 2
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512])
    projected_lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256, 512, 1024])
    draws: int = 4
    epsilon: float = 0.5
    delta: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or not self.projected_lengths:
            raise ValueError("lengths and projected_lengths need at least one number each.")
        for name, least in (("rows", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if min(self.lengths) < 8 or min(self.projected_lengths) < 1:
            raise ValueError("lengths must be at least 8 and projected_lengths at least 1.")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {self.epsilon}: beyond, the bound says nothing.")


SECTIONS = {"theory": Theory}


read_recipe = partial(load_recipe, sections=SECTIONS, built=("theory",))


def projection(k: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """R [K, N] with entries N(0, 1/K)."""
    return torch.randn(k, n, generator=generator) / math.sqrt(k)


def theorem_1(maps: torch.Tensor, values: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of P R^T R for P [N, N], V [N, D], R [K, N].

    Returns:
        As stated, |P~ w - P w| / |P w| for every column w, [D]; as proved, |p R^T R w - p w| / (|p| |w|), [N, D].
    """
    exact = maps @ values
    error = (maps @ r.T) @ (r @ values) - exact
    stated = error.norm(dim=0) / exact.norm(dim=0)
    return stated, error.abs() / (maps.norm(dim=1)[:, None] * values.norm(dim=0))


def theorem_2(scores: torch.Tensor, values: torch.Tensor, r: torch.Tensor, delta: float) -> torch.Tensor:
    """Errors of softmax(w E^T) F V for scores w [N, N], V [N, D], R [K, N], relative to |softmax(w)| |V|: [N]."""
    exact = scores.softmax(-1)
    given = (scores @ (delta * r).T).softmax(-1) @ (math.exp(-delta) * r @ values)
    return (given - exact @ values).norm(dim=1) / (exact.norm(dim=1) * values.norm())


def zero_2(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What the answer zero scores by theorem 2's measure, [N]."""
    exact = scores.softmax(-1)
    return (exact @ values).norm(dim=1) / (exact.norm(dim=1) * values.norm())


def bound(k: int, n: int, epsilon: float) -> float:
    """The proof's bound on the probability that one of N rows fails; 1 where it says nothing."""
    return min(1.0, 2 * n * math.exp(-(epsilon**2 - epsilon**3) * k / 4))


def needed_k(n: int, epsilon: float) -> int:
    """The K that theorem 1 asks for: 5 log(N) / (eps^2 - eps^3)."""
    return math.ceil(5 * math.log(n) / (epsilon**2 - epsilon**3))


@torch.no_grad()
def collect(model: LinformerModel, row: torch.Tensor, head: int) -> list[Pair]:
    """Scores and values of one head in every layer, for a row of ids [N]."""
    model.set_attn_implementation("eager")
    found: list[Pair] = []

    def keep(number: int, module: Any, arguments: tuple, output: tuple) -> None:
        states = arguments[0]
        size, heads = module.attention_head_size, module.num_attention_heads
        query, key, value = (
            linear(states)[0].unflatten(-1, (heads, size))[:, head]
            for linear in (module.query, module.key, module.value)
        )
        found.append((query @ key.T * module.scaling, value))

    layers: Any = model.encoder.layer
    with watched((layer.attention.self for layer in layers), keep):
        model(row[None])
    return found


def random_maps(n: int, size: int, generator: torch.Generator) -> Pair:
    """Scores of standard normal queries and keys, and standard normal values."""
    query, key, value = (torch.randn(n, size, generator=generator) for _ in range(3))
    return query @ key.T / math.sqrt(size), value


def theory(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Measure as the recipe says: a YAML file, with `section.key=value` applied over it.

    Returns:
        The folder with results.json, theory.md and three plots.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        ValueError: a length is more than the model reads, or than the texts have.
    """
    recipe = read_recipe(recipe_path, overrides)
    section: Theory = recipe.build("theory")
    run = open_run("theory", section.output_dir, recipe.raw)
    source = read_source(section.model, section.revision)
    assert source.tokenizer is not None
    if max(section.lengths) > source.length:
        raise ValueError(f"lengths={section.lengths}: {section.model!r} reads at most {source.length} tokens.")
    texts = text_rows(section.corpus, source.tokenizer, max(section.lengths), section.rows, 1, section.seed)
    model = exact_twin(source, source.length, "repeat").base_model.eval()
    cells = measure(model, texts.calibration, section)
    facts = {"texts": len(texts.calibration), "cells": cells}
    content = run.content(section.seed, "cpu", "float32", **facts)
    run.folder.mkdir(parents=True, exist_ok=True)
    longest = max(section.lengths)
    plot_errors(run.folder / FIRST_FILE, cells, longest, "theorem_1", "Theorem 1: |P~ w - P w| / |P w|")
    plot_errors(run.folder / SECOND_FILE, cells, longest, "theorem_2", "Theorem 2: error over |softmax(w)| |V|")
    plot_failures(run.folder / LENGTH_FILE, cells, section)
    text = markdown(content, section)
    run.write(content, text, "theory.md")
    return run.tell(text, "Theorems, plots")


def measure(model: LinformerModel, rows: Sequence[torch.Tensor], section: Theory) -> list[dict[str, Any]]:
    """One cell for each N, kind of map (a layer's, or random) and K."""
    generator = torch.Generator().manual_seed(section.seed)
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads
    cells = []
    for n in tqdm(section.lengths, desc="drawing projections", unit="length"):
        kinds: dict[str, list[Pair]] = {}
        for row in rows:
            head = int(torch.randint(heads, (1,), generator=generator))
            for number, found in enumerate(collect(model, row[:n], head)):
                kinds.setdefault(f"layer {number}", []).append(found)
            kinds.setdefault(RANDOM, []).append(random_maps(n, size, generator))
        for kind, pairs in kinds.items():
            for k in section.projected_lengths:
                cells.append({"kind": kind, "n": n, "k": k, **cell(pairs, n, k, section, generator)})
    return cells


def cell(pairs: Sequence[Pair], n: int, k: int, section: Theory, generator: torch.Generator) -> dict[str, Any]:
    """What `section.draws` projections of each map give."""
    first, second, zero, failures = [], [], [], []
    for scores, values in pairs:
        maps = scores.softmax(-1)
        zero += zero_2(scores, values).tolist()
        for _ in range(section.draws):
            r = projection(k, n, generator)
            stated, proved = theorem_1(maps, values, r)
            first += stated.tolist()
            failures.append(float((proved > section.epsilon).any(0).float().mean()))
            second += theorem_2(scores, values, r, section.delta).tolist()
    return {
        "theorem_1": spread(first),
        "theorem_1_stated_failures": sum(error > section.epsilon for error in first) / len(first),
        "theorem_1_proved_failures": statistics.mean(failures),
        "bound": bound(k, n, section.epsilon),
        "theorem_2": spread(second),
        "theorem_2_zero": spread(zero),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and the middle four fifths."""
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"median": middle, "low": low, "high": high}


def markdown(content: dict[str, Any], section: Theory) -> str:
    n = max(section.lengths)
    rows = []
    for found in (found for found in content["cells"] if found["n"] == n):
        rows.append([found["kind"], found["k"], "{median:.3f} ({low:.3f} to {high:.3f})".format(**found["theorem_1"])])
        rows[-1] += [f"{found[f'theorem_1_{what}_failures']:.3f}" for what in ("stated", "proved")]
        rows[-1] += [f"{found['bound']:.3g}"]
        rows[-1] += [f"{found[name]['median']:.3f}" for name in ("theorem_2", "theorem_2_zero")]
    epsilon = section.epsilon
    header = ["maps", "K", "theorem 1, error as stated (10 % to 90 %)", f"above {epsilon:g}"]
    header += [f"a row above {epsilon:g}, as proved", "the proof's bound", "theorem 2, error", "the answer zero"]
    return (
        f"N = {n}, `{section.model}`, {content['texts']} texts, {section.draws} projections of each map.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"By theorem 1 the answer zero has error 1. For eps = {epsilon:g} and N = {n} it asks for K = "
        f"{needed_k(n, epsilon):,}"
        + (f", more than N: {needed_k(n, epsilon):,} > {n}" if needed_k(n, epsilon) > n else "")
        + ". What the bound justifies: that the K for a fixed error of the products grows with log N. What it does "
        "not: a practical K, or random E and F as a start; errors near 1, or above zero's, are no approximation."
    )


def _figure(title: str, label: str) -> tuple[Any, Any]:
    figure, axes = new_figure((7, 4.6))
    axes.set(xscale="log", xlabel="K", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def plot_errors(path: Path, cells: Sequence[dict[str, Any]], n: int, name: str, title: str) -> None:
    """Median error against K with its middle four fifths, for every kind of map, and the answer zero."""
    figure, axes = _figure(f"{title}, N = {n}", "relative error")
    kinds = list(dict.fromkeys(found["kind"] for found in cells))
    for i, (kind, shade) in enumerate(zip(kinds, shades(len(kinds)), strict=True)):
        own = [found for found in cells if found["kind"] == kind and found["n"] == n]
        colour = "black" if kind == RANDOM else shade
        ks = [found["k"] for found in own]
        axes.plot(ks, [found[name]["median"] for found in own], color=colour, marker="o", markersize=3, label=kind)
        axes.fill_between(
            ks, [found[name]["low"] for found in own], [found[name]["high"] for found in own], color=colour, alpha=0.08
        )
        if name == "theorem_2":
            zeros = [found["theorem_2_zero"]["median"] for found in own]
            axes.plot(ks, zeros, color=colour, linestyle=":", linewidth=1, label="answer zero" if i == 0 else None)
    if name == "theorem_1":
        axes.axhline(1, color="gray", linestyle=":", label="answer zero")
    axes.set(yscale="log")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_failures(path: Path, cells: Sequence[dict[str, Any]], section: Theory) -> None:
    """Measured share of failures (all maps together) and the proof's bound, against K, for every N."""
    epsilon = section.epsilon
    figure, axes = _figure(f"Theorem 1: a row misses eps = {epsilon:g} (dashed: the proof's bound)", "probability")
    for i, n in enumerate(section.lengths):
        measured = [
            statistics.mean(c["theorem_1_proved_failures"] for c in cells if (c["n"], c["k"]) == (n, k))
            for k in section.projected_lengths
        ]
        axes.plot(section.projected_lengths, measured, color=f"C{i}", marker="o", markersize=3, label=f"N = {n}")
        ks = [2 ** (j / 4) for j in range(4 * 4, 4 * 13)]
        axes.plot(ks, [bound(round(k), n, epsilon) for k in ks], color=f"C{i}", linestyle="--", linewidth=1)
    axes.legend(fontsize=8)
    save_figure(figure, path)
