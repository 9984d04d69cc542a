"""Noise on the weights of an aligned model: does safety break before fluency, and on which weights?"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safekern import Mask, perturb
from safekern.tables import Column, Table

from . import figures
from .aligned import aligned, made, safety_scores, utility_scores
from .lab import Lab
from .report import alike, cost_columns, costs, percent, rows_at
from .runs import Experiment, Found, Plan, Record, Row, Run
from .set import RATIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = (0.05, 0.1, 0.15, 0.2, 0.28, 0.38)
_ALIGNED = "set"

SELECTIONS: dict[str, Callable[[Lab, int], Mask]] = {
    "top": lambda lab, seed: safety_scores(lab, _ALIGNED).top(RATIO),
    "random": lambda lab, seed: safety_scores(lab, _ALIGNED).random(RATIO, seed=seed),
    "top but utility 1%": lambda lab, seed: _without_utility(lab, RATIO, 0.01),
    "top but utility 10%": lambda lab, seed: _without_utility(lab, RATIO, 0.1),
    # Half as many weights again as the top 1%.
    "top 3% but utility 10%": lambda lab, seed: _without_utility(lab, 0.03, 0.1),
    "utility": lambda lab, seed: utility_scores(lab, _ALIGNED).top(RATIO),
    # The same the other way round: what of their effect is safety's?
    "utility but top 1%": lambda lab, seed: _without_safety(lab, RATIO, 0.01),
    "utility 3% but top 10%": lambda lab, seed: _without_safety(lab, 0.03, 0.1),
    "trained": lambda lab, seed: lab.base_scores().top(RATIO),
    "bottom": lambda lab, seed: safety_scores(lab, _ALIGNED).bottom(RATIO),
}
_MAIN = ("top but utility 1%", "utility but top 1%", "top 3% but utility 10%", "utility 3% but top 10%")
# What a short table shows.
_SHORT_NOISE = (0.0, 0.1, 0.28)


def _noise_runs(plan: Plan) -> list[Run]:
    """Every selection over all levels, with one draw of noise; the main ones with all seeds."""
    first, *others = plan.seeds
    untouched = Run("perturb", "none", {"weights": "none", **made(_ALIGNED)}, _untouched)
    once = [_run(selection, first) for selection in SELECTIONS]
    return [untouched, *once, *(_run(selection, seed) for seed in others for selection in _MAIN)]


def _untouched(lab: Lab, record: Record) -> None:
    aligned(lab, _ALIGNED)
    record.replace([{"noise": 0.0, **lab.measure()}])


def _run(selection: str, seed: int) -> Run:
    def perform(lab: Lab, record: Record) -> None:
        mask = SELECTIONS[selection](lab, seed)
        record.facts |= {
            "selected": mask.numel,
            "utility_overlap": round((mask & utility_scores(lab, _ALIGNED).top(RATIO)).numel / mask.numel, 4),
        }
        aligned(lab, _ALIGNED)
        for level in NOISE[len(record.rows) :]:
            with perturb(lab.model, mask, level, seed):
                record.add({"noise": level, **lab.measure()})

    settings = {"weights": selection, **made(_ALIGNED), "noise": list(NOISE), "seed": seed}
    return Run("perturb", f"{selection.replace(' ', '-').replace('%', '')}-seed{seed}", settings, perform)


def _without_utility(lab: Lab, ratio: float, utility_ratio: float) -> Mask:
    return safety_scores(lab, _ALIGNED).top(ratio) - utility_scores(lab, _ALIGNED).top(utility_ratio)


def _without_safety(lab: Lab, ratio: float, safety_ratio: float) -> Mask:
    return utility_scores(lab, _ALIGNED).top(ratio) - safety_scores(lab, _ALIGNED).top(safety_ratio)


def _tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    columns = [
        Column("weights"),
        Column("seeds"),
        Column("noise", "{:g}"),
        Column("attack success"),
        *cost_columns(),
    ]
    kinds = alike(found, lambda run: str(run["settings"]["weights"]))
    rows = []
    for weights in ["none", *SELECTIONS]:
        mine = kinds.get(weights, [])
        for noise in sorted({row["noise"] for run in mine for row in run["rows"]}):
            at = rows_at(mine, noise, "noise")
            if not compact or noise in _SHORT_NOISE:
                rows.append([weights, len(mine), noise, percent(at), *costs(at)])
    yield "noise in units of each tensor's sigma", Table(columns, rows)


def _figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Attack success, benign NLL and broken answers against noise."""
    labels = {"attack_success": "attack success", "benign_nll": "benign NLL", "broken": "broken answers"}
    figure, grid = figures.panels(1, len(labels))

    def measured(weights: str) -> list[list[Row]]:
        return [
            [{**row, "broken": [row["broken_harmful"] + row["broken_benign"]]} for row in run["rows"]]
            for run in found
            if run["settings"]["weights"] == weights
        ]

    clean = [row for rows in measured("none") for row in rows]
    for place, weights in enumerate(SELECTIONS):
        for axes, (key, label) in zip(grid[0], labels.items(), strict=True):
            lines = [clean + rows for rows in measured(weights)]
            figures.line(axes, figures.mean_line(lines, key, "noise"), place, weights)
            axes.set(xlabel="noise, in sigma of each tensor", ylabel=label)
    grid[0][0].yaxis.set_major_formatter(figures.PERCENT)
    figures.finish(figure, grid)
    return figure


PERTURB = Experiment(_noise_runs, _tables, _figure)
