"""What the experiments draw their plots with."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safekern import plots

from .report import last_rows, value
from .runs import Found, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERCENT = "{x:.0%}"
COSTS = {"attack_success": "attack success", "refusal_nll": "refusal NLL, held out", "benign_nll": "benign NLL"}
_COLORS = (*plots.LIGHT.series, plots.LIGHT.text, plots.LIGHT.line)
_MARKERS = "osD^vPX*"


def panels(rows: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    """An empty figure."""
    figure = plots.new_figure()
    figure.set_size_inches(4.2 * columns, 3.1 * rows + 0.6)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def line(axes: "Axes", points: Sequence[tuple[float, float]], place: int, label: str, style: str = "-") -> None:
    """A line with the colour and marker of its place among the others."""
    if points:
        # The markers move on with every round of colours, so that no two lines look alike.
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[(place + place // len(_COLORS)) % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, ls=style, color=color, label=label, markersize=4, linewidth=1.2)


def mean_line(runs: Sequence[Sequence[Row]], key: str, along: str = "step") -> list[tuple[float, float]]:
    """The mean over runs at every step, or level of noise, that all of them have."""
    values = [{row[along]: row[key][0] for row in rows if key in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, values))) if values else []
    return [(step, sum(one[step] for one in values) / len(values)) for step in steps]


def mean_of(runs: Sequence[Found], key: str) -> float:
    """The mean over finished runs of what was measured last."""
    return statistics.fmean(value(row[key]) for row in last_rows(runs))


def finish(figure: "Figure", grid: "list[list[Axes]]") -> None:
    """One legend for all panels; those that show nothing are hidden."""
    labels: dict[str, Any] = {}
    for axes in (axes for row in grid for axes in row):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_visible(axes.has_data())
    figure.legend(
        labels.values(), labels.keys(), loc="outside upper left", ncols=2 * len(grid[0]), frameon=False, fontsize=9
    )
