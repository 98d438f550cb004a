"""What a run, a comparison and a suite write as JSON, key by key: the types of their plain data.

Files of older runs may lack a key that a newer one has: what is read back is checked where it is used.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.provenance import Base
from hf_glu.instruments.while_training import Watched


class TrainingSummary(TypedDict):
    """What training took: `TrainingResult` as plain data. ``loss`` is the mean over the last tenth of the steps."""

    steps: int
    seconds: float
    loss: float
    tokens_per_second: float
    stopped_early: bool
    tokens: NotRequired[int]


class ParameterCounts(TypedDict):
    """Numbers of parameters: of all, of those trained, of those that a token uses, of all before the conversion."""

    total: int
    trainable: int
    active: int
    before: int


class Record(TypedDict):
    """What a run's results depend on: its options, and the hashes of its data's and its model's files, and versions."""

    options: JsonObject
    data: dict[str, list[str | None]]
    model: dict[str, str]
    versions: dict[str, str]


class RunEntry(TypedDict):
    """``run.json``: what a run is, written before its first step."""

    model: str
    task: str
    activation: str | None
    options: JsonObject
    versions: dict[str, str]
    hardware: str
    made_of: Record
    text: NotRequired[bool]
    parameters: NotRequired[ParameterCounts]


class HealingFacts(TypedDict):
    """What a model was healed by, and what is known of its parts.

    Keys:
        teacher: the teacher's name.
        objective: what both predict.
        matched: what was compared beside logits: ffn, hidden.
        metrics: the teacher's own on the validation text; empty where it has no logits.
        parameters: the teacher's.
        sites: relative errors of each FFN's output, before and after.
    """

    teacher: str
    objective: str
    matched: list[str]
    metrics: dict[str, float]
    parameters: int
    sites: dict[str, list[float]]


class Results(TypedDict):
    """``results.json``: what came of a run.

    Keys:
        main: the metrics whose mean is ``score``.
        before: the metrics of the converted model before training; None: it wasn't converted.
        examples: rows of each split.
        conversion: the report of `hf_glu.convert`; None: the model wasn't converted.
        activations, adaptive, experts: statistics on some validation data, a row for each layer.
        reloaded_equal: whether the saved model, loaded in a new process, predicts bitwise the same; None: not saved.
        healing: what it was healed by; where it wasn't, there is no such key.
    """

    task: str
    main: list[str]
    score: float
    metrics: dict[str, float]
    before: dict[str, float] | None
    examples: dict[str, int]
    parameters: int
    active_parameters: int
    trainable: int
    training: TrainingSummary
    conversion: JsonObject | None
    activations: list[JsonObject]
    adaptive: list[JsonObject]
    experts: list[JsonObject]
    reloaded_equal: bool | None
    healing: NotRequired[HealingFacts]


class StepLine(TypedDict):
    """A line of ``log.jsonl`` on training, over the steps since the last one.

    Keys:
        epoch: passes over the data so far, a part of one, too.
        tokens: trained on so far.
        loss: the mean.
        lr: the learning rate.
        watched: what experts and gates did, where the training is watched.
        alerts: the events that began; where none did, there is no such key.
    """

    step: int
    epoch: float
    tokens: int
    loss: float
    lr: float
    tokens_per_second: float
    watched: NotRequired[Watched]
    alerts: NotRequired[list[str]]


class ResultRow(TypedDict):
    """A row of the table that ends a fine-tuning job: the dense model, the converted one, the trained one."""

    model: str
    metrics: dict[str, float]
    parameters: int
    active_parameters: int
    max_abs_difference: float | None
    seconds: float | None


class JobReport(TypedDict):
    """``hf_glu_report.json`` of a fine-tuning job: the job, its table, its results and those of its dense baseline."""

    model: str
    base: Base | None
    task: str
    activation: str | None
    options: JsonObject
    rows: list[ResultRow]
    dense: Results | None
    outcome: Results
    seconds: float


class ComparisonRow(TypedDict):
    """A variant of a comparison; ``difference`` and what follows of it are to the baseline, which has none.

    Keys:
        scores: of each seed; losses of language models.
        interval, difference_interval: of 95 %, from the seeds, by Student's t.
        p_value, p_holm: of the paired t-test; corrected for the number of variants.
        lr, rates: the learning rate that was chosen, and what each one gave on the seed that chose it.
        width, ffn_parameters, flops_per_token: units of an FFN, parameters of all FFNs, FLOPs of them for a token.
        tokens_to_target: tokens of each seed until the loss is the table's ``target_loss``; None: it never is.
        tokens_mean, tokens_interval: of these, where all seeds get there.
    """

    name: str
    scores: list[float]
    mean: float
    std: float | None
    interval: list[float] | None
    difference: float | None
    difference_interval: list[float] | None
    p_value: float | None
    p_holm: float | None
    parameters: int
    active_parameters: int
    seconds: float
    lr: NotRequired[float]
    rates: NotRequired[dict[str, float | None]]
    width: NotRequired[int | None]
    ffn_parameters: NotRequired[int]
    flops_per_token: NotRequired[int]
    tokens_to_target: NotRequired[list[float | None]]
    tokens_mean: NotRequired[float | None]
    tokens_interval: NotRequired[list[float] | None]


class ComparisonTable(TypedDict):
    """``compare.json``: variants of a model on one task or text, each with the same seeds.

    Keys:
        lr_seed: the seed on which learning rates were chosen.
        objective: of language models.
        data: of language models: the names of the text.
        target_loss: the loss that ``tokens_to_target`` are told for.
    """

    task: str
    model: str
    metric: str
    seeds: list[int]
    baseline: str
    variants: list[ComparisonRow]
    lr_seed: NotRequired[int]
    objective: NotRequired[str]
    data: NotRequired[list[str]]
    target_loss: NotRequired[float]


class SuiteTable(TypedDict):
    """``suite.json``: the results of a suite's tasks; ``score`` is their mean, ``partial`` where some are missing."""

    suite: str
    model: str
    activation: str | None
    tasks: dict[str, Results]
    score: float | None
    partial: bool
    missing: list[str]
    predictions: NotRequired[str]
    missing_predictions: NotRequired[list[str]]
