"""What tells two classes of texts apart, by channel: differences of means, a principal component, a probe.

Shapes: N texts, W channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_glu.config.extras import need
from hf_glu.instruments.steering.contrast import Contrast, TextMeans, Watcher
from hf_glu.instruments.steering.detecting import Detector, fit_detector

OF_TEXTS = ("pca", "probe")  # methods that need the single texts' means
MOST_SLOPE = math.log(2)  # a gate's slope at strength 1 is between a half and 2


@dataclass(eq=False)
class Moments:
    """Sums over texts of their means: of each class ``[2, W]`` (positive first), and all texts where they are kept."""

    sums: Tensor
    squares: Tensor
    counts: list[int] = field(default_factory=lambda: [0, 0])
    texts: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, width: int) -> Moments:
        """Return those of no text yet."""
        return cls(torch.zeros(2, width, dtype=torch.float64), torch.zeros(2, width, dtype=torch.float64))

    def add(self, mean: Tensor, sign: int) -> None:
        """Add one text's mean ``[W]``."""
        wide = mean.double()
        self.sums[sign] += wide
        self.squares[sign] += wide.square()
        self.counts[sign] += 1

    @property
    def means(self) -> Tensor:
        """The mean of each class, ``[2, W]``."""
        return (self.sums / torch.tensor(self.counts).unsqueeze(1)).float()

    @property
    def variance(self) -> Tensor:
        """The variance within the classes, ``[W]``."""
        within = self.squares - self.sums.square() / torch.tensor(self.counts).unsqueeze(1)
        return (within.sum(0) / max(1, sum(self.counts) - 2)).clamp_min(0).float()


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """What was found at one place.

    Attributes:
        difference: where the positive class lies from the negative one, ``[W]``.
        log_slope: log of the ratio of the classes' deviations over tokens, ``[W]``; None: wasn't asked for.
        means: of the classes, ``[2, W]``, the positive one first.
        deviation: of texts' means within a class, ``[W]``.
        detector: of the classes.
    """

    difference: Tensor
    log_slope: Tensor | None
    means: Tensor
    deviation: Tensor
    detector: Detector


def find_directions(
    model: nn.Module, contrast: Contrast, places: Mapping[str, Watcher], *, method: str, slopes: bool, batch_size: int
) -> dict[str, Direction]:
    """Return the direction of a contrast at each place of ``model``.

    ``diffmean`` is the difference of the classes' means d; ``pca`` and ``probe`` are a unit vector v, scaled to
    v (v . d): the first principal component of the texts' means, each pair's own mean taken away, and a logistic
    regression's weights on standardised means. Accuracies are a detector's on each fourth text, fitted on the others.

    Raises:
        MissingPackageError: scikit-learn isn't installed, which pca and probe need.
    """
    if method in OF_TEXTS:
        need("sklearn", what=f"method={method!r}")
    means = TextMeans(model, places, squares=slopes)
    texts = dict(enumerate(contrast.texts))
    fitted = {at: ids for at, ids in texts.items() if not contrast.held_out(at)}
    moments: dict[str, Moments] = {}
    right: dict[str, int] = {}
    detectors: dict[str, Detector] = {}
    for chosen in (fitted, {at: ids for at, ids in texts.items() if at not in fitted}):
        if chosen is not fitted and chosen:
            detectors = {name: _detector(name, each, slopes) for name, each in moments.items()}
        for numbers, found in means.run(chosen, batch_size):
            for name, rows in found.items():
                each = moments.setdefault(name, Moments.of(rows.shape[1]))
                if name in detectors:
                    says = detectors[name].score(rows[:, : len(detectors[name].weight)]) > 0
                    wanted = torch.tensor([not contrast.sign(at) for at in numbers])
                    right[name] = right.get(name, 0) + int((says == wanted).sum())
                for at, row in zip(numbers, rows, strict=True):
                    each.add(row, contrast.sign(at))
                    if method in OF_TEXTS:
                        each.texts[at] = row[: len(row) // (2 if slopes else 1)]
    held_out = len(texts) - len(fitted)
    accuracies = {name: count / held_out for name, count in right.items()}
    return {
        name: _direction(name, each, contrast, method, slopes, accuracies.get(name)) for name, each in moments.items()
    }


def _detector(name: str, moments: Moments, slopes: bool, accuracy: float | None = None) -> Detector:
    means, variance = moments.means, moments.variance
    width = means.shape[1] // (2 if slopes else 1)
    return fit_detector(name, means[:, :width], variance[:width], accuracy)


def _direction(
    name: str, moments: Moments, contrast: Contrast, method: str, slopes: bool, accuracy: float | None
) -> Direction:
    means, variance = moments.means, moments.variance
    width = means.shape[1] // (2 if slopes else 1)
    log_slope = None
    if slopes:
        spread = (means[:, width:] - means[:, :width].square()).clamp_min(1e-12)
        log_slope = (0.5 * (spread[0] / spread[1]).log()).clamp(-MOST_SLOPE, MOST_SLOPE)
    difference = means[0, :width] - means[1, :width]
    if method in OF_TEXTS:
        order = sorted(moments.texts)
        kept = torch.stack([moments.texts[at] for at in order])
        unit = (_component if method == "pca" else _probe)(kept, contrast)
        difference = unit * (unit @ difference)
    return Direction(
        difference=difference, log_slope=log_slope, means=means[:, :width],
        deviation=variance[:width].sqrt(), detector=_detector(name, moments, slopes, accuracy),
    )  # fmt: skip


def _component(texts: Tensor, contrast: Contrast) -> Tensor:
    """Return the first principal component of pairs of texts ``[N, W]``, each pair's mean taken away: ``[W]``."""
    from sklearn.decomposition import PCA

    count = contrast.pairs
    half = (texts[:count] - texts[contrast.positive : contrast.positive + count]) / 2
    found = PCA(n_components=1, svd_solver="covariance_eigh" if half.shape[1] < 2 * count else "full")
    found.fit(torch.cat([half, -half]).double().numpy())
    return _unit(torch.from_numpy(found.components_[0]).float())


def _probe(texts: Tensor, contrast: Contrast) -> Tensor:
    """Return the weights of a logistic regression on standardised texts ``[N, W]``, as of these: ``[W]``."""
    from sklearn.linear_model import LogisticRegression

    deviation = texts.std(0).clamp_min(1e-6)
    scaled = ((texts - texts.mean(0)) / deviation).double().numpy()
    labels = [1 - contrast.sign(at) for at in range(len(texts))]
    found = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, labels)
    return _unit(torch.from_numpy(found.coef_[0]).float() / deviation)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(1e-12)


def best_place(directions: Mapping[str, Direction], names: Sequence[str] | None = None) -> str:
    """Return the place whose detector is the most accurate, the earliest of several; without accuracies the middle."""
    chosen = list(names or directions)
    known = {name: found for name in chosen if (found := directions[name].detector.accuracy) is not None}
    return max(known, key=lambda name: known[name]) if known else chosen[len(chosen) // 2]
