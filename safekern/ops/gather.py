"""``gather_``: collect the selected elements of many tensors into compact ones.

Bytes moved: the cache lines that hold a selected element (at a random 1%, 27% of a bf16 tensor's lines), the indices
and the output.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, arange, full, tensor, zeros

from safekern.ops.cases import DTYPES, INDEX_DTYPES, Case, Inputs, no_flags
from safekern.ops.registry import define


def reference(outs: Sequence[Tensor], srcs: Sequence[Tensor], indices: Sequence[Tensor], nonfinite: Tensor) -> None:
    """Writes ``srcs[t].flatten()[indices[t]]`` into ``outs[t]``.

    Args:
        outs: contiguous 1-D tensors, fp32 or of the source's dtype (then the bits are kept).
        srcs: contiguous floating-point tensors.
        indices: 1-D int32 or int64 flat positions in the sources.
        nonfinite: bool [len(outs)]; an entry is set when its output holds a NaN or an infinity.
    """
    for i, (out, src, index) in enumerate(zip(outs, srcs, indices, strict=True)):
        out.copy_(src.view(-1)[index])
        nonfinite[i] |= ~out.isfinite().all()


def fake(outs: Sequence[Tensor], srcs: Sequence[Tensor], indices: Sequence[Tensor], nonfinite: Tensor) -> None:
    return None


def cases(large: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for index_dtype in INDEX_DTYPES:
            inputs = Inputs(large)
            srcs, indices = inputs.normal(dtype), inputs.indices(0.5, index_dtype)
            outs = inputs.normal_at(indices)
            yield Case(f"{dtype} to fp32, {index_dtype}", (outs, srcs, indices, no_flags(outs)))
            # NaNs among them, which set flags.
            anything = inputs.bits_at([src.view(-1) for src in srcs], dtype)
            outs = [out.to(dtype) for out in outs]
            yield Case(f"{dtype}, {index_dtype}", (outs, anything, indices, no_flags(outs)), verbatim=True)
    many = Inputs(many=True)
    indices = many.indices(0.5)
    outs = many.normal_at(indices)
    yield Case("many tensors", (outs, many.normal(), indices, no_flags(outs)))
    src = Inputs().normal()[-1]
    src[[7, 4000]] = float("nan")
    outs, indices = [src[:2000].clone(), src[:2].clone(), zeros(1)], [arange(2500, 4500) % 4099, tensor([6, 8])]
    double = full((3,), 1e300, dtype=DTYPES[3])
    yield Case("not finite", (outs, [src, src, double], [*indices, tensor([0])], no_flags(outs)))


gather_ = define(
    "gather_(Tensor(a!)[] outs, Tensor[] srcs, Tensor[] indices, Tensor(b!) nonfinite) -> ()",
    reference=reference,
    fake=fake,
    cases=cases,
)
