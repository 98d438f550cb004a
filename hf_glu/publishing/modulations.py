"""Modulations of a model's gates as people use them: fitted, kept in a folder, pushed to the Hub and pulled from there.

Shapes: W channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_glu.checkpoint.files import CARD_FILE, MANIFEST_FILE, MODULATION_FILE, MODULATION_WEIGHTS_FILE
from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.jsonio import JsonObject, read_object, to_json, write_json
from hf_glu.checkpoint.writing import check_file, reason_of, scratch_folder, user_path, whole_file, write_text
from hf_glu.errors import CheckpointError, HfGluError
from hf_glu.instruments.steering.contrast import BATCH
from hf_glu.instruments.steering.detecting import Detector
from hf_glu.instruments.steering.fitting import STEPS, fit_gates
from hf_glu.instruments.steering.modulating import GateSteering
from hf_glu.publishing.card.plain import plain
from hf_glu.publishing.hub.manifest import digest
from hf_glu.publishing.hub.upload import PushTarget, commit
from hf_glu.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

FORMAT = 1
ONE_FILE, MODULATION_ENTRY = ".safetensors", "modulation"  # how such a file ends; what its metadata call the JSON
# a tensor's kind, before its gate's name in the file
THRESHOLD, LOG_SLOPE, SAMPLE, DETECTOR = "threshold", "log_slope", "sample", "detector"
CARD = """---
library_name: hf_glu
tags:
- steering
- modulation
---

# A modulation of a model's gates

Fitted by {method} on the gates of {model}, {gates} of them. It changes how the model writes along one contrast between
two kinds of text, `slope (g - threshold)` at each gate, as strongly as is asked for.

```python
import hf_glu

modulation = hf_glu.GateModulation.load("{repo}")
with modulation.on(model, strength=1.0):  # the model that it was fitted on
    model.generate(...)
```
"""


class GateModulation(GateSteering):
    """A modulation of a model's gates: what `fit_modulation` gives.

    ``with modulation.on(model, strength=1.5):`` steers, `attach` does without a block, `fold` writes it into weights;
    modulations of one model are vectors: ``0.8 * a - b``.
    """

    @classmethod
    def of(cls, made: GateSteering) -> GateModulation:
        """Return ``made`` as one that can be saved and pushed."""
        return cls(**{each.name: getattr(made, each.name) for each in fields(made)})

    def save(self, target: str | os.PathLike[str]) -> None:
        """Write it into a new folder, whole or not at all: its numbers as safetensors, what it is as JSON.

        Where ``target`` ends in ``.safetensors`` it becomes one new file, which has both.

        Raises:
            CheckpointError: the folder exists and isn't empty, the file exists, or it can't be written.
        """
        if not is_one_file(target):
            with staged_folder(target) as stage:
                self._write(stage)
            return
        final = check_file(target)
        if os.path.lexists(final):
            raise CheckpointError(f"{target} exists already: choose another destination")
        with whole_file(final) as partial:
            partial.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return it as the content of one ``.safetensors`` file, which `load` reads."""
        from safetensors.torch import save

        tensors, about = self._parts()
        return save(tensors, {MODULATION_ENTRY: to_json(about)})

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors, about = self._parts()
        save_file(tensors, folder / MODULATION_WEIGHTS_FILE)
        write_json(folder / MODULATION_FILE, about)

    def _parts(self) -> tuple[dict[str, Tensor], JsonObject]:
        """Return its numbers, and what it is."""
        tensors = {f"{THRESHOLD}.{name}": value for name, value in self.thresholds.items()}
        tensors |= {f"{LOG_SLOPE}.{name}": value for name, value in self.log_slopes.items()}
        tensors |= {f"{SAMPLE}.{name}": value for name, value in self.samples.items()}
        about: JsonObject = {
            "format": FORMAT, "hf_glu": __version__, "model": self.model, "method": self.method,
            "gates": {name: len(value) for name, value in self.thresholds.items()},
            "accuracy": dict(self.accuracy), "detector": None,
        }  # fmt: skip
        if self.detector is not None:
            tensors[DETECTOR] = self.detector.weight
            about["detector"] = {
                "gate": self.detector.place, "bias": self.detector.bias, "accuracy": self.detector.accuracy,
            }  # fmt: skip
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, about

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], *, model: nn.Module | None = None, revision: str | None = None,
        token: str | None = None,
    ) -> GateModulation:  # fmt: skip
        """Load one from a folder, a ``.safetensors`` file, or a repository on the Hub.

        Args:
            source: the folder or file; or ``user/name``, ``user/name@REVISION``.
            model: the model that it is for, which is checked now, and not only when it is steered.
            revision, token: of the repository.

        Raises:
            CheckpointError: there is none, or it can't be read.
            OptionError: it is of another model.
        """
        found = user_path(source) if is_one_file(source) else resolve(source, revision=revision, token=token)
        made = _read(cls, found, str(source))
        if model is not None:
            made.check(model)
        return made

    from_pretrained = load

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:  # fmt: skip
        """Push it to the Hub in one commit, with a card; return the client's CommitInfo.

        Args:
            repo_id: the repository, made where there is none.
            private: of a new repository; None: as the account's default is.
            token: with the right to write; None: the one of `hf auth login` or ``HF_TOKEN``.
            revision: a branch, made where there is none; None: ``main``.
            commit_message: of the commit.

        Raises:
            PublishingError: the Hub refuses or can't be reached; the repository is as it was.
        """
        target = PushTarget(repo=repo_id, token=token, revision=revision, private=private).named()
        with scratch_folder() as stage:
            self._write(stage)
            told = {"method": self.method, "model": self.model, "gates": len(self.thresholds), "repo": target.repo}
            write_text(stage / CARD_FILE, CARD.format(**plain(told)))
            write_json(stage / MANIFEST_FILE, {"hf_glu": __version__, "card": digest(stage / CARD_FILE), "code": []})
            return commit(stage, target, message=commit_message or "Push a modulation with hf_glu")[0]


def is_one_file(source: str | os.PathLike[str]) -> bool:
    """Return whether a modulation of that name is one file, and no folder or repository."""
    return str(source).endswith(ONE_FILE)


def _read(kind: type[GateModulation], path: Path, source: str) -> GateModulation:
    """Return the modulation in a folder or a file, whose parts are checked against each other."""
    from safetensors import SafetensorError

    try:
        about, tensors = _read_parts(path, source)
        if about.get("format") != FORMAT:
            raise CheckpointError(f"{source} has format {about.get('format')!r}, and this hf_glu reads {FORMAT}")
        parts = {part: _under(tensors, part) for part in (THRESHOLD, LOG_SLOPE, SAMPLE)}
        widths = {name: len(value) for name, value in parts[THRESHOLD].items()}
        slopes = all(widths.get(name) == len(value) for name, value in parts[LOG_SLOPE].items())
        told = about["detector"]
        detects = told is None or widths.get(told["gate"]) == len(tensors[DETECTOR])
        known = parts[SAMPLE].keys() == widths.keys()  # a gate without one would be taken for any model's
        if not widths or widths != about["gates"] or not (slopes and known and detects) or not _finite(tensors):
            raise CheckpointError(f"{source} is broken: its numbers aren't those that {MODULATION_FILE} tells of")
        detector = None if told is None else Detector(
            place=str(told["gate"]), weight=tensors[DETECTOR], bias=float(told["bias"]), accuracy=told["accuracy"]
        )  # fmt: skip
        return kind(
            thresholds={name: parts[THRESHOLD][name] for name in about["gates"]}, log_slopes=parts[LOG_SLOPE],
            samples=parts[SAMPLE], model=str(about["model"]), method=str(about["method"]),
            accuracy=dict(about["accuracy"]), detector=detector,
        )  # fmt: skip
    except HfGluError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} can't be read as a modulation: {reason_of(error)}") from error


def _read_parts(path: Path, source: str) -> tuple[JsonObject, dict[str, Tensor]]:
    """Return what a modulation says of itself, and its numbers."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if is_one_file(source):
        if not path.is_file():
            raise CheckpointError(f"there is no file {source}")
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(MODULATION_ENTRY)
        if told is None:
            raise CheckpointError(f"{source} is no modulation: its metadata has no entry {MODULATION_ENTRY!r}")
        about = json.loads(told)
        if not isinstance(about, dict):
            raise CheckpointError(f"{source} is broken: its entry {MODULATION_ENTRY!r} is no object")
        return about, load_file(path)
    if not (path / MODULATION_FILE).is_file() or not (path / MODULATION_WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{source} is no modulation: it has no {MODULATION_FILE} and {MODULATION_WEIGHTS_FILE}")
    return read_object(path / MODULATION_FILE), load_file(path / MODULATION_WEIGHTS_FILE)


def _under(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _finite(tensors: dict[str, Tensor]) -> bool:
    numbers = [value for value in tensors.values() if value.ndim == 1 and value.dtype == torch.float32]
    return len(numbers) == len(tensors) and all(bool(value.isfinite().all()) for value in numbers)


def fit_modulation(
    model: nn.Module, tokenizer: Any, positive: Sequence[str], negative: Sequence[str], *, method: str = "diffmean",
    layers: Any = None, slopes: bool = False, batch_size: int = BATCH, max_length: int | None = None,
    steps: int = STEPS, seed: int = 0,
) -> GateModulation:  # fmt: skip
    """Fit a modulation of a model's gates to two kinds of text, such as glad and sad ones; the model stays as it is.

    At strength 1 each gate's pre-activation g becomes slope (g - threshold), which moves it by the difference of the
    classes' means. Every FFN that hf_glu knows has such a gate: of a dense one, it is what its activation is given.
    The gates of experts aren't among them, nor those that aren't given whole texts (a vision tower's, pooled layers').

    Args:
        model: encoder, decoder or both; an encoder-decoder's decoder is given the encoder's text.
        tokenizer: its tokenizer.
        positive, negative: texts of the two classes. ``pca`` takes them as pairs, in their order.
        method: ``diffmean``, the difference of means over texts of means over tokens; ``pca``, their first principal
            component, pairs' means taken away (cf. RepE, https://arxiv.org/abs/2310.01405); ``probe``, a logistic
            regression's weights (both by scikit-learn); ``learned``, from diffmean on by gradient, what makes the
            positive texts likely and its opposite the negative ones, for causal and masked language models.
        layers: which layers' gates (see `hf_glu.config.layers`); None: all.
        slopes: whether gates get slopes, too, the ratios of the classes' deviations.
        batch_size: texts of a forward pass.
        max_length: tokens of a text that are read; None: 128, or as many as the model reads.
        steps: of ``learned``.
        seed: of ``learned``.

    Raises:
        UnknownNameError, OptionError: a method, layers or a tokenizer that the model hasn't.
        DataError: a class without texts, or texts in a language that the tokenizer lacks.
        NoSiteError: the model has no gate.
        MissingPackageError: scikit-learn isn't installed.
    """
    return GateModulation.of(
        fit_gates(
            model, tokenizer, positive, negative, method=method, layers=layers, slopes=slopes, batch_size=batch_size,
            max_length=max_length, steps=steps, seed=seed,
        )
    )  # fmt: skip
