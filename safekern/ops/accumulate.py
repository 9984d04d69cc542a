"""``accumulate_``: fold gradients into fp32 accumulators.

Bytes moved: per element the gradient once and the accumulator twice (10 bytes for a bf16 gradient).
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, float32, full, ones, tensor, zeros

from safekern.ops.cases import DENORMAL, DTYPES, Case, Inputs, no_flags
from safekern.ops.registry import define


def reference(accs: Sequence[Tensor], grads: Sequence[Tensor], nonfinite: Tensor, absolute: bool) -> None:
    """Adds ``grads[t]``, or its absolute value, to ``accs[t]`` in fp32.

    Args:
        accs: contiguous fp32 accumulators.
        grads: contiguous floating-point tensors of the accumulators' sizes.
        nonfinite: bool [len(accs)]; an entry is set when its accumulator holds a NaN or an infinity afterwards (which
            catches such gradients as well as a sum that overflows), and is otherwise left as it was.
        absolute: add ``|grad|``.
    """
    for i, (acc, grad) in enumerate(zip(accs, grads, strict=True)):
        value = grad.to(float32).view(acc.shape)
        acc.add_(value.abs() if absolute else value)
        nonfinite[i] |= ~acc.isfinite().all()


def fake(accs: Sequence[Tensor], grads: Sequence[Tensor], nonfinite: Tensor, absolute: bool) -> None:
    return None


def cases(large: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for absolute in (False, True):
            inputs = Inputs(large)
            accs, grads = inputs.normal(), inputs.normal(dtype)
            for acc, grad in zip(accs, grads, strict=True):
                if acc.numel() > 5:
                    acc.view(-1)[:5] = tensor([-0.0, -0.0, DENORMAL, 0.0, 1e-3])
                    grad.view(-1)[:5] = tensor([0.0, -0.0, DENORMAL, -DENORMAL, -1e-3]).to(dtype)
            yield Case(f"{dtype}, absolute={absolute}", (accs, grads, no_flags(accs), absolute))
    many = Inputs(many=True)
    accs, grads = many.normal(), many.normal(DTYPES[0])
    yield Case("many tensors", (accs, grads, no_flags(accs), False))
    accs = [zeros(70_001), zeros(70_001), zeros(70_001, dtype=float32), full((3,), 3e38), zeros(3), zeros(3)]
    grads = [zeros(70_001, dtype=dtype) for dtype in DTYPES[:3]] + [full((3,), 3e38), ones(3), full((3,), 3e38)]
    for grad, value in zip(grads, (float("nan"), float("inf"), float("-inf")), strict=False):
        grad[66_000] = value
    grads += [full((3,), 1e300, dtype=DTYPES[3])]
    accs += [zeros(3)]
    flags = no_flags(accs)
    flags[4] = True
    yield Case("not finite", (accs, grads, flags, False))


accumulate_ = define(
    "accumulate_(Tensor(a!)[] accs, Tensor[] grads, Tensor(b!) nonfinite, bool absolute) -> ()",
    reference=reference,
    fake=fake,
    cases=cases,
)
