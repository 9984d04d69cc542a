"""``set_adamw_``: AdamW on the selected weights of a model, in place.

Bytes moved: the cache lines of the parameter that hold a selected element, twice, and 28 to 32 bytes of indices,
gradient and state per selected element.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safekern.ops.cases import DTYPES, HYPERPARAMETERS, INDEX_DTYPES, INTEGERS, Case, Inputs, at, mark, steps
from safekern.ops.registry import define


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    nonfinite: Tensor | None = None,
) -> None:
    """One AdamW step in the order of operations of ``torch.optim.AdamW``, on ``params[t].flatten()[indices[t]]`` only.

    Args:
        params: contiguous floating-point tensors, updated at the indices.
        grads: fp32 [k_t], the gradients at the indices.
        indices: int32 or int64 [k_t], flat positions without repetition.
        exp_avgs: fp32 [k_t], updated.
        exp_avg_sqs: fp32 [k_t], updated.
        masters: fp32 [k_t], updated; or empty for a parameter without. A master that no longer rounds to its weight is
            stale (the weight was loaded or edited from outside): the weight's value replaces it before the step.
        step_sizes: ``lr / (1 - beta1 ** step)`` per parameter.
        bias_correction2_sqrts: ``sqrt(1 - beta2 ** step)`` per parameter.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the denominator.
        decay: ``1 - lr * weight_decay``.
        nonfinite: one bool, on the parameters' device, such as ``any()`` of the flags of ``gather_``: if it is set,
            nothing is changed. So a step need not wait for the host to have read it.
    """
    if nonfinite is not None and bool(nonfinite):
        return
    for t, (param, grad, index) in enumerate(zip(params, grads, indices, strict=True)):
        flat, index = param.view(-1), index.long()
        current = flat[index]
        value = current.to(torch.promote_types(param.dtype, torch.float32))
        if masters[t].numel():
            value = torch.where(_same_bits(masters[t].to(param.dtype), current), masters[t], value)
        exp_avg, exp_avg_sq = exp_avgs[t], exp_avg_sqs[t]
        # Not lerp_ and addcmul_, which may fuse a multiply-add: every operation here rounds once, as in the kernels.
        exp_avg.add_((grad - exp_avg).mul_(1 - beta1))
        exp_avg_sq.mul_(beta2).add_((grad * (1 - beta2)).mul_(grad))
        # A root taken in fp64 and rounded is the correctly rounded one; torch's own fp32 root on the CPU is not always.
        # Divided by a tensor: on CUDA torch multiplies by the reciprocal of a number.
        correction = torch.full((), bias_correction2_sqrts[t], dtype=torch.float32, device=exp_avg_sq.device)
        denom = exp_avg_sq.double().sqrt().float().div_(correction).add_(eps)
        value = value * decay - (exp_avg * step_sizes[t]).div_(denom)
        if masters[t].numel():
            masters[t].copy_(value)
        flat[index] = value.to(param.dtype)


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    integer = INTEGERS[a.element_size()]
    return a.view(integer) == b.view(integer)


def fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    nonfinite: Tensor | None = None,
) -> None:
    return None


def cases(large: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for index_dtype in INDEX_DTYPES:
            for master in (False, True)[: 2 if dtype.itemsize == 2 else 1]:
                name = f"{dtype}, {index_dtype}, master={master}"
                yield _case(name, Inputs(large), dtype, index_dtype, master)
    yield _case("many tensors", Inputs(many=True), DTYPES[0], INDEX_DTYPES[0], True)
    for nonfinite in (False, True):
        flag = torch.tensor([nonfinite])
        yield _case(f"nonfinite={nonfinite}", Inputs(), DTYPES[0], INDEX_DTYPES[0], True, flag)


def _case(name: str, inputs: Inputs, dtype: torch.dtype, index_dtype: torch.dtype, master: bool, *flag: Tensor) -> Case:
    params, indices = inputs.normal(dtype), inputs.indices(0.5, index_dtype)
    grads, exp_avgs = inputs.normal_at(indices), inputs.normal_at(indices, 1e-2)
    exp_avg_sqs = [value.square() for value in inputs.normal_at(indices, 1e-2)]
    # Between two weights of the parameter's dtype, and every third stale.
    masters = [value.float() * (1 + 1e-4) for value in at(params, indices)]
    for value in masters:
        value[::3] += 1
    if not master:
        masters = [torch.empty(0) for _ in params]
    arguments = (params, grads, indices, exp_avgs, exp_avg_sqs, masters, *steps(len(params)), *HYPERPARAMETERS, *flag)
    return Case(name, arguments, ulps=1, kept=mark(params, indices, inside=False))


set_adamw_ = define(
    "set_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, float[] step_sizes, float[] bias_correction2_sqrts, "
    "float beta1, float beta2, float eps, float decay, Tensor? nonfinite=None) -> ()",
    reference=reference,
    fake=fake,
    cases=cases,
)
