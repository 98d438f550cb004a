"""The form of what commands print: ``--format`` beside ``--json``, for every command that has that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer

from hf_glu.errors import OptionError


class Printing(StrEnum):
    """What is printed on standard output: ``auto`` is a table, as wide as the terminal where there is one."""

    auto = "auto"
    human = "human"
    json = "json"
    quiet = "quiet"


_HELP = "What is printed: auto (a table), human (the same), json (as --json) or quiet (nothing)."
Format = Annotated[Printing, typer.Option("--format", help=_HELP)]
_quiet: list[bool] = []


def is_quiet() -> bool:
    """Return whether the command that runs prints no result."""
    return bool(_quiet)


class Commands(typer.Typer):
    """The application: a command with ``--json`` has ``--format``, too."""

    def command(self, *args: Any, **kwargs: Any) -> Any:
        """Register a command."""
        register = super().command(*args, **kwargs)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_format(function))
            return function

        return add


def _with_format(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that takes ``--format``, where it takes ``--json``."""
    signature = inspect.signature(function, eval_str=True)  # by the names of its own module
    if "json" not in signature.parameters:
        return function

    @wraps(function)
    def call(*args: Any, format: Printing = Printing.auto, **kwargs: Any) -> Any:
        if kwargs.get("json") and format not in (Printing.auto, Printing.json):
            raise OptionError(f"one form at a time, got --json and --format {format}")
        kwargs["json"] = bool(kwargs.get("json")) or format is Printing.json
        with _printing(format):
            return function(*args, **kwargs)

    own = inspect.Parameter("format", inspect.Parameter.KEYWORD_ONLY, default=Printing.auto, annotation=Format)
    parameters = [*signature.parameters.values(), own]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


@contextmanager
def _printing(format: Printing) -> Iterator[None]:
    quiet = format is Printing.quiet
    if quiet:
        _quiet.append(True)
    try:
        yield
    finally:
        if quiet:
            _quiet.pop()
