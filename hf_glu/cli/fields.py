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

    The command has a parameter ``given``, a dict from fields to values; its other parameters stay as they are, and
    stand for fields of their names. A field that several dataclasses have is one flag, which says what it is in each.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        fields: dict[str, list[dataclasses.Field[Any]]] = {}
        for field in (field for kind in kinds for field in dataclasses.fields(kind)):
            if field.name not in {parameter.name for parameter in own}:
                fields.setdefault(field.name, []).append(field)

        def run(**values: Any) -> Any:
            given = {name: values.pop(name) for name in fields}
            return command(**values, given={key: value for key, value in given.items() if value not in (None, [])})

        flags = [_flag(found) for found in fields.values()]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
        return run

    return decorate


def _flag(fields: list[dataclasses.Field[Any]]) -> inspect.Parameter:
    field = fields[0]
    kind = TYPES[str(field.type).removesuffix(" | None")]
    name = "--" + field.name.replace("_", "-")
    names = (f"{name}/--no-{name[2:]}",) if kind is bool else (name,)
    info = typer.Option(*names, help=_help(fields), show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _help(fields: list[dataclasses.Field[Any]]) -> str:
    """Return the texts of one flag's fields, each once, and their defaults."""
    defaults: dict[str, list[str]] = {}
    for field in fields:
        shown = [] if field.default in (None, "", False) else [str(field.default)]
        defaults[field.metadata["help"]] = list(dict.fromkeys([*defaults.get(field.metadata["help"], []), *shown]))
    return " / ".join(
        text + (f" [default: {' / '.join(values)}]" if values else "") for text, values in defaults.items()
    )
