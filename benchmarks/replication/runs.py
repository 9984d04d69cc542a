"""Runs and their JSON files: a finished one is not repeated, so an interrupted experiment goes on."""

import contextlib
import functools
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import torch
import transformers
from tqdm import tqdm

import safekern
from safekern import files
from safekern.bench import measure
from safekern.errors import FileAccessError, FileFormatError, SafekernError
from safekern.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .lab import Lab

Row = dict[str, Any]
Found = dict[str, Any]


class OtherSettingsError(safekern.SafekernError):
    """A result file belongs to a run with other settings."""


@dataclass(frozen=True)
class Plan:
    """What the options say about the runs of every experiment.

    Attributes:
        seeds: Of batch order, random masks and noise. The main runs take all, others the first.
        steps: After which everything is measured; None for each experiment's own.
        tasks: What SPA fine-tunes on.
        gsm8k: Which problems those of GSM8K are (`Data.gsm8k_digest`), None without.
        guard: The model that judges, None for the one that is scored.
    """

    seeds: Sequence[int]
    steps: Sequence[int] | None
    tasks: Sequence[str]
    gsm8k: str | None
    guard: str | None


@dataclass(frozen=True)
class Run:
    """One independent piece of an experiment.

    Attributes:
        experiment: Its folder.
        name: Its file, without suffix.
        settings: What distinguishes it from the others, as JSON can hold it.
        perform: Measures, and puts what it finds into the record.
    """

    experiment: str
    name: str
    settings: Mapping[str, Any]
    perform: Callable[["Lab", "Record"], None]


class Experiment(NamedTuple):
    """What is run, and how what was found is shown.

    Attributes:
        runs: those of a plan, in the order of what they tell.
        tables: titles and tables of what was found, in the short form of a README or with every column.
        figure: a plot of what was found in the results of a model, None where there is nothing to plot yet.
        plots_too: experiments whose results are in the plot as well.
    """

    runs: Callable[[Plan], list[Run]]
    tables: Callable[[Sequence[Found], bool], Iterable[tuple[str, Table]]]
    figure: Callable[[Sequence[Found], Path], "Figure | None"]
    plots_too: tuple[str, ...] = ()


class Record:
    """The JSON file of a run, rewritten with every row.

    Attributes:
        path: The file.
        settings: Of the run.
        rows: What was measured, in order.
        facts: What is true of the whole run.
        finished: Whether there is nothing left to do.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], device: str) -> None:
        """Takes over what an earlier attempt has measured, here or elsewhere.

        Raises:
            OtherSettingsError: The file is of another run.
            FileFormatError: The file is damaged.
        """
        self.path = path
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}
        self.finished = False
        # Through JSON, as those that are read have gone.
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self._earlier, self._began = 0.0, time.perf_counter()
        self._circumstances = _circumstances(device)
        self._attempts: list[dict[str, Any]] = []
        if not path.exists():
            return
        found = _load(path)
        _check_same(path, found["settings"], self.settings, {**found["settings"], **self.settings})
        self.rows, self.facts, self.finished = found["rows"], found["facts"], found["finished"]
        self._earlier = found["seconds"]
        if self.rows:
            self._attempts = [*found.get("attempts", []), {key: found.get(key) for key in self._circumstances}]

    def add(self, row: Row) -> None:
        """Adds a row and writes the file."""
        self.rows.append(row)
        self._write()

    def keep(self, rows: Sequence[Row]) -> None:
        """Goes on from some of the rows that earlier attempts have left."""
        self.rows = list(rows)
        if not rows:
            self._attempts.clear()

    def replace(self, rows: Sequence[Row]) -> None:
        """Writes all rows at once, in place of what earlier attempts have left."""
        self.keep([])
        self.rows += rows
        self._write()

    def finish(self) -> None:
        """Marks the run as done."""
        self.finished = True
        self._write()

    def _write(self) -> None:
        content = {
            "settings": self.settings,
            "facts": self.facts,
            "rows": self.rows,
            "finished": self.finished,
            "seconds": round(self._earlier + time.perf_counter() - self._began, 1),
            **self._circumstances,
            # Where and with what the rows before those of this process were measured.
            **({"attempts": self._attempts} if self._attempts else {}),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.path) as file:
            file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether the making of a file is this process's alone within the context; a claim ends with its process, too.

    Args:
        path: The file, which need not exist.
        wait: Wait until no other process has claimed it; then the answer is always True.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir(), f"safekern-{name}.lock"), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def execute(
    runs: Sequence[Run], folder: Path, shared: Mapping[str, Any], device: str, lab: Callable[[], "Lab"]
) -> list[str]:
    """Performs the runs that are not finished, in order. Those that another process is at are left to it.

    Args:
        runs: Those of one or several experiments.
        folder: Where each experiment has its folder.
        shared: Settings of all runs.
        device: Where the lab computes.
        lab: Gives the model and data; not called where nothing is to be done.

    Returns:
        Those that failed, after saying why; the others were performed.

    Raises:
        OtherSettingsError: A file in the folder is of a run with other settings, or with other data, be it that of a
            run that is not among these: they would be compared. Nothing was run.
    """
    for path in sorted(folder.glob("*/*.json")):
        _check_same(path, _load(path)["settings"], shared, shared)
    records = [Record(folder / run.experiment / f"{run.name}.json", {**shared, **run.settings}, device) for run in runs]
    todo = [(run, record.path) for run, record in zip(runs, records, strict=True) if not record.finished]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished", flush=True)
    failed: list[str] = []
    for run, path in tqdm(todo, "runs", unit="run"):
        with claimed(path, wait=False) as mine:
            # Made anew, so that its clock starts now, and another process may have finished it.
            record = Record(path, {**shared, **run.settings}, device)
            if not mine or record.finished:
                continue
            tqdm.write(f"{datetime.now(UTC):%H:%M} {run.experiment}/{run.name}")
            try:
                run.perform(lab(), record)
            except SafekernError as error:
                tqdm.write(f"failed: {run.experiment}/{run.name}: {error}", file=sys.stderr)
                failed.append(f"{run.experiment}/{run.name}")
                continue
            record.finish()
    return failed


def read(folder: Path, experiment: str) -> list[Found]:
    """What the runs of an experiment have measured so far, by name of file."""
    return [_load(path) for path in sorted((folder / experiment).glob("*.json"))]


def _check_same(path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any], keys: Iterable[str]) -> None:
    other = [key for key in keys if before.get(key) != wanted.get(key)]
    if other:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {wanted.get(key)!r}" for key in other)
        raise OtherSettingsError(f"{path}: belongs to a run with other settings: {changes}. Use another --out")


def _load(path: Path) -> Found:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(f"{path}: not JSON ({error}); remove it, and its run is done again") from error
    if not isinstance(found, dict) or not found.keys() >= {"settings", "facts", "rows", "finished", "seconds"}:
        raise FileFormatError(f"{path}: not the file of a run; remove it, and its run is done again")
    return found


@functools.cache
def _circumstances(device: str) -> dict[str, Any]:
    """When, where and with what."""
    where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": measure.commit(Path(__file__)),
        "device": f"{where}, {torch.get_num_threads()} threads",
        "versions": {
            "safekern": safekern.__version__,
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        },
    }
