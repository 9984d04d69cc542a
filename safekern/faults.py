"""What several modules do when a run goes wrong: put things back for sure, and say why memory ran out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from safekern.errors import OutOfMemoryError, SafekernError

# Allocators raise plain RuntimeErrors too: torch's on the CPU, CUDA for pinned memory, and C++ in a kernel.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


def put_back(undo: Callable[[], object]) -> None:
    """Runs what undoes a change, and runs it again where Ctrl-C cut it short.

    Args:
        undo: may be run several times.

    Example:
        >>> from safekern.faults import put_back
        >>> settings = {"mode": "eval"}
        >>> try:
        ...     pass
        ... finally:
        ...     put_back(lambda: settings.update(mode="train"))
        >>> settings
        {'mode': 'train'}
    """
    try:
        undo()
    except KeyboardInterrupt:
        undo()
        raise


def first_line(error: Exception) -> str:
    """What an error says, in one line: libraries add hints of many lines. Its type, if it says nothing.

    Args:
        error: the error.

    Example:
        >>> from safekern.faults import first_line
        >>> first_line(ValueError(" no such file ")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def out_of_memory_explained(held: Callable[[], Mapping[str, float]], advice: str) -> Iterator[None]:
    """Turns the errors of allocators inside the block into one that says what takes the memory and what to lower.

    Args:
        held: bytes by what they are for; asked for after such an error only.
        advice: what to do, beginning with a verb.

    Raises:
        OutOfMemoryError: memory ran out inside the block.

    Example:
        >>> from safekern.faults import out_of_memory_explained
        >>> with out_of_memory_explained(lambda: {"the model": 2e9}, "use a smaller one"):
        ...     raise MemoryError
        Traceback (most recent call last):
        safekern.errors.OutOfMemoryError: out of memory (MemoryError) beside 2.00 GB for the model: use a smaller one
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = (str(error).strip().splitlines() or [""])[0]
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # One of ours may tell of the memory of another process.
        if isinstance(error, SafekernError) or not (known or any(sign in text for sign in _SIGNS)):
            raise
        takes = ", ".join(f"{_size(size)} for {what}" for what, size in held().items())
        raise OutOfMemoryError(f"out of memory ({text or type(error).__name__}) beside {takes}: {advice}") from error


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
