"""`hf_glu.heal`: healing a live model by a teacher, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_glu.checkpoint.loading import load_tokenizer
from hf_glu.errors import OptionError
from hf_glu.ffn.modes import keeping_modes
from hf_glu.training.filling import split_options
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.objectives import HIDDEN, OBJECTIVES, Objective, objective_of_class
from hf_glu.training.language.options import LanguageOptions, LanguageTraining
from hf_glu.training.language.record import data_record
from hf_glu.training.loop.accelerating import own_forward, restore_forward
from hf_glu.training.parameters.gates import train_all, train_halves_again, trained_halves
from hf_glu.training.record import option_record, versions
from hf_glu.training.results import HealingFacts, TrainingSummary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIVE = "a live model"  # where options and records name a checkpoint


class HealingReport(HealingFacts):
    """What healing a model did: what it was healed by, its metrics before and after, and what the training took."""

    before: dict[str, float]
    after: dict[str, float]
    examples: dict[str, int]
    training: TrainingSummary
    options: dict[str, Any]


class LiveRun(LanguageRun):
    """A run that heals a live model, and writes nothing.

    Args:
        model: trained in place, in float32.
        teacher: a live model, or a checkpoint.
        tokenizer: of both.
        job, options: as of `LanguageRun`.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: Any, tokenizer: PreTrainedTokenizerBase, job: LanguageOptions,
        options: LanguageTraining,
    ) -> None:  # fmt: skip
        self.live, self.given, self.reading = model, teacher, tokenizer
        record = option_record(job, options, job.objective)
        super().__init__(
            job, options, made_of={"options": record, "data": data_record(job), "model": {}, "versions": versions()}
        )

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Objective]:
        """Return the live model, and the objective of its class."""
        name = objective_of_class(type(self.live))
        if self.job.objective not in ("auto", name, HIDDEN):
            raise OptionError(f"{type(self.live).__name__} can't be healed by {self.job.objective}, but by {name}")
        name = HIDDEN if self.job.objective == HIDDEN else name
        return self.live, self.reading, OBJECTIVES[name](self.reading, self.job).of_model(self.live)

    def load_teacher(self) -> tuple[PreTrainedModel, bool]:
        """Return the live teacher as a loaded one is, in float32 and eval mode, or load it."""
        if isinstance(self.given, str):
            return super().load_teacher()
        if self.given is self.live:
            raise OptionError("the teacher is the model itself: give the model as it was, another one")
        if type(self.given).__name__ != type(self.live).__name__ and self.objective.name != HIDDEN:
            if objective_of_class(type(self.given)) != self.objective.name:
                raise OptionError(
                    f"the teacher, {type(self.given).__name__}, has no such head as {type(self.live).__name__}: "
                    "objective=hidden compares hidden states only"
                )
        found: PreTrainedModel = self.given.eval()
        return found if getattr(found, "is_quantized", False) else found.float(), False


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel | str,
    data: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: object,
) -> HealingReport:
    """Train ``model`` in place to be like ``teacher`` on unlabelled text, as one that was converted is like no longer.

    >>> hf_glu.convert(model, "swiglu", width="iso", calibration=texts, tokenizer=tokenizer)
    >>> report = hf_glu.heal(model, "sentence-transformers/all-MiniLM-L6-v2", "texts.txt", max_steps=500)

    A model with a language-model head learns the teacher's logits, one without its hidden states, and either what else
    ``match`` says. It is trained in float32, and has its dtypes, device and mode again afterwards.

    Args:
        model: a Transformers model of any head.
        teacher: a live model, which stays as it is, or a local folder, Hub id or GGUF file.
        data: files (.txt, .jsonl, .csv, .parquet), folders, patterns, or one data set of the Hub.
        tokenizer: of both; None: the teacher's, where that is a checkpoint.
        options: those of ``hf-glu pretrain`` (`LanguageOptions`, `LanguageTraining`), by name, but for the model, its
            conversion and output.

    Returns:
        The report, as plain data: ``before`` and ``after`` have the metrics, ``sites`` the relative errors of FFNs.

    Raises:
        HfGluError: bad input, before anything is trained; a loss that is NaN; Ctrl-C.
    """
    job, training = _options(teacher if isinstance(teacher, str) else LIVE, data, options)
    if tokenizer is None:
        if not isinstance(teacher, str):
            raise OptionError(
                "give the tokenizer of model and teacher: heal(model, teacher, data, tokenizer=tokenizer)"
            )
        tokenizer = load_tokenizer(teacher)
    with _as_it_was(model), _as_it_was(teacher):
        model.float()
        results = LiveRun(model, teacher, tokenizer, job, training).run()
    return {
        **results["healing"],
        "before": results["before"] or {},
        "after": results["metrics"],
        "examples": results["examples"],
        "training": results["training"],
        "options": {**job.to_dict(), **training.to_dict()},
    }


def check_healing(teacher: str, data: str | Sequence[str], options: dict[str, object]) -> None:
    """Raise an error for what `heal` can't do with a teacher, data and options, before there is a model."""
    job, _ = _options(teacher, data, options)
    job.check()
    load_tokenizer(teacher)
    data_record(job)


def _options(
    teacher: str, data: str | Sequence[str], options: dict[str, object]
) -> tuple[LanguageOptions, LanguageTraining]:
    names = [data] if isinstance(data, str) else [str(name) for name in data]
    values = {**options, "model": LIVE, "teacher": teacher, "data": names}
    job, training = split_options(values, LanguageOptions, LanguageTraining)
    wrong = [key for key in ("config", "output", "base_model") if getattr(job, key)] + (
        ["to"] if job.conversion else []
    )
    if wrong:
        raise OptionError(f"{wrong[0]} isn't for heal, which trains a model that is there and writes nothing")
    return job, training


@contextmanager
def _as_it_was(model: PreTrainedModel | str) -> Iterator[None]:
    """Give a live model its dtypes, device, modes and trainable parameters back after the block."""
    if isinstance(model, str):
        yield
        return
    tensors = {name: (each.dtype, each.device) for name, each in _tensors(model).items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    halves = trained_halves(model)
    checkpointing, forward = model.is_gradient_checkpointing, own_forward(model)
    try:
        with keeping_modes(model):
            yield
    finally:
        restore_forward(model, forward)
        train_all(model)
        with torch.no_grad():
            for name, each in _tensors(model).items():
                dtype, device = tensors[name]
                each.data = each.data.to(device=device, dtype=dtype)
                each.grad = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        train_halves_again(model, halves)
        if model.is_gradient_checkpointing and not checkpointing:
            model.gradient_checkpointing_disable()


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
