"""Command-line flags from dataclasses: one flag a field, with its type, default and help."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "list[str]": list[str]}


def with_flags(*kinds: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a flag for each field of the dataclasses; those that were given reach it as ``given``.

    The command has a parameter ``given``, a dict from fields to values; its other parameters stay as they are.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        fields = [field for kind in kinds for field in dataclasses.fields(kind)]

        def run(**values: Any) -> Any:
            given = {field.name: values.pop(field.name) for field in fields}
            return command(**values, given={key: value for key, value in given.items() if value not in (None, [])})

        flags = [_flag(field) for field in fields]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
        return run

    return decorate


def _flag(field: dataclasses.Field[Any]) -> inspect.Parameter:
    kind = TYPES[str(field.type).removesuffix(" | None")]
    shown = "" if field.default in (None, "", False) else f" [default: {field.default}]"
    name = "--" + field.name.replace("_", "-")
    names = (f"{name}/--no-{name[2:]}",) if kind is bool else (name,)
    info = typer.Option(*names, help=field.metadata["help"] + shown, show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )
