"""Training language models of several configs from scratch, each with paired seeds: `hf-glu compare`, by configs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hf_glu.checkpoint.files import COMPARISON_FILE, RUN_FILE
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.errors import OptionError
from hf_glu.training.comparing import engine
from hf_glu.training.comparing.kinds import PlannedRun, Search
from hf_glu.training.comparing.language import ComparedLanguageModels, curve_of
from hf_glu.training.comparing.shapes import EQUAL
from hf_glu.training.comparing.statistics import interval, tokens_to
from hf_glu.training.comparing.variants import Variant
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.models import language_skeleton
from hf_glu.training.language.options import LanguageOptions, LanguageTraining
from hf_glu.training.results import ComparisonTable, Results
from recipes.evidence import rows
from recipes.evidence.presets import BASE, BLOCK, TUNED, Preset, Setting, Size
from recipes.evidence.specialising import ExpertTrial

# study -> its rows; whether all of them get the first one's learning rate
STUDIES: dict[str, tuple[Callable[[Size], dict[str, rows.Config]], bool]] = {
    "gates": (rows.gates, False),
    "experts": (rows.experts, True),
    "memory-text": (rows.memories, False),
    "modulation-text": (rows.modulations, False),
}
EQUAL_PARAMETERS = ("gates", "modulation-text")


class ComparedTrials(ComparedLanguageModels):
    """Language models of which results are kept, and no weights."""

    trial = ExpertTrial  # what is found of experts is a result, too

    def carry_out(self, run: PlannedRun) -> Results:
        """Train a variant; that it diverges is a result, too."""
        return super().carry_out(replace(run, tried=True))


class ComparedConfigs(ComparedTrials):
    """New language models, a variant of which is a config; no model is kept.

    Args:
        configs: by the variants' names.
        job: with any of the configs.
        options: how all are trained.
    """

    def __init__(self, configs: Mapping[str, rows.Config], job: LanguageOptions, options: LanguageTraining) -> None:
        super().__init__(job, options)
        self.configs = configs

    def read(self, text: str) -> Variant:
        """Return the variant of a config."""
        return Variant(name=text)

    def meaning(self, variant: Variant) -> object:
        """Return what tells variants apart."""
        return json.dumps(self.configs[variant.name], sort_keys=True)

    def prepare(self, chosen: Sequence[Variant]) -> None:
        """Check nothing more: configs may have whatever shapes they say."""

    def job_of(self, variant: Variant) -> LanguageOptions:
        """Return the job of a config."""
        return replace(self.job, config=json.dumps(self.configs[variant.name], sort_keys=True))

    def planned(self, variant: Variant, seed: int, *, lr: float | None = None, tried: bool = False) -> PlannedRun:
        """Return the run of a variant, made of its config."""
        run = super().planned(variant, seed, lr=lr, tried=tried)
        made_of: Any = {**run.made_of, "options": {**run.made_of["options"], "activation": self.meaning(variant)}}
        job = replace(run.job, output=str(run.folder).replace(" ", "-"))
        return replace(run, job=job, made_of=made_of)

    def complete(
        self, table: ComparisonTable, runs: Mapping[str, Sequence[PlannedRun]], found: Mapping[str, list[Results]]
    ) -> None:
        """Add curves, and after how many tokens variants are at the loss that the baseline ends at."""
        count = len(table["seeds"])
        curves = {name: [curve_of(run, "loss") for run in planned[:count]] for name, planned in runs.items()}
        ended = [score for score in table["variants"][0]["scores"] if math.isfinite(score)]
        table["target_loss"] = target = max(ended, default=-math.inf)
        for row in table["variants"]:
            row["tokens_to_target"] = tokens = [tokens_to(curve, target) for curve in curves[row["name"]]]
            known = [each for each in tokens if each is not None]
            row["tokens_mean"] = fmean(known) if len(known) == count else None
            row["tokens_interval"] = interval(known) if len(known) == count else None
            more: Any = row
            more["curve"] = mean_curve(curves[row["name"]], row["scores"])
            if divided := [each["newsgroups"] for each in found[row["name"]] if "newsgroups" in each]:  # type: ignore[typeddict-item]
                more["newsgroups"] = divided


class Continued(ComparedTrials):
    """A trained model that goes on, converted or not: losses are compared at equal FLOPs, too.

    Training costs 6 FLOPs for each parameter and token, those of tied embeddings as the head's: a variant with more
    parameters is read off its curve where the baseline's last FLOPs are.
    """

    def complete(
        self, table: ComparisonTable, runs: Mapping[str, Sequence[PlannedRun]], found: Mapping[str, list[Results]]
    ) -> None:
        """Add curves, and the losses at the FLOPs that the baseline ends at."""
        super().complete(table, runs, found)
        table.pop("data", None)  # paths of this machine
        first: Any = table["variants"][0]
        for each in table["variants"]:
            row: Any = each
            curves = [curve_of(run, "loss") for run in runs[row["name"]][: len(table["seeds"])]]
            share = min(1.0, first["parameters"] / row["parameters"])
            row["curve"] = mean_curve(curves, row["scores"])
            row["equal_flops"] = [loss_at(curve, share * curve[-1][0]) if math.isfinite(score) else None
                                  for curve, score in zip(curves, row["scores"], strict=True)]  # fmt: skip


def loss_at(curve: Sequence[tuple[float, float]], tokens: float) -> float:
    """Return the loss after so many tokens, by lines between evaluations."""
    return float(np.interp(tokens, *zip(*curve, strict=True)))


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]], scores: Sequence[float]) -> list[list[float]]:
    """Return the mean over the seeds of the losses at each evaluation, without the seeds that diverged."""
    ended = [curve for curve, score in zip(curves, scores, strict=True) if math.isfinite(score)]
    return [[fmean(tokens for tokens, _ in at), fmean(loss for _, loss in at)] for at in zip(*ended, strict=False)]


def options_of(preset: Preset, size: Size, **more: Any) -> LanguageTraining:
    """Return how models of a size are trained."""
    values = {
        "max_steps": size.steps, "batch_size": size.batch, "lr": preset.lrs[0], "schedule": "cosine", "warmup": 0.06,
        "weight_decay": 0.1, "max_length": BLOCK, "precision": preset.precision, "eval_batch_size": 32,
        "evaluate_every": max(1, math.ceil(size.steps / 12)), "log_every": 50,
    }  # fmt: skip
    return LanguageTraining(**{**values, **more})


def job_of(config: rows.Config, size: Size, data: Path, output: Path, **more: Any) -> LanguageOptions:
    """Return the job of a new model on the text."""
    values = {
        "config": json.dumps(config, sort_keys=True), "train_tokenizer": size.vocabulary, "objective": "clm",
        "data": [str(data / "text" / "train.jsonl")], "validation": str(data / "text" / "validation.jsonl"),
        "text_column": "text", "validation_size": 64, "output": str(output),
    }  # fmt: skip
    return LanguageOptions(**{**values, **more})


def check_equal(job: LanguageOptions, configs: Mapping[str, rows.Config]) -> None:
    """Raise OptionError unless all models have as many parameters."""
    counts = {name: language_skeleton(replace(job, config=json.dumps(each))).num_parameters()
              for name, each in configs.items()}  # fmt: skip
    first = next(iter(counts.values()))
    if apart := [name for name, number in counts.items() if abs(number / first - 1) > EQUAL]:
        raise OptionError(f"{apart[0]} hasn't as many parameters as the baseline: {counts[apart[0]]:,}, not {first:,}")


def run_language(study: str, setting: Setting) -> ComparisonTable:
    """Train all rows of a study at a size with all seeds; what is finished isn't run again."""
    make, shared = STUDIES[study]
    preset, output = setting.preset, setting.output
    shape = preset.sizes[setting.size]
    configs = make(shape)
    first = next(iter(configs))
    job = job_of(configs[first], shape, setting.data, output)
    if study in EQUAL_PARAMETERS:
        check_equal(job, configs)
    seeds, search = list(range(preset.seeds)), Search(lrs=shape.lrs or preset.lrs, seed=TUNED)
    compare = partial(engine.compare, seeds=seeds, on_run=setting.tell, pool=setting.pool)
    kind = ComparedConfigs(configs, job, options_of(preset, shape))
    if not shared:
        return compare(kind, list(configs), search=search)
    best = compare(kind, [first], search=search)["variants"][0]
    table = compare(ComparedConfigs(configs, job, replace(kind.options, lr=best["lr"])), list(configs))
    for row in table["variants"]:
        row["lr"] = best["lr"]
    table["variants"][0]["rates"] = best["rates"]
    write_json(output / COMPARISON_FILE, table)
    return table


def run_continued(setting: Setting) -> ComparisonTable:
    """Train a dense model, then go on with it, converted or not, for as many tokens again."""
    preset, output = setting.preset, setting.output
    shape, base = preset.sizes[setting.size], output / "base"
    job = job_of(rows.dense(shape), shape, setting.data, base)
    lrs = sorted(shape.lrs or preset.lrs)
    options = options_of(preset, shape, lr=lrs[len(lrs) // 2], seed=BASE, evaluate_every=0)
    setting.tell(f"the dense model, seed {BASE}")
    LanguageRun(job, options, resume=(base / RUN_FILE).is_file()).run()
    job = replace(job, config=None, train_tokenizer=None, model=str(base), base_model="the dense model",
                  output=str(output / "runs"))  # fmt: skip
    kind = Continued(job, options_of(preset, shape, schedule="constant", weight_decay=0.01))
    search = Search(lrs=tuple(lr / 2 for lr in lrs), seed=TUNED)
    table = engine.compare(kind, ["dense", "geglu", "swiglu:iso"], range(preset.seeds), search=search,
                           on_run=setting.tell, pool=setting.pool)  # fmt: skip
    write_json(output / COMPARISON_FILE, table)
    return table
