"""What protects weights while an aligned model learns a task: masks, and optimizers that hold to them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safekern import Mask, Scores, SPAAdamW, protect, resume
from safekern.prompts import Pairs

from .aligned import safety_scores, task_scores
from .lab import Lab
from .set import ranked_by

# After how many steps the mask is ranked anew.
REFRESHED = {"refresh-50": 50, "refresh-10": 10}
_SCORED, _RESCORED = 128, 32


def protecting_mask(lab: Lab, name: str, task: str, pairs: Pairs, method: str, ratio: float, seed: int) -> Mask | None:
    """Which weights of an aligned model a method protects beside a task; None where it protects none."""
    if not ratio:
        return None
    safety = safety_scores(lab, name)
    if method == "random":
        return safety.random(ratio, seed=seed)
    if method == "signed":
        # A larger weight makes refusals less likely.
        values = {name: safety.gradient(name).clamp(min=0) for name in safety}
        return ranked_by(safety, values, safety.sigma).top(ratio)
    if method == "conflict":
        return safety.in_conflict_with(task_scores(lab, name, task, pairs[:_SCORED])).top(ratio)
    if method == "not-task":
        return safety.top(ratio) - task_scores(lab, name, task, pairs[:_SCORED]).top(ratio)
    return safety.top(ratio)


def protecting_optimizer(
    lab: Lab, lr: float, method: str, mask: Mask | None, ratio: float, safety: Scores
) -> Callable[[int], Optimizer]:
    """What makes a method's AdamW over the lab's model as it is, after so many steps."""
    params = list(lab.model.named_parameters())
    if mask is None:
        return lambda done: torch.optim.AdamW(params, lr=lr)
    if method == "project":
        return lambda done: _projected(lab.model, lr, mask, safety)
    if method in REFRESHED:
        return partial(_refreshed, lab, lr, mask, ratio, REFRESHED[method])
    return lambda done: SPAAdamW(params, mask, lr=lr)


def _projected(model: nn.Module, lr: float, mask: Mask, safety: Scores) -> Optimizer:
    """AdamW whose steps never move the masked weights, taken together, up the loss on refusals."""
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr)
    # Without indices where they are all there are, which saves much time.
    selected = {
        name: (param, None if indices.numel() == param.numel() else indices)
        for name, (param, indices) in mask.parameters(model).items()
    }
    weights = resume.Weights(selected)
    uphill = {}
    for name, (param, indices) in selected.items():
        gradient = safety.gradient(name).reshape(-1).to(param.device)
        uphill[name] = gradient if indices is None else gradient[indices.long()]
    squared = sum(float(gradient.square().sum()) for gradient in uphill.values())
    before: dict[str, Tensor] = {}

    def save(*_: Any) -> None:
        before.update(weights.read())

    def project(*_: Any) -> None:
        after = weights.read()
        # To first order, how much the step raises the loss on refusals.
        raised = sum(float(((after[name] - before[name]) * uphill[name]).sum()) for name in after)
        if raised > 0:
            weights.write({name: value - raised / squared * uphill[name] for name, value in after.items()})

    optimizer.register_step_pre_hook(save)
    optimizer.register_step_post_hook(project)
    return optimizer


def _refreshed(lab: Lab, lr: float, mask: Mask, ratio: float, every: int, done: int) -> Optimizer:
    """AdamW with the model's own top protected, ranked anew every so many steps."""
    optimizer = torch.optim.AdamW(lab.model.named_parameters(), lr=lr)

    def rank() -> Mask:
        return lab.score(lab.data.refusals[:_RESCORED]).top(ratio)

    protection = protect(optimizer, rank() if done else mask, lab.model.named_parameters())
    step, taken = optimizer.step, done

    # Not in a hook of the step, where torch goes through the hooks that this exchanges.
    def step_and_refresh(closure: Any = None) -> Any:
        nonlocal protection, taken
        loss = step(closure)
        taken += 1
        if taken % every == 0:
            protection.remove()
            protection = protect(optimizer, rank(), lab.model.named_parameters())
        return loss

    optimizer.step = step_and_refresh  # type: ignore[method-assign]
    return optimizer
