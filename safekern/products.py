"""Products of 16-bit numbers, also where a processor has no instructions for them."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode

# What PyTorch asks its library of CPU kernels before it leaves products to it.
_HAS_INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# Of fewer rows the weights' copy takes longer than the product.
_WORTH_COPYING = 8


def multiplies_slowly(dtype: torch.dtype) -> bool:
    """Whether this machine's processor has no instructions for products of numbers of a 16-bit type.

    PyTorch then takes much longer for them than for those of fp32 numbers: 60.7 against 5.5 s for forward and backward
    of 267 tokens through 135M weights under autocast to bf16, on one core with AVX2.

    Args:
        dtype: The type.

    Returns:
        False also where nothing is known: for another type, or a PyTorch without oneDNN.

    Example:
        >>> multiplies_slowly(torch.float32)
        False
    """
    supported = getattr(torch.ops.mkldnn, _HAS_INSTRUCTIONS.get(dtype, ""), None)
    return supported is not None and not supported()


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Lets linear layers and attention multiply 16-bit numbers on the CPU as fp32 ones, where it `multiplies_slowly`.

    Products of two such numbers are exact in fp32, and what comes out, forward and backward, is rounded to the 16-bit
    type as ever: only the order of sums differs, and that attention's weights are not rounded before they meet the
    values, of which it keeps wide copies for backward. One layer's weights are copied at a time. Forward and backward
    of 296 tokens through 135M weights in bf16 take 8 s instead of 95 on one core with AVX2, and 8.8 in fp32.

    Left alone is what is no plain tensor, of few rows, or under autocast, and what is computed again inside backward:
    a model that checkpoints its activations cannot use it.

    Example:
        >>> with in_float32():
        ...     torch.nn.Linear(4, 3, dtype=torch.bfloat16)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    slow = {dtype for dtype in _HAS_INSTRUCTIONS if multiplies_slowly(dtype)}
    with _InFloat32(slow) if slow else contextlib.nullcontext():
        yield


class _InFloat32(TorchFunctionMode):
    def __init__(self, slow: set[torch.dtype]) -> None:
        super().__init__()
        self._slow = slow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Layers and models name what is multiplied by its place.
        if func is functional.linear and not kwargs and self._is_slow(args) and args[1].ndim == 2:
            return _Linear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        if func is functional.scaled_dot_product_attention and args and self._is_slow([*args, *kwargs.values()]):
            wide = {name: _widened(value) for name, value in kwargs.items()}
            return func(*map(_widened, args), **wide).to(args[0].dtype)
        return func(*args, **kwargs)

    def _is_slow(self, arguments: Sequence[Any]) -> bool:
        numbers = [value for value in arguments if isinstance(value, Tensor) and value.is_floating_point()]
        return (
            len(numbers) > 1
            and numbers[0] is arguments[0]
            and numbers[0].ndim > 1
            and math.prod(numbers[0].shape[:-1]) >= _WORTH_COPYING
            # What does not fit together is torch's to refuse.
            and len({value.dtype for value in numbers}) == 1
            and numbers[0].dtype in self._slow
            and all(type(value) in (Tensor, Parameter) and value.device.type == "cpu" for value in numbers)
            and not torch.is_autocast_enabled("cpu")
        )


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Linear(torch.autograd.Function):
    """Keeps for its backward what a layer keeps, and not the copies."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)
        wide = None if bias is None else bias.float()
        return functional.linear(input.float(), weight.float(), wide).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        wide = grad.float()
        rows = wide.flatten(0, -2)
        return (
            (wide @ weight.float()).to(grad.dtype) if of_input else None,
            (rows.T @ input.flatten(0, -2).float()).to(grad.dtype) if of_weight else None,
            rows.sum(0).to(grad.dtype) if of_bias else None,
        )
