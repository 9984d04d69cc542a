"""``perturb_`` in Triton: one launch per combination of dtypes."""

import struct
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from safekern.ops import perturb as reference
from safekern.ops.triton.common import (
    FLOATS,
    INDICES,
    SCATTER_BLOCK,
    SELECTED_ROWS,
    Spec,
    aligned,
    check_selected,
    groups,
    launch_selected,
    narrow,
    on,
    pointer,
    selected,
)


def perturb_(
    params: Sequence[Tensor], indices: Sequence[Tensor], scales: Sequence[float], streams: Sequence[int], seed: int
) -> None:
    """See :func:`safekern.ops.perturb.reference`. An index outside its parameter is left out."""
    check_selected(params, indices)
    if not len(scales) == len(streams) == len(params):
        raise RuntimeError(f"safekern: expected {len(params)} scales and streams")
    present = [t for t, index in enumerate(indices) if index.numel()]
    if not present:
        return
    with on(params[0].device):
        kinds = ((params[t].dtype, indices[t].dtype, aligned(indices[t])) for t in present)
        for (dtype, _, is_aligned), chosen in groups(present, kinds).items():
            launch_selected(
                perturb_kernel,
                chosen,
                params,
                indices,
                [[_float_bits(scales[t]) for t in chosen], [streams[t] for t in chosen]],
                seed,
                block=SCATTER_BLOCK,
                PARAM=FLOATS[dtype],
                ALIGNED=is_aligned,
            )


def _float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


_HIGH, _LOW = (tl.constexpr(multiplier) for multiplier in reference._MULTIPLIERS)
_STEP0, _STEP1 = (tl.constexpr(step) for step in reference._KEY_STEPS)
_SQRT_HALF_BITS = tl.constexpr(reference._SQRT_HALF_BITS)
_LOG_P = tl.constexpr(reference._LOG_P)
_LOG2_HIGH, _LOG2_LOW = tl.constexpr(reference._LOG2_HIGH), tl.constexpr(reference._LOG2_LOW)
_CENTRE, _CENTRE_SQUARED = tl.constexpr(reference._CENTRE), tl.constexpr(reference._CENTRE_SQUARED)
_TAIL_SHIFT = tl.constexpr(reference._TAIL_SHIFT)
_CENTRE_TOP, _CENTRE_BOTTOM = tl.constexpr(reference._CENTRE_TOP), tl.constexpr(reference._CENTRE_BOTTOM)
_TAIL_TOP, _TAIL_BOTTOM = tl.constexpr(reference._TAIL_TOP), tl.constexpr(reference._TAIL_BOTTOM)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    value = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, COUNT):
        value = value * x + COEFFICIENTS[i]
    return value


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    square = f * f
    tail = _polynomial(f, _LOG_P, 9) * f * square + e * _LOG2_LOW - square * 0.5
    return f + tail + e * _LOG2_HIGH


@triton.jit
def _normal(index, stream, seed):
    """The standard normal number of each int64 index, in the order of operations of the reference."""
    # Words are held in uint64, whose products with 32-bit multipliers are exact.
    WORD: tl.constexpr = 0xFFFFFFFF
    c0 = index.to(tl.uint64) & WORD
    c1 = index.to(tl.uint64) >> 32
    c2 = tl.zeros_like(c0) + (stream.to(tl.uint64) & WORD)
    c3 = tl.zeros_like(c0) + (stream.to(tl.uint64) >> 32)
    k0 = tl.zeros_like(c0) + (seed.to(tl.uint64) & WORD)
    k1 = tl.zeros_like(c0) + (seed.to(tl.uint64) >> 32)
    for _ in tl.static_range(10):
        p0 = c0 * _HIGH
        p1 = c2 * _LOW
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0 = (k0 + _STEP0) & WORD
        k1 = (k1 + _STEP1) & WORD
    p = (c0.to(tl.float32) + 0.5) * 1.1641532182693481e-10
    q = 0.5 - p
    in_centre = q <= _CENTRE
    r = _CENTRE_SQUARED - q * q
    centre_top = q * _polynomial(r, _CENTRE_TOP, 4)
    centre_bottom = _polynomial(r, _CENTRE_BOTTOM, 4)
    r = tl.sqrt_rn(-_log(p)) - _TAIL_SHIFT
    top = tl.where(in_centre, centre_top, _polynomial(r, _TAIL_TOP, 4))
    bottom = tl.where(in_centre, centre_bottom, _polynomial(r, _TAIL_BOTTOM, 3))
    z = tl.div_rn(top, bottom)
    return tl.where((c1 >> 31) == 1, -z, z)


@triton.jit(do_not_specialize=["tensors", "seed"])
def perturb_kernel(
    table,
    tensors: tl.int32,
    seed: tl.int64,
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Must move, and moves, 4 (or 8) bytes of index and the 32-byte sectors that hold a selected weight, twice."""
    t, _, _, _, index, valid = selected(table, tensors, INDEX, ALIGNED, BLOCK)
    places = pointer(table + 3 * tensors + t, PARAM, False) + index
    entry = table + SELECTED_ROWS * tensors + t
    scale = tl.load(entry).to(tl.int32).to(tl.float32, bitcast=True)
    noise = _normal(index, tl.load(entry + tensors), seed.to(tl.int64)) * scale
    value = tl.load(places, mask=valid, other=0)
    if tl.float64 == PARAM:
        value = value + noise
    else:
        value = value.to(tl.float32) + noise
    tl.store(places, narrow(value, PARAM), mask=valid)


SPECS = [
    Spec(
        perturb_kernel,
        {"table": "*i64", "tensors": "i32", "seed": "i64"},
        {"PARAM": param, "ALIGNED": True, "INDEX": index, "BLOCK": SCATTER_BLOCK},
    )
    for param in FLOATS.values()
    for index in INDICES.values()
]
