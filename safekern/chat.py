"""Prompts and answers as the tokens a chat model sees: the chat template, batches with labels, padding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from safekern.errors import InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, str]
# One user message, or the messages of a conversation that the assistant is to answer.
Prompt: TypeAlias = str | Sequence[Message]

IGNORED = -100
_PROBE = "safekern probe"


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt | Sequence[Prompt], response: str | Sequence[str]
) -> dict[str, Tensor]:
    """Encode prompts with their answers as a batch whose labels cover the answers only.

    Each row is the chat template's text for the prompt, up to where the assistant speaks, and then the answer closed
    with the template's own end of turn. The two parts are tokenised apart, so the prompt's tokens are exactly those a
    model generates from. White space that the template puts after its end of turn is left out.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        prompt: One prompt, or a sequence of them. A prompt is a user message, or a list of messages, each with
            ``role`` and ``content``, whose answer is to follow; the labels leave out the assistant's earlier turns.
        response: The assistant's answer to it, or a sequence of answers as long as ``prompt``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape [batch, length] on the CPU, padded on the
        right. Labels are -100 on prompt and padding. The mask is built from lengths, since many models pad with the
        end-of-turn token. The result fits ``model(**batch)`` and `safekern.objectives.refusal`.

    Raises:
        InvalidArgumentError: No chat template, an empty answer, no rows, or sequences of different length.

    Example:
        >>> batch = encode(tokenizer, "How do I pick a lock?", "I can't help with that.")  # doctest: +SKIP
        >>> loss = safekern.objectives.refusal(model, batch)  # doctest: +SKIP
    """
    rows = []
    for number, (question, answer) in enumerate(zip(*_pairs(prompt, response), strict=True)):
        if not answer.strip():
            raise InvalidArgumentError(
                f"response {number} is empty, so it has no token to learn from: leave the pair out or give it a text"
            )
        head, tail = _render_pair(tokenizer, question, answer)
        rows.append((token_ids(tokenizer, head), token_ids(tokenizer, tail)))
    return join(rows, padding_id(tokenizer))


def join(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Join the tokens of prompts and answers to a batch padded on the right, as `encode` returns it."""
    shape = len(rows), max(len(asked) + len(answered) for asked, answered in rows)
    input_ids = torch.full(shape, pad, device="cpu")
    attention_mask = torch.zeros(shape, dtype=torch.int64, device="cpu")
    labels = torch.full(shape, IGNORED, device="cpu")
    for row, (asked, answered) in enumerate(rows):
        end = len(asked) + len(answered)
        input_ids[row, :end] = torch.tensor(asked + answered, device="cpu")
        attention_mask[row, :end] = 1
        labels[row, len(asked) : end] = torch.tensor(answered, dtype=torch.int64, device="cpu")
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def answer_logits(model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return what a model predicts for the labelled tokens of a batch, and these tokens.

    Only the answers' logits are copied to fp32, and no key-value cache is kept.

    Args:
        model: A causal language model whose output has ``.logits`` of shape [batch, length, vocabulary].
        batch: As `encode` makes it, on the model's device.

    Returns:
        fp32 logits of shape [tokens, vocabulary] and int64 labels of shape [tokens], row by row of the batch.

    Raises:
        InvalidArgumentError: The batch has no ``labels``, or they hold no answer token, or is longer than the model
            takes.
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
    with length_explained(model, targets.numel() // len(batch["labels"])):
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    # index_select, because a boolean index has the slower backward.
    return logits.index_select(0, positions.to(logits.device)).float(), targets[positions].to(logits.device)


@contextmanager
def length_explained(model: torch.nn.Module, length: int) -> Iterator[None]:
    """Turns the IndexError of a model that has a table of positions, and fewer than a batch has, into one that says so.

    Args:
        model: A language model.
        length: Tokens per row, those to be generated included.

    Raises:
        InvalidArgumentError: The block failed, and the model has fewer positions.
    """
    try:
        yield
    except IndexError as error:
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if most is None or length <= most:
            raise
        raise InvalidArgumentError(
            f"a prompt with its answer has up to {length} tokens, but the model takes {most} at most: shorten it or "
            "leave it out"
        ) from error


def answer_targets(labels: Tensor) -> Tensor:
    """Return the token each position has to predict: the label of the next one, and -100 for none.

    Args:
        labels: int64 of shape [batch, length].

    Returns:
        An int64 tensor of the same shape.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Return the tokens a chat model generates its answer to ``prompt`` from.

    Raises:
        InvalidArgumentError: The tokenizer has no chat template, or the prompt is none.
    """
    return token_ids(tokenizer, render(tokenizer, messages_of(prompt)))


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text with which the chat template closes an answer, without white space around it.

    Raises:
        InvalidArgumentError: The tokenizer has no chat template.
    """
    return render(tokenizer, messages_of("Hi"), _PROBE).rpartition(_PROBE)[2].strip()


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return a token to fill padding with; it is masked, so any valid one does."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def messages_of(prompt: Prompt, what: str = "the prompt") -> list[Message]:
    """Return a prompt as the list of its messages, the assistant's answer to follow.

    Args:
        prompt: A user message or a list of messages.
        what: Which prompt this is, for the error.

    Raises:
        InvalidArgumentError: It is neither, holds no message, or ends with the assistant's.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise InvalidArgumentError(
            f"{what} is a {type(prompt).__name__}, but must be a str or a list of messages with 'role' and 'content'"
        )
    if not prompt:
        raise InvalidArgumentError(f"{what} is an empty list, but must hold at least one message")
    messages = [message for message in prompt if is_message(message)]
    if len(messages) < len(prompt):
        raise InvalidArgumentError(f"{what} must hold messages only: mappings whose 'role' and 'content' are str each")
    if messages[-1]["role"] == "assistant":
        raise InvalidArgumentError(f"{what} ends with the assistant's message: that is the response, give it apart")
    return messages


def is_message(message: object) -> TypeGuard[Message]:
    """Say whether this is a mapping with a role and a text."""
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], response: str | None = None) -> str:
    """Return the chat template's text for messages: up to where the assistant speaks, or with its finished answer.

    Raises:
        InvalidArgumentError: The tokenizer has no chat template, or its template refuses the messages.
    """
    from jinja2 import TemplateError

    require_template(tokenizer)
    turns = [dict(message) for message in messages]
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=response is None)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise InvalidArgumentError(
            f"the tokenizer's chat template refuses messages of {roles}: {error}; give a conversation that it takes, "
            "without a system message above all, or set tokenizer.chat_template"
        ) from error
    return cast(str, text)


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise unless the tokenizer has a chat template.

    Raises:
        InvalidArgumentError: It has none, or several without a default.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError(
            "the tokenizer has no chat template: load the tokenizer of the model's instruct version, or set "
            "tokenizer.chat_template"
        )
    if isinstance(tokenizer.chat_template, Mapping) and "default" not in tokenizer.chat_template:
        raise InvalidArgumentError(
            f"the tokenizer has several chat templates ({', '.join(tokenizer.chat_template)}) and none of the name "
            "'default': set tokenizer.chat_template to one of them"
        )


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the tokens of a text in which the chat template has written the special tokens already."""
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def _pairs(prompt: Prompt | Sequence[Prompt], response: str | Sequence[str]) -> tuple[list[list[Message]], list[str]]:
    if isinstance(response, str):
        if not (isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping))):
            raise InvalidArgumentError(_ONE_OR_MANY)
        prompts, responses = [cast(Prompt, prompt)], [response]
    else:
        if isinstance(prompt, str):
            raise InvalidArgumentError(_ONE_OR_MANY)
        prompts, responses = cast(list[Prompt], list(prompt)), list(response)
    if len(prompts) != len(responses):
        raise InvalidArgumentError(
            f"{len(prompts)} prompts but {len(responses)} responses: give exactly one response to each prompt"
        )
    if not prompts:
        raise InvalidArgumentError("no prompt was given: pass at least one prompt with its response")
    for number, text in enumerate(responses):
        if not isinstance(text, str):
            raise InvalidArgumentError(f"response {number} is a {type(text).__name__}, but must be a str")
    return [messages_of(one, f"prompt {number}") for number, one in enumerate(prompts)], responses


_ONE_OR_MANY = "prompt and response must be one each or a sequence of them each: put the single one in a list"


def _render_pair(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], response: str) -> tuple[str, str]:
    asked, both = render(tokenizer, messages), render(tokenizer, messages, response)
    if both.startswith(asked):
        return asked, both[len(asked) :].rstrip()
    # Templates that open a reasoning block for the assistant do not repeat it in a finished turn.
    return asked, response + end_of_turn(tokenizer)
