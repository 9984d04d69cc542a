"""SPA: an aligned model is fine-tuned on a task with some of its weights protected. How much safety does that save?"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safekern import Mask, Scores, SPAAdamW, protect, resume
from safekern.prompts import Pairs
from safekern.training import shuffled, with_rehearsal

from .aligned import ALIGNED, aligned, safety_scores, task_scores, taught
from .lab import GSM8K_HELD_OUT, Lab
from .runs import Found, Plan, Record, Row, Run
from .set import BALANCED, RATIO, balance, ranked_by
from .tuning import Parts, select_all, tune_and_measure

STEPS = (10, 20, 50, 100, 200)
LONG = (10, 100, 300, 1000)
_WATCHED = (5, 15, 30, 70, 150, 300, 500, 700)
LR = 2e-5
# After how many steps the mask is ranked anew.
REFRESHED = {"refresh-50": 50, "refresh-10": 10}
# Shares of the loss: of refusals alone, and of what alignment was taught, refusals with ordinary answers.
REPLAYED = 0.1
REHEARSED = {"rehearse-0.3": 0.3, "rehearse-0.5": 0.5}
_NOTHING = ("nothing", 0.0)
_BATCH_SIZE = 4
_SCORED, _RESCORED = 128, 32
CHAT, GSM8K = "chat", "gsm8k"


def spa_runs(plan: Plan) -> list[Run]:
    """Ordered by what they tell: one seed of all methods, the others of the main ones, firmness, rates, length."""
    runs = [_aligned_run(name) for name in ALIGNED]
    runs += [_unlearned_run(name, plan) for name in ALIGNED if plan.gsm8k is not None]
    (first, *others), steps = plan.seeds, plan.steps or STEPS
    main = [_NOTHING, ("esi", 0.01), ("random", 0.01)]
    ratios = [("esi", 0.05), ("random", 0.05), ("esi", 0.1), ("random", 0.1), ("esi", 0.03)]
    variants = [("project", 0.01), ("project", 1.0), ("conflict", 0.01), ("conflict", 0.05)]
    # The last is what `safekern spa` does by default.
    variants += [("replay", 0.0), ("replay", 0.01), *((method, 0.0) for method in REHEARSED), ("rehearse-0.5", 0.01)]
    variants += [("refresh-50", 0.01), ("refresh-10", 0.01), ("refresh-10", 0.05)]
    variants += [("signed", 0.01), ("not-task", 0.01), ("not-task", 0.05)]
    for task in plan.tasks:
        runs += [_run(plan, "set", task, LR, *kind, first, steps) for kind in [*main, *ratios, *variants]]
    repeated = [*main, ("replay", 0.0), ("rehearse-0.5", 0.0), ("conflict", 0.05)]
    for task in plan.tasks:
        runs += [_run(plan, "set", task, LR, *kind, seed, steps) for seed in others for kind in repeated]
        firm = [*main, ("esi", 0.05), ("project", 1.0)]
        runs += [_run(plan, "firm", task, LR, *kind, first, steps) for kind in firm]
        rated = [*main, ("esi", 0.05), ("conflict", 0.05)]
        runs += [_run(plan, "set", task, lr, *kind, first, steps) for lr in (5e-6, 1e-4) for kind in rated]
        # For those who have nothing to rehearse.
        runs += [_run(plan, "set", task, 5e-6, *kind, seed, steps) for seed in others for kind in [_NOTHING, rated[-1]]]
        long = plan.steps or LONG
        lasting = [_NOTHING, ("rehearse-0.5", 0.0), *main[1:], *ratios]
        runs += [_run(plan, "set", task, LR, *kind, first, long) for kind in lasting]
        runs += [_run(plan, "firm", task, 5e-6, *kind, first, long) for kind in firm]
    # Long runs and others are the same ones where --steps says how long.
    return list({run.name: run for run in runs}.values())


class Comparison(NamedTuple):
    """Runs that differ in what was protected only.

    Attributes:
        aligned: Name of the model that they start from.
        task: What they learn.
        lr: Learning rate.
        steps: When they were measured.
        start: What was measured before the first step.
        runs: The runs.
    """

    aligned: str
    task: str
    lr: float
    steps: list[int]
    start: Row
    runs: list[Found]

    @property
    def kinds(self) -> dict[tuple[str, float], list[Found]]:
        """The runs by method and ratio, several where there are several seeds."""
        found: dict[tuple[str, float], list[Found]] = {}
        for run in self.runs:
            found.setdefault((run["settings"]["method"], run["settings"]["ratio"]), []).append(run)
        return found


def comparisons(found: Iterable[Found]) -> list[Comparison]:
    """The runs in groups to be compared, in order of method and ratio; those whose start is not measured yet are left
    out.
    """
    first = ("nothing", "esi", "random")

    def order(run: Found) -> tuple[Any, ...]:
        method = run["settings"].get("method", "")
        return first.index(method) if method in first else len(first), method, run["settings"].get("ratio", 0.0)

    measured = sorted((run for run in found if run["rows"]), key=order)
    starts = {run["settings"]["aligned"]: run["rows"][0] for run in measured if "recipe" in run["settings"]}
    losses = {(name, CHAT): row["benign_nll"] for name, row in starts.items()}
    for run in measured:
        if "unlearned" in run["settings"]:
            losses[run["settings"]["aligned"], run["settings"]["unlearned"]] = run["rows"][0]["task_nll"]
    groups: dict[tuple[str, ...], Comparison] = {}
    for run in measured:
        name, task, lr, steps = (run["settings"].get(key) for key in ("aligned", "task", "lr", "steps"))
        if task is None or name not in starts or (name, task) not in losses:
            continue
        start = {**starts[name], "task_nll": losses[name, task]}
        key = (name, task, str(lr), str(steps))
        groups.setdefault(key, Comparison(name, task, lr, steps, start, [])).runs.append(run)
    return [groups[key] for key in sorted(groups)]


def least_task_nll(group: Comparison, groups: Iterable[Comparison]) -> float | None:
    """How well the task is learned at best with nothing protected: at any learning rate, within the steps of all runs.

    One for all comparisons on the same model and task, so that learning rates can be compared as well.

    Returns:
        None where everything that was run protects something.
    """
    alike = [other for other in groups if (other.aligned, other.task) == (group.aligned, group.task)]
    shortest = min(other.steps[-1] for other in alike)
    return min(
        (
            row["task_nll"][0]
            for other in alike
            for run in other.kinds.get(_NOTHING, [])
            for row in run["rows"]
            if row["step"] <= shortest
        ),
        default=None,
    )


def _aligned_run(name: str) -> Run:
    def perform(lab: Lab, record: Record) -> None:
        aligned(lab, name)
        scores = safety_scores(lab, name)
        record.facts["jaccard_with_base"] = round(scores.top(RATIO).jaccard(lab.base_scores().top(RATIO)), 4)
        record.replace([{"step": 0, **lab.measure()}])

    return Run(
        "spa", f"aligned-{name}", {"aligned": name, "recipe": {**vars(ALIGNED[name]), **balance(BALANCED)}}, perform
    )


def _unlearned_run(name: str, plan: Plan) -> Run:
    """The loss on GSM8K before it is learned. That on ordinary answers is among what is always measured."""

    def perform(lab: Lab, record: Record) -> None:
        aligned(lab, name)
        record.replace([{"step": 0, "task_nll": lab.nll(_task(lab, GSM8K)[1])}])

    return Run("spa", f"aligned-{name}-{GSM8K}", {"aligned": name, "unlearned": GSM8K, "gsm8k": plan.gsm8k}, perform)


def _run(
    plan: Plan, name: str, task: str, lr: float, method: str, ratio: float, seed: int, steps: Sequence[int]
) -> Run:
    settings = {"aligned": name, "task": task, "lr": lr, "method": method, "ratio": ratio, "seed": seed}
    settings |= {"steps": list(steps), **({"gsm8k": plan.gsm8k} if task == GSM8K else {})}

    def perform(lab: Lab, record: Record) -> None:
        pairs, held_out = _task(lab, task)
        mask = _mask(lab, name, task, pairs, method, ratio, seed)
        safety = safety_scores(lab, name)
        aligned(lab, name)
        if mask is not None:
            record.facts |= {"protected": mask.numel}

        def make_optimizer(done: int) -> Optimizer:
            if method == "project" and mask is not None:
                return _projected(lab.model, lr, mask, safety)
            if method in REFRESHED and mask is not None:
                return _refreshed(lab, lr, mask, ratio, REFRESHED[method], done)
            if mask is not None:
                return SPAAdamW(lab.model.named_parameters(), mask, lr=lr)
            return torch.optim.AdamW(lab.model.named_parameters(), lr=lr)

        def make_parts(skip: int) -> Parts:
            if method == "replay":
                batches = shuffled(lab.tokenizer, pairs, _BATCH_SIZE, seed, skip=skip)
                refusals = shuffled(lab.tokenizer, lab.data.refusals, _BATCH_SIZE // 2, seed, skip=skip)
                return [(1 - REPLAYED, batches), (REPLAYED, refusals)]
            return with_rehearsal(
                lab.tokenizer,
                pairs,
                lab.data.refusals,
                taught(lab),
                batch_size=_BATCH_SIZE,
                rehearsal=REHEARSED.get(method, 0.0),
                seed=seed,
                skip=skip,
            )

        tune_and_measure(
            lab,
            record,
            make_optimizer,
            resume.Weights(select_all(lab.model)),
            make_parts,
            steps,
            watched=_WATCHED,
            # The chat task's held-out answers are those that every row has measured.
            extra=lambda row: {"task_nll": row["benign_nll"] if task == CHAT else lab.nll(held_out)},
        )

    return Run("spa", f"{name}-{task}-lr{lr:g}-{method}-{ratio:g}-seed{seed}-{steps[-1]}steps", settings, perform)


def _task(lab: Lab, task: str) -> tuple[Pairs, Pairs]:
    """What to train on, and what to measure the task's loss on."""
    if task == CHAT:
        return lab.data.answers[len(taught(lab)) :], lab.data.benign
    assert lab.data.gsm8k is not None
    return lab.data.gsm8k[:-GSM8K_HELD_OUT], lab.data.gsm8k[-GSM8K_HELD_OUT:]


def _mask(lab: Lab, name: str, task: str, pairs: Pairs, method: str, ratio: float, seed: int) -> Mask | None:
    """Which weights a method protects."""
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


def _projected(model: nn.Module, lr: float, mask: Mask, safety: Scores) -> Optimizer:
    """AdamW whose steps never move the masked weights, taken together, down the safety gradient."""
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr)
    # Without indices where they are all there are, which saves much time.
    selected = {
        name: (param, None if indices.numel() == param.numel() else indices)
        for name, (param, indices) in mask.parameters(model).items()
    }
    weights = resume.Weights(selected)
    downhill = {}
    for name, (param, indices) in selected.items():
        gradient = safety.gradient(name).reshape(-1).to(param.device)
        downhill[name] = gradient if indices is None else gradient[indices.long()]
    squared = sum(float(gradient.square().sum()) for gradient in downhill.values())
    before: dict[str, Tensor] = {}

    def save(*_: Any) -> None:
        before.update(weights.read())

    def project(*_: Any) -> None:
        after = weights.read()
        # To first order, how much the step raises the loss on refusals.
        raised = sum(float(((after[name] - before[name]) * downhill[name]).sum()) for name in after)
        if raised > 0:
            weights.write({name: value - raised / squared * downhill[name] for name, value in after.items()})

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
