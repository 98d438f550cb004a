"""What other libraries say of themselves stays off standard error: it is for what a user of ``hf-glu`` can act on."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import wrapt

# loggers that tell at import which of their own kernels this machine can't use
REMARKS = ("torchao", "torch.onnx", "onnxscript", "torch.utils.flop_counter", "torch.utils._pytree")


def be_quiet() -> None:
    """Show no warnings but hf_glu's own in this process, unless its environment asks for them.

    ``TRANSFORMERS_VERBOSITY`` and ``PYTHONWARNINGS`` (or ``-W``) are obeyed, and nothing is put into the environment,
    which the programs of ``hf-glu run`` inherit.
    """
    wrapt.register_post_import_hook(_quiet_transformers, "transformers.utils.logging")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"hf_glu\.")
        warnings.formatwarning = _one_line
    for name in REMARKS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _quiet_transformers(module: ModuleType) -> None:
    """Make Transformers log errors only from its first import on, and draw progress bars for people only."""
    logger: Any = module
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logger.set_verbosity_error()
    if not sys.stderr.isatty():
        logger.disable_progress_bar()


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return a warning as a command line shows it, without the line of code that it comes from."""
    return f"hf-glu: {' '.join(str(message).split())}\n"


def quieten() -> None:
    """Leave the terminal to our own progress bars and tables."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
