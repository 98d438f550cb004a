"""Comparing activations on one task: each is fine-tuned with several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from accelerate import PartialState

from hf_glu.checkpoint.loading import load_skeleton
from hf_glu.config.extras import need
from hf_glu.tasks.choices import OF_OWN_DATA
from hf_glu.training.comparing import engine
from hf_glu.training.comparing.kinds import Compared, PlannedRun
from hf_glu.training.comparing.shared import fitted_base
from hf_glu.training.comparing.variants import Variant, read_variant
from hf_glu.training.data.features import is_text_to_text
from hf_glu.training.data.sources import calibration_texts, read_tasks, task_name
from hf_glu.training.job import run_job
from hf_glu.training.options import OF_CONVERSION, JobOptions, TrainingOptions
from hf_glu.training.record import make_record
from hf_glu.training.results import ComparisonTable, Record, Results

# what a fitted conversion depends on, beside model, data and versions
OF_FIT = ("activation", "task", "mixture", "form", "calibration", *OF_OWN_DATA, *OF_CONVERSION)


def compare(
    variants: Sequence[str],
    seeds: Sequence[int],
    job: JobOptions,
    options: TrainingOptions,
    on_run: Callable[[str], object] | None = None,
) -> ComparisonTable:
    """Fine-tune each variant with each seed; see `hf_glu.training.comparing.engine.compare`.

    Raises:
        HfGluError: as `run_job`.
    """
    need(*job.packages, "scipy", what="a comparison")
    return engine.compare(ComparedClassifiers(job, options), variants, seeds, on_run=on_run)


class ComparedClassifiers(Compared):
    """Models of a task, or text-to-text models of it, or of a mixture: they are compared by their score."""

    job: JobOptions

    @property
    def task(self) -> str:
        """The task's name."""
        return task_name(self.job)

    def read(self, text: str) -> Variant:
        """Read a variant."""
        return read_variant(text)

    def make_record(self) -> Record:
        """Record what all runs depend on."""
        return make_record(self.job.dense(), self.options)

    def job_of(self, variant: Variant) -> JobOptions:
        """Return the job of a variant."""
        return variant.job(self.job)

    def carry_out(self, run: PlannedRun) -> Results:
        """Fine-tune a variant, one that needs a fit from the fitted conversion on."""
        job = cast(JobOptions, run.job)
        made_of: Record = {**run.made_of, "options": {key: run.made_of["options"][key] for key in OF_FIT}}
        with PartialState().main_process_first():
            base = fitted_base(run.variant, job, made_of, self.folder, lambda: self._texts(job))
        mine = replace(job.dense(), model=str(base), base_model=job.title) if base else job
        return run_job(mine, run.options, resume=run.begun, made_of=run.made_of)

    def _texts(self, job: JobOptions) -> list[str]:
        source = read_tasks(job)[0]
        text = is_text_to_text(load_skeleton(job.model).config, job.form, source[0])
        return calibration_texts(job, source, text=text)
