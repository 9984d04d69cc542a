"""Small models, masks and training loops for the tests of what keeps weights from moving."""

import pytest
import torch
from exact import same_bits
from torch import nn

from safekern import Mask


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).to(dtype)


def make_mask(model, ratio=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(param.shape, generator=generator) < ratio
        for name, param in model.named_parameters()
        if param.ndim == 2
    }
    return Mask.from_bool(masks)


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(16, 7, generator=generator).to(model[0].bias.dtype)
    model.zero_grad()
    loss = (model(batch) - 1).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_protected(model, before, mask):
    for name in mask:
        assert same_bits(model.get_parameter(name).detach()[mask.bool(name)], before[name][mask.bool(name)])


def assert_same_weights(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert same_bits(a, b), name


def small_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)
