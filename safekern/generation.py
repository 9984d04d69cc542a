"""Answers of a model to one batch of prompts, as tokens, with the model left as found."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from safekern.chat import check_causal, check_input, end_of_turn, model_device, padding_id
from safekern.modes import inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What else in a model's generation_config makes answers other than those of the model itself, or asks for more than
# tokens to answer from. Which tokens it may say at all (suppress_tokens, bad_words_ids) stays.
_UNSET = (
    "assistant_early_exit",
    "constraints",
    "dola_layers",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_eos_token_id",
    "guidance_scale",
    "max_time",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "sequence_bias",
    "stop_strings",
    "token_healing",
    "top_h",
    "watermarking_config",
)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    sample: bool = False,
) -> list[list[int]]:
    """Answer one batch of tokenised prompts, without gradients and in eval mode.

    Args:
        model: A Hugging Face causal language model; its modes and configurations are left as found.
        tokenizer: Its tokenizer, with a chat template.
        prompts: The tokens of each prompt, up to where the assistant speaks.
        max_new_tokens: Longest answer, in tokens.
        sample: Draw from the model's distribution with torch's global generator, instead of answering greedily.

    Returns:
        The tokens of each answer, without the token that ended it.

    Raises:
        InvalidArgumentError: The model has fewer positions than prompt and answer take, or fewer tokens, or an encoder
            and a decoder.
    """
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = cast("PreTrainedModel", model.module)
    check_causal(model, "whose answers do not begin with the prompt: only causal language models are asked")
    pad, stops = padding_id(tokenizer), _stop_ids(model, tokenizer)
    input_ids, attention_mask = _pad_left(prompts, pad)
    length = input_ids.shape[1]
    # What is not said here, generate() takes from the model's generation_config, where sampling values draw warnings
    # and a repetition penalty makes the answers less than greedy.
    options = {
        # max_length, because max_new_tokens draws a warning where the model's configuration sets max_length.
        "max_length": length + max_new_tokens,
        "max_new_tokens": None,
        "min_new_tokens": None,
        "min_length": 0,
        "do_sample": sample,
        "temperature": 1.0,
        "top_k": 0 if sample else 50,
        "top_p": 1.0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "return_dict_in_generate": False,
        "use_cache": True,
        "pad_token_id": pad,
        "eos_token_id": sorted(stops) or None,
    }
    if sample:
        options |= {"min_p": None, "typical_p": 1.0}
    # Only what is set, since versions of transformers differ in what they know.
    options |= {name: None for name in _UNSET if getattr(model.generation_config, name, None) is not None}
    device = model_device(model)
    check_input(model, input_ids, length + max_new_tokens)
    with inference(model):
        generated: Tensor = cast(Any, model).generate(
            input_ids.to(device), attention_mask=attention_mask.to(device), **options
        )
    answers: list[list[int]] = generated[:, length:].tolist()
    return [ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))] for ids in answers]


def _stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    # A base model's configuration often names only the end of a document, which a chat turn never reaches.
    closing = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
    stops = {token for token in cast(list[int], closing) if token in tokenizer.added_tokens_decoder}
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return stops


def _pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    shape = len(rows), max(map(len, rows))
    input_ids = torch.full(shape, pad, device="cpu")
    attention_mask = torch.zeros(shape, dtype=torch.int64, device="cpu")
    for row, ids in enumerate(rows):
        input_ids[row, shape[1] - len(ids) :] = torch.tensor(ids, device="cpu")
        attention_mask[row, shape[1] - len(ids) :] = 1
    return input_ids, attention_mask
