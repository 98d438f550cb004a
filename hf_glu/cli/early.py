"""Checks that take no torch, whose import takes seconds: what is wrong with arguments is said before it is imported.

They ask the functions that the work itself asks later.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_glu.activation import registry
from hf_glu.activation.stock import is_elementwise
from hf_glu.checkpoint.config_file import check_config
from hf_glu.checkpoint.folders import check_destination
from hf_glu.checkpoint.gguf import gguf_file, is_gguf
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.writing import check_folder
from hf_glu.config.experts import check_merge, read_groups
from hf_glu.config.glu import check_by_layer, check_width
from hf_glu.config.layers import check_layers, read_exclude
from hf_glu.errors import OptionError
from hf_glu.training.data.sources import check_data, suite_tasks
from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.reading import find_files, is_local
from hf_glu.training.options import JobOptions, ModelOptions

_UNGATED = "ungated_"  # before the name of a bank's expert


def check_sources(*sources: str, token: str | None = None) -> None:
    """Raise CheckpointError unless each is a folder, a GGUF file or a repository, which is downloaded."""
    for source in sources:
        if is_gguf(source):
            gguf_file(source)
        else:
            check_config(resolve(source, token=token))


def check_destinations(*folders: Path | None) -> None:
    """Raise CheckpointError unless each is one that can be made."""
    for folder in folders:
        if folder is not None:
            check_destination(folder)


def check_conversion(
    target: str | dict[str, str] | None, *, width: int | str = "keep", layers: str | None = None,
    experts: str | None = None, exclude: str | None = None, **_: Any,
) -> None:  # fmt: skip
    """Raise for names that are no activations, and selections that can't be read: what any model would refuse."""
    if isinstance(target, dict):
        check_by_layer(target)
    for name in target.values() if isinstance(target, dict) else [target] if target else ():
        _check_name(name)
    check_width(None if width == "keep" else width)
    check_layers(layers)
    for group in read_groups(experts, "gelu") if experts else ():
        _check_name(group.name.removeprefix(_UNGATED))
    read_exclude(exclude)


def check_merging(models: list[str], router: str, prompts: int, attention: str, top_k: int) -> None:
    """Raise OptionError for options of a merge that no models could make right."""
    if len(models) < 2:
        raise OptionError(f"merging needs two models at least, got {len(models)}")
    check_merge(router=router, attention=attention)
    if (router == "hidden") != bool(prompts):
        needed = "needs --prompts, a file of texts for each model" if router == "hidden" else "reads no --prompts"
        raise OptionError(f"--router {router} {needed}")
    if not 1 <= top_k <= len(models):
        raise OptionError(f"--top-k must be 1 to {len(models)}, the number of experts, got {top_k}")


def _check_name(target: str) -> None:
    """Raise UnknownNameError where a name, or a function of its dictionary, is no activation."""
    name, *functions = re.findall(r"[^\s(),]+", target) or [target]
    if registry.find(name) is None and not is_elementwise(name):
        raise registry.unknown(name, "gated ")
    for function in functions:
        if not is_elementwise(function):
            raise registry.unknown(function, "elementwise ")


def check_jobs(*jobs: JobOptions, suite: str | None = None, only: list[str] | None = None) -> None:
    """Raise for what any of the jobs would refuse: options, names, data and folders that aren't there."""
    for job in jobs:
        if suite:
            suite_tasks(suite, job, only)
        else:
            check_data(job)
        _check_model(job)
    check_sources(*{job.model for job in jobs})


def check_language(job: LanguageOptions) -> None:
    """Raise for what a run of language modelling would refuse: options, names, texts and folders that aren't there."""
    _check_model(job)
    check_sources(*filter(None, (job.model, job.tokenizer)))
    for names in (job.data or [], [job.validation] if job.validation else []):
        if names and is_local(names):
            find_files(names)


def _check_model(job: ModelOptions) -> None:
    job.check()
    if job.to:
        registry[job.to]
    check_conversion(job.to, width=job.units, layers=job.layers, experts=job.experts, exclude=job.exclude)
    if job.folder is not None:
        check_folder(job.folder)
