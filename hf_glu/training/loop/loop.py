"""The training loop on Accelerate: the same batches on any number of processes, and exact resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.config.showing import progress_bar
from hf_glu.errors import DivergedError
from hf_glu.ffn.experts.losses import with_router_losses
from hf_glu.training.loop import checkpoints
from hf_glu.training.loop.accelerating import is_sharded, make_optimizer, track
from hf_glu.training.loop.alerts import Alerts
from hf_glu.training.loop.batches import share
from hf_glu.training.loop.examples import Examples, with_labels
from hf_glu.training.loop.interrupt import Interrupted, interruptible
from hf_glu.training.loop.progress import Progress, TrainingResult
from hf_glu.training.loop.schedules import make_schedule
from hf_glu.training.loop.watching import Watcher, is_wanted, metrics
from hf_glu.training.options import TrainingOptions
from hf_glu.training.parameters.annealing import anneal
from hf_glu.training.parameters.groups import parameter_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Evaluate: TypeAlias = "Callable[[PreTrainedModel], tuple[dict[str, float], float]]"


class TrainingLoop:
    """One run of training, on this process and its siblings.

    Args:
        model: trained in place.
        examples: the training data.
        options: how.
        accelerator: from `make_accelerator`.
        folder: for log and checkpoints; None: neither.
        evaluate: called with the model during training; returns metrics and the score to maximise.
        title: of the progress bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Examples,
        options: TrainingOptions,
        accelerator: Accelerator,
        *,
        folder: Path | None = None,
        evaluate: Evaluate | None = None,
        title: str = "train",
    ) -> None:
        self.examples, self.options, self.accelerator = examples, options, accelerator
        self.folder, self.evaluate, self.title = folder, evaluate, title
        self.plan = examples.plan(options.batch_size, options.seed)
        self.steps = options.max_steps or max(1, math.ceil(options.epochs * self.plan.steps_per_epoch))
        self.progress = Progress()
        self.best_state: dict[str, Tensor] | None = None
        self.shown: dict[str, str] = {}
        self._norms: list[Tensor] = []  # of the gradients of steps whose losses aren't fetched yet
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if options.compile:
            model.compile(dynamic=True)
        groups = parameter_groups(model, options.lr, options.weight_decay, options.activation_lr)
        optimizer = make_optimizer(groups, accelerator)
        self.plain, self.watcher = model, None
        if is_wanted(model, options):
            main = accelerator.is_main_process
            self.watcher = Watcher(model, tracker=options.tracker, main=main, alerts=Alerts())
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.schedule = make_schedule(self.optimizer, options, self.steps)

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train to the end.

        Raises:
            DivergedError: the loss, or the gradient, is NaN or infinite.
            CheckpointError: nothing to resume from, or another run's.
            Interrupted: by Ctrl-C, after the step was finished and a checkpoint written.
        """
        if resume and self.folder:
            self.progress = checkpoints.load(self, self.folder)
        self.log = checkpoints.Log(self.folder if self.accelerator.is_main_process else None, self.progress.lines)
        if self.watcher is not None:
            self.watcher.alerts.active = self.progress.alerts
        bar = progress_bar(
            total=self.steps,
            initial=self.progress.step,
            desc=self.title,
            leave=False,
            disable=not self.accelerator.is_main_process,
        )
        stopped = False
        watching = nullcontext() if self.watcher is None else self.watcher.watching()
        with interruptible() as interrupted, bar, watching:
            pending: list[Tensor] = []
            while self.progress.step < self.steps and not stopped:
                begin = time.perf_counter()
                pending.append(self._step())
                self.progress.step += 1
                self.progress.seconds += time.perf_counter() - begin
                bar.update()
                if self._due(self.options.log_every):
                    self._flush(pending, bar)
                if self._evaluation_due():
                    self._flush(pending, bar)
                    stopped = self._evaluate(bar)
                stop = self._any(bool(interrupted))
                if self.folder and (stop or self._due(self.options.checkpoint_every)) and not stopped:
                    self._flush(pending, bar)
                    checkpoints.save(self, self.folder)
                if stop and self.progress.step < self.steps:
                    raise Interrupted(self.progress.step, self.folder)
            self._flush(pending, bar)
        self._take_best()
        return self._result(stopped)

    def _step(self) -> Tensor:
        """Do one optimizer step; return this process's part of the batch's mean loss."""
        if self.options.anneal is not None:
            anneal(self.plain, self.progress.step / max(1, self.steps - 1), until=self.options.anneal)
        self.model.train()
        processes = self.accelerator.num_processes
        batch, epoch = self.plan[self.progress.step], self.plan.epoch(self.progress.step)
        total = self.examples.items(self.examples.rows(batch), epoch)
        parts = share(batch, self.accelerator.process_index, processes, self.options.accumulate)
        losses = []
        for number, part in enumerate(parts, 1):
            rows = self.examples.rows(part or batch[:1])  # without an example of its own, a process still takes part
            weight = self.examples.items(rows, epoch) / total if part and total else 0.0
            inputs = self.examples.batch(rows, epoch, self.accelerator.device)
            if not weight:
                inputs = with_labels(inputs)
            if self.watcher is not None:
                self.watcher.count(bool(part))  # another process counts the example that it takes part with
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.model):
                loss = with_router_losses(self.examples.loss(self.model, inputs), self.model) * weight
                self.accelerator.backward(loss * processes)  # the processes' gradients are averaged
            losses.append(loss.detach().float())
        self.progress.tokens += self.examples.tokens(self.examples.rows(batch))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        if norm is not None and self.accelerator.scaler is None:  # which leaves such steps out, and goes on
            self._norms.append(norm.detach())
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).sum()

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.step % int(every or 1) == 0

    def _evaluation_due(self) -> bool:
        if self.evaluate is None or self.options.evaluate_every == 0 or self.progress.step == self.steps:
            return self.evaluate is not None and self.options.patience is not None and self.progress.step == self.steps
        return self._due(self.options.evaluate_every or self.plan.steps_per_epoch)

    def _any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in any process: one that stopped alone would leave the others waiting."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item())

    def _flush(self, pending: list[Tensor], bar: Any) -> None:
        """Fetch losses and gradients' norms of the last steps, check that they are finite, and log the mean loss."""
        if not pending:
            return
        losses = self.accelerator.reduce(torch.stack(pending), reduction="sum").tolist()
        norms = torch.stack(list(map(_whole, self._norms))).tolist() if self._norms else []
        first = self.progress.step - len(losses) + 1
        pending.clear()
        self._norms.clear()
        for step, values in enumerate(zip_longest(losses, norms, fillvalue=0.0), first):
            for name, value in zip(("loss", "gradient's norm"), values, strict=True):
                if not math.isfinite(value):
                    raise DivergedError(
                        f"the {name} is {value} at step {step}: try a lower lr (now {self.options.lr:g}), more warmup, "
                        f"or precision=no (now {self.options.mixed_precision()})"
                    )
        self.progress.losses += losses
        speed = self.progress.tokens / max(self.progress.seconds, 1e-9)
        rate = float(self.schedule.get_last_lr()[0])
        line: JsonObject = {"loss": sum(losses) / len(losses), "lr": rate, "tokens_per_second": speed}
        if self.watcher is not None:
            line["watched"], alerts = self.watcher.take()
            line |= {"alerts": alerts} if alerts else {}
        self._log(line)
        if self.watcher is not None:
            self.watcher.tell()
        bar.set_postfix(loss=f"{line['loss']:.3f}", **self.shown, tokens=f"{speed:,.0f}/s")

    def _log(self, values: JsonObject) -> None:
        epoch = self.progress.step / self.plan.steps_per_epoch
        self.log.write({"step": self.progress.step, "epoch": epoch, "tokens": self.progress.tokens, **values})
        flat = {key: value for key, value in values.items() if key not in ("evaluation", "watched", "alerts")}
        flat |= values.get("evaluation", {})
        if "watched" in values:
            flat |= metrics(values["watched"])
        track(self.accelerator, flat, self.progress.step)

    def _evaluate(self, bar: Any) -> bool:
        """Evaluate and log; return whether ``patience`` evaluations have passed without a better one."""
        assert self.evaluate is not None
        progress = self.progress
        metrics, score = self.evaluate(self.model)
        self._log({"evaluation": metrics, "score": score})
        self.shown = {"score": f"{score:.4f}"}
        bar.set_postfix(**self.shown)
        if self.options.patience is None or not self._annealed():  # a mix on its way is no model to keep
            return False
        if score > progress.best:
            progress.best, progress.best_step, progress.waited = score, progress.step, 0
            self.best_state = self._state()
        else:
            progress.waited += 1
        return progress.waited >= self.options.patience

    def _annealed(self) -> bool:
        """Return whether mixes are what the training ends with, or there are none to anneal."""
        return self.options.anneal is None or self.progress.step - 1 >= self.options.anneal * max(1, self.steps - 1)

    def _state(self) -> dict[str, Tensor]:
        state = self.accelerator.get_state_dict(self.model)
        return {key: _whole(value).detach().cpu().clone() for key, value in state.items()}

    def whole_state(self) -> dict[str, Tensor]:
        """Return the weights that training ends with; if they are sharded, all processes must call it."""
        return self._state() if self.best_state is None else self.best_state

    def _take_best(self) -> None:
        if self.best_state is None or is_sharded(self.accelerator):
            return
        if self.progress.best_step != self.progress.step:
            self.accelerator.unwrap_model(self.model).load_state_dict(self.best_state)

    def _result(self, stopped: bool) -> TrainingResult:
        losses = self.progress.losses
        recent = losses[-max(1, len(losses) // 10) :] or [math.nan]
        seconds = self.progress.seconds
        return TrainingResult(
            steps=self.progress.step,
            seconds=seconds,
            loss=sum(recent) / len(recent),
            tokens_per_second=self.progress.tokens / max(seconds, 1e-9),
            stopped_early=stopped,
            tokens=self.progress.tokens,
        )


def _whole(value: Tensor) -> Tensor:
    """Put together what is sharded, where Accelerate leaves it so; all processes must."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
