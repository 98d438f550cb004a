"""The benches by name, and their options; quick to import, for the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from hf_glu.errors import OptionError, UnknownNameError, nearest

# name -> the module, imported when it is run, whose ``cells(options)`` yields its cells
BENCHES = {
    "activations": "hf_glu.bench.activations",
    "carving": "hf_glu.bench.carving",
    "devices": "hf_glu.bench.devices",
    "experts": "hf_glu.bench.experts",
    "ffn": "hf_glu.bench.ffn",
    "scan": "hf_glu.bench.scan",
    "tiles": "hf_glu.bench.tiles",
    "sparsity": "hf_glu.bench.sparsity",
    "start": "hf_glu.bench.start",
    "training": "hf_glu.bench.training",
    "whole": "hf_glu.bench.whole",
}
# what a cell of a bench measures: sizes, dtype and pass, as far as the bench has them
Shape = TypedDict(
    "Shape",
    {
        "of": str,
        "pass": str,
        "batch": int,
        "tokens": int,
        "hidden": int,
        "width": int,
        "experts": int,
        "top_k": int,
        "layers": int,
        "functions": str,
        "dtype": str,
        "memory": str,
        "closed": float,
        "active": float,
    },
    total=False,
)
# preset -> the benches, and options in the place of the defaults; for a GPU that is lent for a while
PRESETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "8min": (
        ("ffn", "experts", "scan", "activations", "whole", "tiles"),
        {"rounds": 3, "warmup": 1, "dtype": "bfloat16", "seconds": 400.0},
    ),
}
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")


def option(default: object, text: str) -> Any:
    """Return a field with the help text of its flag."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The options of all benches; None: the bench's own value.

    Raises:
        OptionError: a number below 1, or an unknown dtype.
    """

    threads: int | None = option(None, "Threads of torch: the physical cores.")
    rounds: int = option(9, "Rounds; each runs every contender once.")
    warmup: int = option(2, "Calls of each contender before the rounds.")
    device: str = option("cpu", "Where: cpu, or the accelerator, such as cuda.")
    dtype: str = option("float32", "Of weights and inputs: " + ", ".join(DTYPE_NAMES) + ".")
    tokens: str | None = option(None, "Numbers of tokens, such as 512,2048: the bench's own.")
    hidden: int | None = option(None, "Hidden size: the bench's own.")
    width: int | None = option(None, "Hidden units of an FFN: the bench's own.")
    model: str | None = option(
        None, "Folder of a model: of devices a converted one, else a dense (start, carving, sparsity)."
    )
    task: str | None = option(None, "Of devices: the task that it answers, such as movie_reviews.")
    dataset: str | None = option(None, "Of devices: the task's dataset, a local folder.")
    text: str | None = option(None, "Of carving, sparsity: text to fit on, the first of --tokens such as 4096,4096.")
    held_out: str | None = option(
        None, "Of carving, sparsity: text to measure on, the second of --tokens; end of --text."
    )
    rows: int | None = option(None, "Of devices: validation examples that count: all.")
    seconds: float | None = option(None, "For all benches: no cell is begun after them, and what fails is left out.")

    def __post_init__(self) -> None:
        for key in ("threads", "rounds", "warmup", "hidden", "width", "rows", "seconds"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise OptionError(f"{key} must be at least 1, got {value!r}")
        if self.dtype not in DTYPE_NAMES:
            raise OptionError(f"unknown dtype {self.dtype!r}; {nearest(self.dtype, DTYPE_NAMES)}")

    def sizes(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return the numbers of tokens.

        Raises:
            OptionError: ``tokens`` isn't a list of numbers from 1 up.
        """
        if self.tokens is None:
            return default
        parts = [part.strip() for part in self.tokens.split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            raise OptionError(f"tokens must be numbers such as 512,2048, got {self.tokens!r}")
        return tuple(map(int, parts))


def preset(name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the benches and the options of a preset.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def check_name(name: str) -> None:
    """Raise UnknownNameError unless there is a bench of this name."""
    if name not in BENCHES:
        raise UnknownNameError(f"unknown bench {name!r}; {nearest(name, BENCHES)}")
