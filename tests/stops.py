"""Stops code at a chosen place, safekern's, another package's or backward, as Ctrl-C and kill -9 do at a random one."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor

import safekern


def calls(
    run: Callable[[], Any],
    at: int | None = None,
    act: Callable[[], Any] | None = None,
    packages: Sequence[ModuleType] = (safekern,),
) -> int:
    """Runs a function, and ``act`` after the ``at``-th call that the packages' code makes to code of others.

    Python lets a signal through when such a call returns: nearly all time is spent in them, so that this is where
    Ctrl-C strikes.

    Returns:
        How many such calls there were.
    """
    count = 0
    folders = tuple(str(Path(package.__file__ or "").parent) for package in packages)

    def is_ours(frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(folders)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        ours = is_ours(frame) if event == "c_return" else event == "return" and is_ours(frame.f_back)
        if ours and not (event == "return" and is_ours(frame)):
            if count == at and act is not None:
                count += 1
                sys.setprofile(None)
                act()
            count += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def spread(total: int, most: int | None) -> list[int]:
    """As many of ``range(total)`` as given, evenly spread with the last one among them; all for None."""
    if most is None or total <= most:
        return list(range(total))
    return sorted({(i + 1) * total // most - 1 for i in range(most)} | set(range(3)))


def interrupt() -> None:
    """What Python does at Ctrl-C."""
    raise KeyboardInterrupt


def raising(error: BaseException) -> Callable[[], Any]:
    """A function that raises."""

    def act() -> None:
        raise error

    return act


class _AtBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, act):
        ctx.act = act
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.act()
        return grad, None


def at_backward(tensor: Tensor, act: Callable[[], Any]) -> Tensor:
    """The tensor, and ``act`` when backward comes to it."""
    return _AtBackward.apply(tensor, act)
