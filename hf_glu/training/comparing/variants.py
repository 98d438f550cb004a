"""The variants of a comparison: an activation with a width, or the model as it is; quick to import."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_glu.activation import registry
from hf_glu.activation.stock import SAME_FUNCTION, is_elementwise
from hf_glu.config.glu import check_width
from hf_glu.errors import OptionError
from hf_glu.training.options import JobOptions, read_width

DENSE, RANDOM, KEEP, ISO = "dense", "random-", "keep", "iso"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of a comparison: an activation, or the dense model.

    Attributes:
        name: as given, ``dense``, ``geglu``, ``swiglu:iso``, ``random-geglu``, ``relu``.
        to: gated activation; None: the dense model.
        width: hidden units.
        random: whether the converted FFNs are initialised at random.
        plain: elementwise activation of the dense model; None: its own.
    """

    name: str
    to: str | None = None
    width: str = KEEP
    random: bool = False
    plain: str | None = None

    @property
    def meaning(self) -> tuple[str | None, int | str, bool, str | None]:
        """What tells variants apart, however they are called: ``silu_glu`` is ``swiglu``, too."""
        entry = registry[self.to] if self.to else None
        name = (entry.gate or entry.name) if entry else None
        return same_name(name), read_width(self.width), self.random, same_name(self.plain)

    def job(self, job: JobOptions) -> JobOptions:
        """Return a fine-tuning job of this variant."""
        if self.to is None:
            return job.dense()
        return replace(job, to=self.to, width=self.width, random=self.random)

    @property
    def folder(self) -> str:
        """Its name as the beginning of a folder's."""
        return self.name.replace(":", "-")


def same_name(name: str | None) -> str | None:
    """Return one name for all that stand for the same function."""
    return next((min(names) for names in SAME_FUNCTION if name in names), name)


def read_variant(text: str, *, plain: bool = False) -> Variant:
    """Read ``dense``, ``NAME``, ``NAME:WIDTH`` or ``random-NAME[:WIDTH]``.

    Args:
        text: a variant.
        plain: whether ``NAME`` may be an elementwise activation, too, such as ``relu``.

    Raises:
        OptionError, UnknownNameError: it can't be read, or names no activation.
    """
    name = text.strip()
    if name == DENSE:
        return Variant(name=name)
    to, _, width = name.removeprefix(RANDOM).partition(":")
    if not to:
        raise OptionError(f"a variant is such as dense, geglu, swiglu:iso or random-geglu, got {text!r}")
    if plain and is_elementwise(to):
        if name != to:
            raise OptionError(f"{to} has no gate: it stands alone, without a width, got {text!r}")
        return Variant(name=name, plain=to)
    if registry.find(to) is None:
        raise registry.unknown(to, "" if plain else "gated ")
    check_width(None if width in ("", KEEP) else read_width(width))
    return Variant(name=name, to=to, width=width or KEEP, random=name.startswith(RANDOM))
