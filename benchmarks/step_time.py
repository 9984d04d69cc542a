"""What a step of the masked optimizers costs beside PyTorch's own AdamW, in one process and interleaved.

    python benchmarks/step_time.py                     # 64M elements in 60 tensors, fp32 and bf16, 1 and 2 threads
    python benchmarks/step_time.py --numel 16000000 --repeats 15 --out benchmarks/results/step_time.csv

Baselines are what a competent user of PyTorch runs: `torch.optim.AdamW(fused=True)` and `foreach=True`,
with moments in the dtype of the parameter. All contenders have parameters and gradients of their own and take turns, so
that drift of the machine hits all alike. Figures are medians; `ratio` is the time of fused AdamW over that of the row.

Fresh CPU temporaries are page-fault bound, which would flatter optimizers without temporaries: the script starts itself
again with the allocator told to keep memory (glibc's MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_).
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

import safekern

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}
TENSORS = 60
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=64_000_000)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--out", type=Path, help="also write a CSV file")
    args = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})

    rows: list[dict[str, object]] = []
    for dtype in args.dtypes:
        steps = contenders(args.numel, args.ratio, DTYPES[dtype])
        for threads in args.threads:
            torch.set_num_threads(threads)
            times = interleaved(steps, args.repeats)
            for name, seconds in times.items():
                ratio = times["AdamW fused"] / seconds
                print(f"{dtype:9} {threads} threads  {name:24} {seconds * 1e3:9.2f} ms  {ratio:6.2f}x", flush=True)
                rows.append({"dtype": dtype, "threads": threads, "step": name, "ms": seconds * 1e3, "ratio": ratio})
    if args.out:
        write(args.out, rows, args)


def contenders(numel: int, ratio: float, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A step function per optimizer, each over parameters of its own."""
    mask = random_mask(numel, ratio)

    def named() -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        for name, shape in mask.shapes.items():
            params[name] = torch.nn.Parameter(torch.randn(shape).to(dtype))
            params[name].grad = torch.randn(shape).to(dtype)
        return params

    def build(make: Callable[[dict[str, Tensor]], torch.optim.Optimizer]) -> Callable[[], object]:
        return make(named()).step

    def protected(params: dict[str, Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params.values(), fused=True)
        safekern.protect(optimizer, mask, params.items())
        return optimizer

    return {
        "AdamW fused": build(lambda params: torch.optim.AdamW(params.values(), fused=True)),
        "AdamW foreach": build(lambda params: torch.optim.AdamW(params.values(), foreach=True)),
        f"SETAdamW {ratio:.1%}": build(lambda params: safekern.SETAdamW(params.items(), mask)),
        f"SPAAdamW {ratio:.1%}": build(lambda params: safekern.SPAAdamW(params.items(), mask)),
        "AdamW fused + protect": build(protected),
    }


def random_mask(numel: int, ratio: float) -> safekern.Mask:
    """A random selection over equal square-ish matrices."""
    columns = 1024
    shape = (max(1, numel // TENSORS // columns), columns)
    generator = torch.Generator().manual_seed(0)
    masks = {f"layers.{i}.weight": torch.rand(shape, generator=generator) < ratio for i in range(TENSORS)}
    return safekern.Mask.from_bool(masks)


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds per step after two warm-ups, the contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def write(path: Path, rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    """Writes the rows with where and when they were measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    where = {
        "numel": args.numel,
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": str(torch.__version__),
        "safekern": safekern.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


if __name__ == "__main__":
    main()
