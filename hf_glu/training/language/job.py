"""One run of language modelling: load or build a model, convert it, train it on text, save it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.checkpoint.folders import copy_other_files
from hf_glu.checkpoint.gguf import gguf_file, is_gguf
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.writing import writing
from hf_glu.errors import OptionError
from hf_glu.ffn.config_fields import activation_of
from hf_glu.instruments.activity import activation_statistics, expert_loads
from hf_glu.instruments.adaptive import adaptive_statistics
from hf_glu.instruments.probe import with_decoder
from hf_glu.training.language.apart import apart, check_apart
from hf_glu.training.language.blocks import Cutter
from hf_glu.training.language.documents import calibration_documents, read_both, tokenizer_texts
from hf_glu.training.language.dropout import without_dropout
from hf_glu.training.language.examples import SHUFFLED, BlockExamples, StreamExamples, check_predicted, measure
from hf_glu.training.language.healing import TaughtExamples, make_healing
from hf_glu.training.language.likeness import Likeness
from hf_glu.training.language.models import block_length, load_language_model, make_language_model
from hf_glu.training.language.objectives import HIDDEN, VALIDATION, Objective
from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.reading import Documents
from hf_glu.training.language.record import language_record
from hf_glu.training.language.reload import same_when_loaded
from hf_glu.training.language.teachers import find_teacher, load_teacher
from hf_glu.training.loop.examples import Examples
from hf_glu.training.options import TrainingOptions
from hf_glu.training.results import HealingFacts, Record
from hf_glu.training.run import Findings, TrainingRun
from hf_glu.training.saving import run_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_glu.training.loop.loop import TrainingLoop
    from hf_glu.training.loop.progress import TrainingResult

MEASURED = 8  # batches that statistics of activations are taken of


class LanguageRun(TrainingRun):
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
        if job.config and job.conversion:
            job = replace(job, random=True)  # there are no weights to keep
        if job.stream and not (options.max_steps and job.validation):
            raise OptionError("a stream has no end and no share to validate on: give max_steps and validation")
        if job.teacher:
            job = replace(job, teacher=find_teacher(job))
        made_of = made_of or language_record(job, options)
        super().__init__(job, options, run_entry(job, options, made_of, job.objective), resume=resume)
        self.documents, held = read_both(job)
        self.model, self.tokenizer, self.objective = self.load()
        self.teacher: PreTrainedModel | None
        self.teacher, self.same_tokens = self.load_teacher() if job.teacher else (None, False)
        if self.teacher is not None:
            self.objective.of_model(self.teacher)  # which mustn't see what it teaches to predict, either
        self.entry["task"] = self.objective.name
        readers = [each for each in (self.model, self.teacher) if each is not None]
        configs = [each.config for each in readers]
        self.cutter = Cutter(
            tokenizer=self.tokenizer,
            length=block_length(options.max_length, self.objective, self.tokenizer, *configs),
            framed=self.objective.framed,
            separate=job.documents == "separate" or self.objective.name == HIDDEN,  # an embedder reads texts one by one
            words=job.whole_words,
        )
        for each in readers if self.cutter.separate and not self.cutter.framed else ():
            check_apart(each)
        self.train = self.blocks(self.documents)
        self.validation = self.blocks(held, job.validation_size)
        check_predicted(self.validation)
        self.prepare()
        if job.config:
            self.name_new()

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Objective]:
        """Load or build the model, with its tokenizer, and the objective that it is trained by."""
        if self.job.config:
            texts = tokenizer_texts(self.job, self.documents) if self.job.train_tokenizer else []
            return make_language_model(self.job, texts, self.options.seed)
        return load_language_model(self.job, self.options.seed)

    def load_teacher(self) -> tuple[PreTrainedModel, bool]:
        """Load the teacher; return whether it is known to read the same tokens, too."""
        return load_teacher(str(self.job.teacher), self.objective, self.tokenizer)

    @property
    def changes(self) -> bool:
        """Whether the model was converted, or has a teacher that it is compared with before, too."""
        return super().changes or self.teacher is not None

    def wrap(self) -> None:
        """Choose what is matched with the teacher's, and the parameters that are trained."""
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device)
            healing = make_healing(self.model, self.teacher, self.objective, self.job, same_tokens=self.same_tokens)
            if "ffn" in healing.matched and (self.options.compile or self.sharded):
                raise OptionError(
                    "match=ffn calls FFNs by themselves, which can't be compiled or sharded: match=hidden"
                )
            self.likeness = Likeness(healing)
        super().wrap()

    def name_new(self) -> None:
        """Note what a new model is: nothing was there to be converted."""
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

    def examples(self) -> Examples:
        """Return the training data."""
        return self.train if self.teacher is None else TaughtExamples(self.train, self.likeness.healing)

    def fit(self) -> tuple[TrainingLoop, TrainingResult]:
        """Train, without dropout where there is a teacher."""
        with nullcontext() if self.teacher is None else without_dropout(self.model):
            return super().fit()

    def texts(self) -> list[str]:
        """Return training texts to fit a conversion on."""
        return calibration_documents(self.job, self.documents)

    def evaluate(self, model: PreTrainedModel, title: str) -> tuple[dict[str, float], float]:
        """Return loss and perplexity on the validation text; the score is the loss, negative."""
        accelerator, size = None if self.alone else self.accelerator, self.options.eval_batch_size
        measured = measure if self.teacher is None else self.likeness.measure
        found = measured(
            model, self.validation, batch_size=size, accelerator=accelerator, title=f"{self.title}: {title}"
        )
        return found, -found[self.metric]

    @property
    def metric(self) -> str:
        """The metric whose negative is the score."""
        if self.teacher is None or self.job.teacher_share == 0:
            return "loss"
        return "kl" if self.objective.name != HIDDEN else "hidden_error"

    def facts(self) -> Findings:
        """Return the numbers of blocks, and statistics of activations and experts on some of them."""
        size, device = self.options.eval_batch_size, next(self.model.parameters()).device
        count = min(len(self.validation), MEASURED * size)
        inputs = [
            self.validation.batch(range(at, min(at + size, count)), VALIDATION, device) for at in range(0, count, size)
        ]
        if self.objective.name == HIDDEN or not self.model.config.is_encoder_decoder:
            for batch in inputs:
                del batch["labels"]
        inputs = [apart(batch) for batch in inputs]
        healing: HealingFacts | None = None if self.teacher is None else self.likeness.facts(str(self.job.teacher))
        return {
            "main": [self.metric],
            "examples": {"train": len(self.train), "validation": len(self.validation)},
            "activations": activation_statistics(self.model, inputs),
            "adaptive": adaptive_statistics(self.model, inputs, self.converted, None),
            "experts": expert_loads(self.model, inputs),
            **({"healing": healing} if healing else {}),  # type: ignore[typeddict-item]
        }

    def reloads_equal(self, folder: Path) -> bool:
        """Return whether a fresh process loads the same weights, and gets the same logits, bit by bit."""
        rows = range(min(len(self.validation), math.ceil(self.options.eval_batch_size / 4)))
        batch = self.validation.batch(rows, VALIDATION, next(self.model.parameters()).device)
        if self.objective.name == HIDDEN:
            del batch["labels"]
            return same_when_loaded(self.model, folder, type(self.model).__name__, with_decoder(self.model, batch))
        return same_when_loaded(self.model, folder, self.objective.auto_class, batch)

    def write_more(self, folder: Path) -> None:
        """Write what lies beside an embedder: how its hidden states become an embedding."""
        if self.objective.name == HIDDEN and self.main:
            with writing(folder):
                copy_other_files(
                    gguf_file(self.job.model) if is_gguf(self.job.model) else resolve(self.job.model), folder
                )
