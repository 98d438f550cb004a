"""Several fine-tunes of one architecture as one mixture: each model's FFNs are an expert, all else is shared.

Weights of the experts that a token uses sum to 1: where all models are the same, the mixture computes what they do,
whatever its router says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.stock import is_elementwise
from hf_glu.config.experts import ExpertOptions, Group, check_merge, write_groups
from hf_glu.config.registry import unmixed, unwrapped
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.experts.copying import Source, fill, read_source
from hf_glu.conversion.experts.merging.alike import average, check_alike
from hf_glu.conversion.experts.merging.prompted import check_prompts, hidden_rows
from hf_glu.conversion.experts.replacing import ExpertChange
from hf_glu.conversion.experts.upcycling import COPY, check_memory
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.report import Report
from hf_glu.conversion.routes import APPROXIMATE, EXACT, Route, exact_targets
from hf_glu.conversion.steps import Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.expert_sites import put_experts
from hf_glu.ffn.sites import Site, convertible_sites

UNKNOWN = ExpertOptions(groups="gelu", top_k=1)  # until the FFNs are known
DIFFER = "the models' FFNs differ"


def merge_experts(
    models: Sequence[Any], *, router: str = "random", prompts: Sequence[Any] | None = None, tokenizer: Any = None,
    attention: str = "average", top_k: int = 2, names: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """Return a new model that is a mixture of ``models``, fine-tunes of one architecture, which stay as they are.

    y = sum over a token's experts e of weight_e FFN_e(x), with FFN_e bitwise that of model e and weights that sum to 1;
    where all models are the same, the new one gives the same outputs. The head of a task (a classifier) is the first
    model's, a language model's head is averaged with the rest.

    Args:
        models: two at least, of one class, config (vocabulary, activation, sizes), and dtype.
        router: ``random`` rows, small; or ``hidden``: row e of a layer is the mean of the inputs of model e's FFN there
            on the model's own prompts (of each text the first 128 tokens), divided by its length.
        prompts, tokenizer: for ``hidden``, a list of texts for each model (or token ids, or batches, as ``calibration``
            in `hf_glu.convert`), and the tokenizer of all.
        attention: what is no FFN is the ``average`` of all (in float64, then in the models' dtype) or of the ``first``.
        top_k: experts that a token uses.
        names: what the config calls the models; None: as they were loaded.

    Raises:
        OptionError: models that aren't alike; prompts that are missing, or of another number; another option that
            can't be.
        ConversionError: a model that can't be converted as it is, has experts, or whose FFNs are wrapped.
    """
    given = {"prompts": prompts, "tokenizer": tokenizer, "attention": attention, "top_k": top_k, "names": names}
    return merge_with_report(models, router=router, **given)[0]


def merge_with_report(
    models: Sequence[Any], *, router: str, prompts: Sequence[Any] | None, tokenizer: Any, attention: str, top_k: int,
    names: Sequence[str] | None,
) -> tuple[Any, Report]:  # fmt: skip
    """Return what `merge_experts` does, and the report of putting the experts in."""
    check_merge(router=router, attention=attention)
    check_alike(models)
    if router == "hidden":
        check_prompts(prompts, len(models), tokenizer)
    elif prompts is not None:
        raise OptionError("router='random' reads no prompts: leave them out, or give router='hidden'")
    first, *others = models
    rest = "averaged" if attention == "average" else "the first model's"
    change = Merge(others=tuple(others), top_k=top_k, names=tuple(names or map(name_of, models)), rest=rest)
    make_plan(first, change)  # what can't be raises before anything is computed
    if router == "hidden":
        assert prompts is not None
        change = replace(change, router=hidden_rows(models, prompts, tokenizer))
    made = copy.deepcopy(first)
    for parameter in made.parameters():
        parameter.grad = None
    if attention == "average":
        average(made, others)
    planned = make_plan(made, change)
    return made, planned.apply(check=planned.promise == EXACT)


def name_of(model: Any) -> str:
    """Return what a model was loaded as: a repository, or a folder without the path to it."""
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return type(model).__name__
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


@dataclass(frozen=True, kw_only=True)
class Merge(ExpertChange):
    """Put experts in the places of FFNs, one of the model and one of each of the others.

    Attributes:
        others: the models whose FFNs become experts beside the model's own.
        top_k: experts that a token uses.
        names: of all models.
        router: by the site's name the router's rows ``[E, H]``; None: they are random.
        rest: what was done to all that is no FFN.
        options: what `rows` makes of them, once it knows the FFNs.
    """

    others: tuple[Any, ...]
    top_k: int = 2
    names: tuple[str, ...] | None = None
    router: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    rest: str = "the first model's"
    options: ExpertOptions = UNKNOWN

    @property
    def target(self) -> str:
        """The experts, as reports say them."""
        return f"{1 + len(self.others)} models' experts, top {self.top_k}"

    def without_modules(self) -> Merge:
        return replace(self, others=(), router=None)

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all FFNs, whose experts share one entry of the config.

        Raises:
            HfGluError: an FFN that experts can't be made of.
        """
        every = [[source, *self._theirs(source.site)] for source in self.read(model, sites)]
        bias = any(source.biased or source.site.out_proj.bias is not None for own in every for source in own)
        options = self._options([source for own in every for source in own])
        check_memory([own[0] for own in every], options)
        change = replace(self, options=options, bias=bias)
        return tuple(change._row(own) for own in every)

    def _theirs(self, site: Site) -> list[Source]:
        """Return the FFNs of the other models at a site."""
        found = [{each.name: each for each in convertible_sites(model)} for model in self.others]
        if any(site.name not in sites for sites in found):
            raise OptionError(f"{site.name} isn't in all models: they must be of one architecture")
        return [read_source(model, sites[site.name]) for model, sites in zip(self.others, found, strict=True)]

    def _options(self, sources: list[Source]) -> ExpertOptions:
        kinds = {(source.name, source.gated, source.width, source.site.hidden) for source in sources}
        if len(kinds) > 1:
            listed = ", ".join(f"{name} of {width} units" for name, _, width, _ in sorted(kinds))
            raise OptionError(f"the FFNs are to be alike, and are {listed}")
        name, gated, *_ = kinds.pop()
        for whole in {source.site.activation or name for source in sources}:
            if not is_elementwise(name) or unmixed(unwrapped(whole)) != whole:
                raise ConversionError(f"the FFNs' {whole} is more than a plain or gated activation: merge before that")
        own, count = exact_targets(name)[0] if gated else name, 1 + len(self.others)
        # an activation with parameters is each expert's own, so that each is a group
        apart = any(True for source in sources for _ in source.site.act.parameters())
        groups = [Group(name=own, count=1)] * count if apart else [Group(name=own, count=count)]
        return ExpertOptions(groups=write_groups(tuple(groups)), top_k=self.top_k, sources=self.names)

    def _row(self, sources: list[Source]) -> Step:
        notes = [f"all that is no FFN is {self.rest}"]
        same = all(_same(sources[0], other) for other in sources[1:])
        route = Route(
            name=f"{len(sources)} models' FFNs, top {self.top_k}", promise=EXACT if same else APPROXIMATE,
            note="; ".join(notes if same else [DIFFER, *notes]),
        )  # fmt: skip
        return self.row(sources[0], exact_targets(sources[0].name)[0], route, width=sources[0].width)

    @torch.no_grad()
    def apply(self, work: Work, step: Step) -> Fit | None:
        """Put the experts of one site in."""
        sources = [read_source(work.model, step.site), *self._theirs(step.site)]
        experts = self.make(sources[0], width=sources[0].width)
        fill(experts, sources, [COPY] * len(self.options.experts), work.generator, 0.0)
        if self.router is not None:
            experts.router.weight.copy_(self.router[step.site.name].to(experts.router.weight))
        put_experts(work.model, step.site, experts)
        return None


def _same(first: Source, other: Source) -> bool:
    """Return whether two FFNs are the same, bit by bit; of FFNs without values that isn't known."""
    if first.site.in_proj.weight.device.type == "meta":
        return False
    pairs = zip(_tensors(first), _tensors(other), strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b.to(a.device))) for a, b in pairs)


def _tensors(source: Source) -> list[Tensor | None]:
    out = source.site.out_proj
    return [source.rows, source.bias, out.weight, out.bias, *source.site.act.parameters()]
