"""A guard's judgement of the model's own answers as the safety score, beside the likelihood of refusals."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safekern
from safekern import Scores
from safekern.errors import InvalidArgumentError
from safekern.evaluation import attack_success_rate
from safekern.objectives import GuardJudge
from safekern.tables import Column, Table, counted

from . import figures
from .lab import Lab, label, load_model
from .report import alike, cost_columns, costs, last_rows, mean, percent, rows_at
from .runs import Experiment, Found, Plan, Record, Run, read
from .set import BALANCED, LOW, RATIO, STEPS, balance, parts
from .tuning import optimizer_for, tune_and_measure

PROMPTS = (16, 64)
_BATCH_SIZE = 8

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _judge_runs(plan: Plan) -> list[Run]:
    """Overlap with the refusal mask, and SET on the judge's, for each number of prompts."""
    return [_run(count, plan) for count in PROMPTS]


def _run(count: int, plan: Plan) -> Run:
    seed, steps = plan.seeds[0], list(plan.steps or STEPS)
    guard_name = None if plan.guard is None else label(plan.guard)
    settings = {"guard": guard_name, "prompts": count, "ratio": RATIO, "lr": LOW, "seed": seed, "steps": steps}
    settings |= balance(BALANCED)

    def perform(lab: Lab, record: Record) -> None:
        if len(lab.data.refusals) < count:
            raise InvalidArgumentError(f"{counted(count, 'prompt')} to judge, but --pairs has {len(lab.data.refusals)}")
        guard, guard_tokenizer = load_model(plan.guard) if plan.guard else (lab.model, lab.tokenizer)
        if guard is not lab.model:
            guard.to(lab.device)  # type: ignore[arg-type]
            guard.forward = lab.computing()(guard.forward)
        judge = GuardJudge(guard, guard_tokenizer, lab.tokenizer)
        prompts = lab.data.refusals.prompts[:count]
        batches = [prompts[start : start + _BATCH_SIZE] for start in range(0, count, _BATCH_SIZE)]

        def make() -> Scores:
            lab.reset()
            return safekern.score(lab.model, batches, cast(Any, judge))

        scores = lab.cached_scores(f"judge-{guard_name or 'itself'}-{count}", make)
        lab.reset()
        mask, refusals = scores.top(RATIO), lab.base_scores().top(RATIO)
        few = lab.cached_scores(f"base-{count}", lambda: lab.score(lab.data.refusals[:count])).top(RATIO)
        record.facts |= {
            "jaccard_with_refusal": round(mask.jaccard(refusals), 4),
            "jaccard_of_refusals_with_as_many_prompts": round(few.jaccard(refusals), 4),
            "auc_of_judge": round(_telling(lab, judge), 4),
        }
        lab.reset()
        make_optimizer, weights = optimizer_for(lab.model, mask, LOW)
        make_parts = partial(parts, lab, BALANCED, lab.data.answers, seed)
        tune_and_measure(lab, record, make_optimizer, weights, make_parts, steps)

    by = "" if guard_name is None else f"-by-{guard_name}"
    return Run("judge", f"{count}-prompts{by}-seed{seed}", settings, perform)


def _telling(lab: Lab, judge: GuardJudge) -> float:
    """How well the judge tells refusals from what the model answers to the same held-out prompts; 0.5 is chance."""
    held_out = lab.data.harmful[:32]
    answers = attack_success_rate(lab.model, lab.tokenizer, held_out.prompts, batch_size=32).responses
    refused = [judge.log_odds(*pair) for pair in zip(held_out.prompts, held_out.responses, strict=True)]
    answered = [judge.log_odds(*pair) for pair in zip(held_out.prompts, answers, strict=True)]
    return sum((a > b) + (a == b) / 2 for a in refused for b in answered) / (len(refused) * len(answered))


def _judged(run: Found) -> tuple[str, int]:
    return run["settings"]["guard"] or "the model itself", run["settings"]["prompts"]


def _tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    steps = sorted({row["step"] for run in found for row in run["rows"] if "attack_success" in row})
    facts = {
        "auc_of_judge": "AUC of the judge",
        "jaccard_with_refusal": "Jaccard with refusal ESI",
        "jaccard_of_refusals_with_as_many_prompts": "Jaccard of refusal ESI on as many prompts",
    }
    columns = [
        Column("guard"),
        Column("prompts"),
        Column("seeds"),
        *(Column(heading, "{:.2f}") for heading in facts.values()),
        *(Column(f"attack success at {step}") for step in steps),
        *cost_columns(" at last"),
    ]
    rows = [
        [
            *kind,
            len(runs),
            *(mean([run["facts"].get(fact) for run in runs]) for fact in facts),
            *(percent(rows_at(runs, step)) for step in steps),
            *costs(last_rows(runs)),
        ]
        for kind, runs in sorted(alike(found, _judged).items())
    ]
    yield "SET on the judge's top 1%, balanced, lr 3e-5", Table(columns, rows)


def _figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """SET on a judge's masks, by step, beside that of refusals and random ones."""
    if not any(run["rows"] for run in found):
        return None
    lines = {f"{guard}, {prompts} prompts": runs for (guard, prompts), runs in alike(found, _judged).items()}
    same = [(BALANCED, run["settings"]["lr"], run["settings"]["seed"]) for run in found]
    for run in read(folder, "set"):
        settings = run["settings"]
        if settings["method"] in ("esi", "random") and (settings["recipe"], settings["lr"], settings["seed"]) in same:
            lines.setdefault(settings["method"], []).append(run)
    figure, grid = figures.panels(1, len(figures.COSTS))
    for place, (name, runs) in enumerate(lines.items()):
        for axes, (key, heading) in zip(grid[0], figures.COSTS.items(), strict=True):
            figures.line(axes, figures.mean_line([run["rows"] for run in runs], key), place, name)
            axes.set(xlabel="steps", ylabel=heading)
    grid[0][0].yaxis.set_major_formatter(figures.PERCENT)
    figures.finish(figure, grid)
    return figure


JUDGE = Experiment(_judge_runs, _tables, _figure, plots_too=("set",))
