"""How like its teacher a model is: logits, FFNs and embeddings, on the validation text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_glu.checkpoint.provenance import naming
from hf_glu.ffn.sites import find_sites
from hf_glu.training.language.examples import BlockExamples, language_metrics, sums
from hf_glu.training.language.healing import LABELS, Healing, Pair, predicted, seeing, valid_tokens, without_padding
from hf_glu.training.language.objectives import IGNORED
from hf_glu.training.loop.examples import Batch
from hf_glu.training.results import HealingFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Likeness:
    """What is measured of a student and its teacher.

    Args:
        healing: how the one is made like the other.
    """

    def __init__(self, healing: Healing) -> None:
        self.healing = healing
        self.errors: list[dict[str, float]] = []
        self.teacher: dict[str, float] = {}

    def measure(
        self,
        model: PreTrainedModel,
        examples: BlockExamples,
        *,
        batch_size: int,
        accelerator: Accelerator | None,
        title: str,
    ) -> dict[str, float]:
        """Return the metrics of a student; `errors` of each FFN, and the `teacher`'s own metrics, are kept.

        Of a model with logits: loss and perplexity, the divergence from the teacher in nats (``kl``), and the share of
        tokens for which both find the same token most likely (``agreement``). Of another one: ``cosine`` of the mean
        of a text's last hidden states and the teacher's, and their relative error (``hidden_error``). Of both
        ``ffn_error``: the mean of the FFNs' relative errors |own - teacher's| / |teacher's|, on what the student gives
        them.
        """
        pairs = self._pairs(model)

        def part(rows: range, batch: Batch) -> list[float]:
            return self._part(model, batch, pairs)

        total = sums(model, examples, part, batch_size=batch_size, accelerator=accelerator, title=title)
        count = max(total[0], 1)
        own, other = (language_metrics(examples, value / count) for value in total[1:3])
        apart, size = (total[5:][at::2] for at in (0, 1))
        errors = [math.sqrt(e / max(s, 1e-300)) for e, s in zip(apart, size, strict=True)]
        self.errors.append({pair.own.name: error for pair, error in zip(pairs, errors[1:], strict=True)})
        mean = {"ffn_error": sum(errors[1:]) / len(pairs)} if pairs else {}
        if not self.healing.logits:
            return {"cosine": total[3] / max(total[4], 1), "hidden_error": errors[0], **mean}
        self.teacher = other
        return {**own, "kl": total[3] / count, "agreement": total[4] / count, **mean}

    def facts(self, teacher: str) -> HealingFacts:
        """Return what is known of a teacher, and of each FFN before and after: the first and the last time measured."""
        first, last = self.errors[0], self.errors[-1]
        return {
            "teacher": naming(teacher)["name"],
            "objective": self.healing.objective.name,
            "matched": list(self.healing.matched),
            "metrics": self.teacher,
            "parameters": self.healing.teacher.num_parameters(),
            "sites": {name: [before, last[name]] for name, before in first.items()},
        }

    def _pairs(self, model: PreTrainedModel) -> list[Pair]:
        """Return the pairs with the FFNs of ``model``: a copy of the student that is trained, perhaps."""
        now = {site.name: site for site in find_sites(model)}
        pairs = self.healing.pairs
        if not all(pair.own.name in now for pair in pairs):  # it is wrapped, around the same modules
            return pairs
        return [Pair(own=now[pair.own.name], other=pair.other) for pair in pairs]

    def _part(self, model: PreTrainedModel, batch: Batch, pairs: list[Pair]) -> list[float]:
        """Return counts and sums of one batch: see `measure`."""
        hidden = {} if self.healing.logits else {"output_hidden_states": True}
        inputs = self.healing.inputs(batch)
        with seeing(model, pairs, batch) as seen:
            own = model(**inputs, **hidden)
        other = self.healing.teacher(**inputs, **hidden)
        head = self._logits(own, other, batch) if self.healing.logits else self._states(own, other, batch)
        found = {pair.own.name: torch.zeros(2, dtype=torch.float64) for pair in pairs}
        for call in seen:
            wanted = call.apply(call.pair.other)
            found[call.pair.own.name] += _squares(call.tokens.rows(call.output), call.tokens.rows(wanted))
        return [*head, *(float(value) for sums in found.values() for value in sums)]

    def _logits(self, own: Any, other: Any, batch: Batch) -> list[float]:
        """Return the number of predicted tokens, both losses, the divergence and the agreement; nothing of states.

        One text after the other: a batch of logits is gigabytes with a large vocabulary, and these are several of them.
        """
        rows = zip(own.logits.split(1), other.logits.split(1), batch[LABELS].split(1), strict=True)
        return [*map(sum, zip(*(self._text(*row) for row in rows), strict=True)), 0.0, 0.0]

    def _text(self, own: Tensor, other: Tensor, labels: Tensor) -> list[float]:
        """Return the same of one text, its logits ``[1, T, vocabulary]`` and labels ``[1, T]``."""
        whole = [predicted(self.healing.objective, logits, labels) for logits in (own, other)]
        labels = labels[:, 1:] if self.healing.objective.name == "clm" else labels
        wanted = labels[labels != IGNORED]
        losses = [float(cross_entropy(logits, wanted, reduction="none").double().sum()) for logits in whole]
        one, two = (logits.log_softmax(-1) for logits in without_padding(*whole))
        kl = float((two.exp() * (two - one)).double().sum())
        return [len(wanted), *losses, kl, float((one.argmax(-1) == two.argmax(-1)).sum())]

    def _states(self, own: Any, other: Any, batch: Batch) -> list[float]:
        """Return the sum and number of texts' cosines, and the squares of last hidden states' errors and of them."""
        states = [last_states(found) for found in (own, other)]
        valid = valid_tokens(batch)
        mask = torch.ones(states[0].shape[:2]) if valid is None else valid.cpu()
        one, two = (mean_state(state, mask) for state in states)
        cosines = torch.nn.functional.cosine_similarity(one, two)
        rows = [state.cpu()[mask.bool()] for state in states]
        return [0.0, 0.0, 0.0, float(cosines.double().sum()), len(cosines), *_squares(*rows).tolist()]


def last_states(outputs: Any) -> Tensor:
    """Return the last hidden states of a model's output: of an encoder-decoder, its encoder's."""
    found: Tensor = (getattr(outputs, "encoder_hidden_states", None) or outputs.hidden_states)[-1]
    return found


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the hidden states of each text, ``[B, hidden]``: what sentence embedders pool."""
    weights = mask.to(states.device, torch.float32)[..., None]
    return (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)


def _squares(own: Tensor, wanted: Tensor) -> Tensor:
    """Return |own - wanted|^2 and |wanted|^2."""
    own, wanted = own.double(), wanted.double()
    return torch.stack([(own - wanted).square().sum(), wanted.square().sum()]).cpu()
