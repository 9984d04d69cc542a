"""What a mask depends on, and where it lies: how many prompts it takes, how they are added up, components, depth."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import safekern
from safekern import Mask, Scores
from safekern.objectives import refusal
from safekern.prompts import Pairs
from safekern.training import SCORING_BATCH_SIZE, in_order

from .aligned import ALIGNED, safety_scores
from .lab import Lab
from .runs import Plan, Record, Row, Run
from .set import RATIO, ranked_by

SIZES = (8, 16, 32, 64, 128, 256, 512)
_RATIOS = (0.001, RATIO, 0.1)


def prompt_runs(plan: Plan) -> list[Run]:
    """How few prompts give a stable mask, one run per order of the prompts."""
    return [
        Run("prompts", f"seed{seed}", {"ratio": RATIO, "seed": seed}, partial(_prompts, seed=seed))
        for seed in plan.seeds
    ]


def where_runs(plan: Plan) -> list[Run]:
    """Components and depth of the mask of the model as loaded, and of aligned ones."""
    wanted = [("base", ratio) for ratio in _RATIOS] + [(name, RATIO) for name in ALIGNED]
    return [
        Run("where", f"{name}-{ratio:g}", {"weights": name, "ratio": ratio}, partial(_where, name=name, ratio=ratio))
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
    # Embeddings are not scored, and may be most of a small model.
    evenly = mask.numel / scores.numel
    layers = sorted({row.layer for row in mask.summary() if row.layer is not None})
    record.facts |= {"selected": mask.numel, "jaccard_with_base": round(mask.jaccard(base), 4), "layers": len(layers)}
    rows = []
    for by in ("component", "layer"):
        for row in mask.summary().table(by).records():
            rows.append(_cell(by, row[by], row["selected"], row["numel"], mask.numel, evenly))
    for third in range(3):
        inside = [row for row in mask.summary() if row.layer is not None and row.layer * 3 // (layers[-1] + 1) == third]
        counts = sum(row.selected for row in inside), sum(row.numel for row in inside)
        rows.append(_cell("third", third, *counts, mask.numel, evenly))
    record.replace(rows)


def _cell(by: str, key: Any, selected: int, numel: int, total: int, evenly: float) -> dict[str, Any]:
    return {
        "by": by,
        by: key,
        "selected": selected,
        "numel": numel,
        "share": round(selected / total, 4),
        "enrichment": round(selected / max(1, numel) / evenly, 3),
    }
