"""What a user says of data of one's own: which columns are read, as what, and what is predicted."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hf_glu.errors import OptionError, UnknownNameError, nearest, shown

PROBLEMS = ("single", "multi", "regression", "tokens", "text")
# metrics of written texts -> what they are called in results, and the package that computes them
TEXT_METRICS = {
    "exact_match": ("exact_match", None),
    "rouge": ("rougeL", "rouge_score"),
    "chrf": ("chrf", "sacrebleu"),
    "bleu": ("bleu", "sacrebleu"),
}
# options of which one says what the other does
EITHER = (
    ("texts", "text_column"),
    ("texts", "pair_column"),
    *(
        (one, other)
        for one in ("source_column", "target_column")
        for other in ("texts", "text_column", "pair_column", "label_column", "label_separator")
    ),
)


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """How data of one's own are read; None: by the names of the columns, and what is in them.

    Attributes:
        texts: the one or two columns that are the text, ``headline,body``: the older form of the two after it.
        text_column: the column with the text, or with a list of words.
        pair_column: the column with a second text.
        label_column: the column with the label, a list of classes, or a list of tags.
        label_separator: what stands between the classes of one row, where these are one text.
        problem: ``single`` (a class for each row), ``multi`` (several), ``regression`` (a score), ``tokens`` (a tag for
            each word), ``text`` (a text to write).
        source_column, target_column: the columns with a text to read, and with the one to write.
        metrics: of written texts, names of `TEXT_METRICS` with commas between them; the first is the score.

    Raises:
        OptionError, UnknownNameError: options that exclude or need one another, or a metric that there isn't.
    """

    texts: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
    problem: str | None = None
    source_column: str | None = None
    target_column: str | None = None
    metrics: str | None = None

    def __post_init__(self) -> None:
        if self.problem is not None and self.problem not in PROBLEMS:
            raise OptionError(f"problem must be one of {', '.join(PROBLEMS)}, got {shown(self.problem)}")
        for key, other in EITHER:
            if getattr(self, key) and getattr(self, other):
                raise OptionError(f"{key} and {other} exclude each other: leave one of them out")
        if self.pair_column and not self.text_column:
            raise OptionError("pair_column is a second text: name the first with text_column")
        if self.label_separator is not None and self.problem != "multi":
            raise OptionError("label_separator stands between the classes of one row: it needs problem=multi")
        if self.label_separator == "":
            raise OptionError("label_separator is empty: give what stands between two classes, such as ;")
        if (self.source_column or self.target_column) and self.problem not in (None, "text"):
            raise OptionError(f"source_column and target_column are of problem=text, not of {self.problem}")
        for name in self.named_metrics:
            if name not in TEXT_METRICS:
                raise UnknownNameError(f"unknown metric {shown(name)} of texts; {nearest(name, TEXT_METRICS)}")

    @property
    def named_metrics(self) -> tuple[str, ...]:
        """The metrics that are named."""
        return tuple(dict.fromkeys(name.strip() for name in self.metrics.split(","))) if self.metrics else ()

    @property
    def text_columns(self) -> tuple[str, ...] | None:
        """The columns that are named as the text; None: they are to be found.

        Raises:
            OptionError: more than two, or one of them twice.
        """
        if self.source_column:
            return (self.source_column,)
        if self.texts is None:
            return (self.text_column, *([self.pair_column] if self.pair_column else [])) if self.text_column else None
        given = tuple(name.strip() for name in self.texts.split(","))
        if not 1 <= len(set(given)) == len(given) <= 2:
            raise OptionError(f"texts are one column or two, such as text,text2, got {self.texts!r}")
        return given


OF_OWN_DATA = tuple(field.name for field in fields(OwnOptions))
