"""``perturb_``: add normal noise to the selected weights of many tensors, the same noise on every backend.

The noise of one weight is a pure function of (seed, stream, flat index), made of integer operations and of fp32
operations that IEEE 754 rounds one way: the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) and the inverse of the normal distribution function by Wichura's PPND7
(algorithm AS 241, Applied Statistics 37(3), 1988), with the logarithm of Moshier's Cephes library. No libm.

Bytes moved: the cache lines that hold a selected element, twice, and the indices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safekern.ops.registry import define

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

_SQRT_HALF_BITS = 0x3F3504F3
# log(1 + f) = f - f^2 / 2 + f^3 * P(f), and log(2) in two parts, the first exact in products with small integers.
_LOG_P = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LOG2_HIGH, _LOG2_LOW = 0.693359375, -2.12194440e-4

# PPND7: the centre |p - 0.5| <= 0.425, and the tails. Its third range, p < exp(-25), is out of reach of 33 bits.
_CENTRE, _CENTRE_SQUARED, _TAIL_SHIFT = 0.425, 0.180625, 1.6
_CENTRE_TOP = (5.9109374720e01, 1.5929113202e02, 5.0434271938e01, 3.3871327179e00)
_CENTRE_BOTTOM = (6.7187563600e01, 7.8757757664e01, 1.7895169469e01, 1.0)
_TAIL_TOP = (1.7023821103e-01, 1.3067284816e00, 2.7568153900e00, 1.4234372777e00)
_TAIL_BOTTOM = (1.2021132975e-01, 7.3700164250e-01, 1.0)


def reference(
    params: Sequence[Tensor], indices: Sequence[Tensor], scales: Sequence[float], streams: Sequence[int], seed: int
) -> None:
    """Adds ``fp32(scales[t]) * normal(seed, streams[t], i)`` to ``params[t].flatten()[i]`` for i in ``indices[t]``.

    The noise is fp32. It is added in fp32 (in fp64 to an fp64 parameter) and the sum rounded to the parameter's dtype.
    Because a stream is named and not counted, a weight's noise does not depend on which other tensors and indices are
    in the call, nor on their order, the dtype or the device.

    Args:
        params: contiguous floating-point tensors, updated at the indices.
        indices: int32 or int64 [k_t], flat positions without repetition.
        scales: standard deviation of the noise per tensor.
        streams: which random stream each tensor uses, any 64-bit number; tensors of one stream get equal noise.
        seed: any 64-bit number.
    """
    for param, index, scale, stream in zip(params, indices, scales, streams, strict=True):
        flat, index = param.view(-1), index.long()
        value = flat[index].to(torch.promote_types(param.dtype, torch.float32))
        flat[index] = (value + normal(index, stream, seed) * scale).to(param.dtype)


def normal(index: Tensor, stream: int, seed: int) -> Tensor:
    """Standard normal fp32 numbers, one for each int64 index; their absolute values are below 6.5."""
    words = [index & _WORD, index >> 32 & _WORD, *(torch.full_like(index, word) for word in _halves(stream))]
    tail, sign, _, _ = philox(words, _halves(seed))
    # 32 bits choose the probability of the tail, in (0, 0.5], and a bit of the next word its side.
    p = (tail.float() + 0.5) * 2.0**-33
    q = 0.5 - p
    r = _CENTRE_SQUARED - q * q
    centre = q * _polynomial(r, _CENTRE_TOP), _polynomial(r, _CENTRE_BOTTOM)
    # A root taken in fp64 and rounded is the correctly rounded one; torch's own fp32 root on the CPU is not always.
    r = (-_log(p)).double().sqrt().float() - _TAIL_SHIFT
    outer = _polynomial(r, _TAIL_TOP), _polynomial(r, _TAIL_BOTTOM)
    z = torch.where(q <= _CENTRE, centre[0], outer[0]) / torch.where(q <= _CENTRE, centre[1], outer[1])
    return torch.where(sign >> 31 == 1, -z, z)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 on four int64 tensors that hold 32-bit words, the lowest first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return [c0, c1, c2, c3]


def _multiply(word: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, from 16-bit halves so that nothing passes signed 64 bits."""
    high, low = (word >> 16) * by, (word & 0xFFFF) * by
    return high + (low >> 16) >> 16, ((high & 0xFFFF) << 16) + low & _WORD


def _halves(number: int) -> tuple[int, int]:
    return number & _WORD, number >> 32 & _WORD


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of positive normal fp32 numbers, to within 2 units in the last place."""
    bits = x.view(torch.int32)
    exponent = bits - _SQRT_HALF_BITS >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e, square = exponent.float(), f * f
    tail = _polynomial(f, _LOG_P) * f * square + e * _LOG2_LOW - square * 0.5
    return f + tail + e * _LOG2_HIGH


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, the highest power first; every operation rounds."""
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def fake(
    params: Sequence[Tensor], indices: Sequence[Tensor], scales: Sequence[float], streams: Sequence[int], seed: int
) -> None:
    return None


perturb_ = define(
    "perturb_(Tensor(a!)[] params, Tensor[] indices, float[] scales, int[] streams, int seed) -> ()",
    reference=reference,
    fake=fake,
)
