"""A model in another mode for the length of a block, and afterwards as it was found."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from safekern.faults import put_back


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, and afterwards every module in the mode it was in."""
    with evaluating(model):
        enabled = torch.is_grad_enabled()
        try:
            # Not torch.no_grad(), which an interrupt that strikes between its start and its block leaves in force.
            torch.set_grad_enabled(False)
            yield
        finally:
            put_back(lambda: torch.set_grad_enabled(enabled))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every module in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # The attribute, not eval(): some wrappers merge or unpack their weights when eval() is called.
        for module, _ in modes:
            module.training = False
        yield
    finally:
        put_back(lambda: _set_modes(modes))


@contextmanager
def frozen(params: Iterable[torch.Tensor]) -> Iterator[None]:
    """No gradients for these parameters, nor activations kept for them."""
    trained = [param for param in params if param.requires_grad]
    try:
        for param in trained:
            param.requires_grad_(False)
        yield
    finally:
        put_back(lambda: [param.requires_grad_(True) for param in trained])


def _set_modes(modes: Sequence[tuple[torch.nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
