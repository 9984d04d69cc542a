"""``spa_adamw_``: AdamW on all weights of a model except the protected ones, in place, in one pass.

Bytes moved: per element the gradient once and the parameter and both moments twice (28 bytes in fp32, 14 in bf16, 22 in
bf16 with fp32 moments), plus the indices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safekern.ops.registry import define


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """One AdamW step in the order of operations of ``torch.optim.AdamW``; ``params[t].flatten()[indices[t]]`` stay.

    The arithmetic is in fp32, or fp64 for fp64 parameters, and the moments enter the update before they are rounded to
    their dtype. The moments of protected weights are updated like all others, which costs no branch.

    Args:
        params: contiguous floating-point tensors, updated outside the indices.
        grads: contiguous tensors of the parameters' sizes, fp32 or of the parameter's dtype.
        indices: ascending int32 or int64 [k_t], flat positions without repetition; may be empty.
        exp_avgs: contiguous tensors of the parameters' sizes, fp32 or of the parameter's dtype, updated.
        exp_avg_sqs: the same, of the first moment's dtype, updated.
        step_sizes: ``lr / (1 - beta1 ** step)`` per parameter.
        bias_correction2_sqrts: ``sqrt(1 - beta2 ** step)`` per parameter.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the denominator.
        decay: ``1 - lr * weight_decay``.
    """
    for t, (param, index) in enumerate(zip(params, indices, strict=True)):
        real = torch.promote_types(param.dtype, torch.float32)
        flat = param.view(-1)
        kept = flat[index]
        grad, exp_avg, exp_avg_sq = (values[t].view(-1).to(real) for values in (grads, exp_avgs, exp_avg_sqs))
        # Not lerp and addcmul, which may fuse a multiply-add: every operation here rounds once, as in the kernels.
        exp_avg = exp_avg + (grad - exp_avg) * (1 - beta1)
        exp_avg_sq = exp_avg_sq * beta2 + (grad * (1 - beta2)) * grad
        # A root taken in fp64 and rounded to fp32 is the correctly rounded one; torch's own root on the CPU is not
        # always, so for fp64 parameters the kernels may differ from this reference in the last bit.
        denom = exp_avg_sq.double().sqrt().to(real) / bias_correction2_sqrts[t] + eps
        flat.copy_(flat.to(real) * decay - (exp_avg * step_sizes[t]) / denom)
        flat[index] = kept
        exp_avgs[t].view(-1).copy_(exp_avg)
        exp_avg_sqs[t].view(-1).copy_(exp_avg_sq)


def fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    return None


spa_adamw_ = define(
    "spa_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, float[] step_sizes, float[] bias_correction2_sqrts, float beta1, float beta2, "
    "float eps, float decay) -> ()",
    reference=reference,
    fake=fake,
)
