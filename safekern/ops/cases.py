"""What the ops' cases are made of: inputs, ordinary and nasty, on which every kernel has to agree with the reference.

Each op's module lists its own cases; ``safekern.selftest`` and the tests of the backends run them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype that shows the bits of a dtype of so many bytes."""

DENORMAL = 1e-41
EXTREMES = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0, DENORMAL, -DENORMAL, 3e38, 6e-8, 65504.0)

# Empty, one, odd, a power of two, and one more than what a block of threads usually takes.
_SMALL = ((), (0,), (1,), (7,), (33, 129), (4096,), (4099,))
_LARGE = ((2**16,), (3, 2**15 + 1), (300_007,))
# More tensors than fit the arguments of one launch.
_MANY = ((3,), (0,), (5,)) * 100

HYPERPARAMETERS = (0.9, 0.999, 1e-8, 1 - 1e-3 * 0.01)
"""beta1, beta2, eps and decay of the AdamW ops."""


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: what is special about it.
        arguments: the op's positional arguments; tensors are on the CPU, and are copied before they are used.
        ulps: how many units in the last place, of its own dtype and of its value before or after, an element may differ
            by. 0 asks for the same value, where one NaN is as good as another.
        relative: instead, the relative difference allowed; only asks for non-finite where the reference is non-finite.
        verbatim: the op moves bits: the bits of NaNs have to agree too.
        kept: for tensors of the first argument, which elements (bool [numel]) have to keep their bits.
        refused: part of the message of the RuntimeError that the op has to raise, leaving its arguments as they are.
    """

    name: str
    arguments: tuple[Any, ...]
    ulps: int = 0
    relative: float = 0.0
    verbatim: bool = False
    kept: Sequence[Tensor] = ()
    refused: str | None = None


class Inputs:
    """Lists of random tensors, the same on every machine.

    Args:
        large: include tensors of a few hundred thousand elements.
        seed: of the random numbers.
        many: instead, hundreds of tiny tensors.
    """

    def __init__(self, large: bool = False, *, seed: int = 0, many: bool = False) -> None:
        self.shapes: tuple[tuple[int, ...], ...] = _MANY if many else _SMALL + (_LARGE if large else ())
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
        """A tensor of each shape."""
        return [(torch.randn(shape, generator=self._generator) * scale).to(dtype) for shape in self.shapes]

    def indices(self, share: float, dtype: torch.dtype = torch.int64, *, ascending: bool = False) -> list[Tensor]:
        """Distinct flat positions in tensors of the shapes, at least one where there is one."""
        chosen = []
        for shape in self.shapes:
            numel = torch.Size(shape).numel()
            order = torch.randperm(numel, generator=self._generator)[: int(numel * share) + 1]
            chosen.append((order.sort().values if ascending else order).to(dtype))
        return chosen

    def normal_at(self, indices: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
        """fp32 numbers, one for each index."""
        return [torch.randn(index.numel(), generator=self._generator) * scale for index in indices]

    def bits_at(self, indices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Any bits at all, one element for each index: NaNs with payloads and of either sign, denormals, zeros."""
        return [any_bits(index.numel(), dtype, self._generator) for index in indices]


def any_bits(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Elements of any bits at all."""
    word = INTEGERS[dtype.itemsize]
    low, high = torch.iinfo(word).min, torch.iinfo(word).max
    return torch.randint(low, high, (numel,), generator=generator, dtype=word).view(dtype)


def no_flags(tensors: Sequence[Tensor]) -> Tensor:
    """A flag for each tensor, none of them set."""
    return torch.zeros(len(tensors), dtype=torch.bool)


def at(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """The elements of each tensor at its flat indices."""
    return [tensor.view(-1)[index.long()] for tensor, index in zip(tensors, indices, strict=True)]


def mark(tensors: Sequence[Tensor], indices: Sequence[Tensor], inside: bool) -> list[Tensor]:
    """For each tensor a bool [numel] that is ``inside`` at its flat indices and ``not inside`` elsewhere."""
    marks = []
    for tensor, index in zip(tensors, indices, strict=True):
        marked = torch.full((tensor.numel(),), not inside)
        marked[index.long()] = inside
        marks.append(marked)
    return marks


def steps(count: int) -> tuple[list[float], list[float]]:
    """``step_sizes`` and ``bias_correction2_sqrts`` of ``count`` parameters that are at different steps."""
    sizes = [1e-3 / (1 - 0.9 ** (t % 50 + 1)) for t in range(count)]
    return sizes, [(1 - 0.999 ** (t % 50 + 1)) ** 0.5 for t in range(count)]
