"""The device under test."""

import os
import time

import pytest
import torch

DEVICE = torch.device(os.environ.get("SAFEKERN_TEST_DEVICE", "cuda"))

LEFT_TO_OTHERS = 4e9

on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA, and SAFEKERN_TEST_DEVICE is another device")


def require_device() -> None:
    """Skips the module that calls it where there is no device."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here", allow_module_level=True)


def need_memory(count: int) -> None:
    """Makes sure of so many bytes of the device; skips the test that calls it where others hold them for a minute.

    So much is left to other processes that their small tests go on.
    """
    deadline = time.monotonic() + 60
    torch.cuda.empty_cache()
    while True:
        try:
            # Freed at once, but kept by this process's allocator: other processes do not take it from under the test.
            torch.empty(count, dtype=torch.uint8, device=DEVICE)
            if torch.cuda.mem_get_info()[0] >= LEFT_TO_OTHERS:
                return
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        if time.monotonic() > deadline:
            free, _ = torch.cuda.mem_get_info()
            pytest.skip(f"needs {count / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")
        time.sleep(1)
