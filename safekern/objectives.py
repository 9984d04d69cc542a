"""Losses that turn prompts and answers into one number to differentiate, and the batches they are computed on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safekern.chat import IGNORED, encode
from safekern.errors import InvalidArgumentError

__all__ = ["answer_targets", "encode", "refusal"]


def refusal(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean negative log-likelihood of the answers in a batch: low where the model would give them itself.

    With refusals as answers this is the loss that aligns a model, and its gradient is the teacher-forced safety
    gradient of arXiv 2604.08297. The mean runs over all answer tokens of the batch and equals ``model(**batch).loss``
    of a Hugging Face causal language model, but only the answers' logits are copied to fp32, and no key-value cache
    is kept.

    Args:
        model: A causal language model whose output has ``.logits`` of shape [batch, length, vocabulary].
        batch: As `encode` makes it, on the model's device.

    Returns:
        A scalar fp32 tensor, to minimise.

    Raises:
        InvalidArgumentError: The batch has no ``labels``, or they hold no answer token.

    Example:
        >>> scores = safekern.score(model, batches, safekern.objectives.refusal)  # doctest: +SKIP
    """
    if batch.get("labels") is None:
        raise InvalidArgumentError("the batch has no 'labels': build it with safekern.objectives.encode")
    targets = answer_targets(batch["labels"]).flatten()
    positions = (targets != IGNORED).nonzero().flatten()
    if not len(positions):
        raise InvalidArgumentError(
            "no token of the batch is labelled: labels are -100 everywhere but on the answer; build them with "
            "safekern.objectives.encode, and check that truncation did not cut the answers off"
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    # index_select, because a boolean index has the slower backward.
    answered = logits.index_select(0, positions.to(logits.device)).float()
    return torch.nn.functional.cross_entropy(answered, targets[positions].to(logits.device))


def answer_targets(labels: Tensor) -> Tensor:
    """Return the token each position has to predict: the label of the next one, and -100 for none.

    Args:
        labels: int64 of shape [batch, length].

    Returns:
        An int64 tensor of the same shape.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
