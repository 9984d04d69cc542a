"""Times, bandwidths and memory, and where they were measured."""

import contextlib
import ctypes
import gc
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import safekern
from safekern import ops

Run = Callable[[], object]

# Fresh memory on a CPU costs a page fault per 4 KiB, which would flatter whoever needs no temporaries: glibc is told to
# keep what was freed. It reads these when a process starts.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}

WARM_UPS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds per run: the median, and the distance between the quartiles as a share of it."""

    median: float
    spread: float


@dataclass(frozen=True)
class Bandwidth:
    """Measured GB/s of this machine: ``copy_`` of a buffer (read and write counted), and reading one."""

    copy: float
    read: float


def keeps_memory() -> bool:
    """Whether this process's allocator reuses freed memory instead of asking for fresh pages."""
    return all(os.environ.get(key) == value for key, value in ALLOCATOR.items())


def interleaved(runs: Mapping[str, Run], repeats: int, device: str = "cpu") -> dict[str, Timing]:
    """Times runs that take turns, so that drift of the machine hits all of them alike.

    Args:
        runs: what to time, by name.
        repeats: how often each is timed, at least 7 for figures to be quoted; two warm-ups come before.
        device: the device that they run on; a GPU is waited for.

    Example:
        >>> sorted(interleaved({"a": list, "b": dict}, repeats=7))
        ['a', 'b']
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UPS + repeats):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= WARM_UPS:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def peak_memory(run: Run, device: str = "cpu") -> int | None:
    """Bytes that one run needs above what is held when it starts; None where the system does not tell.

    On a CPU this is the resident memory of the process, whose high-water mark Linux can reset; it comes in pages, and
    includes what kernels take without torch's knowledge.
    """
    if device != "cpu":
        gc.collect()
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with ResidentPeak() as peak:
        run()
    return peak.bytes


class ResidentPeak:
    """Within the block, how far the resident memory of this process rises above where it was: ``bytes``, or None."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> "ResidentPeak":
        gc.collect()
        # Memory that was freed but is kept would hide what is taken from it.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.bytes = max(0, resident("VmHWM") - self._before)


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its high-water mark) of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def available_memory() -> int:
    """Bytes that this machine could still give, or a guess from its size."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.8) if hasattr(os, "sysconf") else 8 * 2**30


def bandwidth(numel: int, device: str = "cpu") -> Bandwidth:
    """Measures the machine with buffers of ``numel`` fp32, to be far larger than its cache, by the threads now set."""
    source, target = torch.ones(numel, device=device), torch.zeros(numel, device=device)
    runs = {"copy": lambda: target.copy_(source), "sum": lambda: source.sum(), "dot": lambda: torch.dot(source, source)}
    times = interleaved(runs, 7, device)
    size = 4 * numel / 1e9
    return Bandwidth(2 * size / times["copy"].median, size / min(times["sum"].median, times["dot"].median))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of threads that torch and the kernels use, for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def environment(device: str = "cpu") -> dict[str, str]:
    """Where figures come from: device, versions, commit, date, and what the allocator was told."""
    told = dict(ALLOCATOR) if keeps_memory() else {}
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        told["GLIBC_TUNABLES"] = tunables
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else _cpu(),
        "backend": ops.BACKENDS[torch.device(device).type].backend,
        "torch": str(torch.__version__),
        "safekern": safekern.__version__,
        "commit": commit(Path(__file__)),
        "date": datetime.now(UTC).date().isoformat(),
        "allocator": " ".join(f"{key}={value}" for key, value in told.items()) or "default",
    }


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def commit(file: Path) -> str:
    """The git commit that a source file is of, ``-dirty`` after it where something was changed; else ``unknown``."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository.
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def state_bytes(optimizer: torch.optim.Optimizer, more: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors in an optimizer's state, and of others that it works with."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*held, *more])


def index_bytes(mask: safekern.Mask) -> int:
    """Bytes of a mask's indices in memory."""
    return sum(mask.compact(name).nbytes for name in mask)


def _timing(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Timing(median, (high - low) / median if median else 0.0)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    return f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def restart_with_allocator(arguments: list[str]) -> int:
    """Runs ``python -m safekern`` again with :data:`ALLOCATOR` set, and returns its exit status."""
    return subprocess.run([sys.executable, "-m", "safekern", *arguments], env={**os.environ, **ALLOCATOR}).returncode
