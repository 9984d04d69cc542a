"""What a mask depends on, and where it lies: how many prompts it takes, how they are added up, components, depth."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import safekern
from safekern import Mask, Scores, names, plots
from safekern.objectives import refusal
from safekern.prompts import Pairs
from safekern.tables import Column, Table, counted
from safekern.training import SCORING_BATCH_SIZE, in_order

from . import figures
from .aligned import ALIGNED, made, safety_scores
from .lab import Lab
from .report import mean
from .runs import Experiment, Found, Plan, Record, Row, Run
from .set import RATIO, ranked_by

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (8, 16, 32, 64, 128, 256, 512)
_RATIOS = (0.001, RATIO, 0.1)


def _prompt_runs(plan: Plan) -> list[Run]:
    """How few prompts give a stable mask, one run per order of the prompts."""
    return [
        Run("prompts", f"seed{seed}", {"ratio": RATIO, "seed": seed}, partial(_prompts, seed=seed))
        for seed in plan.seeds
    ]


def _where_runs(plan: Plan) -> list[Run]:
    """Components and depth of the mask of the model as loaded, and of aligned ones."""
    wanted = [("base", ratio) for ratio in _RATIOS] + [(name, RATIO) for name in ALIGNED]
    return [
        Run(
            "where",
            f"{name}-{ratio:g}",
            {"weights": name, "ratio": ratio, **(made(name) if name in ALIGNED else {})},
            partial(_where, name=name, ratio=ratio),
        )
        for name, ratio in wanted
    ]


class _Sums:
    """Gradients of batch after batch, added up in several ways."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {"mean": {}, "abs": {}, "bf16": {}, "even": {}, "odd": {}}
        self.batches = 0
        self._last: Scores | None = None

    def add(self, scores: Scores) -> None:
        half = "odd" if self.batches % 2 else "even"
        for name in scores:
            gradient = scores.gradient(name).cpu()
            for way, value in (
                ("mean", gradient),
                (half, gradient),
                ("abs", gradient.abs()),
                ("bf16", gradient.bfloat16()),
            ):
                into = self.sums[way].setdefault(name, torch.zeros_like(value))
                into += value
        self.batches += 1
        self._last = scores

    def mask(self, way: str, ratio: float) -> Mask:
        assert self._last is not None
        values = {name: value.float() for name, value in self.sums[way].items()}
        return ranked_by(self._last, values, self._last.sigma).top(ratio)


def _prompts(lab: Lab, record: Record, seed: int) -> None:
    pairs = lab.data.refusals
    order = np.random.default_rng(seed).permutation(len(pairs))[: SIZES[-1]].tolist()
    pairs = Pairs([pairs.prompts[i] for i in order], [pairs.responses[i] for i in order], [""] * len(order))
    sizes = [size for size in SIZES if size < len(pairs)] + [len(pairs)]
    lab.reset()
    sums, rows = _Sums(), list[Row]()
    masks: dict[int, Mask] = {}
    for number, batch in enumerate(in_order(lab.tokenizer, pairs, SCORING_BATCH_SIZE), 1):
        sums.add(safekern.score(lab.model, [batch], refusal))
        scored = min(number * SCORING_BATCH_SIZE, len(pairs))
        if scored not in sizes:
            continue
        masks[scored] = mask = sums.mask("mean", RATIO)
        rows.append(
            {
                "prompts": scored,
                "disjoint_halves": round(sums.mask("even", RATIO).jaccard(sums.mask("odd", RATIO)), 4),
                "abs": round(sums.mask("abs", RATIO).jaccard(mask), 4),
                "bf16": round(sums.mask("bf16", RATIO).jaccard(mask), 4),
            }
        )
    everything = masks[len(pairs)]
    record.replace([{**row, "with_all": round(masks[row["prompts"]].jaccard(everything), 4)} for row in rows])


def _where(lab: Lab, record: Record, name: str, ratio: float) -> None:
    scores = lab.base_scores() if name == "base" else safety_scores(lab, name)
    mask, base = scores.top(ratio), lab.base_scores().top(ratio)
    depth = 1 + max(layer for layer in map(names.layer, scores) if layer is not None)
    record.facts |= {"mask": mask.numel, "jaccard_with_base": round(mask.jaccard(base), 4), "layers": depth}
    # From the scores, since a mask does not know of tensors in which nothing is selected.
    cells: dict[tuple[str, Any], list[int]] = defaultdict(lambda: [0, 0])
    for name in scores:
        layer = names.layer(name)
        places: list[tuple[str, Any]] = [("component", names.component(name))]
        places += [] if layer is None else [("layer", layer), ("third", layer * 3 // depth)]
        for place in places:
            cells[place][0] += len(mask.get(name, []))
            cells[place][1] += scores.gradient(name).numel()
    record.replace(
        [
            {
                "by": by,
                by: key,
                "selected": selected,
                "numel": numel,
                "share": round(selected / mask.numel, 4),
                # Over the scored weights: embeddings are not, and may be most of a small model.
                "enrichment": round(selected / numel / (mask.numel / scores.numel), 3),
            }
            for (by, key), (selected, numel) in cells.items()
        ]
    )


def _prompts_tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
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
    table = [[size, *(mean([row[key] for row in rows if row["prompts"] == size]) for key in keys)] for size in sizes]
    yield f"means over {counted(len(found), 'order')} of the prompts", Table(columns, table)


def _where_tables(found: Sequence[Found], compact: bool) -> Iterable[tuple[str, Table]]:
    for by in ("component", "third"):
        keys = {row[by] for run in found for row in run["rows"] if row["by"] == by}
        shown = sorted(keys, key=names.component_order if by == "component" else None)
        rows = []
        for run in found:
            cells = {row[by]: f"{row['share']:.0%}, {row['enrichment']:.2f}x" for row in run["rows"] if row["by"] == by}
            settings = run["settings"]
            rows.append(
                [
                    settings["weights"],
                    settings["ratio"],
                    run["facts"].get("jaccard_with_base"),
                    *(cells.get(key) for key in shown),
                ]
            )
        columns = [Column("model"), Column("ratio", "{:.1%}"), Column("Jaccard with base", "{:.2f}")]
        yield (
            f"share of the mask and enrichment over all scored weights, by {by}",
            Table([*columns, *(Column(str(key)) for key in shown)], rows),
        )


def _prompts_figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """How far masks of fewer prompts agree with that of all, and ways of adding up with each other."""
    labels = {
        "with_all": "with all prompts",
        "disjoint_halves": "between halves",
        "abs": "mean of abs with abs of mean",
        "bf16": "bf16 with fp32 accumulation",
    }
    if not any(run["rows"] for run in found):
        return None
    figure, grid = figures.panels(1, 1)
    axes = grid[0][0]
    for place, (key, label) in enumerate(labels.items()):
        # Not in a list, as what has an interval is.
        runs = [[{**row, key: [row[key]]} for row in run["rows"]] for run in found]
        figures.line(axes, figures.mean_line(runs, key, "prompts"), place, label)
    axes.set(xlabel="prompts", ylabel="Jaccard index", xscale="log", ylim=(0, 1.05))
    sizes = sorted({row["prompts"] for run in found for row in run["rows"]})
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    figures.finish(figure, grid)
    return figure


def _where_figure(found: Sequence[Found], folder: Path) -> "Figure | None":
    """Enrichment by component and by layer."""
    measured = [run for run in found if run["rows"]]
    if not measured:
        return None
    figure, grid = figures.panels(1, 2)
    for axes, by in zip(grid[0], ("component", "layer"), strict=True):
        keys = list(dict.fromkeys(row[by] for run in measured for row in run["rows"] if row["by"] == by))
        keys.sort(key=names.component_order if by == "component" else None)
        for place, run in enumerate(measured):
            cells = {row[by]: row["enrichment"] for row in run["rows"] if row["by"] == by}
            points = [(position, cells[key]) for position, key in enumerate(keys) if key in cells]
            label = f"{run['settings']['weights']}, {run['settings']['ratio']:.1%}"
            figures.line(axes, points, place, label, "-" if by == "layer" else "")
        axes.axhline(1, color=plots.LIGHT.line, linewidth=0.8)
        axes.set(xlabel=by, ylabel="enrichment")
        if by == "component":
            axes.set_xticks(range(len(keys)), keys, rotation=45, ha="right")
        else:
            axes.locator_params(axis="x", integer=True)
    figures.finish(figure, grid)
    return figure


PROMPTS = Experiment(_prompt_runs, _prompts_tables, _prompts_figure)
WHERE = Experiment(_where_runs, _where_tables, _where_figure)
