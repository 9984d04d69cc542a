"""Noise on the weights of an aligned model: does safety break before fluency, and on which weights?"""

from collections.abc import Callable

from safekern import Mask, perturb

from .aligned import aligned, safety_scores, utility_scores
from .lab import Lab
from .runs import Plan, Record, Run
from .set import RATIO

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
    # As many weights as "top but utility 1%", and of like scores: what of its effect is safety's?
    "utility but top 1%": lambda lab, seed: (
        utility_scores(lab, _ALIGNED).top(RATIO) - safety_scores(lab, _ALIGNED).top(RATIO)
    ),
    "trained": lambda lab, seed: lab.base_scores().top(RATIO),
    "bottom": lambda lab, seed: safety_scores(lab, _ALIGNED).bottom(RATIO),
}
_MAIN = ("top but utility 1%", "utility but top 1%")


def noise_runs(plan: Plan) -> list[Run]:
    """Every selection over all levels, with one draw of noise; the main ones with all seeds."""
    first, *others = plan.seeds
    untouched = Run("perturb", "none", {"weights": "none", "aligned": _ALIGNED}, _untouched)
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

    settings = {"weights": selection, "aligned": _ALIGNED, "noise": list(NOISE), "seed": seed}
    return Run("perturb", f"{selection.replace(' ', '-').replace('%', '')}-seed{seed}", settings, perform)


def _without_utility(lab: Lab, ratio: float, utility_ratio: float) -> Mask:
    return safety_scores(lab, _ALIGNED).top(ratio) - utility_scores(lab, _ALIGNED).top(utility_ratio)
