"""Fixtures that more than one test file uses."""

import copy
from collections.abc import Iterator

import pytest
import torch
from cli_folder import BENIGN, PAIRS, write_rows
from language_models import byte_tokenizer, smollm2_once, tiny_llama

from safekern.cli import main
from safekern.errors import MissingDependencyError

# Modules that tests share: without this, a failed assert there shows no values.
pytest.register_assert_rewrite(
    "file_kinds", "processes", "protected_training", "scored_models", "small_net", "trainer_runs"
)


# One test of each takes minutes: processes that share the files begin with them, so as to end together.
_LONG = {"test_cli_memory.py", "test_cuda_build.py", "test_triton_interpreted.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full, which take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="runs with --full only"))


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
        model, tokenizer, *_ = smollm2_once()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    # In fp32 the rows of a batch agree with each row alone.
    return copy.deepcopy(model).float(), tokenizer


@pytest.fixture
def smollm2(smollm2_in_fp32, threads):
    # Threads that wait for each other on a shared machine make small steps twenty times slower.
    torch.set_num_threads(1)
    return smollm2_in_fp32


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A checkpoint folder and what ``safekern score`` says of it."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = tiny_llama().to(torch.bfloat16)
        model.save_pretrained("base")
        byte_tokenizer().save_pretrained("base")
        write_rows(folder / "harmful.jsonl", PAIRS)
        write_rows(folder / "benign.jsonl", BENIGN)
        arguments = ["--pairs", "harmful.jsonl", "--ratio", "0.05", "--save-scores", "--out", "run"]
        assert main(["score", "--model", "base", *arguments]) == 0
    return folder
