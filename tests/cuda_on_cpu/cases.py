"""What only the CUDA kernels have to get right: tables, alignments, indices nobody checked. Run under the plugin."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from exact import bits

from safekern import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STEP = (0.9, 0.99, 1e-8, 0.999)
SENTINEL = 12345.0


def at_offset(values, offset):
    """The values between sentinels, `offset` elements from an aligned address."""
    buffer = torch.full((values.numel() + 40,), SENTINEL, dtype=values.dtype)
    view = buffer[16 + offset : 16 + offset + values.numel()]
    view.copy_(values)
    return buffer, view


def reference(name):
    return importlib.import_module(f"safekern.ops.{name.rstrip('_')}").reference


def both(name, make):
    """Runs the kernel and the reference on equal arguments; everything they may write has to be equal."""
    seen = []
    for run in (getattr(ops, name), reference(name)):
        torch.manual_seed(0)
        buffers, arguments = make()
        result = run(*arguments)
        seen.append([*buffers, *([] if result is None else [result] if torch.is_tensor(result) else result)])
    for ours, theirs in zip(*seen, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(bits(ours), bits(theirs))


def random_tensors(sizes, dtypes, offsets):
    made = [
        at_offset(torch.randn(size).to(dtypes[t % len(dtypes)]), offsets[t % len(offsets)])
        for t, size in enumerate(sizes)
    ]
    return [buffer for buffer, _ in made], [view for _, view in made]


def random_indices(sizes, density=0.1):
    return [
        (torch.rand(size) < density).nonzero().view(-1).to((torch.int32, torch.int64)[t % 2])
        for t, size in enumerate(sizes)
    ]


# More tensors than the largest table holds, empty ones and ones without an index among them; and tensors of several
# chunks of every kernel, at every offset.
LISTS = {
    "many": ([7, 0, 33, 1, 250] * 400, DTYPES, (0,)),
    "long": ([70_001, 16_384, 8_192, 65_537], DTYPES, (0, 1, 3, 8, 5)),
    "offsets": ([1_000] * 9, (torch.bfloat16,), tuple(range(9))),
    "offsets32": ([1_000] * 9, (torch.float32,), tuple(range(9))),
}
lists = pytest.mark.parametrize(("sizes", "dtypes", "offsets"), LISTS.values(), ids=LISTS)


@lists
def test_accumulate(sizes, dtypes, offsets):
    def make():
        grads, grad_views = random_tensors(sizes, dtypes, offsets[::-1])
        accs, acc_views = random_tensors(sizes, (torch.float32,), offsets)
        flags = torch.zeros(len(sizes), dtype=torch.bool)
        return [*accs, *grads, flags], (acc_views, grad_views, flags, False)

    both("accumulate_", make)


@lists
def test_gather(sizes, dtypes, offsets):
    def make():
        srcs, src_views = random_tensors(sizes, dtypes, offsets)
        indices = random_indices(sizes)
        counts = [index.numel() for index in indices]
        outs, out_views = random_tensors(counts, (torch.float32,), offsets)
        flags = torch.zeros(len(sizes), dtype=torch.bool)
        return [*outs, *srcs, flags], (out_views, src_views, indices, flags)

    both("gather_", make)


@lists
def test_restore_and_count_changed(sizes, dtypes, offsets):
    def make():
        params, views = random_tensors(sizes, dtypes, offsets)
        indices = random_indices(sizes)
        values = [view[index].clone() for view, index in zip(views, indices, strict=True)]
        for view, value in zip(views, values, strict=True):
            view[::7] += 1
            value[::3] += 1
        return params, (views, indices, values)

    both("count_changed", make)
    both("restore_", make)


@lists
def test_perturb(sizes, dtypes, offsets):
    def make():
        params, views = random_tensors(sizes, dtypes, offsets)
        scales, streams = [0.1 * (t % 5) for t in range(len(sizes))], [-t for t in range(len(sizes))]
        return params, (views, random_indices(sizes), scales, streams, 11)

    both("perturb_", make)


@lists
def test_set_adamw(sizes, dtypes, offsets):
    def make():
        params, views = random_tensors(sizes, dtypes, offsets)
        indices = random_indices(sizes)
        counts = [index.numel() for index in indices]
        state = [random_tensors(counts, (torch.float32,), offsets) for _ in range(3)]
        for view in state[2][1]:
            view.abs_()
        masters = [
            view[index].float() if view.element_size() == 2 else torch.zeros(0)
            for view, index in zip(views, indices, strict=True)
        ]
        steps = [0.1 + 0.01 * (t % 3) for t in range(len(sizes))]
        arguments = (views, state[0][1], indices, state[1][1], state[2][1], masters, steps, steps, *STEP)
        return [*params, *(buffer for buffers, _ in state for buffer in buffers), *masters], arguments

    both("set_adamw_", make)


@lists
@pytest.mark.parametrize("moment", [None, torch.float32])
def test_spa_adamw(sizes, dtypes, offsets, moment):
    # fp64 roots differ from the reference's by design.
    dtypes = [dtype for dtype in dtypes if dtype != torch.float64]

    def make():
        params, views = random_tensors(sizes, dtypes, offsets)
        grads, grad_views = random_tensors(sizes, dtypes, offsets)
        moments = [random_tensors(sizes, dtypes if moment is None else (moment,), offsets) for _ in range(2)]
        for view in moments[1][1]:
            view.abs_()
        steps = [0.1 + 0.01 * (t % 3) for t in range(len(sizes))]
        spared = random_indices(sizes, density=0.3)
        arguments = (views, grad_views, spared, moments[0][1], moments[1][1], steps, steps, *STEP)
        return [*params, *grads, *(buffer for buffers, _ in moments for buffer in buffers)], arguments

    both("spa_adamw_", make)


@lists
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_select(sizes, dtypes, offsets, largest, share):
    def make():
        _, views = random_tensors(sizes, (torch.float32,), offsets)
        # Rounded, so that there are ties.
        views = [view.mul_(20).round_() for view in views]
        return [], (views, torch.rand(len(sizes)).add_(0.5), int(share * sum(sizes)), largest)

    both("select", make)


SIGMA = """
import torch
from safekern import ops
torch.manual_seed(0)
dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
sizes = (1, 2, 7, 63, 64, 65, 4095, 4096, 4097, 65_537, 300_011, 1_100_000)
params = [(torch.randn(size) * 3 + 1).to(dtype)[offset:] for size in sizes for dtype in dtypes for offset in (0, 1)]
"""


def test_sigma_is_the_cpu_kernel_s_bit_for_bit():
    theirs = subprocess.run(
        [sys.executable, "-c", SIGMA + "print(ops.BACKENDS['cpu'].backend)\nprint(ops.sigma(params).tolist())"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("SAFEKERN_")},
    ).stdout.splitlines()
    if theirs[0] != "cpu":
        pytest.skip("the compiled CPU kernels are not installed")
    scope = {}
    exec(SIGMA, scope)
    assert ops.sigma(scope["params"]).tolist() == json.loads(theirs[1])


def test_sigma_of_many_tensors():
    params = [torch.randn(size) for size in LISTS["many"][0]]
    torch.testing.assert_close(ops.sigma(params), reference("sigma")(params))


@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1, 2**40])
def test_a_wrong_index_is_skipped(wrong):
    index, one = torch.tensor([1, wrong, 3]), [1.0]
    buffer, param = at_offset(torch.arange(5.0), 0)
    ops.restore_([param], [index], [torch.tensor([10.0, 20.0, 30.0])])
    assert param.tolist() == [0, 10, 2, 30, 4]
    assert ops.count_changed([param], [index], [torch.tensor([10.0, 20.0, 30.0])]).tolist() == [1]
    out, flag = torch.zeros(3), torch.zeros(1, dtype=torch.bool)
    ops.gather_([out], [param], [index], flag)
    assert out[0] == 10 and out[1].isnan() and out[2] == 30 and flag
    ops.perturb_([param], [index], one, [0], 0)
    state = [torch.ones(3) for _ in range(3)]
    ops.set_adamw_([param], state[:1], [index], state[1:2], state[2:], [torch.zeros(0)], one, one, *STEP)
    assert param[[0, 2, 4]].tolist() == [0, 2, 4] and not {10.0, 30.0} & set(param.tolist())
    assert (buffer[:16] == SENTINEL).all() and (buffer[21:] == SENTINEL).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_flagged_where_it_is(bad):
    grads = [torch.zeros(size) for size in LISTS["many"][0]]
    grads[777][-1] = bad
    flags = torch.zeros(len(grads), dtype=torch.bool)
    ops.accumulate_([torch.zeros_like(grad) for grad in grads], grads, flags, True)
    assert flags.nonzero().tolist() == [[777]]
