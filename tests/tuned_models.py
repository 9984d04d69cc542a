"""Tuned models for tests of deltas."""

import copy

import torch

from safekern import Mask


@torch.no_grad()
def tuned(base, mask, seed=5):
    """A copy with new values at the masked weights, signs of zero and NaN bits among them."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for param, indices in mask.parameters(model).values():
        flat = param.data.contiguous().view(-1)
        flat[indices] += torch.randn(indices.shape, generator=generator).to(param.dtype)
        flat[indices[:3]] = torch.tensor([-0.0, float("nan"), float("-inf")], dtype=param.dtype)[: indices.numel()]
        param.copy_(flat.view(param.shape))
    return model


def llama_mask(model, share=0.05):
    generator = torch.Generator().manual_seed(2)
    chosen = {name: param.shape for name, param in model.named_parameters() if param.ndim == 2 or "norm" not in name}
    return Mask.from_bool({name: torch.rand(shape, generator=generator) < share for name, shape in chosen.items()})


def save_folder(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}
