"""SET against its controls: which weights, how many of them, and how fast the model learns to refuse."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safekern import Mask, Scores
from safekern.prompts import Pairs
from safekern.tables import Column, Table
from safekern.training import REFUSAL_WEIGHT, TUNING_BATCH_SIZE, balanced, shuffled

from . import figures
from .lab import Lab
from .report import alike, cost_columns, costs, difference, first_step, last_rows, mean, percent, rows_at
from .runs import Experiment, Found, Plan, Record, Row, Run, read
from .tuning import Parts, optimizer_for, tune_and_measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO = 0.01
STEPS = (10, 30, 100)
LOW, HIGH = 3e-5, 1e-4
RATIOS = (0.001, 0.003, 0.01, 0.03, 0.1)
BALANCED, REFUSALS = "balanced", "refusals"
# Pairs per step, and the weight of refusals in the loss: those of `safekern set`, and others.
BALANCES = {BALANCED: (TUNING_BATCH_SIZE, REFUSAL_WEIGHT)}
for _size, _weight in ((4, 0.25), (4, 0.16), (4, 0.1), (6, 0.25), (6, 0.1)):
    BALANCES[f"{BALANCED}-{_size}-{_weight:g}"] = _size, _weight
_REFUSALS_BATCH_SIZE = 4


def gradient_only(scores: Scores) -> Scores:
    """The same gradients without sigma."""
    return ranked_by(scores, {name: scores.gradient(name) for name in scores})


def magnitude(lab: Lab, scores: Scores) -> Scores:
    """The size of the weights in place of their ESI."""
    params = dict(lab.model.named_parameters())
    return ranked_by(scores, {name: params[name].detach().float().cpu() for name in scores})


def ranked_by(
    scores: Scores, values: dict[str, torch.Tensor], sigma: Mapping[str, torch.Tensor] | None = None
) -> Scores:
    """Scores that rank by the size of other values, by default without sigma."""
    sigma = dict.fromkeys(values, torch.ones(())) if sigma is None else sigma
    return Scores(values, sigma, num_batches=scores.num_batches, model_numel=scores.model_numel, meta=scores.meta)


def _per_tensor(scores: Scores, ratio: float) -> Mask:
    """As many weights as ``top(ratio)`` has, an equal share of every tensor."""
    return scores.top(min(1.0, ratio * scores.model_numel / scores.numel), per="tensor")


# The main ones first. Each leaves the model as it was loaded.
METHODS: dict[str, Callable[[Lab, float, int], Mask | None]] = {
    "esi": lambda lab, ratio, seed: lab.base_scores().top(ratio),
    "random": lambda lab, ratio, seed: lab.base_scores().random(ratio, seed=seed),
    "full": lambda lab, ratio, seed: None,
    "bottom": lambda lab, ratio, seed: lab.base_scores().bottom(ratio),
    "gradient": lambda lab, ratio, seed: gradient_only(lab.base_scores()).top(ratio),
    "per-tensor": lambda lab, ratio, seed: _per_tensor(lab.base_scores(), ratio),
    "magnitude": lambda lab, ratio, seed: magnitude(lab, lab.base_scores()).top(ratio),
}


def parts(lab: Lab, recipe: str, answers: Pairs, seed: int, skip: int) -> Parts:
    """The batches of a recipe: one of `BALANCES`, or refusals alone."""
    data = lab.data
    if recipe == REFUSALS:
        return [(1.0, shuffled(lab.tokenizer, data.refusals, _REFUSALS_BATCH_SIZE, seed, skip=skip))]
    size, weight = BALANCES[recipe]
    return balanced(lab.tokenizer, data.refusals, answers, batch_size=size, refusal_weight=weight, seed=seed, skip=skip)


def balance(recipe: str) -> dict[str, float]:
    """What a recipe's name stands for, for the settings of a run: a default may become another one."""
    size, weight = (_REFUSALS_BATCH_SIZE, 1.0) if recipe == REFUSALS else BALANCES[recipe]
    return {"pairs_per_step": size, "refusal_weight": weight}


def _set_runs(plan: Plan) -> list[Run]:
    """Every method at both learning rates: the low one with all seeds, the high one and refusals alone with one.

    Ordered so that an interrupted experiment has the main comparison.
    """
    runs = [Run("set", "untouched", {"method": "none", "ratio": None, "lr": None, "recipe": None}, _untouched)]
    names = list(METHODS)
    (first, *others), steps = plan.seeds, plan.steps
    for methods in (names[:3], names[3:]):
        runs += [_run("set", method, RATIO, LOW, BALANCED, first, steps) for method in methods]
        runs += [_run("set", method, RATIO, LOW, REFUSALS, first, steps or STEPS[:2]) for method in methods]
        runs += [_run("set", method, RATIO, HIGH, BALANCED, first, steps) for method in methods]
        runs += [_run("set", method, RATIO, LOW, BALANCED, seed, steps) for seed in others for method in methods]
    return runs


def _ratio_runs(plan: Plan) -> list[Run]:
    """ESI and random at every ratio but the one that `_set_runs` has."""
    ratios = [ratio for ratio in RATIOS if ratio != RATIO]
    return [
        _run("ratio", method, ratio, LOW, BALANCED, plan.seeds[0], plan.steps)
        for ratio in ratios
        for method in ("esi", "random")
    ]


def _weight_runs(plan: Plan) -> list[Run]:
    """SET as `safekern set` does it, with every balance of refusals and answers."""
    return [_run("weight", "esi", RATIO, HIGH, recipe, plan.seeds[0], plan.steps) for recipe in BALANCES]


def _run(
    experiment: str, method: str, ratio: float, lr: float, recipe: str, seed: int, steps: Sequence[int] | None
) -> Run:
    ratio = 1.0 if method == "full" else ratio
    settings: dict[str, Any] = {"method": method, "ratio": ratio, "lr": lr, "recipe": recipe, "seed": seed}
    settings |= {**balance(recipe), "steps": list(steps or STEPS)}
    name = f"{method}-{ratio:g}-lr{lr:g}-{recipe}-seed{seed}"

    def perform(lab: Lab, record: Record) -> None:
        lab.reset()
        mask = METHODS[method](lab, ratio, seed)
        lab.reset()
        if mask is not None:
            top = lab.base_scores().top(ratio)
            record.facts |= {"selected": mask.numel, "jaccard_with_esi": round(mask.jaccard(top), 4)}
        make_optimizer, weights = optimizer_for(lab.model, mask, lr)
        make_parts = partial(parts, lab, recipe, lab.data.answers, seed)
        tune_and_measure(lab, record, make_optimizer, weights, make_parts, settings["steps"])

    return Run(experiment, name, settings, perform)


def _untouched(lab: Lab, record: Record) -> None:
    lab.reset()
    record.replace([{"step": 0, **lab.measure()}])


def _untouched_row(found: Iterable[Found]) -> Row | None:
    """What was measured of the model as it was loaded."""
    return next((run["rows"][0] for run in found if run["settings"]["method"] == "none" and run["rows"]), None)


def _by_recipe(found: Iterable[Found]) -> dict[tuple[str, float], list[Found]]:
    """The runs that tuned, by recipe and learning rate."""
    tuned = [run for run in found if run["settings"]["method"] != "none" and run["rows"]]
    return dict(sorted(alike(tuned, lambda run: (run["settings"]["recipe"], run["settings"]["lr"])).items()))


def _set_tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    untouched, groups = _untouched_row(found), _by_recipe(found)
    if untouched is not None and not groups:
        yield "as it was loaded", _tuning_table([], untouched, compact)
    for (recipe, lr), runs in groups.items():
        yield f"{recipe}, lr {lr:g}", _tuning_table(runs, untouched, compact)


def _ratio_tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    yield (
        "balanced; the ratio of 1% is in the table of set",
        _tuning_table([run for run in found if run["rows"]], None, compact, "ratio"),
    )


def _tuning_table(runs: Sequence[Found], untouched: Row | None, compact: bool, kept: str = "") -> Table:
    """Per method and ratio: attack success after each step, and what it cost after the last one.

    Args:
        runs: of one recipe and learning rate.
        untouched: what was measured before; without it there is nothing to count steps from.
        compact: without the columns that can be missed.
        kept: one that is shown all the same.
    """
    kinds = alike(runs, lambda run: (run["settings"]["method"], run["settings"]["ratio"]))
    steps = sorted({row["step"] for run in runs for row in run["rows"] if "attack_success" in row})
    # Seeds share the order of batches, so each is compared with its own.
    goals = {
        run["settings"]["seed"]: run["rows"][-1]["refusal_nll"][0]
        for run in runs
        if run["settings"]["method"] == "random" and run["finished"]
    }
    start = [] if untouched is None else [untouched]
    rows: list[list[Any]] = []
    beyond: list[str | None] = []
    if untouched is not None:
        rows.append(["untouched", None, None, *[percent(start)] * max(1, len(steps)), None, *costs(start), None])
    for method, ratio in sorted(kinds, key=lambda kind: (list(METHODS).index(kind[0]), kind[1])):
        mine = kinds[method, ratio]
        at = {step: rows_at(mine, step) for step in steps}
        reached = [
            first_step([*start, *run["rows"]], "refusal_nll", goals.get(run["settings"]["seed"])) for run in mine
        ]
        random = kinds.get(("random", ratio), kinds.get(("random", RATIO), []))
        beyond.append(None if method == "random" else difference(at[steps[-1]], rows_at(random, steps[-1])))
        successes = [percent(at[step]) for step in steps]
        rows.append([method, ratio, len(mine), *successes, beyond[-1], *costs(at[steps[-1]]), mean(reached)])
    last = f" at {steps[-1]}" if steps else ""
    columns = [Column("weights"), Column("ratio", "{:.2%}"), Column("seeds")]
    columns += [Column(f"attack success at {step}") for step in steps or (0,)]
    columns += [
        Column(f"attacks beyond random's{last}, points"),
        *cost_columns(last),
        Column("steps to the refusal NLL that random has at last", "{:.0f}"),
    ]
    missed = tuple({"ratio", "AUC"} - {kept}) if compact else ()
    missed += ("steps",) if untouched is None else ()
    missed += () if any(beyond) else ("attacks beyond",)
    shown = [i for i, column in enumerate(columns) if not column.key.startswith(missed)]
    return Table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _weight_tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    columns = [
        Column("pairs per step"),
        Column("weight of refusals", "{:g}"),
        Column("seeds"),
        Column("attack success"),
        *cost_columns(),
    ]
    rows = [
        [*kind, len(runs), percent(last_rows(runs)), *costs(last_rows(runs))]
        for kind, runs in sorted(alike(found, _balance_of).items())
    ]
    yield "at the last step, esi 1%, lr 0.0001", Table(columns, rows)


def _balance_of(run: Found) -> tuple[int, float]:
    return run["settings"]["pairs_per_step"], run["settings"]["refusal_weight"]


def _set_figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Refusal NLL and attack success against steps, a row of panels per recipe and learning rate."""
    untouched, groups = _untouched_row(found), _by_recipe(found)
    if not groups:
        return None
    start = [] if untouched is None else [untouched]
    figure, grid = figures.panels(len(groups), 2)
    tried = {run["settings"]["method"] for runs in groups.values() for run in runs}
    methods = [method for method in METHODS if method in tried]
    for ((recipe, lr), mine), panels in zip(groups.items(), grid, strict=True):
        for axes, key in zip(panels, ("refusal_nll", "attack_success"), strict=True):
            for method in methods:
                runs = [run for run in mine if run["settings"]["method"] == method]
                points = figures.mean_line([[*start, *run["rows"]] for run in runs], key)
                figures.line(axes, points, methods.index(method), method)
            axes.set(title=f"{recipe}, lr {lr:g}", xlabel="steps", ylabel=figures.COSTS[key])
        panels[1].yaxis.set_major_formatter(figures.PERCENT)
    figures.finish(figure, grid)
    return figure


def _ratio_figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """What was measured last against the ratio; that of 1% is from `set`."""
    measured = [run for run in [*found, *_at_main_ratio(found, folder)] if run["finished"]]
    if not measured:
        return None
    figure, grid = figures.panels(1, len(figures.COSTS))
    for place, (method, mine) in enumerate(alike(measured, lambda run: str(run["settings"]["method"])).items()):
        ratios = sorted(alike(mine, lambda run: float(run["settings"]["ratio"])).items())
        for axes, (key, label) in zip(grid[0], figures.COSTS.items(), strict=True):
            figures.line(axes, [(ratio, figures.mean_of(runs, key)) for ratio, runs in ratios], place, method)
            axes.set(xlabel="ratio", ylabel=label, xscale="log")
            axes.xaxis.set_major_formatter("{x:.1%}")
    grid[0][0].yaxis.set_major_formatter(figures.PERCENT)
    figures.finish(figure, grid)
    return figure


def _at_main_ratio(found: Sequence[Found], folder: Path) -> list[Found]:
    """The runs of `set` that differ from those of `ratio` in the ratio only."""
    wanted = {_but_ratio(run) for run in found}
    return [run for run in read(folder, "set") if _but_ratio(run) in wanted]


def _but_ratio(run: Found) -> str:
    return json.dumps({**run["settings"], "ratio": None}, sort_keys=True)


def _weight_figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Attack success against benign refusals, a line for each number of pairs."""
    kinds = sorted(alike([run for run in found if run["finished"]], _balance_of).items())
    if not kinds:
        return None
    figure, grid = figures.panels(1, 1)
    axes = grid[0][0]
    for place, size in enumerate(dict.fromkeys(size for (size, _), _ in kinds)):
        points = {
            weight: (figures.mean_of(runs, "benign_refusals"), figures.mean_of(runs, "attack_success"))
            for (pairs, weight), runs in kinds
            if pairs == size
        }
        figures.line(axes, list(points.values()), place, f"{size} pairs")
        for weight, point in points.items():
            axes.annotate(f"{weight:g}", point, (4, 4), textcoords="offset points", fontsize=8)
    axes.set(title="by the weight of refusals in the loss", xlabel="benign refusals", ylabel="attack success")
    axes.xaxis.set_major_formatter(figures.PERCENT)
    axes.yaxis.set_major_formatter(figures.PERCENT)
    figures.finish(figure, grid)
    return figure


SET = Experiment(_set_runs, _set_tables, _set_figure)
RATIOS_TRIED = Experiment(_ratio_runs, _ratio_tables, _ratio_figure, plots_too=("set",))
WEIGHT = Experiment(_weight_runs, _weight_tables, _weight_figure)
