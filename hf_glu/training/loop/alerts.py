"""What goes wrong with experts and gates while a model trains, told once when it begins, and by whom it is told.

An event is over when the layer has clearly recovered; only then is the next one told. Where too few tokens have come to
tell it from chance, nothing begins and nothing is over.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from hf_glu.errors import OptionError, shown
from hf_glu.instruments.while_training import Watched, WatchedExperts, WatchedGates

BALANCE, DEAD_GATES = 0.7, 0.25
EACH = 10  # tokens that an expert would get on average: that none gets there by chance is as likely as e^-10
TOKENS = 256  # of an FFN
ALIVE, EVEN, OPEN = 0.1, 0.05, 0.8  # of an even share; above the threshold; of the threshold: what ends an event


@dataclass(frozen=True)
class Alert:
    """An event: what it is called, and what has happened."""

    title: str
    text: str


class Alerts:
    """Finds the events in what is watched.

    Args:
        balance: the ``load_entropy`` below which experts are used unevenly, 0 to 1; 0: that is never told.
        dead_gates: the share of dead units from which an FFN is told of; 1: when all are dead.
        active: the events that have begun and aren't over, of an earlier part of the training.

    Raises:
        OptionError: a share that is none.
    """

    def __init__(self, *, balance: float = BALANCE, dead_gates: float = DEAD_GATES, active: Sequence[str] = ()) -> None:
        for name, value in {"balance": balance, "dead_gates": dead_gates}.items():
            if not 0 <= value <= 1:
                raise OptionError(f"{name} must be between 0 and 1, got {shown(value)}")
        self.balance, self.dead_gates, self.active = balance, dead_gates, list(active)

    def find(self, watched: Watched) -> list[Alert]:
        """Return the events that begin."""
        found = [alert for row in watched["experts"] for alert in self._experts(row)]
        return found + [alert for row in watched["gates"] for alert in self._gates(row)]

    def _experts(self, row: WatchedExperts) -> Iterator[Alert]:
        site, load, tokens = row["site"], row["load"], row["tokens"]
        if tokens * row["top_k"] < EACH * len(load):
            return
        over = [ALIVE <= share * len(load) for share in load]
        died = [n for n, share in enumerate(load) if self._begins(f"{site} {n}", not share, over=over[n])]
        if died:
            names = f"expert{'s' * (len(died) > 1)} {', '.join(map(str, died))}"
            yield Alert("Dead experts", f"{names} of {site}: none of the last {tokens:,} tokens")
        even = row["load_entropy"]
        if self._begins(f"{site} uneven", even < self.balance, over=even >= min(1.0, self.balance + EVEN)):
            much = f"the load's entropy is {even:.2f} of its maximum, below {self.balance:g}"
            yield Alert("Uneven experts", f"{site}: {much}, over the last {tokens:,} tokens")

    def _gates(self, row: WatchedGates) -> Iterator[Alert]:
        site, dead, tokens = row["site"], row["dead"], row["tokens"]
        if tokens < TOKENS:
            return
        begins = dead > 0 and dead >= self.dead_gates
        if self._begins(f"{site} gates", begins, over=dead <= OPEN * self.dead_gates):
            yield Alert("Dead gates", f"{site}: {dead:.0%} of its units, for each of the last {tokens:,} tokens")

    def _begins(self, event: str, here: bool, *, over: bool) -> bool:
        """Return whether an event begins now, and remember whether it lasts."""
        if event not in self.active:
            if here:
                self.active.append(event)
            return here
        if over and not here:
            self.active.remove(event)
        return False


def tell(alerts: Sequence[Alert], tracker: str) -> None:
    """Announce events: by ``trackio.alert`` where trackio tracks the run and has it, else each by a warning."""
    trackio = import_module(tracker) if tracker == "trackio" and alerts else None
    for alert in alerts:
        if trackio is not None and hasattr(trackio, "alert"):
            trackio.alert(title=alert.title, text=alert.text, level=trackio.AlertLevel.WARN)
        else:
            warnings.warn(f"{alert.title}: {alert.text}", stacklevel=2)
