"""The base of all metrics: `evaluate.Metric` classes that need neither the Hub nor a cache on disk.

`evaluate` truncates floats to its integer columns and fails unhelpfully without data, so that everything is checked
before it sees the data.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import datasets
import evaluate

from hf_glu.compat.of_others import DATA_ROOT
from hf_glu.errors import DataError
from hf_glu.tasks.metrics import scores

# numbers in any form, or rows: looked at before `evaluate` sees them
Given: TypeAlias = Any
ColumnTypes: TypeAlias = dict[str, object]  # types of columns, as datasets has them
INTEGER, NUMBER, TEXT = datasets.Value("int64"), datasets.Value("float64"), datasets.Value("string")


class OfflineMetric(evaluate.Metric):
    """The base of the metrics: predictions and references are class numbers, unless a subclass has other columns.

    Data are kept in memory, so that processes that share a cache folder don't meet there; several processes that
    compute one metric together (``num_process``) need the folder.

    Attributes:
        columns: type of predictions and of references.
        classes: number of classes; None: any.

    Raises:
        DataError: from `compute`, `add_batch` and `add`: predictions or references that can't be scored.
    """

    columns: ClassVar[ColumnTypes] = {"predictions": INTEGER, "references": INTEGER}
    classes: ClassVar[int | None] = None

    def __init__(self, config_name: str | None = None, **options: object) -> None:
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(config_name, **options)

    def compute(self, *, predictions: Given = None, references: Given = None) -> dict[str, float] | None:
        """Compute the metric on these predictions and those added before; None in all processes but the first."""
        if predictions is None and references is None and self.writer is None:
            raise DataError("there are no predictions to compute a metric of: give some, or add them first")
        found: dict[str, float] | None = super().compute(predictions=predictions, references=references)
        return found

    def add_batch(self, *, predictions: Given = None, references: Given = None) -> None:
        """Add predictions and their references, for `compute` to score; a batch with an error adds nothing."""
        if predictions is None or references is None:
            raise DataError(f"there are no {'predictions' if predictions is None else 'references'}: give both")
        predictions, references = self._checked(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction: Given = None, reference: Given = None) -> None:
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def _checked(self, predictions: Given, references: Given) -> tuple[Given, Given]:
        """Check predictions and references, and return them in a form that `evaluate` stores without loss."""
        return scores.as_classes(predictions, references, count=self.classes)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=datasets.Features(self.columns))

    def _build_data_dir(self) -> str:
        """Make no folder for data in memory: the home folder may be read-only."""
        return str(DATA_ROOT.of(self) if self.keep_in_memory else super()._build_data_dir())
