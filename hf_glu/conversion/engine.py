"""The one engine: it plans any change, and carries a plan out on a model wholly or not at all.

It chooses sites, has the change plan each, and, when the plan is applied, checks that the model is still the one that
was planned, computes what the configs are to say, captures outputs, lets the change convert one site after the other,
writes the configs, settles the model, compares and reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_glu.activation.context import unwatch_context, watch_context
from hf_glu.config.showing import progress_bar
from hf_glu.conversion.checks import check_convertible, check_dense, check_values
from hf_glu.conversion.fit.calibration import make_batches
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.foresight import check_comes_back
from hf_glu.conversion.forms import Form, size
from hf_glu.conversion.gguf import forget_gguf
from hf_glu.conversion.held_out import hold_out
from hf_glu.conversion.measure import Comparison
from hf_glu.conversion.report import Report, SiteReport
from hf_glu.conversion.routes import weakest
from hf_glu.conversion.steps import Change, Rows, Step
from hf_glu.conversion.transaction import whole
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.holders import unshare
from hf_glu.ffn.naming import unname


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan(Rows):
    """A conversion that was planned, and can be carried out.

    Attributes:
        model: what it was planned for.
        forms: what was at each site when it was planned.
        stages: where one change follows another at the same sites, the plan of each; else nothing.
    """

    model: Any = field(repr=False)
    forms: Mapping[str, Form] = field(repr=False)
    stages: tuple[Plan, ...] = ()

    @property
    def change(self) -> Change:
        """The change, with what it found out when it planned all rows."""
        return self.steps[0].change

    @property
    def needs_calibration(self) -> bool:
        """Whether it can't be carried out without calibration data."""
        stages = self.stages or (self,)
        return any(stage.change.needs_calibration(step) for stage in stages for step in stage.steps)

    def apply(
        self, model: Any = None, *, calibration: Any = None, tokenizer: Any = None, distill_steps: int | None = None,
        inputs: Mapping[str, Any] | None = None, check: bool | str = True,
    ) -> Report:  # fmt: skip
        """Carry out what was planned, in place.

        Args:
            model: the model; None: the one that it was planned for. Another must be the same at the planned sites, as
                a checkpoint's model is to its skeleton without weights.
            calibration, tokenizer, distill_steps, inputs, check: as in `hf_glu.convert`.

        Raises:
            ConversionError: the model has changed since; nothing is changed then.
            HfGluError: as `hf_glu.convert`.
        """
        model = self.model if model is None else model
        given = {"calibration": calibration, "tokenizer": tokenizer, "distill_steps": distill_steps}
        report: Report = _carry_out(model, self, **given, inputs=inputs, check=check)
        return report

    def bound(self, model: Any) -> Plan:
        """Return the plan for the sites that ``model`` has now; raise ConversionError where they have changed."""
        now = {site.name: site for site in self.change.every(model)}
        for step in self.steps:
            site, form = now.get(step.site.name), self.forms.get(step.site.name)
            is_now = None if site is None else self.change.form(model, site)
            if site is None or (form is not None and (is_now != form or site.hidden != step.site.hidden)):
                then = "is no such site any more" if is_now is None else f"was {form} and is {is_now} now"
                raise ConversionError(f"{step.site.name} {then}: the model has changed since, plan anew")
        steps = tuple(replace(step, site=now[step.site.name]) for step in self.steps)
        total = size(model)
        return replace(
            self, model=model, steps=steps, stages=tuple(stage.bound(model) for stage in self.stages),
            parameters_before=total, parameters_after=total + self.parameters_after - self.parameters_before,
            bytes_per_parameter=next(model.parameters()).element_size(),
        )  # fmt: skip


def make_plan(
    model: Any, change: Change, *, layers: Any = None, exclude: str | None = None, first: Plan | None = None
) -> Plan:
    """Plan a change of a model's FFNs; nothing is changed.

    Args:
        model: the model.
        change: what is to be done.
        layers, exclude: where, as in `hf_glu.plan`.
        first: a plan for the same sites that goes before it.
    """
    if change.rewrites:
        check_convertible(model)
    check_dense(model)
    if change.of_all and (layers is not None or exclude):
        raise OptionError(f"{change.name} is of all FFNs or none: leave layers and exclude out")
    steps = change.rows(model, change.choose(model, layers, exclude))
    total = size(model)
    start = total if first is None else first.parameters_after
    added = sum(step.parameters_after - step.parameters_before for step in steps)
    planned = Plan(
        target=change.target or change.name, steps=steps, parameters_before=total,
        parameters_after=start + added + steps[0].change.added(model, steps),
        bytes_per_parameter=next(model.parameters()).element_size(), model=model,
        forms={} if first else {step.site.name: change.form(model, step.site) for step in steps},
    )  # fmt: skip
    if first is None:
        return planned
    before = {step.site.name: step for step in first.steps}
    joined = tuple(_joined(before[step.site.name], step) for step in steps)
    return replace(planned, steps=joined, forms=first.forms, stages=(first, planned))


def _joined(before: Step, after: Step) -> Step:
    """Return the row of two changes, one after the other, at one site."""
    route = replace(
        after.route,
        name=f"{before.route.name}, then {after.route.name}",
        promise=weakest(before.route.promise, after.route.promise),
        note="; ".join(note for note in (before.route.note, after.route.note) if note),
    )
    return replace(
        after, source=before.source, route=route, width_before=before.width_before, iso=before.iso,
        unbiased=before.unbiased, parameters_before=before.parameters_before,
    )  # fmt: skip


@whole
def _carry_out(
    model: Any, planned: Plan, *, calibration: Any, tokenizer: Any, distill_steps: int | None,
    inputs: Mapping[str, Any] | None, check: bool | str,
) -> Report:  # fmt: skip
    if planned.change.rewrites:
        check_convertible(model)  # which may be another one than was planned: a checkpoint's, with an adapter beside it
        check_values(model)
    planned = planned.bound(model)
    unshare(model, [step.site.anchor for step in planned.steps])
    stages = planned.stages or (planned,)
    entries = stages[0].change.entries(model, stages[0])
    stages[0].change.check_calibration(stages[0].steps, calibration is not None)
    work = Work(model=model, distill_steps=distill_steps)
    text = None
    if calibration is not None:
        if any(stage.change.reads_text for stage in stages):
            text, calibration = hold_out(model, calibration, tokenizer)
        work.batches = make_batches(model, calibration, tokenizer)
    probed = [] if any(stage.change.replaces for stage in stages) else [step.site for step in planned.steps]
    comparison = Comparison(model, probed, inputs, check=check) if check else None
    fits: dict[str, Fit] = {}
    for stage in stages:
        if stage is not stages[0]:
            entries = stage.change.entries(model, stage)
        fits |= _convert_sites(work, stage)
        for entry in entries:
            entry.write()
        stage.change.finish(model, stage)
    if planned.changes:
        settle(model, *(stage.change for stage in stages))
    differences, errors = comparison.finish(planned.promise) if comparison else (None, {})
    sites = tuple(
        SiteReport(step=step, relative_error=errors.get(step.site.name), fit=fits.get(step.site.name))
        for step in planned.steps
    )
    measured = None if text is None else text.finish(model)
    return Report(plan=planned, sites=sites, differences=differences, curves=work.curves, perplexity=measured)


def _convert_sites(work: Work, stage: Plan) -> dict[str, Fit]:
    """Let the change convert each site, from the first layer on; return how well each was fitted."""
    steps = [step for step in stage.steps if step.changes]
    work.begin([step.site for step in steps])
    shown = progress_bar(steps, desc="fitting FFNs", disable=work.batches is None, leave=False)
    return {step.site.name: fit for step in shown if (fit := step.change.apply(work, step)) is not None}


def settle(model: nn.Module, *changes: Change) -> None:
    """Finish a model that was converted.

    New activations are told of tokens and cache, it is checked that the model loads as it is now (where no change has
    seen to that), and nobody finds the old checkpoint by its name any more. What the conversion didn't make stays where
    it lies: somebody may share its memory.

    Raises:
        ConversionError: it would load as another.
    """
    if any(change.rewrites for change in changes):
        watch_context(model)
        unwatch_context(model)  # does nothing where something is left to watch
    if not all(change.foresees for change in changes):
        check_comes_back(model)
    unname(model)
    forget_gguf(model)
