"""The device under test."""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("SAFEKERN_TEST_DEVICE", "cuda"))

on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA, and SAFEKERN_TEST_DEVICE is another device")


def require_device() -> None:
    """Skips the module that calls it where there is no device."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here", allow_module_level=True)


def need_memory(count: int) -> None:
    """Skips the test that calls it where the device has fewer free bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < count:
        pytest.skip(f"needs {count / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")
