"""Random-initialised models in the shape of Llama, of any size, and batches for them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def llama(params: float, dtype: torch.dtype, device: str = "cpu") -> "PreTrainedModel":
    """A Llama with about so many parameters, its depth and width in the proportion of the real ones.

    Args:
        params: at least 100,000.
        dtype: of its parameters.
        device: where it is made.

    Example:
        >>> model = llama(1e9, torch.bfloat16)                # doctest: +SKIP
    """
    import transformers

    # A layer of width h holds 12 h^2, and there are h / 128 of them.
    width = max(64, round((params * 128 / 12) ** (1 / 3) / 64) * 64)
    vocabulary = 32_000 if params >= 3e8 else max(64, int(0.1 * params / width) // 64 * 64)
    layers = max(1, round((params - vocabulary * width) / (12 * width**2)))
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    build: Any = transformers.AutoModelForCausalLM.from_config
    with torch.device(device):
        model: PreTrainedModel = build(config, dtype=dtype)
    model.train()
    return model


def token_batches(model: "PreTrainedModel", count: int, examples: int, tokens: int) -> list[dict[str, Tensor]]:
    """Random tokens that are their own labels."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocab_size, (count, examples, tokens), generator=generator).to(model.device)
    return [{"input_ids": batch, "labels": batch} for batch in drawn]
