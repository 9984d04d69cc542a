"""What is particular to kernels on a device: streams, graphs, devices, sizes past 2^31."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from exact import same_bits
from gpu_device import DEVICE, need_memory, on_cuda, require_device

import safekern
from safekern import diagnosis, ops
from safekern.ops.registry import OPS, has_kernel

require_device()

ROOT = Path(__file__).parents[2]
SERVED = ops.BACKENDS[DEVICE.type].backend
# select waits for the device to know the sizes of its results.
CAPTURABLE = [name for name in OPS if name != "select"]


def test_the_backend_is_the_one_asked_for():
    assert os.environ.get("SAFEKERN_BACKEND", SERVED) == SERVED


@pytest.mark.parametrize("name", OPS)
def test_the_backend_has_a_kernel_for_every_op(name):
    assert SERVED == "torch" or has_kernel(name, DEVICE.type)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", OPS)
def test_selftest(name):
    _, problem = diagnosis._run(OPS[name], DEVICE, large=True)
    assert problem is None


def test_importing_initialises_no_cuda():
    code = "import torch, safekern; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def accepted_cases(name):
    """The first case, the one with hundreds of tensors, and that of a step which the device has to skip."""
    cases = [case for case in diagnosis._made_on_cpu(OPS[name].cases(False)) if case.refused is None]
    skipped = [case for case in cases if "nonfinite=True" in case.name]
    assert bool(skipped) == (name == "set_adamw_")
    return [cases[0], next(case for case in cases if "many tensors" in case.name), *skipped]


def placed(case, device=DEVICE):
    return diagnosis._copied(case.arguments, device, 11, [])


def assert_agrees(name, case, arguments, result):
    expected = diagnosis._copied(case.arguments, torch.device("cpu"), 0, [])
    wanted = OPS[name].reference(*expected)
    mine = [*diagnosis._tensors(arguments, "argument"), *diagnosis._tensors((result,), "result")]
    right = [*diagnosis._tensors(expected, "argument"), *diagnosis._tensors((wanted,), "result")]
    before = [*diagnosis._tensors(case.arguments, "argument"), *diagnosis._tensors((wanted,), "result")]
    for (place, got), (_, want), (_, old) in zip(mine, right, before, strict=True):
        assert not diagnosis._difference(got.cpu(), want, old, case), (case.name, place)


def refill(arguments, source):
    for (_, mine), (_, given) in zip(
        diagnosis._tensors(arguments, "argument"), diagnosis._tensors(source, "argument"), strict=True
    ):
        mine.copy_(given)


@on_cuda
@pytest.mark.parametrize("name", OPS)
def test_ops_run_on_the_current_stream(name):
    stream = torch.cuda.Stream()
    for case in accepted_cases(name):
        arguments, source = placed(case), placed(case)
        for _, tensor in diagnosis._tensors(arguments, "argument"):
            tensor.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # An op on another stream would see zeros.
            torch.cuda._sleep(20_000_000)
            refill(arguments, source)
            result = OPS[name].call(*arguments)
        torch.cuda.synchronize()
        assert_agrees(name, case, arguments, result)


@on_cuda
@pytest.mark.parametrize("name", CAPTURABLE)
def test_ops_can_be_captured_in_a_graph(name):
    for case in accepted_cases(name):
        arguments, source = placed(case), placed(case)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Compiles what is compiled at the first call.
            OPS[name].call(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = OPS[name].call(*arguments)
        # Other calls reuse whatever memory on the host the captured one may have left.
        for other in CAPTURABLE:
            for another in accepted_cases(other):
                OPS[other].call(*placed(another))
        refill(arguments, source)
        graph.replay()
        torch.cuda.synchronize()
        assert_agrees(name, case, arguments, result)


@on_cuda
@pytest.mark.parametrize("name", CAPTURABLE)
def test_ops_do_not_wait_for_the_device(name):
    for case in accepted_cases(name):
        arguments = placed(case)
        OPS[name].call(*placed(case))
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            # Of the mode itself: a prototype.
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            try:
                torch.cuda.set_sync_debug_mode("error")
                result = OPS[name].call(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert_agrees(name, case, arguments, result)


@on_cuda
@pytest.mark.parametrize("name", OPS)
def test_ops_run_on_the_device_of_their_arguments(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for case in accepted_cases(name):
        arguments = placed(case, torch.device("cuda:1"))
        with torch.cuda.device(0):
            result = OPS[name].call(*arguments)
        assert_agrees(name, case, arguments, result)


# Sizes from which kernels sample, and add up in several rounds


def large_tensors(kind):
    """2^25 elements in all."""
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = [torch.randn(numel, generator=generator) for numel in (2**24 + 5, 0, 2**24 - 5)]
    if kind == "clustered":
        tensors = [tensor * 1e-3 for tensor in tensors]
        tensors[2][1_000_001:1_100_001] += 10
    return tensors if kind != "constant" else [torch.full_like(tensor, 0.1) for tensor in tensors]


needs_kernels = pytest.mark.skipif(SERVED == "torch", reason="the reference itself would run")
kinds = pytest.mark.parametrize("kind", ["random", "clustered", "constant"])


@needs_kernels
@kinds
def test_select_of_many(kind):
    grads, sigma = large_tensors(kind), torch.tensor([1.0, 7.0, 0.5])
    on_device = [grad.to(DEVICE) for grad in grads]
    for largest in (True, False):
        want = OPS["select"].reference(grads, sigma, 100_000, largest)
        for mine, right in zip(ops.select(on_device, sigma.to(DEVICE), 100_000, largest), want, strict=True):
            assert mine.dtype == right.dtype and torch.equal(mine.cpu(), right)


def moments(chunks):
    """Of each row the mean and the sum of squared deviations, added up as csrc/cpu/sigma.cpp does: in eight lanes."""
    size = chunks.shape[1]
    pivot = sum(chunks[:, :64].double().unbind(1)) / min(size, 64)
    # Zeros in place of what the last row of lanes lacks change no sum.
    rows = torch.nn.functional.pad(chunks.double() - pivot[:, None], (0, -size % 8)).view(len(chunks), -1, 8)
    total, square = (sum(sum(values.unbind(1)).unbind(1)) for values in (rows, rows * rows))
    return torch.stack([pivot + total / size, (square - total * total / size).clamp(min=0)], 1).tolist()


def sigma_in_order(tensor):
    """Sigma as all kernels compute it: chunk by chunk, each in a fixed order."""
    full = tensor.numel() // 4096 * 4096
    rest = tensor[None, full:]
    count, mean, squares = 0, 0.0, 0.0
    for size, chunks in ((4096, tensor[:full].view(-1, 4096)), (rest.numel(), rest)):
        for its_mean, its_squares in moments(chunks) if chunks.numel() else ():
            delta, total = its_mean - mean, count + size
            squares += its_squares + delta * delta * (count * size / total)
            mean += delta * (size / total)
            count = total
    return math.sqrt(squares / (count - 1)) if count > 1 else 0.0


@needs_kernels
@kinds
def test_sigma_of_many_has_the_same_bits_everywhere(kind):
    params = large_tensors(kind)
    want = torch.tensor([sigma_in_order(param) for param in params])
    assert same_bits(ops.sigma([param.to(DEVICE) for param in params]).cpu(), want)


# Sizes past 2^31

NUMEL = 2**31 + 4099
PLACES = [0, 2**31 - 1, 2**31, 2**31 + 7, NUMEL - 1]


@pytest.fixture
def places():
    yield torch.tensor(PLACES, device=DEVICE)
    torch.cuda.empty_cache()


def marked(dtype, places):
    tensor = torch.zeros(NUMEL, dtype=dtype, device=DEVICE)
    tensor[places] = torch.arange(1, len(PLACES) + 1, device=DEVICE).to(dtype)
    return tensor


@on_cuda
def test_accumulate_and_select_past_2_31(places):
    need_memory(24_000_000_000)
    grad, acc = marked(torch.bfloat16, places), torch.zeros(NUMEL, device=DEVICE)
    flag = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    ops.accumulate_([acc], [grad], flag, False)
    assert acc[places].tolist() == [1, 2, 3, 4, 5] and int(acc.count_nonzero()) == 5 and not flag.item()
    del grad
    sigma = torch.ones(1, device=DEVICE)
    for k, want in ((5, PLACES), (2, PLACES[3:]), (7, [0, 1, 2, *PLACES[1:]])):
        (index,) = ops.select([acc], sigma, k, True)
        assert index.dtype == torch.int64 and index.tolist() == want
    acc[NUMEL - 2] = float("inf")
    ops.accumulate_([acc], [acc.to(torch.bfloat16)], flag, True)
    assert flag.item()


@on_cuda
def test_sigma_past_2_31(places):
    need_memory(5_000_000_000)
    (sigma,) = ops.sigma([marked(torch.bfloat16, places)]).tolist()
    total, squares = 15.0, 55.0
    assert sigma == pytest.approx(((squares - total**2 / NUMEL) / (NUMEL - 1)) ** 0.5, rel=1e-6)


@on_cuda
def test_scattered_ops_past_2_31(places):
    need_memory(14_000_000_000)
    param = marked(torch.bfloat16, places)
    values = torch.empty(5, dtype=torch.bfloat16, device=DEVICE)
    flag = torch.zeros(1, dtype=torch.bool, device=DEVICE)
    ops.gather_([values], [param], [places], flag)
    assert values.tolist() == [1, 2, 3, 4, 5] and not flag.item()
    assert ops.count_changed([param], [places], [values]).tolist() == [0]
    ops.perturb_([param], [places], [1.0], [3], 0)
    assert ops.count_changed([param], [places], [values]).item() >= 4
    assert int(param.count_nonzero()) == 5
    ops.restore_([param], [places], [values])
    assert param[places].tolist() == [1, 2, 3, 4, 5] and int(param.count_nonzero()) == 5
    state = [torch.zeros(5, device=DEVICE) for _ in range(2)]
    grad, master = torch.ones(5, device=DEVICE), values.float()
    ops.set_adamw_([param], [grad], [places], state[:1], state[1:], [master], [0.5], [1.0], 0.9, 0.999, 1e-8, 1.0)
    assert not torch.equal(param[places], values) and int(param.count_nonzero()) == 5


@on_cuda
def test_spa_adamw_past_2_31(places):
    need_memory(22_000_000_000)
    param = marked(torch.bfloat16, places)
    grad = torch.full_like(param, 1.0)
    moments = [torch.zeros_like(param) for _ in range(2)]
    spared = places[1:]
    ops.spa_adamw_([param], [grad], [spared], moments[:1], moments[1:], [0.1], [0.0316], 0.9, 0.999, 1e-8, 1.0)
    assert param[spared].tolist() == [2, 3, 4, 5]
    rest = param[1 : 2**20].unique()
    assert rest.numel() == 1 and rest.item() != 0
    assert torch.equal(param[2**31 + 8 : -1].unique(), rest) and param[0].item() != 1


def test_a_public_selftest_of_the_device():
    result = safekern.selftest(device=DEVICE, quick=True)
    assert result.ok or SERVED == "torch", str(result)
