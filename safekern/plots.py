"""The pictures of masks and scores, and what all pictures start from and end in.

matplotlib is optional and takes long to import, so it is imported only once something is drawn.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safekern import files, names
from safekern.distribution import Distribution
from safekern.errors import InvalidArgumentError, MissingDependencyError
from safekern.files import StrPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from safekern.mask import Mask, Summary

# Rows of a heat map: an odd model may have any number of differently named parts, an image may not.
_MOST_ROWS = 40
# From here on the cells of a heat map are stored as pixels, which takes less than a path for each.
_MOST_PATHS = 2000
_MOST_TICKS = 40
# Inches: narrow, so that text stays legible where a chart is shrunk to the width of a phone.
_CHART_WIDTH = 5.4


@dataclass(frozen=True)
class Theme:
    """The colours of a figure: text, lines beside it, cells without a value, background, and up to six series."""

    text: str
    line: str
    empty: str
    background: str
    series: tuple[str, ...]


# The series are Okabe and Ito's, which people with any kind of colour vision can tell apart.
LIGHT = Theme(
    "#1f2328", "#8c959f", "#e8e8e8", "#ffffff", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
)
DARK = Theme(
    "#e6edf3", "#7d8590", "#30363d", "#161b22", ("#56b4e9", "#ff8c3b", "#2fc99b", "#e5a3c6", "#f0c040", "#8fb4ff")
)
_MARKERS = "osD^vP"


def check_available() -> None:
    """Raises what drawing would raise, to be called before long work starts.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('Plotting needs matplotlib: pip install "safekern[plot]".') from error


def new_figure(theme: Theme = LIGHT) -> "Figure":
    """An empty figure, which belongs to no window and no global state.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_available()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", facecolor=theme.background)


def mask_figure(mask: "Mask", theme: Theme = LIGHT) -> "Figure":
    """The density of each component in each layer, and below it that of each expert where the mask holds experts.

    Raises:
        InvalidArgumentError: The mask selects nothing.
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(theme)
    summary, experts = mask.summary(), mask.expert_summary()
    if not summary:
        raise InvalidArgumentError("The mask selects nothing, so there is nothing to plot.")
    sizes = [_map_size(summary, "component")]
    if experts:
        sizes.append(_map_size(experts, "expert"))
    figure.set_size_inches(max(width for width, _ in sizes), sum(height for _, height in sizes))
    axes = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=[height for _, height in sizes])[:, 0]
    _draw_map(axes[0], summary, "component", theme)
    axes[0].set_title(
        f"Selected weights: {mask.numel:,} of {mask.model_numel:,} ({100 * mask.density:.3g}%)",
        fontsize=10,
        color=theme.text,
    )
    if experts:
        _draw_map(axes[1], experts, "expert", theme)
    return figure


def component_map(summary: "Summary", theme: Theme = LIGHT) -> "Figure":
    """The rows of :meth:`Mask.summary` as a heat map: components down, layers across."""
    return _map(summary, "component", theme)


def expert_map(summary: "Summary", theme: Theme = LIGHT) -> "Figure":
    """The rows of :meth:`Mask.expert_summary` as a heat map: experts down, layers across."""
    return _map(summary, "expert", theme)


def esi_histogram(every: Distribution, selected: Distribution, cutoff: float, theme: Theme = LIGHT) -> "Figure":
    """How the ESI of all scored weights is distributed, with those of a mask in front, both axes logarithmic.

    Args:
        every: The ESI of all scored weights, some of them above zero.
        selected: The ESI of the selected ones.
        cutoff: The smallest ESI among the selected weights, marked with a line.
        theme: Colours.
    """
    figure = new_figure(theme)
    # A share of 0.01% has scores as small as floats get, which would squeeze all others together.
    low, high = math.log10(_smallest_shown(every)), math.log10(every.largest)
    edges = np.logspace(low, max(high, low + 0.1) + 1e-3, 81)
    figure.set_size_inches(_CHART_WIDTH, 3.2)
    axes = _axes(figure, theme)
    axes.stairs(every.histogram(edges), edges, fill=True, color=theme.line, alpha=0.55, label="all scored")
    axes.stairs(selected.histogram(edges), edges, fill=True, color=theme.series[1], label="selected")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    if cutoff > 0:
        axes.axvline(cutoff, color=theme.text, linewidth=1, linestyle="--", label=f"smallest selected: {cutoff:.1e}")
    axes.set_xlabel("Expected Safety Impact of a weight", color=theme.text)
    axes.set_ylabel("weights in each bin", color=theme.text)
    _legend(figure, axes, theme)
    return figure


def overlap(rows: Mapping[str, Sequence[tuple[str, float, float]]], theme: Theme = LIGHT) -> "Figure":
    """How far other masks agree with one, per component.

    Args:
        rows: For each other mask, under the label to show, component, Jaccard index, and the Jaccard index that random
            masks of the same sizes would have, which is marked with a bar.
        theme: Colours.
    """
    figure = new_figure(theme)
    components = sorted({row[0] for values in rows.values() for row in values}, key=names.component_order)
    components = components[:_MOST_ROWS]
    figure.set_size_inches(_CHART_WIDTH, 0.32 * len(components) + 1.5)
    axes = _axes(figure, theme)
    axes.grid(axis="y", color=theme.line, alpha=0.3, linewidth=0.6)
    # The masks one above the other, around the middle of the component's line.
    offsets = np.linspace(-0.25, 0.25, len(rows)) if len(rows) > 1 else np.zeros(1)
    for number, (label, values) in enumerate(rows.items()):
        shown = [row for row in values if row[0] in components]
        offset = offsets[number]
        height = [components.index(row[0]) + offset for row in shown]
        color = theme.series[number % len(theme.series)]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot([row[1] for row in shown], height, marker, color=color, markersize=6, label=_label(label))
        chance = "by chance" if number == len(rows) - 1 else None
        axes.plot([row[2] for row in shown], height, "|", color=theme.text, markersize=9, label=chance)
    axes.set_yticks(range(len(components)), [_label(name) for name in components], fontsize=9, parse_math=False)
    axes.set_ylim(len(components) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("Jaccard index", color=theme.text)
    _legend(figure, axes, theme)
    return figure


def write(figure: "Figure", path: StrPath) -> None:
    """Writes an image; the suffix of the path chooses the format, PNG without one.

    Raises:
        InvalidArgumentError: The suffix is not an image format.
        FileAccessError: The path cannot be written.
    """
    files.check_path(path)
    suffix = Path(path).suffix[1:].lower() or "png"
    if suffix not in figure.canvas.get_supported_filetypes():
        raise InvalidArgumentError(f"{path}: matplotlib has no image format {suffix!r}; use .png, .svg or .pdf.")
    with files.replacing(path) as file:
        figure.savefig(file, format=suffix, dpi=150)


def data_uri(figure: "Figure") -> str:
    """The figure as an SVG image inside a URI, the same bytes for the same content."""
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "safekern"}):
        figure.savefig(content, format="svg", dpi=150, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _axes(figure: "Figure", theme: Theme) -> "Axes":
    axes = figure.add_subplot(facecolor=theme.background)
    axes.tick_params(colors=theme.text, which="both", labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)
    return axes


def _legend(figure: "Figure", axes: "Axes", theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=3 if sum(map(len, labels)) < 60 else 1,
        frameon=False,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(theme.text)


def _map(summary: "Summary", key: str, theme: Theme) -> "Figure":
    figure = new_figure(theme)
    figure.set_size_inches(*_map_size(summary, key))
    _draw_map(figure.add_subplot(), summary, key, theme)
    return figure


def _map_size(summary: "Summary", key: str) -> tuple[float, float]:
    columns = len({row.layer for row in summary})
    rows = len(_map_rows(summary, key))
    tall = 0.34 * rows if key == "component" else min(0.2 * rows, 6.0)
    return min(max(6.0, 0.24 * columns + 2.6), 14.0), max(2.6, tall + 1.3)


def _map_rows(summary: "Summary", key: str) -> list[Any]:
    """The components or experts to show, in order: of too many components those with most of the mask."""
    if key == "expert":
        return sorted({row.expert for row in summary if row.expert is not None})
    shares: dict[str, float] = {}
    for row in summary:
        shares[row.component] = shares.get(row.component, 0.0) + row.share
    shown = sorted(shares, key=lambda component: -shares[component])[:_MOST_ROWS]
    return sorted(shown, key=names.component_order)


def _draw_map(axes: "Axes", summary: "Summary", key: str, theme: Theme) -> None:
    from matplotlib.ticker import PercentFormatter

    rows, layers = _map_rows(summary, key), sorted({row.layer for row in summary}, key=names.ORDERS["layer"])
    grid = _percentages(summary, key, rows, layers)
    axes.set_facecolor(theme.empty)
    fine = len(rows) > _MOST_ROWS or grid.size > _MOST_PATHS
    mesh = axes.pcolormesh(
        grid, cmap="viridis", vmin=0, edgecolors="none" if fine else theme.background, linewidth=0.6, rasterized=fine
    )
    ticks = _spaced(layers)
    axes.set_xticks([i + 0.5 for i in ticks], [_layer(layers[i]) for i in ticks], fontsize=8)
    ticks = _spaced(rows)
    axes.set_yticks([i + 0.5 for i in ticks], [_label(str(rows[i])) for i in ticks], fontsize=9, parse_math=False)
    axes.tick_params(length=0, colors=theme.text)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_xlabel("layer (grey: nothing selected)", color=theme.text)
    if key == "expert":
        axes.set_ylabel("expert", color=theme.text)
    bar = axes.figure.colorbar(
        mesh, ax=axes, pad=0.02, aspect=20 if key == "component" else 40, format=PercentFormatter(decimals=None)
    )
    bar.set_label("selected share of the cell", fontsize=9, color=theme.text)
    bar.ax.tick_params(colors=theme.text)
    bar.outline.set_visible(False)


def _percentages(summary: "Summary", key: str, rows: list[Any], layers: list[int | None]) -> NDArray[np.float64]:
    """The density of every cell of a heat map, NaN where nothing is selected."""
    grid: NDArray[np.float64] = np.full((len(rows), len(layers)), np.nan)
    down, across = ({value: position for position, value in enumerate(values)} for values in (rows, layers))
    for row in summary:
        if row.selected and getattr(row, key) in down:
            grid[down[getattr(row, key)], across[row.layer]] = 100 * row.density
    return grid


def _spaced(values: Sequence[Any]) -> list[int]:
    """The positions that get a label: not more than are legible, and what is outside the layers in any case."""
    numbered = len(values) - (None in values)
    return [*range(0, numbered, math.ceil(numbered / _MOST_TICKS) or 1), *range(numbered, len(values))]


def _layer(number: int | None) -> str:
    return "none" if number is None else str(number)


def _label(text: str) -> str:
    """A name as matplotlib's font can show it, with nothing that would break the image."""
    safe = "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
    return safe if len(safe) <= 32 else safe[:15] + "..." + safe[-14:]


def _smallest_shown(distribution: Distribution) -> float:
    zeros = distribution.zeros / distribution.numel
    return distribution.quantile(zeros + (1 - zeros) * 1e-4) or distribution.largest / 10
