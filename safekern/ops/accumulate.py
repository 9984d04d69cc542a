"""``accumulate_``: fold gradients into fp32 accumulators.

Bytes moved: per element the gradient once and the accumulator twice (10 bytes for a bf16 gradient).
"""

from collections.abc import Sequence

from torch import Tensor, float32

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


accumulate_ = define(
    "accumulate_(Tensor(a!)[] accs, Tensor[] grads, Tensor(b!) nonfinite, bool absolute) -> ()",
    reference=reference,
    fake=fake,
)
