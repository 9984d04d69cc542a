"""Tables (Markdown, and CSV with every row) from the JSON files; the plots are in `figures`."""

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safekern import files
from safekern.errors import InvalidArgumentError
from safekern.names import component_order
from safekern.tables import Column, Table, counted

from . import figures
from .noise import SELECTIONS
from .runs import Found, Row, read
from .set import BALANCES, METHODS, by_recipe, untouched_row
from .spa import Comparison, comparisons, least_task_nll

_END = "<!-- end of replication -->"
# What the short table of perturbation shows.
_SHORT_NOISE = (0.0, 0.1, 0.28)
_LEVELS = (0.5, 0.8)
_INTERVALS = (
    "In brackets 95% bootstrap intervals over prompts (over several seeds: from the lowest to the highest bound). "
    "Broken answers (empty or looping) count neither as successful attacks nor as refusals; NLL is in nats per token. "
    "What lies between two measurements is read off a straight line: steps to a level, and attack success there."
)


def write(folder: Path) -> None:
    """Writes ``NAME.md``, ``NAME.csv`` and the plots of every experiment that has results.

    Raises:
        InvalidArgumentError: None has.
    """
    if not any(folder.glob("*/*.json")):
        raise InvalidArgumentError(f"{folder}: there are no results; run an experiment first")
    for experiment, sections in _SECTIONS.items():
        found = read(folder, experiment)
        if not found:
            continue
        finished = sum(run["finished"] for run in found)
        parts = [f"# {experiment}: {folder.name}", _heading(found, finished)]
        for title, table in sections(found, False):
            parts += [f"## {title}", markdown(table)]
        text = "\n\n".join([*parts, _INTERVALS]) + "\n"
        _save(folder / f"{experiment}.md", text)
        _save(folder / f"{experiment}.csv", _every_row(found))
        figures.draw(experiment, found, folder)
        print(f"written to {folder}: {experiment}.md, {finished} of {len(found)} runs finished", flush=True)


def update(readme: Path, folder: Path) -> None:
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
        mark, experiment, title = match.groups()
        sections = _SECTIONS.get(experiment)
        tables = dict(sections(read(folder, experiment), True)) if sections else {}
        if title not in tables:
            known = "; ".join(tables) or "none"
            raise InvalidArgumentError(f"{readme}: {mark.strip()}: {folder} has no such table of {experiment}: {known}")
        return f"{mark}{markdown(tables[title])}\n{_END}"

    _save(readme, marked.sub(filled, text))


def markdown(table: Table) -> str:
    """A table as Markdown has it."""
    heads = [column.heading for column in table.columns]
    rule = ["---" if table.is_text(position) else "---:" for position in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *table.cells()])


def _heading(found: Sequence[Found], finished: int) -> str:
    under_way = f", {len(found) - finished} under way" if finished < len(found) else ""
    versions = sorted({f"torch {run['versions']['torch']} on {run['device']}" for run in found})
    precision = ", ".join(sorted({run["settings"]["precision"] for run in found}))
    return f"{counted(finished, 'run')} finished{under_way}; {'; '.join(versions)}; products in {precision}."


def _set(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    untouched, groups = untouched_row(found), by_recipe(found)
    if untouched is not None and not groups:
        yield "as it was loaded", _tuning_table([], untouched, compact)
    for (recipe, lr), runs in groups.items():
        yield f"{recipe}, lr {lr:g}", _tuning_table(runs, untouched, compact)


def _tuning_table(runs: Sequence[Found], untouched: Row | None, compact: bool, kept: str = "") -> Table:
    """Per method and ratio: attack success after each step, and what it cost after the last one.

    Args:
        runs: of one recipe and learning rate.
        untouched: what was measured before; without it there is nothing to count steps from.
        compact: without the columns that can be missed.
        kept: one that is shown all the same.
    """
    kinds = sorted(
        {(run["settings"]["method"], run["settings"]["ratio"]) for run in runs},
        key=lambda kind: (list(METHODS).index(kind[0]), kind[1]),
    )
    steps = sorted({row["step"] for run in runs for row in run["rows"] if "attack_success" in row})
    goal = _mean(run["rows"][-1]["refusal_nll"][0] for run in runs if run["settings"]["method"] == "random")
    rows: list[list[Any]] = []
    if untouched is not None:
        rows.append(
            ["untouched", None, None, *[_percent([untouched])] * max(1, len(steps)), *_costs([untouched]), None]
        )
    for method, ratio in kinds:
        mine = [run for run in runs if (run["settings"]["method"], run["settings"]["ratio"]) == (method, ratio)]
        at = {step: _at(mine, step) for step in steps}
        reached = [first_step(_with_start(run, untouched), "refusal_nll", goal) for run in mine]
        rows.append(
            [method, ratio, len(mine), *[_percent(at[step]) for step in steps], *_costs(at[steps[-1]]), _mean(reached)]
        )
    last = f" at {steps[-1]}" if steps else ""
    columns = [Column("weights"), Column("ratio", "{:.2%}"), Column("seeds")]
    columns += [Column(f"attack success at {step}") for step in steps or (0,)]
    columns += [
        *_cost_columns(last),
        Column("steps to the refusal NLL that random has at last", "{:.0f}"),
    ]
    missed = tuple({"ratio", "AUC"} - {kept}) if compact else ()
    missed += ("steps",) if untouched is None else ()
    shown = [i for i, column in enumerate(columns) if not column.key.startswith(missed)]
    return Table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _ratio(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    yield (
        "balanced; the ratio of 1% is in the table of set",
        _tuning_table([run for run in found if run["rows"]], None, compact, "ratio"),
    )


def _weight(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    columns = [
        Column("pairs per step"),
        Column("weight of refusals", "{:g}"),
        Column("attack success"),
        *_cost_columns(),
    ]
    ends = {run["settings"]["recipe"]: run["rows"][-1:] for run in found if run["finished"]}
    rows = [
        [size, weight, _percent(ends[recipe]), *_costs(ends[recipe])]
        for recipe, (size, weight) in sorted(BALANCES.items(), key=lambda item: item[1])
        if recipe in ends
    ]
    yield "at the last step, esi 1%, lr 0.0001", Table(columns, rows)


def _prompts(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    keys = ("with_all", "disjoint_halves", "abs", "bf16")
    rows = [row for run in found for row in run["rows"]]
    columns = [
        Column("prompts"),
        Column("with_all", "{:.2f}", "Jaccard with all prompts"),
        Column("disjoint_halves", "{:.2f}", "between its halves"),
        Column("abs", "{:.2f}", "mean of abs with abs of mean"),
        Column("bf16", "{:.3f}", "bf16 with fp32 accumulation"),
    ]
    sizes = sorted({row["prompts"] for row in rows})
    table = [[size, *(_mean([row[key] for row in rows if row["prompts"] == size]) for key in keys)] for size in sizes]
    yield f"means over {counted(len(found), 'order')} of the prompts", Table(columns, table)


def _where(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    for by in ("component", "third"):
        keys = {row[by] for run in found for row in run["rows"] if row["by"] == by}
        names = sorted(keys, key=component_order if by == "component" else None)
        rows = []
        for run in found:
            cells = {row[by]: row for row in run["rows"] if row["by"] == by}
            shown = [
                f"{cells[name]['share']:.0%}, {cells[name]['enrichment']:.2f}x" if name in cells else None
                for name in names
            ]
            settings = run["settings"]
            rows.append([settings["weights"], settings["ratio"], run["facts"].get("jaccard_with_base"), *shown])
        columns = [Column("model"), Column("ratio", "{:.1%}"), Column("Jaccard with base", "{:.2f}")]
        yield (
            f"share of the mask and enrichment over all scored weights, by {by}",
            Table([*columns, *(Column(str(name)) for name in names)], rows),
        )


def _perturb(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    columns = [
        Column("weights"),
        Column("seeds"),
        Column("noise", "{:g}"),
        Column("attack success"),
        *_cost_columns(),
    ]
    rows = []
    for weights in ["none", *SELECTIONS]:
        measured = [row for run in found if run["settings"]["weights"] == weights for row in run["rows"]]
        for noise in sorted({row["noise"] for row in measured if not compact or row["noise"] in _SHORT_NOISE}):
            at = [row for row in measured if row["noise"] == noise]
            rows.append([weights, len(at), noise, _percent(at), *_costs(at)])
    yield "noise in units of each tensor's sigma", Table(columns, rows)


def _spa(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    groups = comparisons(found)
    for group in groups:
        title = f"aligned: {group.aligned}; task: {group.task}; lr {group.lr}; steps {group.steps}"
        yield title, _spa_table(group, least_task_nll(group, groups))
        if not compact:
            yield f"{title}; attack success by step", _by_step(group)


def _spa_table(group: Comparison, best: float | None) -> Table:
    """Attack success and refusal NLL where the task's loss has come to the same point.

    Args:
        group: runs to compare.
        best: the task's NLL at all of its gain; without it there is no point to compare at.
    """
    start, kinds = group.start, group.kinds
    shares = () if best is None else _LEVELS
    levels = [start["task_nll"][0] - share * (start["task_nll"][0] - (best or 0.0)) for share in shares]
    columns = [Column("protected"), Column("ratio", "{:.0%}"), Column("seeds")]
    for share, level in zip(shares, levels, strict=True):
        note = f"at {share:.0%} of the task's gain (NLL {level:.2f})"
        columns += [
            Column(f"steps {note}", "{:.0f}", f"steps {note}"),
            Column(f"refusal NLL {note}", "{:.2f}", "refusal NLL there"),
            Column(f"attack success {note}", "{:.0%}", "attack success there"),
        ]
    columns += [
        Column("last attack success", "{}", "attack success at the last step"),
        Column("last benign refusals", "{}", "benign refusals at the last step"),
        Column("task NLL at the last step"),
    ]
    rows: list[list[Any]] = [["(start)", None, None]]
    rows[0] += [0, start["refusal_nll"][0], start["attack_success"][0]] * len(levels)
    rows[0] += [_percent([start]), _percent([start], "benign_refusals"), _number([start], "task_nll")]
    for (method, ratio), mine in kinds.items():
        row: list[Any] = [method, ratio or None, len(mine)]
        measured = [[start, *run["rows"]] for run in mine]
        for level in levels:
            reached = [first_step(one, "task_nll", level) for one in measured]
            row.append(_mean(reached))
            for key in ("refusal_nll", "attack_success"):
                row.append(_mean([at_step(one, key, step) for one, step in zip(measured, reached, strict=True)]))
        # What a run under way has measured last is not comparable.
        ends = [run["rows"][-1] for run in mine if run["finished"]]
        rows.append([*row, _percent(ends), _percent(ends, "benign_refusals"), _number(ends, "task_nll")])
    return Table(columns, rows)


def _by_step(group: Comparison) -> Table:
    """Attack success after each step at which answers were counted, however well the task is learned by then."""
    columns = [Column("protected"), Column("ratio", "{:.0%}"), Column("seeds")]
    columns += [Column(f"{step} steps") for step in group.steps]
    rows: list[list[Any]] = []
    for (method, ratio), mine in group.kinds.items():
        cells = [_percent(_at(mine, step)) for step in group.steps]
        rows.append([method, ratio or None, len(mine), *cells])
    return Table(columns, rows)


def _at(runs: Sequence[Found], step: int) -> list[Row]:
    """The rows of a step, none where not all runs have come so far: a mean over some is not comparable with others."""
    found = [row for run in runs for row in run["rows"] if row["step"] == step]
    return found if len(found) == len(runs) else []


def _judge(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    rows = []
    steps = sorted({row["step"] for run in found for row in run["rows"] if "attack_success" in row})
    for run in found:
        facts, last = run["facts"], run["rows"][-1:]
        rows.append(
            [
                run["settings"]["guard"] or "the model itself",
                run["settings"]["prompts"],
                facts.get("auc_of_judge"),
                facts.get("jaccard_with_refusal"),
                facts.get("jaccard_of_refusals_with_as_many_prompts"),
                *(_percent([row for row in run["rows"] if row["step"] == step]) for step in steps),
                *_costs(last),
            ]
        )
    columns = [
        Column("guard"),
        Column("prompts"),
        Column("AUC of the judge", "{:.2f}"),
        Column("Jaccard with refusal ESI", "{:.2f}"),
        Column("Jaccard of refusal ESI on as many prompts", "{:.2f}"),
        *(Column(f"attack success at {step}") for step in steps),
        *_cost_columns(),
    ]
    yield "SET on the judge's top 1%, balanced, lr 3e-5", Table(columns, rows)


_SECTIONS: dict[str, Callable[[Sequence[Found], bool], Iterable[tuple[str, Table]]]] = {
    "set": _set,
    "ratio": _ratio,
    "weight": _weight,
    "prompts": _prompts,
    "where": _where,
    "perturb": _perturb,
    "spa": _spa,
    "judge": _judge,
}


def first_step(rows: Sequence[Row], along: str, level: float | None) -> float | None:
    """The step at which a measurement first falls to a level, between rows by straight lines.

    Args:
        rows: by step; those that lack the measurement are left out.
        along: what falls.
        level: to where.

    Returns:
        None where the level is never reached.
    """
    known = [(row["step"], _value(row[along])) for row in rows if along in row]
    for (step, before), (later, after) in itertools.pairwise(known):
        if level is not None and before > level >= after:
            return float(step + (before - level) / (before - after) * (later - step))
    return None


def at_step(rows: Sequence[Row], key: str, step: float | None) -> float | None:
    """A measurement at a step, between rows by straight lines; None outside of the rows that have it."""
    known = {row["step"]: _value(row[key]) for row in rows if key in row}
    if step is None or not known or not min(known) <= step <= max(known):
        return None
    return float(np.interp(step, list(known), list(known.values())))


def _with_start(run: Found, start: Row | None) -> list[Row]:
    return [*([start] if start is not None else []), *run["rows"]]


def _cost_columns(when: str = "") -> list[Column]:
    """The columns of `_costs`."""
    return [
        Column(f"benign refusals{when}"),
        Column(f"benign NLL{when}"),
        Column(f"refusal NLL{when}"),
        Column(f"AUC{when}", "{:.3f}"),
        Column(f"broken{when}", "{:.3g}"),
    ]


def _costs(rows: Sequence[Row]) -> list[Any]:
    """The cells from benign refusals on."""
    broken = [row["broken_harmful"] + row["broken_benign"] for row in rows if "broken_harmful" in row]
    return [
        _percent(rows, "benign_refusals"),
        _number(rows, "benign_nll"),
        _number(rows, "refusal_nll"),
        _mean([row["auc"] for row in rows]),
        _mean(broken),
    ]


def _percent(rows: Sequence[Row], key: str = "attack_success") -> str | None:
    return _interval(rows, key, "{:.0%}")


def _number(rows: Sequence[Row], key: str) -> str | None:
    return _interval(rows, key, "{:.2f}")


def _interval(rows: Sequence[Row], key: str, template: str) -> str | None:
    found = [row[key] for row in rows if key in row]
    if not found:
        return None
    mean = sum(one[0] for one in found) / len(found)
    low, high = min(one[1] for one in found), max(one[2] for one in found)
    return f"{template.format(mean)} [{template.format(low)}, {template.format(high)}]"


def _mean(values: Iterable[float | None]) -> float | None:
    """None where any is missing: a mean over the runs that got there would flatter."""
    found = list(values)
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(found) else None


def _value(measured: Any) -> float:
    return float(measured[0] if isinstance(measured, list) else measured)


def _every_row(found: Sequence[Found]) -> str:
    flat = [_flat({**run["settings"], **run["facts"], **row}) for run in found for row in run["rows"]]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if key in ("steps", "noise") and isinstance(value, list):
            continue
        if isinstance(value, list):
            flat |= dict(zip((key, f"{key}_low", f"{key}_high"), value, strict=True))
        elif not isinstance(value, dict):
            flat[key] = value
    return flat


def _save(path: Path, text: str) -> None:
    with files.replacing(path) as file:
        file.write(text.encode())
