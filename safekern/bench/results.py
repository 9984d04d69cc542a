"""Rows of results: made by running cases, shown, written, read and compared; ``figures`` draws them."""

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from safekern import files
from safekern.bench import measure
from safekern.bench.cases import OPS, Setting
from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError
from safekern.tables import Column, Table, counted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SAFEKERN = "safekern"


@dataclass(frozen=True)
class Row:
    """One contender at one setting.

    Attributes:
        op: name in ``cases.OPS``.
        dtype: of weights and gradients, empty where it does not matter.
        elements: how many weights.
        ratio: share of them in the mask, 0 where there is none.
        threads: of the CPU.
        contender: who ran.
        ms: median time of a run.
        spread: distance between the quartiles as a share of the median.
        speedup: the baseline's time over this one, 0 where no baseline ran.
        gb_per_s: what it has to move at least, over the time; 0 where that is not what it is bound by.
        of_copy: that as a share of the measured bandwidth of ``copy_``.
        of_read: that as a share of the measured bandwidth of reading.
        peak_bytes: memory that a run needs above what is held before it, -1 where the system does not tell.
        state_bytes: memory held between runs, weights and gradients apart.
        detail: another figure.
        what: what the contender is.
    """

    op: str
    dtype: str
    elements: int
    ratio: float
    threads: int
    contender: str
    ms: float
    spread: float
    speedup: float
    gb_per_s: float
    of_copy: float
    of_read: float
    peak_bytes: int
    state_bytes: int
    detail: str
    what: str

    @property
    def setting(self) -> tuple[str, str, int, float, int]:
        """What rows to be compared have in common."""
        return self.op, self.dtype, self.elements, self.ratio, self.threads


@dataclass(frozen=True)
class Results:
    """Rows, and where they were measured (see :func:`measure.environment`)."""

    rows: list[Row]
    environment: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """How one of safekern's rows differs between two files.

    Attributes:
        row: the newer one, or the only one.
        verdict: ``"same"``, ``"faster"``, ``"slower"``, ``"only in the old"`` or ``"only in the new"``.
        change: the new speed over the old.
    """

    row: Row
    verdict: str
    change: float


class Bandwidths:
    """The machine's bandwidth by the number of threads, measured once each."""

    def __init__(self, numel: int, device: str) -> None:
        self._numel = numel
        self._device = device
        self._known: dict[int, measure.Bandwidth] = {}

    def __getitem__(self, threads: int) -> measure.Bandwidth:
        if threads not in self._known:
            with measure.threads(threads):
                self._known[threads] = measure.bandwidth(self._numel, self._device)
        return self._known[threads]


def run(
    op: str,
    setting: Setting,
    *,
    threads: Sequence[int],
    repeats: int,
    bandwidths: Bandwidths,
    only_safekern: bool = False,
) -> Iterator[Row]:
    """Checks an op at a setting, then times its contenders, interleaved.

    Args:
        op: a name of ``cases.OPS``.
        setting: what to build the case for.
        threads: numbers of threads, one after the other.
        repeats: timed runs of each contender.
        bandwidths: what GB/s are a share of.
        only_safekern: leave the baselines out.

    Raises:
        BenchmarkError: safekern's result is wrong; nothing is timed.
    """
    case = OPS[op].build(setting)
    case.check()
    contenders = [next(case.contenders)] if only_safekern else list(case.contenders)
    runs = {contender.name: contender.run for contender in contenders}
    for count in threads:
        with measure.threads(count):
            # The first run allocates what lasts, which is no part of the peak of a run.
            for contender in contenders:
                contender.run()
            peaks = {name: measure.peak_memory(run, setting.device) for name, run in runs.items()}
            timings = measure.interleaved(runs, repeats, setting.device)
        baseline = 0.0 if only_safekern else timings[contenders[1].name].median
        for contender in contenders:
            timing, peak = timings[contender.name], peaks[contender.name]
            rate = contender.bytes / timing.median / 1e9 if contender.bytes else 0.0
            yield Row(
                op=op,
                dtype=setting.dtype if OPS[op].dtypes else "",
                elements=case.elements,
                ratio=setting.ratio if OPS[op].ratios else 0.0,
                threads=count,
                contender=contender.name,
                ms=1e3 * timing.median,
                spread=timing.spread,
                speedup=baseline / timing.median,
                gb_per_s=rate,
                of_copy=rate / bandwidths[count].copy,
                of_read=rate / bandwidths[count].read,
                peak_bytes=-1 if peak is None else peak,
                state_bytes=contender.state(),
                detail=contender.detail,
                what=" ".join(contender.what.split()),
            )


_COLUMNS = (
    Column("contender"),
    Column("ms", "{:.3f}"),
    Column("spread", "{:.0%}"),
    Column("speedup", "{:.2f}x"),
    Column("gb_per_s", "{:.1f}", "GB/s"),
    Column("of_copy", "{:.0%}"),
    Column("of_read", "{:.0%}"),
    Column("peak", "{:.1f}", "peak MB"),
    Column("state", "{:.1f}", "state MB"),
    Column("detail"),
)


def table(rows: Iterable[Row]) -> str:
    """The rows for people, one block per op and setting."""
    blocks = []
    for (op, dtype, elements, ratio, threads), group in itertools.groupby(rows, lambda row: row.setting):
        selected = f"{ratio:.3g} selected" if ratio else ""
        shown = filter(None, (dtype, f"{elements:,} elements", selected, counted(threads, "thread")))
        heading = f"{op}: {OPS[op].title} ({', '.join(shown)})"
        blocks.append(f"{heading}\n{Table(_COLUMNS, [_cells(row) for row in group])}")
    return "\n\n".join(blocks)


def _cells(row: Row) -> tuple[Any, ...]:
    """The values under :data:`_COLUMNS`, None for what was not measured."""
    rates = (row.gb_per_s, row.of_copy, row.of_read) if row.gb_per_s else (None, None, None)
    peak = row.peak_bytes / 1e6 if row.peak_bytes >= 0 else None
    return row.contender, row.ms, row.spread, row.speedup or None, *rates, peak, row.state_bytes / 1e6, row.detail


def legend(rows: Iterable[Row]) -> str:
    """What each contender is."""
    return "\n".join(dict.fromkeys(f"  {row.contender}: {row.what}" for row in rows))


MARKS = {".csv": b",commit,date,allocator\n", ".json": b'{\n "environment": {'}
"""By suffix, what stands at the beginning of every file that :func:`write` writes."""


def write(path: files.StrPath, rows: "Sequence[DataclassInstance]", environment: Mapping[str, str]) -> None:
    """Writes rows with device, versions and commit: JSON for a path that ends in ``.json``, else CSV.

    Args:
        path: the file to write or replace.
        rows: dataclasses of one kind, at least one.
        environment: where they were measured (see :func:`measure.environment`).

    Raises:
        FileAccessError: the path cannot be written.
    """
    path, records = Path(path), [asdict(row) for row in rows]
    if path.suffix == ".json":
        text = json.dumps({"environment": dict(environment), "rows": records}, indent=1)
    else:
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, [*records[0], *environment], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**record, **environment} for record in records)
        text = lines.getvalue()
    with files.replacing(path) as file:
        file.write(text.encode())


def read(path: files.StrPath) -> Results:
    """Reads what :func:`write` wrote.

    Raises:
        FileAccessError: the file cannot be read.
        FileFormatError: it holds no results.
    """
    path = Path(path)
    types = get_type_hints(Row)
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return Results([Row(**row) for row in content["rows"]], dict(content["environment"]))
        with path.open(newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file))
        rows = [Row(**{name: kind(record[name]) for name, kind in types.items()}) for record in records]
        return Results(rows, {key: value for key, value in records[0].items() if key not in types})
    except OSError as error:
        raise FileAccessError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        # Not what it holds, which may be megabytes of binary, as the text of a UnicodeDecodeError does.
        raise FileFormatError(
            f"{path} holds no results of safekern bench ({type(error).__name__}): write it with --out"
        ) from error


def compare(old: Results, new: Results, tolerance: float) -> list[Verdict]:
    """Compares safekern's rows of two files by their speed against the baseline of the same run.

    That cancels how fast the machine was. On one device the time has to say the same, and the share of the copy
    bandwidth of each run: where the operating system puts a buffer can make memory, and whoever uses it, half as fast.
    Rows without a baseline are compared by the other two. A change within the tolerance and the spread of both rows is
    none.

    Args:
        old: results of one commit.
        new: results of another, on the same kind of machine.
        tolerance: the share that speed may differ by, such as 0.1.

    Raises:
        InvalidArgumentError: they have no setting in common.
    """
    before, after = ({row.setting: row for row in r.rows if row.contender == SAFEKERN} for r in (old, new))
    if not before.keys() & after.keys():
        raise InvalidArgumentError("the two files have no op and setting in common: run both with the same options")
    verdicts = []
    for setting in {**before, **after}:
        was, now = before.get(setting), after.get(setting)
        if was is None or now is None:
            row = was or now
            assert row is not None
            verdicts.append(Verdict(row, f"only in the {'old' if was else 'new'}", math.nan))
            continue
        changes = [now.speedup / was.speedup] if was.speedup and now.speedup else []
        if not changes or old.environment.get("device") == new.environment.get("device"):
            changes.append(was.ms / now.ms)
            changes += [now.of_copy / was.of_copy] if was.of_copy and now.of_copy else []
        margin = 1 + tolerance + was.spread + now.spread
        verdict = "slower" if max(changes) * margin < 1 else "faster" if min(changes) > margin else "same"
        verdicts.append(Verdict(now, verdict, changes[0]))
    return verdicts


def slopes(rows: Iterable[Row], axis: str) -> dict[tuple[str, str, int], float]:
    """The exponent with which safekern's time grows along an axis, fitted over its upper two decades.

    Args:
        rows: at several sizes or ratios.
        axis: ``"elements"``, or ``"selected"`` for elements times ratio.

    Returns:
        For each op, dtype and number of threads with at least two points: 1 is linear.
    """
    fitted = {}
    for key, points in series(rows, axis).items():
        # Below, caches and the cost of the call itself are measured.
        kept = [(x, y) for x, y in points if x >= points[-1][0] / 100]
        if len(kept) >= 2:
            x, y = np.log(np.array(kept)).T
            fitted[key] = float(np.polyfit(x, y, 1)[0])
    return fitted


def series(rows: Iterable[Row], axis: str) -> dict[tuple[str, str, int], list[tuple[float, float]]]:
    """Points of safekern's time in milliseconds along an axis, for each op, dtype and number of threads.

    Args:
        rows: at several sizes or ratios.
        axis: ``"elements"``, or ``"selected"`` for elements times ratio.
    """
    found: dict[tuple[str, str, int], dict[float, float]] = {}
    for row in rows:
        x = row.elements if axis == "elements" else row.elements * row.ratio
        if row.contender == SAFEKERN and x:
            found.setdefault((row.op, row.dtype, row.threads), {})[x] = row.ms
    return {key: sorted(points.items()) for key, points in found.items()}


def rounded(row: Row) -> Row:
    """The row with as many digits as mean something."""
    digits: dict[str, Any] = {
        field.name: float(f"{getattr(row, field.name):.5g}") for field in fields(row) if field.type in (float, "float")
    }
    return replace(row, **digits)
