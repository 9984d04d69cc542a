"""SET against its controls: which weights, how many of them, and how fast the model learns to refuse."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from safekern import Mask, Scores
from safekern.prompts import Pairs
from safekern.training import REFUSAL_WEIGHT, TUNING_BATCH_SIZE, balanced, shuffled

from .lab import Lab
from .runs import Found, Plan, Record, Row, Run
from .tuning import Parts, optimizer_for, tune_and_measure

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


def set_runs(plan: Plan) -> list[Run]:
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


def ratio_runs(plan: Plan) -> list[Run]:
    """ESI and random at every ratio but the one that `set_runs` has."""
    ratios = [ratio for ratio in RATIOS if ratio != RATIO]
    return [
        _run("ratio", method, ratio, LOW, BALANCED, plan.seeds[0], plan.steps)
        for ratio in ratios
        for method in ("esi", "random")
    ]


def weight_runs(plan: Plan) -> list[Run]:
    """SET as `safekern set` does it, with every balance of refusals and answers."""
    return [_run("weight", "esi", RATIO, HIGH, recipe, plan.seeds[0], plan.steps) for recipe in BALANCES]


def untouched_row(found: Iterable[Found]) -> Row | None:
    """What was measured of the model as it was loaded."""
    return next((run["rows"][0] for run in found if run["settings"]["method"] == "none" and run["rows"]), None)


def by_recipe(found: Iterable[Found]) -> dict[tuple[str, float], list[Found]]:
    """The runs that tuned, by recipe and learning rate."""
    groups: dict[tuple[str, float], list[Found]] = {}
    for run in found:
        if run["settings"]["method"] != "none" and run["rows"]:
            groups.setdefault((run["settings"]["recipe"], run["settings"]["lr"]), []).append(run)
    return dict(sorted(groups.items()))


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
