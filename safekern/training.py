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

    Example:
        >>> scores = safekern.score(model, in_order(tokenizer, pairs, 4), refusal)  # doctest: +SKIP
    """
    return [
        encode(tokenizer, pairs.prompts[start : start + batch_size], pairs.responses[start : start + batch_size])
        for start in range(0, len(pairs), batch_size)
    ]


def shuffled(
    tokenizer: "PreTrainedTokenizerBase", sources: Sequence[Pairs], batch_size: int, seed: int
) -> Iterator[Batch]:
    """Endless batches that take the same number of pairs from each source; every pass over a source is reshuffled.

    Mixing benign pairs half and half with refusals keeps a model from learning to refuse everything.

    Args:
        tokenizer: a tokenizer with a chat template.
        sources: pairs to draw from.
        batch_size: a multiple of the number of sources.
        seed: the same seed gives the same batches.

    Raises:
        InvalidArgumentError: the batch cannot be shared out evenly, or a source is empty.
    """
    if batch_size < 1 or not sources or batch_size % len(sources):
        raise InvalidArgumentError(f"a batch of {batch_size} cannot be shared out evenly over {len(sources)} sources")
    if not all(map(len, sources)):
        raise InvalidArgumentError("a source holds no pairs")
    generator = torch.Generator().manual_seed(seed)
    drawn = [(source, _endless_order(len(source), generator)) for source in sources]
    share = batch_size // len(sources)
    while True:
        rows = [(source, row) for source, order in drawn for row in itertools.islice(order, share)]
        yield encode(
            tokenizer, [source.prompts[row] for source, row in rows], [source.responses[row] for source, row in rows]
        )


def tune(model: "PreTrainedModel", optimizer: Optimizer, batches: Iterable[Batch], iterations: int) -> list[float]:
    """Takes one optimizer step per batch on the mean negative log-likelihood of the responses.

    Args:
        model: trained in the mode it is in.
        optimizer: steps once per batch.
        batches: at least ``iterations`` batches, on any device.
        iterations: how many steps to take.

    Returns:
        The loss of every iteration, before its step.

    Raises:
        InvalidArgumentError: the batches ran out.

    Example:
        >>> opt = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4)                       # doctest: +SKIP
        >>> losses = tune(model, opt, shuffled(tokenizer, [harmful, benign], 4, seed=0), 100)      # doctest: +SKIP
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    # disable=None shows the bar on a terminal only.
    with tqdm(total=iterations, desc="tuning", unit="step", disable=None) as bar:
        for batch in itertools.islice(batches, iterations):
            loss = refusal(model, {name: tensor.to(device) for name, tensor in batch.items()})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
            bar.update()
    if len(losses) < iterations:
        raise InvalidArgumentError(f"the batches ran out after {len(losses)} of {iterations} iterations")
    return losses


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
