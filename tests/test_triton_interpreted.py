"""Every Triton kernel against the references, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so that it needs a process of its own: the one test of this file
starts it. There, the tests of the ops run on the Triton kernels, and so do the further tests of this file.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safekern import ops

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

INTERPRETED = ops.BACKENDS["cpu"].backend == "triton"
SIGMAS = "SAFEKERN_TEST_SIGMAS"


def sigma_cases(full):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        # Types differ in how they are read alone. 131,073 elements are more than a program takes, and their chunks more
        # than are merged at once.
        sizes = (0, 1, 2, 7, 63, 65, 4095, 4097, 9001) if full or dtype == torch.bfloat16 else (4097,)
        for numel in (*sizes, *([131_073] if dtype == torch.bfloat16 else [])):
            yield (torch.randn(numel, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    yield torch.randn(5003, generator=generator)[1:]
    yield torch.randn(10_000, generator=generator) * 0.01 + 1e4
    yield torch.cat([torch.randn(10_000, generator=generator) * 0.01, torch.tensor([1e6])])


if not INTERPRETED:

    def test_kernels_in_the_interpreter(request):
        full = request.config.getoption("--full")
        root = Path(__file__).parent.parent
        environment = {**os.environ, "TRITON_INTERPRET": "1", "SAFEKERN_BACKEND": "triton"}
        # The reference's own tests, and those that a kernel passes which is compared bit for bit with one that does.
        left_out = ["torch-", "follows_the_formula", "everything_spared", "scaled_noise"]
        if ops.BACKENDS["cpu"].backend == "cpu":
            environment[SIGMAS] = json.dumps(ops.sigma(list(sigma_cases(full))).view(torch.int32).tolist())
            left_out += ["sigma_is_the_unbiased", "sigma_survives"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py", __file__]
        chosen = f"(triton or kernel_equals or refuse) and not ({' or '.join(left_out)})"
        command += ["--full"] if full else ["-k", chosen]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
        assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-2_000:]

else:
    import triton
    import triton.language as tl
    from test_ops import assert_same_bits, assert_selects, assert_sentinels, between_sentinels, bits, no_flags

    from safekern.ops.triton import common
    from safekern.ops.triton import select as select_module

    DTYPES = tuple(common.FLOATS)
    WRONG = (-1, -(2**31), 5, 2**31 - 1)

    @triton.jit
    def narrow_kernel(x, y, numel, TYPE: tl.constexpr, BLOCK: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + offsets, mask=offsets < numel, other=0)
        tl.store(y + offsets, common.narrow(value, TYPE), mask=offsets < numel)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_rounds_as_torch_does(dtype):
        # Every sign, exponent and first bits, with what follows below, at, and above the middle.
        high = torch.arange(2**16, dtype=torch.int32) << 16
        low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x2FFF, 0x3000]
        x = torch.cat([high | part for part in low]).view(torch.float32)
        y = torch.empty(x.shape, dtype=dtype)
        narrow_kernel[(triton.cdiv(x.numel(), 2**16),)](x, y, x.numel(), common.FLOATS[dtype], 2**16)
        want = x.to(dtype)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(bits(y)[~y.isnan()], bits(want)[~want.isnan()])

    @triton.jit
    def find_kernel(first, count, blocks, found):
        place = tl.program_id(0)
        tl.store(found + place, common.find(first, count, tl.load(blocks + place)))

    @pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 1025])
    def test_find_knows_the_tensor_of_a_block(count):
        torch.manual_seed(count)
        blocks_of = torch.randint(1, 4, (count,))
        first = blocks_of.cumsum(0) - blocks_of
        tensor = torch.arange(count).repeat_interleave(blocks_of)
        blocks = torch.cat([torch.randint(len(tensor), (30,)), torch.tensor([0, len(tensor) - 1])])
        found = torch.full(blocks.shape, -1)
        find_kernel[(len(blocks),)](first, count, blocks, found)
        assert torch.equal(found, tensor[blocks])

    @pytest.mark.parametrize("wrong", WRONG)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_an_index_outside_its_tensor_reads_and_writes_nothing(dtype, wrong):
        index, others = torch.tensor([1, wrong, 3]), torch.tensor([0, 2, 4])
        param, buffer = between_sentinels(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).to(dtype))
        before = param.clone()
        out, flags = torch.zeros(3), no_flags(2)
        ops.gather_([torch.zeros(1), out], [param, param], [index[:1], index], flags)
        assert out.isnan().tolist() == [False, True, False] and flags.tolist() == [False, True]
        values = torch.tensor([6.0, 7.0, 8.0]).to(dtype)
        ops.restore_([param], [index], [values])
        assert param.tolist() == [1.0, 6.0, 3.0, 8.0, 5.0]
        assert ops.count_changed([param], [index], [values]).tolist() == [1]
        state = [torch.ones(3) for _ in range(3)]
        ops.set_adamw_(
            [param], state[:1], [index], state[1:2], state[2:], [torch.empty(0)], [0.1], [1.0], 0.9, 0.9, 0.1, 0.9
        )
        ops.perturb_([param], [index], [1.0], [0], 0)
        assert_same_bits(param[others], before[others])
        assert_sentinels(buffer)

    @pytest.mark.parametrize("indices", [[0, 0, 3], [-5, 2, 2**31 - 1], [4, 1]])
    def test_spa_adamw_with_wrong_indices_stays_inside(indices):
        param, buffer = between_sentinels(torch.ones(5))
        before = param.clone()
        others = [torch.ones(5) for _ in range(3)]
        index = torch.tensor(indices)
        ops.spa_adamw_([param], others[:1], [index], others[1:2], others[2:], [0.1], [1.0], 0.9, 0.9, 0.1, 0.9)
        assert_sentinels(buffer)
        if indices == [0, 0, 3]:
            assert (param == before).tolist() == [True, False, False, True, False]

    @pytest.mark.parametrize("numel", [2047, 2048, 2049, 5001])
    def test_spa_adamw_spares_at_the_edges_of_blocks(numel):
        edges = [0, 1, 31, 32, 63, 64, 2015, 2046, 2047, 2048, 2049, 4095, 4096, numel - 1]
        index = torch.tensor(sorted({edge for edge in edges if edge < numel}), dtype=torch.int32)
        param = torch.ones(numel)
        state = [torch.ones(numel) for _ in range(3)]
        ops.spa_adamw_([param], state[:1], [index], state[1:2], state[2:], [0.1], [1.0], 0.9, 0.9, 0.1, 0.9)
        assert torch.equal((param == 1.0).nonzero().view(-1).int(), index)

    def test_set_adamw_with_state_at_odd_addresses():
        results = []
        for shift in (0, 1):
            generator = torch.Generator().manual_seed(0)
            param = torch.randn(5000, generator=generator).bfloat16()
            index = torch.randperm(5000, generator=generator)[:2500].int()
            streams = [torch.rand(2500, generator=generator) for _ in range(3)]
            streams = [index, *streams, param[index.long()].float()]
            index, *streams = [torch.cat([stream[:1].repeat(shift), stream])[shift:] for stream in streams]
            assert common.aligned(index) == (shift == 0)
            grad, exp_avg, exp_avg_sq, master = streams
            ops.set_adamw_(
                [param], [grad], [index], [exp_avg], [exp_avg_sq], [master], [0.1], [0.5], 0.9, 0.99, 1e-8, 0.9
            )
            results.append([param, exp_avg, exp_avg_sq, master])
        for mine, want in zip(*results, strict=True):
            assert_same_bits(mine, want)

    def test_one_launch_serves_all_tensors_of_a_kind(monkeypatch):
        launches = []
        launch = common.launch_selected

        def counting(kernel, chosen, *args, **kwargs):
            launches.append(chosen)
            launch(kernel, chosen, *args, **kwargs)

        monkeypatch.setattr(importlib.import_module("safekern.ops.triton.restore"), "launch_selected", counting)
        params = [torch.zeros(10 * t + 1) for t in range(30)] + [torch.zeros(5).half()]
        indices = [torch.tensor([param.numel() - 1]) for param in params]
        ops.restore_(params, indices, [torch.ones(1, dtype=param.dtype) for param in params])
        assert [len(chosen) for chosen in launches] == [30, 1]
        assert all(param.sum() == param[-1] == 1 for param in params)

    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
    def test_selected_weights_past_two_to_the_31(index_dtype):
        # Only the pages that are touched become memory.
        param = torch.empty(2**31 + 64, dtype=torch.bfloat16)
        places = [7, 2**31 - 3, *([2**31, 2**31 + 63] if index_dtype == torch.int64 else [])]
        index = torch.tensor(places, dtype=index_dtype)
        for place in places:
            param[place - 1], param[place] = 5.0, float(place % 64)
        values = torch.arange(1.0, 1 + len(places)).bfloat16()
        out, flags = torch.empty(len(places)), no_flags(1)
        ops.gather_([out], [param], [index], flags)
        assert out.tolist() == [place % 64 for place in places] and not flags.any()
        ops.restore_([param], [index], [values])
        assert [param[place].item() for place in places] == values.tolist()
        assert [param[place - 1].item() for place in places[:2]] == [5.0, 5.0]
        assert ops.count_changed([param], [index], [values]).item() == 0
        ops.perturb_([param], [index], [1.0], [0], 0)
        state = [torch.ones(len(places)) for _ in range(3)]
        ops.set_adamw_(
            [param], state[:1], [index], state[1:2], state[2:], [torch.empty(0)], [1.0], [1.0], 0.9, 0.9, 0.1, 1.0
        )
        assert ops.count_changed([param], [index], [values]).item() == len(places)
        assert [param[place - 1].item() for place in places[:2]] == [5.0, 5.0]

    @pytest.mark.skipif(SIGMAS not in os.environ, reason="the process that started this one has no CPU kernels")
    def test_sigma_equals_the_cpu_kernel_bit_for_bit(request):
        cases = list(sigma_cases(request.config.getoption("--full")))
        assert ops.sigma(cases).view(torch.int32).tolist() == json.loads(os.environ[SIGMAS])

    @pytest.fixture
    def emitted(monkeypatch):
        """From which source each result came, and whether it was enough."""
        log = []
        emit = select_module._emit

        def logging(problem, candidates):
            result = emit(problem, candidates)
            log.append(("everything" if candidates is None else "candidates", result is not None))
            return result

        monkeypatch.setattr(select_module, "_emit", logging)
        monkeypatch.setattr(select_module, "SAMPLE_RUNS", 64)
        monkeypatch.setattr(select_module, "SLACK", 1024)
        return log

    def test_select_ranks_candidates(emitted):
        torch.manual_seed(0)
        grads = [torch.randn(9001)[1:], torch.zeros(0), torch.randn(3000).bfloat16().float()]
        assert_selects("triton", grads, torch.tensor([1.0, 1.0, 2.0]), [200])
        assert emitted == [("candidates", True)] * 2

    def test_select_recovers_from_too_many_candidates(emitted, monkeypatch):
        monkeypatch.setattr(select_module, "SLACK", 0)
        # Every other value ties with the guess.
        grads = [torch.tensor([1.0, 2.0]).repeat(5000)]
        assert_selects("triton", grads, torch.ones(1), [200])
        assert emitted == [("candidates", False), ("everything", True)] * 2

    def test_select_recovers_from_too_few_candidates(emitted, monkeypatch):
        monkeypatch.setattr(select_module, "_guess_cutoff", lambda problem: torch.tensor([2**31 - 1]).int())
        assert_selects("triton", [torch.arange(10_000.0)], torch.ones(1), [200])
        assert emitted == [("candidates", False), ("everything", True)] * 2

    def test_select_writes_int64_where_int32_does_not_fit(emitted, monkeypatch):
        monkeypatch.setattr(select_module, "_fits", lambda grad: grad.numel() < 5000)
        for sampled_from in (4, 100):
            monkeypatch.setattr(select_module, "SAMPLED_FROM", sampled_from)
            got = ops.select([torch.arange(4999.0), torch.arange(6000.0)], torch.ones(2), 1002, True)
            assert [positions.dtype for positions in got] == [torch.int32, torch.int64]
            assert torch.equal(got[0], torch.arange(4999).int()[-1:]) or got[0].numel() == 0
            assert torch.equal(got[1], torch.arange(6000)[-got[1].numel() :])
            assert sum(positions.numel() for positions in got) == 1002
        assert [source for source, _ in emitted] == ["candidates", "everything"]

    @pytest.mark.parametrize("where", [0, 4097, 9999])
    def test_select_finds_a_nan_on_both_ways(emitted, where, monkeypatch):
        grad = torch.randn(10_000)
        grad[where] = float("nan")
        for sampled_from in (4, 100):
            monkeypatch.setattr(select_module, "SAMPLED_FROM", sampled_from)
            for largest in (True, False):
                with pytest.raises(RuntimeError, match="NaN"):
                    ops.select([grad], torch.ones(1), 100, largest)

    def test_a_table_written_by_launches_equals_a_copied_one():
        content = ((1, -(2**63), 2**63 - 1), *((2**40 + i, -i, i) for i in range(10)))
        got = common._written_table(content, torch.device("cpu"))
        assert torch.equal(got, torch.tensor(content))

    def test_tensors_of_another_device_are_refused():
        accumulate_ = importlib.import_module("safekern.ops.triton.accumulate").accumulate_
        with pytest.raises(RuntimeError, match="is on meta, but the first tensor is on cpu"):
            accumulate_([torch.zeros(3)], [torch.zeros(3, device="meta")], no_flags(1), False)
