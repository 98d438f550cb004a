"""Experts in a report: their load by layer, as a heat map and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from hf_glu.publishing.report.collect import Data, number, numbers
from hf_glu.publishing.report.drawing import Drawing
from hf_glu.publishing.report.formats import count, formatted, percent, text
from hf_glu.publishing.report.heat import LESS as LESS
from hf_glu.publishing.report.heat import MORE as MORE
from hf_glu.publishing.report.heat import STRONGEST as STRONGEST
from hf_glu.publishing.report.heat import heat_map
from hf_glu.publishing.report.table import Table, TableCell, filled

Groups = dict[tuple[str, ...], list[Data]]


def by_experts(rows: Sequence[Data]) -> Groups:
    """Group layers by their experts' names (``0 relu``), without those whose loads aren't numbers."""
    groups: Groups = {}
    for row in rows:
        names, loads = row.get("activations"), numbers(row.get("load"))
        if isinstance(names, list) and loads and len(names) == len(loads):
            groups.setdefault(tuple(f"{place} {name}" for place, name in enumerate(names)), []).append(row)
    return groups


def heat_maps(name: str, rows: Sequence[Data]) -> list[Drawing | None]:
    """Draw the loads of experts, a figure for all layers that have the same ones."""
    return [
        _heat_map(f"{name} {place or ''}", experts, found)
        for place, (experts, found) in enumerate(by_experts(rows).items())
    ]


def loads(rows: Sequence[Data]) -> list[Table]:
    """Return the loads of the experts as tables, with the routers' entropy."""
    return [_table(experts, found) for experts, found in by_experts(rows).items()]


def _heat_map(name: str, experts: Sequence[str], rows: Sequence[Data]) -> Drawing:
    even = 1 / len(experts)
    found = [numbers(row["load"]) for row in rows]
    shares = [
        (share, f"expert {expert} in layer {layer_name(row)}")
        for row, each in zip(rows, found, strict=True)
        for share, expert in zip(each, experts, strict=True)
    ]
    (low, least), (high, most) = min(shares), max(shares)
    return heat_map(
        name,
        "Load of each expert (%)",
        [layer_name(row) for row in rows],
        experts,
        found,
        middle=even,
        full=even,
        y="layer",
        alt=f"Heat map: load by layer and expert, from {percent(low)} ({least}) to {percent(high)} ({most})",
        note=f"No colour: {percent(even)}, as if all were used alike. Orange: more. Blue: less.",
    )


def _table(experts: Sequence[str], rows: Sequence[Data]) -> Table:
    cells: list[list[TableCell]] = [
        [
            layer_name(row),
            *(percent(share) for share in numbers(row["load"])),
            formatted(row.get("entropy"), ".3f"),
            count(row.get("tokens")),
            text(row.get("site")),
        ]
        for row in rows
    ]
    columns = ["layer", *(f"#{expert}" for expert in experts), "#entropy", "#tokens", "site"]
    note = (
        f"Share of the load on the validation data, without padding; {percent(1 / len(experts))} if all experts are "
        f"used alike. Entropy of the router's scores in nats, at most {log(len(experts)):.3f}."
    )
    return filled("Load by layer and expert", columns, cells, note)


def layer_name(row: Data) -> str:
    """Return the name of a row's layer: ``encoder 3``."""
    known = number(row.get("layer"))
    return " ".join(filter(None, [text(row.get("stack")), count(known) or text(row.get("site"))])) or "?"
