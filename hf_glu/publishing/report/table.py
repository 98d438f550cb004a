"""A table of a report: named columns, rows of cells, and words that are marked as good or as a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_GOOD, _WARNING, _PLAIN = "good", "warning", "plain"
_LEVEL = {"finished": _GOOD, "unfinished": _WARNING, "missing": _WARNING, "partial": _WARNING}
_LEVEL |= {"exact": _GOOD, "exact up to rounding": _GOOD, "approximate": _WARNING}


class Mark(NamedTuple):
    """A word on the state of something, with its level: ``good``, ``warning`` or ``plain``."""

    text: str
    level: str


TableCell = str | Mark | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; columns whose name starts with ``#`` hold numbers, and the first one names the row.

    Attributes:
        caption: its title.
        columns: their names.
        rows: cells; None: there is no value.
        note: how to read it.
    """

    caption: str
    columns: Sequence[str]
    rows: list[list[TableCell]]
    note: str = ""

    @property
    def wide(self) -> bool:
        """Whether it needs the page's whole width."""
        return len(self.columns) > 4


def mark(word: str) -> Mark:
    """Mark a word with its level."""
    return Mark(word, _LEVEL.get(word, _PLAIN))


def filled(caption: str, columns: Sequence[str], rows: list[list[TableCell]], note: str = "") -> Table:
    """Make a table without the columns, the first one apart, in which no row has a value."""
    kept = [index for index in range(len(columns)) if not index or any(row[index] is not None for row in rows)]
    rows = [[row[index] for index in kept] for row in rows]
    return Table(caption=caption, columns=[columns[index] for index in kept], rows=rows, note=note)


def pairs(caption: str, heading: str, values: Mapping[str, str | None]) -> Table:
    """Make a table of names and values, without those that are None."""
    rows: list[list[TableCell]] = [[str(key), value] for key, value in values.items() if value is not None]
    return Table(caption=caption, columns=["", heading], rows=rows)
