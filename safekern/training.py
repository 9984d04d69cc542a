"""The training loop of the demo and the experiments: batches of prompt/response pairs, and steps over them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from safekern.errors import InvalidArgumentError
from safekern.objectives import encode, refusal
from safekern.prompts import Pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = Mapping[str, Tensor]


def in_order(tokenizer: "PreTrainedTokenizerBase", pairs: Pairs, batch_size: int) -> list[Batch]:
    """Every pair once, in batches: what `safekern.score` needs.

    Raises:
        InvalidArgumentError: a batch size below 1, or no pairs.

    Example:
        >>> pairs = safekern.prompts.load("refusals.jsonl")                         # doctest: +SKIP
        >>> scores = safekern.score(model, in_order(tokenizer, pairs, 4), refusal)  # doctest: +SKIP
    """
    _check(pairs, batch_size)
    return [
        encode(tokenizer, pairs.prompts[start : start + batch_size], pairs.responses[start : start + batch_size])
        for start in range(0, len(pairs), batch_size)
    ]


def shuffled(tokenizer: "PreTrainedTokenizerBase", pairs: Pairs, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches; every pass over the pairs is shuffled anew.

    Args:
        tokenizer: a tokenizer with a chat template.
        pairs: what to draw from.
        batch_size: pairs per batch.
        seed: the same seed gives the same batches.

    Raises:
        InvalidArgumentError: a batch size below 1, or no pairs.
    """
    _check(pairs, batch_size)
    order = _endless_order(len(pairs), torch.Generator().manual_seed(seed))
    while True:
        rows = list(itertools.islice(order, batch_size))
        yield encode(tokenizer, [pairs.prompts[row] for row in rows], [pairs.responses[row] for row in rows])


def tune(
    model: "PreTrainedModel", optimizer: Optimizer, parts: Sequence[tuple[float, Iterable[Batch]]], iterations: int
) -> list[float]:
    """Takes optimizer steps on the mean negative log-likelihood of the responses, a weighted sum over kinds of data.

    Mixing refusals with benign pairs keeps a model from learning to refuse everything; the weights say how much either
    counts, whatever the lengths of their answers.

    Args:
        model: trained in the mode it is in.
        optimizer: steps once per iteration.
        parts: for each kind of data its weight in the loss and its batches, one per iteration, on any device.
        iterations: how many steps to take.

    Returns:
        The loss of every iteration, before its step.

    Raises:
        InvalidArgumentError: the batches ran out.

    Example:
        >>> opt = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4)                       # doctest: +SKIP
        >>> refusals, answers = (shuffled(tokenizer, pairs, 2, 0) for pairs in (harmful, benign))  # doctest: +SKIP
        >>> losses = tune(model, opt, [(0.2, refusals), (0.8, answers)], 100)                      # doctest: +SKIP
    """
    device = next(model.parameters()).device
    weights, streams = zip(*parts, strict=True)
    losses: list[float] = []
    # disable=None shows the bar on a terminal only.
    with tqdm(total=iterations, desc="tuning", unit="step", disable=None) as bar:
        for batches in itertools.islice(zip(*streams, strict=False), iterations):
            total = 0.0
            for weight, batch in zip(weights, batches, strict=True):
                loss = weight * refusal(model, {name: tensor.to(device) for name, tensor in batch.items()})
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            bar.set_postfix(loss=f"{total:.2f}", refresh=False)
            bar.update()
    if len(losses) < iterations:
        raise InvalidArgumentError(f"the batches ran out after {len(losses)} of {iterations} iterations")
    return losses


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _check(pairs: Pairs, batch_size: int) -> None:
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size is {batch_size}, but must be at least 1")
    if not len(pairs):
        raise InvalidArgumentError("no pairs were given to draw batches from")
