"""``spa_adamw_``: AdamW on all weights of a model except the protected ones, in place, in one pass.

Bytes moved: per element the gradient once and the parameter and both moments twice (28 bytes in fp32, 14 in bf16, 22 in
bf16 with fp32 moments), plus the indices.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safekern.ops.cases import DTYPES, EXTREMES, HYPERPARAMETERS, INDEX_DTYPES, INTEGERS, Case, Inputs, mark, steps
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
        grad, exp_avg, exp_avg_sq = (values[t].view(-1).to(real) for values in (grads, exp_avgs, exp_avg_sqs))
        # Not lerp and addcmul, which may fuse a multiply-add: every operation here rounds once, as in the kernels.
        exp_avg = exp_avg + (grad - exp_avg) * (1 - beta1)
        exp_avg_sq = exp_avg_sq * beta2 + (grad * (1 - beta2)) * grad
        # A root taken in fp64 and rounded to fp32 is the correctly rounded one; torch's own root on the CPU is not
        # always, so for fp64 parameters the kernels may differ from this reference in the last bit.
        # Divided by a tensor: on CUDA torch multiplies by the reciprocal of a number.
        correction = torch.full((), bias_correction2_sqrts[t], dtype=real, device=param.device)
        denom = exp_avg_sq.double().sqrt().to(real) / correction + eps
        updated = (flat.to(real) * decay - (exp_avg * step_sizes[t]) / denom).to(param.dtype)
        # Before anything is written: Ctrl-C in here must not leave a protected weight moved.
        # As integers: torch's CUDA assignment by index gives 16-bit NaNs other bits.
        integer = INTEGERS[param.element_size()]
        updated.view(integer)[index] = flat.view(integer)[index]
        flat.copy_(updated)
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


def cases(large: bool) -> Iterator[Case]:
    fp32 = torch.float32
    for dtype in DTYPES:
        # The order of a set of dtypes is not that of another process.
        for moment in (dtype, fp32)[: 1 if dtype == fp32 else 2]:
            for grad in (dtype, fp32)[: 1 if dtype == fp32 else 2]:
                for index_dtype in INDEX_DTYPES:
                    name = f"{dtype}, moments {moment}, gradients {grad}, {index_dtype}"
                    yield _case(name, Inputs(large), dtype, moment, grad, index_dtype)
                name = f"extremes, {dtype}, moments {moment}, gradients {grad}"
                yield _case(name, Inputs(large), dtype, moment, grad, torch.int32, extremes=True)
    yield _case("many tensors", Inputs(many=True), DTYPES[0], DTYPES[0], DTYPES[0], torch.int32)


def _case(
    name: str,
    inputs: Inputs,
    dtype: torch.dtype,
    moment: torch.dtype,
    grad: torch.dtype,
    index_dtype: torch.dtype,
    extremes: bool = False,
) -> Case:
    params, grads, exp_avgs = inputs.normal(dtype), inputs.normal(grad), inputs.normal(moment, 1e-2)
    exp_avg_sqs = [value.square() for value in inputs.normal(moment, 1e-2)]
    if extremes:
        # Every extreme value meets every other one, as weight, gradient and moment, as far as there is room.
        for position, tensors in enumerate((params, grads, exp_avgs, exp_avg_sqs)):
            pattern = torch.tensor(EXTREMES, dtype=torch.float64).repeat_interleave(len(EXTREMES) ** position)
            for tensor in tensors[4:]:
                places = torch.arange(tensor.numel()) % pattern.numel()
                tensor.view(-1).copy_(pattern[places])
    indices = inputs.indices(0.3, index_dtype, ascending=True)
    indices[2] = indices[2][:0]
    arguments = (params, grads, indices, exp_avgs, exp_avg_sqs, *steps(len(params)), *HYPERPARAMETERS)
    # Torch's own fp64 root is not always the correctly rounded one.
    ulps = 1 if dtype != torch.float64 else 2
    return Case(name, arguments, ulps=ulps, kept=mark(params, indices, inside=True))


spa_adamw_ = define(
    "spa_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, float[] step_sizes, float[] bias_correction2_sqrts, float beta1, float beta2, "
    "float eps, float decay) -> ()",
    reference=reference,
    fake=fake,
    cases=cases,
)
