"""The claims of arXiv 2604.08297, measured: one command per experiment, or ``all``.

    python -m benchmarks.replication set                       # SmolLM2, the package's own prompts, 2 CPU cores
    python -m benchmarks.replication all --model gemma3 --device cuda
    python -m benchmarks.replication table                     # redraw tables and plots from the JSON files

An experiment is a list of runs. Each writes one JSON file, and one whose file is finished is not repeated: an
interrupted command goes on when it is given again. What takes long to make (scores, aligned models) is in --cache.
On a GPU one small model keeps one processor core busy and the GPU idle: --jobs 8.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from safekern.cli import options
from safekern.errors import InvalidArgumentError, SafekernError

from . import report
from .judge import JUDGE
from .lab import Data, Lab, label
from .masks import PROMPTS, WHERE
from .noise import PERTURB
from .runs import Experiment, Plan, execute
from .set import RATIOS_TRIED, SET, WEIGHT
from .spa import CHAT, GSM8K, SPA

_RESULTS = Path(__file__).parent.parent / "results" / "replication"

EXPERIMENTS: dict[str, Experiment] = {
    "set": SET,
    "prompts": PROMPTS,
    "where": WHERE,
    "perturb": PERTURB,
    "ratio": RATIOS_TRIED,
    "weight": WEIGHT,
    "spa": SPA,
    "judge": JUDGE,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = _parser().parse_args(arguments)
    folder = args.out / label(args.model)
    names = list(EXPERIMENTS) if "all" in args.experiment else [name for name in args.experiment if name != "table"]
    failed = _perform(names, args, folder, sys.argv[1:] if arguments is None else arguments) if names else ""
    # By one process where several measure, and also where a run failed that others do not depend on.
    if not args.worker and (not failed or any(folder.glob("*/*.json"))):
        report.write(EXPERIMENTS, EXPERIMENTS if "table" in args.experiment else names, folder)
        if args.readme:
            report.update(EXPERIMENTS, args.readme, folder)
    if failed:
        raise SafekernError(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all", "table"], nargs="+")
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3, or what safekern --model takes")
    parser.add_argument(
        "--seeds",
        type=options.seed,
        nargs="+",
        default=[0, 1, 2],
        help="the main runs take all of them, the others the first (default: 0 1 2)",
    )
    parser.add_argument(
        "--steps", type=options.number, nargs="+", help="of training, after which everything is measured"
    )
    parser.add_argument(
        "--only", type=_pattern, default=_pattern(""), metavar="REGEX", help="only runs in whose name this is found"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], default="bf16", help="of matrix products; weights are fp32"
    )
    parser.add_argument("--pairs", type=Path, help="harmful prompts with refusals to train on (default: built-in)")
    parser.add_argument(
        "--goals", type=Path, help="harmful prompts, of which the last 100 are for evaluation (default: built-in)"
    )
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's training problems, for spa")
    parser.add_argument("--guard", help="the model that judges in judge (default: the one that is scored)")
    parser.add_argument(
        "--held-out",
        type=options.number,
        default=64,
        help="prompts of each kind to evaluate on (default: 64, all that are built in; of --goals up to 100)",
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="(default: benchmarks/results/replication)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "safekern" / "replication")
    parser.add_argument(
        "--jobs", type=options.number, default=1, help="processes, each taking the next run (default: 1)"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="also put tables between the marks in this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _perform(names: Sequence[str], args: argparse.Namespace, folder: Path, arguments: Sequence[str]) -> str:
    """Performs the runs that are not finished; says what failed."""
    options.device(args.device)
    data = Data.read(args.pairs, args.goals, args.gsm8k, args.held_out)
    tasks = [CHAT, *([GSM8K] if data.gsm8k is not None else [])]
    plan = Plan(args.seeds, sorted(set(args.steps)) if args.steps else None, tasks, data.gsm8k_digest, args.guard)
    runs = [run for name in names for run in EXPERIMENTS[name].runs(plan) if args.only.search(run.name)]
    if not runs:
        raise InvalidArgumentError(f"--only {args.only.pattern}: found in the name of no run of {', '.join(names)}")
    if args.jobs > 1:
        return _in_parallel([*arguments, "--jobs", "1", "--worker"], args.jobs)
    shared = {"model": folder.name, "data": data.digest, "precision": args.precision}
    lab = functools.cache(lambda: Lab(args.model, data, args.device, args.precision, args.cache))
    failed = execute(runs, folder, shared, args.device, lab)
    return f"{len(failed)} of {len(runs)} runs failed, as was said: {', '.join(failed)}" if failed else ""


def _pattern(text: str) -> re.Pattern[str]:
    """A regular expression of the command line."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error


def _in_parallel(arguments: Sequence[str], jobs: int) -> str:
    """Runs the command in several processes, which share its runs, and waits for them; says how many failed."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, "-m", "benchmarks.replication", *arguments]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path}
    processes = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    try:
        failed = sum(process.wait() != 0 for process in processes)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    return f"{failed} of {jobs} processes failed, as was said; what is finished is kept" if failed else ""


if __name__ == "__main__":
    try:
        main()
    except SafekernError as error:
        raise SystemExit(f"error: {error}") from None
