"""Matrix products of bf16 numbers, also where a processor has no instructions for them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from safekern.products import multiplies_slowly

_PRODUCTS: set[Callable[..., Any]] = {functional.linear, functional.scaled_dot_product_attention}


@contextlib.contextmanager
def bf16_products(device: torch.device) -> Iterator[None]:
    """Autocast to bf16, in which weights are cast once for all forward passes without gradients.

    A processor without instructions for bf16 multiplies bf16 numbers several times more slowly than fp32 ones: at 8
    against 44 GFLOP/s per core with AVX2. There the same numbers are multiplied in fp32. Products of two bf16 numbers
    are exact in it, and what comes out, forward and backward, is rounded to bf16 as ever: only the order of sums
    differs, and that attention's weights are not rounded before they meet the values.
    """
    # What is within another such context has its casts.
    slow = device.type == "cpu" and multiplies_slowly(torch.bfloat16) and not torch.is_autocast_enabled("cpu")
    with torch.autocast(device.type, torch.bfloat16), _InFloat32() if slow else contextlib.nullcontext():
        yield


class _InFloat32(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[Tensor, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        args = tuple(map(self._rounded, args))
        kwargs = {name: self._rounded(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).to(torch.bfloat16)

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if torch.is_grad_enabled() or not isinstance(value, torch.nn.Parameter):
            return value.to(torch.bfloat16).float()
        if value not in self._weights:
            self._weights[value] = value.to(torch.bfloat16).float()
        return self._weights[value]
