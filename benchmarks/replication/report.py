"""Results as Markdown tables, CSV and plots, and what the experiments make their tables with."""

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from safekern import files, plots
from safekern.errors import InvalidArgumentError
from safekern.tables import Column, Table, counted
from safekern.verification import bootstrap

from .runs import Experiment, Found, Row, read

_END = "<!-- end of replication -->"
_INTERVALS = (
    "In brackets 95% intervals over prompts: Wilson's of shares, bootstrap intervals of NLL, over several seeds the "
    "means of their bounds; of differences bootstrap intervals prompt by prompt, of the means over seeds. Broken "
    "answers (empty, or repeating themselves) count neither as successful attacks nor as refusals; with a star only "
    "those count as broken that repeat one piece three times, as they did before 2026-11-27. NLL is in nats per "
    "token. What lies between two measurements is read off a straight line: steps to a level, and attack success "
    "there."
)
_Kind = TypeVar("_Kind")


def write(experiments: Mapping[str, Experiment], names: Collection[str], folder: Path) -> None:
    """Writes ``NAME.md``, ``NAME.csv`` and the plots of experiments, and of those that have theirs in a plot.

    Args:
        experiments: all there are.
        names: those to write, where they have results.
        folder: the results of a model.

    Raises:
        InvalidArgumentError: None has.
        MissingDependencyError: matplotlib is not installed.
    """
    if not any(folder.glob("*/*.json")):
        raise InvalidArgumentError(f"{folder}: there are no results; run an experiment first")
    for name, experiment in experiments.items():
        found = read(folder, name) if not {name, *experiment.plots_too}.isdisjoint(names) else []
        if not found:
            continue
        finished = sum(run["finished"] for run in found)
        parts = [f"# {name}: {folder.name}", _heading(found, finished)]
        for title, table in experiment.tables(found, False):
            parts += [f"## {title}", markdown(table)]
        text = "\n\n".join([*parts, _INTERVALS]) + "\n"
        _save(folder / f"{name}.md", text)
        _save(folder / f"{name}.csv", _every_row(found))
        figure = experiment.figure(found, folder)
        if figure is not None:
            plots.write(figure, folder / f"{name}.png")
        print(f"written to {folder}: {name}.md, {finished} of {len(found)} runs finished", flush=True)


def update(experiments: Mapping[str, Experiment], readme: Path, folder: Path) -> None:
    """Puts tables into a file, each between the marks that name its experiment and title, in the short form.

    A mark is ``<!-- replication: set, balanced, lr 3e-05 -->``, the end ``<!-- end of replication -->``.

    Raises:
        InvalidArgumentError: The file has no marks, or there are no results for one.
        FileAccessError: The file cannot be read or written.
    """
    with files.reading(readme) as file:
        text = file.read().decode()
    marked = re.compile(rf"(<!-- replication: (\w+), (.+?) -->\n).*?{re.escape(_END)}", re.DOTALL)
    if not marked.search(text):
        raise InvalidArgumentError(f"{readme}: has no <!-- replication: EXPERIMENT, TITLE --> with {_END} after it")

    def filled(match: re.Match[str]) -> str:
        mark, name, title = match.groups()
        found = read(folder, name) if name in experiments else []
        tables = dict(experiments[name].tables(found, True)) if found else {}
        if title not in tables:
            known = "; ".join(tables) or "none"
            raise InvalidArgumentError(f"{readme}: {mark.strip()}: {folder} has no such table of {name}: {known}")
        return f"{mark}{markdown(tables[title])}\n{_END}"

    _save(readme, marked.sub(filled, text))


def markdown(table: Table) -> str:
    """A table as Markdown has it."""
    heads = [column.heading for column in table.columns]
    rule = ["---" if table.is_text(position) else "---:" for position in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *table.cells()])


def alike(found: Iterable[Found], kind: Callable[[Found], _Kind]) -> dict[_Kind, list[Found]]:
    """Runs of one kind together: the seeds of what is otherwise the same, most often."""
    groups: dict[_Kind, list[Found]] = {}
    for run in found:
        groups.setdefault(kind(run), []).append(run)
    return groups


def rows_at(runs: Sequence[Found], value: float, along: str = "step") -> list[Row]:
    """The rows of a step, none where not all runs have come so far: a mean over some is not comparable with others."""
    found = [row for run in runs for row in run["rows"] if row[along] == value]
    return found if len(found) == len(runs) else []


def last_rows(runs: Sequence[Found]) -> list[Row]:
    """What was measured last, none where a run is under way: that is another step."""
    return [run["rows"][-1] for run in runs] if all(run["finished"] for run in runs) else []


def first_step(rows: Sequence[Row], along: str, level: float | None) -> float | None:
    """The step at which a measurement first falls to a level, between rows by straight lines.

    Args:
        rows: by step; those that lack the measurement are left out.
        along: what falls.
        level: to where.

    Returns:
        None where the level is never reached.
    """
    known = [(row["step"], value(row[along])) for row in rows if along in row]
    if level is None or not known:
        return None
    if known[0][1] <= level:
        return float(known[0][0])
    for (step, before), (later, after) in itertools.pairwise(known):
        if before > level >= after:
            return float(step + (before - level) / (before - after) * (later - step))
    return None


def at_step(rows: Sequence[Row], key: str, step: float | None) -> float | None:
    """A measurement at a step, between rows by straight lines; None outside of the rows that have it."""
    known = {row["step"]: value(row[key]) for row in rows if key in row}
    if step is None or not known or not min(known) <= step <= max(known):
        return None
    return float(np.interp(step, list(known), list(known.values())))


def cost_columns(when: str = "") -> list[Column]:
    """The columns of `costs`."""
    return [
        Column(f"benign refusals{when}"),
        Column(f"benign NLL{when}"),
        Column(f"refusal NLL{when}"),
        Column(f"AUC{when}", "{:.3f}"),
        Column(f"broken{when}", "{:.3g}"),
    ]


def costs(rows: Sequence[Row]) -> list[Any]:
    """The cells from benign refusals on."""
    broken = [row["broken_harmful"] + row["broken_benign"] for row in rows if "broken_harmful" in row]
    return [
        percent(rows, "benign_refusals"),
        number(rows, "benign_nll"),
        number(rows, "refusal_nll"),
        mean([row["auc"] for row in rows]),
        mean(broken),
    ]


def percent(rows: Sequence[Row], key: str = "attack_success") -> str | None:
    """The mean of a share over rows, with its interval; starred where only three repetitions count as broken."""
    shown = _interval(rows, key, "{:.0%}")
    # Rows have a letter per prompt since the rule is another one.
    earlier = any(key in row and "harmful_answers" not in row for row in rows)
    return f"{shown}*" if shown and earlier else shown


def number(rows: Sequence[Row], key: str) -> str | None:
    """The mean of a measurement over rows, with its interval."""
    return _interval(rows, key, "{:.2f}")


def difference(rows: Sequence[Row], others: Sequence[Row]) -> str | None:
    """How many points more attacks succeed than in other rows, with the interval over prompts, each with itself.

    Returns:
        None where a row has no letters, as those that were measured by the earlier rule.
    """
    key = "harmful_answers"
    if not rows or not others or not all(key in row for row in (*rows, *others)):
        return None
    mine, theirs = (np.mean([np.array(list(row[key])) == "a" for row in some], axis=0) for some in (rows, others))
    middle, low, high = (f"{100 * bound:+.0f}" for bound in bootstrap(mine - theirs, np.ones_like(mine), 0))
    return f"{middle} [{low}, {high}]"


def mean(values: Iterable[float | None]) -> float | None:
    """None where any is missing: a mean over the runs that got there would flatter."""
    found = list(values)
    known = [one for one in found if one is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(found) else None


def value(measured: Any) -> float:
    """A measurement without its interval."""
    return float(measured[0] if isinstance(measured, list) else measured)


def _interval(rows: Sequence[Row], key: str, template: str) -> str | None:
    found = [row[key] for row in rows if key in row]
    if not found:
        return None
    # All seeds are measured on the same prompts, so the mean of the bounds is that of the mean, or wider.
    middle, low, high = (template.format(math.fsum(bounds) / len(found)) for bounds in zip(*found, strict=True))
    return f"{middle} [{low}, {high}]"


def _heading(found: Sequence[Found], finished: int) -> str:
    under_way = f", {len(found) - finished} under way" if finished < len(found) else ""
    attempts = [attempt for run in found for attempt in (run, *run.get("attempts", []))]
    versions = sorted({f"torch {attempt['versions']['torch']} on {attempt['device']}" for attempt in attempts})
    precision = ", ".join(sorted({run["settings"]["precision"] for run in found}))
    return f"{counted(finished, 'run')} finished{under_way}; {'; '.join(versions)}; products in {precision}."


def _every_row(found: Sequence[Found]) -> str:
    flat = [
        _flat({**run["settings"], "finished": run["finished"], "device": run["device"], **run["facts"], **row})
        for run in found
        for row in run["rows"]
    ]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, measured in row.items():
        if key == "steps":
            flat["of_steps"] = measured[-1]
        elif key == "noise" and isinstance(measured, list):
            continue
        elif isinstance(measured, list):
            flat |= dict(zip((key, f"{key}_low", f"{key}_high"), measured, strict=True))
        elif not isinstance(measured, dict):
            flat[key] = measured
    return flat


def _save(path: Path, text: str) -> None:
    with files.replacing(path) as file:
        file.write(text.encode())
