"""Recording what a run's results depend on, so that another run's are never taken for its own."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from hf_glu.checkpoint.files import CARD_FILE, LOG_FILE, PAGE_FILE, RECORD_FILE, REPORT_FILE, RESULTS_FILE, RUN_FILE
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import JsonObject, to_json
from hf_glu.errors import CheckpointError
from hf_glu.tasks.files import hash_file
from hf_glu.training.data.sources import data_record, task_name
from hf_glu.training.options import JobOptions, ModelOptions, TrainingOptions
from hf_glu.training.results import Record

MADE_OF = "made_of"
PACKAGES = ("hf_glu", "transformers", "tokenizers", "torch", "accelerate", "datasets", "peft")
# where things are (their content counts), and what is told on the way
FREE = frozenset(
    {
        *("model", "teacher", "config", "tokenizer", "dataset", "data", "validation", "output"),
        *("tracker", "checkpoint_every", "log_every", "watch", "workers"),
    }
)
# what a resumed run may have otherwise, too, beside versions
FREE_IF_RESUMED = FREE | {"eval_batch_size", "mixed_precision", "predict"}
# beside weights, config and tokenizer: what is said of a checkpoint, and weights that are never loaded here
_NOT_READ = {CARD_FILE, REPORT_FILE, RECORD_FILE, RUN_FILE, RESULTS_FILE, LOG_FILE, PAGE_FILE, "LICENSE"}
_OTHER_WEIGHTS = (".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite")


def make_record(job: JobOptions, options: TrainingOptions) -> Record:
    """Record what a run depends on: options, hashes of data and model, and versions.

    Raises:
        CheckpointError, DataError, OptionError, UnknownNameError: model or data aren't there.
    """
    return {
        "options": option_record(job, options, task_name(job)),
        "data": data_record(job),
        "model": fingerprint(resolve(job.model)),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a run's results depend on."""
    return {name: version(name) for name in PACKAGES}


def option_record(job: ModelOptions, options: TrainingOptions, task: str) -> JsonObject:
    """Return the options that a run's results depend on."""
    every = {**job.to_dict(), **options.to_dict(), "activation": job.conversion, "task": task}
    plain: JsonObject = json.loads(to_json({key: value for key, value in every.items() if key not in FREE}))
    return plain  # as it will be read again


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash the files of a checkpoint that a model or tokenizer may be loaded from: name -> SHA-256."""
    return {
        path.name: hash_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_READ
        and path.suffix not in _OTHER_WEIGHTS
    }


def difference(before: object, now: Record, free: frozenset[str] = FREE, *, versions: bool = True) -> str | None:
    """Return the first difference between two records that counts, in words; None if there is none.

    Args:
        before, now: the records.
        free: options that don't count.
        versions: whether versions count.
    """
    if not isinstance(before, dict):
        return f"a {RUN_FILE} that doesn't say what it was made of"
    for part in ("options", "data", "model", "versions"):
        values: JsonObject = now[part]
        known = before.get(part)
        known = known if isinstance(known, dict) else {}
        for key in sorted({*known, *values} - (free if part == "options" else frozenset())):
            old, new = known.get(key), values.get(key)
            if old == new or (part == "versions" and not versions):
                continue
            if part in ("model", "data"):
                change = "is new" if old is None else "is gone" if new is None else "has changed"
                return f"another {part}: {key} {change}"
            return f"{key}={old!r}, not {new!r}"
    return None


def check_same(
    folder: Path, now: Record, free: frozenset[str] = FREE, *, versions: bool = True, file: str = RUN_FILE
) -> JsonObject:
    """Check that the run in ``folder`` depends on the same as ``now``; return its ``run.json``.

    Args:
        folder: the run's.
        now: what it would be made of now.
        free, versions: what may be different, as of `difference`.
        file: where its record is.

    Raises:
        CheckpointError: it is made of something else, or doesn't say of what.
    """
    try:
        known: object = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    entry: JsonObject = known if isinstance(known, dict) else {}
    if found := difference(entry.get(MADE_OF), now, free, versions=versions):
        raise CheckpointError(f"{folder} has a run with {found}: choose another output, or remove it")
    return entry
