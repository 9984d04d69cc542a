"""Plots from the JSON files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safekern import plots

from .noise import SELECTIONS
from .runs import Found, Row
from .set import METHODS, by_recipe, untouched_row
from .spa import comparisons

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = (*plots.LIGHT.series, plots.LIGHT.text, plots.LIGHT.line)
_MARKERS = "osD^vPX*"
_PERCENT = "{x:.0%}"


def draw(experiment: str, found: Sequence[Found], folder: Path) -> None:
    """Draws an experiment as ``EXPERIMENT.png``, if there is something to draw.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _FIGURES[experiment](found, folder) if experiment in _FIGURES else None
    if figure is not None:
        plots.write(figure, folder / f"{experiment}.png")


def _set(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Refusal NLL and attack success against steps, a row of panels per recipe and learning rate."""
    untouched, groups = untouched_row(found), by_recipe(found)
    if not groups:
        return None
    start = [] if untouched is None else [untouched]
    figure, grid = _panels(len(groups), 2)
    tried = {run["settings"]["method"] for runs in groups.values() for run in runs}
    methods = [method for method in METHODS if method in tried]
    for ((recipe, lr), mine), panels in zip(groups.items(), grid, strict=True):
        for axes, key, label in zip(
            panels, ("refusal_nll", "attack_success"), ("refusal NLL, held out", "attack success"), strict=True
        ):
            for method in methods:
                runs = [run for run in mine if run["settings"]["method"] == method]
                points = _mean_line([[*start, *run["rows"]] for run in runs], key)
                _line(axes, points, methods.index(method), method)
            axes.set(title=f"{recipe}, lr {lr:g}", xlabel="steps", ylabel=label)
        panels[1].yaxis.set_major_formatter(_PERCENT)
    _finish(figure, grid)
    return figure


def _perturb(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Attack success, benign NLL and broken answers against noise."""
    labels = {"attack_success": "attack success", "benign_nll": "benign NLL", "broken": "broken answers"}
    figure, grid = _panels(1, len(labels))

    def measured(weights: str) -> list[list[Row]]:
        return [
            [{**row, "broken": [row["broken_harmful"] + row["broken_benign"]]} for row in run["rows"]]
            for run in found
            if run["settings"]["weights"] == weights
        ]

    clean = [row for rows in measured("none") for row in rows]
    for number, weights in enumerate(SELECTIONS):
        for axes, (key, label) in zip(grid[0], labels.items(), strict=True):
            _line(axes, _mean_line([clean + rows for rows in measured(weights)], key, "noise"), number, weights)
            axes.set(xlabel="noise, in sigma of each tensor", ylabel=label)
    grid[0][0].yaxis.set_major_formatter(_PERCENT)
    _finish(figure, grid)
    return figure


def _spa(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Refusal NLL against the task's NLL, which falls to the right: what is below the line of nothing saves safety.

    Up to where the task is learned best: what is overfitted is of no use to anyone.
    """
    groups = comparisons(found)
    if not groups:
        return None
    figure, grid = _panels((len(groups) + 1) // 2, 2)
    # Of all panels, so that a method has one colour.
    kinds = list(dict.fromkeys(kind for group in groups for kind in group.kinds))
    for group, axes in zip(groups, [axes for panels in grid for axes in panels], strict=False):
        for (method, ratio), runs in group.kinds.items():
            rows = [[group.start, *run["rows"]] for run in runs]
            learned, refused = (_mean_line(rows, key) for key in ("task_nll", "refusal_nll"))
            points = [(task, refusal) for (_, task), (_, refusal) in zip(learned, refused, strict=True)]
            best = min(range(len(points)), key=lambda i: points[i][0], default=0)
            label = f"{method} {ratio:.0%}" if ratio else method
            _line(axes, points[: best + 1], kinds.index((method, ratio)), label)
        axes.set(title=f"{group.aligned}, {group.task}, lr {group.lr}, {group.steps[-1]} steps")
        axes.set(xlabel="task NLL", ylabel="refusal NLL, held out")
        axes.invert_xaxis()
    _finish(figure, grid)
    return figure


_FIGURES: dict[str, Callable[[Sequence[Found], Path], Any]] = {"set": _set, "perturb": _perturb, "spa": _spa}


def _mean_line(runs: Sequence[Sequence[Row]], key: str, along: str = "step") -> list[tuple[float, float]]:
    """The mean over runs at every step, or level of noise, that all of them have."""
    values = [{row[along]: row[key][0] for row in rows if key in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, values))) if values else []
    return [(step, sum(one[step] for one in values) / len(values)) for step in steps]


def _panels(rows: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    figure = plots.new_figure()
    figure.set_size_inches(4.2 * columns, 3.1 * rows + 0.6)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _line(axes: "Axes", points: Sequence[tuple[float, float]], number: int, label: str) -> None:
    if points:
        # The markers move on with every round of colours, so that no two lines look alike.
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[(number + number // len(_COLORS)) % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, ls="-", color=color, label=label, markersize=4, linewidth=1.2)


def _finish(figure: "Figure", grid: "list[list[Axes]]") -> None:
    labels: dict[str, Any] = {}
    for axes in (axes for panels in grid for axes in panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_visible(axes.has_data())
    figure.legend(labels.values(), labels.keys(), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
