"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "*_<>|[]"})


@cache
def commands() -> Mapping[str, Any]:
    """Return the commands of ``hf-glu`` by name, as click has them."""
    from typer.main import get_command

    import hf_glu.cli
    from hf_glu.cli.commands import app

    for module in iter_modules(hf_glu.cli.__path__):  # each has its own commands
        import_module(f"hf_glu.cli.{module.name}")
    return dict(sorted(get_command(app).commands.items()))


def is_option(parameter: Any) -> bool:
    """Return whether a parameter is an option, not an argument."""
    return parameter.param_type_name == "option"


def flags(command: Any) -> set[str]:
    """Return every flag of a command."""
    options = [each for each in command.params if is_option(each)]
    return {"--help", "-h"} | {flag for each in options for flag in (*each.opts, *each.secondary_opts)}


def reference() -> str:
    """Return the reference in Markdown: a heading for each command, what it does, its arguments and options."""
    return "\n\n".join(part for name, command in commands().items() for part in described(name, command))


def described(name: str, command: Any) -> Iterator[str]:
    """Yield the parts of one command's reference."""
    arguments = [each for each in command.params if not is_option(each)]
    options = [each for each in command.params if is_option(each)]
    yield f"## `hf-glu {name}`"
    yield escaped(" ".join((command.help or "").split()))
    words = [placed(each) for each in arguments]
    yield "```text\n" + " ".join(["hf-glu", name, *(["[OPTIONS]"] if options else []), *words]) + "\n```"
    if given := [each for each in arguments if getattr(each, "help", None)]:
        yield table("argument", [(f"`{placed(each)}`", each.help) for each in given])
    if options:
        yield table("option", [(spelled(each), meaning(each)) for each in options])


def placed(argument: Any) -> str:
    """Return an argument as a usage line has it, in brackets where it can be left out."""
    word = argument.metavar or argument.name.upper()
    if word.startswith("["):
        return word
    word = word.removesuffix("...") + ("..." if argument.nargs == -1 else "")
    return word if argument.required else f"[{word}]"


def table(kind: str, rows: list[tuple[str, str]]) -> str:
    """Return a table of parameters; the first cells are Markdown already."""
    lines = [f"| {kind} | meaning |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {escaped(text)} |" for name, text in rows])


def spelled(option: Any) -> str:
    """Return how an option is written: its flags, and what follows them."""
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    off = f" / `{option.secondary_opts[0]}`" if option.secondary_opts else ""
    return f"`{', '.join(option.opts)}{value}`".replace("|", "\\|") + off


def meaning(option: Any) -> str:
    """Return what an option means, with its default where that says something."""
    default = option.default
    said = isinstance(default, (str, int, float)) and not isinstance(default, bool) and default != ""
    text = " ".join((option.help or "").split())
    return f"{text} Default: `{default}`." if said and str(default) not in text else text


def escaped(text: str) -> str:
    """Return plain text as Markdown; what stands between backticks is code, in which only a bar is special."""
    parts = text.split("`")
    return "`".join(part.replace("|", "\\|") if i % 2 else part.translate(SPECIAL) for i, part in enumerate(parts))
