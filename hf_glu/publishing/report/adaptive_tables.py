"""Trained activations in a report, as tables: curves, mix weights, thresholds and slopes by layer and type of text."""

from __future__ import annotations

from collections.abc import Sequence

from hf_glu.publishing.report.adaptive_rows import MOVED, change_of, curve_of, mix_of, modulated
from hf_glu.publishing.report.collect import Data, number
from hf_glu.publishing.report.experts import layer_name
from hf_glu.publishing.report.formats import count, formatted, text
from hf_glu.publishing.report.table import Table, TableCell, filled


def tables(rows: Sequence[Data]) -> list[Table]:
    """Return the tables with the numbers of one group."""
    return [_changes(rows), _weights(rows), _modulation(rows)]


def _changes(rows: Sequence[Data]) -> Table:
    cells: list[list[TableCell]] = []
    for row in rows:
        change = change_of(curve_of(row))
        size, at = max(zip(map(abs, change["after"]), change["g"], strict=True)) if change else (None, None)
        cells.append(
            [
                layer_name(row),
                text(row.get("activation")),
                formatted(size, ".4f"),
                formatted(at, "+.1f"),
                text(row.get("site")),
            ]
        )
    columns = ["layer", "activation", "#largest change", "#at g", "module"]
    return filled("Learned activations", columns, cells, "Largest difference of the curve to the one before training.")


def _weights(rows: Sequence[Data]) -> Table:
    known = [(layer_name(row), mix) for row in rows if (mix := mix_of(row))]
    names = list(dict.fromkeys(name for _, mix in known for name in mix["functions"]))
    cells: list[list[TableCell]] = []
    for layer, mix in known:
        after = dict(zip(mix["functions"], mix["after"], strict=True))
        before = dict(zip(mix["functions"], mix["before"] or [], strict=False))
        spread = dict(zip(mix["functions"], mix["spread"] or [], strict=False))
        cells.append([layer, *(_weight(before.get(name), after.get(name), spread.get(name)) for name in names)])
    note = "Before training → after it, mean over tokens and channels; ± one standard deviation where those differ."
    return filled("Mix weights", ["layer", *(f"#{name}" for name in names)], cells, note)


def _weight(before: float | None, after: float | None, spread: float | None) -> str | None:
    if after is None:
        return None
    shown = f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"
    return shown if spread is None else f"{shown} ± {spread:.3f}"


def _modulation(rows: Sequence[Data]) -> Table:
    cells: list[list[TableCell]] = [
        [
            text(each["name"]),
            kind,
            count(each.get("texts")),
            *(formatted(number(each.get(key + end)), ".4g") for key in MOVED for end in ("", "_spread", "_apart")),
        ]
        for kind, each in modulated(rows)
    ]
    columns = ["layer", "texts", "#number", *(f"#{key}{end}" for key in MOVED for end in ("", " ±", ", distance"))]
    note = (
        "Mean over channels after a text's last token, and their standard deviation (±). Distance: root mean square "
        "over channels of the difference to all texts."
    )
    return filled("Thresholds and slopes by text type", columns, cells, note)
