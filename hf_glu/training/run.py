"""A run: a model is converted, trained, evaluated and saved, and the saved one compared in a fresh process."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from accelerate.utils import set_seed

from hf_glu.activation.learnable import mixes
from hf_glu.checkpoint.files import ADAPTER_FOLDER, RESULTS_FILE, RUN_FILE
from hf_glu.checkpoint.jsonio import JsonObject, read_object, write_json
from hf_glu.checkpoint.writing import check_folder, remove_partials, whole_folder, writing
from hf_glu.compat.of_torch import COMPILED_CALL
from hf_glu.conversion import freeze_mix
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.ffn.config_fields import activation_of
from hf_glu.ffn.lean import fuse, save_memory
from hf_glu.instruments.adaptive import snapshot
from hf_glu.instruments.routing import active_parameters
from hf_glu.training.data.models import convert_for
from hf_glu.training.loop import checkpoints
from hf_glu.training.loop.accelerating import (
    is_sharded,
    make_accelerator,
    own_forward,
    restore_forward,
    share_results,
    start_trackers,
)
from hf_glu.training.loop.examples import Examples
from hf_glu.training.loop.loop import TrainingLoop, TrainingResult
from hf_glu.training.options import ModelOptions, TrainingOptions
from hf_glu.training.parameters.annealing import anneal
from hf_glu.training.parameters.gates import train_only_gates
from hf_glu.training.parameters.peft import count_parameters, frozen_activations, lora_config
from hf_glu.training.results import HealingFacts, Results, RunEntry
from hf_glu.training.saving import check_run_folder, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Findings(TypedDict):
    """What only the kind of a run knows of its results."""

    main: list[str]
    examples: dict[str, int]
    activations: list[JsonObject]
    adaptive: list[JsonObject]
    experts: list[JsonObject]
    healing: NotRequired[HealingFacts]


class TrainingRun(ABC):
    """What fine-tuning and language modelling share.

    A kind of run is a subclass, whose ``__init__`` calls this one, sets ``model`` and ``tokenizer``, reads its data,
    and ends with `prepare`: everything is checked before anything is trained.

    Args:
        job: the model, and how it is converted.
        options: how it is trained.
        entry: what ``run.json`` says.
        resume: whether the run in the output folder goes on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trained = "fine-tuned"  # what is done to the model, in one word

    def __init__(self, job: ModelOptions, options: TrainingOptions, entry: RunEntry, *, resume: bool) -> None:
        self.job, self.options, self.entry, self.resume = job, options, entry, resume
        self.folder = job.folder
        if self.folder is not None:
            check_folder(self.folder)
            check_run_folder(self.folder, self.entry, resume=resume)
        self.accelerator = make_accelerator(options, self.folder)
        self.sharded = is_sharded(self.accelerator)
        self.alone = False  # whether this process computes by itself, with the whole of the weights

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def title(self) -> str:
        """The name of what is trained: what it is converted to, or the activation that it has."""
        return self.entry["activation"] or activation_of(self.model.config) or "dense"

    @property
    def changes(self) -> bool:
        """Whether the model isn't the one that it was, so that it is measured before it is trained, too."""
        return self.report is not None

    @abstractmethod
    def examples(self) -> Examples:
        """Return the training data."""

    @abstractmethod
    def texts(self) -> list[str]:
        """Return training texts to fit a conversion on."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, title: str) -> tuple[dict[str, float], float]:
        """Return metrics on the validation data, and the score, of which more is better."""

    @abstractmethod
    def facts(self) -> Findings:
        """Return what only this kind of run knows of its results."""

    @abstractmethod
    def reloads_equal(self, folder: Path) -> bool:
        """Return whether a fresh process loads the same model from ``folder``, and gets the same of it bit by bit."""

    def write_more(self, folder: Path) -> None:  # noqa: B027  (a kind of run may have nothing more)
        """Write what this kind of run leaves beside the model, before that."""

    def prepare(self) -> None:
        """Convert the model, and choose the parameters that are trained."""
        dense = self.model.num_parameters()
        self.report = convert_for(self.model, self.job, self.texts, self.tokenizer)
        self.converted = snapshot(self.model)
        self.wrap()
        if self.options.save_memory or self.options.tile is not None:
            save_memory(self.model, tile=self.options.tile)
        if self.options.fuse:
            fuse(self.model, device=self.accelerator.device.type)
        if self.options.anneal is not None and not mixes(self.model):
            raise OptionError(
                f"anneal is for learnable activations, {self.job.conversion or 'the dense model'} has none"
            )
        counts, active = count_parameters(self.model), active_parameters(self.model)
        self.entry["parameters"] = {
            "total": counts["total"],
            "trainable": counts["trainable"],
            "active": active,
            "before": dense,
        }

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
            known = cast(Results, read_object(self.folder / RESULTS_FILE))
            if self.main:
                self.close(self.folder, known)  # a kill may have come between
            return known
        if self.folder is not None and self.main:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_partials(self.folder)
            write_json(self.folder / RUN_FILE, self.entry)
        self.accelerator.wait_for_everyone()
        if self.options.tracker != "none":
            start_trackers(self.accelerator, self.entry["options"])
        self.model.to(self.accelerator.device)
        before = self.evaluate(self.model, "before")[0] if self.changes else None
        loop, trained = self.fit()
        results = self.conclude(loop, trained, before) if self.main or not self.sharded else None
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # end_training would end the process group, too, which suites need
            tracker.finish()
        return results if results is not None and not self.sharded else share_results(results)

    def fit(self) -> tuple[TrainingLoop, TrainingResult]:
        """Train; then fold LoRA and finished mixes in, so that the model is a plain one in full precision.

        Where weights are sharded, the main process gets them whole, in a copy on the CPU, and goes on alone.
        """
        forward = own_forward(self.model)
        whole = copy.deepcopy(self.model).cpu() if self.sharded and self.main else None
        set_seed(self.options.seed, deterministic=self.options.deterministic)
        loop = TrainingLoop(
            self.model,
            self.examples(),
            self.options,
            self.accelerator,
            folder=self.folder,
            evaluate=lambda model: self.evaluate(model, "validate"),
            title=f"{self.title}: train",
        )
        trained = loop.run(resume=self.resume)
        if self.sharded:
            state = loop.whole_state()
            if whole is None:
                return loop, trained
            whole.load_state_dict(state)
            self.model, self.alone = whole, True
        else:
            self.model = self.accelerator.unwrap_model(loop.model, keep_torch_compile=False)
            restore_forward(self.model, forward)
        COMPILED_CALL.put(self.model, None)  # what is evaluated and saved is the model as anybody loads it
        self.fold()
        return loop, trained

    def fold(self) -> None:
        """Fold what was trained beside the model into it."""
        if self.options.anneal is not None:
            anneal(self.model, 1.0)
        if self.job.peft == "lora":
            if self.folder is not None and self.main:
                with writing(self.folder), whole_folder(self.folder / ADAPTER_FOLDER, replacing=True) as stage:
                    self.model.save_pretrained(stage)
            self.model = self.model.merge_and_unload()
        if self.options.anneal is not None:
            freeze_mix(self.model)

    def conclude(self, loop: TrainingLoop, trained: TrainingResult, before: dict[str, float] | None) -> Results:
        """Evaluate and save what was trained; return the results."""
        metrics, score = self.evaluate(self.model, "evaluate")
        epoch = trained.steps / loop.plan.steps_per_epoch
        at = {"step": trained.steps, "epoch": epoch, "tokens": loop.progress.tokens}
        loop.log.write({**at, "evaluation": metrics, "score": score})
        results: Results = {
            "task": self.entry["task"],
            "score": score,
            "metrics": metrics,
            "before": before,
            "parameters": self.model.num_parameters(),
            "active_parameters": active_parameters(self.model),
            "trainable": self.entry["parameters"]["trainable"],
            "training": trained.to_dict(),
            "conversion": self.report.to_dict() if self.report else None,
            **self.facts(),
            "reloaded_equal": None,
        }
        if self.folder is not None:
            self.finish(self.folder, results)
        return results

    def finish(self, folder: Path, results: Results) -> None:
        """Write model and results."""
        self.write_more(folder)
        if self.main:
            save_model(self.model, self.tokenizer, folder)
            results["reloaded_equal"] = self.reloads_equal(folder)
            write_json(folder / RESULTS_FILE, results)
            self.close(folder, results)

    def close(self, folder: Path, results: Results) -> None:
        """Remove what only an unfinished run needs.

        Raises:
            CheckpointError: the saved model isn't the evaluated one.
        """
        if not results["reloaded_equal"]:
            raise CheckpointError(
                f"{folder}: the saved model, loaded again, isn't the one that was evaluated: don't use it"
            )
        checkpoints.remove_all(folder)
