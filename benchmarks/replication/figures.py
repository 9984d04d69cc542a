"""Plots from the JSON files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safekern import plots
from safekern.errors import MissingDependencyError

from .alignment import METHODS
from .runs import Found, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = (*plots.LIGHT.series, plots.LIGHT.text, plots.LIGHT.line)
_MARKERS = "osD^vPX*"


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
    tuned = [run for run in found if run["settings"]["method"] != "none" and run["rows"]]
    start = [row for run in found if run["settings"]["method"] == "none" for row in run["rows"]]
    settings = sorted({(run["settings"]["recipe"], run["settings"]["lr"]) for run in tuned})
    if not settings:
        return None
    figure, grid = _panels(len(settings), 2)
    methods = [method for method in METHODS if any(run["settings"]["method"] == method for run in tuned)]
    for (recipe, lr), panels in zip(settings, grid, strict=True):
        mine = [run for run in tuned if (run["settings"]["recipe"], run["settings"]["lr"]) == (recipe, lr)]
        for axes, key, label in zip(
            panels, ("refusal_nll", "attack_success"), ("refusal NLL, held out", "attack success"), strict=True
        ):
            for method in methods:
                runs = [run for run in mine if run["settings"]["method"] == method]
                points = _mean_line([[*start, *run["rows"]] for run in runs], key)
                _line(axes, points, methods.index(method), method)
            axes.set(title=f"{recipe}, lr {lr:g}", xlabel="steps", ylabel=label)
    _finish(figure, grid)
    return figure


def _perturb(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Attack success and benign NLL against noise."""
    figure, grid = _panels(1, 2)
    clean = [row for run in found for row in run["rows"] if row["noise"] == 0]
    for number, run in enumerate(run for run in found if run["settings"]["weights"] != "none"):
        for axes, key in zip(grid[0], ("attack_success", "benign_nll"), strict=True):
            points = [(row["noise"], row[key][0]) for row in [*clean[:1], *run["rows"]]]
            _line(axes, points, number, run["settings"]["weights"])
            axes.set(xlabel="noise, in sigma of each tensor", ylabel=key.replace("_", " ").replace("nll", "NLL"))
    _finish(figure, grid)
    return figure


def _spa(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Refusal NLL against the task's NLL, which falls to the right: what is below the line of nothing saves safety."""
    from .report import spa_start

    starts = {
        run["settings"]["aligned"]: run["rows"][0] for run in found if "task" not in run["settings"] and run["rows"]
    }
    tuned = [run for run in found if "task" in run["settings"] and run["rows"] and run["settings"]["aligned"] in starts]
    keys = ("aligned", "task", "lr", "steps")
    groups = sorted({tuple(str(run["settings"][key]) for key in keys) for run in tuned})
    if not groups:
        return None
    figure, grid = _panels((len(groups) + 1) // 2, 2)
    kinds = list(dict.fromkeys((run["settings"]["method"], run["settings"]["ratio"]) for run in tuned))
    for group, axes in zip(groups, [axes for panels in grid for axes in panels], strict=False):
        mine = [run for run in tuned if tuple(str(run["settings"][key]) for key in keys) == group]
        start = spa_start(starts[group[0]], group[1])
        for run in mine:
            kind = run["settings"]["method"], run["settings"]["ratio"]
            points = [(row["task_nll"][0], row["refusal_nll"][0]) for row in [start, *run["rows"]]]
            _line(axes, points, kinds.index(kind), f"{kind[0]} {kind[1]:.0%}" if kind[1] else kind[0])
        axes.set(title="{}, {}, lr {}".format(*group), xlabel="task NLL", ylabel="refusal NLL, held out")
        axes.invert_xaxis()
    _finish(figure, grid)
    return figure


_FIGURES: dict[str, Callable[[Sequence[Found], Path], Any]] = {"set": _set, "perturb": _perturb, "spa": _spa}


def _mean_line(runs: Sequence[Sequence[Row]], key: str) -> list[tuple[float, float]]:
    """The mean over runs at every step that all of them have."""
    values = [{row["step"]: row[key][0] for row in rows if key in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, values))) if values else []
    return [(step, sum(one[step] for one in values) / len(values)) for step in steps]


def _panels(rows: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('Plotting needs matplotlib: pip install "safekern[plot]".') from error
    figure = Figure(layout="constrained", figsize=(4.2 * columns, 3.1 * rows + 0.6))
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _line(axes: "Axes", points: Sequence[tuple[float, float]], number: int, label: str) -> None:
    if points:
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, ls="-", color=color, label=label, markersize=4, linewidth=1.2)


def _finish(figure: "Figure", grid: "list[list[Axes]]") -> None:
    labels: dict[str, Any] = {}
    for axes in (axes for panels in grid for axes in panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_visible(axes.has_data())
    figure.legend(labels.values(), labels.keys(), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
