"""The training loop of the commands and the experiments: batches of prompt/response pairs, and steps over them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from safekern.arguments import check_seed, check_whole_number, is_number, is_whole_number
from safekern.errors import InvalidArgumentError, NonFiniteError
from safekern.faults import out_of_memory_explained, put_back
from safekern.objectives import encode, refusal
from safekern.progress import Progress
from safekern.prompts import Pairs, check_pairs
from safekern.sharding import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = Mapping[str, Tensor]

# The recipe of `safekern demo` and `safekern set`.
RATIO = 0.01
LEARNING_RATE = 1e-4
SCORING_BATCH_SIZE = 4
# Larger batches tell harmful from benign better after as many steps. By the first token's chance of a refusal on 64
# held-out prompts of each kind, the area under the ROC curve after 100 steps was 0.901 with 4 and 0.920 with 6.
TUNING_BATCH_SIZE = 6
# Of the loss. It moves the model between refusing too much and too little. Attack success and benign refusals after 100
# steps, one run each: 8% and 27% at 0.25, 14% and 16% at 0.16, 52% and 2% at 0.1.
REFUSAL_WEIGHT = 0.16
# Of the loss, beside a task. After 200 steps on GSM8K attack success was 6% and benign refusals were 7%, and 65% and 3%
# without, three seeds each. A share of 0.3 did it there as well, but too slowly beside ordinary answers, which unteach
# refusing more (README, "Does it work?").
REHEARSAL = 0.5


def in_order(tokenizer: "PreTrainedTokenizerBase", pairs: Pairs, batch_size: int) -> list[Batch]:
    """Every pair once, in batches: what `safekern.score` needs.

    Args:
        tokenizer: a tokenizer with a chat template.
        pairs: prompts with their responses.
        batch_size: pairs per batch; the last batch may have fewer.

    Returns:
        Batches as `safekern.objectives.encode` makes them, on the CPU.

    Raises:
        InvalidArgumentError: a batch size that is no whole number of at least 1, or no pairs.

    Example:
        >>> pairs = safekern.prompts.load("refusals.jsonl")                         # doctest: +SKIP
        >>> scores = safekern.score(model, in_order(tokenizer, pairs, 4), refusal)  # doctest: +SKIP
    """
    _check(pairs, batch_size)
    every = range(len(pairs))
    return [_encode(tokenizer, pairs, every[start : start + batch_size]) for start in every[::batch_size]]


def shuffled(
    tokenizer: "PreTrainedTokenizerBase", pairs: Pairs, batch_size: int, seed: int, *, skip: int = 0
) -> Iterator[Batch]:
    """Endless batches; every pass over the pairs is shuffled anew.

    Args:
        tokenizer: a tokenizer with a chat template.
        pairs: what to draw from.
        batch_size: pairs per batch.
        seed: the same seed gives the same batches.
        skip: how many batches to leave out at the beginning: those that an interrupted run has seen.

    Raises:
        InvalidArgumentError: a number that is not whole, a batch size below 1, or no pairs.

    Example:
        >>> for batch in itertools.islice(shuffled(tokenizer, pairs, 4, seed=0), 100):  # doctest: +SKIP
        ...     safekern.objectives.refusal(model, batch).backward()
    """
    _check(pairs, batch_size)
    check_whole_number("skip", skip, 0)
    generator = torch.Generator().manual_seed(check_seed(seed))
    order = itertools.islice(_endless_order(len(pairs), generator), skip * batch_size, None)
    while True:
        yield _encode(tokenizer, pairs, list(itertools.islice(order, batch_size)))


def balanced(
    tokenizer: "PreTrainedTokenizerBase",
    harmful: Pairs,
    benign: Pairs,
    *,
    batch_size: int = TUNING_BATCH_SIZE,
    refusal_weight: float = REFUSAL_WEIGHT,
    seed: int = 0,
    skip: int = 0,
) -> list[tuple[float, Iterator[Batch]]]:
    """What `tune` needs to teach refusing what is harmful without teaching to refuse everything.

    Args:
        tokenizer: a tokenizer with a chat template.
        harmful: harmful prompts with refusals.
        benign: ordinary prompts with helpful answers.
        batch_size: pairs per iteration, half of each kind.
        refusal_weight: how much of the loss the refusals are, from 0 to 1.
        seed: order of the pairs.
        skip: iterations to leave out at the beginning.

    Returns:
        For refusals and for helpful answers, their weight in the loss and their endless batches.

    Raises:
        InvalidArgumentError: an odd batch size or one below 2, a weight outside [0, 1], or no pairs of a kind.

    Example:
        >>> harmful, benign = builtin("harmful", "tune"), builtin("benign", "tune")                # doctest: +SKIP
        >>> losses = tune(model, opt, balanced(tokenizer, harmful, benign), 100)                   # doctest: +SKIP
    """
    if not is_whole_number(batch_size) or batch_size < 2 or batch_size % 2:
        raise InvalidArgumentError(f"batch_size is {batch_size}, but must be even: half of each batch is of each kind")
    if not is_number(refusal_weight) or not 0 <= refusal_weight <= 1:
        raise InvalidArgumentError(f"refusal_weight is {refusal_weight}, but must be from 0 to 1")
    for pairs in (harmful, benign):
        _check(pairs, batch_size)
    refusals, answers = (shuffled(tokenizer, pairs, batch_size // 2, seed, skip=skip) for pairs in (harmful, benign))
    return [(refusal_weight, refusals), (1 - refusal_weight, answers)]


def rehearsed_per_step(batch_size: int) -> int:
    """How many refusals, and how many helpful answers, `with_rehearsal` adds to every step.

    Args:
        batch_size: pairs of the task per step.

    Example:
        >>> rehearsed_per_step(6)
        3
    """
    return max(1, batch_size // 2)


def with_rehearsal(
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Pairs,
    harmful: Pairs,
    benign: Pairs,
    *,
    batch_size: int = TUNING_BATCH_SIZE,
    rehearsal: float = REHEARSAL,
    refusal_weight: float = REFUSAL_WEIGHT,
    seed: int = 0,
    skip: int = 0,
) -> list[tuple[float, Iterator[Batch]]]:
    """What `tune` needs to teach a model a task while it keeps refusing what is harmful, and that alone.

    Args:
        tokenizer: a tokenizer with a chat template.
        pairs: the task: prompts with the responses to learn.
        harmful: harmful prompts with refusals.
        benign: ordinary prompts with helpful answers. Beside a narrow task, refusals alone teach a model to refuse all
            else.
        batch_size: pairs of the task per iteration; half as many of either kind come with them.
        rehearsal: how much of the loss these two kinds are, from 0 (there are none) to less than 1.
        refusal_weight: how much of that the refusals are, see `balanced`.
        seed: order of the pairs.
        skip: iterations to leave out at the beginning.

    Returns:
        For the task, refusals and helpful answers, their weight in the loss and their endless batches.

    Raises:
        InvalidArgumentError: a batch size below 1, a weight out of range, or no pairs of a kind that has weight.

    Example:
        >>> opt = safekern.SPAAdamW(model.named_parameters(), mask, lr=2e-5)                       # doctest: +SKIP
        >>> harmful, benign = builtin("harmful", "tune"), builtin("benign", "tune")                # doctest: +SKIP
        >>> losses = tune(model, opt, with_rehearsal(tokenizer, pairs, harmful, benign), 200)      # doctest: +SKIP
    """
    if not is_number(rehearsal) or not 0 <= rehearsal < 1:
        raise InvalidArgumentError(f"rehearsal is {rehearsal}, but must be at least 0 and less than 1")
    _check(pairs, batch_size)
    task = shuffled(tokenizer, pairs, batch_size, seed, skip=skip)
    if not rehearsal:
        return [(1.0, task)]
    both = balanced(
        tokenizer,
        harmful,
        benign,
        batch_size=2 * rehearsed_per_step(batch_size),
        refusal_weight=refusal_weight,
        seed=seed,
        skip=skip,
    )
    return [(1 - rehearsal, task), *((rehearsal * weight, batches) for weight, batches in both)]


def tune(
    model: "PreTrainedModel",
    optimizer: Optimizer,
    parts: Sequence[tuple[float, Iterable[Batch]]],
    iterations: int,
    *,
    done: Sequence[float] = (),
    after_step: Callable[[list[float]], None] | None = None,
) -> list[float]:
    """Takes optimizer steps on the mean negative log-likelihood of the responses, a weighted sum over kinds of data.

    Mixing refusals with benign pairs keeps a model from learning to refuse everything; the weights say how much either
    counts, whatever the lengths of their answers.

    Args:
        model: trained in the mode it is in.
        optimizer: steps once per iteration.
        parts: for each kind of data its weight in the loss and its batches, one per iteration, on any device.
        iterations: how many steps to take, those of ``done`` included.
        done: the losses of the iterations that an interrupted run has taken; the batches go on after theirs.
        after_step: called after every step with the losses up to it, for instance to save a checkpoint.

    Returns:
        The loss of every iteration, before its step.

    Raises:
        InvalidArgumentError: the parts are no pairs of a weight and batches, the iterations no whole number of at least
            0, or the batches ran out.
        NonFiniteError: a loss is NaN or infinite.
        OutOfMemoryError: memory ran out in a step; the message says what takes it, and what to lower.

    Example:
        >>> opt = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4)                       # doctest: +SKIP
        >>> refusals, answers = (shuffled(tokenizer, pairs, 2, 0) for pairs in (harmful, benign))  # doctest: +SKIP
        >>> losses = tune(model, opt, [(0.2, refusals), (0.8, answers)], 100)                      # doctest: +SKIP
    """
    weights, streams = zip(*_checked(parts), strict=True)
    check_whole_number("iterations", iterations, 0)
    losses = list(done)
    left = max(0, iterations - len(losses))
    bar = Progress("tuning", "step", iterations, initial=len(losses))
    # Gradients of before are not of these losses, and of a step that failed none may be left to the next.
    with bar, _memory_explained(model, optimizer), _without_gradients(optimizer):
        for batches in itertools.islice(zip(*streams, strict=False), left):
            terms = []
            for weight, batch in zip(weights, batches, strict=True):
                loss = weight * refusal(model, batch)
                loss.backward()
                terms.append(loss.detach())
            # Read once, since a read waits for the device.
            total = sum(torch.stack(terms).tolist())
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"the loss of iteration {len(losses)} is {total}, so no step was taken: use a smaller learning "
                    "rate, or look for weights that are not finite"
                )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            if after_step is not None:
                after_step(losses)
            bar.update(loss=total)
    if len(losses) < iterations:
        raise InvalidArgumentError(f"the batches ran out after {len(losses)} of {iterations} iterations")
    return losses


@contextmanager
def _without_gradients(optimizer: Optimizer) -> Iterator[None]:
    optimizer.zero_grad()
    try:
        yield
    finally:
        put_back(optimizer.zero_grad)


def _checked(parts: object) -> list[tuple[float, Iterable[Batch]]]:
    found = list(parts) if isinstance(parts, Iterable) else []
    for part in found or [None]:
        if not (
            isinstance(part, (tuple, list))
            and len(part) == 2
            and is_number(part[0])
            and isinstance(part[1], Iterable)
            # The keys of a single batch.
            and not isinstance(part[1], Mapping)
        ):
            raise InvalidArgumentError(
                "parts must be pairs of a weight in the loss and batches, got "
                f"{type(part).__name__ if found else 'none'}: for batches of one kind, pass [(1.0, batches)]"
            )
    return found


def _memory_explained(model: torch.nn.Module, optimizer: Optimizer) -> AbstractContextManager[None]:
    def held() -> dict[str, int]:
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        return {
            "the model": sum(local(tensor).nbytes for tensor in itertools.chain(model.parameters(), model.buffers())),
            "the optimizer's state": sum(local(tensor).nbytes for tensor in state),
            "the largest gradient": max(local(param).nbytes for param in model.parameters()),
        }

    return out_of_memory_explained(
        held, "use smaller batches or shorter examples, or gradient checkpointing; for SET also a smaller mask"
    )


def _encode(tokenizer: "PreTrainedTokenizerBase", pairs: Pairs, rows: Sequence[int]) -> Batch:
    try:
        return encode(tokenizer, [pairs.prompts[row] for row in rows], [pairs.responses[row] for row in rows])
    except InvalidArgumentError:
        # It counts within the batch.
        for row in rows:
            with pair_named(row + 1):
                encode(tokenizer, pairs.prompts[row], pairs.responses[row])
        raise


@contextmanager
def pair_named(number: int, source: str = "") -> Iterator[None]:
    """Says which pair an error is about.

    Args:
        number: of the pair, counted from 1.
        source: where it is from, such as the name of an option.

    Raises:
        InvalidArgumentError: the block raised one.

    Example:
        >>> with pair_named(3, "--benign"):                                                        # doctest: +SKIP
        ...     batch = encode(tokenizer, prompt, "")
        safekern.errors.InvalidArgumentError: --benign, pair 3: response 0 is empty ...
    """
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{source and f'{source}, '}pair {number}: {error}") from error


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator, device="cpu").tolist()


def _check(pairs: Pairs, batch_size: int) -> None:
    check_whole_number("batch_size", batch_size, 1)
    check_pairs(pairs)
    if not len(pairs):
        raise InvalidArgumentError("no pairs were given to draw batches from")
