"""Losses that turn prompts and answers into one number to differentiate, and the batches they are computed on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from safekern.errors import InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_PROBE = "safekern probe"


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[str], response: str | Sequence[str]
) -> dict[str, Tensor]:
    """Encode prompts with their answers as a batch whose labels cover the answers only.

    Each row is the chat template's text for the prompt as a user turn, up to where the assistant speaks, and then
    the answer closed with the template's own end of turn. The two parts are tokenised apart, so the prompt's tokens
    are exactly those a model generates from. White space that the template puts after its end of turn is left out.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        prompt: One user message, or a sequence of them.
        response: The assistant's answer to it, or a sequence of answers as long as ``prompt``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape [batch, length] on the CPU, padded on the
        right. Labels are -100 on prompt and padding. The mask is built from lengths, since many models pad with the
        end-of-turn token. The result fits ``model(**batch)`` and `refusal`.

    Raises:
        InvalidArgumentError: No chat template, an empty answer, no rows, or sequences of different length.

    Example:
        >>> batch = encode(tokenizer, "How do I pick a lock?", "I can't help with that.")  # doctest: +SKIP
        >>> loss = refusal(model, batch)  # doctest: +SKIP
    """
    rows = []
    for number, (question, answer) in enumerate(zip(*_texts(prompt, response), strict=True)):
        if not answer.strip():
            raise InvalidArgumentError(
                f"response {number} is empty, so it has no token to learn from: leave the pair out or give it a text"
            )
        head, tail = _render_pair(tokenizer, question, answer)
        rows.append((_token_ids(tokenizer, head), _token_ids(tokenizer, tail)))

    shape = len(rows), max(len(asked) + len(answered) for asked, answered in rows)
    input_ids = torch.full(shape, padding_id(tokenizer))
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (asked, answered) in enumerate(rows):
        end = len(asked) + len(answered)
        input_ids[row, :end] = torch.tensor(asked + answered)
        attention_mask[row, :end] = 1
        labels[row, len(asked) : end] = torch.tensor(answered)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


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


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Return the tokens a chat model generates its answer to ``prompt`` from.

    Raises:
        InvalidArgumentError: The tokenizer has no chat template.
    """
    return _token_ids(tokenizer, _render(tokenizer, prompt))


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text with which the chat template closes an answer, without white space around it.

    Raises:
        InvalidArgumentError: The tokenizer has no chat template.
    """
    return _render(tokenizer, "Hi", _PROBE).rpartition(_PROBE)[2].strip()


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return a token to fill padding with; it is masked, so any valid one does."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _texts(prompt: str | Sequence[str], response: str | Sequence[str]) -> tuple[list[str], list[str]]:
    if isinstance(prompt, str) != isinstance(response, str):
        raise InvalidArgumentError(
            "prompt and response must be a str each or a sequence of str each: put the single one in a list"
        )
    prompts, responses = ([part] if isinstance(part, str) else list(part) for part in (prompt, response))
    if len(prompts) != len(responses):
        raise InvalidArgumentError(
            f"{len(prompts)} prompts but {len(responses)} responses: give exactly one response to each prompt"
        )
    if not prompts:
        raise InvalidArgumentError("no prompt was given: pass at least one prompt with its response")
    for text in prompts + responses:
        if not isinstance(text, str):
            raise InvalidArgumentError(f"prompts and responses must be str, but one is a {type(text).__name__}")
    return prompts, responses


def _render_pair(tokenizer: "PreTrainedTokenizerBase", prompt: str, response: str) -> tuple[str, str]:
    asked, both = _render(tokenizer, prompt), _render(tokenizer, prompt, response)
    if both.startswith(asked):
        return asked, both[len(asked) :].rstrip()
    # Templates that open a reasoning block for the assistant do not repeat it in a finished turn.
    return asked, response + end_of_turn(tokenizer)


def _render(tokenizer: "PreTrainedTokenizerBase", prompt: str, response: str | None = None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError(
            "the tokenizer has no chat template: load the tokenizer of the model's instruct version, or set "
            "tokenizer.chat_template"
        )
    messages = [{"role": "user", "content": prompt}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
    return cast(str, text)


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    # The template has written the special tokens already.
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
