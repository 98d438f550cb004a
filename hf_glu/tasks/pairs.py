"""Reading pairs of texts in a user's own data: one to read, and one to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from reprlib import repr as shortened

from hf_glu.config.extras import need
from hf_glu.errors import DataError, OptionError
from hf_glu.tasks.checking import LABEL, Splits, with_labels
from hf_glu.tasks.choices import TEXT_METRICS
from hf_glu.tasks.columns import Columns
from hf_glu.tasks.labels import LabelTraits, is_missing

DEFAULT = ("chrf", "exact_match")  # of any language
_LATIN = re.compile(r"[a-z0-9]", re.IGNORECASE)


def read_pairs(name: str, splits: Splits, found: Columns, metrics: Sequence[str]) -> tuple[LabelTraits, Splits]:
    """Return the task's fields for texts to write, and the splits with the texts as they are.

    Args:
        name: the data's, for messages.
        splits: with the text to write as their label.
        found: their columns.
        metrics: names of `TEXT_METRICS`, the score first; none: `DEFAULT`.

    Raises:
        DataError: a row without one of its texts, or texts that a metric can't read.
        MissingPackageError: a metric's package isn't installed.
    """
    if len(found.texts) > 1:
        raise OptionError(
            f"a text to write has one source, not {' and '.join(found.texts)}: join the texts in the data"
        )
    metrics = tuple(metrics) or DEFAULT
    for metric in metrics:
        if package := TEXT_METRICS[metric][1]:
            need(package, what=metric)
    written = {}
    for split, data in splits.items():
        for what, column in (("text in " + repr(found.texts[0]), found.texts[0]), ("text to write", LABEL)):
            for number, text in enumerate(data[column], start=1):
                if is_missing(text) or not isinstance(text, (str, int, float)):
                    raise DataError(f"{name}, split {split}, row {number}: there is no {what}, but {shortened(text)}")
        written[split] = [str(text) for text in data[LABEL]]
    if "rouge" in metrics and not any(_LATIN.search(text) for texts in written.values() for text in texts):
        raise DataError(f"{name}: rouge counts words of Latin letters and digits, and there are none: take chrf")
    main, _ = TEXT_METRICS[metrics[0]]
    traits: LabelTraits = {"labels": (), "form": "text", "metric": ",".join(metrics), "main": (main,)}
    return traits, {split: with_labels(data, written[split]) for split, data in splits.items()}
