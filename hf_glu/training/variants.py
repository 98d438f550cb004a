"""The rows of a comparison as they are given, ``dense,geglu,swiglu:iso``; quick to import, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hf_glu.activation import registry
from hf_glu.activation.stock import SAME_FUNCTION
from hf_glu.config.glu import check_width
from hf_glu.errors import OptionError
from hf_glu.training.options import OF_VARIANTS, JobOptions, TrainingOptions, read_width

DENSE, RANDOM = "dense", "random-"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of a comparison: an activation, or the dense model.

    Attributes:
        name: as given, ``dense``, ``geglu``, ``swiglu:iso``, ``random-geglu``.
        to: gated activation; None: the dense model.
        width: hidden units.
        random: whether the converted FFNs are initialised at random.
    """

    name: str
    to: str | None
    width: str
    random: bool

    @property
    def meaning(self) -> tuple[str | None, int | str, bool]:
        """What tells variants apart, however they are called: ``silu_glu`` is ``swiglu``, too."""
        entry = registry[self.to] if self.to else None
        name = (entry.gate or entry.name) if entry else None
        same = next((min(names) for names in SAME_FUNCTION if name in names), name)
        return same, self.units, self.random

    @property
    def units(self) -> int | str:
        """The width as `hf_glu.convert` takes it."""
        return read_width(self.width)

    def job(self, job: JobOptions, folder: Path, seed: int) -> JobOptions:
        """Return the job of this variant with a seed."""
        output = str(folder / f"{self.name.replace(':', '-')}-seed{seed}")
        if self.to is None:
            return replace(job.dense(), output=output)
        return replace(job, output=output, to=self.to, width=self.width, random=self.random)


def read_variant(text: str) -> Variant:
    """Read ``dense``, ``NAME``, ``NAME:WIDTH`` or ``random-NAME[:WIDTH]``.

    Raises:
        OptionError, UnknownNameError: it can't be read, or names no activation.
    """
    name = text.strip()
    if name == DENSE:
        return Variant(name=name, to=None, width="keep", random=False)
    to, _, width = name.removeprefix(RANDOM).partition(":")
    if not to:
        raise OptionError(f"a variant is such as dense, geglu, swiglu:iso or random-geglu, got {text!r}")
    registry[to]
    variant = Variant(name=name, to=to, width=width or "keep", random=name.startswith(RANDOM))
    check_width(None if variant.width == "keep" else variant.units)
    return variant


def read_variants(
    variants: Sequence[str], seeds: Sequence[int], job: JobOptions, options: TrainingOptions
) -> list[Variant]:
    """Read the variants of a comparison with some seeds.

    Raises:
        OptionError, UnknownNameError: as `read_variant`; a variant or a seed is given twice, or an option would be
            ignored.
    """
    chosen = [read_variant(text) for text in variants]
    given = {**job.to_dict(), **asdict(options)}
    defaults = {**JobOptions().to_dict(), **asdict(TrainingOptions())}
    for key in OF_VARIANTS:
        if given[key] != defaults[key]:
            raise OptionError(f"{key}={given[key]!r} does nothing in a comparison, whose variants and seeds say it")
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise OptionError(f"the seed {twice[0]} is given twice: its runs would be the same")
    meant: dict[tuple[str | None, int | str, bool], str] = {}
    for variant in chosen:
        if variant.meaning in meant:
            raise OptionError(f"the variants {meant[variant.meaning]} and {variant.name} are the same")
        meant[variant.meaning] = variant.name
    return chosen
