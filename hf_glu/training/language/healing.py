"""Healing a model by a teacher: the loss.

With student logits z, teacher logits z', temperature T, labels y, and what is matched of token i, s_i and t_i:

    share T^2 KL(softmax(z' / T) || softmax(z / T)) + (1 - share) CE(z, y)
    + weight mean_i |s_i - t_i|^2 / max(|t_i|^2, median_j |t_j|^2)

The first two are means over the predicted tokens. The last one is a mean over the tokens of each text, and over
texts by how many of their tokens are predicted, so that micro-batches and processes add up to the whole batch. An error
is relative to its own token, where a few are a thousand times the others, and to the text's median where a token is
next to nothing, which would be most of the loss otherwise (of MiniLM's first FFN: 0.08 where the whole is 0.0013 off).
FFNs are matched by themselves, on what the student gives them: t is the teacher's FFN applied to it, s the student's.
What they are given has no gradient. With one, layers learn to give what later FFNs err less on: on a tiny GPT-2 the
divergence from its teacher grew from 0.0054 to 0.0073 in 120 steps, and falls to 0.0017 as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_glu.activation.context.passes import Pass, current_pass, within
from hf_glu.errors import OptionError
from hf_glu.ffn.forward import ffn_output, is_alone
from hf_glu.ffn.sites import Site, find_sites
from hf_glu.instruments.probe import with_decoder
from hf_glu.instruments.recorder import Call, Watch, watching
from hf_glu.instruments.tokens import Tokens
from hf_glu.training.language.apart import apart
from hf_glu.training.language.blocks import IDS, MASK, POSITIONS
from hf_glu.training.language.objectives import HIDDEN, IGNORED, Objective
from hf_glu.training.language.options import LanguageOptions
from hf_glu.training.language.teachers import check_alike
from hf_glu.training.loop.examples import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_glu.training.language.examples import BlockExamples

LABELS = "labels"
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """One FFN of the student and the teacher's in the same place."""

    own: Site
    other: Site


@dataclass(kw_only=True, eq=False)
class Seen:
    """One call of a student's FFN: what it was given, without a gradient, what it gave, and what was around it."""

    pair: Pair
    x: Tensor
    output: Tensor
    tokens: Tokens
    around: Pass | None
    autocast: tuple[Any, ...]

    def apply(self, site: Site) -> Tensor:
        """Return what an FFN gives where this one was called."""
        with within(self.around), torch.autocast(*self.autocast):
            return ffn_output(site, self.x)


def pair_sites(model: PreTrainedModel, teacher: PreTrainedModel) -> list[Pair]:
    """Return the FFNs that two models have in the same places, in so far as each is one."""
    others = {site.name: site for site in find_sites(teacher) if is_alone(site)}
    own = (site for site in find_sites(model) if is_alone(site))
    return [Pair(own=site, other=others[site.name]) for site in own if site.name in others]


@contextmanager
def seeing(model: PreTrainedModel, pairs: Sequence[Pair], batch: Batch) -> Iterator[list[Seen]]:
    """Note the calls of the student's FFNs within the block, in which it reads ``batch``."""
    seen: list[Seen] = []
    padding = valid_tokens(batch) if POSITIONS in batch else None  # which a model of packed documents isn't told
    given: dict[str, Tensor] = {}

    def before(call: Call, *, pair: Pair) -> None:
        given[pair.own.name] = call.x.detach()

    def after(call: Call, *, pair: Pair) -> None:
        device = call.output.device.type
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        x, output, tokens = given.pop(pair.own.name), call.output.detach(), call.tokens
        if padding is not None and padding.shape == (tokens.batch, tokens.length):
            tokens = replace(tokens, valid=padding[:, tokens.start : tokens.end])
        around = current_pass()
        seen.append(Seen(pair=pair, x=x, output=output, tokens=tokens, around=around, autocast=autocast))

    watches = [Watch(module=pair.own.in_proj, see=partial(before, pair=pair)) for pair in pairs]
    watches += [Watch(module=pair.own.out_proj, see=partial(after, pair=pair), after=True) for pair in pairs]
    with watching(model, watches):
        yield seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Healing:
    """How a student is made like its teacher.

    Attributes:
        teacher: the teacher, frozen, in eval mode.
        objective: what both predict.
        pairs: the FFNs that both have in the same places.
        matched: what is matched beside logits: ``ffn``, ``hidden``, both or nothing.
        share: of the teacher's logits, beside the text's own tokens.
        temperature: T.
        weight: of what is matched.
    """

    teacher: PreTrainedModel
    objective: Objective
    pairs: list[Pair]
    matched: tuple[str, ...]
    share: float
    temperature: float
    weight: float

    @property
    def logits(self) -> bool:
        """Whether both have logits."""
        return self.objective.name != HIDDEN

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        hidden = {"output_hidden_states": True} if "hidden" in self.matched else {}
        needed = self.logits and self.share < 1
        with seeing(model, self.pairs if "ffn" in self.matched else [], batch) as seen:
            own = model(**self.inputs(batch, labels=needed), **hidden)
        parts: list[Tensor] = []
        if hidden or (self.logits and self.share > 0):
            with torch.no_grad():
                other = self.teacher(**self.inputs(batch), **hidden)
            if self.logits and self.share > 0:
                both = (predicted(self.objective, found.logits, batch[LABELS]) for found in (own, other))
                one, two = without_padding(*both)
                parts.append(self.share * divergence(one, two, self.temperature))
            if hidden:
                parts.append(self.weight * self._states(own, other, batch))
        if needed:
            parts.append((1 - self.share) * own.loss)
        if "ffn" in self.matched:
            parts.append(self.weight * self._outputs(seen, batch))
        return torch.stack([part.float() for part in parts]).sum()

    def inputs(self, batch: Batch, *, labels: bool = False) -> dict[str, Any]:
        """Return what a model is given: without labels where a decoder needn't make its inputs of them."""
        found: dict[str, Any] = {key: value for key, value in batch.items() if key != LABELS}
        if self.logits and (labels or self.teacher.config.is_encoder_decoder):
            found[LABELS] = self.objective.given(batch)[LABELS]
        elif not self.logits:
            found = with_decoder(self.teacher, found)
        return apart(found)

    def _outputs(self, seen: list[Seen], batch: Batch) -> Tensor:
        """Return the mean relative error of the FFNs' outputs."""
        errors = []
        for call in seen:
            with torch.no_grad():
                wanted = call.apply(call.pair.other)
            errors.append(relative(call.apply(call.pair.own), wanted, call.tokens, batch))
        if not errors:
            raise OptionError("the model runs none of the FFNs that the teacher has, too: match=hidden or none")
        return torch.stack(errors).mean()

    def _states(self, own: Any, other: Any, batch: Batch) -> Tensor:
        """Return the mean relative error of the hidden states of all layers, without the embeddings."""
        errors = []
        for name in STATES:
            pairs = zip(getattr(own, name, None) or (), getattr(other, name, None) or (), strict=True)
            for number, (state, wanted) in enumerate(pairs):
                if number:
                    valid = valid_tokens(batch, decoder=name == STATES[-1] and self.logits)
                    tokens = Tokens(batch=len(state), length=state.shape[1], end=state.shape[1], valid=valid)
                    errors.append(relative(state, wanted, tokens, batch))
        return torch.stack(errors).mean()


def predicted(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits of the tokens that are predicted: ``[N, vocabulary]`` in float32."""
    if objective.name == "clm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != IGNORED].float()


def without_padding(*logits: Tensor) -> list[Tensor]:
    """Return models' logits without those of tokens that only some of their padded vocabularies have."""
    least = min(each.shape[-1] for each in logits)
    return [each[..., :least] for each in logits]


def divergence(own: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(other / T) || softmax(own / T)) in nats, the mean over rows ``[N, vocabulary]``."""
    if not len(own):
        return own.sum()
    one, two = ((logits / temperature).log_softmax(-1) for logits in (own, other))
    return temperature**2 * torch.nn.functional.kl_div(one, two, log_target=True, reduction="batchmean")


def valid_tokens(batch: Batch, *, decoder: bool = False) -> Tensor | None:
    """Return which tokens of a batch are no padding, ``[B, T]``; None: all."""
    if decoder:
        return batch[LABELS] != IGNORED
    return batch[MASK].bool() if MASK in batch else None


def relative(own: Tensor, wanted: Tensor, tokens: Tokens, batch: Batch) -> Tensor:
    """Return the mean of `errors_of` over the tokens of each text, and over texts by their labels.

    Args:
        own, wanted: what is compared, with a row for each token.
        tokens: what the rows are.
        batch: theirs.
    """
    own, wanted = tokens.texts(own).float(), tokens.texts(wanted).float()
    errors = errors_of(own, wanted, tokens.valid)
    if len(errors) != len(batch[IDS]):  # rows that can't be told to texts
        return errors.mean()
    labels = (batch[LABELS] != IGNORED).sum(-1)
    weights = labels / labels.sum().clamp_min(1)
    valid = torch.ones_like(errors) if tokens.valid is None else tokens.valid.to(errors.dtype)
    return (weights * (errors * valid).sum(-1) / valid.sum(-1).clamp_min(1)).sum()


def errors_of(own: Tensor, wanted: Tensor, valid: Tensor | None) -> Tensor:
    """Return |own - wanted|^2 / max(|wanted|^2, its median in the text) of each token, ``[B, T]``."""
    size = wanted.square().sum(-1)
    known = size if valid is None or valid.shape != size.shape else size.masked_fill(~valid, torch.nan)
    floor = known.nanmedian(-1, keepdim=True).values.nan_to_num()
    return (own - wanted).square().sum(-1) / torch.maximum(size, floor).clamp_min(1e-12)


class TaughtExamples:
    """Training data of which the loss is a healing's.

    Args:
        examples: the data.
        healing: the loss.
    """

    def __init__(self, examples: BlockExamples, healing: Healing) -> None:
        self._examples, self._healing = examples, healing
        self.plan, self.rows, self.tokens = examples.plan, examples.rows, examples.tokens
        self.batch, self.items = examples.batch, examples.items

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return self._healing.loss(model, batch)


def make_healing(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    objective: Objective,
    options: LanguageOptions,
    *,
    same_tokens: bool = False,
) -> Healing:
    """Choose what is matched of a model and its teacher.

    Args:
        model: not wrapped yet; what no loss reaches (an embedder's pooler) is frozen.
        teacher: frozen.
        objective: what both predict.
        options: what is asked for.
        same_tokens: whether both are known to read the same: their vocabularies may be padded otherwise then.

    Raises:
        OptionError: the two can't be compared so.
    """
    pairs = pair_sites(model, teacher)
    logits = objective.name != HIDDEN
    matched = {"none": (), "ffn": ("ffn",), "hidden": ("hidden",)}.get(options.match, ("hidden",))
    if not logits and "hidden" not in matched:
        matched = (*matched, "hidden")  # without it nothing would reach what is between the FFNs
    if "ffn" in matched and not pairs:
        raise OptionError(
            "match=ffn compares FFNs one by one, and the model has none where the teacher has: match=hidden"
        )
    check_alike(model, teacher, logits=logits and not same_tokens, matched=matched)
    if not logits and isinstance(pooler := getattr(model, "pooler", None), torch.nn.Module):
        pooler.requires_grad_(False)
    return Healing(
        teacher=teacher, objective=objective, pairs=pairs, matched=matched, share=options.teacher_share,
        temperature=options.temperature, weight=options.match_weight,
    )  # fmt: skip
