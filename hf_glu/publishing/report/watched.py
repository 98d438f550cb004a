"""What was watched while a model trained, in a report: balance and death of experts, dead gates, and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from hf_glu.publishing.report.collect import Data, items, mapping, number
from hf_glu.publishing.report.curves import Points, overlay
from hf_glu.publishing.report.drawing import Drawing
from hf_glu.publishing.report.formats import count, text
from hf_glu.publishing.report.table import Table, TableCell, filled

Over = Mapping[str, Callable[[list[float]], float]]

_EVEN: Over = {"mean of the layers": fmean, "the least even layer": min}
_DEAD: Over = {"mean of the layers": fmean, "the layer with the most": max}


def figures(prefix: str, lines: Sequence[Data]) -> list[Drawing | None]:
    """Draw what the lines of a log say of experts and gates, over the steps."""
    return [
        overlay(
            f"{prefix} balance", "Balance of the experts' load",
            _series(lines, "experts", "load_entropy", _EVEN), x="training step", y="entropy of the load / ln E",
            plain=".3f", note="1: all experts of a layer are used alike.",
        ),
        overlay(
            f"{prefix} routers", "Entropy of the routers", _series(lines, "experts", "router_entropy", _EVEN),
            x="training step", y="nats a token", plain=".3f",
        ),
        overlay(
            f"{prefix} dead experts", "Dead experts", {"all layers": [_dead_experts(lines)]},
            x="training step", y="experts without a token", plain=".0f", zero=True,
            note="Of all layers, in the steps between two lines of the log.",
        ),
        overlay(
            f"{prefix} dead gates", "Dead units while training", _series(lines, "gates", "dead", _DEAD),
            x="training step", y="share of dead units", zero=True,
            note="Within 0.1% of the layer's rms on every token between two lines of the log.",
        ),
    ]  # fmt: skip


def events(lines: Sequence[Data]) -> Table:
    """Return the events that were told of, by the step that tells of them."""
    rows: list[list[TableCell]] = []
    for line in lines:
        told = line.get("alerts")
        rows += [[count(line.get("step")), text(event)] for event in (told if isinstance(told, list) else [])]
    return filled("Events", ["step", "event"], rows)


def _series(lines: Sequence[Data], kind: str, key: str, over: Over) -> dict[str, list[Points]]:
    """Return curves of a key of all layers' rows: one for each way to put the layers together."""
    found: dict[str, Points] = {name: [] for name in over}
    layers = 0
    for line in lines:
        step, rows = number(line.get("step")), items(mapping(line.get("watched")).get(kind))
        values = [value for row in rows if (value := number(row.get(key))) is not None]
        layers = max(layers, len(values))
        if step is not None and values:
            for name, together in over.items():
                found[name].append((step, together(values)))
    return {name: [curve] for name, curve in list(found.items())[: min(layers, 2)]}


def _dead_experts(lines: Sequence[Data]) -> Points:
    found = []
    for line in lines:
        step, rows = number(line.get("step")), items(mapping(line.get("watched")).get("experts"))
        dead = [row.get("dead") for row in rows]
        if step is not None and rows and all(isinstance(each, list) for each in dead):
            found.append((step, float(sum(len(each) for each in dead if isinstance(each, list)))))
    return found
