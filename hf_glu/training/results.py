"""What a run, a comparison and a suite write as JSON, key by key: the types of their plain data.

Files of older runs may lack a key that a newer one has: what is read back is checked where it is used.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.provenance import Base


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
    base: Base
    task: str
    activation: str | None
    options: JsonObject
    rows: list[ResultRow]
    dense: Results | None
    outcome: Results
    seconds: float


class ComparisonRow(TypedDict):
    """A variant of a comparison; ``difference`` and ``p_value`` are to the baseline, which has none."""

    name: str
    scores: list[float]
    mean: float
    std: float | None
    difference: float | None
    p_value: float | None
    parameters: int
    active_parameters: int
    seconds: float


class ComparisonTable(TypedDict):
    """``compare.json``: variants of a model on one task, each with the same seeds."""

    task: str
    model: str
    metric: str
    seeds: list[int]
    baseline: str
    variants: list[ComparisonRow]


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
