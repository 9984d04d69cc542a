"""The ESI of every eligible weight, and the masks that are ranked from it."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from safekern import files, names, ranking
from safekern.arguments import check_whole_number
from safekern.distribution import Distribution
from safekern.errors import (
    FileFormatError,
    InvalidArgumentError,
    MaskMismatchError,
    NonFiniteError,
    UnknownNameError,
)
from safekern.mask import Mask, check_mask
from safekern.sharding import Processes, Shard, is_sharded, like, local
from safekern.tables import Column, Table

# The layout of all scores, and that of top candidates only, which older releases refuse by its number.
_VERSION, _TOP_VERSION = 1, 2

# Weights whose scores are held at once for a report.
_PART = 1 << 24

Per = Literal["model", "tensor"]


class Scores(Mapping[str, Tensor]):
    """Expected Safety Impact per weight: ``scores[name]`` is ``|gradient| * sigma``, fp32 of the parameter's shape.

    Made by :func:`safekern.score` or :meth:`load`. Holds the mean gradient (4 bytes per eligible weight) and one sigma
    per tensor, or per expert; ``scores[name]`` is computed when asked for. Source: arXiv 2604.08297.

    Example:
        >>> scores = safekern.score(model, loader)            # doctest: +SKIP
        >>> mask = scores.top(0.01)                           # doctest: +SKIP
        >>> scores.save("scores.safetensors")                 # doctest: +SKIP

    Attributes:
        sigma: name -> fp32 tensor on the CPU, the unbiased standard deviation of the parameter when it was scored: 0-d,
            or under ``sigma_per="expert"``, for a fused tensor of E experts, (E, 1, 1).
        num_batches: how many batches were averaged.
        model_numel: the number of weights in the whole model, eligible or not, adapters apart unless they are.
        meta: where the scores come from (objective, reduction, versions).

    Raises:
        InvalidArgumentError: gradients, sigma or counts of another kind.
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        sigma: Mapping[str, Tensor],
        *,
        num_batches: int,
        model_numel: int,
        meta: Mapping[str, Any],
    ) -> None:
        _check_gradients(gradients)
        shapes = {name: gradient.shape for name, gradient in gradients.items()}
        self._keep(gradients, shapes, sigma, num_batches, model_numel, meta)

    def _keep(
        self,
        gradients: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        sigma: Mapping[str, Tensor],
        num_batches: int,
        model_numel: int,
        meta: Mapping[str, Any],
    ) -> None:
        """Takes over what the scores are made of, if it fits together."""
        numel = sum(shape.numel() for shape in shapes.values())
        if not numel:
            raise InvalidArgumentError("there are no gradients, so there is nothing to rank")
        for name, shape in shapes.items():
            _check_sigma(name, shape, sigma.get(name))
        check_whole_number("num_batches", num_batches, 1)
        # The scored weights alone.
        check_whole_number("model_numel", model_numel, numel)
        self._gradients = dict(gradients)
        self._shapes = dict(shapes)
        self.sigma = {name: sigma[name] for name in self._gradients}
        self.num_batches = num_batches
        self.model_numel = model_numel
        self.meta = dict(meta)

    def __getitem__(self, name: str) -> Tensor:
        gradient = self.gradient(name)
        held = ranking.Held.of(gradient, self.sigma[name])
        return like(gradient, held.esi().view(local(gradient).shape))

    def __contains__(self, name: object) -> bool:
        return name in self._gradients

    # A mapping's comparison would ask for the truth of tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.numel:,} of {self.model_numel:,} weights in {len(self)} tensors, "
            f"{self.num_batches} batches, reduction={self.meta.get('reduction')!r})"
        )

    @property
    def numel(self) -> int:
        """The number of eligible weights."""
        return sum(shape.numel() for shape in self._shapes.values())

    def gradient(self, name: str) -> Tensor:
        """The mean gradient of the objective (under ``reduction="abs"`` the mean absolute gradient).

        Args:
            name: a parameter's name.

        Returns:
            fp32 of the parameter's shape; the stored tensor itself, not a copy.

        Raises:
            UnknownNameError: the parameter was not scored.

        Example:
            >>> scores.gradient("model.layers.0.self_attn.q_proj.weight")     # doctest: +SKIP
        """
        try:
            return self._gradients[name]
        except KeyError:
            raise UnknownNameError(f"no scores for parameter {name!r}: list(scores) names those there are") from None

    def top(self, ratio: float, *, per: Per = "model") -> Mask:
        """The weights of the largest ESI, exactly.

        Args:
            ratio: share of the model's weights, in (0, 1]: ``min(max(1, int(ratio * model_numel)), numel)`` weights.
            per: ``"model"`` ranks all eligible weights together; ``"tensor"`` picks ``max(1, int(ratio * numel))`` in
                every tensor. Ties go to the earlier weight (parameter order, then flat index).

        Returns:
            A mask with the ranking in its ``meta``; the same in every process. Where several hold the scores, all have
            to call this together.

        Raises:
            InvalidArgumentError: a ratio outside (0, 1], or another ``per``; arguments that differ between processes.
            NonFiniteError: a score is NaN.
            ScoringError: one of these errors in another process.

        Example:
            >>> import torch
            >>> from safekern import Scores
            >>> gradients, sigma = {"w": torch.tensor([[1.0, -3.0, 2.0]])}, {"w": torch.tensor(0.1)}
            >>> scores = Scores(gradients, sigma, num_batches=1, model_numel=3, meta={})
            >>> scores.top(0.7)["w"], scores.bottom(0.4)["w"]
            (tensor([1, 2]), tensor([0]))
        """
        return self._rank(ratio, per, largest=True)

    def bottom(self, ratio: float, *, per: Per = "model") -> Mask:
        """The weights of the smallest ESI; ties go to the earlier weight too.

        Args:
            ratio: as in :meth:`top`.
            per: as in :meth:`top`.

        Returns:
            As :meth:`top`, which has an example of both.

        Raises:
            InvalidArgumentError: as :meth:`top`; or these are scores that keep the top candidates only.
            NonFiniteError: as :meth:`top`.
            ScoringError: as :meth:`top`.
        """
        return self._rank(ratio, per, largest=False)

    def random(self, ratio: float, *, per: Per = "model", seed: int = 0) -> Mask:
        """As many weights as :meth:`top` selects, drawn evenly from the eligible ones; the control of experiments.

        Args:
            ratio: as in :meth:`top`.
            per: as in :meth:`top`.
            seed: a whole number from 0 on; the same seed draws the same weights.

        Returns:
            A mask as :meth:`top` gives it.

        Raises:
            InvalidArgumentError: a ratio outside (0, 1], another ``per``, or another seed.

        Example:
            >>> control = scores.random(0.01, seed=1)         # doctest: +SKIP
        """
        counts = self._counts(_checked(ratio), per)
        check_whole_number("seed", seed, 0)
        rng = np.random.default_rng(seed)
        numels = [shape.numel() for shape in self._shapes.values()]
        if per == "tensor":
            drawn = [_draw(rng, numel, k) for numel, k in zip(numels, counts, strict=True)]
        else:
            drawn = draw_across(rng, numels, counts[0])
        return self._mask([torch.from_numpy(part) for part in drawn], "random", ratio, per, seed=int(seed))

    def selected(self, mask: Mask) -> Distribution:
        """The distribution of the ESI of a mask's weights.

        Args:
            mask: A mask over the scored parameters; wrapped names resolve.

        Returns:
            How often each size of score occurs among them; the same in every process.

        Raises:
            MaskMismatchError: the mask selects nothing, or a parameter was not scored or is of another shape.
            NonFiniteError: one of these scores is NaN or infinite.
            ScoringError: one of these errors in another process.

        Example:
            >>> scores.selected(mask).total / scores.report().distribution.total     # doctest: +SKIP
        """
        check_mask(mask)
        processes = Processes.of(list(self._gradients.values()))
        distribution, _ = processes.agreed(partial(self._selected_here, mask, processes))
        return distribution.everywhere(processes)

    def _selected_here(self, mask: Mask, processes: Processes) -> Distribution:
        distribution = Distribution()
        for name, scored in mask.resolve(self._gradients).items():
            gradient, index = self._gradients[scored], mask.compact(name)
            shard, held = Shard.of(gradient), ranking.Held.of(gradient, self.sigma[scored])
            if processes.speaks_for(shard):
                index = shard.to_local(index[shard.inside(index)]).to(held.values.device)
                distribution.add(held.esi(index))
        return distribution

    def in_conflict_with(self, other: "Scores") -> "Scores":
        """These scores where a gradient step for another objective raises the loss of this one, and 0 elsewhere.

        Of what is scored on refusals and on a task, the top of this are the weights by which learning the task unlearns
        refusing most. Frozen, they kept models safer than as many of the plain top (README, "Does it work?").

        Objectives are losses, but for those that `score` noted as to be maximised, such as
        `safekern.objectives.GuardJudge`: a step lowers a loss, and it is lowering those that counts.

        Args:
            other: scores of the same parameters for the other objective; its names may be wrapped otherwise.

        Returns:
            New scores with this one's gradients where the two losses have opposite signs, and this one's sigma. Where
            several processes hold the scores, all have to call this together.

        Raises:
            InvalidArgumentError: the scores of either are of absolute gradients, or of several sweeps; or nothing is in
                conflict.
            MaskMismatchError: a parameter is missing from the other scores, or of another shape or sharding there.
            NonFiniteError: a gradient is NaN or infinite.
            ScoringError: one of these errors in another process.

        Example:
            >>> import torch
            >>> from safekern import Scores
            >>> options = {"sigma": {"w": torch.tensor(1.0)}, "num_batches": 1, "model_numel": 3, "meta": {}}
            >>> safety = Scores({"w": torch.tensor([1.0, -2.0, 3.0])}, **options)
            >>> task = Scores({"w": torch.tensor([1.0, 1.0, -1.0])}, **options)
            >>> safety.in_conflict_with(task)["w"]
            tensor([0., 2., 3.])
        """
        if not isinstance(other, Scores):
            raise InvalidArgumentError(f"other must be Scores, as score returns them, got {type(other).__name__}")
        if "abs" in (self.meta.get("reduction"), other.meta.get("reduction")):
            raise InvalidArgumentError('absolute gradients have no sign to be in conflict: score with reduction="mean"')
        gradients, found = Processes.of(list(self._gradients.values())).agreed(
            partial(self._opposed, other), lambda kept: sum(int(local(kept[name]).count_nonzero()) for name in kept)
        )
        if not sum(found):
            raise InvalidArgumentError("no weight has gradients that disagree, so nothing is in conflict")
        meta = {**self.meta, "in_conflict_with": other.meta}
        return Scores(gradients, self.sigma, num_batches=self.num_batches, model_numel=self.model_numel, meta=meta)

    def _opposed(self, other: "Scores") -> dict[str, Tensor]:
        theirs = names.resolve(self, other)
        # Of a loss and what is to be maximised, the gradients agree where a step makes both worse.
        opposite = 1 if bool(self.meta.get("maximised")) != bool(other.meta.get("maximised")) else -1
        kept = {}
        for name in self:
            if name not in theirs:
                raise MaskMismatchError(f"{name} has no scores for the other objective: score both on the same model")
            gradient, opposed = self.gradient(name), other.gradient(theirs[name])
            here, there = local(gradient), local(opposed).to(local(gradient).device)
            if gradient.shape != opposed.shape or here.shape != there.shape:
                raise MaskMismatchError(
                    f"{name} is of another shape, or sharded otherwise, for the other objective: score both on the "
                    "same model"
                )
            if not (here.isfinite().all() and there.isfinite().all()):
                raise NonFiniteError(f"a gradient of {name} is NaN or infinite: score the model again")
            # Not by the product, which is 0 for two small ones.
            nothing = torch.zeros((), device=here.device)
            kept[name] = like(gradient, here.where(here.sign() * there.sign() == opposite, nothing))
        return kept

    def report(self) -> "ScoreReport":
        """Describes the scores per layer and component, in one pass over them.

        Returns:
            One row per layer and component; printing it gives a table.

        Raises:
            NonFiniteError: a score is NaN or infinite.
            ScoringError: a score is, in another process.

        Example:
            >>> print(scores.report().table("component"))     # doctest: +SKIP
        """
        processes = Processes.of(list(self._gradients.values()))
        cells, _ = processes.agreed(partial(self._cells, processes))
        for cell in cells.values():
            cell.esi = cell.esi.everywhere(processes)
        return ScoreReport(cells)

    def _cells(self, processes: Processes) -> "dict[tuple[int | None, str], _Cell]":
        """What this process holds, or speaks for, per layer and component."""
        cells: dict[tuple[int | None, str], _Cell] = {}
        for name, gradient in self._gradients.items():
            cell = cells.setdefault((names.layer(name), names.component(name)), _Cell())
            cell.variance += float(self.sigma[name].double().square().mean()) * gradient.numel()
            if not processes.speaks_for(Shard.of(gradient)):
                continue
            held = ranking.Held.of(gradient, self.sigma[name])
            for piece, sigma in zip(held.pieces, held.sigma, strict=True):
                # In parts, because the scores of a fused expert tensor take gigabytes.
                for part in piece.split(_PART):
                    try:
                        cell.esi.add(part.abs().mul_(sigma))
                    except NonFiniteError as error:
                        raise NonFiniteError(f"{name}: {error}") from error
        return cells

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file (4 bytes per eligible weight) that :meth:`load` reads.

        Args:
            path: the file to write or replace, by habit ``*.safetensors``.

        Raises:
            FileAccessError: the path cannot be written; an existing file is left as it was.
            InvalidArgumentError: several processes hold the scores.

        Example:
            >>> scores.save("scores.safetensors")             # doctest: +SKIP
        """
        if any(map(is_sharded, self._gradients.values())):
            raise InvalidArgumentError(
                "the scores of a sharded model are spread over processes, and the file would be larger than the model: "
                "save a mask, scores.top(0.01).save(path), or the DTensors scores.gradient(name) with "
                "torch.distributed.checkpoint"
            )
        files.write(path, "scores", _VERSION, self._gradients, self._file_meta())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The scores, on the CPU; :class:`TopScores` where such were saved.

        Raises:
            FileAccessError: the file cannot be read.
            FileFormatError: it is damaged or not a scores file.

        Example:
            >>> mask = safekern.Scores.load("scores.safetensors").top(0.01)   # doctest: +SKIP
        """
        tensors, meta = files.read(path, "scores", _TOP_VERSION)
        try:
            counts = {"num_batches": int(meta["num_batches"]), "model_numel": int(meta["model_numel"])}
            # The order of the parameters decides ties; a safetensors file keeps its tensors in another order.
            ordered = list(meta["sigma"])
            top = "keep" in meta
            gradients = {name: tensors.pop(f"gradient.{name}" if top else name) for name in ordered}
            indices = {name: tensors.pop(f"index.{name}") for name in ordered} if top else {}
            if tensors or any(gradient.dtype != torch.float32 for gradient in gradients.values()):
                raise ValueError("its tensors are not those its metadata lists")
            sigma = {
                name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in meta["sigma"].items()
            }
            scores: Scores
            if top:
                shapes = {name: torch.Size(meta["shapes"][name]) for name in ordered}
                if any(size < 0 for shape in shapes.values() for size in shape):
                    raise ValueError("a shape has a negative size")
                scores = TopScores(
                    gradients, indices, shapes, sigma, keep=_checked(meta["keep"]), meta=meta["meta"], **counts
                )
                scores._check_candidates()
            else:
                scores = Scores(gradients, sigma, meta=meta["meta"], **counts)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileFormatError(
                f"{path} is not a valid scores file ({error}): write it again with Scores.save"
            ) from error
        return scores

    def _file_meta(self) -> dict[str, Any]:
        return {
            "sigma": {name: sigma.tolist() for name, sigma in self.sigma.items()},
            "num_batches": self.num_batches,
            "model_numel": self.model_numel,
            "meta": self.meta,
        }

    def _counts(self, ratio: float, per: Per) -> list[int]:
        if per == "model":
            return [count_of(ratio, self.model_numel, self.numel)]
        if per == "tensor":
            return [count_of(ratio, shape.numel(), shape.numel()) for shape in self._shapes.values()]
        raise InvalidArgumentError(f"per must be 'model' or 'tensor', got {per!r}")

    def _rank(self, ratio: float, per: Per, *, largest: bool) -> Mask:
        gradients, sigma = list(self._gradients.values()), list(self.sigma.values())
        counts = Processes.of(gradients).alike(
            lambda: self._counts(_checked(ratio), per),
            lambda counts: (counts, largest),
            "all have to call top(), or all bottom(), with the same ratio and per",
        )
        try:
            if per == "model":
                selected = ranking.select(gradients, sigma, counts[0], largest)
            else:
                nothing = torch.empty(0, dtype=torch.int32, device="cpu")
                selected = [
                    ranking.select([gradient], [scale], k, largest)[0] if k else nothing
                    for gradient, scale, k in zip(gradients, sigma, counts, strict=True)
                ]
        except RuntimeError as error:
            broken = [name for name in self if local(self[name]).isnan().any()]
            if broken:
                raise NonFiniteError(f"the scores of {', '.join(broken)} hold NaN: score the model again") from error
            raise
        return self._mask(selected, "top" if largest else "bottom", ratio, per)

    def _mask(self, selected: list[Tensor], ranking: str, ratio: float, per: Per, **details: object) -> Mask:
        meta = {
            **self.meta,
            "batches": self.num_batches,
            "ranking": ranking,
            "ratio": float(ratio),
            "per": per,
            **details,
        }
        indices = dict(zip(self, selected, strict=True))
        return Mask.from_indices(indices, self._shapes, model_numel=self.model_numel, meta=meta)


class RunningTop:
    """The candidates for the global top of parameters whose accumulators come and go, part after part.

    The top k of everything is among the top k of any part of it, ties by (parameter, index) included, because the parts
    come in the order of the parameters and their candidates stay in it.

    Args:
        k: how many candidates to keep.

    Attributes:
        gradients: per parameter seen the fp32 mean gradients of its candidates, 1-D.
        indices: their ascending flat positions.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self.gradients: dict[str, Tensor] = {}
        self.indices: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def add(self, part: dict[str, Tensor], sigma: Mapping[str, Tensor]) -> None:
        """Takes over the mean gradients of further parameters, and empties ``part`` to free them one by one.

        Args:
            part: fp32 tensors on the device of the parts before.
            sigma: as :attr:`Scores.sigma`, of all parameters seen so far and any others.
        """
        rivals = ranking.held_candidates(self.gradients, self.indices, sigma, self._shapes)
        rivals += [ranking.Held.of(gradient, sigma[name]) for name, gradient in part.items()]
        numel = sum(rival.values.numel() for rival in rivals)
        picks = ranking.select_here(rivals, min(self._k, numel), True)
        del rivals
        self._shapes |= {name: gradient.shape for name, gradient in part.items()}
        # One by one, so that what came before is freed as its successors are made.
        picks.reverse()
        for name in [*self.gradients, *part]:
            pick = picks.pop()
            if name in part:
                self.gradients[name] = part.pop(name).view(-1).index_select(0, pick)
                self.indices[name] = pick
            else:
                self.gradients[name] = self.gradients[name].index_select(0, pick)
                self.indices[name] = self.indices[name].index_select(0, pick)


class TopScores(Scores):
    """The top candidates of scores whose accumulators did not fit into the ``memory`` of :func:`safekern.score`.

    ``top(ratio)`` up to a ratio of :attr:`keep` gives exactly the mask that all scores would have given. What needs the
    others (``scores[name]``, ``gradient``, ``bottom``, ``random``, ``selected``, ``report``, a larger ratio,
    ``per="tensor"``) raises.

    Attributes:
        keep: the largest ratio for :meth:`top`.

    Example:
        >>> scores = safekern.score(model, batches, memory=6e9, keep=0.01)    # doctest: +SKIP
        >>> mask = scores.top(0.01)                                           # doctest: +SKIP
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
        sigma: Mapping[str, Tensor],
        *,
        keep: float,
        num_batches: int,
        model_numel: int,
        meta: Mapping[str, Any],
    ) -> None:
        self._keep(gradients, shapes, sigma, num_batches, model_numel, meta)
        self._indices = dict(indices)
        self.keep = keep

    def gradient(self, name: str) -> Tensor:
        """Raises: see the class."""
        if name not in self:
            return super().gradient(name)
        raise self._unavailable("per-weight values of a parameter")

    def top(self, ratio: float, *, per: Per = "model") -> Mask:
        """The weights of the largest ESI, exactly, as :meth:`Scores.top`.

        Args:
            ratio: share of the model's weights, no more of them than :attr:`keep` is.
            per: only ``"model"``.

        Returns:
            The mask that :meth:`Scores.top` of all scores would be.

        Raises:
            InvalidArgumentError: a larger ratio, or ``per="tensor"``.
        """
        counts = self._counts(_checked(ratio), per)
        if per == "tensor":
            raise self._unavailable("a ranking inside every tensor")
        if counts[0] > count_of(self.keep, self.model_numel, self.numel):
            raise self._unavailable(f"the top {ratio:.3g}")
        candidates = ranking.held_candidates(self._gradients, self._indices, self.sigma, self._shapes)
        picks = ranking.select_here(candidates, counts[0], True)
        selected = [index.index_select(0, pick) for index, pick in zip(self._indices.values(), picks, strict=True)]
        return self._mask(selected, "top", ratio, per)

    def bottom(self, ratio: float, *, per: Per = "model") -> Mask:
        """Raises: see the class."""
        raise self._unavailable("the weights of the smallest ESI")

    def random(self, ratio: float, *, per: Per = "model", seed: int = 0) -> Mask:
        """Raises: see the class."""
        raise self._unavailable("a random selection, the control of a complete ranking,")

    def selected(self, mask: Mask) -> Distribution:
        """Raises: see the class."""
        raise self._unavailable("the scores of a mask's weights")

    def report(self) -> "ScoreReport":
        """Raises: see the class."""
        raise self._unavailable("a report on all scores")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the candidates (8 bytes each) to a file for :meth:`Scores.load`.

        Args:
            path: as :meth:`Scores.save`.

        Raises:
            FileAccessError: the path cannot be written; an existing file is left as it was.
        """
        tensors = {f"gradient.{name}": gradient for name, gradient in self._gradients.items()}
        tensors |= {f"index.{name}": index for name, index in self._indices.items()}
        meta = {**self._file_meta(), "keep": self.keep, "shapes": {name: list(s) for name, s in self._shapes.items()}}
        files.write(path, "scores", _TOP_VERSION, tensors, meta)

    def _unavailable(self, what: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{what} cannot be had: these scores were made in several sweeps, which keep only the top {self.keep:.3g} "
            "of the model's weights. Use top() up to that ratio, or score again with more memory=, a larger keep=, or "
            "without memory= and with offload=True, which accumulates in CPU memory"
        )

    def _check_candidates(self) -> None:
        """Raises ValueError for candidates that no sweep leaves behind."""
        for name, index in self._indices.items():
            positions, numel = index.long(), self._shapes[name].numel()
            if index.dtype not in (torch.int32, torch.int64) or index.shape != self._gradients[name].shape:
                raise ValueError(f"the candidates of {name} are not one value per index")
            # Ascending positions are in range where the first and the last are.
            ends = positions[[0, -1]] if positions.numel() else positions
            if bool(((ends < 0) | (ends >= numel)).any()) or not bool((positions.diff() > 0).all()):
                raise ValueError(f"the candidates of {name} are out of order or out of range")
            if not self._gradients[name].isfinite().all():
                raise ValueError(f"a gradient of {name} is not finite")
        held = sum(index.numel() for index in self._indices.values())
        if held != count_of(self.keep, self.model_numel, self.numel):
            raise ValueError(f"it holds {held} candidates, which is not the top {self.keep}")


def _check_gradients(gradients: Mapping[str, object]) -> None:
    for name, gradient in gradients.items():
        if not isinstance(gradient, Tensor):
            raise InvalidArgumentError(f"the gradient of {name} must be an fp32 tensor, got {gradient!r:.50}")
        if gradient.dtype != torch.float32 or gradient.layout != torch.strided or gradient.is_meta:
            got = f"{gradient.dtype}, {gradient.layout} on {gradient.device}"
            raise InvalidArgumentError(f"the gradient of {name} must be a dense fp32 tensor with values, got {got}")


def _check_sigma(name: str, shape: torch.Size, sigma: object) -> None:
    """Of one parameter: one standard deviation, or one for each of its fused experts."""
    experts = names.fused_experts(name, shape)
    wanted = [torch.Size(())] if experts is None else [torch.Size(()), torch.Size((experts, 1, 1))]
    what = f"sigma of {name}, its standard deviation,"
    if not isinstance(sigma, Tensor) or sigma.dtype != torch.float32 or not sigma.is_cpu or sigma.shape not in wanted:
        got = f"{sigma.dtype} of shape {tuple(sigma.shape)} on {sigma.device}" if isinstance(sigma, Tensor) else sigma
        shapes = " or ".join(str(tuple(each)) for each in wanted)
        raise InvalidArgumentError(f"{what} must be an fp32 tensor of shape {shapes} on the CPU, got {got!s:.80}")
    if not ((sigma >= 0) & sigma.isfinite()).all():
        raise InvalidArgumentError(f"{what} must be finite and not negative, got {sigma.tolist()!s:.80}")


def count_of(ratio: float, model_numel: int, numel: int) -> int:
    """How many of ``numel`` eligible weights are that share of a model of ``model_numel``: at least 1."""
    return min(max(1, int(ratio * model_numel)), numel)


def ratio_of(count: int, model_numel: int) -> float:
    """The ratio by which :func:`count_of` comes to exactly so many weights, however it is rounded."""
    return min(1.0, (count + 0.5) / model_numel)


@dataclass
class _Cell:
    """The scores of one component of one layer; ``variance`` is summed over its weights."""

    esi: Distribution = field(default_factory=Distribution)
    variance: float = 0.0

    def merge(self, other: "_Cell") -> None:
        self.esi.merge(other.esi)
        self.variance += other.variance


@dataclass(frozen=True)
class ScoreRow:
    """The scores of one component of one layer.

    Attributes:
        layer: The number of the layer; None outside the layers.
        component: What the parameters are, such as ``"q_proj"``.
        numel: How many weights were scored.
        share: Their part of the sum of ESI over all scored weights.
        median: The ESI that half of the weights do not exceed; to within 0.4%, as the other quantiles.
        p90: The ESI that 90% of the weights do not exceed.
        p99: The ESI that 99% of the weights do not exceed.
        largest: The largest ESI.
        sigma: The standard deviation of the weights; over several tensors, the root of their mean variance.
    """

    layer: int | None
    component: str
    numel: int
    share: float
    median: float
    p90: float
    p99: float
    largest: float
    sigma: float


class ScoreReport(tuple[ScoreRow, ...]):
    """The rows of :meth:`Scores.report`, by layer and component; printed as a table.

    Attributes:
        distribution: The ESI of all scored weights.
    """

    distribution: Distribution
    _cells: dict[tuple[int | None, str], _Cell]

    def __new__(cls, cells: dict[tuple[int | None, str], _Cell]) -> "ScoreReport":
        """Makes a row of each cell."""
        distribution = Distribution()
        for cell in cells.values():
            distribution.merge(cell.esi)
        order = sorted(cells, key=lambda key: (*names.layer_order(key[0]), names.component_order(key[1])))
        report = super().__new__(
            cls, (ScoreRow(key[0], key[1], *_numbers(cells[key], distribution.total)) for key in order)
        )
        report.distribution, report._cells = distribution, cells
        return report

    def table(self, by: Literal["cell", "component", "layer"] = "cell") -> Table:
        """The rows as a table, as they are or merged.

        Args:
            by: ``"cell"`` keeps every row; ``"component"`` merges the layers, ``"layer"`` the components.

        Returns:
            A table to print; its ``records()`` are for JSON.

        Example:
            >>> print(scores.report().table("layer"))         # doctest: +SKIP
        """
        numbers = (
            Column("numel", "{:,}", "weights"),
            Column("share", "{:.2%}", "share of ESI"),
            Column("median", "{:.1e}"),
            Column("p90", "{:.1e}", "90%"),
            Column("p99", "{:.1e}", "99%"),
            Column("largest", "{:.1e}"),
            Column("sigma", "{:.2e}"),
        )
        if by == "cell":
            fields = ("layer", "component", *(column.key for column in numbers))
            rows = [tuple(getattr(row, field) for field in fields) for row in self]
            return Table([Column("layer"), Column("component"), *numbers], rows)
        merged: dict[Any, _Cell] = {}
        for (layer, component), cell in self._cells.items():
            merged.setdefault(component if by == "component" else layer, _Cell()).merge(cell)
        rows = [(key, *_numbers(merged[key], self.distribution.total)) for key in sorted(merged, key=names.ORDERS[by])]
        return Table([Column(by), *numbers], rows)

    def __str__(self) -> str:
        return str(self.table())


def _numbers(cell: _Cell, total: float) -> tuple[int, float, float, float, float, float, float]:
    """What a row says of its weights, from ``numel`` on."""
    esi = cell.esi
    quantiles = (esi.quantile(0.5), esi.quantile(0.9), esi.quantile(0.99))
    share = esi.total / total if total else 0.0
    return (esi.numel, share, *quantiles, esi.largest, math.sqrt(cell.variance / max(1, esi.numel)))


def _checked(ratio: object) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) <= 1:
        raise InvalidArgumentError(f"ratio must be a number in (0, 1], for instance 0.01 for 1%; got {ratio!r}")
    return float(ratio)


def draw_across(rng: np.random.Generator, numels: Sequence[int], k: int) -> "list[np.ndarray[Any, np.dtype[np.int64]]]":
    """Draws k distinct positions evenly from all tensors of these sizes; those of each tensor, ascending."""
    ends = np.cumsum(numels)
    positions = _draw(rng, int(ends[-1]), k)
    parts = np.split(positions, np.searchsorted(positions, ends[:-1]))
    return [part - (end - numel) for part, end, numel in zip(parts, ends, numels, strict=True)]


def _draw(rng: np.random.Generator, numel: int, k: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """As many as k distinct positions below numel, evenly and in ascending order, with memory for k of them only."""
    if k > numel // 2:
        kept = np.ones(numel, dtype=bool)
        kept[_draw(rng, numel, numel - k)] = False
        return np.flatnonzero(kept)
    drawn = np.empty(0, dtype=np.int64)
    while drawn.size < k:
        drawn = np.union1d(drawn, rng.integers(numel, size=(k - drawn.size) * 5 // 4 + 16))
    return np.delete(drawn, rng.choice(drawn.size, drawn.size - k, replace=False))
