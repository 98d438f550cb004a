"""Watching the experts and gates of a model that trains: what loops and trainers call, and the names in trackers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import TypeVar

from torch import nn

from hf_glu.ffn.experts.ffn import find_experts
from hf_glu.ffn.sites import find_banks
from hf_glu.instruments.while_training import TrainingStatistics, Watched, WatchedExperts, WatchedGates
from hf_glu.training.loop.alerts import Alert, Alerts, tell
from hf_glu.training.options import TrainingOptions

Row = TypeVar("Row", WatchedExperts, WatchedGates)


def is_wanted(model: nn.Module, options: TrainingOptions) -> bool:
    """Return whether a training is watched: as its options say, else where there are experts, uncompiled."""
    if options.watch is None:
        return not options.compile and bool(find_experts(model) or find_banks(model))
    return options.watch


class Watcher:
    """Watches a model that trains.

    Args:
        model: as it is before anything wraps it.
        tracker: the name of what tracks the run.
        main: whether this process tells of events.
        alerts: finds them.

    Raises:
        NoSiteError, OptionError: as of `hf_glu.instruments.while_training.TrainingStatistics`.
    """

    def __init__(self, model: nn.Module, *, tracker: str, main: bool, alerts: Alerts) -> None:
        self.statistics = TrainingStatistics(model)
        self.tracker, self.main, self.alerts = tracker, main, alerts
        self._untold: list[Alert] = []

    def watching(self) -> AbstractContextManager[None]:
        """Hook the model within a block."""
        return self.statistics.watching()

    def count(self, on: bool) -> None:
        """Count the passes that come, or not."""
        self.statistics.counting = on

    def take(self) -> tuple[Watched, list[str]]:
        """Return what was watched since the last time, and the events that begin.

        All processes must call it, and get the same.
        """
        watched = self.statistics.take()
        found = self.alerts.find(watched)
        self._untold += found
        return watched, [f"{alert.title}: {alert.text}" for alert in found]

    def tell(self) -> None:
        """Announce the events that were found, once what was watched is logged: trackers put them to the last step."""
        told, self._untold = self._untold, []
        if self.main:
            tell(told, self.tracker)


def metrics(watched: Watched) -> dict[str, float]:
    """Return what was watched as trackers take it: one number a name, such as ``experts/layer_3/load_entropy``.

    Of an encoder-decoder it is ``experts/encoder/layer_3/...``; where a layer has two, the path of the module stands in
    the place of the layer. The load of each expert is in the run's log only: of it the least and the most are told.
    """
    found: dict[str, float] = {}
    several = len({row["stack"] for row in (*watched["experts"], *watched["gates"])}) > 1
    for place, row in _named("experts", watched["experts"], stacks=several):
        found |= {
            f"{place}/load_entropy": row["load_entropy"], f"{place}/load_least": min(row["load"]),
            f"{place}/load_most": max(row["load"]), f"{place}/dead": len(row["dead"]),
        }  # fmt: skip
        if row["router_entropy"] is not None:
            found[f"{place}/router_entropy"] = row["router_entropy"]
    for where, gates in _named("gates", watched["gates"], stacks=several):
        found[f"{where}/dead"] = gates["dead"]
    if experts := watched["experts"]:
        found["experts/load_entropy"] = fmean(row["load_entropy"] for row in experts)
        found["experts/dead"] = sum(len(row["dead"]) for row in experts)
    if every := watched["gates"]:
        found["gates/dead"] = fmean([row["dead"] for row in every], [row["units"] for row in every])
    return found


def _named(kind: str, rows: Sequence[Row], *, stacks: bool) -> Iterator[tuple[str, Row]]:
    """Yield rows with the names of their places."""
    count = Counter((row["stack"], row["layer"]) for row in rows)
    for row in rows:
        alone = count[row["stack"], row["layer"]] == 1
        stack = f"{row['stack']}/" if stacks and row["stack"] else ""
        yield f"{kind}/{stack}layer_{row['layer']}" if alone else f"{kind}/{row['site']}", row
