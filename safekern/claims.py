"""Which thread changes a model for a while: one at a time."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from safekern.errors import ModelInUseError


@dataclass(frozen=True, eq=False, slots=True)
class _Claim:
    thread: int
    doing: str
    params: set[Tensor]


_LOCK = threading.Lock()
_CLAIMS: list[_Claim] = []


@contextmanager
def claimed(params: Mapping[str, Tensor], doing: str) -> Iterator[None]:
    """Keeps parameters from being claimed by other threads while a block runs.

    Hooks or noise that are put on and taken off again have to come off last in, first out. The blocks of one thread do
    so by themselves; those of two threads would leave what one of them found, which is the other's, in the model.

    Args:
        params: named parameters that the block changes and puts back.
        doing: what the block does to them, such as "scored", for the message.

    Raises:
        ModelInUseError: another thread has a claim on one of them.
    """
    claim = _Claim(threading.get_ident(), doing, set(params.values()))
    try:
        with _LOCK:
            for other in _CLAIMS:
                taken = [name for name, param in params.items() if param in other.params]
                if taken and other.thread != claim.thread:
                    raise ModelInUseError(
                        f"parameter {taken[0]} is being {other.doing} in another thread and cannot be {doing} "
                        "meanwhile: wait for that thread, or give each thread a copy of the model"
                    )
            _CLAIMS.append(claim)
        yield
    finally:
        with _LOCK:
            if claim in _CLAIMS:
                _CLAIMS.remove(claim)
