"""The time to start: imports and commands, each in a process of its own, and the conversion of a BERT.

Without ``--model`` the BERT has MiniLM's shape and random weights.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory

import hf_glu
from hf_glu.bench.running import BenchOptions, Cell, Claim, Contender
from hf_glu.bench.whole import make_bert
from hf_glu.checkpoint.loading import load_model

PYTHON, TORCH, CLASS, LOAD = "python", "import torch", "import BertModel", "load"
CODE = {
    PYTHON: "pass",
    TORCH: "import torch",
    "import hf_glu": "import hf_glu",
    CLASS: "from transformers import BertModel",
    "import hf_glu and BertModel": "import hf_glu; from transformers import BertModel",
}
MAIN = "from hf_glu.cli import main; main()"  # what the script says
COMMANDS = {
    "hf-glu --help": ("--help",),
    "hf-glu bench --help": ("bench", "--help"),
    "hf-glu activations": ("activations",),
}
STARTED = {
    "import hf_glu": Claim(peers=(TORCH,), target=0.25),
    "import hf_glu and BertModel": Claim(peers=(CLASS,), target=1.1),
    "hf-glu --help": Claim(peers=(PYTHON,), limit=0.5),
    "hf-glu bench --help": Claim(peers=(PYTHON,), limit=0.5),
    "hf-glu activations": Claim(peers=(CLASS,)),
}
CONVERTED = {"convert to geglu": Claim(peers=(LOAD,), limit=2.0)}


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield the cell of processes, then that of the conversion."""
    yield Cell(shape={"of": "processes"}, build=processes, claims=STARTED)
    name = "model given" if options.model else "BERT, MiniLM's shape"
    with TemporaryDirectory() as scratch:
        if not options.model:
            make_bert("gelu").save_pretrained(scratch)
        source = options.model or scratch
        yield Cell(shape={"of": name, "pass": "conversion"}, build=partial(conversion, source), claims=CONVERTED)


def processes() -> dict[str, Contender]:
    """Return contenders that run a line of code, or a command, in a process of its own."""
    lines: dict[str, tuple[str, ...]] = {name: ("-c", code) for name, code in CODE.items()}
    lines |= {name: ("-c", MAIN, *words) for name, words in COMMANDS.items()}
    return {name: Contender(call=partial(_run, line)) for name, line in lines.items()}


def _run(arguments: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def conversion(source: str) -> dict[str, Contender]:
    """Return contenders that load a model, and that convert a copy of it with the usual checks."""
    model = load_model(source)
    return {
        LOAD: Contender(call=partial(load_model, source)),
        "convert to geglu": Contender(call=lambda: hf_glu.convert(copy.deepcopy(model), "geglu")),
    }
