"""`linformer-hf spectrum RECIPE.yaml`: how far from low rank are a model's attention maps, and which K do they need?

The paper's Figure 1 for any checkpoint that `convert` reads and any text. For the map P [N, N] of every head, with
singular values s_1 >= s_2 >= ...:

- the cumulative curve sum_{i <= k} s_i / sum_i s_i, as the paper plots it, and its value at one index;
- the effective rank: how many values hold 90 % or 95 % of the sum;
- the error of the map's best approximation of rank K on what attention gives, |(P - P_K) V| / |P V| with V [N, D] the
  head's values. With P = U S W^T and orthonormal U this is the norm of the rows beyond K of S W^T V, for all K at once.

A Linformer's map has rank K at most, and E and F are fixed while P_K depends on the input, so its own error is usually
larger; but P_K is made for P, not for P V, so this is no bound. The K recommended for a layer is the smallest multiple
of `step` at which the mean of this error over heads and texts is at most `tolerance`.
"""

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
from ..utils.places import own_name
from ..utils.recipe import load_recipe
from ..utils.reporting import markdown_table
from ..utils.timing import watched


CURVES_FILE, HEAT_FILE, ERROR_FILE = "curves.png", "heads.png", "output-error.png"
SIZE = (6.4, 4.4)
DASHED: dict[str, Any] = {"color": "gray", "linestyle": "--", "linewidth": 1}


@dataclass
class Spectrum:
    """Section `spectrum`.

    Args:
        output_dir: folder to fill.
        model: name or folder of what `linformer-hf convert` takes, an official fairseq Linformer included.
        revision: of a Hub repository.
        corpus: text, as `linformer-hf convert --calibrate` takes it.
        rows: texts of `length` tokens, drawn at random.
        length: N; by default all that the model reads.
        index: k of the heat map; by default N / 4.
        masses: shares of the sum, for the effective rank.
        tolerance: relative error of a layer's attention output that the recommended K may have.
        step: the recommended K is a multiple of it.
        seed: of the draw.
    """

    output_dir: str
    model: str
    corpus: str
    revision: str | None = None
    rows: int = 16
    length: int | None = None
    index: int | None = None
    masses: list[float] = field(default_factory=lambda: [0.9, 0.95])
    tolerance: float = 0.1
    step: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, values in (("tolerance", [self.tolerance]), ("masses", self.masses)):
            if not values or not all(0 < value < 1 for value in values):
                raise ValueError(f"{name} must lie between 0 and 1, got {values}.")


SECTIONS = {"spectrum": Spectrum}


class Statistics:
    """Sums over texts for every layer and head: memory does not grow with their number.

    Attributes:
        curve: the cumulative normalised singular values, [L, H, N].
        error: |(P - P_K) V| / |P V| for K = 0 ... N, [L, H, N + 1].
        ranks: effective ranks, [masses, L, H].
        lowest, highest: extremes of the curve at the index, [L, H].
    """

    def __init__(self, layers: int, heads: int, length: int, index: int, masses: Sequence[float]):
        self.index, self.masses, self.count = index, masses, 0
        self.curve = torch.zeros(layers, heads, length, dtype=torch.float64)
        self.error = torch.zeros(layers, heads, length + 1, dtype=torch.float64)
        self.ranks = torch.zeros(len(masses), layers, heads, dtype=torch.float64)
        self.lowest = torch.full((layers, heads), torch.inf, dtype=torch.float64)
        self.highest = torch.zeros(layers, heads, dtype=torch.float64)

    def add(self, layer: int, maps: torch.Tensor, values: torch.Tensor) -> None:
        """One text: attention maps P [H, N, N] and values V [H, N, D] of a layer."""
        _, singular, right = torch.linalg.svd(maps.float(), full_matrices=False)  # [H, N], [H, N, N]
        singular = singular.double()
        curve = singular.cumsum(-1) / singular.sum(-1, keepdim=True)  # [H, N]
        self.curve[layer] += curve
        at = curve[:, self.index - 1]
        self.lowest[layer] = torch.minimum(self.lowest[layer], at)
        self.highest[layer] = torch.maximum(self.highest[layer], at)
        for i, mass in enumerate(self.masses):
            self.ranks[i, layer] += (curve < mass).sum(-1) + 1
        shares = (singular[..., None] * (right @ values.float())).square().sum(-1)  # [H, N]
        total = shares.sum(-1, keepdim=True)
        beyond = torch.cat([total, total - shares.cumsum(-1)], -1).clamp(min=0)  # [H, N + 1]
        self.error[layer] += (beyond / total).sqrt()
        self.count += layer == 0

    def means(self) -> dict[str, torch.Tensor]:
        """The same, per text."""
        return {name: getattr(self, name) / self.count for name in ("curve", "error", "ranks")}


read_recipe = partial(load_recipe, sections=SECTIONS, built=("spectrum",))


def spectrum(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Measure as the recipe says: a YAML file, with `section.key=value` applied over it.

    Returns:
        The folder with results.json, spectrum.md and three plots.

    Raises:
        RecipeError: an unknown key or a value of the wrong type.
        ValueError: the model has no attention maps of N x N tokens, or the text is shorter than N.
    """
    recipe = read_recipe(recipe_path, overrides)
    section: Spectrum = recipe.build("spectrum")
    run = open_run("spectrum", section.output_dir, recipe.raw)
    source = read_source(section.model, section.revision)
    assert source.tokenizer is not None
    length = section.length or source.length
    if not 8 <= length <= source.length:
        raise ValueError(f"length={length} must lie between 8 and what {section.model!r} reads, {source.length}.")
    index = section.index or length // 4
    if not 1 <= index <= length:
        raise ValueError(f"index={index} must lie between 1 and length={length}.")
    texts = text_rows(section.corpus, source.tokenizer, length, section.rows, 1, section.seed)
    model = exact_twin(source, source.length, "repeat").base_model.eval()
    found = measure(model, texts.calibration, index, section.masses)
    facts = {"texts": len(texts.calibration), "length": length, "index": index}
    content = run.content(section.seed, "cpu", "float32", **facts, **summary(found, section, length))
    run.folder.mkdir(parents=True, exist_ok=True)
    means = found.means()
    plot_curves(run.folder / CURVES_FILE, means["curve"], index)
    plot_heads(run.folder / HEAT_FILE, means["curve"][..., index - 1], index)
    plot_error(run.folder / ERROR_FILE, means["error"], section.tolerance)
    text = markdown(content)
    run.write(content, text, "spectrum.md")
    return run.tell(text, "Spectrum, plots")


@torch.no_grad()
def measure(model: LinformerModel, rows: Sequence[torch.Tensor], index: int, masses: Sequence[float]) -> Statistics:
    """Statistics over the rows of ids, each [N], of a model that attends to every token (K = N)."""
    model.set_attn_implementation("eager")
    layers: Any = model.encoder.layer
    heads = model.config.num_attention_heads
    found = Statistics(len(layers), heads, len(rows[0]), index, masses)

    def keep(number: int, module: Any, arguments: tuple, output: tuple) -> None:
        states = arguments[0]  # [1, N, C]
        values = module.value(states)[0].unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, N, D]
        found.add(number, output[1][0][..., : states.shape[1]], values)

    with watched((layer.attention.self for layer in layers), keep):
        for row in tqdm(rows, desc="decomposing attention maps", unit="text"):
            model(row[None])
    return found


def summary(found: Statistics, section: Spectrum, length: int) -> dict[str, Any]:
    """The numbers of results.json: one entry for each layer, and the recommended K."""
    means = found.means()
    at = means["curve"][..., found.index - 1]  # [L, H]
    error = means["error"].mean(1)  # [L, N + 1]
    steps = [*range(section.step, length, section.step), length]
    layers, recommended = [], []
    for number in range(at.shape[0]):
        k = next(k for k in steps if error[number, k] <= section.tolerance or k == length)
        recommended.append(k)
        layers.append(
            {
                "mean_at_index": float(at[number].mean()),
                "heads_at_index": at[number].tolist(),
                "lowest_at_index": float(found.lowest[number].min()),
                "highest_at_index": float(found.highest[number].max()),
                "effective_rank": {
                    str(mass): float(means["ranks"][i, number].mean()) for i, mass in enumerate(found.masses)
                },
                "output_error": {str(k): float(error[number, k]) for k in steps},
                "curve": means["curve"][number].mean(0)[:: max(1, length // 64)].tolist(),
                "recommended_k": k,
            }
        )
    return {"layers": layers, "recommended_projected_length": recommended}


def markdown(content: dict[str, Any]) -> str:
    section, index = content["recipe"]["spectrum"], content["index"]
    masses = list(content["layers"][0]["effective_rank"])
    header = ["layer", f"sum of the first {index} of {content['length']} (lowest to highest head and text)"]
    header += [f"values for {100 * float(mass):g} %" for mass in masses]
    header += [f"error of the best approximation of rank {index} on the output", "K"]
    rows = []
    for number, layer in enumerate(content["layers"]):
        spread = f"{layer['mean_at_index']:.3f} ({layer['lowest_at_index']:.3f} to {layer['highest_at_index']:.3f})"
        error = layer["output_error"].get(str(index))
        ranks = [f"{layer['effective_rank'][mass]:.0f}" for mass in masses]
        rows.append([number, spread, *ranks, "" if error is None else f"{error:.3f}", layer["recommended_k"]])
    k = ",".join(str(value) for value in content["recommended_projected_length"])
    return (
        f"`{own_name(section['model'])}`, {content['texts']} texts of {content['length']} tokens from "
        f"`{own_name(section['corpus'])}`.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"K: the smallest multiple at which the map's best approximation of rank K moves attention's output by at most "
        f"{section.get('tolerance', 0.1):.0%} (mean over heads and texts). E and F do not depend on the input, so "
        f"a Linformer's own error is usually larger. To convert with it: `--projected-length {k}`."
    )


def plot_curves(path: Path, curves: torch.Tensor, index: int) -> None:
    """The paper's Figure 1, left: cumulative singular values [L, H, N], the mean over heads for each layer."""
    figure, axes = new_figure(SIZE)
    draw_layers(axes, curves.mean(1), 1)
    axes.set(xlabel="k", ylabel="normalised cumulative singular value")
    axes.set_title(f"Spectrum of the attention maps (dashed: k = {index})")
    axes.axvline(index, **DASHED)
    save_figure(figure, path)


def plot_error(path: Path, error: torch.Tensor, tolerance: float) -> None:
    """The error of the output [L, H, N + 1] from K = 0 on, the mean over heads for each layer."""
    figure, axes = new_figure(SIZE)
    draw_layers(axes, error.mean(1), 0)
    axes.set(xlabel="k", ylabel="relative error of the attention output")
    axes.set_title(f"Error of the best approximation of rank k (dashed: {tolerance:.0%})")
    axes.axhline(tolerance, **DASHED)
    save_figure(figure, path)


def draw_layers(axes: Any, curves: torch.Tensor, start: int) -> None:
    """A curve [n] over 'start' ... for each layer [L, n], dark to bright."""
    for number, (layer, colour) in enumerate(zip(curves, shades(len(curves), 0.9), strict=True)):
        axes.plot(range(start, start + len(layer)), layer.numpy(), color=colour, label=f"layer {number}")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=1 + len(curves) // 9)


def plot_heads(path: Path, at: torch.Tensor, index: int) -> None:
    """The paper's Figure 1, right: layer x head, the cumulative value at the index."""
    figure, axes = new_figure((7, 4.4))
    lowest = min(0.5, float(at.min()))
    image = axes.imshow(at.numpy(), cmap="viridis", vmin=lowest, vmax=1, aspect="auto", origin="lower")
    axes.set(xlabel="head", ylabel="layer", title=f"Normalised cumulative singular value at {index}")
    axes.set_xticks(range(at.shape[1]))
    axes.set_yticks(range(at.shape[0]))
    figure.colorbar(image)
    save_figure(figure, path)
