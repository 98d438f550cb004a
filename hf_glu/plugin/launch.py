"""``hf-glu run -- CMD``: programs that never import hf_glu, with the plugin in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_glu.errors import OptionError
from hf_glu.plugin import MODULATIONS

# Python runs `sitecustomize` at start; the one that was there before goes on running.
_SITECUSTOMIZE = """\
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import hf_glu

here = __file__.rsplit("/", 1)[0]
spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if path.rstrip("/") != here])
if spec is not None and spec.loader is not None:
    spec.loader.exec_module(module_from_spec(spec))
"""


def run_with_plugin(command: Sequence[str], modulations: Sequence[str] = ()) -> int:
    """Run ``command`` with ``import hf_glu`` in it and in its Python children; return its exit code.

    Args:
        command: the program and its arguments.
        modulations: ``NAME=FOLDER`` of each that its requests may ask for, see `hf_glu.plugin.generation`.

    Raises:
        OptionError: no command, one that isn't there, or a modulation without a name of its own.
        CheckpointError: there is no such modulation.
    """
    if not command:
        raise OptionError("run needs a command: hf-glu run -- lm_eval --model hf ...")
    program = shutil.which(command[0])
    if program is None:
        raise OptionError(f"there is no command {command[0]!r} on the PATH")
    named = _named(modulations)
    with tempfile.TemporaryDirectory(prefix="hf_glu-") as folder:
        Path(folder, "sitecustomize.py").write_text(_SITECUSTOMIZE, encoding="utf-8")
        package_root = str(Path(__file__).resolve().parent.parent)
        paths = [folder, os.environ.get("PYTHONPATH", ""), package_root]
        environment = {**os.environ, **named, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with subprocess.Popen([program, *command[1:]], env=environment) as child, _handing_on(child):
            return child.wait()


def _named(modulations: Sequence[str]) -> dict[str, str]:
    """Return what the child's environment says of modulations, which are loaded once to see that they can be."""
    if not modulations:
        return {}
    from hf_glu.plugin.modulations import named_folders  # with torch

    return {MODULATIONS: json.dumps(named_folders(modulations))}


@contextmanager
def _handing_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand on what asks to stop: a server that went on running would keep its port."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Ctrl-C reaches the child by itself, and this process waits for what it makes of it
    handlers = {signal.SIGTERM: lambda *_: child.terminate(), signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
