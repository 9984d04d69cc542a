"""Plots from the JSON files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safekern import plots
from safekern.names import component_order

from .noise import SELECTIONS
from .runs import Found, Row, read
from .set import BALANCED, METHODS, by_recipe, untouched_row
from .spa import comparisons

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = (*plots.LIGHT.series, plots.LIGHT.text, plots.LIGHT.line)
_MARKERS = "osD^vPX*"
_PERCENT = "{x:.0%}"
_COSTS = {"attack_success": "attack success", "refusal_nll": "refusal NLL, held out", "benign_nll": "benign NLL"}


def draw(experiment: str, found: Sequence[Found], folder: Path) -> None:
    """Draws an experiment as ``EXPERIMENT.png``, if anything has been measured.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _FIGURES[experiment](found, folder)
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


def _ratio(found: Sequence[Found], folder: Path) -> "Figure | None":
    """What was measured last against the ratio; that of 1% is from `set`."""
    measured = [run for run in [*found, *_at_main_ratio(found, folder)] if run["finished"]]
    if not measured:
        return None
    figure, grid = _panels(1, len(_COSTS))
    for number, method in enumerate(dict.fromkeys(run["settings"]["method"] for run in measured)):
        ends = [{**run["rows"][-1], **run["settings"]} for run in measured if run["settings"]["method"] == method]
        for axes, (key, label) in zip(grid[0], _COSTS.items(), strict=True):
            points = [(end["ratio"], end[key][0]) for end in sorted(ends, key=lambda end: float(end["ratio"]))]
            _line(axes, points, number, method)
            axes.set(xlabel="ratio", ylabel=label, xscale="log")
            axes.xaxis.set_major_formatter("{x:.1%}")
    grid[0][0].yaxis.set_major_formatter(_PERCENT)
    _finish(figure, grid)
    return figure


def _at_main_ratio(found: Sequence[Found], folder: Path) -> list[Found]:
    """The runs of `set` that differ from those of `ratio` in the ratio only."""
    alike = {_but_ratio(run) for run in found}
    return [run for run in read(folder, "set") if _but_ratio(run) in alike]


def _but_ratio(run: Found) -> str:
    return json.dumps({**run["settings"], "ratio": None}, sort_keys=True)


def _weight(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Attack success against benign refusals, a line for each number of pairs."""
    ends = [{**run["rows"][-1], **run["settings"]} for run in found if run["finished"]]
    if not ends:
        return None
    figure, grid = _panels(1, 1)
    axes = grid[0][0]
    for number, size in enumerate(sorted({end["pairs_per_step"] for end in ends})):
        same = sorted((end for end in ends if end["pairs_per_step"] == size), key=lambda end: end["refusal_weight"])
        _line(axes, [(end["benign_refusals"][0], end["attack_success"][0]) for end in same], number, f"{size} pairs")
        for end in same:
            place = end["benign_refusals"][0], end["attack_success"][0]
            axes.annotate(f"{end['refusal_weight']:g}", place, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(title="by the weight of refusals in the loss", xlabel="benign refusals", ylabel="attack success")
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    _finish(figure, grid)
    return figure


def _prompts(found: Sequence[Found], folder: Path) -> "Figure | None":
    """How far masks of fewer prompts agree with that of all, and ways of adding up with each other."""
    labels = {
        "with_all": "with all prompts",
        "disjoint_halves": "between halves",
        "abs": "mean of abs with abs of mean",
        "bf16": "bf16 with fp32 accumulation",
    }
    if not any(run["rows"] for run in found):
        return None
    figure, grid = _panels(1, 1)
    axes = grid[0][0]
    for number, (key, label) in enumerate(labels.items()):
        # Not in a list, as what has an interval is.
        runs = [[{**row, key: [row[key]]} for row in run["rows"]] for run in found]
        _line(axes, _mean_line(runs, key, "prompts"), number, label)
    axes.set(xlabel="prompts", ylabel="Jaccard index", xscale="log", ylim=(0, 1.05))
    sizes = sorted({row["prompts"] for run in found for row in run["rows"]})
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    _finish(figure, grid)
    return figure


def _where(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Enrichment by component and by layer."""
    measured = [run for run in found if run["rows"]]
    if not measured:
        return None
    figure, grid = _panels(1, 2)
    for axes, by in zip(grid[0], ("component", "layer"), strict=True):
        keys = list(dict.fromkeys(row[by] for run in measured for row in run["rows"] if row["by"] == by))
        if by == "component":
            keys.sort(key=component_order)
        for number, run in enumerate(measured):
            cells = {row[by]: row["enrichment"] for row in run["rows"] if row["by"] == by}
            points = [(place, cells[key]) for place, key in enumerate(keys) if key in cells]
            label = f"{run['settings']['weights']}, {run['settings']['ratio']:.1%}"
            _line(axes, points, number, label, "-" if by == "layer" else "")
        axes.axhline(1, color=plots.LIGHT.line, linewidth=0.8)
        axes.set(xlabel=by, ylabel="enrichment")
        if by == "component":
            axes.set_xticks(range(len(keys)), keys, rotation=45, ha="right")
        else:
            axes.locator_params(axis="x", integer=True)
    _finish(figure, grid)
    return figure


def _judge(found: Sequence[Found], folder: Path) -> "Figure | None":
    """SET on a judge's masks, by step, beside that of refusals and random ones."""
    if not any(run["rows"] for run in found):
        return None
    lines = {f"judged on {run['settings']['prompts']} prompts": run for run in found}
    same = [(BALANCED, run["settings"]["lr"], run["settings"]["seed"]) for run in found]
    for run in read(folder, "set"):
        settings = run["settings"]
        if settings["method"] in ("esi", "random") and (settings["recipe"], settings["lr"], settings["seed"]) in same:
            lines[settings["method"]] = run
    figure, grid = _panels(1, len(_COSTS))
    for number, (name, run) in enumerate(lines.items()):
        for axes, (key, label) in zip(grid[0], _COSTS.items(), strict=True):
            _line(axes, _mean_line([run["rows"]], key), number, name)
            axes.set(xlabel="steps", ylabel=label)
    grid[0][0].yaxis.set_major_formatter(_PERCENT)
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


_FIGURES: dict[str, Callable[[Sequence[Found], Path], Any]] = {
    "set": _set,
    "ratio": _ratio,
    "weight": _weight,
    "prompts": _prompts,
    "where": _where,
    "perturb": _perturb,
    "spa": _spa,
    "judge": _judge,
}


def _mean_line(runs: Sequence[Sequence[Row]], key: str, along: str = "step") -> list[tuple[float, float]]:
    """The mean over runs at every step, or level of noise, that all of them have."""
    values = [{row[along]: row[key][0] for row in rows if key in row} for rows in runs]
    steps = sorted(set.intersection(*map(set, values))) if values else []
    return [(step, sum(one[step] for one in values) / len(values)) for step in steps]


def _panels(rows: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    figure = plots.new_figure()
    figure.set_size_inches(4.2 * columns, 3.1 * rows + 0.6)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _line(axes: "Axes", points: Sequence[tuple[float, float]], number: int, label: str, style: str = "-") -> None:
    if points:
        # The markers move on with every round of colours, so that no two lines look alike.
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[(number + number // len(_COLORS)) % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, ls=style, color=color, label=label, markersize=4, linewidth=1.2)


def _finish(figure: "Figure", grid: "list[list[Axes]]") -> None:
    labels: dict[str, Any] = {}
    for axes in (axes for panels in grid for axes in panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_visible(axes.has_data())
    figure.legend(
        labels.values(), labels.keys(), loc="outside upper left", ncols=2 * len(grid[0]), frameon=False, fontsize=9
    )
