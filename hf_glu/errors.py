"""Every error hf_glu raises on purpose, and the helper that names the nearest valid value."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 12
_SHORT.maxlevel = 4


LONGEST = 200  # letters of a name; longer ones are nobody's


class HfGluError(Exception):
    """Base of all of the errors below; the command line prints its message as one line and exits with 2."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownNameError(HfGluError, KeyError):
    """A name (activation, option, task, ...) that does not exist."""


class OptionError(HfGluError, ValueError):
    """An option whose value can't be used."""


class DuplicateNameError(HfGluError, ValueError):
    """A second, different registration under a name that is taken."""


class NoSiteError(HfGluError, ValueError):
    """A model (or a selection of its layers) without a feed-forward network that can be gated."""


class ConversionError(HfGluError, ValueError):
    """A conversion that can't be done; the message says which one can."""


class CheckpointError(HfGluError, OSError):
    """A checkpoint that can't be found, read, loaded or written as asked."""


class PublishingError(HfGluError, OSError):
    """A push to the Hub that was refused or broke off; the repository is as it was."""


class DataError(HfGluError, ValueError):
    """Training data that can't be used."""


class TrainingError(HfGluError, RuntimeError):
    """A training run that can't go on."""


class DivergedError(TrainingError):
    """A training run whose loss is no number any more."""


class IncompatibleTransformersError(HfGluError, ImportError):
    """The installed Transformers lacks something that the plugin hooks."""


class MissingPackageError(HfGluError, ImportError):
    """A package that comes with an extra, which isn't installed; the message says how to install it."""


def shown(value: object) -> str:
    """Return ``value`` as a message shows it: like its repr, but short however long, deep or large it is."""
    return _SHORT.repr(value)


def refuse_unknown(keys: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise UnknownNameError for the first of ``keys`` that isn't ``valid`` in ``where``, naming the nearest ones."""
    known = set(valid)
    for key in keys:
        if key not in known:
            raise UnknownNameError(f"unknown key {shown(key)} in {where}; {nearest(key, known)}")


def nearest(name: object, valid: Iterable[str], *, limit: int = 3, among: Iterable[Iterable[str]] | None = None) -> str:
    """Return a hint such as ``"did you mean 'swiglu'?"``, or the valid names when none is near.

    Args:
        name: what was given.
        valid: names to list.
        limit: the most that are named as near.
        among: groups of names that may be meant, of which the first with a near one counts; None: the valid ones.
    """
    names = sorted(valid)
    groups = (_close(str(name)[:LONGEST], sorted(group), limit) for group in among or (names,))
    if close := next(filter(None, groups), None):
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "valid: " + ", ".join(names)


def _close(name: str, names: list[str], limit: int) -> list[str]:
    """Return the nearest of ``names``, whether in capitals or with dashes; where one is only spelled so, that one."""
    spelled = [known for known in names if _letters(known) == _letters(name)]
    matches = get_close_matches(_folded(name), {_folded(known) for known in names}, n=limit, cutoff=0.6)
    return spelled or [known for match in matches for known in names if _folded(known) == match][:limit]


def _folded(name: str) -> str:
    """Return a name without what people spell otherwise: ``SwiGLU``, ``swiglu-oss``."""
    return name.casefold().replace("-", "_")


def _letters(name: str) -> str:
    """Return a name without what stands between its parts: ``Swi-GLU``, ``leakyrelu``."""
    return _folded(name).replace("_", "")
