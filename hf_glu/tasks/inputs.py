"""From a task's row to the texts, or pairs of texts, that a classifier reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Text: TypeAlias = tuple[str, ...]  # one text, or a pair
Inputs: TypeAlias = Callable[[Row], list[Text]]

_TAG = re.compile(r"<[^<>]{1,10}>")
_SPACES = re.compile(r"\s+")
QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def columns(*names: str) -> Inputs:
    """Return a function that gives a row's texts in these columns, unchanged."""

    def read(row: Row) -> list[Text]:
        return [tuple(str(row[name]) for name in names)]

    return read


def words(column: str) -> Inputs:
    """Return a function that gives the list of words in a row's column as one text."""

    def read(row: Row) -> list[Text]:
        return [(" ".join(str(word) for word in row[column]),)]

    return read


def candidates(first: str, *others: str) -> Inputs:
    """Return a function that gives a row's text in ``first`` beside that in each other column, as candidates."""

    def read(row: Row) -> list[Text]:
        return [(str(row[first]), str(row[other])) for other in others]

    return read


def clean(text: str) -> str:
    """Return ``text`` without HTML tags (MultiRC's ``<br>`` and ``<b>``) and without runs of spaces."""
    return _SPACES.sub(" ", _TAG.sub(" ", text)).strip()


def passage(text: str) -> str:
    """Return a ReCoRD passage with full stops in the place of its ``@highlight`` marks."""
    return clean(text.replace("\n@highlight\n", ". ").replace("@highlight", " "))


def choices(row: Row) -> list[Text]:
    """Return COPA's two inputs: the premise with its question, and each alternative."""
    premise = f"{row['premise']} {QUESTIONS.get(str(row['question']), row['question'])}"
    return [(premise, str(row["choice1"])), (premise, str(row["choice2"]))]


def answers(row: Row) -> list[Text]:
    """Return MultiRC's input: the paragraph, and the question with one answer."""
    return [(clean(str(row["paragraph"])), f"{row['question']} {row['answer']}")]


def entities(row: Row) -> list[Text]:
    """Return ReCoRD's inputs: the passage, and the query with each entity in the placeholder's place."""
    text = passage(str(row["passage"]))
    return [(text, str(row["query"]).replace("@placeholder", entity)) for entity in unique_entities(row)]


def unique_entities(row: Row) -> list[str]:
    """Return the entities of a ReCoRD passage, each once."""
    return list(dict.fromkeys(row["entities"]))


def mark(text: str, begin: int, end: int, sign: str) -> str:
    """Return ``text`` with ``sign`` around the characters ``begin`` to ``end``."""
    return f"{text[:begin]}{sign} {text[begin:end]} {sign}{text[end:]}"


def marked_word(row: Row) -> list[Text]:
    """Return WiC's input: the two sentences with the word marked, and the word before the first."""
    first = mark(str(row["sentence1"]), row["start1"], row["end1"], "*")
    second = mark(str(row["sentence2"]), row["start2"], row["end2"], "*")
    return [(f"{row['word']}: {first}", second)]


def mark_words(text: str, spans: list[tuple[int, str, str]]) -> str:
    """Return ``text`` with each span (index of its first word, its text, a sign) marked."""
    words = text.split(" ")
    for index, span, sign in sorted(spans, reverse=True):  # from behind: the indices before stay right
        length = len(span.split(" "))
        words[index : index + length] = [sign, *words[index : index + length], sign]
    return " ".join(words)


def marked_spans(row: Row) -> list[Text]:
    """Return WSC's input: the text with the noun between ``*`` and the pronoun between ``#``."""
    spans = [(row["span1_index"], str(row["span1_text"]), "*"), (row["span2_index"], str(row["span2_text"]), "#")]
    return [(mark_words(str(row["text"]), spans), f"{row['span2_text']} = {row['span1_text']}")]
