"""Comparing activations in language models, from scratch or trained further: loss, and tokens to a loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar, cast

from accelerate import PartialState

from hf_glu.activation import registry
from hf_glu.activation.stock import same_function
from hf_glu.checkpoint.files import LOG_FILE, TOKENIZER_FOLDER
from hf_glu.checkpoint.jsonio import read_lines
from hf_glu.errors import OptionError
from hf_glu.ffn.config_fields import activation_field, activation_of, write_activation
from hf_glu.training.comparing import engine
from hf_glu.training.comparing.kinds import Compared, PlannedRun, Search
from hf_glu.training.comparing.shapes import EQUAL, Shape, equal_width, shape_after, shape_of
from hf_glu.training.comparing.shared import fitted_base, known_folder, make_folder
from hf_glu.training.comparing.statistics import interval, tokens_to
from hf_glu.training.comparing.trials import TrialRun
from hf_glu.training.comparing.variants import ISO, Variant, read_variant
from hf_glu.training.language.documents import calibration_documents, read_both, tokenizer_texts
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.models import language_skeleton, make_config, read_config
from hf_glu.training.language.objectives import objective_of
from hf_glu.training.language.options import LanguageOptions, LanguageTraining
from hf_glu.training.language.record import language_record
from hf_glu.training.language.tokenizers import train_tokenizer
from hf_glu.training.options import OF_CONVERSION
from hf_glu.training.results import ComparisonTable, Record, Results

_OF_TEXT = ("text_column", "validation_share", "split_seed", "stream")
# what a fitted conversion, and a tokenizer that is trained, depend on, beside data and versions
OF_FIT = ("activation", "calibration", *_OF_TEXT, *OF_CONVERSION)
OF_TOKENIZER = ("train_tokenizer", "task", *_OF_TEXT)


def compare_language_models(
    variants: Sequence[str],
    seeds: Sequence[int],
    job: LanguageOptions,
    options: LanguageTraining,
    *,
    lrs: Sequence[float] = (),
    lr_seed: int | None = None,
    target_loss: float | None = None,
    on_run: Callable[[str], object] | None = None,
) -> ComparisonTable:
    """Train a language model of each variant with each seed; see `hf_glu.training.comparing.engine.compare`.

    Args:
        variants, seeds, job, options, on_run: what is trained, and how.
        lrs: the learning rates of which each variant gets the one with the least loss; none: that of the options.
        lr_seed: the seed that chooses them; None: the one above the others.
        target_loss: for which tokens are told; None: the one that the baseline ends at with each of its seeds.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    if lr_seed is not None and not lrs:
        raise OptionError("the seed of the learning rates does nothing without several of them: give lrs")
    search = Search(lrs=lrs, seed=max(seeds, default=0) + 1 if lr_seed is None else lr_seed) if lrs else None
    kind = ComparedLanguageModels(job, options, target_loss=target_loss)
    return engine.compare(kind, variants, seeds, search=search, on_run=on_run)


class ComparedLanguageModels(Compared):
    """Language models: they are compared by their loss on the validation text, in nats a token; by how far they are
    from a teacher, where they have one.

    Args:
        job, options: as of `Compared`.
        target_loss: as of `compare_language_models`.
    """

    least = 2
    free = Compared.free | {"lr"}  # the best may be another one for each variant
    trial: ClassVar[type[TrialRun]] = TrialRun
    job: LanguageOptions

    def __init__(self, job: LanguageOptions, options: LanguageTraining, *, target_loss: float | None = None) -> None:
        super().__init__(job, options)
        job.check()
        if target_loss is not None and not options.evaluate_every:
            raise OptionError("target_loss is read off the evaluations while training: give evaluate_every")
        self.target_loss = target_loss
        self.skeleton = language_skeleton(job)
        self.choice = {"layers": job.layers, "exclude": job.exclude}
        self.shapes: dict[str, Shape] = {}

    @cached_property
    def task(self) -> str:
        """The objective."""
        return objective_of(self.skeleton.config, self.job.objective, taught=bool(self.job.teacher))

    @property
    def title(self) -> str:
        """The name of the model; a new one's is its family's."""
        return self.job.title if self.job.model else f"a new {self.skeleton.config.model_type}"

    def read(self, text: str) -> Variant:
        """Read a variant, ``iso`` as the number of units that makes parameters equal."""
        found = self._own(read_variant(text, plain=True))
        if self.job.config and found.random:
            raise OptionError(f"from scratch all variants begin at random: {found.name} is {found.to}")
        if found.width == ISO and found.to:
            found = replace(found, width=str(equal_width(self.skeleton, found.to, **self.choice)))
        return found

    def _own(self, variant: Variant) -> Variant:
        """Return an elementwise variant as what it is in this model: its own activation, or another one."""
        name = variant.plain
        if name is None:
            return variant
        config = self.skeleton.config
        if same_function(name, activation_of(config) or ""):
            return replace(variant, plain=None)
        if self.job.config and activation_field(config):
            return variant
        if registry.find(name):
            return replace(variant, plain=None, to=name)
        why = "its config has no field for it" if self.job.config else "a pretrained model has learned with its own"
        raise OptionError(f"the FFNs can't compute {name}: {why}; give a gated activation, such as swiglu")

    def meaning(self, variant: Variant) -> object:
        """Return what tells variants apart: what their FFNs compute, whether at random."""
        return self.shape(variant).functions, variant.random

    def shape(self, variant: Variant) -> Shape:
        """Return the shape of a variant's model."""
        if variant.name not in self.shapes:
            self.shapes[variant.name] = self._shape(variant)
        return self.shapes[variant.name]

    def _shape(self, variant: Variant) -> Shape:
        if variant.to:
            width = int(variant.width) if variant.width.isdecimal() else variant.width
            return shape_after(self.skeleton, variant.to, width, **self.choice)
        return shape_of(language_skeleton(self.job_of(variant)) if variant.plain else self.skeleton)

    def prepare(self, chosen: Sequence[Variant]) -> None:
        """Check that variants of equal parameters have as many.

        Raises:
            OptionError: they can't, in a model so small.
        """
        dense = shape_of(self.skeleton).parameters
        for variant in chosen:
            apart = self.shape(variant).parameters / dense - 1
            if variant.name.endswith(f":{ISO}") and abs(apart) > EQUAL:
                raise OptionError(
                    f"{variant.name} can't have as many parameters as the dense model: {variant.width} units make it "
                    f"{apart:+.1%}; give the width that you mean, such as {variant.to}:{variant.width}"
                )

    def job_of(self, variant: Variant) -> LanguageOptions:
        """Return the job of a variant: another activation without a gate is a config of its own."""
        if variant.to:
            return replace(self.job, to=variant.to, width=variant.width, random=variant.random)
        job = self.job.dense()
        if variant.plain is None:
            return job
        values = read_config(str(job.config))
        config = make_config(values)
        field = str(activation_field(config))
        write_activation(config, variant.plain)
        return replace(job, config=json.dumps({**values, field: getattr(config, field)}))

    def make_record(self) -> Record:
        """Record what all runs depend on."""
        made_of = language_record(self.job.dense(), self.options)
        return {**made_of, "options": {**made_of["options"], "task": self.task}}

    def carry_out(self, run: PlannedRun) -> Results:
        """Train a variant, from a fitted conversion or with a tokenizer that all of them share."""
        job = cast(LanguageOptions, run.job)
        with PartialState().main_process_first():
            job = self._with_tokenizer(job, run) if job.train_tokenizer else self._fitted(job, run)
        kind = self.trial if run.tried else LanguageRun
        return kind(job, run.options, resume=run.begun, made_of=run.made_of).run()

    def _with_tokenizer(self, job: LanguageOptions, run: PlannedRun) -> LanguageOptions:
        """Return a job with a tokenizer in the place of one that is to be trained: all runs would train the same."""
        made_of = _part(run.made_of, OF_TOKENIZER, model={})
        target, size = self.folder / TOKENIZER_FOLDER, job.train_tokenizer
        assert size
        if not known_folder(target, made_of):
            texts = tokenizer_texts(job, read_both(job)[0])
            make_folder(target, made_of, train_tokenizer(texts, size, self.task).save_pretrained)
        return replace(job, train_tokenizer=None, tokenizer=str(target))

    def _fitted(self, job: LanguageOptions, run: PlannedRun) -> LanguageOptions:
        if job.config:
            return job
        made_of = _part(run.made_of, OF_FIT)
        texts: Callable[[], list[str]] = lambda: calibration_documents(job, read_both(job)[0])  # noqa: E731
        base = fitted_base(run.variant, job, made_of, self.folder, texts)
        return replace(job.dense(), model=str(base), base_model=job.title) if base else job

    def value(self, results: Results) -> float:
        """Return the loss; infinity where there is none, or it is no number."""
        loss: float | None = results["metrics"].get(results["main"][0])
        return math.inf if loss is None or not math.isfinite(loss) else loss

    def complete(
        self, table: ComparisonTable, runs: Mapping[str, Sequence[PlannedRun]], found: Mapping[str, list[Results]]
    ) -> None:
        """Add what variants cost, and after how many tokens they are at the target."""
        table["objective"] = self.task
        table["data"] = list(self.job.data or [])
        for row in table["variants"]:
            shape = self.shape(runs[row["name"]][0].variant)
            row["width"], row["ffn_parameters"], row["flops_per_token"] = shape.width, shape.ffn_parameters, shape.flops
        if not self.options.evaluate_every:
            return
        target = self.target_loss
        if target is None:
            target = max((each for each in table["variants"][0]["scores"] if math.isfinite(each)), default=-math.inf)
        table["target_loss"] = target
        for row in table["variants"]:
            done = runs[row["name"]][: len(table["seeds"])]
            row["tokens_to_target"] = tokens = [tokens_to(curve_of(run, table["metric"]), target) for run in done]
            known = [each for each in tokens if each is not None]
            row["tokens_mean"] = fmean(known) if len(known) == len(tokens) else None
            row["tokens_interval"] = interval(known) if len(known) == len(tokens) else None


def curve_of(run: PlannedRun, metric: str) -> list[tuple[float, float]]:
    """Return (tokens, value of what is compared) of each evaluation of a run."""
    lines = [line for line in read_lines(run.folder / LOG_FILE) if "evaluation" in line]
    found = [(line["tokens"], line["evaluation"][metric]) for line in lines]
    return [(tokens, loss) for tokens, loss in found if loss is not None]  # it is null where training diverges


def _part(made_of: Record, keys: Sequence[str], **more: Any) -> Record:
    """Return a record of those options only that count for a part of a run."""
    return cast(Record, {**made_of, "options": {key: made_of["options"][key] for key in keys}, **more})
