"""The tests of the ops on tensors of the device: "kernels" are those of its backend, "torch" is the reference there."""

import importlib

import pytest
import torch
from gpu_device import DEVICE, on_cuda, require_device

from safekern import ops

require_device()
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import test_ops  # noqa: E402
from cuda_on_cpu import cases  # noqa: E402
from test_ops import *  # noqa: E402, F403

# Kernels on a device cannot look at indices without waiting for it, and have no threads or instruction sets of ours.
_OF_THE_CPU = ("threads", "_is_checked", "would_corrupt_memory", "instruction_set", "instruction_set_is_refused")
for _name in [name for name in globals() if name.endswith(_OF_THE_CPU)]:
    del globals()[_name]
del test_spa_adamw_refuses_moments_of_two_dtypes  # noqa: F821

# Those of the CPU refuse such an index.
test_a_wrong_index_is_skipped = on_cuda(cases.test_a_wrong_index_is_skipped)


@pytest.fixture(scope="module", autouse=True)
def _on_the_device():
    test_ops.large_cases.cache_clear()
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
    test_ops.large_cases.cache_clear()


@pytest.fixture(autouse=True)
def _kernels_of_the_device(monkeypatch):
    def kernel(name, backend):
        if backend == "torch":
            return importlib.import_module(f"safekern.ops.{name.rstrip('_')}").reference
        if ops.BACKENDS[DEVICE.type].backend == "torch":
            pytest.skip(f"no kernels for {DEVICE.type} are installed")
        return getattr(ops, name)

    monkeypatch.setattr(test_ops, "kernel", kernel)
