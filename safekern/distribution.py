"""The distribution of billions of scores in a fixed amount of memory."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safekern.errors import NonFiniteError
from safekern.sharding import Processes

# A float32 that is not negative sorts like its bits. The upper 16 hold the exponent and 7 bits of the mantissa, so that
# a bucket is at most 1/128 wide, relative to its values.
_SHIFT = 16
_BUCKETS = 1 << 15
_INFINITE = 0x7F80
_CHUNK = 1 << 24


class Distribution:
    """How often each size occurs among fp32 values of zero and above.

    Example:
        >>> import torch
        >>> from safekern.distribution import Distribution
        >>> seen = Distribution()
        >>> seen.add(torch.tensor([1.0, 2.0, 3.0]))
        >>> seen.numel, seen.total, seen.largest, round(seen.quantile(0.5), 1)
        (3, 6.0, 3.0, 2.0)

    Attributes:
        numel: How many values were added.
        total: Their sum, in double precision.
        smallest: The smallest of them; infinite where there are none.
        largest: The largest of them.
    """

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(_BUCKETS, dtype=np.int64)
        self.numel = 0
        self.total = 0.0
        self.smallest = math.inf
        self.largest = 0.0

    def add(self, values: Tensor) -> None:
        """Adds fp32 values of any shape, on any device, none of them negative.

        Raises:
            NonFiniteError: One of them is NaN or infinite.
        """
        for chunk in values.reshape(-1).split(_CHUNK):
            if not chunk.numel():
                continue
            counts = torch.bincount(chunk.view(torch.int32) >> _SHIFT, minlength=_BUCKETS).cpu().numpy()
            if counts[_INFINITE:].any():
                raise NonFiniteError("a score is NaN or infinite: score the model again")
            self._counts += counts
            self.numel += chunk.numel()
            self.total += float(chunk.sum(dtype=torch.float64))
            smallest, largest = (float(bound) for bound in torch.aminmax(chunk))
            self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)

    def merge(self, other: "Distribution") -> None:
        """Adds all values of another distribution."""
        self._counts += other._counts
        self.numel += other.numel
        self.total += other.total
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)

    def everywhere(self, processes: Processes) -> "Distribution":
        """The values of all processes together."""
        if processes.size == 1:
            return self
        together = Distribution()
        together._counts = processes.total(torch.from_numpy(self._counts)).numpy()
        numbers = torch.tensor([self.numel, self.total, self.smallest, self.largest], dtype=torch.float64, device="cpu")
        numel, total, smallest, largest = processes.stacked(numbers).unbind(1)
        together.numel, together.total = int(numel.sum()), float(total.sum())
        together.smallest, together.largest = float(smallest.min()), float(largest.max())
        return together

    @property
    def zeros(self) -> int:
        """How many values are zero, or too small for the first bucket (below 1e-40)."""
        return int(self._counts[0])

    def quantile(self, q: float) -> float:
        """The value that a share ``q`` of the values does not exceed, to within 0.4%; 0 where there are none."""
        if not self.numel:
            return 0.0
        rank = min(max(1, int(np.ceil(q * self.numel))), self.numel)
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(float(_middles()[bucket]), self.largest)

    def histogram(self, edges: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many values lie between each two neighbouring edges; those outside are left out."""
        return np.histogram(_middles(), edges, weights=self._counts)[0].astype(np.int64)


def _middles() -> NDArray[np.float64]:
    """The value that stands for each bucket; exactly zero for the first."""
    lower = (np.arange(_INFINITE, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    middles = np.full(_BUCKETS, np.inf)
    middles[: _INFINITE - 1] = (lower[:-1] + lower[1:]) / 2
    middles[_INFINITE - 1] = lower[-1]
    middles[0] = 0.0
    return middles
