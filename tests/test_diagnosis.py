"""The selftest has to pass here, and above all has to notice kernels that are wrong."""

import dataclasses
import json

import pytest
import torch
from exact import bits
from torch import Tensor

import safekern
from safekern import diagnosis, ops
from safekern.cli import main
from safekern.ops.registry import OPS, Served

COMPILED = ops.BACKENDS["cpu"].backend == "cpu"
needs_kernels = pytest.mark.skipif(not COMPILED, reason="the compiled CPU kernels are not installed")


@pytest.fixture
def break_op(monkeypatch):
    """Puts another function in place of an op's kernels."""

    def replace(name, call):
        for other in [other for other in OPS if other != name]:
            monkeypatch.delitem(OPS, other)
        monkeypatch.setitem(OPS, name, dataclasses.replace(OPS[name], call=call))
        # The op must be tried whatever runs here.
        monkeypatch.setattr(diagnosis, "has_kernel", lambda op, device: True)
        monkeypatch.setitem(ops.BACKENDS, "cpu", Served("cpu", {}))

    return replace


def only_check(**options):
    (check,) = diagnosis._checks_here("cpu", quick=True, **options)
    return check


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
def test_the_kernels_of_this_installation_pass():
    result = safekern.selftest(device="cpu")
    assert result.ok and not result.failures, str(result)
    assert {check.op for check in result.checks} == set(OPS)
    assert all(check.backend == "cpu" and check.cases > 5 for check in result.checks)


@pytest.mark.parametrize("name", OPS)
def test_the_reference_passes_as_a_kernel(break_op, name):
    break_op(name, OPS[name].reference)
    check = only_check()
    assert (check.status, check.reason) == ("passed", "")


def test_every_op_has_cases_of_different_names():
    for op in OPS.values():
        names = [case.name for case in op.cases(False)]
        assert len(names) == len(set(names)) > 5


def first_element(values: list[Tensor]) -> Tensor:
    return next(value for value in values if value.numel() > 1000).view(-1)


def test_a_wrong_last_bit_is_found(break_op):
    def accumulate_(accs, grads, nonfinite, absolute):
        OPS["accumulate_"].reference(accs, grads, nonfinite, absolute)
        first_element(accs).view(torch.int32)[7] ^= 1

    break_op("accumulate_", accumulate_)
    check = only_check()
    assert check.status == "failed" and "1 of 4,257 elements differ, first at 7" in check.reason
    assert "bfloat16" in check.reason and check.cases == 1


@pytest.mark.parametrize(("ulps", "status"), [(1, "passed"), (2, "failed")])
def test_optimizer_steps_may_differ_by_one_unit(break_op, ulps, status):
    def spa_adamw_(params, grads, indices, exp_avgs, exp_avg_sqs, *rest):
        OPS["spa_adamw_"].reference(params, grads, indices, exp_avgs, exp_avg_sqs, *rest)
        for value in exp_avgs:
            bits(value).view(-1)[value.view(-1).abs() > 1e-3] += ulps

    cases = OPS["spa_adamw_"].cases
    break_op("spa_adamw_", spa_adamw_)
    # In fp64 two are allowed, and extremes overflow.
    kept = [case for case in cases(False) if "extremes" not in case.name and "float64" not in case.name]
    OPS["spa_adamw_"] = dataclasses.replace(OPS["spa_adamw_"], cases=lambda large: kept)
    assert only_check().status == status


def test_a_weight_that_had_to_stay_is_found(break_op):
    def set_adamw_(params, grads, indices, *rest):
        OPS["set_adamw_"].reference(params, grads, indices, *rest)
        value = first_element(params)
        spared = torch.ones(value.numel(), dtype=torch.bool)
        spared[next(index for index in indices if index.numel() > 500).long()] = False
        place = int(spared.nonzero()[0])
        bits(value)[place] += 1

    break_op("set_adamw_", set_adamw_)
    check = only_check()
    assert check.status == "failed" and "1 elements changed that had to stay" in check.reason


@pytest.mark.parametrize("offset", [-1, 0])
def test_writing_outside_a_tensor_is_found(break_op, offset):
    def restore_(params, indices, values):
        OPS["restore_"].reference(params, indices, values)
        param = first_element(params)
        past = param.storage_offset() + (offset if offset < 0 else param.numel())
        param.as_strided((1,), (1,), past).fill_(1.0)

    break_op("restore_", restore_)
    assert only_check().reason.endswith("writes outside a tensor")


def test_reading_outside_a_tensor_is_found(break_op):
    def sigma(params):
        result = OPS["sigma"].reference(params)
        param = first_element(params)
        result[0] += param.as_strided((1,), (1,), param.storage_offset() + param.numel())[0] * 1e-6
        return result

    break_op("sigma", sigma)
    assert "nan instead of" in only_check().reason


def test_another_order_of_ties_is_found(break_op):
    def select(grads, sigma, k, largest):
        flipped = OPS["select"].reference([grad.view(-1).flip(0) for grad in grads], sigma, k, largest)
        pairs = zip(grads, flipped, strict=True)
        return [(grad.numel() - 1 - index).flip(0).to(index.dtype) for grad, index in pairs]

    break_op("select", select)
    assert only_check().status == "failed"


def test_a_missing_refusal_is_found(break_op):
    def select(grads, sigma, k, largest):
        grads = [grad.nan_to_num(0.0, float("inf")) for grad in grads]
        return OPS["select"].reference(grads, sigma, min(max(k, 1), sum(grad.numel() for grad in grads)), largest)

    break_op("select", select)
    assert "is accepted instead of refused (cannot select)" in only_check().reason


def test_a_kernel_that_raises_is_a_failure_in_one_line(break_op):
    def gather_(outs, srcs, indices, nonfinite):
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    break_op("gather_", gather_)
    check = only_check()
    assert check.status == "failed" and check.reason.endswith(
        "raises RuntimeError: CUDA error: an illegal memory access"
    )
    result = diagnosis.SelfTest((check,))
    assert not result.ok and result.failures == (check,)
    assert "gather_" in str(result) and "1 failed" in str(result)


def test_nothing_that_was_skipped_counts_as_passed(monkeypatch):
    monkeypatch.setitem(ops.BACKENDS, "cpu", Served("torch", {"cpu": "removed by a test"}))
    monkeypatch.setattr(diagnosis, "has_kernel", lambda op, device: False)
    monkeypatch.setenv("SAFEKERN_BACKEND", "torch")
    result = safekern.selftest(device="cpu", quick=True)
    assert {check.status for check in result.checks} == {"skipped"}
    assert not result.ok and not result.failures
    assert str(result).endswith(f"{len(OPS)} skipped")


def test_other_backends_run_in_processes_of_their_own():
    if torch.version.cuda is None:
        (check,) = diagnosis._checks_elsewhere("triton", "cpu", quick=True)
        assert check.status == "skipped" and "this PyTorch is built without CUDA" in check.reason
    if COMPILED:
        checks = diagnosis._checks_elsewhere("cpu", "cpu", quick=True)
        assert {check.op for check in checks} == set(OPS)
        assert {(check.backend, check.status) for check in checks} == {("cpu", "passed")}


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(diagnosis, "_CHILD", "import os; os._exit(3)")
    (check,) = diagnosis._checks_elsewhere("cpu", "cpu", quick=True)
    assert check.status == "failed" and "ended with status 3" in check.reason


@pytest.mark.parametrize("device", ["meta", "abacus", "cpu:x"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(safekern.InvalidArgumentError, match=f"device {device}"):
        safekern.selftest(device=device)


def one_result(status):
    return diagnosis.SelfTest((diagnosis.Check("sigma", "cpu", "cpu", status, 3, "why" if status == "failed" else ""),))


@pytest.mark.parametrize(
    ("status", "code", "verdict"),
    [("passed", 0, "agree with the reference"), ("failed", 1, "are wrong"), ("skipped", 0, "Nothing was compared")],
)
def test_doctor_says_what_it_found(monkeypatch, capsys, status, code, verdict):
    monkeypatch.setattr("safekern.cli.doctor.selftest", lambda: one_result(status))
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert verdict in out.splitlines()[-1]
    for word in ("devices", "versions", "kernels", "environment", "selftest", *OPS, "SAFEKERN_BACKEND"):
        assert word in out
    for reasons in (served.passed_over for served in ops.BACKENDS.values()):
        assert all(reason in out for reason in reasons.values())


def test_doctor_says_which_gpu_cannot_be_used(monkeypatch, capsys):
    def full(*args, **options):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr("safekern.cli.doctor.selftest", lambda: one_result("passed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", full)
    assert main(["doctor"]) == 0
    assert "cuda:0  unusable: CUDA error: out of memory" in capsys.readouterr().out
    # Nor are its kernels wrong.
    monkeypatch.setattr(torch, "empty", full)
    (check,) = diagnosis._checks_here("cuda", quick=True)
    assert (check.op, check.status, check.reason) == (
        "*",
        "skipped",
        "the device cannot be used: CUDA error: out of memory",
    )


def test_doctor_writes_json(monkeypatch, capsys):
    monkeypatch.setattr("safekern.cli.doctor.selftest", lambda: one_result("failed"))
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"]["cpu"]["backend"] == ops.BACKENDS["cpu"].backend
    assert found["kernels"]["cpu"]["ops"].keys() == OPS.keys()
    assert found["selftest"][0]["reason"] == "why" and found["ok"] is False
