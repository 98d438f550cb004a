"""Finding the columns of a user's own data: which are the text, and which is the label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_glu.errors import DataError
from hf_glu.tasks.checking import LABEL, check_columns
from hf_glu.tasks.choices import OwnOptions

if TYPE_CHECKING:
    from datasets import Dataset

# columns that are the text, pairs first
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text", "text2"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)
# columns that nobody takes for a text; `source` names the kind of text in reports
OTHERS = {"id", "idx", "index", "guid", "uid", "source", "label_text", "label_name", ""}
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names that columns have where nobody names them.

    Attributes:
        texts: columns that are the text, the first that are all there.
        labels: columns that are the label, the first that is there.
        wanted: what to call them, for a message.
        lists: whether both hold lists.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    wanted: str
    lists: bool = False


_CALLED = "call the text `sentence` or `text` (or name its column with --text-column), the class `label` "
_TOKENS = Names(
    texts=(("tokens",), ("words",)),
    labels=(LABEL, "labels", "tags", "ner_tags"),
    wanted="call the lists of words `tokens` (or name their column with --text-column), those of their tags `tags` "
    "(--label-column)",
    lists=True,
)
# problem -> names; None: whatever the labels are
NAMES: dict[str | None, Names] = {
    "tokens": _TOKENS,
    None: Names(texts=TEXTS, labels=(LABEL,), wanted=f"{_CALLED}(--label-column)"),
    "text": Names(
        texts=(("source",),),
        labels=("target",),
        wanted="call the texts `source` and `target` (or name their columns with --source-column and --target-column)",
    ),
}
SEVERAL = Names(texts=TEXTS, labels=(LABEL, "labels"), wanted=f"{_CALLED}(--label-column)")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are read.

    Attributes:
        problem: as of `OwnOptions`; None: what the labels are decides.
        texts: the text's, one or two.
        label: the label's.
    """

    problem: str | None
    texts: tuple[str, ...]
    label: str

    def read(self, where: str, data: Dataset) -> Dataset:
        """Return a split with its label in the column `LABEL`.

        Raises:
            DataError: a column that isn't there, or that has nothing in some row.
        """
        if missing := [name for name in (*self.texts, self.label) if name not in data.column_names]:
            raise DataError(f"{where}: there is no column {missing[0]!r}, but {', '.join(data.column_names)}")
        if self.label != LABEL:
            data = data.remove_columns(LABEL) if LABEL in data.column_names else data
            data = data.rename_column(self.label, LABEL)
        check_columns(where, data, (*self.texts, LABEL))
        return data


def find_columns(source: str, train: Dataset, chosen: OwnOptions) -> Columns:
    """Find the columns of a user's data, as they are chosen, else by their names.

    Raises:
        DataError: they aren't there, or texts of another column would be left out.
    """
    names, given, wanted = train.column_names, chosen.text_columns, chosen.label_column or chosen.target_column
    _check_given(source, names, given, wanted)
    told = chosen.problem or ("text" if chosen.source_column or chosen.target_column else None)
    problems = [told] if told else list(NAMES)
    for problem in problems:
        row = NAMES.get(problem, SEVERAL if problem == "multi" else NAMES[None])
        texts = given or next((each for each in row.texts if set(each) <= set(names)), None)
        label = wanted or next((each for each in row.labels if each in names), None)
        lists = row.lists and not told
        if texts and label and not (lists and not all(isinstance(train[each][0], list) for each in (*texts, label))):
            break
    else:
        row = NAMES.get(told, NAMES[None])
        raise DataError(f"{source} has the columns {', '.join(names)}: {row.wanted}")
    if given is None:
        _check_left_out(source, train, texts, label)
    return Columns(problem=problem, texts=texts, label=label)


def _check_given(source: str, names: Sequence[str], texts: tuple[str, ...] | None, label: str | None) -> None:
    """Raise DataError for a column that is named, and isn't there, or is two things at once."""
    told = ", ".join(names)
    if label is not None and label not in names:
        raise DataError(f"{source} has no column {label!r}, but {told}")
    for name in texts or ():
        if name not in names or name == (label or LABEL):
            raise DataError(f"{source} has no text column {name!r}, but {told}")
        if name == LABEL:
            raise DataError(f"{source} has texts in the column {LABEL!r}, which are no labels: call it something else")
    if texts and len(set(texts)) < len(texts):
        raise DataError(f"the column {texts[0]!r} is both texts of a pair: leave the second out")


def _check_left_out(source: str, train: Dataset, texts: tuple[str, ...], label: str) -> None:
    """Raise DataError if a column has texts that nobody said to leave out."""
    for name in train.column_names:
        if name not in (*texts, label) and name.lower() not in OTHERS and _has_text(train[name]):
            raise DataError(
                f"{source} has texts in {name!r} that would be left out: say which columns are read, such as "
                f"--text-column {texts[0]} or --text-column {texts[0]} --pair-column {name}"
            )


def _has_text(values: Sequence[object]) -> bool:
    return any(isinstance(value, str) and not NUMBER.fullmatch(value) for value in values)
