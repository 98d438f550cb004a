"""The types of the facts that a model card is made of, key by key.

Values come from files that others may have written: a key that isn't needed may be missing.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from hf_glu.checkpoint.jsonio import JsonObject
from hf_glu.checkpoint.provenance import Carried


class BaseFacts(TypedDict, total=False):
    """The base model's name, and whether that is the name of a repository; empty where nothing says it."""

    name: str
    repository: bool


# "from" is no name that a class body could have
ConversionFacts = TypedDict(
    "ConversionFacts",
    {
        "target": NotRequired[str | None],
        "promise": str,
        "changes": NotRequired[bool],
        "parameters_before": int,
        "parameters_after": int,
        "active_parameters_after": NotRequired[int],
        "max_abs_difference": NotRequired[float],
        "fit": NotRequired[dict[str, float]],
        "changed": NotRequired[bool],
        "sites": int,
        "mixers": bool,
        "from": list[str],
        "routes": list[str],
        "notes": list[str],
        "made": NotRequired[list[str]],
    },
)


class DatasetFacts(TypedDict):
    """Where a task's data are on the Hub."""

    repository: str
    config: str | None
    revision: str | None


class RunFacts(TypedDict):
    """A run's task, data sets, options, hardware and versions; ``new``: its model has no base."""

    task: str
    hardware: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    options: JsonObject
    datasets: dict[str, DatasetFacts]
    new: NotRequired[bool]


class ResultFacts(TypedDict):
    """A run's results; ``before`` are the metrics of the converted model before training."""

    main: list[str]
    metrics: dict[str, float]
    before: NotRequired[dict[str, float]]
    examples: dict[str, int]
    reloaded_equal: NotRequired[bool]
    training: JsonObject


class CardHealing(TypedDict):
    """What a model was healed by: metrics before and after, the teacher's own, and the FFNs' relative errors.

    ``in_run``: whether its run was that, and not its conversion.
    """

    teacher: str
    before: dict[str, float]
    after: dict[str, float]
    metrics: dict[str, float]
    sites: dict[str, list[float]]
    training: JsonObject
    in_run: bool


class VariantFacts(TypedDict):
    """A variant of a comparison; intervals are of 95 %."""

    name: str
    mean: float
    std: NotRequired[float]
    interval: NotRequired[list[float]]
    difference: NotRequired[float]
    difference_interval: NotRequired[list[float]]
    p_value: NotRequired[float]
    p_holm: NotRequired[float]
    lr: NotRequired[float]
    tokens_mean: NotRequired[float]
    flops_per_token: NotRequired[int]
    parameters: int
    active_parameters: NotRequired[int]


class ComparisonFacts(TypedDict):
    """A comparison of several seeds; ``mine`` is the variant that the model is a run of.

    Keys:
        objective: of language models, whose losses are compared.
        target_loss: the one that the variants' tokens are told for.
    """

    metric: str
    seeds: list[int]
    baseline: str
    mine: str
    objective: NotRequired[str]
    target_loss: NotRequired[float]
    lr_seed: NotRequired[int]
    variants: list[VariantFacts]


class Facts(TypedDict):
    """All facts of a checkpoint.

    Keys:
        name: of its folder.
        config: the entries of its config that say what it is, those of configs inside of it under their own names.
        banks: whether its family has experts of its own.
        tokenizer, sentence_transformers: whether it has the files of a tokenizer, of that library.
        base: the model that it was made from.
        merged: the models that it was merged from, that one the first; none: it wasn't.
        carried: license and language of that one.
        conversion, healing, run, results, dense, comparison: what the files of these say; None: there are none.
    """

    name: str
    config: JsonObject
    banks: bool
    tokenizer: bool
    sentence_transformers: bool
    base: BaseFacts
    merged: NotRequired[list[BaseFacts]]
    carried: Carried
    conversion: ConversionFacts | None
    healing: NotRequired[CardHealing | None]
    run: RunFacts | None
    results: ResultFacts | None
    dense: ResultFacts | None
    comparison: ComparisonFacts | None
