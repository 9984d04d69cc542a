"""The ESI of every eligible weight, and the masks that are ranked from it."""

import os
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from safekern import files, ops
from safekern.errors import FileFormatError, InvalidArgumentError, NonFiniteError, UnknownNameError
from safekern.mask import Mask

_VERSION = 1

Per = Literal["model", "tensor"]


class Scores(Mapping[str, Tensor]):
    """Expected Safety Impact per weight: ``scores[name]`` is ``|gradient| * sigma``, fp32 of the parameter's shape.

    Made by :func:`safekern.score` or :meth:`load`. Holds the mean gradient (4 bytes per eligible weight) and one sigma
    per tensor; ``scores[name]`` is computed when asked for. Source: arXiv 2604.08297.

    Example:
        >>> scores = safekern.score(model, loader)            # doctest: +SKIP
        >>> mask = scores.top(0.01)                           # doctest: +SKIP
        >>> scores.save("scores.safetensors")                 # doctest: +SKIP

    Attributes:
        sigma: name -> fp32 0-d tensor on the CPU, the unbiased standard deviation of the parameter when it was scored.
        num_batches: how many batches were averaged.
        model_numel: the number of weights in the whole model, eligible or not.
        meta: where the scores come from (objective, reduction, versions).
    """

    def __init__(
        self,
        gradients: Mapping[str, Tensor],
        sigma: Tensor,
        *,
        num_batches: int,
        model_numel: int,
        meta: Mapping[str, Any],
    ) -> None:
        self._gradients = dict(gradients)
        self.sigma: dict[str, Tensor] = dict(zip(self._gradients, sigma.unbind(), strict=True))
        self.num_batches = num_batches
        self.model_numel = model_numel
        self.meta = dict(meta)

    def __getitem__(self, name: str) -> Tensor:
        return self.gradient(name).abs().mul_(self.sigma[name])

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
            f"Scores({self.numel:,} of {self.model_numel:,} weights in {len(self)} tensors, "
            f"{self.num_batches} batches, reduction={self.meta.get('reduction')!r})"
        )

    @property
    def numel(self) -> int:
        """The number of eligible weights."""
        return sum(gradient.numel() for gradient in self._gradients.values())

    def gradient(self, name: str) -> Tensor:
        """The mean gradient of the objective (under ``reduction="abs"`` the mean absolute gradient).

        Returns:
            fp32 of the parameter's shape; the stored tensor itself, not a copy.

        Raises:
            UnknownNameError: the parameter was not scored.
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

        Raises:
            InvalidArgumentError: a ratio outside (0, 1].
            NonFiniteError: a score is NaN.

        Example:
            >>> scores.top(0.01).summary()                    # doctest: +SKIP
        """
        return self._rank(ratio, per, largest=True)

    def bottom(self, ratio: float, *, per: Per = "model") -> Mask:
        """The weights of the smallest ESI; ties go to the earlier weight too. See :meth:`top`."""
        return self._rank(ratio, per, largest=False)

    def random(self, ratio: float, *, per: Per = "model", seed: int = 0) -> Mask:
        """As many weights as :meth:`top` selects, drawn evenly from the eligible ones; the control of experiments.

        Args:
            ratio: as in :meth:`top`.
            per: as in :meth:`top`.
            seed: a whole number from 0 on; the same seed draws the same weights.
        """
        counts = self._counts(_checked(ratio), per)
        if seed < 0:
            raise InvalidArgumentError(f"seed must be 0 or larger, got {seed}")
        rng = np.random.default_rng(seed)
        numels = [gradient.numel() for gradient in self._gradients.values()]
        if per == "tensor":
            drawn = [_draw(rng, numel, k) for numel, k in zip(numels, counts, strict=True)]
        else:
            ends = np.cumsum(numels)
            positions = _draw(rng, self.numel, counts[0])
            parts = np.split(positions, np.searchsorted(positions, ends[:-1]))
            drawn = [part - (end - numel) for part, end, numel in zip(parts, ends, numels, strict=True)]
        return self._mask([torch.from_numpy(part) for part in drawn], "random", ratio, per, seed=int(seed))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file (4 bytes per eligible weight) that :meth:`load` reads.

        Raises:
            FileAccessError: the path cannot be written; an existing file is left as it was.
        """
        meta = {
            "sigma": {name: float(sigma) for name, sigma in self.sigma.items()},
            "num_batches": self.num_batches,
            "model_numel": self.model_numel,
            "meta": self.meta,
        }
        files.write(path, "scores", _VERSION, self._gradients, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Reads what :meth:`save` wrote.

        Raises:
            FileAccessError: the file cannot be read.
            FileFormatError: it is damaged or not a scores file.
        """
        gradients, meta = files.read(path, "scores", _VERSION)
        try:
            sigma = torch.tensor([float(value) for value in meta["sigma"].values()], dtype=torch.float32, device="cpu")
            # The order of the parameters decides ties; a safetensors file keeps its tensors in another order.
            ordered = {name: gradients.pop(name) for name in meta["sigma"]}
            if gradients or not ordered or any(g.dtype != torch.float32 for g in ordered.values()):
                raise ValueError("its tensors are not those its metadata lists")
            if not ((sigma >= 0) & sigma.isfinite()).all():
                raise ValueError("a standard deviation is negative or not finite")
            num_batches, model_numel = int(meta["num_batches"]), int(meta["model_numel"])
            scores = cls(ordered, sigma, num_batches=num_batches, model_numel=model_numel, meta=meta["meta"])
            if scores.numel > model_numel or num_batches < 1:
                raise ValueError("its counts contradict each other")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileFormatError(
                f"{path} is not a valid scores file ({error}): write it again with Scores.save"
            ) from error
        return scores

    def _counts(self, ratio: float, per: Per) -> list[int]:
        if per == "model":
            return [min(max(1, int(ratio * self.model_numel)), self.numel)]
        if per == "tensor":
            return [max(1, int(ratio * gradient.numel())) for gradient in self._gradients.values()]
        raise InvalidArgumentError(f"per must be 'model' or 'tensor', got {per!r}")

    def _rank(self, ratio: float, per: Per, *, largest: bool) -> Mask:
        counts = self._counts(_checked(ratio), per)
        gradients = list(self._gradients.values())
        sigma = torch.stack(list(self.sigma.values())).to(gradients[0].device)
        try:
            if per == "model":
                selected = ops.select(gradients, sigma, counts[0], largest)
            else:
                selected = [
                    ops.select([gradient], sigma[t : t + 1], k, largest)[0]
                    for t, (gradient, k) in enumerate(zip(gradients, counts, strict=True))
                ]
        except RuntimeError as error:
            broken = [name for name in self if self[name].isnan().any()]
            if broken:
                raise NonFiniteError(f"the scores of {', '.join(broken)} hold NaN: score the model again") from error
            raise
        return self._mask(selected, "top" if largest else "bottom", ratio, per)

    def _mask(self, selected: list[Tensor], ranking: str, ratio: float, per: Per, **details: object) -> Mask:
        shapes = {name: gradient.shape for name, gradient in self._gradients.items()}
        meta = {
            **self.meta,
            "batches": self.num_batches,
            "ranking": ranking,
            "ratio": float(ratio),
            "per": per,
            **details,
        }
        indices = {name: index.cpu() for name, index in zip(self, selected, strict=True)}
        return Mask.from_indices(indices, shapes, model_numel=self.model_numel, meta=meta)


def _checked(ratio: object) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) <= 1:
        raise InvalidArgumentError(f"ratio must be a number in (0, 1], for instance 0.01 for 1%; got {ratio!r}")
    return float(ratio)


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
