"""The options of language modelling, beside those of every training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_glu.errors import OptionError, shown
from hf_glu.training.filling import split_options
from hf_glu.training.options import ModelOptions, TrainingOptions, check_choice, check_seed, option

OBJECTIVES = ("auto", "clm", "mlm", "span", "hidden")
MATCHES = ("auto", "none", "ffn", "hidden")
DOCUMENTS = ("joined", "separate")
LONGEST_BLOCK = 1024  # where the model would read more, and no length is given
FROM_SCRATCH = {"lr": 6e-4, "weight_decay": 0.1}  # what is usual there, instead of the defaults


@dataclass(frozen=True, kw_only=True)
class LanguageTraining(TrainingOptions):
    """How to train a language model: `TrainingOptions` with other defaults."""

    epochs: float = option(1.0, "Passes over the training data (fractions of one, too).")
    lr: float = option(5e-5, "Peak learning rate of AdamW; from scratch 6e-4.")
    schedule: str = option("cosine", "Learning rate after warm-up: linear, cosine (both to 0) or constant.")
    warmup: float = option(0.03, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "Of AdamW, for matrices only; from scratch 0.1.")
    eval_batch_size: int = option(16, "Blocks of one forward pass in evaluation.")
    max_length: int | None = option(  # type: ignore[assignment]
        None, "Tokens of a block; as many as the model reads, 1024 at most."
    )


@dataclass(frozen=True, kw_only=True)
class LanguageOptions(ModelOptions):
    """Which language model to train, on what text, and by which objective.

    Raises:
        OptionError: a value that can't be.
    """

    config: str | None = option(None, "From scratch: the config of a model, a JSON file or text with model_type.")
    tokenizer: str | None = option(None, "From scratch: the checkpoint whose tokenizer it gets.")
    train_tokenizer: int | None = option(None, "From scratch: train a tokenizer of so many tokens on the data.")
    data: list[str] | None = option(  # noqa: RUF009
        None, "Text: .txt, .jsonl, .csv, .parquet, a folder, a pattern, a Hub id."
    )
    validation: str | None = option(None, "The same to validate on; else a share of the documents.")
    validation_share: float = option(0.05, "Share of the documents that are validated on.")
    split_seed: int = option(0, "Of the choice of these documents; the same whatever the seed.")
    validation_size: int = option(500, "Blocks of the validation text to use, from the first on.")
    objective: str = option(
        "auto", "clm (next token), mlm (masked), span (T5's), hidden (a teacher's states); auto: by the model's class."
    )
    text_column: str | None = option(None, "Column of the text: text, or the only one.")
    documents: str = option("joined", "joined: end to end, in full blocks; separate: none sees another.")
    mask: float = option(0.15, "Share of the tokens that mlm and span hide.")
    whole_words: bool = option(False, "mlm hides whole words.")
    span: float = option(3.0, "Mean length of the spans that span hides, in tokens.")
    stream: bool = option(False, "Read the data while training, without storing them: needs max_steps.")
    workers: int = option(1, "Processes that tokenize.")
    teacher: str | None = option(None, "Heal the model: be like this one; base: what it was converted from.")
    teacher_share: float = option(1.0, "Share of the teacher's logits in the loss; the rest is the text's own tokens.")
    temperature: float = option(1.0, "Of the logits that are compared with the teacher's.")
    match: str = option("auto", "What is compared beside logits: ffn (outputs of FFNs), hidden (states) or none.")
    match_weight: float = option(1.0, "Of what is compared beside logits, in the loss.")

    positive: ClassVar[tuple[str, ...]] = (
        *ModelOptions.positive, "train_tokenizer", "validation_size", "workers",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("documents", self.documents, DOCUMENTS)
        check_choice("match", self.match, MATCHES)
        if not 0 <= self.teacher_share <= 1:
            raise OptionError(f"teacher_share must be 0 to 1, got {shown(self.teacher_share)}")
        for key in ("temperature", "match_weight"):
            if not getattr(self, key) > 0:
                raise OptionError(f"{key} must be more than 0, got {shown(getattr(self, key))}")
        for key in ("validation_share", "mask"):
            if not 0 < getattr(self, key) < 1:
                raise OptionError(f"{key} must be a share between 0 and 1, got {shown(getattr(self, key))}")
        check_seed("split_seed", self.split_seed)
        if self.span < 1:
            raise OptionError(f"span must be at least 1 token, got {shown(self.span)}")

    def check(self) -> None:
        """Raise OptionError for options that are missing, or would be ignored."""
        super().check()
        if bool(self.model) == bool(self.config):
            raise OptionError("give a pretrained model, or the config of one to train from scratch: one of the two")
        if self.config and bool(self.tokenizer) == bool(self.train_tokenizer):
            raise OptionError("from scratch, give the tokenizer of a model, or train_tokenizer=8192: one of the two")
        if self.config and self.peft != "none":
            raise OptionError(f"peft={self.peft} trains few parameters of a pretrained model: there is none here")
        if self.teacher == "base" and not self.model:
            raise OptionError(
                "teacher=base is what a pretrained model was converted from: from scratch, name the teacher"
            )
        if not self.data:
            raise OptionError("give the text to train on with data")
        if self.objective != "auto":
            if self.whole_words and self.objective != "mlm":
                raise OptionError(f"whole_words is for mlm, the objective is {self.objective}")

    @property
    def title(self) -> str:
        """The name that tables, reports and cards give the model."""
        return self.base_model or self.model or "from scratch"


def language_options(values: dict[str, object]) -> tuple[LanguageOptions, LanguageTraining]:
    """Make the options of a run from one flat mapping, with the defaults of training from scratch where it is that.

    Raises:
        UnknownNameError, OptionError: as of `hf_glu.training.options.split_options`.
    """
    if values.get("config"):
        values = {**FROM_SCRATCH, **values}
    return split_options(values, LanguageOptions, LanguageTraining)
