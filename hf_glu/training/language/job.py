"""One run of language modelling: load or build a model, convert it, train it on text, save it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.errors import OptionError
from hf_glu.ffn.config_fields import activation_of
from hf_glu.instruments.activity import activation_statistics, expert_loads
from hf_glu.instruments.adaptive import adaptive_statistics
from hf_glu.training.language.apart import check_apart
from hf_glu.training.language.blocks import Cutter
from hf_glu.training.language.documents import calibration_documents, read_both, tokenizer_texts
from hf_glu.training.language.examples import SHUFFLED, BlockExamples, StreamExamples, measure
from hf_glu.training.language.models import block_length, load_language_model, make_language_model
from hf_glu.training.language.objectives import VALIDATION
from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.reading import Documents
from hf_glu.training.language.record import language_record
from hf_glu.training.language.reload import same_when_loaded
from hf_glu.training.options import TrainingOptions
from hf_glu.training.results import Record
from hf_glu.training.run import Facts, Run
from hf_glu.training.saving import run_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED = 8  # batches that statistics of activations are taken of


class LanguageRun(Run):
    """A run of language modelling. Building it checks everything before anything is trained.

    Args:
        job: what to train, on what.
        options: how.
        resume: whether the run in the output folder goes on.
        made_of: its record, where it isn't that of ``job`` and ``options``.
    """

    job: LanguageOptions
    trained = "trained"

    def __init__(
        self, job: LanguageOptions, options: TrainingOptions, *, resume: bool = False, made_of: Record | None = None
    ) -> None:
        job.check()
        if job.config and job.to and not job.experts:
            job = replace(job, random=True)  # there are no weights to keep
        if job.stream and not (options.max_steps and job.validation):
            raise OptionError("a stream has no end and no share to validate on: give max_steps and validation")
        made_of = made_of or language_record(job, options)
        super().__init__(job, options, run_entry(job, options, made_of, job.objective), resume=resume)
        self.documents, held = read_both(job)
        if job.config:
            texts = tokenizer_texts(job, self.documents) if job.train_tokenizer else []
            self.model, self.tokenizer, self.objective = make_language_model(job, texts, options.seed)
        else:
            self.model, self.tokenizer, self.objective = load_language_model(job, options.seed)
        self.entry["task"] = self.objective.name
        self.cutter = Cutter(
            tokenizer=self.tokenizer,
            length=block_length(options.max_length, self.model.config, self.tokenizer),
            framed=self.objective.framed,
            separate=job.documents == "separate",
            words=job.whole_words,
        )
        if self.cutter.separate and not self.cutter.framed:
            check_apart(self.model)
        self.train = self.blocks(self.documents)
        self.validation = self.blocks(held, job.validation_size)
        self.prepare()
        if job.config:
            self.name_new()

    def name_new(self) -> None:
        """Say of a new model what it is: nothing was there to be converted."""
        config = self.model.config
        self.report = None
        self.entry["model"] = f"a new {config.model_type}"
        self.entry["activation"] = self.job.conversion or activation_of(config)
        self.entry["parameters"]["before"] = self.entry["parameters"]["total"]

    def blocks(self, documents: Documents, most: int | None = None) -> BlockExamples:
        """Cut documents into blocks, at most ``most``."""
        seed = self.options.seed
        if not hasattr(documents, "num_rows"):
            steps = self.options.max_steps
            assert steps
            cut = self.cutter.cut(documents.shuffle(seed=seed, buffer_size=SHUFFLED))
            return StreamExamples(cut, steps, self.objective, self.tokenizer, seed)
        cut = self.cutter.cut(documents, workers=self.job.workers)
        if most is not None:
            cut = cut.select(range(min(most, len(cut))))
        return BlockExamples(cut, self.objective, self.tokenizer, seed)

    def examples(self) -> BlockExamples:
        """Return the training data."""
        return self.train

    def texts(self) -> list[str]:
        """Return training texts to fit a conversion on."""
        return calibration_documents(self.job, self.documents)

    def evaluate(self, model: PreTrainedModel, title: str) -> tuple[dict[str, float], float]:
        """Return loss and perplexity on the validation text; the score is the loss, negative."""
        accelerator, size = None if self.alone else self.accelerator, self.options.eval_batch_size
        found = measure(
            model, self.validation, batch_size=size, accelerator=accelerator, title=f"{self.title}: {title}"
        )
        return found, -found["loss"]

    def facts(self) -> Facts:
        """Return the numbers of blocks, and statistics of activations and experts on some of them."""
        size, device = self.options.eval_batch_size, next(self.model.parameters()).device
        count = min(len(self.validation), MEASURED * size)
        inputs = [
            self.validation.batch(range(at, min(at + size, count)), VALIDATION, device) for at in range(0, count, size)
        ]
        for batch in inputs if not self.model.config.is_encoder_decoder else []:
            del batch["labels"]
        return {
            "main": ["loss"],
            "examples": {"train": len(self.train), "validation": len(self.validation)},
            "activations": activation_statistics(self.model, inputs),
            "adaptive": adaptive_statistics(self.model, inputs, self.converted, None),
            "experts": expert_loads(self.model, inputs),
        }

    def reloads_equal(self, folder: Path) -> bool:
        """Return whether a fresh process loads the same weights, and gets the same logits, bit by bit."""
        rows = range(min(len(self.validation), math.ceil(self.options.eval_batch_size / 4)))
        batch = self.validation.batch(rows, VALIDATION, next(self.model.parameters()).device)
        return same_when_loaded(self.model, folder, self.objective.auto_class, batch)
