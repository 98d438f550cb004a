"""What a Python prompt and a notebook show of plans, reports, sites and listings: a small table, as text or as HTML."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MOST_ROWS, FIRST, LAST = 16, 8, 4  # of a longer table only its ends are shown
MINUTE = 60.0
_TABLE = "border-collapse: collapse; font-size: 90%; font-variant-numeric: tabular-nums"
_CELL = "padding: 0.15em 0.8em; border-bottom: 1px solid rgba(128, 128, 128, 0.3); vertical-align: top"
_CAPTION = "caption-side: top; text-align: left; font-weight: bold; padding: 0.3em 0.8em"
_NOTES = "font-size: 90%; margin: 0.3em 0.8em"


@dataclass(frozen=True, kw_only=True)
class ShownTable:
    """A small table.

    Attributes:
        title: above it.
        columns: their names; those of columns that hold numbers begin with ``#``.
        rows: cells as text, a row as long as ``columns``.
        notes: lines below it.
        whole: whether all of its rows are shown, however many.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    notes: tuple[str, ...] = ()
    whole: bool = False

    @property
    def shown(self) -> list[Sequence[str]]:
        """The rows, of a long table the first and the last ones."""
        if self.whole or len(self.rows) <= MOST_ROWS:
            return list(self.rows)
        gap = [f"... {len(self.rows) - FIRST - LAST} more", *[""] * (len(self.columns) - 1)]
        return [*self.rows[:FIRST], gap, *self.rows[-LAST:]]

    def text(self) -> str:
        """Return it for a terminal."""
        names = [column.removeprefix("#") for column in self.columns]
        rows = [names, *self.shown]
        widths = [max(len(row[number]) for row in rows) for number in range(len(names))]
        lines = ["  ".join(map(self._aligned, self.columns, row, widths)).rstrip() for row in rows]
        return "\n".join([self.title, *lines, *self.notes])

    def html(self) -> str:
        """Return it for a notebook; all that comes from data is escaped."""
        head = self._cells("th", [name.removeprefix("#") for name in self.columns])
        body = "".join(f"<tr>{self._cells('td', row)}</tr>" for row in self.shown)
        caption = f'<caption style="{_CAPTION}">{escape(self.title)}</caption>'
        table = f'<table style="{_TABLE}">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        notes = "".join(f'<p style="{_NOTES}">{escape(note)}</p>' for note in self.notes)
        return f"<div>{table}{notes}</div>"

    def _cells(self, tag: str, row: Sequence[str]) -> str:
        cells = zip(self.columns, row, strict=True)
        return "".join(f'<{tag} style="{self._style(name)}">{escape(cell)}</{tag}>' for name, cell in cells)

    @staticmethod
    def _aligned(name: str, cell: str, width: int) -> str:
        return cell.rjust(width) if name.startswith("#") else cell.ljust(width)

    @staticmethod
    def _style(name: str) -> str:
        return f"{_CELL}; text-align: {'right' if name.startswith('#') else 'left'}"


class Shown:
    """Base of what is shown as a table; a dataclass among its children is made with ``repr=False``."""

    def _table(self) -> ShownTable:
        """Return the table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()


def progress_bar(*args: Any, **more: Any) -> Any:
    """Return a progress bar, ``tqdm(*args, **more)``; in a file or a pipe it is a line a minute, from the first on."""
    from tqdm.auto import tqdm

    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(*args, **more, **({} if watched else dict.fromkeys(("delay", "mininterval", "maxinterval"), MINUTE)))


def change(before: int, after: int) -> str:
    """Return ``before -> after (+x %)``."""
    return f"{before:,} -> {after:,} ({(after - before) / before:+.1%})" if before else f"{before} -> {after}"


def number(value: float | None, form: str = ".1e") -> str:
    """Return a number for a table, ``-`` where there is none."""
    return "-" if value is None else format(value, form)
