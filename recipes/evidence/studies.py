"""The studies as a table, and their results as plain data."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_glu.checkpoint.files import COMPARISON_FILE
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.cli.quiet import quieten
from hf_glu.errors import OptionError, nearest
from hf_glu.tasks.files import hash_file
from hf_glu.training.record import versions
from recipes.evidence.fetch import SOURCES
from recipes.evidence.language import STUDIES as OF_TEXT
from recipes.evidence.language import run_continued, run_language
from recipes.evidence.presets import PRESETS, Setting
from recipes.evidence.recall import STUDIES as OF_RECALL
from recipes.evidence.recall import run_recall
from recipes.evidence.tasks import run_conversions, run_modulations

Tell = Callable[[str], object]
Run = Callable[[Setting], Any]
PROTOCOL = Path(__file__).with_name("PROTOCOL.md")
ONE = "all"  # the size of a study whose model is always the same


# study -> what runs it; whether there is a run for each size of language models
STUDIES: dict[str, tuple[Run, bool]] = {
    **{name: (partial(run_language, name), True) for name in OF_TEXT},
    "conversion-text": (run_continued, True),
    **{name: (partial(run_recall, name), False) for name in OF_RECALL},
    "conversion-tasks": (run_conversions, False),
    "modulation-tasks": (run_modulations, False),
}


def run_study(
    study: str, preset: str, size: str | None, data: Path, output: Path, tell: Tell, workers: int = 1
) -> None:
    """Run a study at its sizes, and write its results after each seed.

    Raises:
        HfGluError: bad input, before anything is run; a run that diverges; Ctrl-C.
    """
    work, sized = STUDIES[study]
    chosen = PRESETS[preset]
    sizes = list(chosen.sizes) if sized else [ONE]
    if size is not None and size not in sizes:
        raise OptionError(f"{study} has no size {size!r} in {preset}; {nearest(size, sizes)}")
    if not (data / SOURCES).is_file():
        raise OptionError(f"{data} has no {SOURCES}: python -m recipes.evidence fetch {data} writes it")
    if workers > 1 and chosen.precision != "no":
        raise OptionError(f"{preset} is for one GPU, which {workers} workers would share: give 1")
    torch.set_num_threads(1 if chosen.precision == "no" else torch.get_num_threads())
    with pool_of(workers) as pool:
        for each in [size] if size else sizes:
            folder = output / f"{study}-{each}"

            def told(line: str, folder: Path = folder, each: str = each) -> None:
                tell(line)
                write_results(study, preset, each, data, folder)

            work(Setting(preset=chosen, size=each, data=data, output=folder, tell=told, pool=pool))
            write_results(study, preset, each, data, folder)


@contextmanager
def pool_of(workers: int) -> Iterator[Executor | None]:
    """Yield so many processes of one thread each; None: one is enough."""
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Let a worker compute in one thread, and leave the terminal to the process that it works for."""
    sys.stderr = open(os.devnull, "w")
    quieten()
    torch.set_num_threads(1)


def write_results(study: str, preset: str, size: str, data: Path, folder: Path) -> None:
    """Write what a study at a size has given so far to a JSON file, where there is anything."""
    if not (folder / COMPARISON_FILE).is_file():
        return
    table = read_object(folder / COMPARISON_FILE)
    target = folder.parent / "results" / f"{study}-{size}.json"
    target.parent.mkdir(exist_ok=True)
    if target.is_file() and read_object(target)["table"] == table:
        return
    write_json(target, {
        "study": study, "preset": preset, "size": size, "planned_seeds": PRESETS[preset].seeds,
        "written": datetime.now(UTC).isoformat(timespec="seconds"), "table": table,
        "protocol": hash_file(PROTOCOL), "data": read_object(data / SOURCES), "versions": versions(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
    })  # fmt: skip
