"""The command line ``hf-glu``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.main import get_command

from hf_glu.errors import HfGluError

# click's own or, in newer versions, typer's copy of it
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``hf-glu``: bad input is one line on standard error and exit code 2, never a traceback."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run ``hf-glu`` and return its exit code."""
    from hf_glu.cli import bench, exporting, inspection, publishing, training  # noqa: F401  (their commands)
    from hf_glu.cli.commands import app

    try:
        result = get_command(app).main(args=list(arguments), prog_name="hf-glu", standalone_mode=False)
        if result == EXIT_INTERRUPTED:  # newer typers make this of a KeyboardInterrupt, and say nothing
            return _fail("interrupted", EXIT_INTERRUPTED)
        return result if isinstance(result, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except _ClickException as error:
        return _fail(error.format_message())
    except HfGluError as error:
        return _fail(str(error), getattr(error, "exit_code", EXIT_BAD_INPUT))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail(f"there isn't enough memory: {(str(error).splitlines() or [''])[0]}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, code: int = EXIT_BAD_INPUT) -> int:
    print("hf-glu: " + " ".join(message.split()), file=sys.stderr)
    return code
