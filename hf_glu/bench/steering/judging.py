"""How much a text is of the target class: by a classifier, or by a probe on the unsteered model's hidden states.

Shapes: N texts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_glu.bench.steering.options import Texts
from hf_glu.bench.steering.ways import blocks_of, watch_output
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.errors import OptionError, UnknownNameError, nearest
from hf_glu.instruments.probe import evaluating
from hf_glu.instruments.steering.contrast import TextMeans, batches, read_contrast
from hf_glu.training.data.models import give_padding

DEPTH = 0.6  # of the layers, where a probe reads
FOLDS = 4


class Judge(Protocol):
    """What scores texts.

    Attributes:
        about: what it is.
        accuracy: on texts that it wasn't fitted on; None: isn't known.
    """

    about: str
    accuracy: float | None

    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return each text's probability of being of the target class; texts are ids of the steered model."""


class ProbeJudge:
    """A logistic regression on means over tokens of a layer's output, fitted on held-out texts.

    Raises:
        MissingPackageError: scikit-learn isn't installed.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Texts, batch_size: int) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        blocks = blocks_of(model)
        self.place = list(blocks)[int(DEPTH * (len(blocks) - 1))]
        self.model, self.block, self.batch_size = model, blocks[self.place], batch_size
        contrast = read_contrast(model, tokenizer, *texts.held_out)
        features = self.features(contrast.texts).double().numpy()
        labels = [1 - contrast.sign(at) for at in range(len(contrast.texts))]
        self.probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        self.accuracy: float | None = float(fmean(cross_val_score(self.probe, features, labels, cv=FOLDS)))
        self.probe.fit(features, labels)
        self.about = f"a probe on {self.place} of the unsteered model"

    def features(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean of what the layer gives on each text: ``[N, H]``."""
        means = TextMeans(self.model, {self.place: partial(watch_output, self.block)})
        found: dict[int, Tensor] = {}
        for numbers, rows in means.run(dict(enumerate(texts)), self.batch_size):
            found |= dict(zip(numbers, rows[self.place], strict=True))
        return torch.stack([found[at] for at in range(len(texts))])

    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return each text's probability of being of the target class."""
        features = self.features(texts)
        if not features.isfinite().all():
            return [float("nan")] * len(texts)
        return [float(row[1]) for row in self.probe.predict_proba(features.double().numpy())]


@dataclass
class ClassifierJudge:
    """A text classifier of Transformers.

    Attributes:
        classifier, tokenizer: it, and its tokenizer.
        label: which of its labels is the target.
        decode: makes text of the steered model's ids.
        batch_size: texts of one forward pass.
        about, accuracy: see `Judge`.
    """

    classifier: nn.Module
    tokenizer: Any
    label: int
    decode: Any
    batch_size: int
    about: str
    accuracy: float | None = None

    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the probability of the label of each text."""
        written = [self.decode(list(ids), skip_special_tokens=True) or " " for ids in texts]
        encoded = dict(enumerate(self.tokenizer(written, truncation=True)["input_ids"]))
        found: dict[int, float] = {}
        with evaluating(self.classifier):
            for numbers, inputs in batches(self.classifier, encoded, self.batch_size):
                chances = self.classifier(**inputs).logits.float().softmax(-1)[:, self.label]
                found |= dict(zip(numbers, chances.tolist(), strict=True))
        return [found[at] for at in range(len(texts))]


def load_judge(source: str, label: str | None, tokenizer: Any, batch_size: int) -> ClassifierJudge:
    """Load a classifier that scores.

    Args:
        source: folder or Hub id.
        label: the target's label; None: the last one.
        tokenizer: the steered model's.
        batch_size: texts of one forward pass.

    Raises:
        CheckpointError: it can't be loaded.
        OptionError, UnknownNameError: it is no text classifier, or hasn't the label.
    """
    found: Any = load_model(source, dtype=torch.float32)
    names = {int(number): str(name) for number, name in (getattr(found.config, "id2label", None) or {}).items()}
    if not type(found).__name__.endswith("ForSequenceClassification") or len(names) < 2:
        raise OptionError(f"{source} is no classifier of texts: {type(found).__name__}")
    if label is not None and label not in names.values():
        raise UnknownNameError(f"{source} has no label {label!r}; {nearest(label, names.values())}")
    chosen = max(names) if label is None else next(number for number, name in names.items() if name == label)
    own = load_tokenizer(source)
    give_padding(found, own)  # by which a decoder's head finds a text's end
    return ClassifierJudge(
        classifier=found, tokenizer=own, label=chosen, decode=tokenizer.decode,
        batch_size=batch_size, about=f"{names[chosen]!r} by {source}",
    )  # fmt: skip
