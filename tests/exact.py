"""Comparisons by bits, where NaN equals itself and -0.0 is not 0.0."""

import torch
from torch import Tensor

from safekern.ops.cases import INTEGERS


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers; of a contiguous tensor, in the same memory."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have shape, dtype and all bits in common."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
