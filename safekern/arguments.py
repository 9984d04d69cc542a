"""Which arguments are numbers, for functions that take them from configurations and arrays."""

from numbers import Integral, Real
from typing import TypeGuard

from torch import Tensor

from safekern.errors import InvalidArgumentError


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


def check_whole_number(name: str, value: object, least: int) -> None:
    """Refuses anything but an integer that is large enough.

    Raises:
        InvalidArgumentError: it is none.

    Example:
        >>> from safekern.arguments import check_whole_number
        >>> check_whole_number("batch_size", 1.5, 1)
        Traceback (most recent call last):
        safekern.errors.InvalidArgumentError: batch_size is 1.5, but must be a whole number of at least 1
    """
    if not is_whole_number(value) or value < least:
        raise InvalidArgumentError(f"{name} is {value!r}, but must be a whole number of at least {least:,}")


def check_seed(seed: object) -> int:
    """What a random generator of PyTorch takes.

    Raises:
        InvalidArgumentError: it is no integer, negative, or of more than 63 bits.

    Example:
        >>> from safekern.arguments import check_seed
        >>> check_seed(2**64)
        Traceback (most recent call last):
        safekern.errors.InvalidArgumentError: seed must be a whole number from 0 to 2^63 - 1, got 18446744073709551616
    """
    if not (is_whole_number(seed) and 0 <= seed < 2**63):
        raise InvalidArgumentError(f"seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    return int(seed)
