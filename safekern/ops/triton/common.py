"""What the Triton kernels share: argument checks, tables of tensors on the device, loads, stores and arithmetic."""

import functools
import struct
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops import registry

# Threads per program, where a kernel does not say otherwise. With half of them, some kernels would hold more than fits
# the registers of some GPU.
THREADS = 256
INTERPRETED: tl.constexpr = tl.constexpr(registry.INTERPRETED)
# AMD's data-centre GPUs have warps of 64 threads.
WARP_SIZE = 64 if torch.version.hip else 32


def launch_options(warp_size: int, threads: int = THREADS) -> dict[str, Any]:
    """How kernels are compiled. A fused multiply-add would round differently from the plain-torch references."""
    return {"num_warps": max(1, threads // warp_size), "enable_fp_fusion": False}


LAUNCH = launch_options(WARP_SIZE)

# Elements of one tensor that a program works on: at least 16 bytes per thread.
BLOCK = 2048
# Where selected weights are written, one per thread: neighbouring lanes then write to neighbouring sectors at the same
# time, as in csrc/cuda/common.cuh.
SCATTER_BLOCK = THREADS

FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
INDICES = {torch.int32: tl.int32, torch.int64: tl.int64}
# Where only bits count, floats are moved as integers of their size.
WORDS = {2: tl.int16, 4: tl.int32, 8: tl.int64}

_DTYPE_NAMES = {
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bool: "Bool",
}

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spec:
    """How a kernel is compiled ahead of time, and what the result must look like.

    Attributes:
        kernel: the jit function.
        signature: the types of its run-time arguments in Triton's notation. Pointers are taken to be 16-byte aligned.
        constants: the values of its constexpr arguments.
        loads: bytes that one program reads of full blocks of consecutive elements, which takes loads of 16 bytes.
        stores: the same of stores.
        threads: how many threads a program has.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    loads: int = 0
    stores: int = 0
    threads: int = THREADS


def size_of(*types: tl.dtype) -> int:
    """The bytes that an element of each of these types takes, in all."""
    bits: int = sum(each.primitive_bitwidth for each in types)
    return bits // 8


# Arguments, as csrc/checks.h checks them


def check_count(items: Sequence[object], count: int, what: str) -> None:
    if len(items) != count:
        raise RuntimeError(f"safekern: expected {count} {what}, got {len(items)}")


def check_tensor(tensor: Tensor, device: torch.device, what: str) -> None:
    """Contiguous and on the device: kernels get nothing but addresses."""
    if not tensor.is_contiguous():
        raise RuntimeError(f"safekern: {what} must be contiguous")
    if tensor.device != device:
        raise RuntimeError(f"safekern: {what} is on {tensor.device}, but the first tensor is on {device}")


def check_dtype(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype:
        raise RuntimeError(f"safekern: {what} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}")


def check_numel(tensor: Tensor, numel: int, what: str) -> None:
    if tensor.numel() != numel:
        raise RuntimeError(f"safekern: {what} must have {numel} elements, got {tensor.numel()}")


def check_float(tensor: Tensor, device: torch.device, what: str) -> None:
    check_tensor(tensor, device, what)
    # Parameters and gradients are what sharding frees. Of all tensors it would be a sixth of a step's time here.
    if not tensor.untyped_storage().size() and tensor.numel():
        raise RuntimeError(f"safekern: the memory of {what} was freed")
    if tensor.dtype not in FLOATS:
        raise RuntimeError(
            f"safekern: expected a bfloat16, float16, float32 or float64 tensor, got {dtype_name(tensor.dtype)}"
        )


def check_index(index: Tensor, device: torch.device) -> None:
    # That the indices lie inside their tensor cannot be seen without waiting for the device: kernels mask off those
    # that do not.
    check_tensor(index, device, "an index tensor")
    if index.dtype not in INDICES:
        raise RuntimeError(f"safekern: indices must be int32 or int64, got {dtype_name(index.dtype)}")


def check_flags(nonfinite: Tensor, count: int, device: torch.device) -> None:
    check_tensor(nonfinite, device, "nonfinite")
    check_dtype(nonfinite, torch.bool, "nonfinite")
    check_numel(nonfinite, count, "nonfinite")


def check_selected(params: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Parameters and positions in each of them, which most ops begin with."""
    check_count(indices, len(params), "index tensors")
    if not params:
        return
    device = params[0].device
    for param, index in zip(params, indices, strict=True):
        check_float(param, device, "a parameter")
        check_index(index, device)


def check_saved(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """The arguments of `restore_` and `count_changed`."""
    check_selected(params, indices)
    check_count(values, len(params), "value tensors")
    for param, index, value in zip(params, indices, values, strict=True):
        check_tensor(value, param.device, "a value tensor")
        check_dtype(value, param.dtype, "a value tensor")
        check_numel(value, index.numel(), "a value tensor")


def check_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
) -> None:
    """What `set_adamw_` and `spa_adamw_` have in common."""
    count = len(params)
    check_selected(params, indices)
    check_count(grads, count, "gradients")
    check_count(exp_avgs, count, "first moments")
    check_count(exp_avg_sqs, count, "second moments")
    if not len(step_sizes) == len(bias_correction2_sqrts) == count:
        raise RuntimeError(f"safekern: expected {count} step sizes and bias corrections")


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype, str(dtype))


# Launches


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current: Triton launches on the current one, whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aligned(*tensors: Tensor) -> bool:
    """Whether 16-byte accesses are possible from the start of all these tensors."""
    for tensor in tensors:  # noqa: SIM110 - all() would spend longer on its generator than on a step's tensors
        if tensor.data_ptr() % 16:
            return False
    return True


def groups(positions: Iterable[int], keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The positions with equal keys, for one launch each."""
    grouped: dict[Key, list[int]] = {}
    for position, key in zip(positions, keys, strict=True):
        grouped.setdefault(key, []).append(position)
    return grouped


def first_blocks(numels: Iterable[int], block: int) -> list[int]:
    """The number of each tensor's first block when their blocks are counted through, and the number of all blocks."""
    first = [0]
    for numel in numels:
        first.append(first[-1] + -(-numel // block))
    return first


def table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A matrix of integers (addresses, sizes) on the device, without waiting for it.

    Tables are kept by their content: a step whose tensors are where they were in an earlier one copies nothing.
    """
    content = tuple(map(tuple, rows))
    if device.type != "cuda":
        return torch.tensor(content, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        return _written_table(content, device)
    copied = _table_of_one if len(content[0]) == 1 else _table_of_several
    # On another stream the copy might not have happened yet.
    return copied(content, device, torch.cuda.current_stream(device).cuda_stream)


def _copied(content: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    return torch.tensor(content, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


# A step with in_backward=True makes one for every parameter, in the order of backward: a cache that holds fewer would
# have dropped each of them by the next step.
_table_of_one = functools.lru_cache(maxsize=8192)(_copied)
_table_of_several = functools.lru_cache(maxsize=64)(_copied)


def _written_table(content: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The same for a CUDA graph: the values are arguments of launches, so a replay reads no host memory."""
    result = torch.empty(len(content), len(content[0]), dtype=torch.int64, device=device)
    values = [value for row in content for value in row]
    for begin in range(0, len(values), 16):
        some = values[begin : begin + 16]
        write_kernel[(1,)](result, begin, len(some), *some, *[0] * (16 - len(some)), **LAUNCH)
    return result


def launch_selected(
    kernel: Any,
    chosen: Sequence[int],
    params: Sequence[Tensor],
    indices: Sequence[Tensor],
    rows: Sequence[Sequence[int]],
    *args: Any,
    block: int = BLOCK,
    **constants: Any,
) -> None:
    """Launches a kernel built on `selected` once for the chosen tensors, which must all have an index.

    Args:
        kernel: takes (table, tensors, ``*args``) and the constants INDEX, BLOCK and ``**constants``.
        chosen: positions in the lists that follow.
        params: what the indices point into.
        indices: all of one dtype.
        rows: what else the kernel reads per tensor, from row ``SELECTED_ROWS`` on, for the chosen ones.
        args: further arguments of the kernel.
        block: how many indices a program takes.
        constants: further constants of the kernel.
    """
    counts = [indices[t].numel() for t in chosen]
    first = first_blocks(counts, block)
    entries = table(
        [
            first[:-1],
            counts,
            [indices[t].data_ptr() for t in chosen],
            [params[t].data_ptr() for t in chosen],
            [params[t].numel() for t in chosen],
            *rows,
        ],
        params[0].device,
    )
    index = INDICES[indices[chosen[0]].dtype]
    kernel[(first[-1],)](entries, len(chosen), *args, **constants, INDEX=index, BLOCK=block, **LAUNCH)


def double_bits(value: float) -> int:
    """Triton rounds float arguments to fp32: doubles travel as integers, and `double` turns them back."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


@triton.jit(do_not_specialize=["begin", "count", *(f"v{i}" for i in range(16))])
def write_kernel(
    out,
    begin: tl.int64,
    count: tl.int64,
    v0: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    v3: tl.int64,
    v4: tl.int64,
    v5: tl.int64,
    v6: tl.int64,
    v7: tl.int64,
    v8: tl.int64,
    v9: tl.int64,
    v10: tl.int64,
    v11: tl.int64,
    v12: tl.int64,
    v13: tl.int64,
    v14: tl.int64,
    v15: tl.int64,
):
    """Writes its arguments to ``out[begin : begin + count]``."""
    values = (v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15)
    for i in tl.static_range(16):
        tl.store(out + begin + i, values[i], mask=i < count)


# Parts of kernels


@triton.jit
def find(first, count, block):
    """The last of ``count`` ascending numbers that is at most ``block``; the first of them is.

    A search with 32 probes at a time: every program starts with it, and a round waits for memory as long as a round of
    a binary search does.
    """
    low = count * 0
    high = count
    while high - low > 1:
        stride = (high - low + 31) // 32
        probes = low + tl.arange(0, 32) * stride
        inside = probes < high
        reached = inside & (tl.load(first + probes, mask=inside, other=0) <= block)
        low += (tl.sum(reached.to(tl.int32), axis=0) - 1) * stride
        high = tl.minimum(high, low + stride)
    return low


@triton.jit
def first_at_least(numbers, count, value):
    """Where in ascending numbers the first one of at least ``value`` is; a block of searches, each in its own list."""
    low = count * 0
    high = count
    while tl.max(high - low, axis=0) > 0:
        searching = high > low
        middle = (low + high) // 2
        smaller = searching & (tl.load(numbers + middle, mask=searching, other=0).to(tl.int64) < value)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(searching & ~smaller, middle, high)
    return low


@triton.jit
def pointer(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a table entry, as a pointer."""
    address = tl.load(entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def load_run(base, places, inside, full):
    """Loads consecutive elements: with 16-byte loads, which a mask would prevent, where the whole block is inside.

    The block's own offset belongs into ``base``: places are int32, since int64 ones would take twice the registers.
    """
    if full:
        values = tl.load(base + places)
    else:
        values = tl.load(base + places, mask=inside, other=0)
    return values


@triton.jit
def store_run(base, places, values, inside, full):
    if full:
        tl.store(base + places, values)
    else:
        tl.store(base + places, values, mask=inside)


@triton.jit
def run_of(numel, BLOCK: tl.constexpr):
    """Where the program's block of a tensor begins, which of its places exist, and whether all do."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    size = tl.minimum(numel - begin, BLOCK).to(tl.int32)
    return begin, tl.arange(0, BLOCK) < size, size == BLOCK


# Rows of every table of `launch_selected`: first block, number of indices, their address, the address and size of what
# they point into.
SELECTED_ROWS: tl.constexpr = tl.constexpr(5)


@triton.jit
def selected(table, tensors, INDEX: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The block of indices that a program of `launch_selected` works on.

    Returns:
        t: the column of the table.
        begin: where the block begins in the tensor's list of indices.
        inside: bool [BLOCK], which of its places exist.
        full: whether all of them do.
        index: int64 [BLOCK], the indices.
        valid: bool [BLOCK], whether the place exists and its index lies inside the tensor.
    """
    block = tl.program_id(0).to(tl.int64)
    t = find(table, tensors, block)
    begin = (block - tl.load(table + t)) * BLOCK
    size = tl.minimum(tl.load(table + tensors + t) - begin, BLOCK).to(tl.int32)
    places = tl.arange(0, BLOCK)
    inside = places < size
    full = size == BLOCK
    index = load_run(pointer(table + 2 * tensors + t, INDEX, ALIGNED) + begin, places, inside, full).to(tl.int64)
    valid = inside & (index >= 0) & (index < tl.load(table + 4 * tensors + t))
    return t, begin, inside, full, index, valid


@triton.jit
def narrow(value, TYPE: tl.constexpr):
    """Rounds to nearest, ties to even, and keeps denormals."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        # Triton's interpreter truncates.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(TYPE)
    return result


@triton.jit
def is_finite(value):
    if value.dtype == tl.float64:
        finite = tl.abs(value) < float("inf")
    else:
        finite = (value.to(tl.float32).to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
    return finite


@triton.jit
def double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        result = tl.sqrt(x)
    else:
        result = tl.sqrt_rn(x)
    return result


@triton.jit
def quotient(x, y):
    if x.dtype == tl.float64:
        result = x / y
    else:
        result = tl.div_rn(x, y)
    return result


@triton.jit
def adamw(
    value,
    grad,
    exp_avg,
    exp_avg_sq,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    step_size,
    bias_correction2_sqrt,
    REAL: tl.constexpr,
):
    """One AdamW step in the order of operations of ``csrc/arithmetic.h``, in the type REAL.

    The hyperparameters are `double_bits`, rounded to REAL here; the decay to the type of the value.
    """
    exp_avg = exp_avg + (grad - exp_avg) * double(one_minus_beta1).to(REAL)
    exp_avg_sq = exp_avg_sq * double(beta2).to(REAL) + (grad * double(one_minus_beta2).to(REAL)) * grad
    # Broadcast first: div_rn takes no scalar beside a block.
    correction = tl.zeros_like(exp_avg_sq) + double(bias_correction2_sqrt).to(REAL)
    denom = quotient(root(exp_avg_sq), correction) + double(eps).to(REAL)
    step = quotient(exp_avg * double(step_size).to(REAL), denom)
    return value * double(decay).to(value.dtype) - step, exp_avg, exp_avg_sq


# What `adamw_bits` gives and a kernel takes, in this order.
HYPERPARAMETERS = (
    "decay",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "eps",
    "step_size",
    "bias_correction2_sqrt",
)


def adamw_bits(
    decay: float, beta1: float, beta2: float, eps: float, step_size: float, bias_correction2_sqrt: float
) -> list[int]:
    """The hyperparameters of `adamw`.

    They are arguments of a kernel, not in its table, because they change with the step: the table stays what it was.
    """
    values = (decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, step_size, bias_correction2_sqrt)
    return [double_bits(value) for value in values]


SPECS = [
    Spec(
        write_kernel,
        {"out": "*i64", "begin": "i64", "count": "i64", **{f"v{i}": "i64" for i in range(16)}},
        {},
    )
]
