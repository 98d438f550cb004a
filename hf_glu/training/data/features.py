"""Tokenizing the rows of a task, making batches of them, and the loss of a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.config.traits import cut_at
from hf_glu.errors import DataError, OptionError, shown
from hf_glu.instruments.causal import next_labels
from hf_glu.tasks.answers import from_texts
from hf_glu.tasks.checking import LABEL
from hf_glu.tasks.inputs import Row, unique_entities
from hf_glu.tasks.prompts import rounded
from hf_glu.tasks.table import TASKS, Task
from hf_glu.training.data.pairs import TARGET, tokenize_pairs, writes
from hf_glu.training.data.tokens import IGNORED, RIGHT, padded, tokenize_words

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Batch: TypeAlias = dict[str, Tensor]
# one input before it is tokenized: the number of its row, its texts and label; and the columns of many
Input: TypeAlias = dict[str, Any]
Columns: TypeAlias = dict[str, list[list[int]]]
NEW_TOKENS = 32  # of a generated answer, at least: enough for ReCoRD's entities


@dataclass(frozen=True, kw_only=True)
class Features:
    """A split of a task, tokenized.

    Attributes:
        task: the task.
        raw: its rows; None where they aren't needed any more.
        data: one model input for each candidate of each row, with ``labels`` where there are any.
        owners: the row of each input, ascending.
        text: whether the labels are texts to generate.
        joined: whether input and text are one sequence, as decoders read them.
        shifts: whether such a model's loss compares logits with the next label; else with that of their own place.
        new_tokens: the most tokens of a text that is generated.
        places: the place in its input of each word's first token, where words have labels.
        side: where inputs are padded.
    """

    task: Task
    raw: Dataset
    data: Dataset
    owners: list[int]
    text: bool
    joined: bool = False
    shifts: bool = True
    new_tokens: int = NEW_TOKENS
    places: list[list[int]] | None = None
    side: str = RIGHT

    @property
    def units(self) -> list[list[int]]:
        """The inputs that are trained together: all candidates of a choice, else each by itself."""
        if self.task.form != "choice" or self.text:
            return [[number] for number in range(len(self.owners))]
        groups: dict[int, list[int]] = {}
        for number, owner in enumerate(self.owners):
            groups.setdefault(owner, []).append(number)
        return list(groups.values())

    @cached_property
    def target_lengths(self) -> list[int]:
        """The number of tokens of each input's target text, or of its words."""
        return [sum(label != IGNORED for label in labels) for labels in self.data["labels"]]


def is_text_to_text(config: PreTrainedConfig, form: str, task: Task) -> bool:
    """Return whether a model is to write its answers to a task as text.

    Raises:
        OptionError: it can't.
    """
    if form == "text" and not config.is_encoder_decoder:
        raise OptionError(f"form=text needs an encoder-decoder such as T5, {config.model_type} is none")
    if task.form in ("multi", "tokens"):
        if form == "text":
            raise OptionError(f"form=text writes one class or score, and {task.name} has more for each row")
        return False
    if task.form == "text":
        if form == "classes" or not writes(config):
            what = "form=classes" if form == "classes" else config.model_type
            raise OptionError(f"{task.name} has texts to write: that is for T5, BART, GPT-2 and such, not for {what}")
        return True
    return form == "text" or (form == "auto" and config.is_encoder_decoder and "t5" in config.model_type)


def check_answers(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OptionError if a tokenizer can't write a task's answers so that they are read back as themselves."""
    if task.form == "regression" and TASKS.get(task.name) is not task:
        raise OptionError(f"a text-to-text model writes STS-B's scores, not those of {task.name}: use form=classes")
    if task.form not in ("classes", "choice"):
        return
    written = [
        tokenizer.decode(tokenizer(text_target=text)["input_ids"], skip_special_tokens=True) for text in task.texts
    ]
    for number, (text, found) in enumerate(zip(task.texts, from_texts(task, written), strict=True)):
        if found != number:
            raise OptionError(
                f"the tokenizer can't write the label {text!r}, only {written[number]!r}: use form=classes"
            )


def check_scores(split: str, features: Features) -> None:
    """Raise DataError if the scores of a validation split can't be correlated with any predictions."""
    if features.task.form == "regression" and len(set(features.raw[LABEL])) < 2:
        where = f"{features.task.name}, split {split}"
        raise DataError(f"{where}: the rows to validate on have one score only, so that no prediction can be scored")


def check_length(
    max_length: int, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_target: int = 0
) -> None:
    """Raise OptionError if the model can't read ``max_length`` tokens, or write ``max_target`` (after those)."""
    limit = cut_at(model_config, tokenizer, sys.maxsize)
    lengths = {f"max_length={max_length}": max_length, f"max_target_length={max_target}": max_target}
    if max_target and not model_config.is_encoder_decoder:
        lengths = {" and ".join(lengths): max_length + max_target}
    for name, length in lengths.items():
        if length > limit:
            raise OptionError(f"{name} is too long for the model, which reads {limit} tokens: give at most that")


def check_room(max_length: int, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> None:
    """Raise OptionError if ``max_length`` is no more than the special tokens around a text, or a ``pair`` of them."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise OptionError(f"max_length={max_length} leaves no room for a text beside {special} special tokens")


def make_features(
    task: Task,
    raw: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    text: bool,
    labeled: bool = True,
    joined: bool = False,
    shifts: bool = True,
    max_target: int = TARGET,
    side: str = RIGHT,
) -> Features:
    """Tokenize the rows of a split.

    Args:
        task: the task.
        raw: its rows.
        tokenizer: the model's.
        max_length: tokens after which the longest text of an input is cut.
        text: for a text-to-text model.
        labeled: whether there are labels to train on or to score.
        joined, shifts: for a decoder that writes texts; see `Features`.
        max_target: tokens after which a text to write is cut.
        side: where inputs are padded; see `padding_side`.

    Raises:
        DataError: a row of which the tokenizer makes nothing.
    """
    if task.form == "text":
        data = tokenize_pairs(task, raw, tokenizer, max_length, max_target, joined=joined)
        owners = list(range(len(data)))
        return Features(
            task=task, raw=raw, data=data, owners=owners, text=True,
            joined=joined, shifts=shifts, new_tokens=max_target, side=side,
        )  # fmt: skip
    if task.form == "tokens":
        data, places = tokenize_words(task, raw, tokenizer, max_length)
        return Features(
            task=task, raw=raw, data=data, owners=list(range(len(data))), text=False, places=places, side=side
        )
    encode = _encode_text if text else _encode_classes
    rows = [row for number, each in enumerate(raw) for row in encode(task, number, each, labeled)]
    from datasets import Dataset

    owners = [int(row.pop("owner")) for row in rows]
    tokenized = Dataset.from_list(rows).map(
        lambda batch: _tokenize(batch, tokenizer, max_length), batched=True, remove_columns=list(rows[0])
    )
    for owner, ids in zip(owners, tokenized["input_ids"], strict=True):
        if not ids:
            given = "".join(task.inputs(raw[owner])[0])
            raise DataError(
                f"{task.name}: the tokenizer makes nothing of row {owner + 1}, {shown(given)}: leave it out"
            )
    new_tokens = _longest_answer(task, tokenizer) if text else NEW_TOKENS
    return Features(task=task, raw=raw, data=tokenized, owners=owners, text=text, new_tokens=new_tokens, side=side)


def _longest_answer(task: Task, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the longest class of a task has, `NEW_TOKENS` at least."""
    classes = task.texts if task.form in ("classes", "choice") else ()
    return max([NEW_TOKENS, *(len(tokenizer(text_target=text)["input_ids"]) for text in classes)])


def join(parts: list[Features]) -> Features:
    """Concatenate the training data of several tasks."""
    if len(parts) == 1:
        return parts[0]
    from datasets import concatenate_datasets

    columns = ["input_ids", "attention_mask", "labels"]
    data = concatenate_datasets([part.data.select_columns(columns) for part in parts])
    return Features(task=parts[0].task, raw=None, data=data, owners=list(range(len(data))), text=True)


def _encode_classes(task: Task, number: int, row: Row, labeled: bool) -> list[Input]:
    texts = task.inputs(row)
    found: list[Input] = [{"owner": number, **dict(zip(("text", "pair"), text, strict=False))} for text in texts]
    if labeled and task.form == "entity":
        gold = set(row["answers"])
        for each, entity in zip(found, unique_entities(row), strict=True):
            each["label"] = int(entity in gold)
    elif labeled:
        label = row["label"]
        for each in found:
            each["label"] = [float(n in label) for n in range(len(task.labels))] if task.form == "multi" else label
    return found


def _encode_text(task: Task, number: int, row: Row, labeled: bool) -> list[Input]:
    source = task.prompt(row)
    if not labeled:
        return [{"owner": number, "text": source}]
    if task.form == "entity":  # the first gold answer; any of them counts in the metric
        target = str(row["answers"][0]) if len(row["answers"]) else ""
    else:
        target = rounded(row["label"]) if task.form == "regression" else task.texts[row["label"]]
    return [{"owner": number, "text": source, "target": target}]


def _tokenize(batch: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Columns:
    texts = [batch[column] for column in ("text", "pair") if column in batch]
    found = dict(tokenizer(*texts, truncation="longest_first", max_length=max_length))
    if "label" in batch:
        found["labels"] = batch["label"]
    if "target" in batch:
        found["labels"] = tokenizer(text_target=batch["target"])["input_ids"]
    return found


def collate(
    features: Features, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int], device: torch.device | None = None
) -> Batch:
    """Make one padded batch of the inputs ``rows``."""
    columns = dict(features.data[list(rows)])
    labels = columns.pop("labels", None)
    batch = dict(tokenizer.pad(columns, padding_side=features.side, return_tensors="pt"))
    if labels is not None and features.text and not features.joined:
        batch["labels"] = padded(labels, max(map(len, labels)))
    elif labels is not None and (features.joined or features.task.form == "tokens"):
        batch["labels"] = padded(labels, batch["input_ids"].shape[1], features.side)
    elif labels is not None:
        numbers = torch.float if features.task.form in ("regression", "multi") else torch.long
        batch["labels"] = torch.tensor(labels, dtype=numbers)
    return {key: value.to(device) for key, value in batch.items()}


def count_items(features: Features, rows: Sequence[int]) -> int:
    """Count what a batch's loss is the mean over: target tokens, words, choices or inputs."""
    if features.text or features.task.form == "tokens":
        return sum(features.target_lengths[number] for number in rows)
    return len({features.owners[number] for number in rows}) if features.task.form == "choice" else len(rows)


def loss_of(features: Features) -> Callable[[PreTrainedModel, Batch], Tensor]:
    """Return a function of model and batch that gives the mean loss; for a choice, a softmax over its candidates."""
    if features.joined and not features.shifts:
        return lambda model, batch: model(**{**batch, "labels": next_labels(batch["labels"])}).loss
    if features.task.form != "choice" or features.text:
        return lambda model, batch: model(**batch).loss

    def choice_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        candidates = len(features.task.labels)
        labels = batch["labels"][::candidates]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return nn.functional.cross_entropy(logits.view(-1, candidates).float(), labels)

    return choice_loss
