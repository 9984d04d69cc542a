"""How far two masks agree, beside what chance would give."""

from dataclasses import dataclass
from typing import Any, Literal

from safekern import names
from safekern.errors import MaskMismatchError
from safekern.mask import Mask
from safekern.tables import Column, Table


@dataclass
class Overlap:
    """Counts over the same parameters in two masks.

    Attributes:
        a: Weights selected by the first mask.
        b: Weights selected by the second.
        shared: Weights selected by both.
        numel: All weights of the parameters in which either selects any.
    """

    a: int = 0
    b: int = 0
    shared: int = 0
    numel: int = 0

    def add(self, other: "Overlap") -> None:
        """Adds the counts over other parameters."""
        self.a += other.a
        self.b += other.b
        self.shared += other.shared
        self.numel += other.numel

    @property
    def jaccard(self) -> float:
        """The share of the weights selected by either mask that both select; 1 where neither selects any."""
        return _jaccard(self.a, self.b, self.shared)

    @property
    def expected_jaccard(self) -> float:
        """What :attr:`jaccard` comes to for masks of these sizes drawn at random among ``numel`` weights."""
        return _jaccard(self.a, self.b, self.a * self.b / self.numel if self.numel else 0.0)


class Comparison:
    """Two masks of the same model side by side, as a whole and by part.

    Example:
        >>> from safekern.mask import Mask
        >>> from safekern.overlap import Comparison
        >>> name = "layers.0.q_proj.weight"
        >>> a, b = (Mask.from_indices({name: indices}, {name: (10, 10)}) for indices in ([0, 1], [1, 2]))
        >>> found = Comparison(a, b)
        >>> found.equal, found.total.shared, round(found.total.jaccard, 3), round(found.total.expected_jaccard, 3)
        (False, 1, 0.333, 0.01)

    Attributes:
        equal: Whether the masks are equal, as ``==`` has it.
        total: The counts over the whole model.
    """

    def __init__(self, a: Mask, b: Mask) -> None:
        """Compares the masks; names that only a wrapper (DDP, ``torch.compile``, PEFT) tells apart are the same.

        Raises:
            MaskMismatchError: If a parameter has another shape in the other mask, a name is ambiguous, or the masks are
                of models of different sizes and parameters.
        """
        b = b.named_like(a)
        self.equal = a == b
        self.total = Overlap()
        self._cells: dict[tuple[int | None, str], Overlap] = {}
        both = a & b
        # One that selects nothing may not know of any model, and adapters add to the weights of the same one.
        if a and b and a.model_numel != b.model_numel and a.shapes.keys() != b.shapes.keys():
            raise MaskMismatchError(
                f"the masks are of different models, of {a.model_numel:,} and {b.model_numel:,} weights: compare masks "
                "of the same model"
            )
        for name, shape in (a.shapes | b.shapes).items():
            found = Overlap(_selected(a, name), _selected(b, name), _selected(both, name), shape.numel())
            self.total.add(found)
            self._cells.setdefault((names.layer(name), names.component(name)), Overlap()).add(found)

    def by(self, part: Literal["component", "layer"]) -> dict[Any, Overlap]:
        """The counts per component, or per layer (None outside the layers), in the order of reports."""
        merged: dict[Any, Overlap] = {}
        for (layer, component), found in self._cells.items():
            merged.setdefault(component if part == "component" else layer, Overlap()).add(found)
        return {key: merged[key] for key in sorted(merged, key=names.ORDERS[part])}

    def table(self, part: Literal["component", "layer"]) -> Table:
        """:meth:`by` as a table."""
        return Table([Column(part), *COLUMNS], [(key, *row(found)) for key, found in self.by(part).items()])


COLUMNS = (
    Column("a", "{:,}"),
    Column("b", "{:,}"),
    Column("shared", "{:,}"),
    Column("jaccard", "{:.4f}"),
    Column("expected_jaccard", "{:.4f}", "if random"),
)
"""What tables say of an :class:`Overlap`."""


def row(found: Overlap) -> tuple[int, int, int, float, float]:
    """The values under :data:`COLUMNS`."""
    return (found.a, found.b, found.shared, found.jaccard, found.expected_jaccard)


def _selected(mask: Mask, name: str) -> int:
    return mask.compact(name).numel() if name in mask else 0


def _jaccard(a: int, b: int, shared: float) -> float:
    either = a + b - shared
    return shared / either if either else 1.0
