"""Running ``hf-glu``: its commands, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from hf_glu.checkpoint.stopping import end_at_once
from hf_glu.cli.exits import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from hf_glu.cli.quiet import be_quiet
from hf_glu.config.extras import of_import
from hf_glu.errors import HfGluError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``hf-glu``: bad input is one line on standard error and exit code 2, never a traceback."""
    end_at_once()  # before anything slow is imported
    be_quiet()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    try:
        sys.stdout.flush()
    except OSError:
        _mute()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run ``hf-glu`` and return its exit code."""
    import typer
    from typer.main import get_command

    from hf_glu.cli import (  # noqa: F401  (their commands)
        bench,
        comparing,
        configs,
        exporting,
        inspection,
        language,
        merging,
        playing,
        publishing,
        sparsity,
        steering,
        training,
    )  # fmt: skip
    from hf_glu.cli.commands import app

    # click's own or, in newer versions, typer's copy of it
    click_error = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        result = get_command(app).main(args=list(arguments), prog_name="hf-glu", standalone_mode=False)
        sys.stdout.flush()
        if result == EXIT_INTERRUPTED:  # newer typers make this of a KeyboardInterrupt, and say nothing
            return _fail("interrupted", EXIT_INTERRUPTED)
        return result if isinstance(result, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except HfGluError as error:
        return _fail(str(error), getattr(error, "exit_code", EXIT_BAD_INPUT))
    except ModuleNotFoundError as error:
        if (missing := of_import(error, "this command")) is None:
            raise
        return _fail(str(missing))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail(f"there isn't enough memory: {(str(error).splitlines() or [''])[0]}")
    except BrokenPipeError:
        _mute()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except Exception as error:
        if not isinstance(error, click_error):
            raise
        return _fail(_said(error))


def _said(error: Any) -> str:
    """Return what click says of arguments; of one that is missing, what it is and how the command is written."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    if type(error).__name__ != "MissingParameter" or parameter is None or context is None:
        return str(error.format_message())
    needed = " ".join(_written(each) for each in context.command.params if each.required)
    about = " ".join((getattr(parameter, "help", None) or "").split()).rstrip(".")
    told = f" ({about[:1].lower()}{about[1:]})" if about else ""
    return f"{context.info_name} needs {_written(parameter)}{told}: {context.command_path} {needed}"


def _written(parameter: Any) -> str:
    """Return an argument or option as it is written in a command."""
    word = parameter.metavar or parameter.name.upper()
    return word if parameter.param_type_name == "argument" else f"{parameter.opts[0]} {word}"


def _mute() -> None:
    """Leave nothing to flush at the end to a standard output that nobody reads, or that is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = EXIT_BAD_INPUT) -> int:
    print("hf-glu: " + " ".join(message.split()), file=sys.stderr)
    return code
