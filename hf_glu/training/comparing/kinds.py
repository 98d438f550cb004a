"""What a kind of comparison says to the engine: how a variant is read, trained, recorded and valued."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from hf_glu.checkpoint.files import RUN_FILE
from hf_glu.errors import OptionError
from hf_glu.training.comparing.variants import Variant
from hf_glu.training.options import OF_CONVERSION, ModelOptions, TrainingOptions
from hf_glu.training.record import option_record
from hf_glu.training.results import ComparisonTable, Record, Results


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of a comparison.

    Attributes:
        variant: what is trained.
        job, options: how.
        made_of: what its results depend on.
        tried: whether it only tells how good a learning rate is, so that its model isn't kept.
    """

    variant: Variant
    job: ModelOptions
    options: TrainingOptions
    made_of: Record
    tried: bool = False

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(str(self.job.output))

    @property
    def begun(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.folder / RUN_FILE).is_file()


@dataclass(frozen=True, kw_only=True)
class Search:
    """The learning rates that are tried with each variant, on a seed that no result is of."""

    lrs: Sequence[float]
    seed: int


class Compared(ABC):
    """What is compared. A kind of comparison is a subclass; it runs nothing before `carry_out`.

    Args:
        job: the model and its data, without a conversion.
        options: how it is trained, whatever the variant.

    Attributes:
        least: how many seeds it takes.
        free: the options that runs of one comparison may have otherwise.
    """

    least: ClassVar[int] = 1
    free: ClassVar[frozenset[str]] = frozenset({"activation", "seed", *OF_CONVERSION})

    def __init__(self, job: ModelOptions, options: TrainingOptions) -> None:
        if job.folder is None:
            raise OptionError("a comparison needs an output folder")
        self.job, self.options, self.folder = job, options, job.folder

    @property
    @abstractmethod
    def task(self) -> str:
        """The name that the table gives what is trained."""

    @property
    def title(self) -> str:
        """The name that the table gives the model."""
        return self.job.title

    @abstractmethod
    def read(self, text: str) -> Variant:
        """Read a variant."""

    def meaning(self, variant: Variant) -> object:
        """Return what tells variants apart, however they are called."""
        return variant.meaning

    def prepare(self, chosen: Sequence[Variant]) -> None:  # noqa: B027  (a kind may have nothing to prepare)
        """Check the variants, all options being right, before anything is run."""

    @abstractmethod
    def job_of(self, variant: Variant) -> ModelOptions:
        """Return the job of a variant; its output is the engine's."""

    @cached_property
    def record(self) -> Record:
        """What all runs depend on, with the options of the dense one."""
        return self.make_record()

    @abstractmethod
    def make_record(self) -> Record:
        """Make `record`."""

    @abstractmethod
    def carry_out(self, run: PlannedRun) -> Results:
        """Carry out a run, or go on with it."""

    def value(self, results: Results) -> float:
        """Return what of a run's results is compared; infinity where its training diverged."""
        return results["score"]

    def complete(  # noqa: B027  (as above)
        self, table: ComparisonTable, runs: Mapping[str, Sequence[PlannedRun]], found: Mapping[str, list[Results]]
    ) -> None:
        """Add to the table what only this kind knows."""

    def planned(self, variant: Variant, seed: int, *, lr: float | None = None, tried: bool = False) -> PlannedRun:
        """Return the run of a variant with a seed.

        Args:
            variant, seed: what is run.
            lr: its learning rate; None: that of the options.
            tried: as of `PlannedRun`.
        """
        options = replace(self.options, seed=seed, lr=self.options.lr if lr is None else lr)
        rate = f"-lr{lr:g}" if tried else ""
        job = replace(self.job_of(variant), output=str(self.folder / f"{variant.folder}{rate}-seed{seed}"))
        named = {"activation": job.conversion or variant.plain}
        made_of: Record = {**self.record, "options": {**option_record(job, options, self.task), **named}}
        return PlannedRun(variant=variant, job=job, options=options, made_of=made_of, tried=tried)
