"""The cases: for each op of safekern its contenders, how many bytes they have to move, and the check of the result.

To add one, write a function ``Setting -> Case`` and list it in :data:`OPS`. The first contender is safekern's, the
second the baseline that ratios are taken against. Contenders are made one by one, so that a caller who wants only the
first pays for no other.
"""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import safekern
from safekern import ops
from safekern.bench import baselines
from safekern.bench.baselines import dense_masks, selected
from safekern.bench.measure import Run, index_bytes, state_bytes
from safekern.bench.models import llama, token_batches
from safekern.eligibility import eligible_parameters
from safekern.errors import BenchmarkError
from safekern.mask import Mask
from safekern.ops.select import reference as select_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COLUMNS = 1024
_LINE = 64
_DENSE_MASK = "dense moments and a dense float mask, as published research code does it"


@dataclass(frozen=True)
class Setting:
    """What a case is built for.

    Attributes:
        dtype: of weights and gradients: ``"float32"`` or ``"bfloat16"``.
        elements: how many weights, roughly.
        ratio: the share of them that a mask selects.
        device: where they lie.
        compile: with ``torch.compile``d baselines, where a compiler works.
    """

    dtype: str = "float32"
    elements: int = 64_000_000
    ratio: float = 0.01
    device: str = "cpu"
    compile: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    def shapes(self) -> list[tuple[int, int]]:
        """Equal matrices, up to 60 of them, together of about so many elements."""
        count = min(60, max(1, self.elements // 65_536))
        return [(max(1, self.elements // count // _COLUMNS), _COLUMNS)] * count

    def random(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Normal values in those shapes."""
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = dtype or self.torch_dtype
        return [torch.randn(s, dtype=dtype, device=self.device, generator=generator) for s in self.shapes()]

    def mask(self) -> Mask:
        """A random selection of that ratio."""
        generator = torch.Generator().manual_seed(1)
        return Mask.from_bool(
            {
                f"layers.{i}.weight": torch.rand(shape, generator=generator) < self.ratio
                for i, shape in enumerate(self.shapes())
            }
        )


@dataclass(frozen=True)
class Contender:
    """One way to do what an op does.

    Attributes:
        name: for tables.
        what: what it is, in a sentence.
        run: does it once.
        bytes: what it has to move at least, reads and writes; None where that is not what it is bound by.
        state: counts the bytes it holds between runs.
        detail: another figure worth a column.
    """

    name: str
    what: str
    run: Run
    bytes: float | None = None
    state: Callable[[], int] = lambda: 0
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """An op at a setting.

    Attributes:
        elements: how many weights there are in fact.
        check: raises :class:`BenchmarkError` when safekern's result is not right.
        contenders: safekern's, the baseline's, and others'; can be read once.
    """

    elements: int
    check: Callable[[], None]
    contenders: Iterator[Contender]


@dataclass(frozen=True)
class Op:
    """What :data:`OPS` lists: how a case is built, and what it depends on.

    Attributes:
        build: makes a case.
        title: what is done, for tables and plots.
        dtypes: whether the dtype matters.
        ratios: whether the ratio matters.
        whole_model: whether it runs a model, whose size is another option.
    """

    build: Callable[[Setting], Case]
    title: str
    dtypes: bool = True
    ratios: bool = False
    whole_model: bool = False


def _numel(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _same(op: str, got: list[Tensor], want: list[Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    for t, (mine, right) in enumerate(zip(got, want, strict=True)):
        if mine.shape != right.shape or not torch.allclose(mine, right, rtol, atol):
            raise BenchmarkError(f"{op} is wrong in tensor {t}: nothing was timed. Run the tests of this installation")


def accumulate(setting: Setting) -> Case:
    """Gradients into fp32 accumulators."""
    grads = setting.random()
    flags = torch.zeros(len(grads), dtype=torch.bool, device=setting.device)

    def zeros() -> list[Tensor]:
        return [torch.zeros(grad.shape, device=setting.device) for grad in grads]

    def check() -> None:
        got, want = setting.random(torch.float32), setting.random(torch.float32)
        ops.accumulate_(got, grads, flags, False)
        for acc, grad in zip(want, grads, strict=True):
            acc.add_(grad)
        _same("accumulate", got, want)

    def contenders() -> Iterator[Contender]:
        size = _numel(grads) * (grads[0].itemsize + 8)
        mine, one, many = zeros(), zeros(), zeros()
        yield Contender(
            "safekern",
            "accumulate_, which also looks for NaN",
            lambda: ops.accumulate_(mine, grads, flags, False),
            size,
        )

        def add() -> None:
            for acc, grad in zip(one, grads, strict=True):
                acc.add_(grad)

        yield Contender("add_", "acc.add_(grad) per tensor, in place", add, size)
        yield Contender("_foreach_add_", "the same in one call", lambda: torch._foreach_add_(many, grads), size)

    return Case(_numel(grads), check, contenders())


def sigma(setting: Setting) -> Case:
    """The standard deviation of every tensor."""
    params = setting.random()

    def check() -> None:
        want = torch.stack([param.double().std() for param in params])
        _same("sigma", [ops.sigma(params).double()], [want], rtol=1e-6, atol=0.0)

    def contenders() -> Iterator[Contender]:
        size = _numel(params) * params[0].itemsize
        yield Contender("safekern", "sigma of all tensors", lambda: ops.sigma(params), size)
        yield Contender(
            "std", "p.float().std() per tensor", lambda: torch.stack([param.float().std() for param in params]), size
        )

    return Case(_numel(params), check, contenders())


def select(setting: Setting) -> Case:
    """The global top share of all scores."""
    grads = setting.random(torch.float32)
    deviations = torch.linspace(0.5, 1.5, len(grads))
    numel = _numel(grads)
    k = max(1, int(setting.ratio * numel))

    def check() -> None:
        got = ops.select(grads, deviations, k, True)
        _same("select", got, select_reference(grads, deviations, k, True))

    def contenders() -> Iterator[Contender]:
        size = 4 * numel
        yield Contender("safekern", "exact, ties by position", lambda: ops.select(grads, deviations, k, True), size)
        yield Contender("topk", baselines.topk.__doc__ or "", lambda: baselines.topk(grads, deviations, k), size)
        yield Contender(
            "sampled threshold",
            baselines.sampled_threshold.__doc__ or "",
            lambda: baselines.sampled_threshold(grads, deviations, k),
            size,
        )

    return Case(numel, check, contenders())


def _params(setting: Setting, grads: list[Tensor]) -> dict[str, nn.Parameter]:
    """Parameters of their own; the gradients, which no optimizer writes to, are shared."""
    params = {f"layers.{i}.weight": nn.Parameter(value) for i, value in enumerate(setting.random())}
    for param, grad in zip(params.values(), grads, strict=True):
        param.grad = grad
    return params


def _check_step(op: str, make: Callable[[Any, Mask], Any], setting: Setting, *, frozen: bool) -> None:
    """One step against torch's AdamW in fp64: what is to move agrees to rounding, the rest has not moved by a bit."""
    grads, mask = setting.random(), setting.mask()
    params = _params(setting, grads)
    make(params.items(), mask).step()
    for before, (name, param) in zip(setting.random(), params.items(), strict=True):
        exact = nn.Parameter(before.double())
        assert param.grad is not None
        exact.grad = param.grad.double()
        torch.optim.AdamW([exact]).step()
        moved = selected(mask, name, param) ^ frozen
        _same(op, [param.detach()[~moved]], [before[~moved]])
        # One rounding of the weight, and those of the update, which is a thousandth: of many millions of weights, some
        # are all but cancelled by it.
        eps = torch.finfo(param.dtype).eps
        _same(op, [param.detach()[moved].double()], [exact.detach()[moved]], rtol=2 * eps, atol=8 * eps * 1e-3)


def _adamw(setting: Setting, grads: list[Tensor], size: float) -> Iterator[Contender]:
    """torch.optim.AdamW in its forms; the first is the baseline."""
    fused = torch.optim.AdamW(_params(setting, grads).values(), fused=True)
    yield Contender("AdamW fused", "torch.optim.AdamW(fused=True)", fused.step, size, lambda: state_bytes(fused))
    foreach = torch.optim.AdamW(_params(setting, grads).values(), foreach=True)
    yield Contender(
        "AdamW foreach", "torch.optim.AdamW(foreach=True)", foreach.step, size, lambda: state_bytes(foreach)
    )
    if setting.compile and not baselines.why_not_compile():
        # A tensor, as PyTorch advises: a number would be compiled in.
        rate = torch.tensor(1e-3, device=setting.device)
        plain = torch.optim.AdamW(_params(setting, grads).values(), lr=rate)
        yield Contender(
            "AdamW compiled",
            "torch.compile of torch.optim.AdamW's step",
            baselines.compiled(plain.step),
            size,
            lambda: state_bytes(plain),
        )


def _dense(setting: Setting, grads: list[Tensor], mask: Mask, size: float, *, frozen: bool) -> Contender:
    params = _params(setting, grads)
    masks = dense_masks(mask, params, frozen=frozen)
    dense = baselines.DenseMaskAdamW(params.values(), masks)
    return Contender("dense mask", _DENSE_MASK, dense.step, size, lambda: state_bytes(dense, masks))


def set_step(setting: Setting) -> Case:
    """A step of SETAdamW."""
    grads, mask = setting.random(), setting.mask()
    numel, item = _numel(grads), grads[0].itemsize

    def check() -> None:
        _check_step("SETAdamW", safekern.SETAdamW, setting, frozen=False)

    def contenders() -> Iterator[Contender]:
        # Whole cache lines: those of the gradient are read, those of the weights are read and written.
        per_line = _LINE // item
        lines = numel / per_line * (1 - (1 - setting.ratio) ** per_line)
        compact = 4 + 8 * (3 if item == 2 else 2)
        optimizer = safekern.SETAdamW(_params(setting, grads).items(), mask)
        yield Contender(
            "safekern",
            "SETAdamW",
            optimizer.step,
            3 * _LINE * lines + compact * mask.numel,
            lambda: state_bytes(optimizer) + index_bytes(mask),
        )
        yield from _adamw(setting, grads, 7 * item * numel)
        yield _dense(setting, grads, mask, (7 * item + 4) * numel, frozen=False)

    return Case(numel, check, contenders())


def spa_step(setting: Setting) -> Case:
    """A step of SPAAdamW."""
    grads, mask = setting.random(), setting.mask()
    numel, item = _numel(grads), grads[0].itemsize

    def check() -> None:
        _check_step("SPAAdamW", safekern.SPAAdamW, setting, frozen=True)

    def contenders() -> Iterator[Contender]:
        optimizer = safekern.SPAAdamW(_params(setting, grads).items(), mask)
        yield Contender(
            "safekern",
            "SPAAdamW",
            optimizer.step,
            7 * item * numel + 4 * mask.numel,
            lambda: state_bytes(optimizer) + index_bytes(mask),
        )
        yield from _adamw(setting, grads, 7 * item * numel)
        yield _dense(setting, grads, mask, (7 * item + 4) * numel, frozen=True)

    return Case(numel, check, contenders())


def protect_step(setting: Setting) -> Case:
    """A step of torch's fused AdamW with the weights of a mask protected."""
    grads, mask = setting.random(), setting.mask()
    numel, item = _numel(grads), grads[0].itemsize

    def protected(named: Any, mask: Mask) -> torch.optim.Optimizer:
        named = list(named)
        optimizer = torch.optim.AdamW([param for _, param in named], fused=True)
        safekern.protect(optimizer, mask, named)
        return optimizer

    def check() -> None:
        _check_step("protect", protected, setting, frozen=True)

    def contenders() -> Iterator[Contender]:
        size = 7 * item * numel
        mine = protected(_params(setting, grads).items(), mask)
        saved = index_bytes(mask) + item * mask.numel
        yield Contender(
            "safekern", "protect around AdamW(fused=True)", mine.step, size, lambda: state_bytes(mine) + saved
        )
        bare = torch.optim.AdamW(_params(setting, grads).values(), fused=True)
        yield Contender(
            "AdamW fused", "AdamW(fused=True) with nothing protected", bare.step, size, lambda: state_bytes(bare)
        )
        params = _params(setting, grads)
        inner = torch.optim.AdamW(params.values(), fused=True)
        frozen = [(params[name], mask[name].to(setting.device)) for name in mask]
        copying = baselines.CopyBack(inner, frozen)
        copies = sum(index.nbytes + index.numel() * item for _, index in frozen)
        yield Contender(
            "copy back", baselines.CopyBack.__doc__ or "", copying.step, size, lambda: state_bytes(inner) + copies
        )

    return Case(numel, check, contenders())


def _mask_file(setting: Setting, loading: bool) -> Case:
    mask = setting.mask()
    numel = sum(rows * columns for rows, columns in setting.shapes())
    folder = tempfile.mkdtemp(prefix="safekern-bench-")
    # Runs may outlive the case.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mine, plain = Path(folder, "mask.safetensors"), Path(folder, "plain.safetensors")

    def plain_save() -> None:
        safetensors.torch.save_file({name: mask.compact(name) for name in mask}, plain)

    def check() -> None:
        mask.save(mine)
        if Mask.load(mine) != mask:
            raise BenchmarkError("a mask is not what was saved: nothing was timed. Run the tests of this installation")

    def contenders() -> Iterator[Contender]:
        mask.save(mine)
        plain_save()

        def contender(name: str, what: str, run: Run, path: Path) -> Contender:
            size = path.stat().st_size
            return Contender(name, what, run, size, detail=f"{size / mask.numel:.2f} B/index")

        if loading:
            yield contender("safekern", "Mask.load, which checks everything", lambda: Mask.load(mine), mine)
            yield contender(
                "safetensors int32",
                "safetensors.torch.load_file of int32 indices",
                lambda: safetensors.torch.load_file(plain),
                plain,
            )
        else:
            yield contender("safekern", "Mask.save, on disk before it returns", lambda: mask.save(mine), mine)
            yield contender("safetensors int32", "safetensors.torch.save_file of int32 indices", plain_save, plain)

    return Case(numel, check, contenders())


def mask_save(setting: Setting) -> Case:
    """A mask to a file."""
    return _mask_file(setting, loading=False)


def mask_load(setting: Setting) -> Case:
    """A mask from a file."""
    return _mask_file(setting, loading=True)


def score(setting: Setting) -> Case:
    """Scoring a model on two batches, end to end."""
    model = llama(setting.elements, setting.torch_dtype, setting.device)
    batches = token_batches(model, count=2, examples=4, tokens=64)
    eligible = eligible_parameters(model)
    chosen = {id(param) for param in eligible.values()}
    # What scoring does not ask for, the bare passes shall not have to compute either.
    for param in model.parameters():
        param.requires_grad_(id(param) in chosen)
    numel = _numel(list(eligible.values()))

    def bare() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    def added() -> dict[str, Tensor]:
        sums = {name: torch.zeros(param.shape, device=param.device) for name, param in eligible.items()}
        for batch in batches:
            model(**batch).loss.backward()
            for name, param in eligible.items():
                assert param.grad is not None
                sums[name].add_(param.grad)
            model.zero_grad()
        return sums

    def mine() -> safekern.Scores:
        return safekern.score(model, batches, progress=False)

    def check() -> None:
        scores, sums = mine(), added()
        got = [scores.gradient(name) for name in sums]
        _same("score", got, [total / len(batches) for total in sums.values()], rtol=1e-5, atol=1e-9)

    def contenders() -> Iterator[Contender]:
        yield Contender("safekern", "score", mine)
        yield Contender("forward + backward", "the bare passes over the same batches, gradients thrown away", bare)
        yield Contender("keep .grad, add_", "the passes, all gradients kept and added up after each", added)

    return Case(numel, check, contenders())


def train(setting: Setting) -> Case:
    """A SET training step end to end: forward, backward, optimizer."""
    model = llama(setting.elements, setting.torch_dtype, setting.device)
    (batch,) = token_batches(model, count=1, examples=4, tokens=64)
    mask = safekern.score(model, [batch], progress=False).top(setting.ratio)

    def step(twin: nn.Module, update: Run) -> Run:
        def once() -> None:
            twin(**batch).loss.backward()
            update()
            twin.zero_grad()

        return once

    def check() -> None:
        twin = copy.deepcopy(model)
        step(twin, safekern.SETAdamW(twin.named_parameters(), mask, lr=1e-2, in_backward=True).step)()
        for (name, before), after in zip(model.named_parameters(), twin.parameters(), strict=True):
            rest = ~selected(mask, name, after)
            _same("SET training", [after.detach()[rest]], [before.detach()[rest]])
            if name in mask and torch.equal(after, before):
                raise BenchmarkError(f"SET training left {name} as it was: nothing was timed")

    def contenders() -> Iterator[Contender]:
        others = plain()
        yield ours("safekern", in_backward=True)
        yield next(others)
        yield ours("safekern, dense gradients", in_backward=False)
        yield from others

    def ours(name: str, *, in_backward: bool) -> Contender:
        twin = copy.deepcopy(model)
        mine = safekern.SETAdamW(twin.named_parameters(), mask, in_backward=in_backward)
        what = f"SETAdamW(in_backward={in_backward})"
        return Contender(name, what, step(twin, mine.step), state=lambda: state_bytes(mine) + index_bytes(mask))

    def plain() -> Iterator[Contender]:
        for form in ("fused", "foreach", "compiled"):
            if form == "compiled" and (not setting.compile or baselines.why_not_compile()):
                continue
            twin = copy.deepcopy(model)
            adamw = torch.optim.AdamW(twin.parameters(), fused=form == "fused", foreach=form == "foreach")
            update = baselines.compiled(adamw.step) if form == "compiled" else adamw.step
            yield Contender(
                f"AdamW {form}",
                f"the whole model trained with torch.optim.AdamW, {form}",
                step(twin, update),
                state=lambda adamw=adamw: state_bytes(adamw),  # type: ignore[misc]
            )
        twin = copy.deepcopy(model)
        masks = dense_masks(mask, dict(twin.named_parameters()), frozen=False)
        dense = baselines.DenseMaskAdamW(twin.parameters(), masks)
        yield Contender("dense mask", _DENSE_MASK, step(twin, dense.step), state=lambda: state_bytes(dense, masks))

    return Case(sum(param.numel() for param in model.parameters()), check, contenders())


OPS = {
    "accumulate": Op(accumulate, "gradients into fp32 accumulators"),
    "sigma": Op(sigma, "standard deviation of every tensor"),
    "select": Op(select, "global top of all scores", dtypes=False, ratios=True),
    "set": Op(set_step, "SET optimizer step", ratios=True),
    "spa": Op(spa_step, "SPA optimizer step", ratios=True),
    "protect": Op(protect_step, "optimizer step with protected weights", ratios=True),
    "mask_save": Op(mask_save, "mask to a file", dtypes=False, ratios=True),
    "mask_load": Op(mask_load, "mask from a file", dtypes=False, ratios=True),
    "score": Op(score, "scoring a model on two batches, end to end", whole_model=True),
    "train": Op(train, "SET training step, end to end", ratios=True, whole_model=True),
}
