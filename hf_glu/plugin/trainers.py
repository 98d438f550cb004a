"""Hook of ``transformers.trainer``: what a Trainer computes outside of its model takes the routers' losses along.

Callbacks of hf_glu's are told of more than a Trainer tells: see `TrainerObserver`.

That loss is that of label smoothing, of ``compute_loss_func``, of a subclass' ``compute_loss``, as TRL's trainers have
one. The last is to multiply a loss that is divided by the items of all processes by their number, as Trainer's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any

from torch import Tensor

from hf_glu.activation.context.finding import find
from hf_glu.config.router_fields import COEFFICIENT, has_own
from hf_glu.ffn.config_fields import configs_of
from hf_glu.ffn.experts.losses import injects, with_router_losses
from hf_glu.ffn.experts.shares import share, shifts, traced
from hf_glu.plugin.patching import Patches, require

# each may call those before it, whose result Trainer may multiply
LOSSES = ("label_smoother", "compute_loss_func", "compute_loss")


def install(module: ModuleType, patches: Patches) -> None:
    """Wrap ``Trainer.training_step``, ``log`` and ``train``; the first passes through where no experts are ours."""
    trainer_class = require(module, "Trainer")
    plain = require(trainer_class, "training_step", "model", "inputs", "num_items_in_batch")
    _tell_observers(trainer_class, patches)

    @wraps(plain)
    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if not find(model, injects):
            return plain(self, model, inputs, num_items_in_batch, **kwargs)
        _tell_coefficient(self)
        items = None if num_items_in_batch is None else traced(num_items_in_batch)
        given = inputs if isinstance(inputs, Mapping) else {}  # TRL's GRPO makes its inputs of a list of prompts
        labels, shifted = given.get("shift_labels"), False
        if labels is None:
            labels, shifted = given.get("labels"), shifts(self.model)

        def accompany(copies: int, loss: Any) -> Any:
            part = share(loss, items, labels, shifted=shifted)
            if not isinstance(part, Tensor) and getattr(self, "loss_is_scaled_for_ga", None):
                part = 1 / self.current_gradient_accumulation_steps  # it has divided by that itself
            return with_router_losses(loss, model, copies * part if isinstance(part, Tensor) else part)

        known = {name: getattr(self, name, None) for name in LOSSES}
        copies = {"compute_loss": _copies(self)}  # which multiplies what the others give
        wrapped = {
            name: partial(_call, each, partial(accompany, copies.get(name, 1)))
            for name, each in known.items()
            if each is not None
        }
        with _replaced(self, wrapped):
            return plain(self, model, inputs, items, **kwargs)

    patches.set(trainer_class, "training_step", training_step)


class TrainerObserver:
    """Base of callbacks that take part in what a Trainer logs, and that have to end whatever ends a training."""

    def add_to_logs(self, logs: dict[str, Any]) -> None:
        """Add to what is logged, before anybody is given it."""

    def after_training(self) -> None:
        """End, after an exception, too."""


def _tell_observers(trainer_class: Any, patches: Patches) -> None:
    log, train = require(trainer_class, "log", "logs"), require(trainer_class, "train")

    def observers(trainer: Any) -> list[TrainerObserver]:
        return [each for each in trainer.callback_handler.callbacks if isinstance(each, TrainerObserver)]

    @wraps(log)
    def telling(self: Any, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for observer in observers(self):
            observer.add_to_logs(logs)
        return log(self, logs, *args, **kwargs)

    @wraps(train)
    def ending(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            for observer in observers(self):
                observer.after_training()

    patches.set(trainer_class, "log", telling)
    patches.set(trainer_class, "train", ending)


def _tell_coefficient(trainer: Any) -> None:
    """Let the model's config say the balance coefficient that a trainer's arguments do (TRL's DPO, KTO, GRPO: 0)."""
    given, config = getattr(trainer.args, COEFFICIENT, None), getattr(trainer.model, "config", None)
    for part in configs_of(config) if given is not None and config is not None else ():
        if COEFFICIENT in vars(part) and not has_own(part, COEFFICIENT):
            setattr(part, COEFFICIENT, given)


def _copies(trainer: Any) -> int:
    """Return how many processes average the gradients of a loss that is divided by the items of them all."""
    if not trainer.args.average_tokens_across_devices:
        return 1
    return trainer.accelerator.num_processes // trainer.get_tp_size()


def _call(function: Callable[..., Any], accompany: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
    """Return what ``function`` does, with the routers' losses in its loss."""
    found = function(*args, **kwargs)
    return (accompany(found[0]), *found[1:]) if isinstance(found, tuple) else accompany(found)


@contextmanager
def _replaced(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    """Give ``owner`` other attributes of its own for a while."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name, None)
        own.update(before)
