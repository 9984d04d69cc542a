"""Scores and masks to report on."""

import itertools

import torch

from safekern import Mask, Scores


def scores(seed=0, layers=3, **special):
    """Scores of a small model with two components per layer and a head; ``special`` replaces a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (7, 11)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (13, 7)
    shapes["lm_head.weight"] = (17, 7)
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients |= special
    sigma = dict(zip(gradients, (torch.rand(len(gradients), generator=generator) + 0.1).unbind(), strict=True))
    return Scores(gradients, sigma, num_batches=5, model_numel=1000, meta={"objective": "refusal", "reduction": "mean"})


def moe_mask(fused):
    """Two layers of three experts of 4 x 5 weights; expert e of layer l has e * (l + 1) weights selected."""
    indices, shapes = {}, {}
    for layer, expert in itertools.product(range(2), range(3)):
        chosen = range(expert * (layer + 1))
        prefix = f"model.layers.{layer}.mlp.experts"
        if fused:
            shapes[f"{prefix}.down_proj"] = (3, 4, 5)
            indices.setdefault(f"{prefix}.down_proj", []).extend(20 * expert + i for i in chosen)
        else:
            shapes[f"{prefix}.{expert}.w1.weight"] = (4, 5)
            indices[f"{prefix}.{expert}.w1.weight"] = list(chosen)
    for name, shape in {
        "model.layers.0.mlp.gate.weight": (3, 5),
        "model.layers.0.mlp.shared_experts.down_proj.weight": (4, 5),
        "model.layers.0.mlp.experts.down_proj_bias": (3, 4),
    }.items():
        indices[name], shapes[name] = [0], shape
    return Mask.from_indices(indices, shapes)
