"""Tests that need a CUDA device. One backend per process: run them with SAFEKERN_BACKEND=cuda and =triton.

SAFEKERN_TEST_DEVICE=cpu runs those that can on the CPU, to try the tests themselves where there is no GPU.
"""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_make_parametrize_id(config, val, argname):
    # In tests that are shared with the CPU, the name that stands for the kernels the dispatcher chooses.
    return "kernels" if argname == "backend" and val != "torch" else None
