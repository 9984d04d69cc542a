"""Models that refuse, made from the one that was loaded: what perturbation and SPA start from."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from safekern import Scores
from safekern.modes import frozen
from safekern.prompts import Pairs
from safekern.training import tune

from .lab import Lab, checksum
from .set import BALANCED, HIGH, LOW, METHODS, RATIO, balance, parts
from .tuning import optimizer_for


@dataclass(frozen=True)
class _Alignment:
    method: str
    lr: float
    steps: int


# One as `safekern set` makes it, and one that was trained longer, in all weights.
ALIGNED = {"set": _Alignment("esi", HIGH, 100), "firm": _Alignment("full", LOW, 200)}


def taught(lab: Lab) -> Pairs:
    """The benign half that alignment sees; the other one is a task for SPA."""
    return lab.data.answers[: len(lab.data.answers) // 2]


def aligned(lab: Lab, name: str) -> None:
    """Puts the weights of an aligned model into the lab's."""
    recipe = ALIGNED[name]

    def make() -> None:
        mask = METHODS[recipe.method](lab, RATIO, 0)
        lab.reset()
        make_optimizer, weights = optimizer_for(lab.model, mask, recipe.lr)
        with frozen(weights.others(lab.model)):
            tune(lab.model, make_optimizer(0), parts(lab, BALANCED, taught(lab), 0, 0), recipe.steps)

    lab.reset(lab.cached_weights(_named_by_recipe(name), make))


def safety_scores(lab: Lab, name: str) -> Scores:
    """ESI of an aligned model, which is not that of the model it was made from."""
    return lab.cached_scores(f"{_named_by_recipe(name)}-safety", partial(_score, lab, name, lab.data.refusals))


def utility_scores(lab: Lab, name: str) -> Scores:
    """The same with helpful answers in place of refusals."""
    return lab.cached_scores(f"{_named_by_recipe(name)}-utility", partial(_score, lab, name, taught(lab)))


def task_scores(lab: Lab, name: str, task: str, pairs: Pairs) -> Scores:
    """The same with the pairs of a task."""
    return lab.cached_scores(f"{_named_by_recipe(name)}-{task}-{checksum(pairs)}", partial(_score, lab, name, pairs))


def made(name: str) -> dict[str, Any]:
    """How an aligned model is made, for the settings of a run that starts from it: a recipe may become another one."""
    return {"aligned": name, "recipe": {**vars(ALIGNED[name]), **balance(BALANCED)}}


def _named_by_recipe(name: str) -> str:
    """In the cache: one that was made by another recipe is not taken for it."""
    return f"{name}-{checksum([repr(made(name))])}"


def _score(lab: Lab, name: str, pairs: Pairs) -> Scores:
    aligned(lab, name)
    return lab.score(pairs)
