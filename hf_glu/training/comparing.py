"""Several activations and seeds on one task: mean, spread, and a paired test against the first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from accelerate import PartialState

from hf_glu.activation import registry
from hf_glu.checkpoint import REPORT_FILE, load_model, load_skeleton, load_tokenizer, staged_folder
from hf_glu.conversion import convert
from hf_glu.conversion.planning import plan
from hf_glu.errors import CheckpointError, OptionError, shown
from hf_glu.jsonio import read_object, write_json
from hf_glu.training.features import is_text_to_text
from hf_glu.training.job import calibration_texts, read_tasks, run_job
from hf_glu.training.options import JobOptions, TrainingOptions
from hf_glu.training.saving import RESULTS, RUN

COMPARISON, CONVERTED = "compare.json", "converted"
DENSE, RANDOM = "dense", "random-"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a comparison.

    Attributes:
        name: as given, ``dense``, ``geglu``, ``swiglu:iso``, ``random-geglu``.
        to: gated activation; None: the dense model.
        width: hidden units.
        random: whether the converted FFNs are initialised at random.
    """

    name: str
    to: str | None
    width: str
    random: bool


def read_variant(text: str) -> Variant:
    """Read ``dense``, ``NAME``, ``NAME:WIDTH`` or ``random-NAME[:WIDTH]``.

    Raises:
        OptionError, UnknownNameError: it can't be read, or names no activation.
    """
    name = text.strip()
    if name == DENSE:
        return Variant(name=name, to=None, width="keep", random=False)
    to, _, width = name.removeprefix(RANDOM).partition(":")
    if not to:
        raise OptionError(f"a variant is such as dense, geglu, swiglu:iso or random-geglu, got {text!r}")
    registry[to]
    return Variant(name=name, to=to, width=width or "keep", random=name.startswith(RANDOM))


def compare(variants: list[str], seeds: list[int], job: JobOptions, options: TrainingOptions) -> dict[str, Any]:
    """Fine-tune each variant with each seed; return ``compare.json``'s content.

    What is finished in ``job.output`` is not run again. The first variant is the baseline.

    Raises:
        HfGluError: as `run_job`.
    """
    chosen = [read_variant(text) for text in variants]
    folder = job.folder
    if not chosen or not seeds or folder is None:
        raise OptionError("a comparison needs variants, seeds and an output folder")
    _check_folder(folder, job)
    found: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    for seed in seeds:  # seed by seed: what is interrupted has compared all variants so far
        for variant in chosen:
            found[variant.name].append(_run(variant, seed, job, options, folder))
        if PartialState().is_main_process:
            write_json(folder / COMPARISON, _table(found, seeds, job))
    return _table(found, seeds, job)


def _check_folder(folder: Path, job: JobOptions) -> None:
    if (folder / COMPARISON).is_file():
        known = read_object(folder / COMPARISON)
        for key, now in (("model", job.title), ("task", job.task)):
            if known.get(key) != now:
                raise CheckpointError(f"{folder} has a comparison with {key}={shown(known.get(key))}, not {now!r}")


def _run(variant: Variant, seed: int, job: JobOptions, options: TrainingOptions, folder: Path) -> dict[str, Any]:
    place = folder / f"{variant.name.replace(':', '-')}-seed{seed}"
    if (place / RESULTS).is_file():
        return read_object(place / RESULTS)
    mine = replace(job, output=str(place), to=variant.to, width=variant.width, random=variant.random)
    with PartialState().main_process_first():
        base = _fitted_base(variant, job, folder)
    if base:
        mine = replace(mine, model=str(base), base_model=job.title, to=None, width="keep")
    return run_job(mine, replace(options, seed=seed), resume=(place / RUN).is_file())


def _fitted_base(variant: Variant, job: JobOptions, folder: Path) -> Path | None:
    """Return the checkpoint of a variant whose conversion is fitted: once for all seeds, for it takes minutes."""
    if variant.to is None or variant.random:
        return None
    target = folder / CONVERTED / variant.name.replace(":", "-")
    if target.is_dir():
        return target
    mine = replace(job, to=variant.to, width=variant.width)
    skeleton = load_skeleton(job.model)
    choice: dict[str, Any] = {"width": mine.units, "layers": job.layers, "exclude": job.exclude}
    if not plan(skeleton, variant.to, fitted=True, **choice).needs_calibration:
        return None
    texts = calibration_texts(job, read_tasks(job)[0], text=is_text_to_text(skeleton.config, job.form))
    model, tokenizer = load_model(job.model), load_tokenizer(job.model)
    with staged_folder(target) as stage:
        report = convert(model, variant.to, calibration=texts, tokenizer=tokenizer, **choice)
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        write_json(stage / REPORT_FILE, report.to_dict())
    return target


def _table(found: dict[str, list[dict[str, Any]]], seeds: list[int], job: JobOptions) -> dict[str, Any]:
    baseline = next(iter(found))
    reference = [results["score"] for results in found[baseline]]
    rows = []
    for name, results in found.items():
        scores = [each["score"] for each in results]
        rows.append({
            "name": name, "scores": scores, "mean": fmean(scores), "std": stdev(scores) if len(scores) > 1 else None,
            "difference": None if name == baseline else fmean(scores) - fmean(reference),
            "p_value": None if name == baseline else paired_p(scores, reference),
            **{key: results[0][key] for key in ("parameters", "active_parameters")},
            "seconds": fmean(each["training"]["seconds"] for each in results),
        })  # fmt: skip
    main = next(iter(found.values()))[0]["main"]
    return {
        "task": job.task, "model": job.title, "metric": " and ".join(main), "seeds": seeds[: len(reference)],
        "baseline": baseline, "variants": rows,
    }  # fmt: skip


def paired_p(scores: list[float], reference: list[float]) -> float | None:
    """Return the two-sided p-value of a t-test on the seeds' differences; None where it isn't defined."""
    from scipy.stats import ttest_rel

    differences = np.subtract(scores, reference)
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return None
    return float(ttest_rel(scores, reference).pvalue)
