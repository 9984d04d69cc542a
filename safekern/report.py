"""What an auditor wants to know of a mask; ``report_page`` shows it."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safekern import files
from safekern._version import __version__
from safekern.distribution import Distribution
from safekern.errors import InvalidArgumentError, MaskMismatchError
from safekern.mask import Mask, Summary
from safekern.overlap import COLUMNS, Comparison, row
from safekern.scores import ScoreReport, Scores, TopScores, count_of, ratio_of
from safekern.tables import Column, Table, counted


@dataclass(frozen=True)
class SourceFile:
    """A file that a report was made from: its part in it, the name to show, bytes, and SHA-256 (hex)."""

    role: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Check:
    """Something that was looked into: True for holds, False for does not, None for cannot be told from the files."""

    holds: bool | None
    text: str


@dataclass(frozen=True)
class Ranking:
    """A mask beside the scores it may come from.

    Attributes:
        report: The scores per layer and component.
        selected: The ESI of the mask's weights.
        top: The mask compared with as many weights of the largest ESI.
        num_batches: Batches the scores were averaged over.
    """

    report: ScoreReport
    selected: Distribution
    top: Comparison
    num_batches: int

    @property
    def share(self) -> float:
        """The mask's part of the sum of ESI over all scored weights."""
        total = self.report.distribution.total
        return self.selected.total / total if total else 0.0

    @classmethod
    def of(cls, mask: Mask, scores: Scores) -> "Ranking":
        """Looks a mask up in scores.

        Raises:
            MaskMismatchError: The mask is not over parameters of these scores.
            NonFiniteError: A score is NaN or infinite.
        """
        selected = scores.selected(mask)
        return cls(scores.report(), selected, top_beside(mask, scores), scores.num_batches)


@dataclass(frozen=True)
class Audit:
    """A mask and all that is said of it.

    Attributes:
        mask: The mask.
        files: What it was read from, the mask's file first.
        ranking: The mask in its scores, where they were given.
        comparisons: The mask beside others, by the name of their file.
    """

    mask: Mask
    files: Sequence[SourceFile]
    ranking: Ranking | None
    comparisons: Mapping[str, Comparison]

    @classmethod
    def load(cls, mask: Path, scores: Path | None = None, compare: Sequence[Path] = ()) -> "Audit":
        """Reads the files and works out everything.

        Args:
            mask: A mask file.
            scores: The scores it was ranked from.
            compare: Other masks of the same model.

        Raises:
            SafekernError: A file cannot be read, or they do not belong together.
        """
        loaded = Mask.load(mask)
        paths = {"mask": [mask], "scores": [scores] if scores else [], "compared with": compare}
        given = [path for several in paths.values() for path in several]
        shown = _told_apart(given)
        sources = [_source(role, shown[path], path) for role, several in paths.items() for path in several]
        ranking = Ranking.of(loaded, load_all(scores)) if scores else None
        return cls(loaded, sources, ranking, {shown[path]: _compared(loaded, path) for path in compare})

    @cached_property
    def summary(self) -> Summary:
        """Selected weights per layer and component."""
        return self.mask.summary()

    @cached_property
    def experts(self) -> Summary:
        """Selected weights per layer and expert."""
        return self.mask.expert_summary()

    def core(self) -> tuple[int, int, float] | None:
        """The shortest run of layers that holds half of the mask: first, last, share; None without layers."""
        shares: dict[int, float] = {}
        for cell in self.summary:
            if cell.layer is not None:
                shares[cell.layer] = shares.get(cell.layer, 0.0) + cell.share
        layers = sorted(shares)
        best: tuple[int, int, float] | None = None
        start, held = 0, 0.0
        for layer in layers:
            held += shares[layer]
            while held - shares[layers[start]] >= 0.5:
                held -= shares[layers[start]]
                start += 1
            if held >= 0.5 and (best is None or layer - layers[start] < best[1] - best[0]):
                best = (layers[start], layer, held)
        return best

    def checks(self) -> list[Check]:
        """What can be said of how far to trust the mask."""
        found = [Check(True, "The file is whole: its content matches the checksum inside it.")]
        claim = self._check_ratio()
        found += [claim] if claim else []
        found.append(self._check_ranking())
        for name, comparison in self.comparisons.items():
            total = comparison.total
            chance = total.expected_jaccard
            times = (
                f"{total.jaccard / chance:,.1f} times that of random masks of these sizes"
                if chance
                else "no weight in common is expected"
            )
            found.append(Check(None, f"Beside {name}: Jaccard index {total.jaccard:.4f}, {times}."))
        if not self.comparisons:
            found.append(
                Check(
                    None,
                    "Not compared with another mask: --compare with one from other prompts shows how far the choice "
                    "of prompts decides the ranking.",
                )
            )
        return found

    def _check_ratio(self) -> Check | None:
        """Whether as many weights are selected as the file says, where it says so in a way that can be checked."""
        ratio: object = self.mask.meta.get("ratio")
        if not isinstance(ratio, float) or not 0 < ratio <= 1 or self.mask.meta.get("per") != "model":
            return None
        mask = self.mask
        says = f"The file says that {100 * ratio:.4g}% of the model was selected"
        wanted = count_of(ratio, mask.model_numel, mask.model_numel)
        if mask.numel == wanted:
            return Check(True, f"{says}, and it was.")
        # A ranking ends with the eligible weights, which may be fewer.
        if mask.numel < wanted and mask.numel == sum(shape.numel() for shape in mask.shapes.values()):
            return Check(
                True, f"{says}; it holds every weight of its parameters, {100 * mask.density:.4g}% of the model."
            )
        return Check(False, f"{says}, but it holds {100 * mask.density:.4g}%.")

    def _check_ranking(self) -> Check:
        if self.ranking is None:
            return Check(None, "Not checked against scores: give the scores it was ranked from with --scores.")
        largest = f"the {self.mask.numel:,} weights of the largest ESI in the scores given"
        if self.ranking.top.equal:
            return Check(
                True, f"It is exactly {largest}, averaged over {counted(self.ranking.num_batches, 'batch', 'es')}."
            )
        total = self.ranking.top.total
        return Check(
            False,
            f"It is not {largest}: it shares {total.shared:,} with them (Jaccard {total.jaccard:.4f}; random masks of "
            f"this size have {total.expected_jaccard:.4f}).",
        )

    def versions(self) -> dict[str, str]:
        """What made this report."""
        found = {"safekern": __version__, "python": platform.python_version()}
        for package in ("torch", "matplotlib"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found

    def overlap_table(self) -> Table:
        """A line for each mask it was compared with."""
        return Table(
            [Column("mask"), *COLUMNS[1:]], [(name, *row(found.total)[1:]) for name, found in self.comparisons.items()]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as JSON can hold it."""
        found: dict[str, Any] = {
            "mask": {
                "numel": self.mask.numel,
                "model_numel": self.mask.model_numel,
                "density": self.mask.density,
                "parameters": len(self.mask),
                "fingerprint": self.mask.fingerprint,
                "meta": self.mask.meta,
            },
            "files": [vars(file) for file in self.files],
            "versions": self.versions(),
            "checks": [vars(check) for check in self.checks()],
            "components": self.summary.table("component").records(),
            "layers": self.summary.table("layer").records(),
            "cells": self.summary.table().records(),
            "experts": self.experts.table().records(),
        }
        if self.ranking:
            total = self.ranking.top.total
            found["scores"] = {
                "num_batches": self.ranking.num_batches,
                "numel": self.ranking.report.distribution.numel,
                "share_of_esi": self.ranking.share,
                "smallest_selected": self.ranking.selected.smallest,
                "is_exact_top": self.ranking.top.equal,
                "jaccard_with_top": total.jaccard,
                "components": self.ranking.report.table("component").records(),
                "cells": self.ranking.report.table().records(),
            }
        found["compared"] = [
            {
                **line,
                "components": comparison.table("component").records(),
                "layers": comparison.table("layer").records(),
            }
            for line, comparison in zip(self.overlap_table().records(), self.comparisons.values(), strict=True)
        ]
        return found


def load_all(path: Path) -> Scores:
    """Reads scores that know of every weight.

    Raises:
        InvalidArgumentError: They keep the top candidates only.
        SafekernError: As `Scores.load`.
    """
    scores = Scores.load(path)
    if isinstance(scores, TopScores):
        raise InvalidArgumentError(
            f"{path}: holds only the top {scores.keep:.3g} of the scores, which was made within --memory, and all are "
            "needed: score again with more --memory, or with --offload instead"
        )
    return scores


def top_beside(mask: Mask, scores: Scores) -> Comparison:
    """As many weights of the largest ESI as a mask has, compared with the mask: equal, if it was ranked by the scores.

    Raises:
        MaskMismatchError: The scores are of another model.
    """
    try:
        return Comparison(scores.top(ratio_of(mask.numel, scores.model_numel)), mask)
    except MaskMismatchError as error:
        raise MaskMismatchError(
            f"the mask is of a model of {mask.model_numel:,} weights and the scores are of another one, of "
            f"{scores.model_numel:,}: give the scores that the mask was ranked from"
        ) from error


def _compared(mask: Mask, path: Path) -> Comparison:
    try:
        return Comparison(mask, Mask.load(path))
    except MaskMismatchError as error:
        raise MaskMismatchError(f"{path}: {error}") from error


def _told_apart(paths: Sequence[Path]) -> dict[Path, str]:
    """Names with as few of their folders, which are not the reader's business, as tell them from each other."""

    def tail(path: Path, count: int) -> tuple[str, ...]:
        return path.parts[-count:]

    shown = {}
    for path in paths:
        others = [other for other in paths if other != path]
        counts = range(1, len(path.parts) + 1)
        count = next((c for c in counts if all(tail(path, c) != tail(other, c) for other in others)), len(path.parts))
        shown[path] = str(Path(*tail(path, count)))
    return shown


def _source(role: str, name: str, path: Path) -> SourceFile:
    with files.reading(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SourceFile(role, name, file.tell(), digest)
