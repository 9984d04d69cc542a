"""Every op on arguments that hypothesis draws: the kernel that serves CPU tensors against the plain-torch reference.

A new op is covered by a function beside those below; until there is one, a test fails.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safekern import diagnosis, ops
from safekern.ops.cases import (
    DTYPES,
    EXTREMES,
    HYPERPARAMETERS,
    INDEX_DTYPES,
    INTEGERS,
    Case,
    any_bits,
    at,
    mark,
    no_flags,
    steps,
)
from safekern.ops.registry import OPS

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(ops.BACKENDS["cpu"].backend != "cpu", reason="the compiled CPU kernels are not installed"),
]

# Around what vectors, unrolled loops and blocks take.
NUMELS = st.one_of(st.sampled_from([0, 1, 2, 3, 63, 64, 65, 511, 513, 4095, 4096, 4097, 5003]), st.integers(0, 300))
SHARES = (0.0, 0.001, 0.01, 0.3, 0.999, 1.0)


@dataclass
class Drawn:
    """Tensors of drawn sizes; what fills them comes from a seed, because drawing every element would take long."""

    numels: list[int]
    seed: int
    share: float
    index_dtype: torch.dtype
    # Of the elements: those that are an extreme value, and those that are rounded, so that there are ties.
    extreme: float
    tied: bool
    flag: bool
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def random(self, shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def values(self, numel: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(numel, generator=self.generator, dtype=torch.float64) * scale
        if self.tied:
            values = (values / scale).round().mul(scale)
        extremes = torch.tensor(EXTREMES, dtype=torch.float64)
        chosen = extremes[torch.randint(len(EXTREMES), (numel,), generator=self.generator)]
        values = torch.where(self.random(numel) < self.extreme, chosen, values).to(dtype)
        # An even size gets a second dimension.
        return values.view(2, -1) if numel and numel % 2 == 0 else values

    def many(self, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        return [self.values(numel, dtype, scale) for numel in self.numels]

    def indices(self, *, ascending: bool = True) -> list[Tensor]:
        """Distinct positions, none in some tensors."""
        found = []
        for numel in self.numels:
            index = (self.random(numel) < self.share).nonzero().view(-1)
            order = slice(None) if ascending else torch.randperm(index.numel(), generator=self.generator)
            found.append(index[order].to(self.index_dtype))
        return found

    def flat(self, indices: list[Tensor], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        return [self.values(index.numel(), dtype, scale).view(-1) for index in indices]

    def bits(self, indices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [any_bits(index.numel(), dtype, self.generator) for index in indices]

    def pick(self, choices):
        return choices[int(torch.randint(len(choices), (1,), generator=self.generator))]

    def flags(self, tensors: list[Tensor]) -> Tensor:
        return no_flags(tensors) | self.flag


drawn = st.builds(
    Drawn,
    numels=st.lists(NUMELS, min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    share=st.sampled_from(SHARES),
    index_dtype=st.sampled_from(INDEX_DTYPES),
    extreme=st.sampled_from([0.0, 0.0, 0.01, 0.5]),
    tied=st.booleans(),
    flag=st.booleans(),
)


def accumulate(d: Drawn) -> Case:
    grads = d.many(d.pick(DTYPES))
    return Case("", (d.many(torch.float32), grads, d.flags(grads), d.pick((False, True))))


def sigma(d: Drawn) -> Case:
    # NaN, infinity and what overflows are among the extremes, and denormals have no six digits.
    d.extreme = min(d.extreme, 0.01) if max(d.numels) < 2**20 else 0.0
    return Case("", (d.many(d.pick(DTYPES), d.pick((1.0, 0.02, 100.0))),), relative=1e-6)


def select(d: Drawn) -> Case:
    grads = [torch.nan_to_num(grad, nan=0.0, posinf=float("inf"), neginf=float("-inf")) for grad in d.many(DTYPES[2])]
    if not any(grad.numel() for grad in grads):
        grads.append(torch.tensor([-1.0]))
    numel = sum(grad.numel() for grad in grads)
    k = min(max(1, int(d.share * numel)), numel)
    return Case("", (grads, d.random(len(grads)) + 1e-3, k, d.pick((False, True))))


def gather(d: Drawn) -> Case:
    dtype = d.pick(DTYPES)
    indices = d.indices(ascending=False)
    same = d.pick((False, True))
    outs = d.flat(indices, dtype if same else torch.float32)
    return Case("", (outs, d.many(dtype), indices, d.flags(outs)), verbatim=same)


def set_adamw(d: Drawn) -> Case:
    dtype, indices = d.pick(DTYPES), d.indices()
    params = d.many(dtype)
    masters = [torch.empty(0) for _ in params]
    if dtype.itemsize == 2 and d.pick((False, True)):
        # Of every third, one that no longer belongs to its weight.
        masters = [value.float() for value in at(params, indices)]
        for master in masters:
            master[::3] += 1
    moments = d.flat(indices, torch.float32, 1e-2), [v.square() for v in d.flat(indices, torch.float32, 1e-2)]
    arguments = (params, d.flat(indices, torch.float32), indices, *moments, masters, *steps(len(params)))
    return Case("", (*arguments, *HYPERPARAMETERS), kept=mark(params, indices, inside=False))


def spa_adamw(d: Drawn) -> Case:
    dtype, indices = d.pick(DTYPES), d.indices()
    params = d.many(dtype)
    moment, grad = d.pick((dtype, torch.float32)), d.pick((dtype, torch.float32))
    state = d.many(grad), indices, d.many(moment, 1e-2), [value.square() for value in d.many(moment, 1e-2)]
    arguments = (params, *state, *steps(len(params)), *HYPERPARAMETERS)
    # Torch's own fp64 root is not always the correctly rounded one, and the quotients after it round once more each.
    ulps = 4 if dtype == torch.float64 else 0
    return Case("", arguments, ulps=ulps, kept=mark(params, indices, inside=True))


def perturb(d: Drawn) -> Case:
    params, indices = d.many(d.pick(DTYPES)), d.indices(ascending=False)
    scales = d.random(len(params)).tolist()
    streams = [d.pick((-(2**63), 2**63 - 1, 0, 1, -1, 2**32)) for _ in params]
    return Case("", (params, indices, scales, streams, d.seed - 2**31), kept=mark(params, indices, inside=False))


def restore(d: Drawn) -> Case:
    params, indices = d.many(d.pick(DTYPES)), d.indices(ascending=False)
    values = d.bits(indices, params[0].dtype)
    return Case("", (params, indices, values), verbatim=True, kept=mark(params, indices, inside=False))


def count_changed(d: Drawn) -> Case:
    params, indices = d.many(d.pick(DTYPES)), d.indices(ascending=False)
    values = [value.clone() for value in at(params, indices)]
    for value in values:
        flipped = words(value)
        flipped ^= (d.random(value.numel()) < 0.1).to(flipped.dtype)
    return Case("", (params, indices, values), verbatim=True)


def words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


STRATEGIES: dict[str, Callable[[Drawn], Case]] = {
    "accumulate_": accumulate,
    "sigma": sigma,
    "select": select,
    "gather_": gather,
    "set_adamw_": set_adamw,
    "spa_adamw_": spa_adamw,
    "perturb_": perturb,
    "restore_": restore,
    "count_changed": count_changed,
}


def test_every_op_has_a_strategy():
    assert STRATEGIES.keys() == OPS.keys()


def assert_agrees(name: str, case: Case, padding: int) -> None:
    with torch.no_grad():
        problem = diagnosis._problem(OPS[name], case, torch.device("cpu"), padding)
    assert problem is None, problem


@pytest.mark.parametrize("name", STRATEGIES)
def test_kernels_agree_with_their_reference(name, request):
    @settings(max_examples=1000 if request.config.getoption("--full") else 150, deadline=None, derandomize=True)
    @given(drawn, st.sampled_from([0, 1, 3, 8, 11]))
    def check(d, padding):
        assert_agrees(name, STRATEGIES[name](d), padding)

    check()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_tensor_of_more_than_a_million(name):
    d = Drawn([2**20 + 3, 0, 5], 1, 0.01, torch.int64, 0.001, tied=False, flag=False)
    assert_agrees(name, STRATEGIES[name](d), 3)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strided_views_are_refused_before_anything_is_written(name):
    d = Drawn([12, 12], 3, 1.0, torch.int64, 0.0, tied=False, flag=False)
    arguments = STRATEGIES[name](d).arguments
    lists = [i for i, argument in enumerate(arguments) if isinstance(argument, list) and torch.is_tensor(argument[0])]
    refused = 0
    for i in lists:
        if not arguments[i][-1].numel():
            continue
        given = [list(argument) if j in lists else argument for j, argument in enumerate(arguments)]
        # The last one, so that a kernel which checks as it goes has written the others.
        given[i][-1] = torch.stack([given[i][-1], given[i][-1]], -1)[..., 0]
        before = [words(tensor).clone() for j in lists for tensor in given[j]]
        with pytest.raises(RuntimeError, match="contiguous"), torch.no_grad():
            OPS[name].call(*given)
        after = [words(tensor) for j in lists for tensor in given[j]]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        refused += 1
    assert refused
