"""Numbers of a text as HTML: heat maps as tables, whose colours are the page's, and what stands above them.

All that comes from texts and models is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from hf_glu.config.showing import ShownTable, number
from hf_glu.publishing.play.reading import ALL, SHOWN, StackGates, TextGates
from hf_glu.publishing.report.drawing import SERIES

FULL = 0.05  # smaller distances from the middle than this stay pale
STRONGEST = 85  # percent of the colour that the farthest cell has
NUMBERED = 6  # layers that have room for numbers
NARROW, NAMES = 6, 6  # pixels of a layer's column at least; letters of the tokens' column
EVERY = 4  # the columns of many layers are named by turns
TOLD = {"openness": "How open the gates are", "state": "What the gates remember, the running mean of their openness"}

# the two colours of the report's heat maps, and lighter ones on dark paper
CSS = f"""
.play {{ --less: {SERIES[0]}; --more: {SERIES[1]};
  --line: color-mix(in srgb, var(--body-text-color) 20%, transparent); }}
.dark .play {{ --less: #5db5f0; --more: #ff9a5c; }}
.play h3 {{ font-size: 1rem; margin: 0.2em 0; overflow-wrap: anywhere; }}
.play p {{ margin: 0.4em 0; overflow-wrap: anywhere; }}
.play .written {{ font-style: italic; white-space: pre-wrap; }}
.play table, .play tr, .play th, .play td {{ border: 0 !important; }}
.play .map {{ overflow: auto; max-height: 75vh; border-radius: 6px; border: 1px solid var(--line); padding: 2px; }}
.play .map:focus-visible {{ outline: 2px solid var(--more); outline-offset: 1px; }}
.play .map table {{ border-collapse: separate; border-spacing: 1px; font-size: 0.75rem; margin: 0; width: 100%;
  table-layout: fixed; }}
.play .map th, .play .map td {{ padding: 0; font-weight: normal; text-align: center; }}
.play .map td {{ height: 1.35em; font-variant-numeric: tabular-nums; border-radius: 1px;
  box-shadow: inset 0 0 0 1px color-mix(in srgb, var(--body-text-color) 8%, transparent); }}
.play .map td.m {{ background: color-mix(in srgb, var(--more) calc(var(--a) * 1%), transparent); }}
.play .map td.l {{ background: color-mix(in srgb, var(--less) calc(var(--a) * 1%), transparent); }}
.play .map thead th {{ position: sticky; top: 0; z-index: 2; background: var(--body-background-fill);
  white-space: nowrap; }}
.play .map thead th[colspan] {{ text-align: left; }}
.play .map thead th:first-child {{ width: {NAMES}em; }}
.play .map tbody th {{ position: sticky; left: 0; z-index: 1; text-align: right; padding: 0 0.5em; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; background: var(--body-background-fill); }}
.play .map tbody tr.new th {{ font-style: italic; font-weight: 700; }}
.play .how {{ font-size: 0.8rem; color: color-mix(in srgb, var(--body-text-color) 75%, transparent); }}
.play .figures {{ overflow-x: auto; }}
.play .figures table {{ margin: 0; }}
.play .figures th, .play .figures td {{ padding: 0.15em 0.6em !important;
  border-bottom: 1px solid var(--line) !important; }}
"""


@dataclass(frozen=True, kw_only=True)
class Shades:
    """What the colours of heat maps mean: no colour is ``middle``, the strongest one ``span`` away from it."""

    middle: float
    span: float

    @classmethod
    def of(cls, reads: Sequence[TextGates], measure: str) -> Shades:
        """Return the one scale of several models' maps: the middle is the mean of the first that has the measure."""
        means = [mean for read in reads if (mean := read.mean(measure)) is not None]
        middle = means[0] if means else 0.0
        return cls.around(middle, [stack for read in reads for stack in read.stacks], measure)

    @classmethod
    def around(cls, middle: float, stacks: Sequence[StackGates], measure: str) -> Shades:
        """Return the scale of maps with that middle."""
        far = [(stack.measures[measure] - middle).abs().nan_to_num() for stack in stacks if measure in stack.measures]
        return cls(middle=middle, span=max([FULL, *(float(each.max()) for each in far)]))


def reading_html(read: TextGates, name: str, measure: str, scale: Shades) -> str:
    """Return the model's name, what it wrote, and a heat map for each of its stacks."""
    parts = [f"<h3>{escape(name)}</h3>"]
    if read.written:
        parts.append(f'<p>It goes on: <span class="written">{escape(read.written.strip())}</span></p>')
    maps = [_map(stack, measure, scale, name) for stack in read.stacks if measure in stack.measures]
    return _box([*parts, *(maps or [f"<p>Its gates have no {measure}.</p>"])])


def difference_html(parts: Sequence[StackGates], measure: str, one: str, other: str) -> str:
    """Return heat maps of differences, in points of percent."""
    shown = [stack for stack in parts if measure in stack.measures]
    title = f"<h3>Difference: {escape(other)} minus {escape(one)}</h3>"
    if not shown:
        return _box([title, "<p>They have no tokens, gates and measure alike.</p>"])
    if not any(bool(stack.measures[measure].nan_to_num().any()) for stack in shown):
        return _box([title, f"<p>None: {measure} is the same at every gate and token, bit by bit.</p>"])
    scale = Shades.around(0.0, shown, measure)
    return _box([title, *(_map(stack, measure, scale, "the difference", signed=True) for stack in shown)])


def figures_html(reads: Sequence[TextGates], names: Sequence[str], parts: Sequence[StackGates]) -> str:
    """Return the few numbers of each model in a table, and the largest difference of their gates."""
    measures = [key for key in SHOWN if any(read.mean(key) is not None for read in reads)]
    rows = [
        (name, *(number(read.mean(key), ".2%") for key in measures), _perplexity(read.perplexity))
        for name, read in zip(names, reads, strict=True)
    ]
    notes = [
        f"Largest |difference| of {key}{'' if stack.stack == ALL else f' in the {stack.stack}'}: "
        f"{100 * float(values.abs().nan_to_num().max()):.3g} points, over {values.shape[1]} tokens"
        for stack in parts for key, values in stack.measures.items()
    ]  # fmt: skip
    columns = ("model", *(f"#{key}" for key in measures), "#perplexity")
    title = "Means over gates and tokens, and perplexity of the text as typed"
    table = ShownTable(title=title, columns=columns, rows=rows, notes=tuple(notes), whole=True)
    return _box([f'<div class="figures">{table.html()}</div>'])


def _box(parts: Sequence[str]) -> str:
    return f'<div class="play">{"".join(parts)}</div>'


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if math.isfinite(value) else "infinite"


def _map(stack: StackGates, measure: str, scale: Shades, whose: str, *, signed: bool = False) -> str:
    """Return a heat map: tokens down, layers across."""
    values = stack.measures[measure]
    known = values[~values.isnan()]
    names = _layer_names(stack)
    head = _head(names)
    rows = "".join(
        f"<tr{'' if at < stack.typed else ' class=new'}><th scope=row title='{escape(token)}'>{escape(token)}</th>"
        f"{_cells(values[:, at], scale, names, signed)}</tr>"
        for at, token in enumerate(stack.tokens)
    )  # fmt: skip
    where = "" if stack.stack == ALL else f" in the {stack.stack}"
    low, high = (_shown(float(end), signed) for end in (known.min(), known.max()))
    said = f"Difference of {measure}" if signed else TOLD[measure]
    how = f"{said}{where}, token by layer, from {low} to {high}. No colour: {_shown(scale.middle, signed)}."
    about = escape(f"{said} of {whose}{where}")
    least = f"min-width: calc({NAMES}em + {NARROW * len(names)}px)"
    table = f'<table style="{least}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    box = f'<div class="map" tabindex="0" role="region" aria-label="{about}">{table}</div>'
    return f'{box}<p class="how">{how} Orange: more. Blue: less.</p>'


def _cells(row: Tensor, scale: Shades, names: Sequence[str], signed: bool) -> str:
    found = []
    for name, value in zip(names, row.tolist(), strict=True):
        if math.isnan(value):
            found.append("<td></td>")
            continue
        shade = round(STRONGEST * (value - scale.middle) / scale.span)
        kind = f" class={'m' if shade > 0 else 'l'} style=--a:{abs(shade)}" if shade else ""
        told = f"{100 * value:+.1f}" if signed else f"{100 * value:.0f}"
        shown = told if len(names) <= NUMBERED else ""
        found.append(f"<td{kind} title='layer {name}: {_shown(value, signed)}'>{shown}</td>")
    return "".join(found)


def _layer_names(stack: StackGates) -> list[str]:
    """Return the layers' numbers; where a layer has several gates, what tells them apart, too."""
    if len({*stack.layers}) == len(stack.layers):
        return [str(layer) for layer in stack.layers]
    return [place.rpartition("layers.")[2] for place in stack.places]


def _head(names: Sequence[str]) -> str:
    """Return the cells above the columns, of which some have a name for several."""
    every = 1 if len(names) <= 3 * EVERY else EVERY
    found = ["<th></th>"]
    for at in range(0, len(names), every):
        count = min(every, len(names) - at)
        found.append(f"<th scope=col{f'group colspan={count}' if count > 1 else ''}>{names[at]}</th>")
    return "".join(found)


def _shown(value: float, signed: bool) -> str:
    return f"{100 * value:+.2f} points" if signed else f"{100 * value:.1f} %"
