"""SPA: an aligned model is fine-tuned on a task with some of its weights protected. How much safety does that save?"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safekern import resume
from safekern.prompts import Pairs
from safekern.tables import Column, Table
from safekern.training import REFUSAL_WEIGHT, shuffled, with_rehearsal

from . import figures
from .aligned import ALIGNED, aligned, made, safety_scores, taught
from .lab import GSM8K_HELD_OUT, Lab
from .protection import REFRESHED, protecting_mask, protecting_optimizer
from .report import alike, at_step, first_step, last_rows, mean, number, percent, rows_at
from .runs import Experiment, Found, Plan, Record, Row, Run
from .set import RATIO
from .tuning import Parts, select_all, tune_and_measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = (10, 20, 50, 100, 200)
LONG = (10, 100, 300, 1000)
_WATCHED = (5, 15, 30, 70, 150, 300, 500, 700)
LR = 2e-5
# Shares of the loss: of refusals alone, and of what alignment was taught, refusals with ordinary answers.
REPLAYED = 0.1
REHEARSED = {"rehearse-0.3": 0.3, "rehearse-0.5": 0.5}
_NOTHING = ("nothing", 0.0)
_BATCH_SIZE = 4
# Shares of the task's gain at which attack success is compared.
_LEVELS = (0.5, 0.8)
CHAT, GSM8K = "chat", "gsm8k"


def _spa_runs(plan: Plan) -> list[Run]:
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


# Settings of the runs that train, and of those that measure a task's loss before.
_NOT_THE_START = {"task", "unlearned"}


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
        return alike(self.runs, lambda run: (run["settings"]["method"], run["settings"]["ratio"]))


def comparisons(found: Iterable[Found]) -> list[Comparison]:
    """The runs in groups to be compared, in order of method and ratio; those whose start is not measured yet are left
    out.
    """
    first = ("nothing", "esi", "random")

    def order(run: Found) -> tuple[Any, ...]:
        method = run["settings"].get("method", "")
        return first.index(method) if method in first else len(first), method, run["settings"].get("ratio", 0.0)

    measured = sorted((run for run in found if run["rows"]), key=order)
    starts = {
        run["settings"]["aligned"]: run["rows"][0] for run in measured if not run["settings"].keys() & _NOT_THE_START
    }
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
    """How well the task is learned at best with nothing protected, at any learning rate, in as many steps.

    Within the steps that all such runs take. One level for all comparisons on the same model and task, so that learning
    rates can be compared as well.

    Returns:
        None where everything that was run protects something.
    """
    unprotected = [
        (other.steps[-1], run)
        for other in groups
        if (other.aligned, other.task) == (group.aligned, group.task)
        for run in other.kinds.get(_NOTHING, [])
    ]
    shortest = min((steps for steps, _ in unprotected), default=0)
    losses = [row["task_nll"][0] for _, run in unprotected for row in run["rows"] if row["step"] <= shortest]
    return min(losses, default=None)


def _aligned_run(name: str) -> Run:
    def perform(lab: Lab, record: Record) -> None:
        aligned(lab, name)
        scores = safety_scores(lab, name)
        record.facts["jaccard_with_base"] = round(scores.top(RATIO).jaccard(lab.base_scores().top(RATIO)), 4)
        record.replace([{"step": 0, **lab.measure()}])

    return Run("spa", f"aligned-{name}", made(name), perform)


def _unlearned_run(name: str, plan: Plan) -> Run:
    """The loss on GSM8K before it is learned. That on ordinary answers is among what is always measured."""

    def perform(lab: Lab, record: Record) -> None:
        aligned(lab, name)
        record.replace([{"step": 0, "task_nll": lab.nll(_task(lab, GSM8K)[1])}])

    return Run("spa", f"aligned-{name}-{GSM8K}", {**made(name), "unlearned": GSM8K, "gsm8k": plan.gsm8k}, perform)


def _run(
    plan: Plan, name: str, task: str, lr: float, method: str, ratio: float, seed: int, steps: Sequence[int]
) -> Run:
    settings = {**made(name), "task": task, "lr": lr, "method": method, "ratio": ratio, "seed": seed}
    settings |= {"steps": list(steps), "pairs_per_step": _BATCH_SIZE, **_mixture(method)}
    settings |= {"gsm8k": plan.gsm8k} if task == GSM8K else {}

    def perform(lab: Lab, record: Record) -> None:
        pairs, held_out = _task(lab, task)
        mask = protecting_mask(lab, name, task, pairs, method, ratio, seed)
        safety = safety_scores(lab, name)
        aligned(lab, name)
        if mask is not None:
            record.facts |= {"protected": mask.numel}
        tune_and_measure(
            lab,
            record,
            protecting_optimizer(lab, lr, method, mask, ratio, safety),
            resume.Weights(select_all(lab.model)),
            lambda skip: _parts(lab, pairs, method, seed, skip),
            steps,
            watched=_WATCHED,
            # Its mask is ranked from the weights of such a step.
            saved_every=REFRESHED.get(method, 1),
            # The chat task's held-out answers are those that every row has measured.
            extra=lambda row: {"task_nll": row["benign_nll"] if task == CHAT else lab.nll(held_out)},
        )

    return Run("spa", f"{name}-{task}-lr{lr:g}-{method}-{ratio:g}-seed{seed}-{steps[-1]}steps", settings, perform)


def _mixture(method: str) -> dict[str, float]:
    """Shares of the loss that are not the task's, for the settings of a run."""
    if method == "replay":
        return {"replayed": REPLAYED}
    return {"rehearsed": REHEARSED[method], "refusal_weight": REFUSAL_WEIGHT} if method in REHEARSED else {}


def _parts(lab: Lab, pairs: Pairs, method: str, seed: int, skip: int) -> Parts:
    """The batches of a task, and what a method mixes into them."""
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


def _task(lab: Lab, task: str) -> tuple[Pairs, Pairs]:
    """What to train on, and what to measure the task's loss on."""
    if task == CHAT:
        return lab.data.answers[len(taught(lab)) :], lab.data.benign
    assert lab.data.gsm8k is not None
    return lab.data.gsm8k[:-GSM8K_HELD_OUT], lab.data.gsm8k[-GSM8K_HELD_OUT:]


def _tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    groups = comparisons(found)
    for group in groups:
        title = f"aligned: {group.aligned}; task: {group.task}; lr {group.lr}; steps {group.steps}"
        yield title, _at_equal_loss(group, least_task_nll(group, groups))
        if not compact:
            yield f"{title}; attack success by step", _by_step(group)


def _at_equal_loss(group: Comparison, best: float | None) -> Table:
    """Attack success and refusal NLL where the task's loss has come to the same point.

    Args:
        group: runs to compare.
        best: the task's NLL at all of its gain; without it there is no point to compare at.
    """
    start = group.start
    shares = () if best is None else _LEVELS
    levels = [start["task_nll"][0] - share * (start["task_nll"][0] - (best or 0.0)) for share in shares]
    columns = [Column("protected"), Column("ratio", "{:.0%}"), Column("seeds")]
    for share, level in zip(shares, levels, strict=True):
        note = f"at {share:.0%} of the task's gain (NLL {level:.2f})"
        columns += [
            Column(f"steps {note}", "{:.0f}", f"steps {note}"),
            Column(f"refusal NLL {note}", "{:.2f}", "refusal NLL there"),
            Column(f"attack success {note}", "{:.0%}", "attack success there"),
        ]
    columns += [
        Column("last attack success", "{}", "attack success at the last step"),
        Column("last benign refusals", "{}", "benign refusals at the last step"),
        Column("task NLL at the last step"),
    ]
    rows: list[list[Any]] = [["(start)", None, None]]
    rows[0] += [0, start["refusal_nll"][0], start["attack_success"][0]] * len(levels)
    rows[0] += [percent([start]), percent([start], "benign_refusals"), number([start], "task_nll")]
    for (method, ratio), mine in group.kinds.items():
        row: list[Any] = [method, ratio or None, len(mine)]
        measured = [[start, *run["rows"]] for run in mine]
        for level in levels:
            reached = [first_step(one, "task_nll", level) for one in measured]
            row.append(mean(reached))
            for key in ("refusal_nll", "attack_success"):
                row.append(mean([at_step(one, key, step) for one, step in zip(measured, reached, strict=True)]))
        ends = last_rows(mine)
        rows.append([*row, percent(ends), percent(ends, "benign_refusals"), number(ends, "task_nll")])
    return Table(columns, rows)


def _by_step(group: Comparison) -> Table:
    """Attack success after each step at which answers were counted, however well the task is learned by then."""
    columns = [Column("protected"), Column("ratio", "{:.0%}"), Column("seeds")]
    columns += [Column(f"{step} steps") for step in group.steps]
    rows: list[list[Any]] = []
    for (method, ratio), mine in group.kinds.items():
        cells = [percent(rows_at(mine, step)) for step in group.steps]
        rows.append([method, ratio or None, len(mine), *cells])
    return Table(columns, rows)


def _figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Refusal NLL against the task's NLL, which falls to the right: what is below the line of nothing saves safety.

    Up to where the task is learned best: what is overfitted is of no use to anyone.
    """
    groups = comparisons(found)
    if not groups:
        return None
    figure, grid = figures.panels((len(groups) + 1) // 2, 2)
    # Of all panels, so that a method has one colour.
    kinds = list(dict.fromkeys(kind for group in groups for kind in group.kinds))
    for group, axes in zip(groups, [axes for row in grid for axes in row], strict=False):
        for (method, ratio), runs in group.kinds.items():
            rows = [[group.start, *run["rows"]] for run in runs]
            learned, refused = (figures.mean_line(rows, key) for key in ("task_nll", "refusal_nll"))
            points = [(task, refusal) for (_, task), (_, refusal) in zip(learned, refused, strict=True)]
            best = min(range(len(points)), key=lambda i: points[i][0], default=0)
            label = f"{method} {ratio:.0%}" if ratio else method
            figures.line(axes, points[: best + 1], kinds.index((method, ratio)), label)
        axes.set(title=f"{group.aligned}, {group.task}, lr {group.lr}, {group.steps[-1]} steps")
        axes.set(xlabel="task NLL", ylabel="refusal NLL, held out")
        axes.invert_xaxis()
    figures.finish(figure, grid)
    return figure


SPA = Experiment(_spa_runs, _tables, _figure)
