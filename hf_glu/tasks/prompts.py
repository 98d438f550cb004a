"""From a task's row to the prompt of a text-to-text model (T5, https://arxiv.org/abs/1910.10683, appendix D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hf_glu.tasks.inputs import Row, clean, mark, mark_words, passage, unique_entities

Prompt: TypeAlias = Callable[[Row], str]


def fields(task: str, **columns: str) -> Prompt:
    """Return a function that writes the prompt ``task name1: value1 name2: value2`` of a row's columns."""

    def write(row: Row) -> str:
        return " ".join([task, *(f"{name}: {clean(str(row[column]))}" for name, column in columns.items())])

    return write


def as_it_is(column: str) -> Prompt:
    """Return a function that gives the text in a row's column, unchanged."""

    def write(row: Row) -> str:
        return str(row[column])

    return write


def marked_word(row: Row) -> str:
    """Return WiC's prompt: both sentences with the word marked."""
    first = mark(str(row["sentence1"]), row["start1"], row["end1"], "*")
    second = mark(str(row["sentence2"]), row["start2"], row["end2"], "*")
    return f"wic sentence1: {first} sentence2: {second} word: {row['word']}"


def marked_spans(row: Row) -> str:
    """Return WSC's prompt: the text with noun and pronoun marked; the answer is True or False."""
    spans = [(row["span1_index"], str(row["span1_text"]), "*"), (row["span2_index"], str(row["span2_text"]), "#")]
    return f"wsc text: {mark_words(str(row['text']), spans)}"


def record(row: Row) -> str:
    """Return ReCoRD's prompt: query, entities and passage; the answer is the entity."""
    names = ", ".join(unique_entities(row))
    return f"record query: {row['query']} entities: {names} passage: {passage(str(row['passage']))}"


def rounded(value: float, step: float = 0.2) -> str:
    """Return a score as the text that a text-to-text model learns to write: ``3.8`` for 3.75."""
    return f"{round(value / step) * step:.1f}"
