"""What arguments have to be where several functions take their like."""

from numbers import Integral, Real
from os import PathLike
from typing import TypeGuard

from torch import Tensor

from safekern.errors import InvalidArgumentError
from safekern.mask import Mask


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, NumPy's too, but not a bool.

    Example:
        >>> from safekern.arguments import is_number
        >>> is_number(1), is_number("1e-2"), is_number(True)
        (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_scalar(value: object) -> TypeGuard[float | Tensor]:
    """Whether it is a number as of :func:`is_number`, or a real tensor of one element."""
    return is_number(value) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether it is an integer, NumPy's too, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_mask(mask: object) -> None:
    """Refuses what is no mask.

    Raises:
        InvalidArgumentError: as above; the message says how to make one of it.

    Example:
        >>> from safekern.arguments import check_mask
        >>> check_mask("mask.safetensors")
        Traceback (most recent call last):
        safekern.errors.InvalidArgumentError: a mask is needed, got str: pass Mask.load(path) for a file
    """
    if not isinstance(mask, Mask):
        hint = (
            "Mask.load(path) for a file"
            if isinstance(mask, (str, bytes, PathLike))
            else ("what scores.top(ratio), Mask.load(path), Mask.from_indices or Mask.from_bool returns")
        )
        raise InvalidArgumentError(f"a mask is needed, got {type(mask).__name__}: pass {hint}")
