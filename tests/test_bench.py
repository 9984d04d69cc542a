"""The benchmark suite: what it runs, that it refuses wrong results, how it compares. No time is asserted."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import safekern
from safekern import Mask, ops
from safekern.bench import baselines, cases, figures, measure, memory, results
from safekern.bench.cases import OPS, Setting
from safekern.bench.results import Row
from safekern.cli import bench, main
from safekern.errors import BenchmarkError, FileAccessError, FileFormatError, InvalidArgumentError

ROOT = Path(__file__).parent.parent
TINY = Setting(elements=70_000, ratio=0.02)
BANDWIDTHS = {1: measure.Bandwidth(copy=10.0, read=20.0), 2: measure.Bandwidth(copy=20.0, read=40.0)}


def rows_of(op, setting=TINY, threads=(1,), **options):
    return list(results.run(op, setting, threads=threads, repeats=2, bandwidths=BANDWIDTHS, **options))


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_beside_its_baselines(op):
    for dtype in cases.DTYPES if OPS[op].dtypes else ["float32"]:
        setting = replace(TINY, dtype=dtype, elements=100_000 if OPS[op].whole_model else TINY.elements)
        rows = rows_of(op, setting)
        assert rows[0].contender == "safekern"
        assert rows[1].speedup == 1
        assert len({row.contender for row in rows}) == len(rows) >= 2
        for row in rows:
            assert (row.op, row.threads, row.dtype) == (op, 1, dtype if OPS[op].dtypes else "")
            assert row.ratio == (0.02 if OPS[op].ratios else 0)
            assert row.ms > 0 and row.speedup > 0 and row.what
            assert row.peak_bytes >= -1
            if row.gb_per_s:
                assert row.of_copy == pytest.approx(2 * row.of_read)
        assert f"{op}: " in results.table(rows)
        assert all(row.contender in results.legend(rows) for row in rows)


def test_state_is_counted_in_bytes():
    state = {row.contender: row.state_bytes for row in rows_of("set", replace(TINY, dtype="bfloat16"))}
    selected = TINY.mask().numel
    assert 0 < state["safekern"] <= 16 * selected + 8
    numel = sum(rows * columns for rows, columns in TINY.shapes())
    # Two bf16 moments, and torch's step count per tensor.
    assert 4 * numel <= state["AdamW fused"] <= 4 * numel + 100
    assert state["dense mask"] == 8 * numel


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    assert [row.threads for row in rows_of("sigma", threads=(2, 1), only_safekern=True)] == [2, 1]
    assert torch.get_num_threads() == before


# Results are checked first


def wrong_accumulate(accs, grads, nonfinite, absolute):
    for acc, grad in zip(accs, grads, strict=True):
        acc.add_(grad)
    accs[-1].view(-1)[-1] += 1


def wrong_select(grads, sigma, k, largest):
    picks = [pick.clone() for pick in torch.ops.safekern.select(grads, sigma, k, largest)]
    picks[0][0] = picks[0][0] ^ 1
    return picks


class Leaky(safekern.SETAdamW):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].data.view(-1)[:64] += 1


class Idle(torch.optim.SGD):
    def __init__(self, named, mask, **options):
        super().__init__([param for _, param in named], lr=0.0)


ANOTHER = Mask.from_indices({"layers.0.weight": [0]}, {"layers.0.weight": (2, 2)})


@pytest.mark.parametrize(
    ("op", "target", "name", "broken"),
    [
        ("accumulate", ops, "accumulate_", wrong_accumulate),
        ("sigma", ops, "sigma", lambda params: torch.stack([param.float().std() * 1.001 for param in params])),
        ("select", ops, "select", wrong_select),
        ("set", safekern, "SETAdamW", Leaky),
        ("set", safekern, "SETAdamW", Idle),
        ("spa", safekern, "SPAAdamW", Idle),
        ("spa", safekern, "SPAAdamW", lambda named, mask: torch.optim.AdamW([p for _, p in named])),
        ("protect", safekern, "protect", lambda optimizer, mask, named: None),
        ("mask_save", cases.Mask, "load", lambda path: ANOTHER),
        ("score", ops, "accumulate_", lambda accs, grads, nonfinite, absolute: None),
        ("train", safekern, "SETAdamW", Idle),
    ],
)
def test_a_wrong_result_is_an_error_and_nothing_is_timed(op, target, name, broken, monkeypatch):
    def never(*args):
        raise AssertionError("timed")

    monkeypatch.setattr(target, name, broken)
    monkeypatch.setattr(measure, "interleaved", never)
    monkeypatch.setattr(measure, "peak_memory", never)
    setting = replace(TINY, elements=100_000) if OPS[op].whole_model else TINY
    with pytest.raises(BenchmarkError):
        rows_of(op, setting)


# Baselines do what they stand for


@pytest.mark.parametrize("op", ["set", "spa"])
def test_the_dense_mask_way_gives_the_same_step(op):
    cases._check_step(
        op,
        lambda named, mask: baselines.DenseMaskAdamW(
            [p for _, p in named], baselines.dense_masks(mask, dict(named), frozen=op == "spa")
        ),
        TINY,
        frozen=op == "spa",
    )


def test_copy_back_freezes():
    params = [nn.Parameter(torch.randn(3, 5))]
    before = params[0].detach().clone()
    params[0].grad = torch.ones(3, 5)
    index = torch.tensor([1, 7])
    baselines.CopyBack(torch.optim.AdamW(params), [(params[0], index)]).step()
    same = (params[0] == before).view(-1)
    assert same.nonzero().view(-1).tolist() == [1, 7]


def test_selections_of_the_baselines():
    grads, sigma = TINY.random(torch.float32), torch.tensor([1.5])
    k = 700
    (want,) = ops.select(grads, sigma, k, True)
    assert torch.equal(baselines.topk(grads, sigma, k).sort().values, want.long())
    (estimated,) = baselines.sampled_threshold(grads, sigma, k)
    shared = len(set(estimated.tolist()) & set(want.tolist()))
    assert shared == min(estimated.numel(), k)
    assert shared > k / 2


def test_sampled_threshold_over_several_tensors():
    grads = [torch.tensor([1.0, 9.0, 2.0]), torch.tensor([8.0, 0.0]), torch.tensor([0.5, 7.0, 6.0])]
    picked = baselines.sampled_threshold(grads, torch.ones(3), 3)
    # The sample is the first score of each: its largest passes.
    assert [index.tolist() for index in picked] == [[1], [0], []]


# Measuring


def test_runs_take_turns():
    order = []
    timings = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" * (measure.WARM_UPS + 3)
    assert sorted(timings) == ["a", "b"]
    assert all(timing.median >= 0 and timing.spread >= 0 for timing in timings.values())


def test_peak_memory_sees_what_a_run_takes():
    peak = measure.peak_memory(lambda: torch.ones(10_000_000))
    if peak is None:
        pytest.skip("this system does not reset the high-water mark")
    assert 35e6 < peak < 60e6
    assert measure.peak_memory(lambda: None) < 5e6


def test_bandwidth_and_environment():
    found = measure.bandwidth(100_000)
    assert found.copy > 0 and found.read > 0
    keys = ["device", "backend", "torch", "safekern", "commit", "date", "allocator"]
    assert list(measure.environment()) == keys
    assert all(measure.environment().values())


# Files


def row(**changes):
    fields = {
        "op": "sigma",
        "dtype": "float32",
        "elements": 10**6,
        "ratio": 0.0,
        "threads": 1,
        "contender": "safekern",
        "ms": 2.0,
        "spread": 0.01,
        "speedup": 4.0,
        "gb_per_s": 3.0,
        "of_copy": 0.5,
        "of_read": 0.6,
        "peak_bytes": -1,
        "state_bytes": 0,
        "detail": "",
        "what": 'with a comma, a "quote" and\u00e9',
    }
    return Row(**{**fields, **changes})


WHERE = {"device": "a processor, 2 cores", "commit": "abc"}


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_round_trip(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    rows = [row(), row(contender="std", speedup=1.0, detail="2 B/index")]
    results.write(path, rows, WHERE)
    assert results.read(path) == results.Results(rows, WHERE)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_only_results_are_replaced(tmp_path, suffix, monkeypatch, capsys):
    monkeypatch.setattr(measure, "keeps_memory", lambda: True)
    monkeypatch.setattr(bench, "_run_cases", lambda args: None)
    path = tmp_path / f"results{suffix}"
    results.write(path, [row()], measure.environment())
    assert main(["bench", "--out", str(path)]) == 0
    path.write_text("prompt,response\nHi,Hello\n")
    assert main(["bench", "--out", str(path)]) == 1
    assert "exists already and is nothing that this command wrote" in capsys.readouterr().err


def test_files_that_hold_no_results(tmp_path):
    with pytest.raises(FileAccessError, match="cannot be read"):
        results.read(tmp_path / "absent.csv")
    for name, content in [
        ("a.csv", ""),
        ("b.csv", "x,y\n1,2\n"),
        ("c.json", "{"),
        ("d.json", "[]"),
        ("e.json", '{"rows": [{"op": "sigma"}], "environment": {}}'),
        ("f.csv", "\0"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(FileFormatError, match="holds no results"):
            results.read(tmp_path / name)


# Comparing


def compared(old, new, tolerance=0.1):
    verdicts = results.compare(results.Results(old, WHERE), results.Results(new, WHERE), tolerance)
    return [verdict.verdict for verdict in verdicts]


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ({}, {}, "same"),
        ({}, {"speedup": 4.3}, "same"),
        ({}, {"speedup": 3.7}, "same"),
        ({}, {"speedup": 5.0, "ms": 1.5, "of_copy": 0.7}, "faster"),
        ({}, {"speedup": 3.0, "ms": 2.5, "of_copy": 0.4}, "slower"),
        # A slower or faster baseline is no other safekern.
        ({}, {"speedup": 5.0}, "same"),
        ({}, {"speedup": 3.0}, "same"),
        # A slower machine is no slower safekern.
        ({}, {"ms": 9.0}, "same"),
        # Nor is another bandwidth of memory.
        ({}, {"speedup": 5.0, "ms": 1.5, "of_copy": 0.4}, "same"),
        # What the spread explains is no change.
        ({}, {"speedup": 3.0, "ms": 2.5, "of_copy": 0.4, "spread": 0.3}, "same"),
        ({"spread": 0.3}, {"speedup": 5.0, "ms": 1.5, "of_copy": 0.7}, "same"),
        # Without a baseline, the others count.
        ({"speedup": 0.0}, {"speedup": 0.0, "ms": 3.0, "of_copy": 0.3}, "slower"),
        ({"speedup": 0.0, "of_copy": 0.0}, {"speedup": 0.0, "of_copy": 0.0, "ms": 1.0}, "faster"),
    ],
)
def test_verdicts(old, new, verdict):
    assert compared([row(**old)], [row(**new)]) == [verdict]


def test_verdicts_are_on_safekern_and_on_what_both_have():
    old = [row(), row(op="set", ratio=0.01), row(contender="std", speedup=1.0)]
    new = [row(), row(op="spa", ratio=0.01), row(contender="std", speedup=0.1)]
    assert compared(old, new) == ["same", "only in the old", "only in the new"]
    with pytest.raises(InvalidArgumentError, match="no op and setting in common"):
        compared([row()], [row(threads=2)])


@pytest.mark.parametrize(("speedup", "status"), [(4.0, 0), (1.0, 1)])
def test_the_compare_command(tmp_path, capsys, speedup, status):
    results.write(tmp_path / "old.csv", [row()], WHERE)
    results.write(tmp_path / "new.json", [row(speedup=speedup)], {**WHERE, "device": "another"})
    assert main(["bench", "--compare", str(tmp_path / "old.csv"), str(tmp_path / "new.json")]) == status
    shown = capsys.readouterr().out
    assert "note: device differs: a processor, 2 cores and another" in shown
    assert f"{status} of 1 slower" in shown


def test_files_that_hold_no_results_are_not_shown(tmp_path, capsys):
    path = tmp_path / "mask.csv"
    path.write_bytes(b"secret \xff" * 100)
    assert main(["bench", "--compare", str(path), str(path)]) == 1
    said = capsys.readouterr().err
    assert "holds no results of safekern bench (UnicodeDecodeError)" in said and "secret" not in said


# Scaling and plots


def test_slopes_are_the_exponents():
    rows = [row(elements=n, ms=n / 1e6) for n in (10**3, 10**6, 10**7, 10**8)]
    rows += [row(op="set", ratio=r, ms=math.sqrt(r)) for r in (0.001, 0.01, 0.1)]
    rows[0] = replace(rows[0], ms=5.0)  # the cost of a call, below the upper two decades
    assert results.slopes([r for r in rows if r.op == "sigma"], "elements") == {
        ("sigma", "float32", 1): pytest.approx(1)
    }
    assert results.slopes(rows, "selected") == {("set", "float32", 1): pytest.approx(0.5)}


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(), row(contender="std", speedup=1.0), row(threads=2), row(op="set", ratio=0.01)]
    paths = figures.plot_ops(rows, tmp_path)
    assert [path.name for path in paths] == ["sigma.png", "set.png"]
    figures.plot_scaling([row(elements=n) for n in (10, 100)], "elements", tmp_path / "scaling.png")
    for path in [*paths, tmp_path / "scaling.png"]:
        assert path.read_bytes().startswith(b"\x89PNG")


# Memory


def test_memory_of_a_process():
    (usage,) = [memory._usage(name, 300_000, 0.02, 1, None) for name in ["SETAdamW"]]
    assert usage.source == "measured"
    assert 200_000 < usage.params < 500_000
    assert 0.01 < usage.selected / usage.params < 0.025
    # Index, moments and master of each selected weight, and a step count per tensor.
    assert 16 * usage.selected < usage.state_bytes < 16 * usage.selected + 200
    assert "SETAdamW" in memory.table([usage])


def test_memory_that_is_computed_or_not_there(monkeypatch):
    def never(*args, **options):
        raise AssertionError("started")

    monkeypatch.setattr(subprocess, "run", never)
    eight_bit = memory._usage("AdamW, 8 bit", 1000, 0.01, 1, None)
    assert eight_bit.source.startswith("computed")
    assert eight_bit.state_bytes == int(1000 * 2.03125)
    monkeypatch.setattr(measure, "available_memory", lambda: 17 * 10**9)
    assert memory._usage("AdamW, fp32 state", 10**9, 0.01, 1, None).source.startswith("does not fit: needs about 18.0")
    with pytest.raises(AssertionError, match="started"):
        memory._usage("AdamW, bf16 state", 10**9, 0.01, 1, None)


@pytest.mark.parametrize(("status", "expected"), [(-9, "does not fit: killed for memory"), (1, BenchmarkError)])
def test_memory_of_a_process_that_dies(monkeypatch, status, expected):
    died = subprocess.CompletedProcess([], status, stdout="", stderr="ValueError: reason\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: died)
    if isinstance(expected, str):
        assert memory._usage("dense mask", 1000, 0.01, 1, None).source == expected
    else:
        with pytest.raises(expected, match=r"dense mask failed: .*reason"):
            memory._usage("dense mask", 1000, 0.01, 1, None)


# The command


def test_the_command_knows_the_ops():
    assert tuple(OPS) == bench._OPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "sigma", "matmul"], "no op matmul: there are accumulate"),
        (["--scaling", "--ops", "sigma", "score"], "--scaling is for accumulate"),
        (["--scaling", "--ops", "sigma", "--elements", "777"], "--elements is the size at which ratios grow"),
        (["--out", "absent/results.csv"], "absent"),
        (["--out", "results.txt"], "results.txt: the name must end in .csv or .json"),
        (["--plot", f"{__file__}/plots"], "cannot be created"),
        (["--compare", "absent.csv", "absent.csv"], "absent.csv cannot be read"),
    ],
)
def test_wrong_options_are_explained(arguments, message, capsys):
    pytest.importorskip("matplotlib")
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--ratios", "2"), ("--threads", "0"), ("--repeats", "1e30"), ("--tolerance", "-5")]
)
def test_numbers_that_cannot_be_are_refused(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", option, value])
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--memory", "--ratios", "0.1", "--plot", "folder"], "--ratios, --plot: means nothing to --memory"),
        (["--scaling", "--ratios", "0.1"], "--ratios: means nothing to --scaling"),
        (["--compare", "old.csv", "new.csv", "--model-params", "1e6"], "--model-params: means nothing to --compare"),
        (["--score-memory", "1e6", "--tolerance", "0"], "--score-memory, --tolerance: means nothing here"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, named, capsys):
    assert main(["bench", *arguments]) == 1
    assert named in capsys.readouterr().err


def test_the_command_restarts_itself_with_the_allocator_told(tmp_path):
    inherited = {key: value for key, value in os.environ.items() if key not in measure.ALLOCATOR}
    command = [sys.executable, "-m", "safekern", "bench", "--quick", "--threads", "1"]
    command += ["--elements", "70e3", "--ops", "sigma", "select", "--out", str(tmp_path / "results.json")]
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**inherited, **pages})
    assert ran.returncode == 0, ran.stderr
    assert "MALLOC_MMAP_MAX_=0" in ran.stdout and "speedup" in ran.stdout
    content = json.loads((tmp_path / "results.json").read_text())
    allocator = content["environment"]["allocator"]
    assert allocator.startswith("MALLOC_MMAP_MAX_=0") and allocator.endswith("GLIBC_TUNABLES=glibc.malloc.hugetlb=1")
    assert {(r["op"], r["dtype"]) for r in content["rows"]} == {
        ("sigma", "float32"),
        ("sigma", "bfloat16"),
        ("select", ""),
    }


def test_scaling(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "keeps_memory", lambda: True)
    arguments = ["--scaling", "--quick", "--threads", "1", "--ops", "sigma", "set", "--dtypes", "float32"]
    assert main(["bench", *arguments, "--out", str(tmp_path / "scaling.csv")]) == 0
    rows = results.read(tmp_path / "scaling.csv").rows
    assert {r.contender for r in rows} == {"safekern"}
    assert len({r.elements for r in rows if r.op == "sigma"}) == 3
    assert len({r.ratio for r in rows if r.op == "set"}) == 5
    shown = capsys.readouterr().out
    assert "time grows with elements" in shown and "time grows with selected" in shown
    monkeypatch.setattr(measure, "available_memory", lambda: 1)
    assert main(["bench", *arguments]) == 0
    assert "is left out: it needs about" in capsys.readouterr().out
    one = ["--scaling", "--quick", "--threads", "1", "--out", str(tmp_path / "one.csv"), "--plot", str(tmp_path)]
    assert main(["bench", *one, "--ops", "sigma"]) == 1
    assert "nothing fits this machine's memory" in capsys.readouterr().err
    assert main(["bench", *one, "--ops", "mask_save"]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["scaling_selected.png"]
