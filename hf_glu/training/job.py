"""One fine-tuning job: load, convert, fine-tune, evaluate, save, and check the saved model in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.checkpoint.files import PREDICTIONS_FOLDER
from hf_glu.config.extras import need
from hf_glu.errors import OptionError
from hf_glu.instruments.causal import check_causal
from hf_glu.tasks.loading import head
from hf_glu.tasks.submission import write_predictions
from hf_glu.training.data.examples import TaskExamples
from hf_glu.training.data.features import (
    Features,
    check_answers,
    check_length,
    check_room,
    check_scores,
    join,
    make_features,
)
from hf_glu.training.data.measuring import validation_statistics
from hf_glu.training.data.models import load_for_task
from hf_glu.training.data.pairs import TARGET
from hf_glu.training.data.prediction import answer, evaluate, predict
from hf_glu.training.data.sources import (
    TaskRows,
    calibration_texts,
    check_predictable,
    read_diagnostics,
    read_tasks,
    task_name,
)
from hf_glu.training.data.tokens import padding_side
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.record import make_record
from hf_glu.training.results import Record, Results
from hf_glu.training.run import Findings, TrainingRun
from hf_glu.training.saving import reloads_equal, run_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_job(
    job: JobOptions, options: TrainingOptions, *, resume: bool = False, made_of: Record | None = None
) -> Results:
    """Convert (if ``job.to`` is given), fine-tune and evaluate; return the results as plain data.

    ``job.output`` holds the run's log from the first step on, and in the end the model, its tokenizer and
    ``results.json``. ``made_of`` is its record, where it isn't that of ``job`` and ``options``.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    return Job(job, options, resume=resume, made_of=made_of).run()


class Job(TrainingRun):
    """A fine-tuning job; see `run_job`. Building it checks everything before anything is trained."""

    job: JobOptions

    def __init__(
        self, job: JobOptions, options: TrainingOptions, *, resume: bool = False, made_of: Record | None = None
    ) -> None:
        need(*job.packages, what="a job")
        job.check()
        made_of = made_of or make_record(job, options)
        super().__init__(job, options, run_entry(job, options, made_of, task_name(job)), resume=resume)
        self.sources = read_tasks(job)
        self.task, self.raw = self.sources[0]
        if job.predict:
            self.tests = [*self.sources, *read_diagnostics(job, self.sources)]
            check_predictable(self.tests)
        self.model, self.tokenizer, self.text = load_for_task(job.model, self.task, form=job.form, seed=options.seed)
        if job.mixture and not self.text:
            raise OptionError(f"a mixture needs a text-to-text model such as T5, {job.model} is none")
        if self.text:
            for task, _ in self.sources:
                check_answers(task, self.tokenizer)
        self.entry["text"] = self.text
        self.joined = self.text and not self.model.config.is_encoder_decoder
        self.shifts = not self.joined or check_causal(self.model)
        if job.max_target_length and self.task.form != "text":
            raise OptionError(f"max_target_length is for texts to write, and {self.task.name} has none")
        self.max_target = (job.max_target_length or TARGET) if self.task.form == "text" else 0
        check_room(options.max_length, self.tokenizer, pair=not self.text and len(self.task.columns) > 1)
        check_length(options.max_length, self.model.config, self.tokenizer, self.max_target)
        self.train = join([self.features(source, "train", self.rows(source)) for source in self.sources])
        several = len(self.sources) > 1
        self.validation = {
            f"{source[0].name}/{split}" if several else split: self.features(source, split, job.validation_size)
            for source in self.sources
            for split in source[0].validation
        }
        for name, features in self.validation.items():
            check_scores(name, features)
        self.prepare()

    def rows(self, source: TaskRows) -> int | None:
        """Return how many training rows of a task are used; None: all."""
        if not self.job.mixture:
            return self.job.train_size
        return min(self.job.mixture_limit, self.job.train_size or self.job.mixture_limit)

    def features(self, source: TaskRows, split: str, rows: int | None) -> Features:
        """Tokenize a labelled split."""
        task, raw = source
        return make_features(
            task,
            head(raw[split], rows),
            self.tokenizer,
            max_length=self.options.max_length,
            text=self.text,
            joined=self.joined,
            shifts=self.shifts,
            max_target=self.max_target,
            side=padding_side(self.model.config),
        )

    def examples(self) -> TaskExamples:
        """Return the training data."""
        return TaskExamples(self.train, self.tokenizer)

    def texts(self) -> list[str]:
        """Return training texts to fit a conversion on."""
        return calibration_texts(self.job, self.sources[0], text=self.text)

    def evaluate(self, model: PreTrainedModel, title: str) -> tuple[dict[str, float], float]:
        """Return metrics and score on the validation splits."""
        size, title = self.options.eval_batch_size, f"{self.title}: {title}"
        accelerator = None if self.alone else self.accelerator
        return evaluate(model, self.validation, self.tokenizer, batch_size=size, accelerator=accelerator, title=title)

    def facts(self) -> Findings:
        """Return the task's metrics, its numbers of rows, and statistics of activations and experts on some of them."""
        first, size = next(iter(self.validation.values())), self.options.eval_batch_size
        return {
            "main": list(self.task.main),
            "examples": {"train": len(set(self.train.owners)), **{k: len(v.raw) for k, v in self.validation.items()}},
            **validation_statistics(self.model, first, self.tokenizer, size, self.converted),
        }

    def reloads_equal(self, folder: Path) -> bool:
        """Return whether a fresh process loads the same weights, and predicts the same, bit by bit."""
        first = next(iter(self.validation.values()))
        return reloads_equal(self.model, self.tokenizer, folder, first, self.options.eval_batch_size)

    def write_more(self, folder: Path) -> None:
        """Write the predictions for the test splits, where they are asked for."""
        if self.job.predict:
            self.predict_tests(folder / PREDICTIONS_FOLDER)

    def predict_tests(self, folder: Path) -> None:
        """Write the leaderboards' files for the tasks' test splits, and for the diagnostics that this model answers."""
        for task, raw in self.tests:
            for split in task.test:
                features = make_features(
                    task,
                    raw[split],
                    self.tokenizer,
                    max_length=self.options.max_length,
                    text=self.text,
                    labeled=False,
                    side=padding_side(self.model.config),
                )
                found = predict(
                    self.model,
                    features,
                    self.tokenizer,
                    batch_size=self.options.eval_batch_size,
                    accelerator=None if self.alone else self.accelerator,
                    title=f"{task.name}: {split}",
                )
                if self.main:
                    write_predictions(task, split, raw[split], answer(features, found), folder)
