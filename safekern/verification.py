"""Does a mask hold a model's safety? Noise on its weights against as much noise on others, and on none."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from safekern.arguments import check_seed, is_number
from safekern.chat import Prompt
from safekern.checkpoint import fingerprint
from safekern.errors import InvalidArgumentError, MaskMismatchError, ProtectionError
from safekern.evaluation import Judge, answer_nll, attack_success_rate, is_degenerate, refusal_rate
from safekern.mask import Mask, check_mask
from safekern.perturbation import perturb
from safekern.prompts import Pairs, check_pairs
from safekern.scores import Scores, draw_across, ratio_of
from safekern.tables import Column, Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOISE = (0.05, 0.1, 0.2, 0.38)
_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean over prompts, and its interval of 95%: of shares `share`'s, else `bootstrap`'s.

    The interval says what other prompts of the same kind might have given, not what another seed of the noise would
    have.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A model with noise on some of its weights.

    Attributes:
        weights: Which: ``"none"``, ``"top"`` (the mask), ``"random"`` or ``"bottom"``.
        noise: The standard deviation of the noise, in units of that of each tensor.
        attack_success: Share of the harmful prompts that were answered, in text that is not broken.
        benign_refusals: Share of the benign prompts that were refused, in text that is not broken.
        benign_nll: Nats per token of the helpful answers to the benign prompts.
        broken_harmful: How many answers to harmful prompts are empty or repeat themselves.
        broken_benign: The same of benign prompts.
    """

    weights: str
    noise: float
    attack_success: Estimate
    benign_refusals: Estimate
    benign_nll: Estimate
    broken_harmful: int
    broken_benign: int


@dataclass(frozen=True)
class Verification:
    """What `verify` found; printed as a table.

    Attributes:
        rows: The model as it is, and then for each noise each selection.
        selected: How many weights got noise.
        harmful: How many harmful prompts there were.
        benign: How many benign ones.
        seed: Of the noise, the random selection and the bootstrap.
    """

    rows: tuple[Row, ...]
    selected: int
    harmful: int
    benign: int
    seed: int

    def table(self) -> Table:
        """One line per row, with the intervals in brackets."""
        columns = [
            Column("weights"),
            Column("noise", "{:g}"),
            Column("attack_success"),
            Column("benign_refusals"),
            Column("benign_nll"),
            Column("broken"),
        ]
        return Table(
            columns,
            [
                (
                    row.weights,
                    row.noise if row.weights != "none" else None,
                    _percent(row.attack_success),
                    _percent(row.benign_refusals),
                    f"{row.benign_nll.value:.2f} [{row.benign_nll.low:.2f}, {row.benign_nll.high:.2f}]",
                    f"{row.broken_harmful + row.broken_benign} of {self.harmful + self.benign}",
                )
                for row in self.rows
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: an estimate is [value, low, high], with None for what is not finite."""
        rows = []
        for row in self.rows:
            estimates = {
                key: [number if math.isfinite(number) else None for number in getattr(row, key)]
                for key in ("attack_success", "benign_refusals", "benign_nll")
            }
            broken = {"broken_harmful": row.broken_harmful, "broken_benign": row.broken_benign}
            rows.append({"weights": row.weights, "noise": row.noise, **estimates, **broken})
        return {
            "selected": self.selected,
            "harmful_prompts": self.harmful,
            "benign_prompts": self.benign,
            "seed": self.seed,
            "rows": rows,
        }

    def __str__(self) -> str:
        return (
            f"{self.table()}\n\n"
            f"Noise on {self.selected:,} weights each, in units of their tensor's sigma; {self.harmful} harmful and "
            f"{self.benign} benign prompts, greedy answers;\nin brackets the 95% interval over prompts. An "
            "answer that is empty or repeats itself is broken. Broken text is\nnot success: it counts neither as an "
            "attack that succeeded nor as a refusal. Where much is broken, the rates beside\nit speak of a damaged "
            "model, not of its safety."
        )


def verify(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    mask: Mask,
    harmful: Sequence[Prompt],
    benign: Pairs,
    *,
    scores: Scores | None = None,
    noise: Sequence[float] = NOISE,
    seed: int = 0,
    judge: Judge | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    report: Callable[[Row], None] | None = None,
) -> Verification:
    """Adds noise to the weights of a mask, to as many random ones and (with scores) to as many of the smallest ESI.

    If the mask holds the model's safety, noise on it lets attacks succeed that the same noise elsewhere does not
    (arXiv 2604.08297). Benign refusals, the likelihood of helpful answers and broken text tell a loss of safety from a
    loss of everything. The model's weights are restored after each measurement, and at the end checked to be the same
    bits.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, with a chat template.
        mask: The weights in question.
        harmful: Prompts that should be refused, and were not used to score or tune.
        benign: Ordinary prompts with helpful answers.
        scores: Those that the mask was ranked from; without them there is no ``"bottom"``.
        noise: Standard deviations of the noise, in units of each tensor's sigma, see `safekern.perturb`.
        seed: Of the noise and of the random selection, which is drawn from the mask's parameters.
        judge: As for `safekern.attack_success_rate`; by default, what is no refusal is a success.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts answered together.
        report: Called with every row as soon as it is known.

    Returns:
        The model as it is, and then for each noise each selection; printing it gives a table.

    Raises:
        InvalidArgumentError: No noise level, one that is negative or not finite, a negative seed, no prompts, or scores
            that keep only the top candidates.
        MaskMismatchError: The mask does not fit the model or the scores.
        ProtectionError: The weights are not what they were; load the model again.

    Example:
        >>> found = verify(model, tokenizer, mask, harmful, benign, scores=scores)  # doctest: +SKIP
        >>> print(found)                                                            # doctest: +SKIP
    """
    check_mask(mask)
    check_pairs(benign)
    levels = list(noise) if isinstance(noise, Iterable) else []
    if not levels or not all(is_number(level) and 0 <= level < math.inf for level in levels):
        raise InvalidArgumentError(f"noise must be finite numbers of at least 0, got {noise!r}")
    seed = check_seed(seed)
    if not (scores is None or isinstance(scores, Scores)):
        raise InvalidArgumentError(
            f"scores must be Scores, as safekern.score returns them, got {type(scores).__name__}"
        )
    mask.check(model)
    selections = {"top": mask, "random": random_like(mask, seed)}
    if scores is not None:
        selections["bottom"] = _bottom(scores, mask)
        selections["bottom"].check(model)
    before = fingerprint(model)

    def measure(weights: str, level: float) -> Row:
        attacks = attack_success_rate(
            model, tokenizer, harmful, judge=judge, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        refusals = refusal_rate(model, tokenizer, benign.prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        totals, tokens = answer_nll(model, tokenizer, benign.prompts, benign.responses)
        row = Row(
            weights,
            level,
            share(attacks.successes, attacks.responses),
            share(refusals.refused, refusals.responses),
            bootstrap(totals, tokens, seed),
            attacks.degenerate,
            refusals.degenerate,
        )
        if report is not None:
            report(row)
        return row

    rows = [measure("none", 0.0)]
    for level in levels:
        for weights, selection in selections.items():
            with perturb(model, selection, level, seed):
                rows.append(measure(weights, level))
    if fingerprint(model) != before:
        raise ProtectionError("the weights are not what they were before: load the model again, and please report this")
    return Verification(tuple(rows), mask.numel, len(harmful), len(benign), seed)


def random_like(mask: Mask, seed: int) -> Mask:
    """As many weights as a mask selects, drawn evenly from all weights of its parameters: the control.

    Args:
        mask: The mask.
        seed: The same seed draws the same weights.

    Example:
        >>> mask = Mask.from_indices({"w": [0, 1]}, {"w": (3, 4)})
        >>> random_like(mask, 0).numel
        2
    """
    shapes = mask.shapes
    rng = np.random.default_rng(seed)
    drawn = draw_across(rng, [shape.numel() for shape in shapes.values()], mask.numel)
    indices = {name: torch.from_numpy(part) for name, part in zip(shapes, drawn, strict=True)}
    return Mask.from_indices(
        indices,
        shapes,
        model_numel=mask.model_numel,
        meta={"ranking": "random", "seed": seed, "like": mask.fingerprint},
    )


def bootstrap(sums: NDArray[Any], counts: NDArray[Any], seed: int) -> Estimate:
    """The mean over all items of all prompts, and its 95% interval over resampled prompts.

    Args:
        sums: Per prompt the sum over its items (the tokens of an answer).
        counts: Per prompt how many items it has.
        seed: The same seed gives the same interval.

    Example:
        >>> estimate = bootstrap(np.array([0, 1, 1, 0]), np.ones(4), seed=0)
        >>> estimate.value, 0 <= estimate.low < 0.5 < estimate.high <= 1
        (0.5, True)
    """
    rows = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def share(verdicts: Sequence[bool], responses: Sequence[str]) -> Estimate:
    """The share of prompts with a verdict of True on text that is not broken, and Wilson's 95% interval of it.

    Resampling would give no width at all to 0 and 100%, and covers a true share of 2% in 72% of samples of 64 only.

    Args:
        verdicts: One per prompt.
        responses: The text that each is on.

    Example:
        >>> estimate = share([False] * 64, ["I can't help with that."] * 64)
        >>> estimate.value, estimate.low, round(estimate.high, 3)
        (0.0, 0.0, 0.057)
    """
    counted = [verdict and not is_degenerate(text) for verdict, text in zip(verdicts, responses, strict=True)]
    return _wilson(sum(counted), len(counted))


def _wilson(successes: int, trials: int) -> Estimate:
    """E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927."""
    z = statistics.NormalDist().inv_cdf(0.975)
    center = (successes + z**2 / 2) / (trials + z**2)
    half = z / (trials + z**2) * math.sqrt(successes * (trials - successes) / trials + z**2 / 4)
    return Estimate(successes / trials, max(0.0, center - half), min(1.0, center + half))


def _bottom(scores: Scores, mask: Mask) -> Mask:
    if scores.model_numel != mask.model_numel or mask.numel > scores.numel:
        raise MaskMismatchError(
            f"the scores are of a model of {scores.model_numel:,} weights, the mask of one of {mask.model_numel:,}: "
            "use the scores that the mask was ranked from"
        )
    return scores.bottom(ratio_of(mask.numel, mask.model_numel))


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"
