"""A converted model made small in each way of `hf_glu.bench.small`: size, latency and accuracy.

Latency is of one forward pass on T random tokens, in batches of 1 and 8. The size is that of the weights on disk, which
is what they take in memory, too. Accuracy is the task's score on its validation examples. Pruned models keep 2/3 of the
units, those that add most, fitted by least squares to what the FFNs gave on training texts (`hf_glu.convert` with
``width``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_glu.bench.options import Shape
from hf_glu.bench.running import BenchOptions, Cell, Claim, Contender
from hf_glu.bench.small import EAGER, WAYS
from hf_glu.checkpoint.loading import load_model
from hf_glu.config.extras import lacking
from hf_glu.config.glu import iso_width
from hf_glu.conversion import convert
from hf_glu.errors import OptionError
from hf_glu.ffn.sites import find_sites
from hf_glu.instruments.probe import probe_inputs
from hf_glu.tasks.loading import load_task
from hf_glu.tasks.table import find_task
from hf_glu.training.data.features import Features, make_features
from hf_glu.training.data.models import load_for_task
from hf_glu.training.data.prediction import evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCHES, TOKENS = (1, 8), 32
MAX_LENGTH = 128
CALIBRATION = 512  # texts
PRUNED = ", pruned"
CLAIMS = {name + more: Claim(peers=(EAGER,)) for more in ("", PRUNED) for name in WAYS if name + more != EAGER}


@dataclass
class Subject:
    """The model that is made small, and the task that it is scored on.

    Attributes:
        options: of the bench.
        scratch: a folder for graphs.
    """

    options: BenchOptions
    scratch: Path
    tokenizer: PreTrainedTokenizerBase = None
    splits: dict[str, Features] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in float32; loading it also reads the examples of its task."""
        source, name = str(self.options.model), self.options.task
        if name is None:
            return load_model(source, dtype=torch.float32).eval()
        task = find_task(name)
        raw = load_task(task, self.options.dataset)
        model, self.tokenizer, text = load_for_task(source, task)
        if text:
            raise OptionError(f"{source} writes its answers: the bench of devices is for classifiers")
        for split in task.validation:
            rows = raw[split].select(range(min(len(raw[split]), self.options.rows or len(raw[split]))))
            self.splits[split] = make_features(task, rows, self.tokenizer, max_length=MAX_LENGTH, text=False)
        train = raw["train"]
        self.texts = [task.inputs(train[number])[0][0] for number in range(min(len(train), CALIBRATION))]
        return model.eval()

    def pruned(self) -> PreTrainedModel | None:
        """Make the model with fewer units; None if there are no texts to fit it on."""
        sites = find_sites(self.model)
        names = {str(site.activation) for site in sites if site.widened}
        if not self.texts or len(names) != 1:
            return None
        width = self.options.width or iso_width(sites[0].width)
        model = copy.deepcopy(self.model)
        convert(
            model,
            names.pop(),
            width=width,
            calibration=self.texts,
            tokenizer=self.tokenizer,
            distill_steps=0,
            check=False,
        )
        return model.eval()

    @cached_property
    def made(self) -> dict[str, tuple[nn.Module, dict[str, float]]]:
        """All variants by name: each model with its size and score."""
        wanted = [(name, self.model, way) for name, way in WAYS.items()]
        if (pruned := self.pruned()) is not None:
            wanted += [(name + PRUNED, pruned, way) for name, way in WAYS.items() if way.pruned]
        found = {}
        for number, (name, model, way) in enumerate(wanted):
            if missing := lacking(*way.packages, what=name):
                warnings.warn(f"left out: {missing}", stacklevel=2)
            else:
                small = way.make(model, self.scratch / str(number))
                facts = {"units": find_sites(model)[0].width, "MB": small.size / 1e6}
                found[name] = (small.model, {**facts, **self.score(small.model)})
        return found

    def score(self, model: nn.Module) -> dict[str, float]:
        """Return a model's score on the task as a percentage; nothing if there is no task."""
        if not self.splits:
            return {}
        return {"score %": 100 * evaluate(model, self.splits, self.tokenizer)[1]}

    def contenders(self, batch: int, tokens: int) -> Mapping[str, Contender]:
        """Return a forward pass of each variant."""
        rows = [probe_inputs(self.model, seed=row, length=tokens)["input_ids"] for row in range(batch)]
        ids = torch.cat(rows)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {
            name: Contender(call=partial(_forward, model, inputs), facts=facts)
            for name, (model, facts) in self.made.items()
        }


@torch.no_grad()
def _forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each batch size.

    Raises:
        OptionError: no model is given, or one that writes texts.
    """
    if options.model is None:
        raise OptionError("the bench of devices needs --model DIR, a converted model (and --task, which it answers)")
    with TemporaryDirectory(prefix="hf_glu_devices") as scratch:
        subject = Subject(options, Path(scratch))
        for tokens in options.sizes((TOKENS,)):
            for batch in BATCHES:
                shape: Shape = {"pass": "forward", "batch": batch, "tokens": tokens}
                yield Cell(shape=shape, build=partial(subject.contenders, batch, tokens), claims=CLAIMS)
