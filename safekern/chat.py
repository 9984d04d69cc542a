"""Prompts and answers as the tokens a chat model sees: the chat template, batches with labels, padding."""

import copy
import inspect
from collections import UserDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from safekern.errors import InvalidArgumentError
from safekern.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, str]
# One user message, or the messages of a conversation that the assistant is to answer.
Prompt: TypeAlias = str | Sequence[Message]

IGNORED = -100
_PROBE = "safekern probe"
# Templates ask strftime_now for the date, and with today's a run could not be resumed tomorrow. This one is that of
# Llama's templates where none is to be had. A macro, since transformers passes no functions on.
_DATE = date(2024, 7, 26)
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%-', '%')"
    + "".join(f" | replace('%{code}', '{_DATE.strftime(f'%{code}')}')" for code in "YymBbdjAaHIMSp")
    + " }}{% endmacro %}"
)
_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt | Sequence[Prompt], response: str | Sequence[str]
) -> dict[str, Tensor]:
    """Encode prompts with their answers as a batch whose labels cover the answers only.

    Each row is the chat template's text for the prompt, up to where the assistant speaks, and then the answer closed
    with the template's own end of turn. The prompt's tokens are exactly those a model generates from. White space that
    the template puts after its end of turn is left out.

    Models that can reason are asked not to: what the template writes before an answer, such as an empty block of
    thoughts, ends the prompt. So labels, and the responses of `safekern.attack_success_rate`, hold no thoughts.

    Templates that write today's date get 26 Jul 2024, which Llama's fall back to: the same rows on every day.

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
        InvalidArgumentError: No chat template, an empty answer, an answer with thoughts where the template has closed
            them, a message that the template does not show, no rows, or sequences of different length.

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
        if head.rstrip().endswith("</think>") and "</think>" in answer:
            raise InvalidArgumentError(
                f"response {number} holds thoughts, but the chat template closes an empty block of them before an "
                "answer: leave out what comes before the answer, up to </think>"
            )
        rows.append((token_ids(tokenizer, head), continuation_ids(tokenizer, head, tail)))
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

    Positions that are no row's answer get no logits where the model can leave them out (`logits_of`), only the answers'
    are copied to fp32, and no key-value cache is kept.

    Args:
        model: A causal language model whose output has ``.logits`` of shape [batch, length, vocabulary].
        batch: As `encode` makes it. On the CPU, it goes to the model's device, and nothing waits for that.

    Returns:
        fp32 logits of shape [tokens, vocabulary] and int64 labels of shape [tokens], row by row of the batch.

    Raises:
        InvalidArgumentError: The batch has no ``labels``, or they hold no answer token, or is longer than the model
            takes, or is a row of a dataset; the model has an encoder and a decoder, or its output is of other
            positions than the batch, as with PEFT's prompt tuning.
    """
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        raise InvalidArgumentError("the batch has no 'labels': build it with safekern.objectives.encode")
    check_batched(batch)
    check_causal(model, "which shifts labels by itself: use its own loss, as safekern.score(model, loader) does")
    targets = answer_targets(batch["labels"])
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    if not len(rows):
        raise InvalidArgumentError(
            "no token of the batch is labelled: labels are -100 everywhere but on the answer; build them with "
            "safekern.objectives.encode, and check that truncation did not cut the answers off"
        )
    answers = targets[rows, columns]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache", "logits_to_keep")}
    length = targets.shape[1]
    needed, columns_of_needed = columns.unique(return_inverse=True)
    # What images and the like become may stand before the text, and move its positions.
    kept = logits_of(model, needed) if inputs.keys() <= _TEXT else {}
    check_input(model, batch.get("input_ids"), length)
    # Offloaded weights may be on the CPU or nowhere, and their inputs elsewhere.
    if (device := model_device(model)).type not in ("cpu", "meta"):
        inputs = to_device(inputs, device)
    logits = model(**inputs, use_cache=False, **kept).logits
    if kept and logits.shape[1] == len(needed):
        columns = columns_of_needed
    elif logits.shape[1] != length:
        raise InvalidArgumentError(
            f"the model predicts {logits.shape[1]} positions for a batch of {length}, so which are the answer's is not "
            "known: score with the model's own loss, safekern.score(model, loader), or without what adds tokens, such "
            "as prompt tuning"
        )
    positions = to_device(rows * logits.shape[1] + columns, logits.device)
    # index_select, because a boolean index has the slower backward.
    return logits.flatten(0, 1).index_select(0, positions).float(), to_device(answers, logits.device)


def logits_of(model: torch.nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """Options of a model's forward for the logits of these positions of every row, and no others.

    With a vocabulary of 262,144 those of a prompt can take more memory than the model.

    Args:
        model: A causal language model.
        positions: int64 of shape [positions].

    Returns:
        None where the forward does not take positions, or where the model lies on several devices or in several
        processes, of which each may have a part of the sequence: it gives all logits then.
    """
    # As a number of positions from the end, which more models take, transformers slices the input of the head, and on a
    # CPU a product of such a view takes ten times as long as that of all positions (torch 2.13).
    option = inspect.signature(model.forward).parameters.get("logits_to_keep")
    if option is None or "Tensor" not in str(option.annotation):
        return {}
    params = list(model.parameters())
    devices = {param.device for param in params}
    if len(devices) > 1 or any(map(is_sharded, params)):
        return {}
    return {"logits_to_keep": to_device(positions, devices.pop())}


def check_causal(model: torch.nn.Module, otherwise: str) -> None:
    """Refuses models with an encoder and a decoder.

    Args:
        model: A language model.
        otherwise: What is wrong with them here, for the message.

    Raises:
        InvalidArgumentError: It is one.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InvalidArgumentError(f"the model has an encoder and a decoder, {otherwise}")


def check_batched(batch: Mapping[Any, Any], least_dims: int = 2) -> None:
    """Refuses rows of a dataset in place of batches.

    Args:
        batch: What a language model is to be called with.
        least_dims: How many dimensions its ``input_ids`` have at least.

    Raises:
        InvalidArgumentError: They have fewer, or are no tensor.
    """
    ids = batch.get("input_ids")
    if ids is not None and not (isinstance(ids, Tensor) and ids.ndim >= least_dims):
        got = f"a tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise InvalidArgumentError(
            f"input_ids of a batch must be a tensor of [batch, length], got {got}: for rows of a dataset, pass its "
            "torch.utils.data.DataLoader, with a collate_fn that pads"
        )


def check_input(model: torch.nn.Module, input_ids: Tensor | None, length: int) -> None:
    """Refuses tokens and positions that a model has no embedding for: a GPU that looks them up is lost to the process.

    Args:
        model: A language model.
        input_ids: The batch's tokens, if it has any.
        length: Tokens per row, those to be generated included.

    Raises:
        InvalidArgumentError: It has fewer.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    known = getattr(embeddings, "num_embeddings", None)
    if input_ids is not None and known is not None and input_ids.numel() and (token := int(input_ids.max())) >= known:
        raise InvalidArgumentError(
            f"the tokenizer has a token {token}, but the model has embeddings for {known}: load the tokenizer that "
            "belongs to the model, or call model.resize_token_embeddings(len(tokenizer))"
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is None or length <= most:
        return
    # Rotary positions have no end. OPT has two more than it says.
    tables = (
        module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not embeddings
    )
    if any(most <= table.num_embeddings <= most + 2 for table in tables):
        raise InvalidArgumentError(
            f"a prompt with its answer has up to {length} tokens, but the model takes {most} at most: shorten it or "
            "leave it out"
        )


def model_device(model: torch.nn.Module) -> torch.device:
    """Return where the inputs of a model go."""
    return next(model.parameters()).device


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, and everything else as it is."""
    if isinstance(batch, Tensor):
        # Towards the CPU nothing would wait for the copy.
        return batch.to(device, non_blocking=device.type != "cpu")
    if isinstance(batch, Mapping):
        return _with_items(batch, {key: to_device(value, device) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _with_items(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the type of another one, whose keys may be its attributes too; a plain dict where that fails."""
    # A copy of any other mapping may share its items with the original.
    if type(batch) is dict or not isinstance(batch, (dict, UserDict)):
        return items
    try:
        copied: Any = copy.copy(batch)
        for key, value in items.items():
            copied[key] = value
    except Exception:
        # The type's own, and of any class: FrozenDict of diffusers raises a bare Exception.
        return items
    return cast(Mapping[Any, Any], copied)


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
    return token_ids(tokenizer, _asking(tokenizer, messages_of(prompt)))


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


def check_no_table(what: str, value: object) -> None:
    """Refuses a table, such as a DataFrame of pandas, whose iteration gives the names of its columns.

    Args:
        what: What should have been given, for the error.
        value: What was given.

    Raises:
        InvalidArgumentError: It has columns.
    """
    if hasattr(value, "columns"):
        raise InvalidArgumentError(
            f"{what} cannot be a {type(value).__name__}, of which only the names of its columns would be read: pass "
            "the texts of one, df['prompt'].tolist(), or, to safekern.prompts.load, its rows, df.to_dict('records')"
        )


def is_message(message: object) -> TypeGuard[Message]:
    """Say whether this is a mapping with a role and a text."""
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], response: str | None = None) -> str:
    """Return the chat template's text for messages: up to where the assistant speaks, or with its finished answer.

    Raises:
        InvalidArgumentError: The tokenizer has no chat template, or its template refuses the messages or does not show
            them.
    """
    from jinja2 import TemplateError

    require_template(tokenizer)
    turns = [dict(message) for message in messages]
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    asking = response is None
    try:
        text = apply_template(tokenizer, turns, asking=asking)
        in_parts = turns[-1]["content"].strip() not in text and not _shows(tokenizer)
        if in_parts:
            text = apply_template(tokenizer, turns, asking=asking, in_parts=True)
        _check_shown(tokenizer, turns, text, asking=asking, in_parts=in_parts)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise InvalidArgumentError(
            f"the tokenizer's chat template refuses messages of {roles}: {error}; give a conversation that it takes, "
            "without a system message above all, or set tokenizer.chat_template"
        ) from error
    return text


def _check_shown(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], text: str, *, asking: bool, in_parts: bool
) -> None:
    for number, turn in enumerate(turns):
        # Thoughts of the assistant are often left out.
        if turn["role"] == "assistant" or turn["content"].strip() in text:
            continue
        # Shown as something else, such as JSON, or without the flags that it held.
        probed = [*turns[:number], {**turn, "content": _PROBE}, *turns[number + 1 :]]
        if _PROBE not in apply_template(tokenizer, probed, asking=asking, in_parts=in_parts):
            raise InvalidArgumentError(
                f"the tokenizer's chat template does not show messages of the role {turn['role']!r}, so the model "
                "would not see them: use the roles that it knows, such as system and user"
            )


def opening(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> tuple[str, str]:
    """Return the text that asks the assistant to speak, and what the template writes between it and an answer.

    Raises:
        InvalidArgumentError: As `render`.
    """
    asked, both = render(tokenizer, messages), render(tokenizer, messages, _PROBE)
    lead, shown, _ = both[len(asked) :].partition(_PROBE)
    if both.startswith(asked) and shown:
        return asked, lead
    # Some templates begin the thoughts of an answer for the model, and show none in a finished turn.
    return asked, "\n</think>\n\n" if asked.rstrip().endswith("<think>") else ""


def apply_template(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], *, asking: bool, in_parts: bool = False
) -> str:
    """Return what the chat template makes of turns: without thoughts where it can be told so, and on no other day.

    Args:
        tokenizer: A tokenizer with a chat template.
        turns: Messages.
        asking: Whether the assistant is to speak next.
        in_parts: Give contents as lists of one text, as templates for images want them.

    Raises:
        Exception: What the template raises.
    """
    # Only where they are known, since tokenizers that render without Jinja refuse other options.
    options: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
    if "strftime_now" in str(tokenizer.chat_template):
        options["chat_template"] = _FIXED_DATE + tokenizer.get_chat_template()
    shown: Any = turns
    if in_parts:
        shown = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=asking, **options))


def _shows(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template shows contents that are texts; if not, it shows those in parts.

    Raises:
        InvalidArgumentError: It shows neither.
    """
    for in_parts in (False, True):
        with suppress(Exception):
            if _PROBE in apply_template(
                tokenizer, [{"role": "user", "content": _PROBE}], asking=True, in_parts=in_parts
            ):
                return not in_parts
    raise InvalidArgumentError(
        "the tokenizer's chat template does not show what a user says: set tokenizer.chat_template to one that does"
    )


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


def continuation_ids(tokenizer: "PreTrainedTokenizerBase", before: str, text: str) -> list[int]:
    """Return the tokens of a text that follows another one, whose tokens it does not change."""
    asked, both = token_ids(tokenizer, before), token_ids(tokenizer, before + text)
    # SentencePiece puts a space before a text that stands alone. Only alone is right where the two grow together.
    return both[len(asked) :] if both[: len(asked)] == asked else token_ids(tokenizer, text)


def _pairs(prompt: Prompt | Sequence[Prompt], response: str | Sequence[str]) -> tuple[list[list[Message]], list[str]]:
    check_no_table("prompts", prompt)
    check_no_table("responses", response)
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
    asked, both = _asking(tokenizer, messages), render(tokenizer, messages, response)
    if both.startswith(asked):
        return asked, both[len(asked) :].rstrip()
    # Templates that open a block of thoughts for the assistant do not repeat it in a finished turn.
    return asked, response + end_of_turn(tokenizer)


def _asking(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> str:
    asked, lead = opening(tokenizer, messages)
    # White space alone is the model's to write: it may be one token with the first word.
    return asked + lead if lead.strip() else asked
