"""Reading the files beside a checkpoint into the facts that its card is made of.

A conversion leaves ``hf_glu_report.json``, a fine-tuning run ``run.json``, ``results.json`` and perhaps
``hf_glu_report.json``, a comparison ``compare.json`` in the folder above its runs. Where there is none of them, the
config speaks alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from hf_glu.checkpoint.carrying import without_paths
from hf_glu.checkpoint.files import (
    COMPARISON_FILE,
    CONFIG_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    SENTENCE_TRANSFORMERS_FILE,
    TOKENIZER_PATTERNS,
)
from hf_glu.checkpoint.jsonio import JsonObject, read_object
from hf_glu.checkpoint.provenance import CARRIED, Carried, base_of, carried, is_of, naming
from hf_glu.config.router_fields import class_has
from hf_glu.errors import CheckpointError, DataError
from hf_glu.ffn.families import ACTIVATION_FIELDS
from hf_glu.publishing.card.known import (
    BaseFacts,
    CardHealing,
    ComparisonFacts,
    ConversionFacts,
    Facts,
    ResultFacts,
    RunFacts,
)
from hf_glu.publishing.training import is_language
from hf_glu.tasks.table import SUITES, TASKS

_OF_CONFIG = ("architectures", "model_type", "transformers_version", "auto_map", "hf_glu", *ACTIVATION_FIELDS)
_OF_RUN = ("task", "hardware", "versions")
_OF_OPTIONS = (
    "seed",
    "epochs",
    "max_steps",
    "batch_size",
    "lr",
    "weight_decay",
    "max_length",
    "mixed_precision",
    "peft",
    "random",
    "objective",
    "data",
)
_OF_RESULTS = ("main", "metrics", "before", "examples", "reloaded_equal")
_OF_TRAINING = ("steps", "tokens", "seconds")
_OF_HEALING = ("teacher", "before", "after", "metrics", "sites", "training")
_OF_CONVERSION = (
    "target",
    "promise",
    "changes",
    "parameters_before",
    "parameters_after",
    "active_parameters_after",
    "max_abs_difference",
    "fit",
    "changed",
)
_NEEDED = {REPORT_FILE: (), RUN_FILE: ("task", "options"), RESULTS_FILE: ("metrics", "main", "examples", "training")}
_MEASURED = ("promise", "parameters_before", "parameters_after", "sites")
_OF_VARIANT = (
    *("name", "mean", "std", "interval", "difference", "difference_interval", "p_value", "p_holm", "lr"),
    *("tokens_mean", "flops_per_token", "parameters", "active_parameters"),
)
_OF_COMPARISON = ("metric", "seeds", "baseline", "objective", "target_loss", "lr_seed")


def read_facts(folder: Path) -> Facts:
    """Read the facts of the checkpoint in ``folder`` from the files that are there.

    Raises:
        CheckpointError: no ``config.json``, or a file that can't be read.
        DataError: a file that isn't what it should be; the message names it and the line.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: give the folder of a saved model")
    config = read_object(folder / CONFIG_FILE)
    report, run, results = (_optional(folder / name, keys) for name, keys in _NEEDED.items())
    base = report.get("base") or _base_of_run(run)
    found = results.get("conversion") or (report if "promise" in report else base.get("conversion"))
    if found is report and not is_of(report, folder):
        found = {**report, "changed": True, "max_abs_difference": None}
    return {
        "name": folder.absolute().name,
        "config": _config(config),
        "banks": _has_banks(config),
        "tokenizer": any(path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)),
        "sentence_transformers": (folder / SENTENCE_TRANSFORMERS_FILE).is_file(),
        "base": cast(BaseFacts, _chosen(base, ("name", "repository"))),
        "merged": [cast(BaseFacts, _chosen(each, ("name", "repository"))) for each in _merged(report, base)],
        "carried": cast(Carried, {**carried(folder), **_chosen(base, CARRIED)}),
        "conversion": _conversion(_with(found, _MEASURED, f"the conversion's report in {folder}")) if found else None,
        "healing": _healing(results, found or {}),
        "run": _run(run) if run and results else None,
        "results": _results(results) if run and results else None,
        "dense": _results(dense) if (dense := report.get("dense")) else None,
        "comparison": _comparison(folder, run.get("task")),
    }


def _merged(report: JsonObject, base: JsonObject) -> list[JsonObject]:
    """Return the models that a checkpoint, or its base that was nothing but merged, was merged from."""
    found = report.get("merged") or (base.get("conversion") or {}).get("merged") or []
    if not isinstance(found, list) or not all(isinstance(each, dict) and "name" in each for each in found):
        raise DataError("the report's 'merged' isn't a list of models: it isn't what hf_glu writes")
    return found


def _optional(path: Path, keys: Iterable[str] = ()) -> JsonObject:
    """Read the object in a JSON file; an empty one if there is no such file."""
    return _with(read_object(path), keys, str(path)) if path.is_file() else {}


def _with(data: JsonObject, keys: Iterable[str], what: str) -> JsonObject:
    """Check that ``data`` has ``keys``, and return it."""
    if missing := [key for key in keys if key not in data]:
        raise DataError(f"{what} lacks {missing[0]!r}: it isn't what hf_glu writes")
    return data


def _chosen(data: JsonObject, keys: Iterable[str]) -> JsonObject:
    """Return those of ``keys`` that have a value."""
    return {key: data[key] for key in keys if data.get(key) is not None}


def _config(config: JsonObject) -> JsonObject:
    """Return the entries of a config, and of configs inside of it, that a card needs."""
    inner = {key: _config(value) for key, value in config.items() if isinstance(value, dict) and key not in _OF_CONFIG}
    return {**_chosen(config, _OF_CONFIG), **{key: value for key, value in inner.items() if value}}


def _has_banks(config: JsonObject) -> bool:
    """Return whether a config is of a family with experts of its own."""
    inner = (value for key, value in config.items() if isinstance(value, dict) and key not in _OF_CONFIG)
    return any("experts" in key and not _is_ours(config, key) for key in config) or any(map(_has_banks, inner))


def _is_ours(config: JsonObject, key: str) -> bool:
    """Return whether a field is there since the model has experts of ours (see `hf_glu.config.router_fields`)."""
    from transformers import CONFIG_MAPPING

    kind, ours = str(config.get("model_type")), config.get("hf_glu") or {}
    return bool(ours.get("experts")) and kind in CONFIG_MAPPING and not class_has(CONFIG_MAPPING[kind], key)


def _base_of_run(run: JsonObject) -> JsonObject:
    """Return the base of a run from its options, since runs of suites and comparisons don't name it."""
    options = run.get("options", {})
    source, name = options.get("model"), options.get("base_model")
    if not source:
        return {}
    if Path(source).is_dir():
        return dict(base_of(source, name))
    known = dict(naming(source, name))
    # a folder that is gone may have been called like a repository
    return known if name else {**known, "repository": False}


def _conversion(report: JsonObject) -> ConversionFacts:
    """Sum up the sites of a conversion's report."""
    sites = [site for site in report["sites"] if site["route"] != "none"]
    summed = {
        name: list(dict.fromkeys(site[key] for site in sites if site.get(key)))
        for name, key in (("from", "from"), ("routes", "route"), ("notes", "note"), ("made", "change"))
    }
    mixers = bool(sites) and all(site["site"].endswith("mixer") for site in sites)
    found = {**_chosen(report, _OF_CONVERSION), "sites": len(sites), "mixers": mixers, **summed}
    return cast(ConversionFacts, found)


def _healing(results: JsonObject, conversion: JsonObject) -> CardHealing | None:
    """Return what the model was healed by: in its run, else after its conversion."""
    ran = {"before": results.get("before"), "after": results.get("metrics"), "training": results.get("training")}
    healed = conversion.get("healing")
    found = {**results["healing"], **ran} if results.get("healing") else healed
    if not found:
        return None
    known = _with(found, _OF_HEALING, "the report of healing")
    training = _chosen(known["training"], _OF_TRAINING)
    return cast(CardHealing, {**_chosen(known, _OF_HEALING), "training": training, "in_run": found is not healed})


def _run(run: JsonObject) -> RunFacts:
    """Return what a card says of a run, with the data sets of its tasks."""
    options = run["options"]
    names = SUITES.get(options.get("mixture"), (run["task"],))
    tasks = {} if options.get("dataset") else {name: TASKS[name] for name in names if name in TASKS}
    datasets = {
        name: {"repository": task.dataset, "config": task.config, "revision": task.revision}
        for name, task in tasks.items()
        if task.dataset
    }
    if is_language(options):
        datasets = _text_of_hub(run)
    found = {**_chosen(run, _OF_RUN), "options": without_paths(_chosen(options, _OF_OPTIONS)), "datasets": datasets}
    return cast(RunFacts, {**found, "new": True} if is_language(options) and not options.get("model") else found)


def _text_of_hub(run: JsonObject) -> JsonObject:
    """Return the data set of the Hub that a language model was trained on, under its objective; none of local text."""
    named = run["options"].get("data") or []
    if len(named) != 1 or run.get("made_of", {}).get("data", {}).get("train") != named:  # of files there are hashes
        return {}
    repository, _, config = str(named[0]).partition(":")
    return {run["task"]: {"repository": repository, "config": config or None, "revision": None}}


def _results(results: JsonObject) -> ResultFacts:
    """Return what a card says of a run's results."""
    training = _chosen(results.get("training", {}), _OF_TRAINING)
    return cast(ResultFacts, {**_chosen(results, _OF_RESULTS), "training": training})


def _comparison(folder: Path, task: str | None) -> ComparisonFacts | None:
    """Return the comparison of several seeds that a run belongs to, None where there is none."""
    own = folder.absolute()
    index, (variant, _, seed) = _optional(own.parent / COMPARISON_FILE), own.name.rpartition("-seed")
    rows = index.get("variants", [])
    mine = next((row["name"] for row in rows if row["name"].replace(":", "-") == variant), None)
    seeds = [str(number) for number in index.get("seeds", [])]
    if not mine or index.get("task") != task or seed not in seeds or len(seeds) < 2:
        return None
    variants = [_chosen(row, _OF_VARIANT) for row in rows]
    known = {**_chosen(index, _OF_COMPARISON), "mine": mine, "variants": variants}
    return cast(ComparisonFacts, known)
