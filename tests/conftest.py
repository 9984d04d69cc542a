"""Fixtures that more than one test file uses."""

import copy
from collections.abc import Iterator

import pytest
import torch
from test_models import load_once

from safekern.errors import MissingDependencyError


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (or the largest integer), so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives back the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_in_fp32():
    try:
        model, tokenizer, *_ = load_once()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    # In fp32 the rows of a batch agree with each row alone.
    return copy.deepcopy(model).float(), tokenizer


@pytest.fixture
def smollm2(smollm2_in_fp32):
    # Threads that wait for each other on a shared machine make small steps twenty times slower.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield smollm2_in_fp32
    torch.set_num_threads(threads)
