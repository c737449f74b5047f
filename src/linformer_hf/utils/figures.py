"""Pictures: matplotlib without pyplot, so that nothing of it is set for the whole process and no window can open."""

from pathlib import Path
from typing import Any

from .writing import beside


def new_figure(size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of so many inches and its axes; `options` are those of Figure.subplots, such as ncols."""
    from matplotlib.figure import Figure  # half a second

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(**options)


def plain_ticks(axis: Any) -> None:
    """On an axis by logarithms: 20 and not 2 x 10^1, also between powers of ten where there are few of them."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def shades(number: int, brightest: float = 0.8) -> list[Any]:
    """Colours from dark to bright."""
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, number - 1) * brightest) for i in range(number)]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with beside(path) as written:
        figure.savefig(written, dpi=120, format="png")
