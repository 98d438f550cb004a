"""One job: load, convert, fine-tune, evaluate, save, and check the saved model in a fresh process."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from accelerate.utils import set_seed

from hf_glu.activation.learnable import mixes
from hf_glu.checkpoint.files import ADAPTER_FOLDER, PREDICTIONS_FOLDER, RESULTS_FILE, RUN_FILE
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.checkpoint.writing import check_folder, remove_partials, whole_folder, writing
from hf_glu.compat.of_torch import COMPILED_CALL
from hf_glu.conversion import freeze_mix
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.ffn.lean import fuse, save_memory
from hf_glu.instruments.adaptive import snapshot
from hf_glu.instruments.routing import active_parameters
from hf_glu.tasks.loading import head
from hf_glu.tasks.submission import write_predictions
from hf_glu.training.data.features import Features, check_answers, check_length, join, make_features
from hf_glu.training.data.measuring import validation_statistics
from hf_glu.training.data.models import convert_for, load_for_task
from hf_glu.training.data.pairs import TARGET
from hf_glu.training.data.prediction import answer, evaluate, predict
from hf_glu.training.data.sources import TaskRows, calibration_texts, check_predictable, read_diagnostics, read_tasks
from hf_glu.training.loop import checkpoints
from hf_glu.training.loop.accelerating import is_sharded, make_accelerator, share_results, start_trackers
from hf_glu.training.loop.loop import TrainingLoop, TrainingResult
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.parameters.annealing import anneal
from hf_glu.training.parameters.gates import train_only_gates
from hf_glu.training.parameters.peft import count_parameters, frozen_activations, lora_config
from hf_glu.training.record import make_record
from hf_glu.training.results import Record, Results
from hf_glu.training.saving import check_run_folder, reloads_equal, run_entry, save_model

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


class Job:
    """A fine-tuning job; see `run_job`. Building it checks everything before anything is trained."""

    def __init__(
        self, job: JobOptions, options: TrainingOptions, *, resume: bool = False, made_of: Record | None = None
    ) -> None:
        job.check()
        self.job, self.options, self.resume = job, options, resume
        self.folder = job.folder
        self.entry = run_entry(job, options, made_of or make_record(job, options))
        if self.folder is not None:
            check_folder(self.folder)
            check_run_folder(self.folder, self.entry, resume=resume)
        self.accelerator = make_accelerator(options, self.folder)
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
        if job.max_target_length and self.task.form != "text":
            raise OptionError(f"max_target_length is for texts to write, and {self.task.name} has none")
        self.max_target = (job.max_target_length or TARGET) if self.task.form == "text" else 0
        check_length(options.max_length, self.model.config, self.tokenizer, self.max_target)
        self.train = join([self.features(source, "train", self.rows(source)) for source in self.sources])
        several = len(self.sources) > 1
        self.validation = {
            f"{source[0].name}/{split}" if several else split: self.features(source, split, job.validation_size)
            for source in self.sources
            for split in source[0].validation
        }
        dense = self.model.num_parameters()
        self.report = convert_for(self.model, job, self.texts, self.tokenizer)
        self.converted = snapshot(self.model)
        self.wrap()
        if options.save_memory:
            save_memory(self.model)
        if options.fuse:
            fuse(self.model, device=self.accelerator.device.type)
        if options.anneal is not None and not mixes(self.model):
            raise OptionError(f"anneal is for learnable activations, {job.conversion or 'the dense model'} has none")
        counts, active = count_parameters(self.model), active_parameters(self.model)
        self.entry["parameters"] = {
            "total": counts["total"],
            "trainable": counts["trainable"],
            "active": active,
            "before": dense,
        }
        self.sharded = is_sharded(self.accelerator)
        self.alone = False  # whether this process computes by itself, with the whole of the weights

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

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
            joined=self.text and not self.model.config.is_encoder_decoder,
            max_target=self.max_target,
        )

    def texts(self) -> list[str]:
        """Return training texts to fit a conversion on."""
        return calibration_texts(self.job, self.sources[0], text=self.text)

    def wrap(self) -> None:
        """Choose the parameters that are trained, as ``job.peft`` says: all, LoRA's, or gates only."""
        if self.job.peft == "lora":
            if self.options.save_memory:
                raise OptionError("save_memory is not for peft=lora, whose matrices keep what they are given")
            from peft import get_peft_model

            settings = lora_config(self.model, rank=self.job.lora_rank, targets=self.job.lora_targets)
            self.model = get_peft_model(self.model, settings)
        elif self.job.peft == "gates":
            train_only_gates(self.model)
        if frozen := frozen_activations(self.model):
            warnings.warn(f"{len(frozen)} parameters of activations are frozen, such as {frozen[0]}", stacklevel=2)

    def run(self) -> Results:
        """Train, evaluate and save; resuming a finished run returns its results."""
        if self.folder is not None and (self.folder / RESULTS_FILE).is_file():
            return cast(Results, read_object(self.folder / RESULTS_FILE))
        if self.folder is not None and self.main:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_partials(self.folder)
            write_json(self.folder / RUN_FILE, self.entry)
        self.accelerator.wait_for_everyone()
        if self.options.tracker != "none":
            start_trackers(self.accelerator, self.entry["options"])
        self.model.to(self.accelerator.device)
        before = self.evaluate(self.model, "before")[0] if self.report else None
        loop, trained = self.fit()
        results = self.conclude(loop, trained, before) if self.main or not self.sharded else None
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # end_training would end the process group, too, which suites need
            tracker.finish()
        return results if results is not None and not self.sharded else share_results(results)

    def conclude(self, loop: TrainingLoop, trained: TrainingResult, before: dict[str, float] | None) -> Results:
        """Evaluate and save what was trained; return the results."""
        metrics, score = self.evaluate(self.model, "evaluate")
        epoch = trained.steps / loop.plan.steps_per_epoch
        loop.log.write({"step": trained.steps, "epoch": epoch, "evaluation": metrics, "score": score})
        first, size = next(iter(self.validation.values())), self.options.eval_batch_size
        results: Results = {
            "task": self.entry["task"],
            "main": list(self.task.main),
            "score": score,
            "metrics": metrics,
            "before": before,
            "examples": {"train": len(set(self.train.owners)), **{k: len(v.raw) for k, v in self.validation.items()}},
            "parameters": self.model.num_parameters(),
            "active_parameters": active_parameters(self.model),
            "trainable": self.entry["parameters"]["trainable"],
            "training": trained.to_dict(),
            "conversion": self.report.to_dict() if self.report else None,
            **validation_statistics(self.model, first, self.tokenizer, size, self.converted),
            "reloaded_equal": None,
        }
        if self.folder is not None:
            self.finish(self.folder, results)
        return results

    def evaluate(self, model: PreTrainedModel, title: str) -> tuple[dict[str, float], float]:
        """Return metrics and score on the validation splits."""
        size = self.options.eval_batch_size
        title = f"{self.job.conversion or 'dense'}: {title}"
        accelerator = None if self.alone else self.accelerator
        return evaluate(model, self.validation, self.tokenizer, batch_size=size, accelerator=accelerator, title=title)

    def fit(self) -> tuple[TrainingLoop, TrainingResult]:
        """Train; then fold LoRA and finished mixes in, so that the model is a plain one in full precision.

        Where weights are sharded, the main process gets them whole, in a copy on the CPU, and goes on alone.
        """
        whole = copy.deepcopy(self.model).cpu() if self.sharded and self.main else None
        set_seed(self.options.seed, deterministic=self.options.deterministic)
        title = f"{self.job.conversion or 'dense'}: fine-tune"
        loop = TrainingLoop(
            self.model,
            self.train,
            self.tokenizer,
            self.options,
            self.accelerator,
            folder=self.folder,
            evaluate=lambda model: self.evaluate(model, "validate"),
            title=title,
        )
        trained = loop.run(resume=self.resume)
        if self.sharded:
            state = loop.whole_state()
            if whole is None:
                return loop, trained
            whole.load_state_dict(state)
            self.model, self.alone = whole, True
        else:
            self.model = self.accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        COMPILED_CALL.put(self.model, None)  # what is evaluated and saved is the model as anybody loads it
        if self.options.anneal is not None:
            anneal(self.model, 1.0)
        if self.job.peft == "lora":
            if self.folder is not None and self.main:
                with writing(self.folder), whole_folder(self.folder / ADAPTER_FOLDER, replacing=True) as stage:
                    self.model.save_pretrained(stage)
            self.model = self.model.merge_and_unload()
        if self.options.anneal is not None:
            freeze_mix(self.model)
        return loop, trained

    def finish(self, folder: Path, results: Results) -> None:
        """Write predictions, model and results."""
        if self.job.predict:
            self.predict_tests(folder / PREDICTIONS_FOLDER)
        if self.main:
            save_model(self.model, self.tokenizer, folder)
            first = next(iter(self.validation.values()))
            size = self.options.eval_batch_size
            results["reloaded_equal"] = reloads_equal(self.model, self.tokenizer, folder, first, size)
            write_json(folder / RESULTS_FILE, results)
            if not results["reloaded_equal"]:
                raise CheckpointError(
                    f"{folder}: the saved model, loaded again, isn't the one that was evaluated: don't use it"
                )
            checkpoints.remove_all(folder)

    def predict_tests(self, folder: Path) -> None:
        """Write the leaderboards' files for the tasks' test splits, and for the diagnostics that this model answers."""
        for task, raw in self.tests:
            for split in task.test:
                features = make_features(
                    task, raw[split], self.tokenizer, max_length=self.options.max_length, text=self.text, labeled=False
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
