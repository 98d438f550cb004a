"""The options of a job: dataclasses that YAML files and command-line flags fill."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.writing import user_path
from hf_glu.config.extras import OF_TRAINING
from hf_glu.config.section import is_count, is_number
from hf_glu.errors import OptionError, shown
from hf_glu.tasks.choices import OF_OWN_DATA, OwnOptions

LARGEST_SEED = 2**32 - 1  # which NumPy's generators take
PRECISIONS = ("auto", "no", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "constant")
TRACKERS = ("none", "trackio", "tensorboard", "wandb")
FORMS = ("auto", "classes", "text")
PEFTS = ("none", "lora", "gates")

# what says how to convert
OF_CONVERSION = ("to", "width", "layers", "experts", "top_k", "exclude", "distill_steps", "random")
# what a comparison's variants and seeds say
OF_VARIANTS = ("to", "width", "random", "seed")
# an option that does nothing without (one of) others: it would be ignored silently
NEEDED = {
    "width": ("to",),
    "layers": ("to", "experts"),
    "exclude": ("to", "experts"),
    "top_k": ("experts",),
    "distill_steps": ("to",),
    "mixture_limit": ("mixture",),
    **dict.fromkeys(("validation", "max_target_length", *OF_OWN_DATA), ("dataset",)),
    "predict": ("output",),
    "teacher_share": ("teacher",),
    "temperature": ("teacher",),
    "match": ("teacher",),
    "match_weight": ("teacher",),
}
EXCLUSIVE = (
    ("task", "mixture"),
    *((kind, key) for kind in ("task", "mixture") for key in ("validation", *OF_OWN_DATA)),
    ("random", "experts"),
)


def option(default: object, text: str) -> Any:
    """Return a dataclass field with the help that the command line shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to fine-tune. ``batch_size`` counts the examples of one optimizer step, all processes together.

    Raises:
        OptionError: a value out of range.
    """

    epochs: float = option(3.0, "Passes over the training data (fractions of one, too).")
    max_steps: int | None = option(None, "Optimizer steps, whatever the epochs say.")
    batch_size: int = option(32, "Examples of one optimizer step, all processes together.")
    accumulate: int = option(1, "Forward passes that a process splits its share of a batch into.")
    eval_batch_size: int = option(64, "Sequences of one forward pass in evaluation.")
    lr: float = option(2e-5, "Peak learning rate of AdamW.")
    schedule: str = option("linear", "Learning rate after warm-up: linear, cosine (both to 0) or constant.")
    warmup: float = option(0.06, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "Of AdamW, for matrices only.")
    activation_lr: float | None = option(None, "Learning rate of activations' own parameters (states, mixes): --lr.")
    clip: float = option(1.0, "Largest norm of the gradient.")
    max_length: int = option(128, "Tokens after which a sequence is cut.")
    precision: str = option("auto", "auto (bf16 where the hardware computes in it), no, bf16 or fp16.")
    evaluate_every: int | None = option(None, "Steps between evaluations; each epoch if not given; 0: at the end only.")
    patience: int | None = option(None, "Stop after so many evaluations without a better one, and take the best.")
    checkpoint_every: int | None = option(None, "Steps between checkpoints; without it only Ctrl-C leaves one.")
    log_every: int = option(10, "Steps between lines of log.jsonl.")
    anneal: float | None = option(None, "Share of the steps after which a learnable_ activation is its target.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    save_memory: bool = option(False, "Gated FFNs keep their pre-activations only: a third less, the same results.")
    tile: int | None = option(None, "Tokens that an FFN takes at a time, in both passes: long texts in less memory.")
    fuse: bool = option(False, "Activations in one pass each way, by kernels compiled at the first step, or Liger's.")
    compile: bool = option(False, "Train with torch.compile.")
    watch: bool | None = option(None, "Watch experts and gates while training; by itself where there are experts.")
    deterministic: bool = option(False, "Deterministic algorithms only.")
    tracker: str = option("none", "none, trackio, tensorboard or wandb.")
    seed: int = option(0, "Of the head, the order of data and dropout.")

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulate", "eval_batch_size", "lr", "max_length", "clip", "log_every")
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        for key in (*positive, "max_steps", "patience", "checkpoint_every"):
            value = getattr(self, key)
            if value is None and defaults[key] is None:
                continue
            if not (is_number(value) and value > 0):
                raise OptionError(f"{key} must be more than 0, got {shown(value)}")
        for key in ("weight_decay", "evaluate_every"):
            value = getattr(self, key)
            if value is not None and not (is_number(value) and value >= 0):
                raise OptionError(f"{key} must be 0 or more, got {shown(value)}")
        if self.activation_lr is not None and not (is_number(self.activation_lr) and self.activation_lr > 0):
            raise OptionError(f"activation_lr must be more than 0, got {shown(self.activation_lr)}")
        check_seed("seed", self.seed)
        for key in ("warmup", "anneal"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise OptionError(f"{key} must be a share of the steps, 0 to 1, got {shown(value)}")
        if self.anneal == 0:
            raise OptionError("anneal=0 leaves no step to anneal in: give a share of them, such as 0.5")
        if self.patience is not None and self.evaluate_every == 0:
            raise OptionError("patience counts evaluations, and evaluate_every=0 leaves only the last one")
        if self.watch and self.compile:
            raise OptionError("watch hooks the layers, which compile makes one graph of: leave one of them out")
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("tracker", self.tracker, TRACKERS)

    def mixed_precision(self) -> str:
        """Return the precision as Accelerate takes it: no, bf16 or fp16."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if has_fast_bf16() else "no"

    def to_dict(self) -> JsonObject:
        """Return the options as plain data, with the precision that is used."""
        return {**dataclasses.asdict(self), "mixed_precision": self.mixed_precision()}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to train, how to convert it first, which of its parameters are trained, and where it goes.

    Raises:
        OptionError: a value that can't be.
    """

    model: str = option("", "Pretrained checkpoint: local folder or Hub id.")
    output: str | None = option(None, "New folder for model, tokenizer, log, results and card.")
    to: str | None = option(None, "Convert to this gated activation first.")
    width: str = option("keep", "Hidden units after the conversion: keep, iso (equal parameters) or a number.")
    layers: str | None = option(None, "Layers to convert: 0-5,8 or 'every 2' or encoder.")
    experts: str | None = option(None, "Make experts of the FFNs: relu*2,gelu*2,swiglu*4, or a number.")
    top_k: int | None = option(None, "Experts that a token uses: 2.")
    exclude: str | None = option(None, "Regular expression of FFN sites to leave alone.")
    calibration: int = option(3000, "Training texts that an approximate conversion is fitted on, where one is needed.")
    distill_steps: int | None = option(None, "Steps of the fit, for each FFN; 400 where units are dropped.")
    random: bool = option(False, "Initialise the converted FFNs at random: what surgery without weights gives.")
    peft: str = option("none", "none, lora, or gates (train up halves, norms and head only).")
    lora_rank: int = option(8, "Rank of LoRA.")
    lora_targets: str = option("ffn", "Where LoRA goes: ffn, in, out or all-linear.")
    base_model: str | None = option(None, "Name of the base model for the card, where MODEL is a folder.")

    positive: ClassVar[tuple[str, ...]] = ("calibration", "lora_rank")

    def __post_init__(self) -> None:
        check_choice("peft", self.peft, PEFTS)
        for key in self.positive:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise OptionError(f"{key} must be at least 1, got {shown(value)}")
        if self.distill_steps is not None and self.distill_steps < 0:
            raise OptionError(f"distill_steps must be 0 or more, got {shown(self.distill_steps)}")
        if self.random and not self.to:
            raise OptionError("random=True initialises converted FFNs: give the activation with to")

    def check(self) -> None:
        """Raise OptionError for an option that would be ignored."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        for key, needed in NEEDED.items():
            known = [name for name in needed if name in defaults]
            changed = key in defaults and getattr(self, key) != defaults[key]
            if changed and known and not any(getattr(self, name) for name in known):
                raise OptionError(f"{key}={getattr(self, key)!r} does nothing without {' or '.join(needed)}: give that")
        for key, other in EXCLUSIVE:
            if getattr(self, key, None) and getattr(self, other, None):
                raise OptionError(f"{key} and {other} exclude each other: leave one of them out")
        if self.peft != "lora" and (self.lora_rank, self.lora_targets) != (
            defaults["lora_rank"],
            defaults["lora_targets"],
        ):
            raise OptionError(f"lora_rank and lora_targets do nothing without peft=lora, which is {self.peft}")

    @property
    def conversion(self) -> str | None:
        """The name of the conversion: its activation, else those of its experts; None: nothing is converted."""
        return self.to or self.experts

    def dense(self) -> Self:
        """Return the same job without a conversion."""
        plain: JsonObject = {each.name: each.default for each in dataclasses.fields(self) if each.name in OF_CONVERSION}
        return dataclasses.replace(self, **plain)

    @property
    def packages(self) -> tuple[str, ...]:
        """What the job needs of the extras, as it is imported."""
        return (*OF_TRAINING, *(("peft",) if self.peft == "lora" else ()))

    @property
    def title(self) -> str:
        """The name that tables, reports and cards give the model."""
        return self.base_model or self.model

    @property
    def folder(self) -> Path | None:
        """The absolute path of the output folder, None where there is none."""
        return user_path(self.output).absolute() if self.output else None

    @property
    def units(self) -> int | str:
        """The width as `hf_glu.convert` takes it."""
        return read_width(self.width)

    def to_dict(self) -> JsonObject:
        """Return the options as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class JobOptions(ModelOptions):
    """What to fine-tune, on what, into which folder.

    Raises:
        OptionError: a value that can't be.
    """

    task: str | None = option(None, "A task of GLUE, SuperGLUE or open_nlu.")
    mixture: str | None = option(None, "Train one text-to-text model on all tasks of this suite.")
    mixture_limit: int = option(16384, "Rows of one task in the mixture; larger tasks are cut to so many.")
    dataset: str | None = option(None, "Local data: a task's folder as on the Hub, or files with text and label.")
    validation: str | None = option(None, "Validation file beside a DATASET of one's own; else a tenth of it.")
    texts: str | None = option(None, "The same as text_column and pair_column in one, the older form: text,text2.")
    text_column: str | None = option(None, "Column with the text (or list of words) in a DATASET of one's own.")
    pair_column: str | None = option(None, "Column with a second text.")
    label_column: str | None = option(None, "Column with the label, or a list of classes or tags.")
    label_separator: str | None = option(None, "What stands between the classes of one row, where they are one text.")
    problem: str | None = option(None, "single, multi (several classes), regression, tokens (a tag a word) or text.")
    source_column: str | None = option(None, "Column with the text to read, where one is to be written.")
    target_column: str | None = option(None, "Column with the text to write.")
    metrics: str | None = option(None, "Of written texts, the score first: exact_match, rouge, chrf, bleu.")
    max_target_length: int | None = option(None, "Tokens after which a text to write is cut: 128.")
    form: str = option("auto", "auto (text-to-text for T5), classes or text.")
    train_size: int | None = option(None, "Training rows to use, from the first on.")
    validation_size: int | None = option(None, "Validation rows to use, from the first on.")
    predict: bool = option(False, "Write the leaderboard's files for the test splits.")

    positive: ClassVar[tuple[str, ...]] = (
        *ModelOptions.positive, "train_size", "validation_size", "mixture_limit", "max_target_length",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)

    def check(self) -> None:
        """Raise OptionError for an option that would be ignored."""
        super().check()
        _ = self.own

    @property
    def own(self) -> OwnOptions:
        """How data of one's own are read.

        Raises:
            OptionError: options that exclude or need one another.
        """
        return OwnOptions(**{key: getattr(self, key) for key in OF_OWN_DATA})


def check_choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise OptionError unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise OptionError(f"{key} must be one of {', '.join(valid)}, got {shown(value)}")


def check_seed(key: str, value: int) -> None:
    """Raise OptionError for a seed that generators don't take."""
    if not is_count(value, LARGEST_SEED, 0):
        raise OptionError(f"{key} must be a whole number from 0 to {LARGEST_SEED}, got {shown(value)}")


def read_width(text: str) -> int | str:
    """Return a width as `hf_glu.convert` takes it: a number, ``keep`` or ``iso``."""
    return int(text) if text.isdecimal() and len(text) < 10 else text


def has_fast_bf16() -> bool:
    """Return whether this machine computes in bfloat16 (AVX512-BF16 or AMX on a CPU)."""
    import torch

    from hf_glu.compat.of_torch import FAST_BF16

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512" and FAST_BF16.find_or(bool)())
