"""One name that another library doesn't promise to keep, and how it is looked up."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from hf_glu.errors import IncompatibleTransformersError

REFUSED = "refused when it is used"
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Private:
    """A name of another library that it doesn't promise to keep.

    Attributes:
        where: what has it: ``package.module``, something in it ``package.module:Class``, or an object
            ``package.module:Class()`` that is made without arguments.
        name: the name.
        need: the feature that needs it, as in "loading a gated model needs it".
        seen: the versions of the package in which it was found, as in "5.6 to 5.24".
        otherwise: what happens to the feature in a version without the name.
        mark: whether the library puts it on objects as they come, so that only its source tells that it does.
        vital: whether nothing works without it, so that registering the plugin is refused.
    """

    where: str
    name: str
    need: str
    seen: str
    otherwise: str = REFUSED
    mark: bool = False
    vital: bool = False

    @property
    def module(self) -> str:
        """The module that has it."""
        return self.where.partition(":")[0]

    @property
    def package(self) -> str:
        """The library."""
        return self.where.partition(".")[0].partition(":")[0]

    def __str__(self) -> str:
        return f"{self.where.replace(':', '.')}.{self.name}"

    def find(self) -> Any:
        """Return what the name stands for in the module or class that has it.

        Raises:
            IncompatibleTransformersError: the installed version has no such name.
        """
        try:
            return find_name(self.where, self.name)
        except (ImportError, AttributeError) as error:
            raise self.missing() from error

    def find_or(self, default: Any) -> Any:
        """Return what the name stands for, ``default`` where the installed version has no such name."""
        try:
            return self.find()
        except IncompatibleTransformersError:
            return default

    def of(self, owner: Any, *default: Any) -> Any:
        """Return the attribute of this name of ``owner``; ``default``, where it is given and there is none.

        Raises:
            IncompatibleTransformersError: there is none, and no default.
        """
        found = getattr(owner, self.name, *(default or (_ABSENT,)))
        if found is _ABSENT:
            raise self.missing()
        return found

    def put(self, owner: Any, value: Any) -> None:
        """Give ``owner`` the attribute of this name."""
        setattr(owner, self.name, value)

    def missing(self) -> IncompatibleTransformersError:
        """Return the error that says in one line what can't be done, and why."""
        return IncompatibleTransformersError(
            f"{self.need}: this needs {self}, which {self.package} {version(self.package)} doesn't have: install a "
            f"version that does ({self.seen})"
        )

    def is_present(self) -> bool | None:
        """Return whether the installed version has the name, None where the package isn't installed; never raises."""
        try:
            if find_spec(self.package) is None:
                return None
            home = _home(self.where)
            return self.name in inspect.getsource(home) if self.mark else hasattr(home, self.name)
        except Exception:  # of any version, while it is imported or looked at: a doctor has to survive it
            return False


def find_name(where: str, name: str) -> Any:
    """Return what a name stands for at a place, see `Private`."""
    return getattr(_home(where), name)


@cache
def _home(where: str) -> Any:
    """Return the module, class or object at a place, which stays the same: each forward asks for some."""
    module, _, item = where.partition(":")
    found = resolve_name(f"{module}:{item.removesuffix('()')}")
    return found() if item.endswith("()") else found


def version(package: str) -> str:
    """Return the installed version of a package, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
