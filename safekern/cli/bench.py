"""``safekern bench``: what safekern costs beside plain PyTorch, as a table, files and plots."""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safekern.cli import options
from safekern.errors import BenchmarkError, InvalidArgumentError
from safekern.tables import Column, Table, counted

if TYPE_CHECKING:
    from safekern.bench.cases import Setting
    from safekern.bench.results import Row

_DESCRIPTION = """\
Times safekern beside what a competent user of PyTorch would write, in one process and taking turns. Each result is
checked before it is timed. On a CPU the command starts itself again with glibc's allocator told to keep freed memory
(MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_): fresh memory costs a page fault per 4 KiB, which would flatter safekern.

  safekern bench --quick                              does everything work? (seconds; the figures mean little)
  safekern bench --out new.csv --plot plots           all ops, 64M elements, fp32 and bf16, 0.1%, 1% and 5%
  safekern bench --compare old.csv new.csv            which of safekern's ops became slower? exit status 1 if one did
  safekern bench --scaling --plot plots               time against elements and against selected weights, with slopes
  safekern bench --memory --model-params 1e9          bytes per parameter of whole training runs
"""

# Those of `safekern.bench.cases`, which takes long to import.
_OPS = ("accumulate", "sigma", "select", "set", "spa", "protect", "mask_save", "mask_load", "score", "train")
_SIZES = [10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6, 256 * 10**6, 10**9]
_RATIOS = [0.001, 0.003, 0.01, 0.03, 0.1]
# What checking and timing hold at once: tensors like the weights, and bytes per weight beside them.
_STREAMING = {"accumulate": (1, 12), "sigma": (1, 2), "select": (0, 6), "set": (3, 2), "spa": (5, 2)}
_SPARSE = ("set", "protect", "select", "mask_save")
_DTYPES = ["float32", "bfloat16"]
# The ways of running that each option means something to: the usual one, and those that have an option of their own.
_MEANT_FOR = {
    **dict.fromkeys(["ratios", "no_compile"], ("usual",)),
    **dict.fromkeys(["ops", "dtypes", "elements", "threads", "repeats", "plot"], ("usual", "scaling")),
    **dict.fromkeys(["quick", "out"], ("usual", "scaling", "memory")),
    "model_params": ("usual", "memory"),
    "score_memory": ("memory",),
    "tolerance": ("compare",),
}


def add_parser(commands: Any) -> None:
    """Adds ``bench`` to the subcommands."""
    parser = commands.add_parser(
        "bench",
        help="time safekern beside plain PyTorch on this machine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no compiled baselines, few repeats")
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"some of {' '.join(_OPS)} (default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, help="(default: both)")
    parser.add_argument("--elements", type=options.number, help="weights per op (default: 64e6)")
    parser.add_argument(
        "--model-params", type=options.number, help="of whole models (default: 20e6; 100e6 with --memory)"
    )
    parser.add_argument("--ratios", nargs="+", type=options.ratio, metavar="R", help="(default: 0.001 0.01 0.05)")
    parser.add_argument(
        "--threads", nargs="+", type=options.number, metavar="N", help="(default: 1 and as many as torch uses)"
    )
    parser.add_argument("--repeats", type=options.number, help="timed runs of each contender (default: 9)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compiled baselines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as .csv or .json")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the results there (needs matplotlib)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--scaling", action="store_true", help="safekern alone, at growing sizes and ratios")
    modes.add_argument("--memory", action="store_true", help="peak memory of whole training runs, a process each")
    modes.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files written by --out")
    parser.add_argument("--tolerance", type=options.not_negative, help="of --compare (default: 0.1)")
    parser.add_argument("--score-memory", type=options.number, help="of --memory: bytes that scoring may take")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit status: 1 where ``--compare`` found something slower.

    Raises:
        SafekernError: an option is wrong or a result is; found out before the long work starts, where it can be.
    """
    # Imported here, so that other commands start without them.
    from safekern import plots
    from safekern.bench import measure, results

    mode = next((mode for mode in ("scaling", "memory", "compare") if getattr(args, mode)), "usual")
    given = [option for option in _MEANT_FOR if not any(getattr(args, option) is absent for absent in (None, False))]
    idle = [option for option in given if mode not in _MEANT_FOR[option]]
    if idle:
        named = ", ".join(f"--{option.replace('_', '-')}" for option in idle)
        raise InvalidArgumentError(
            f"{named}: means nothing {'here' if mode == 'usual' else f'to --{mode}'}, leave it out"
        )
    if args.compare:
        return _compare(args.compare, 0.1 if args.tolerance is None else args.tolerance)
    unknown = [op for op in args.ops or () if op not in _OPS]
    if unknown:
        raise InvalidArgumentError(f"no op {', '.join(unknown)}: there are {', '.join(_OPS)}")
    growing = {**_STREAMING, **dict.fromkeys(_SPARSE)}
    if args.scaling and not growing.keys() >= set(args.ops or ()):
        raise InvalidArgumentError(f"--scaling is for {', '.join(growing)}: give no others with --ops")
    if args.scaling and args.elements and args.ops and not set(_SPARSE) & set(args.ops):
        raise InvalidArgumentError(
            f"--elements is the size at which ratios grow, of {', '.join(_SPARSE)}: leave it out, or give one of them"
        )
    options.device(args.device)
    if args.out:
        if args.out.suffix not in results.MARKS:
            raise InvalidArgumentError(
                f"--out {args.out}: the name must end in {' or '.join(results.MARKS)}, which says how it is written"
            )
        options.check_output("--out", args.out, (), results.MARKS[args.out.suffix])
    if args.plot:
        plots.check_available()
        options.prepare_folder(args.plot, "plot.png")
    if args.memory:
        return _memory(args)
    if args.device == "cpu" and not measure.keeps_memory():
        return measure.restart_with_allocator(args.argv)
    _run_cases(args)
    return 0


def _run_cases(args: argparse.Namespace) -> None:
    import torch

    from safekern.bench import baselines, cases, measure, results

    repeats = args.repeats or (3 if args.quick else 9)
    threads = args.threads or sorted({1, torch.get_num_threads()})
    compiling = not (args.quick or args.no_compile or args.scaling)
    environment = measure.environment(args.device)
    for key, value in environment.items():
        print(f"{key:10} {value}")
    if compiling and (why := baselines.why_not_compile()):
        print(f"compiled baselines are left out: {why}")
    bandwidths = results.Bandwidths(10**6 if args.quick else 64 * 10**6, args.device)
    for count in threads:
        known = bandwidths[count]
        print(f"bandwidth, {counted(count, 'thread')}: copy {known.copy:.1f} GB/s, read {known.read:.1f} GB/s")

    rows: list[Row] = []
    elements = args.elements or (200_000 if args.quick else 64_000_000)
    base = cases.Setting(elements=elements, device=args.device, compile=compiling)
    for op, setting in (_growing if args.scaling else _usual)(args, base):
        ran = results.run(
            op, setting, threads=threads, repeats=repeats, bandwidths=bandwidths, only_safekern=args.scaling
        )
        made = [results.rounded(row) for row in ran]
        if op not in {row.op for row in rows}:
            print(f"\n{op}: {cases.OPS[op].title}\n{results.legend(made)}")
        print(f"\n{results.table(made)}", flush=True)
        rows += made
    if not rows:
        raise BenchmarkError("nothing was timed, because nothing fits this machine's memory: use --quick")
    if args.scaling:
        _show_slopes(rows)
    if args.out:
        results.write(args.out, rows, environment)
    if args.plot:
        _plot(rows, args)


def _usual(args: argparse.Namespace, base: "Setting") -> "Iterable[tuple[str, Setting]]":
    """Every op, with the dtypes and ratios that matter to it."""
    from safekern.bench import cases

    model_params = args.model_params or (200_000 if args.quick else 20_000_000)
    ratios, dtypes = args.ratios or ([0.001] if args.quick else [0.001, 0.01, 0.05]), args.dtypes or _DTYPES
    for op in args.ops or cases.OPS:
        kind = cases.OPS[op]
        size = model_params if kind.whole_model else base.elements
        for dtype in dtypes if kind.dtypes else dtypes[:1]:
            for ratio in ratios if kind.ratios else ratios[:1]:
                yield op, replace(base, dtype=dtype, elements=size, ratio=ratio)


def _growing(args: argparse.Namespace, base: "Setting") -> "Iterable[tuple[str, Setting]]":
    """Settings of growing size, as far as memory reaches, and then of growing ratio."""
    from safekern.bench import cases, measure

    sizes, dtypes = [10_000, 40_000, 160_000] if args.quick else _SIZES, args.dtypes or _DTYPES
    middle = replace(base, ratio=0.01)
    for op in [op for op in args.ops or _STREAMING if op in _STREAMING]:
        for dtype in dtypes if cases.OPS[op].dtypes else dtypes[:1]:
            for size in sizes:
                tensors, more = _STREAMING[op]
                need = size * (tensors * cases.DTYPES[dtype].itemsize + more)
                if need > 0.8 * measure.available_memory():
                    print(f"\n{op} {dtype} {size:,} is left out: it needs about {need / 1e9:.1f} GB")
                    continue
                yield op, replace(middle, dtype=dtype, elements=size)
    for op in [op for op in args.ops or _SPARSE if op in _SPARSE]:
        for ratio in _RATIOS:
            yield op, replace(base, dtype=dtypes[-1], ratio=ratio)


def _along(rows: "Sequence[Row]", axis: str) -> "list[Row]":
    """Those rows in which only that axis changes: sizes at 1%, or ratios at the most common size."""
    if axis == "elements":
        return [row for row in rows if row.op in _STREAMING and row.ratio in (0.0, 0.01)]
    sizes = [row.elements for row in rows if row.ratio and row.ratio != 0.01]
    return [row for row in rows if row.op in _SPARSE and row.ratio and row.elements in sizes]


def _show_slopes(rows: "Sequence[Row]") -> None:
    from safekern.bench import results

    for axis in ("elements", "selected"):
        slopes = results.slopes(_along(rows, axis), axis)
        if slopes:
            print(f"\ntime grows with {axis} to the power of (over the upper two decades)")
        for (op, dtype, threads), slope in slopes.items():
            print(f"  {op:12}{dtype:10}{counted(threads, 'thread'):10} {slope:6.2f}")


def _plot(rows: "Sequence[Row]", args: argparse.Namespace) -> None:
    from safekern.bench import figures

    if not args.scaling:
        figures.plot_ops(rows, args.plot)
        return
    for axis in ("elements", "selected"):
        if along := _along(rows, axis):
            figures.plot_scaling(along, axis, args.plot / f"scaling_{axis}.png")


def _compare(paths: Sequence[Path], tolerance: float) -> int:
    from safekern.bench import results

    old, new = (results.read(path) for path in paths)
    for key in ("device", "allocator"):
        if old.environment.get(key) != new.environment.get(key):
            print(f"note: {key} differs: {old.environment.get(key)} and {new.environment.get(key)}")
    print(f"{old.environment.get('commit')} -> {new.environment.get('commit')}, speed against the baseline of each")
    verdicts = results.compare(old, new, tolerance)
    columns = [Column("op"), Column("dtype"), Column("elements", "{:,}"), Column("ratio", "{:.3g}"), Column("threads")]
    changes = [None if math.isnan(verdict.change) else verdict.change - 1 for verdict in verdicts]
    lines = [
        (*found.row.setting[:3], found.row.ratio or None, found.row.threads, change, found.verdict)
        for found, change in zip(verdicts, changes, strict=True)
    ]
    print(Table([*columns, Column("change", "{:+.1%}"), Column("verdict")], lines))
    slower = sum(verdict.verdict == "slower" for verdict in verdicts)
    print(f"{slower} of {len(verdicts)} slower")
    return int(slower > 0)


def _memory(args: argparse.Namespace) -> int:
    from safekern.bench import measure, memory, results

    params = args.model_params or (200_000 if args.quick else 100_000_000)
    usages = memory.measure_memory(params, score_memory=args.score_memory)
    print(memory.table(usages))
    if args.out:
        results.write(args.out, usages, measure.environment())
    return 0
