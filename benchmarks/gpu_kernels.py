"""Every op and masked optimizer on a GPU beside what people use instead: time, bandwidth, share of copy bandwidth.

    python benchmarks/gpu_kernels.py --out kernels.csv                  # a billion bf16 weights, both backends
    python benchmarks/gpu_kernels.py --numel 100000000 --backends triton

Baselines are plain PyTorch done well (`add_`, `std`, `topk`, `AdamW(fused=True)`, indexing) and the way of published
research code: dense moments with a dense mask multiplied into the update; a threshold from a 1% sample, then `nonzero`
per tensor and `topk` on the host. What is compared takes turns after three warm-ups; figures are medians of CUDA event
times, of three where one run takes a quarter of a second. `device_ms` is what the kernels of a run take by the
profiler: in the rest the device waits for the host, which in training is ahead of it. Each backend runs in a process of
its own. Bytes are those that have to be moved (in sectors of 32 bytes where access is scattered); "copy" is the
bandwidth of `copy_`, read and write counted.

Times of one weight tensor per launch or of all at once depend on the shapes: here they are 4096 x 4096 matrices, and
`ms_8b` is the time scaled to 8 billion weights.
"""

import argparse
import csv
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import safekern
from safekern import ops
from safekern.tables import Table

Work = dict[str, Callable[[], object]]
OURS = "safekern"
SECTOR = 32


def main() -> int:
    """Runs the benchmark; the status is 1 if a backend was not measured to the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1_000_000_000, help="weights in all (default: 1e9)")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of a matrix (default: 4096)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--seconds", type=float, default=50.0, help="limit per backend (default: 50)")
    parser.add_argument("--out", type=Path, help="also write a CSV file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        write(args.out, measure(args))
        return 0
    rows: list[dict[str, str]] = []
    failed = False
    for backend in args.backends:
        found, complete = elsewhere(backend, args)
        failed |= not complete
        rows += found
    if rows:
        shown = ["backend", "op", "contender", "ms", "device_ms", "ms_8b", "GB/s", "of_copy", "times_ours"]
        print(Table.from_records(rows, shown))
        if args.out:
            write(args.out, rows)
    return int(failed)


def elsewhere(backend: str, args: argparse.Namespace) -> tuple[list[dict[str, str]], bool]:
    """The rows of a backend, measured in a process of its own, and whether these are all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        command = [sys.executable, __file__, "--here", "--out", str(path)]
        for option in ("numel", "side", "repeats", "device"):
            command += [f"--{option}", str(getattr(args, option))]
        try:
            environment = {**os.environ, "SAFEKERN_BACKEND": backend}
            status = subprocess.run(command, env=environment, timeout=args.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
            print(f"{backend}: not finished after {args.seconds:.0f} s", file=sys.stderr)
        if status > 0:
            print(f"{backend}: the measurement ended with status {status}", file=sys.stderr)
        if not path.exists():
            return [], False
        with path.open(newline="") as file:
            return list(csv.DictReader(file)), status == 0


def measure(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The rows of the backend of this process, as they are measured."""
    device = torch.device(args.device)
    count = max(1, args.numel // args.side**2)
    bench = Bench(device, args.side, count)
    copy = copy_bandwidth(device, min(args.numel * 4, 4 * 2**30), args.repeats)
    where = {
        "backend": ops.BACKENDS[device.type].backend,
        "numel": count * args.side**2,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "safekern": safekern.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    groups: tuple[Callable[[], tuple[str, float, Work]], ...] = (
        lambda: bench.accumulate(torch.bfloat16),
        lambda: bench.accumulate(torch.float32),
        bench.sigma,
        bench.select,
        bench.gather,
        bench.restore,
        bench.count_changed,
        bench.perturb,
        lambda: bench.set_step(0.01),
        lambda: bench.set_step(0.001),
        bench.spa_step,
    )
    for group in groups:
        name, size, work = group()
        times = interleaved(work, device, args.repeats)
        busy = {name: device_milliseconds(function, device) for name, function in work.items() if times[name] < 250}
        del work
        # Optimizers and their hooks refer to each other.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for contender, milliseconds in times.items():
            speed = size / milliseconds / 1e6
            yield {
                "op": name,
                "contender": contender,
                "ms": f"{milliseconds:.4f}",
                "device_ms": f"{busy[contender]:.4f}" if busy.get(contender) else "",
                "ms_8b": f"{milliseconds * 8e9 / (count * args.side**2):.2f}",
                "GB/s": f"{speed:.0f}" if contender == OURS else "",
                "of_copy": f"{speed / copy:.3f}" if contender == OURS else "",
                "times_ours": f"{milliseconds / times[OURS]:.2f}",
                "copy_GB/s": f"{copy:.0f}",
                **{key: str(value) for key, value in where.items()},
            }


class Bench:
    """Makes the contenders for each op: a name, the bytes that have to be moved, and functions to time."""

    def __init__(self, device: torch.device, side: int, count: int) -> None:
        self._device = device
        self._side = side
        self._count = count
        self._numel = count * side * side

    def _random(self, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        shape = (self._side, self._side)
        return [torch.randn(shape, dtype=dtype, device=self._device) * scale for _ in range(self._count)]

    def _zeros(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(self._side, self._side, dtype=dtype, device=self._device) for _ in range(self._count)]

    def _indices(self, ratio: float = 0.01) -> list[Tensor]:
        numel = self._side**2
        wanted = max(1, int(numel * ratio))
        return [
            torch.randint(numel, (wanted,), device=self._device).unique().to(torch.int32) for _ in range(self._count)
        ]

    def _flags(self) -> Tensor:
        return torch.zeros(self._count, dtype=torch.bool, device=self._device)

    def _scattered(self, size: int, ratio: float) -> float:
        """Bytes of the sectors that hold a selected element of so many bytes."""
        return float(self._numel * size * (1 - (1 - ratio) ** (SECTOR / size)))

    def accumulate(self, dtype: torch.dtype) -> tuple[str, float, Work]:
        accs, grads, flags = self._zeros(torch.float32), self._random(dtype), self._flags()

        def add() -> None:
            for acc, grad in zip(accs, grads, strict=True):
                acc.add_(grad)

        work: Work = {OURS: lambda: ops.accumulate_(accs, grads, flags, False), "add_": add}
        return f"accumulate {_short(dtype)}", self._numel * (8 + dtype.itemsize), work

    def sigma(self) -> tuple[str, float, Work]:
        params = self._random(torch.bfloat16, 0.02)
        work: Work = {
            OURS: lambda: ops.sigma(params),
            "p.float().std()": lambda: [param.float().std() for param in params],
            "p.std()": lambda: [param.std() for param in params],
        }
        return "sigma bf16", self._numel * 2, work

    def select(self) -> tuple[str, float, Work]:
        accs = self._random(torch.float32)
        sigma = torch.rand(self._count, device=self._device) + 0.5
        k = max(1, self._numel // 100)

        def plain() -> Tensor:
            scores = torch.cat([(acc.abs() * s).view(-1) for acc, s in zip(accs, sigma, strict=True)])
            return torch.topk(scores, k).indices

        def research() -> Tensor:
            scores = [(acc.abs() * s).view(-1) for acc, s in zip(accs, sigma, strict=True)]
            sample = torch.cat(
                [each[torch.randint(each.numel(), (each.numel() // 100 + 1,), device=each.device)] for each in scores]
            )
            threshold = sample.sort(descending=True).values[int(sample.numel() * 0.012)]
            candidates = [(each, torch.where(each >= threshold)[0]) for each in scores]
            values = torch.cat([each[index].cpu() for each, index in candidates])
            return torch.topk(values, min(k, values.numel())).indices

        work: Work = {OURS: lambda: ops.select(accs, sigma, k, True), "torch.topk": plain, "research code": research}
        return "select top 1%", self._numel * 4, work

    def gather(self) -> tuple[str, float, Work]:
        srcs, indices, flags = self._random(torch.bfloat16), self._indices(), self._flags()
        outs = [torch.empty(index.numel(), device=self._device) for index in indices]
        longs = [index.long() for index in indices]
        work: Work = {
            OURS: lambda: ops.gather_(outs, srcs, indices, flags),
            "src[index].float()": lambda: [src.view(-1)[index].float() for src, index in zip(srcs, longs, strict=True)],
        }
        return "gather 1%", self._scattered(2, 0.01) + 8 * _total(indices), work

    def restore(self) -> tuple[str, float, Work]:
        params, indices = self._random(torch.bfloat16), self._indices()
        values = [torch.ones(index.numel(), dtype=torch.bfloat16, device=self._device) for index in indices]
        longs = [index.long() for index in indices]

        def plain() -> None:
            for param, index, value in zip(params, longs, values, strict=True):
                param.view(-1).index_copy_(0, index, value)

        work: Work = {OURS: lambda: ops.restore_(params, indices, values), "index_copy_": plain}
        return "restore 1%", 2 * self._scattered(2, 0.01) + 6 * _total(indices), work

    def count_changed(self) -> tuple[str, float, Work]:
        params, indices = self._random(torch.bfloat16), self._indices()
        values = [param.view(-1)[index.long()] for param, index in zip(params, indices, strict=True)]
        longs = [index.long() for index in indices]
        work: Work = {
            OURS: lambda: ops.count_changed(params, indices, values),
            "(p[index] != v).sum()": lambda: [
                (param.view(-1)[index] != value).sum()
                for param, index, value in zip(params, longs, values, strict=True)
            ],
        }
        return "count_changed 1%", self._scattered(2, 0.01) + 6 * _total(indices), work

    def perturb(self) -> tuple[str, float, Work]:
        params, indices = self._random(torch.bfloat16), self._indices()
        longs = [index.long() for index in indices]
        scales, streams = [1e-3] * self._count, list(range(self._count))

        def plain() -> None:
            for param, index in zip(params, longs, strict=True):
                noise = torch.randn(index.numel(), device=self._device) * 1e-3
                flat = param.view(-1)
                flat.index_copy_(0, index, (flat[index].float() + noise).to(flat.dtype))

        work: Work = {OURS: lambda: ops.perturb_(params, indices, scales, streams, 0), "randn": plain}
        return "perturb 1%", 2 * self._scattered(2, 0.01) + 4 * _total(indices), work

    def set_step(self, ratio: float) -> tuple[str, float, Work]:
        mask = self._mask(ratio)
        work: Work = {
            OURS: safekern.SETAdamW(self._named().items(), mask).step,
            "AdamW fused": torch.optim.AdamW(self._named().values(), fused=True).step,
            "research code": self._research(mask),
        }
        # Weight twice, gradient once; moments and master twice, the index twice (gather and step), the value between.
        size = 3 * self._scattered(2, ratio) + (24 + 8 + 8) * mask.numel
        return f"SET step {ratio:.1%}", size, work

    def spa_step(self) -> tuple[str, float, Work]:
        mask = self._mask(0.01)
        around = self._named()
        optimizer = torch.optim.AdamW(around.values(), fused=True)
        safekern.protect(optimizer, mask, around.items())
        work: Work = {
            OURS: safekern.SPAAdamW(self._named().items(), mask).step,
            "AdamW fused": torch.optim.AdamW(self._named().values(), fused=True).step,
            "AdamW fused, protected": optimizer.step,
            "research code": self._research(mask),
        }
        return "SPA step 1%", 14 * self._numel + 4 * mask.numel, work

    def _named(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for t, (param, grad) in enumerate(zip(self._random(torch.bfloat16), self._random(torch.bfloat16), strict=True)):
            named[f"layers.{t}.weight"] = nn.Parameter(param)
            named[f"layers.{t}.weight"].grad = grad
        return named

    def _mask(self, ratio: float) -> safekern.Mask:
        indices = {f"layers.{t}.weight": index.cpu() for t, index in enumerate(self._indices(ratio))}
        return safekern.Mask.from_indices(indices, dict.fromkeys(indices, (self._side, self._side)))

    def _research(self, mask: safekern.Mask) -> Callable[[], object]:
        """Dense moments, and a dense mask multiplied into the update."""
        named = self._named()
        dense = {name: mask.bool(name).to(self._device, torch.bfloat16) for name in named}
        state = {name: (torch.zeros_like(param), torch.zeros_like(param)) for name, param in named.items()}

        @torch.no_grad()
        def step() -> None:
            for name, param in named.items():
                exp_avg, exp_avg_sq = state[name]
                grad = param.grad
                assert grad is not None
                exp_avg.mul_(0.9).add_(grad, alpha=0.1)
                exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
                update = exp_avg / (exp_avg_sq.sqrt() + 1e-8)
                param.sub_(update * dense[name] * 1e-3)

        return step


def interleaved(work: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds after three warm-ups, the contenders taking turns; slow ones fewer of them."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 3):
        for name, function in work.items():
            if len(times[name]) < 6 or times[name][3] < 250:
                times[name].append(_milliseconds(function, device))
    return {name: statistics.median(each[3:]) for name, each in times.items()}


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def device_milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Milliseconds that the kernels and copies of a call take on a GPU, without gaps between them; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize(device)
    return float(sum(event.self_device_time_total for event in profiler.key_averages())) / 1e3 / repeats


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """GB/s of ``copy_``, read and write counted."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, device, repeats)["copy"] / 1e6


def write(path: Path, rows: "Iterator[dict[str, str]] | list[dict[str, str]]") -> None:
    """Writes rows as they come, so that those before an interruption are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _total(indices: list[Tensor]) -> int:
    return sum(index.numel() for index in indices)


if __name__ == "__main__":
    sys.exit(main())
