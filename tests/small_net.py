"""A small model to train, and exact comparisons of what training did to it."""

import copy

import torch
from exact import bits
from torch import Tensor, nn

from safekern import Mask


class Net(nn.Module):
    """Two masked matrices and a masked bias; the norm stays outside masks."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(13, 37, dtype=dtype)
        self.norm = nn.LayerNorm(37, dtype=dtype)
        self.second = nn.Linear(37, 5, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(self.norm(self.first(x.to(self.first.weight.dtype)).tanh()))


MASKED = ("first.weight", "first.bias", "second.weight")


def random_mask(model, share=0.3, names=MASKED, seed=1):
    generator = torch.Generator().manual_seed(seed)
    params = dict(model.named_parameters())
    return Mask.from_bool({name: torch.rand(params[name].shape, generator=generator) < share for name in names})


def full_mask(model):
    return Mask.from_bool({name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})


def loss_of(model, step):
    x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step))
    return model(x).float().square().mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def give_gradients(model, step):
    """The same ones for equal models: those of backward depend on the layout of the weights."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def weights(model):
    return {name: bits(param).clone() for name, param in model.named_parameters()}


def snapshot(model, optimizer):
    """Everything a refused call must leave alone."""
    state = {name: copy.deepcopy(optimizer.state[param]) for name, param in model.named_parameters()}
    return weights(model), state


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        for mine, other in zip(a, b, strict=True):
            assert_same(mine, other)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b
