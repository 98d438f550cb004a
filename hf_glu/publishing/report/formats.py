"""Formatting numbers for people; what is no number gives None."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from hf_glu.publishing.report.collect import number, numbers
from hf_glu.tasks.metrics.shown import NUMBERS, show_metric

# parts of the names of metrics that are no fractions of 1, beside those that are numbers on cards, too
_NO_FRACTIONS = {"loss", "perplexity", "mse", "rmse", "mae", "nll"}
_UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


def is_fraction(name: str, values: Iterable[object]) -> bool:
    """Return whether a metric's values are fractions of 1, so that they are shown as percentages."""
    known = [value for value in map(number, values) if value is not None]
    parts = set(name.lower().replace("-", "_").split("_"))
    return all(abs(value) <= 1 for value in known) and not is_number(name) and not _NO_FRACTIONS & parts


def is_number(name: str) -> bool:
    """Return whether a metric is no share, whatever its value: a loss, a perplexity."""
    return name.rpartition("/")[2] in NUMBERS


def percent(value: object) -> str | None:
    """Format a fraction: ``91.23%`` for 0.9123."""
    return formatted(value, ".2%")


def metric(name: str, value: object, among: Iterable[object] = ()) -> str | None:
    """Format a metric's value: as a percentage if it, and all values ``among`` which it stands, are fractions.

    What is a number is one with four digits, as on a card.
    """
    if is_fraction(name, [value, *among]):
        return percent(value)
    known = number(value)
    return show_metric(name, known) if known is not None and is_number(name) else formatted(value, ",.2f")


def formatted(value: object, form: str) -> str | None:
    """Format a number; None if it is none."""
    known = number(value)
    return None if known is None else format(known, form)


def count(value: object) -> str | None:
    """Format a count: ``66,955,010``."""
    return formatted(value, ",.0f")


def short(value: object) -> str | None:
    """Format a large number: ``67.0 M``."""
    known = number(value)
    if known is None:
        return None
    return next((f"{known / size:.1f}{unit}" for size, unit in _UNITS if abs(known) >= size), f"{known:,.0f}")


def duration(seconds: object) -> str | None:
    """Format seconds: ``12.3 s``, ``4 min 05 s`` or ``2 h 13 min``."""
    known = number(seconds)
    if known is None:
        return None
    if known < 60:
        return f"{known:.1f} s"
    minutes, rest = divmod(round(known), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def change(before: object, after: object, form: str = "+.1%") -> str | None:
    """Format a relative change: ``+33.1%``."""
    first, last = number(before), number(after)
    return format((last - first) / first, form) if first and last is not None else None


def p_value(value: object) -> str | None:
    """Format a p-value: ``0.013``, or ``<0.001``."""
    known = number(value)
    return None if known is None else "<0.001" if known < 0.001 else f"{known:.3f}"


def half_width(interval: object, factor: float, form: str) -> str | None:
    """Format an interval around a mean as ``± half of it``; None if it is none."""
    ends = numbers(interval)
    return f"± {format((ends[1] - ends[0]) / 2 * factor, form)}" if len(ends) == 2 else None


def text(value: object) -> str | None:
    """Format an option's value."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def scale(name: str, values: Iterable[float | None]) -> tuple[float, str, Callable[[object], str]]:
    """Return the factor, the axis's unit and the format by which a metric is drawn."""
    known = list(values)
    fraction = is_fraction(name, known)
    return 100.0 if fraction else 1.0, " (%)" if fraction else "", lambda value: metric(name, value, known) or "-"


def label(token: str) -> str:
    """Return a token as it can be read: spaces at its ends left out, line breaks and their like as escapes."""
    shown = token.strip(" ") or token
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)
