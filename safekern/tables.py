"""What is shown to people: tables as data, which serve as aligned text, JSON and HTML, and text from foreign files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: The name of its values in :meth:`Table.records`.
        template: How a value is written, as for :meth:`str.format`.
        title: Its heading; by default the key with spaces for underscores.
    """

    key: str
    template: str = "{}"
    title: str = ""

    @property
    def heading(self) -> str:
        """What stands above the column."""
        return self.title or self.key.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """Columns and rows of plain values; None is shown as ``-``. Columns of text are aligned to the left.

    Example:
        >>> from safekern.tables import Column, Table
        >>> print(Table([Column("name"), Column("numel", "{:,}")], [("w", 1200), ("b", 3)]))
        name  numel
        w     1,200
        b         3
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> "Table":
        """The values under some keys of dictionaries, a column for each key: what :meth:`records` gives, or a CSV file.

        Example:
            >>> from safekern.tables import Table
            >>> print(Table.from_records([{"name": "w", "shape": "2 x 3", "numel": 6}], ["name", "numel"]))
            name  numel
            w         6
        """
        return cls([Column(key) for key in keys], [[record[key] for key in keys] for record in records])

    def cells(self) -> list[list[str]]:
        """Every value as it is shown, free of control characters."""
        return [
            [
                "-" if value is None else printable(column.template.format(value))
                for column, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def is_text(self, position: int) -> bool:
        """Whether a column holds text rather than numbers."""
        return any(isinstance(row[position], str) for row in self.rows)

    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries for JSON, which has no NaN and no infinity: they become None."""
        return [
            {column.key: _finite(value) for column, value in zip(self.columns, row, strict=True)} for row in self.rows
        ]

    def __str__(self) -> str:
        lines = [[column.heading for column in self.columns], *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [self.is_text(position) for position in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if is_left else cell.rjust(width)
                for cell, width, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        )


def printable(text: str) -> str:
    r"""Shows control characters, overrides of the writing direction and lone surrogates as escapes.

    Names and descriptions come from files of any origin; in a terminal, what they hold should be seen, not obeyed.

    Example:
        >>> from safekern.tables import printable
        >>> print(printable("layer\x1b[2J"))
        layer\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number of things.

    Example:
        >>> from safekern.tables import counted
        >>> counted(1, "layer"), counted(1200, "batch", "es")
        ('1 layer', '1,200 batches')
    """
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
