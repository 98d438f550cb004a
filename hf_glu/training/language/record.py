"""Recording what a run of language modelling depends on."""

from __future__ import annotations

from pathlib import Path

from hf_glu.checkpoint.gguf import gguf_file, is_gguf
from hf_glu.checkpoint.hub import resolve
from hf_glu.tasks.files import hash_file
from hf_glu.training.data.sources import FileRecord
from hf_glu.training.language.models import config_file
from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.reading import find_files, is_local
from hf_glu.training.options import TrainingOptions
from hf_glu.training.record import fingerprint, option_record, versions
from hf_glu.training.results import Record


def language_record(job: LanguageOptions, options: TrainingOptions) -> Record:
    """Record what a run depends on: options, hashes of data and model, and versions.

    Raises:
        CheckpointError, DataError: model or data aren't there.
    """
    return {
        "options": option_record(job, options, job.objective),
        "data": data_record(job),
        "model": model_record(job),
        "versions": versions(),
    }


def data_record(job: LanguageOptions) -> FileRecord:
    """Return hashes of the files with text, or the name of a data set of the Hub."""
    sources = {"train": job.data or [], "validation": [job.validation] if job.validation else []}
    found: FileRecord = {}
    for split, names in sources.items():
        if names:
            local = is_local(names)
            found[split] = [hash_file(path) for path in find_files(names)] if local else [str(name) for name in names]
    return found


def model_record(job: LanguageOptions) -> dict[str, str]:
    """Return hashes of the files of model and teacher; of a new model, of its config and tokenizer."""
    taught = {f"teacher/{name}": found for name, found in _files(job.teacher).items()} if job.teacher else {}
    if job.model:
        return _files(job.model) | taught
    found = fingerprint(resolve(job.tokenizer)) if job.tokenizer else {}
    path: Path | None = config_file(str(job.config))
    return {**found, "config": hash_file(path) if path else str(job.config)} | taught


def _files(source: str) -> dict[str, str]:
    return {"model": hash_file(gguf_file(source))} if is_gguf(source) else fingerprint(resolve(source))
