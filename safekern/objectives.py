"""Losses that turn prompts and answers into one number to differentiate, and the batches they are computed on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safekern.chat import answer_logits, encode
from safekern.guard import CHAT_MODEL, LLAMA_GUARD, QWEN3_GUARD, GuardFormat, GuardJudge

__all__ = ["CHAT_MODEL", "LLAMA_GUARD", "QWEN3_GUARD", "GuardFormat", "GuardJudge", "encode", "refusal"]


def refusal(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean negative log-likelihood of the answers in a batch: low where the model would give them itself.

    With refusals as answers this is the loss that aligns a model, and its gradient is the teacher-forced safety
    gradient of arXiv 2604.08297. The mean runs over all answer tokens of the batch and equals ``model(**batch).loss``
    of a Hugging Face causal language model, but only the answers' logits are copied to fp32, and no key-value cache
    is kept.

    Args:
        model: A causal language model whose output has ``.logits`` of shape [batch, length, vocabulary].
        batch: As `encode` makes it. On the CPU, it goes to the model's device, and nothing waits for that.

    Returns:
        A scalar fp32 tensor, to minimise.

    Raises:
        InvalidArgumentError: The batch has no ``labels``, or they hold no answer token.

    Example:
        >>> scores = safekern.score(model, batches, safekern.objectives.refusal)  # doctest: +SKIP
    """
    logits, targets = answer_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits, targets)
