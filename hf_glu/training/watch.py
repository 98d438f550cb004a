"""Watching experts and gates under Transformers' Trainer, and whatever is a subclass of it (TRL's)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from hf_glu.compat.of_torch import COMPILED_CALL
from hf_glu.errors import OptionError
from hf_glu.plugin import is_registered
from hf_glu.plugin.trainers import TrainerObserver
from hf_glu.training.loop.alerts import BALANCE, DEAD_GATES, Alerts
from hf_glu.training.loop.watching import Watcher, metrics

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

TRACKIO = "trackio"


class WatchCallback(TrainerObserver, TrainerCallback):
    """A Trainer callback that watches experts and gates: ``Trainer(..., callbacks=[WatchCallback()])``.

    Whenever the Trainer logs its loss, it logs what the experts and FFNs did since the last time, too: the names of
    `hf_glu.training.loop.watching.metrics`, what they mean in `hf_glu.instruments.while_training`. The training is the
    same bit by bit. When experts or gates die, or experts are used unevenly, it tells once: by ``trackio.alert`` where
    ``report_to`` names trackio, else by a warning. Every pass in training mode counts, over all processes.

    Args:
        balance: the ``load_entropy`` below which experts are used unevenly.
        dead_gates: the share of an FFN's units that are dead from which it is told of.

    Raises:
        OptionError: a share that is none; as a training begins: of a model that is compiled, replicated by
            ``DataParallel`` or spread by tensor parallelism; the plugin isn't registered.
        NoSiteError: as a training begins: the model has neither experts nor FFNs that hf_glu knows.
    """

    def __init__(self, *, balance: float = BALANCE, dead_gates: float = DEAD_GATES) -> None:
        self.alerts = Alerts(balance=balance, dead_gates=dead_gates)
        self._watcher: Watcher | None = None
        self._hooks = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Begin to watch."""
        self.after_training()  # another begins in its place, where a smaller batch is tried
        if args.torch_compile or COMPILED_CALL.of(model, None) is not None:
            raise OptionError("WatchCallback hooks the layers, which torch.compile makes one graph of: leave one out")
        if args.n_gpu > 1:
            raise OptionError(f"WatchCallback can't watch {args.n_gpu} replicas in one process: use torchrun")
        if not is_registered():
            raise OptionError("WatchCallback needs the plugin: call hf_glu.register() first")
        tracker = TRACKIO if TRACKIO in args.report_to else "none"
        watcher = Watcher(model, tracker=tracker, main=state.is_world_process_zero, alerts=self.alerts)
        if not state.global_step:
            self.alerts.active.clear()
        self._hooks.enter_context(watcher.watching())
        self._watcher = watcher

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the hooks out: a trainer may have a ``train`` of its own."""
        self.after_training()

    def add_to_logs(self, logs: dict[str, Any]) -> None:
        """Add what was watched to what a training step logs."""
        if self._watcher is not None and "loss" in logs:
            logs |= metrics(self._watcher.take()[0])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Announce what has begun, once the trackers have what was logged."""
        if self._watcher is not None:
            self._watcher.tell()

    def after_training(self) -> None:
        """Take the hooks out."""
        self._watcher = None
        self._hooks.close()
