"""The prompts that come with the package: short, non-operational, written for it.

Harmful requests with refusals, and benign ones with helpful answers, each in a ``tune`` split to score and train on and
an ``eval`` split that no training sees.
"""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal


@dataclass(frozen=True)
class Pairs:
    """Prompts with the responses to train on, in the same order.

    Attributes:
        prompts: what a user asks.
        responses: a refusal for a harmful prompt, a helpful answer for a benign one.
        categories: the harm category, or the topic.
    """

    prompts: list[str]
    responses: list[str]
    categories: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "Pairs":
        return Pairs(self.prompts[rows], self.responses[rows], self.categories[rows])


def builtin(kind: Literal["harmful", "benign"], split: Literal["tune", "eval"]) -> Pairs:
    """The pairs of one split, interleaved over categories, so that any first part of it covers all of them.

    Example:
        >>> pairs = builtin("harmful", "tune")
        >>> len(pairs) >= 160, len(set(pairs.categories)) >= 12
        (True, True)
    """
    text = resources.files("safekern").joinpath("data", f"{kind}.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == split]
    response, category = ("refusal", "category") if kind == "harmful" else ("answer", "topic")
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        seen[row[category]] = turn = seen.get(row[category], 0) + 1
        turns.append(turn)
    ordered = [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]
    return Pairs(
        [row["prompt"] for row in ordered],
        [row[response] for row in ordered],
        [row[category] for row in ordered],
    )
