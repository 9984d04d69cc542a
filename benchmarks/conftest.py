"""Options and header of ``pytest benchmarks --benchmark-only``."""

import pytest

from safekern.bench import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes, so that a first run can be short."""
    group = parser.getgroup("safekern")
    group.addoption("--elements", type=float, default=16e6, help="weights per op (default: 16e6)")
    group.addoption("--model-params", type=float, default=5e6, help="weights of whole models (default: 5e6)")
    group.addoption("--no-compiled", action="store_true", help="without torch.compiled baselines")


def pytest_report_header() -> list[str]:
    """Where the figures come from."""
    lines = [f"{key}: {value}" for key, value in measure.environment().items()]
    if not measure.keeps_memory():
        told = " ".join(f"{key}={value}" for key, value in measure.ALLOCATOR.items())
        lines.append(f"fresh memory costs page faults, which flatters safekern: run with {told}")
    return lines
