"""Which arguments are numbers, for functions that take them from configurations and arrays."""

from numbers import Integral, Real
from typing import TypeGuard

from torch import Tensor


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
