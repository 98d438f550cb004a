"""Loading classifiers: a head that fits the task is kept, with its rows in the task's order; another one is new."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from hf_glu.compat.of_models import FROM_CONFIG, INIT_WEIGHTS, INITIALIZED
from hf_glu.errors import CheckpointError
from hf_glu.tasks.table import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)

# form -> outputs of a classifier; None: one for each label
HEADS = {"classes": None, "regression": 1, "choice": 1, "entity": 2, "multi": None, "tokens": None}
# form -> what the outputs are for; any other: one of the classes
KINDS = {"regression": "regression", "choice": None, "multi": "multi_label_classification", "tokens": None}


class HeadOptions(TypedDict):
    """The fields of a config that say what a classifier's head is for."""

    num_labels: int
    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None


def head_options(task: Task) -> HeadOptions:
    """Return the fields of a config that say what head a task needs."""
    count = HEADS[task.form] or len(task.labels)
    names = dict(enumerate(task.labels)) if count == len(task.labels) else {i: f"LABEL_{i}" for i in range(count)}
    kind = KINDS.get(task.form, "single_label_classification")
    label2id = {name: number for number, name in names.items()}
    return {"num_labels": count, "id2label": names, "label2id": label2id, "problem_type": kind}


def auto_class(task: Task, *, text: bool, joined: bool = False) -> str:
    """Return the name of the Auto class of the models for a task: that write texts (decoders: ``joined``) or don't."""
    if text:
        return "AutoModelForCausalLM" if joined else "AutoModelForSeq2SeqLM"
    return "AutoModelForTokenClassification" if task.form == "tokens" else "AutoModelForSequenceClassification"


def load_classifier(folder: Path, config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """Load a checkpoint as a classifier for ``task``, in float32.

    A head that the checkpoint has is kept where its labels are the task's: its rows are put in the task's order. Where
    they are others, or their number is, the head is a new one, and a warning says so.

    Args:
        folder: the checkpoint.
        config: its config.
        task: says how many outputs there are, and what they mean.

    Raises:
        CheckpointError: weights of other sizes, outside of the head.
    """
    import transformers

    wanted = head_options(task)
    model, info = getattr(transformers, auto_class(task, text=False)).from_pretrained(
        folder, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **wanted
    )
    rows = label_dimensions(model)
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    if others := sorted(mismatched - set(rows)):
        raise CheckpointError(f"{folder} can't be loaded for {task.name}: {others[0]} has another size")
    if not set(rows) - set(info["missing_keys"]):
        return model
    known = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    of_this_kind = not config.architectures or type(model).__name__ in config.architectures
    scores = config.problem_type == KINDS["regression"] != wanted["problem_type"]  # one output may be a choice's, too
    order = None if mismatched or not of_this_kind or scores else row_order(known, wanted["id2label"])
    has, needs = "scores" if scores else ", ".join(known.values()), ", ".join(wanted["id2label"].values())
    if order is not None:
        _permute(model, rows, order)
    elif not mismatched and of_this_kind and not scores and _is_unnamed(known):
        _log.warning("the labels of the checkpoint's head have no names: taken to be %s, in this order", needs)
    else:
        _renew(model, rows)
        _log.warning("the checkpoint's head (%s) isn't for %s (%s): a new one is trained", has, task.name, needs)
    return model


def label_dimensions(model: PreTrainedModel) -> dict[str, int]:
    """Find the parameters with a dimension of labels, and which it is, by building the model with one label more."""
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        other = dict(FROM_CONFIG.of(type(model))(config).named_parameters())
    found = {}
    for name, parameter in model.named_parameters():
        pairs = zip(parameter.shape, other[name].shape, strict=True)
        if (dimension := next((at for at, (here, there) in enumerate(pairs) if here != there), None)) is not None:
            found[name] = dimension
    return found


def row_order(known: Mapping[int, str], wanted: Mapping[int, str]) -> list[int] | None:
    """Return the number in ``known`` of each label in ``wanted``; None where these aren't the same labels.

    Labels are the same by their letters, else without regard to upper and lower case, spaces and dashes.
    """
    for same in (str, _loosely):
        numbers = {same(name): number for number, name in known.items()}
        names = [same(wanted[number]) for number in range(len(wanted))]
        if len(numbers) == len(known) and Counter(names) == Counter(numbers.keys()) and set(known) == set(wanted):
            return [numbers[name] for name in names]
    return None


def _loosely(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _is_unnamed(known: Mapping[int, str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in known.items())


def _permute(model: PreTrainedModel, rows: Mapping[str, int], order: list[int]) -> None:
    for name, parameter in model.named_parameters():
        if name in rows:
            parameter.data = parameter.data.index_select(rows[name], torch.tensor(order))


def _renew(model: PreTrainedModel, rows: Mapping[str, int]) -> None:
    """Initialise the modules of these parameters anew, as the family does."""
    for name in dict.fromkeys(key.rpartition(".")[0] for key in rows):
        module = model.get_submodule(name)
        for part in (module, *module.parameters(recurse=False)):
            INITIALIZED.put(part, False)
        INIT_WEIGHTS.of(model)(module)
