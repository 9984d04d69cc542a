"""Flat indices into one tensor: the integers they are kept in, how they combine, and their codes in files.

Flat means row-major. Sorted means ascending without repetition, as masks keep them, on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safekern.errors import InvalidArgumentError


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of positions in a tensor of so many elements: int32, or int64 for one whose positions do not fit.

    Example:
        >>> from safekern.indices import index_dtype
        >>> index_dtype(2**31 - 1), index_dtype(2**31)
        (torch.int32, torch.int64)
    """
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


def checked(name: str, values: Tensor | Sequence[int] | NDArray[Any], shape: torch.Size) -> Tensor:
    """Sorted indices of :func:`index_dtype` that share no memory with what was given.

    Args:
        name: of the parameter, for messages.
        values: 1-D integers in any order, on any device.
        shape: of the parameter.

    Raises:
        InvalidArgumentError: they are no 1-D integers, lie outside the shape, or one is given twice.
    """
    try:
        # Copied first, because torch warns of read-only arrays and refuses reversed ones.
        copied = np.array(values) if isinstance(values, np.ndarray) else values
        given = torch.as_tensor(copied, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidArgumentError(f"{name!r}: the indices are not integers ({error}).") from error
    if given.layout != torch.strided:
        raise InvalidArgumentError(f"{name!r}: the indices are a sparse tensor; use its to_dense().")
    dtype = index_dtype(shape.numel())
    if given.dim() != 1:
        raise InvalidArgumentError(f"{name!r}: flat indices are needed (1-D), got shape {tuple(given.shape)}.")
    if not given.numel():
        return torch.empty(0, dtype=dtype, device="cpu")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        hint = "; for bool tensors there is Mask.from_bool" if given.dtype == torch.bool else ""
        raise InvalidArgumentError(f"{name!r}: integer indices are needed, got {given.dtype}{hint}.")
    indices = given.to(torch.int64)
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= shape.numel():
        wrong = low if low < 0 else high
        raise InvalidArgumentError(f"{name!r}: index {wrong:,} is outside the shape {tuple(shape)}.")
    if not (indices[1:] > indices[:-1]).all():
        indices = indices.sort().values
        repeated = indices[1:][indices[1:] == indices[:-1]]
        if repeated.numel():
            raise InvalidArgumentError(f"{name!r}: index {int(repeated[0]):,} is given more than once.")
    return indices.to(dtype, copy=True)


def contains(indices: Tensor, values: Tensor) -> Tensor:
    """For each of some values, whether it is among sorted indices, of which there is at least one: bool."""
    position = torch.searchsorted(indices, values).clamp_(max=indices.numel() - 1)
    return indices[position] == values


def union(left: Tensor, right: Tensor) -> Tensor:
    """The sorted indices that are in either; at least one is in the first."""
    return torch.cat([left, right[~contains(left, right)]]).sort().values


def encode(indices: Tensor) -> Tensor:
    """Turns sorted indices into the gaps between them, in codes of 8 or 16 bits, whichever take less space.

    The largest code moves on without an index; every other code moves on and ends at one.
    """
    gaps = np.diff(indices.numpy(), prepend=indices.numpy().dtype.type(-1))
    largest = int(gaps.max())

    def size(dtype: type[np.unsignedinteger[Any]]) -> int:
        skip = np.iinfo(dtype).max
        skips = int((gaps // skip).sum(dtype=np.int64)) if largest >= skip else 0
        return np.dtype(dtype).itemsize * (gaps.size + skips)

    dtype: type[np.unsignedinteger[Any]] = np.uint8 if size(np.uint8) <= size(np.uint16) else np.uint16
    skip = np.iinfo(dtype).max
    if largest < skip:
        return torch.from_numpy(gaps.astype(dtype))
    skips, rest = np.divmod(gaps, skip)
    ends = np.cumsum(skips + 1, dtype=np.int64)
    codes = np.full(int(ends[-1]), skip, dtype=dtype)
    codes[ends - 1] = rest
    return torch.from_numpy(codes)


def decode(name: str, codes: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`encode`, for codes of any origin.

    Args:
        name: of the parameter, for messages.
        codes: 1-D, uint8 or uint16.
        shape: of the parameter.

    Raises:
        InvalidArgumentError: they are not codes of indices into that shape.

    Example:
        >>> import torch
        >>> from safekern.indices import decode, encode
        >>> codes = encode(torch.tensor([1, 300], dtype=torch.int32))
        >>> codes, decode("w", codes, torch.Size([512]))
        (tensor([  2, 255,  44], dtype=torch.uint8), tensor([  1, 300], dtype=torch.int32))
    """
    if codes.dtype not in (torch.uint8, torch.uint16) or codes.dim() != 1 or not codes.numel():
        raise InvalidArgumentError(f"{name!r}: its codes are not a list of 8-bit or 16-bit numbers.")
    gaps = codes.numpy()
    # Also shows that the sums below fit the dtype of the indices.
    if int(gaps.sum(dtype=np.int64)) > shape.numel():
        raise InvalidArgumentError(f"{name!r}: an index is outside the shape {tuple(shape)}.")
    ends = gaps != np.iinfo(gaps.dtype).max
    positions = np.cumsum(gaps, dtype=np.int32 if index_dtype(shape.numel()) == torch.int32 else np.int64)
    indices = positions[ends] - 1
    if not ends[-1] or indices[0] < 0 or not (indices[1:] > indices[:-1]).all():
        raise InvalidArgumentError(f"{name!r}: its indices are not in order.")
    return torch.from_numpy(indices)
