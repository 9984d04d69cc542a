"""A guard's judgement of the model's own answers as the safety score, beside the likelihood of refusals."""

from functools import partial
from typing import Any, cast

import safekern
from safekern import Scores
from safekern.evaluation import attack_success_rate
from safekern.objectives import GuardJudge

from .lab import Lab, load_model
from .runs import Plan, Record, Run
from .set import BALANCED, LOW, RATIO, STEPS, balance, parts
from .tuning import optimizer_for, tune_and_measure

PROMPTS = (16, 64)
_BATCH_SIZE = 8


def judge_runs(plan: Plan) -> list[Run]:
    """Overlap with the refusal mask, and SET on the judge's, for each number of prompts."""
    return [_run(count, plan) for count in PROMPTS]


def _run(count: int, plan: Plan) -> Run:
    seed, steps = plan.seeds[0], list(plan.steps or STEPS)
    settings = {"guard": plan.guard, "prompts": count, "ratio": RATIO, "lr": LOW, "seed": seed, "steps": steps}
    settings |= balance(BALANCED)

    def perform(lab: Lab, record: Record) -> None:
        guard, guard_tokenizer = load_model(plan.guard) if plan.guard else (lab.model, lab.tokenizer)
        guard.to(lab.device)  # type: ignore[arg-type]
        judge = GuardJudge(guard, guard_tokenizer, lab.tokenizer)
        prompts = lab.data.refusals.prompts[:count]
        batches = [prompts[start : start + _BATCH_SIZE] for start in range(0, count, _BATCH_SIZE)]

        def make() -> Scores:
            lab.reset()
            return safekern.score(lab.model, batches, cast(Any, judge))

        scores = lab.cached_scores(f"judge-{plan.guard or 'itself'}-{count}".replace("/", "-"), make)
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

    return Run("judge", f"{count}-prompts-seed{seed}", settings, perform)


def _telling(lab: Lab, judge: GuardJudge) -> float:
    """How well the judge tells refusals from what the model answers to the same held-out prompts; 0.5 is chance."""
    held_out = lab.data.harmful[:32]
    answers = attack_success_rate(lab.model, lab.tokenizer, held_out.prompts, batch_size=32).responses
    refused = [judge.log_odds(*pair) for pair in zip(held_out.prompts, held_out.responses, strict=True)]
    answered = [judge.log_odds(*pair) for pair in zip(held_out.prompts, answers, strict=True)]
    return sum((a > b) + (a == b) / 2 for a in refused for b in answered) / (len(refused) * len(answered))
