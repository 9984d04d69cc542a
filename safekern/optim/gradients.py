"""The gradients of one SET step: gathered at the selected weights, and looked through for NaN without waiting."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safekern import ops
from safekern.layout import by_device, memory_like
from safekern.optim.masked import Places
from safekern.optim.selected_grad import SelectedGrad


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected weights of a parameter that this process holds.

    Attributes:
        places: which of the mask's they are, in its order.
        indices: where they lie in the memory of this process's part.
        owner: whether this process speaks for them, where several hold the same.
        dtype: of the parameter.
    """

    places: Places
    indices: Tensor
    owner: bool
    dtype: torch.dtype


@dataclass(slots=True)
class Target:
    """A masked parameter that received a gradient.

    Attributes:
        name: of the parameter.
        group: the optimizer's group that holds it.
        param: the parameter.
        piece: the part of it that this process holds.
        grad: the part of its gradient, dense or a ``SelectedGrad``.
        selection: its selected weights.
        state: of the optimizer.
        selected: fp32 [k], the gradient at the selected weights; of a dense one after :func:`gather`.
    """

    name: str
    group: dict[str, Any]
    param: Tensor
    piece: Tensor
    grad: Tensor
    selection: Selection
    state: dict[str, Tensor]
    selected: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether backward left the whole gradient."""
        return not isinstance(self.grad, SelectedGrad)


class NonfiniteFlag:
    """Whether NaN or infinity is among some gradients: a bool that a device is still computing, on its way to the host.

    Attributes:
        on_device: bool, 0-d or of one element.
    """

    def __init__(self, on_device: Tensor) -> None:
        self.on_device = on_device
        self._on_host = on_device
        self._copied: torch.Event | None = None
        if on_device.device.type != "cpu":
            self._on_host = on_device.to("cpu", non_blocking=True)
            self._copied = torch.accelerator.current_stream(on_device.device).record_event()

    def read(self) -> bool:
        """Waits for the flag, but not for what the device does after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._on_host)


def gather(targets: list[Target]) -> list[NonfiniteFlag]:
    """Fills in what is selected of dense gradients; per device, whether NaN or infinity is among it."""
    dense = [target for target in targets if target.is_dense]
    flags = []
    for members in by_device([target.piece for target in dense]):
        together = [dense[t] for t in members]
        device = together[0].piece.device
        indices = [target.selection.indices for target in together]
        # Each begins at a multiple of 16 bytes, which GPU kernels write at once; nobody reads what lies between.
        sizes = [size for index in indices for size in (index.numel(), -index.numel() % 4)]
        selected = torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)[::2]
        found = torch.zeros(len(together), dtype=torch.bool, device=device)
        ops.gather_(selected, [memory_like(target.grad, target.piece) for target in together], indices, found)
        flags.append(NonfiniteFlag(found.any()))
        for target, values in zip(together, selected, strict=True):
            target.selected = values
    return flags


def check_reduced(targets: list[Target]) -> list[NonfiniteFlag]:
    """Per device, whether NaN or infinity is among what backward selected."""
    reduced = [target.selected for target in targets if not target.is_dense]
    flags = []
    for members in by_device(reduced):
        together = [reduced[t] for t in members]
        found, one = (torch.full((1,), value, dtype=torch.float32, device=together[0].device) for value in (0.0, 1.0))
        # Multiplies by one, which changes nothing.
        torch._amp_foreach_non_finite_check_and_unscale_(together, found, one)
        flags.append(NonfiniteFlag(found.bool()))
    return flags


def nonfinite_names(targets: list[Target], flags: list[NonfiniteFlag]) -> list[str]:
    """The parameters whose selected gradients hold NaN or infinity, which some have if a flag is set."""
    if not any(flag.read() for flag in flags):
        return []
    return [target.name for target in targets if not target.selected.isfinite().all()]
