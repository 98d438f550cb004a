"""Comparing activations on one task, each with several seeds: mean, spread, and a paired test against the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from accelerate import PartialState

from hf_glu.checkpoint.files import COMPARISON_FILE, CONVERTED_FOLDER, RECORD_FILE, REPORT_FILE, RUN_FILE
from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import load_model, load_skeleton, load_tokenizer
from hf_glu.checkpoint.writing import check_folder
from hf_glu.config.extras import need
from hf_glu.conversion import convert, plan
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.training.data.features import is_text_to_text
from hf_glu.training.data.models import SiteChoice
from hf_glu.training.data.sources import calibration_texts, read_tasks, task_name
from hf_glu.training.job import run_job
from hf_glu.training.options import OF_CONVERSION, JobOptions, TrainingOptions
from hf_glu.training.record import (
    FREE,
    MADE_OF,
    check_same,
    fingerprint,
    make_record,
    option_record,
)
from hf_glu.training.results import ComparisonRow, ComparisonTable, Record, Results
from hf_glu.training.saving import known_results
from hf_glu.training.variants import Variant, read_variants

# what a fitted conversion depends on, beside model, data and versions
OF_FIT = ("activation", "task", "mixture", "texts", "form", "calibration", *OF_CONVERSION)


def compare(
    variants: list[str], seeds: list[int], job: JobOptions, options: TrainingOptions,
    on_run: Callable[[str], object] | None = None,
) -> ComparisonTable:  # fmt: skip
    """Fine-tune each variant with each seed; return the table that ``compare.json`` holds.

    What is finished in ``job.output`` is not run again; where that is made of another model, data or options, nothing
    is run. The first variant is the baseline.

    ``on_run`` is told of each run as it begins, by a line such as ``run 3 of 9: geglu, seed 1``.

    Raises:
        HfGluError: as `run_job`.
    """
    need(*job.packages, "scipy", what="a comparison")
    folder = job.folder
    if not variants or not seeds or folder is None:
        raise OptionError("a comparison needs variants, seeds and an output folder")
    chosen = read_variants(variants, seeds, job, options)
    check_folder(folder)
    runs = {
        (variant.name, seed): (variant, variant.job(job, folder, seed), replace(options, seed=seed))
        for seed in seeds  # seed by seed: what is interrupted has compared all variants so far
        for variant in chosen
    }
    known = _known_results(folder, job, options, [run[1:] for run in runs.values()])
    found: dict[str, list[Results]] = {variant.name: [] for variant in chosen}
    for number, ((name, seed), (variant, mine, its)) in enumerate(runs.items(), start=1):
        place = str(mine.output)
        if on_run and PartialState().is_main_process:
            there = " is finished already" if place in known else ""
            on_run(f"run {number} of {len(runs)}: {name}, seed {seed}{there}")
        found[name].append(known[place] if place in known else _run(variant, mine, its, folder))
        if PartialState().is_main_process and name == chosen[-1].name:
            write_json(folder / COMPARISON_FILE, _table(found, seeds, job))
    return _table(found, seeds, job)


def _known_results(
    folder: Path, job: JobOptions, options: TrainingOptions, runs: list[tuple[JobOptions, TrainingOptions]]
) -> dict[str, Results]:
    """Read the results of the runs that are finished: folder -> results.

    Raises:
        CheckpointError: a run in ``folder``, one of these or another, is made of something else.
    """
    for mine, _ in runs:
        mine.check()
    made_of = make_record(job.dense(), options)
    found = {}
    for mine, its in runs:
        place = Path(str(mine.output))
        if (known := known_results(place, {**made_of, "options": option_record(mine, its)})) is not None:
            found[str(mine.output)] = known
    for run in sorted(folder.glob(f"*/{RUN_FILE}")):
        check_same(run.parent, made_of, FREE | {"activation", "seed", *OF_CONVERSION})
    return found


def _run(variant: Variant, job: JobOptions, options: TrainingOptions, folder: Path) -> Results:
    made_of = make_record(job, options)
    with PartialState().main_process_first():
        base = _fitted_base(variant, job, made_of, folder)
    mine = replace(job.dense(), model=str(base), base_model=job.title) if base else job
    return run_job(mine, options, resume=(Path(str(job.output)) / RUN_FILE).is_file(), made_of=made_of)


def _fitted_base(variant: Variant, job: JobOptions, made_of: Record, folder: Path) -> Path | None:
    """Convert a variant that needs a fit, once for all seeds, since a fit takes minutes; None: it needs none.

    Raises:
        CheckpointError: the one that is there is made of something else, or was changed.
    """
    if variant.to is None or variant.random:
        return None
    mine: Record = {**made_of, "options": {key: made_of["options"][key] for key in OF_FIT}}
    target = folder / CONVERTED_FOLDER / variant.name.replace(":", "-")
    if target.is_dir():
        if check_same(target, mine, file=RECORD_FILE)["files"] != fingerprint(target):
            raise CheckpointError(f"{target} was changed after it was written: remove it")
        return target
    skeleton = load_skeleton(job.model)
    choice: SiteChoice = {"width": job.units, "layers": job.layers, "exclude": job.exclude}
    if not plan(skeleton, variant.to, fitted=True, **choice).needs_calibration:
        return None
    texts = calibration_texts(job, read_tasks(job)[0], text=is_text_to_text(skeleton.config, job.form))
    model, tokenizer = load_model(job.model), load_tokenizer(job.model)
    with staged_folder(target) as stage:
        report = convert(model, variant.to, calibration=texts, tokenizer=tokenizer, **choice)
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        write_json(stage / REPORT_FILE, report.to_dict())
        write_json(stage / RECORD_FILE, {MADE_OF: mine, "files": fingerprint(stage)})
    return target


def _table(found: dict[str, list[Results]], seeds: list[int], job: JobOptions) -> ComparisonTable:
    baseline = next(iter(found))
    reference = [results["score"] for results in found[baseline]]
    rows: list[ComparisonRow] = []
    for name, results in found.items():
        scores = [each["score"] for each in results]
        rows.append(
            {
                "name": name,
                "scores": scores,
                "mean": fmean(scores),
                "std": stdev(scores) if len(scores) > 1 else None,
                "difference": None if name == baseline else fmean(scores) - fmean(reference),
                "p_value": None if name == baseline else paired_p(scores, reference),
                "parameters": results[0]["parameters"],
                "active_parameters": results[0]["active_parameters"],
                "seconds": fmean(each["training"]["seconds"] for each in results),
            }
        )
    main = next(iter(found.values()))[0]["main"]
    return {
        "task": task_name(job),
        "model": job.title,
        "metric": " and ".join(main),
        "seeds": seeds[: len(reference)],
        "baseline": baseline,
        "variants": rows,
    }


def paired_p(scores: list[float], reference: list[float]) -> float | None:
    """Return the two-sided p-value of a t-test on the seeds' differences; None where it isn't defined."""
    from scipy.stats import ttest_rel

    differences = np.subtract(scores, reference)
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return None
    return float(ttest_rel(scores, reference).pvalue)
