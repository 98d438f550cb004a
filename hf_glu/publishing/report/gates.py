"""A page on how open a model's gates are at each token of a text: heat maps, and means."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.publishing.report.collect import items, mapping, number
from hf_glu.publishing.report.drawing import Drawing, cut
from hf_glu.publishing.report.formats import count, formatted, percent, text
from hf_glu.publishing.report.heat import heat_map
from hf_glu.publishing.report.sections import KeyFigure, Page, Section, kept, section
from hf_glu.publishing.report.table import Mark, Table, TableCell, filled

_MAPS = (
    ("openness", "Openness (%)", "the gates are", "open"),
    ("state", "State (%)", "the running mean of their openness is", "high"),
)
_FULL = 0.05  # smaller differences than this stay pale


def gates_page(data: JsonObject) -> Page:
    """Compose the page of one text.

    Args:
        data: ``model``, ``text``, its ``tokens``, and the ``rows`` of the recorded gates with their ``mean``.
    """
    rows: list[JsonObject] = items(data.get("rows"))
    tokens = [str(token) for token in data["tokens"]]
    groups: dict[tuple[str, int], list[JsonObject]] = {}
    for row in rows:
        groups.setdefault((text(row.get("stack")) or "gates", len(row["openness"][0])), []).append(row)
    names = list(dict.fromkeys(str(row["activation"]) for row in rows))
    return Page(
        kind="Gates",
        title=str(data["model"]),
        facts=[f"“{cut(str(data['text']), 80)}”", f"{len(tokens)} tokens", f"{len(rows)} layers"],
        state=Mark(", ".join(names), "plain"),
        key_figures=[
            KeyFigure(key, shown, "mean of all layers")
            for key in ("openness", "state", "shift")
            if (shown := _shown(key, _mean([number(mapping(row.get("mean")).get(key)) for row in rows])))
        ],
        sections=kept([_section(stack, length, tokens, found) for (stack, length), found in groups.items()]),
    )


def _section(stack: str, length: int, tokens: Sequence[str], rows: Sequence[JsonObject]) -> Section:
    same = length == len(tokens)  # else the model pads or pools its tokens by itself
    labels = tokens if same else [str(place) for place in range(length)]
    figures = [_map(f"{stack} {key}", key, labels, rows, *words) for key, *words in _MAPS]
    return section(stack.capitalize(), figures, [_table(rows)])


def _map(
    name: str, key: str, tokens: Sequence[str], rows: Sequence[JsonObject], title: str, what: str, much: str
) -> Drawing | None:
    """Draw a heat map of one text, tokens by layers; None if no layer has values."""
    rows = [row for row in rows if row[key] is not None]
    single = len({row["index"] for row in rows}) == len(rows)
    layers = [str(row["index"] if single else place) for place, row in enumerate(rows)]
    values = [[number(row[key][0][place]) for row in rows] for place in range(len(tokens))]
    cells = [
        (value, f"{token!r} in layer {layer}")
        for token, row in zip(tokens, values, strict=True)
        for layer, value in zip(layers, row, strict=True)
        if value is not None
    ]
    if not cells:
        return None
    (low, least), (high, most) = min(cells), max(cells)
    middle = fmean(value for value, _ in cells)
    return heat_map(
        name,
        title,
        tokens,
        layers,
        values,
        middle=middle,
        full=_FULL,
        x="layer",
        alt=f"Heat map: {key} by token and layer, from {percent(low)} ({least}) to {percent(high)} ({most})",
        note=f"How {much} {what}, mean of a layer's channels. No colour: {percent(middle)}, the mean. Orange: more. "
        "Blue: less.",
    )


def _table(rows: Sequence[JsonObject]) -> Table:
    cells: list[list[TableCell]] = [
        [
            count(row["index"]),
            text(row["activation"]),
            count(row["tokens"]),
            *(_shown(key, number(mapping(row.get("mean")).get(key))) for key in ("openness", "state", "shift")),
            row["layer"],
        ]
        for row in rows
    ]
    note = (
        "Openness: sigmoid of the gate's pre-activation. State: running mean of the openness. Shift: how far the state "
        "moves the pre-activation. All are means over channels and tokens."
    )
    columns = ["layer", "activation", "#tokens", "#openness", "#state", "#shift", "name"]
    return filled("Means by layer", columns, cells, note)


def _shown(key: str, value: float | None) -> str | None:
    return formatted(value, ".3f") if key == "shift" else percent(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
