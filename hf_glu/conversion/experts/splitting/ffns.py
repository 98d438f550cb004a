"""One FFN's units divided among experts, some of them always on (MoEfication, CMoE).

Units that are strong everywhere are always on; the others go, with those that are active together, into routed experts,
all of equal size. A linear router is fitted on calibration data to predict how much each expert adds to a token's
output. With all experts on, the FFN computes the same; with fewer, the out-projection makes up for those left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_glu.activation.module import OwnedModule
from hf_glu.config.experts import ExpertOptions, Group, read_split, write_groups
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.experts.copying import Source, read_source
from hf_glu.conversion.experts.replacing import ExpertChange
from hf_glu.conversion.experts.splitting.dividing import ROUTERS, SIMILARITIES, divide, write
from hf_glu.conversion.fit.fitting import Fit
from hf_glu.conversion.routes import APPROXIMATE, ROUNDING, Route, exact_targets
from hf_glu.conversion.steps import Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, OptionError, nearest
from hf_glu.ffn.expert_sites import put_experts
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.sites import Site

UNKNOWN = ExpertOptions(groups="gelu", top_k=1)  # until the FFNs are known


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What splitting did.

    Attributes:
        experts, top_k: of each FFN.
        curves: site -> relative errors of its output on held-out tokens with 1, 2, ... routed experts active, beside
            those that are always on.
        perplexity: of a causal language model on held-out calibration texts, ``before`` and ``after``, on so many
            ``tokens``; None: the calibration was no text, or the model another.
    """

    experts: int | str
    top_k: int
    curves: dict[str, list[float]]
    perplexity: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        known = {"perplexity": self.perplexity} if self.perplexity else {}
        return {"experts": self.experts, "top_k": self.top_k, "curves": self.curves, **known}


def split_experts(
    model: Any, experts: int | str, *, top_k: int, calibration: Any, tokenizer: Any = None, layers: Any = None,
    exclude: str | None = None, similarity: str = "coactivation", router: str = "fitted", refit: bool = True,
) -> SplitReport:  # fmt: skip
    """Divide the units of each FFN among ``experts``, in place, from the first layer on.

    ``hf_glu.plan(model, hf_glu.conversion.Split(experts="2+14", top_k=4))`` says beforehand what that would be.

    Args:
        model: a Transformers model; its FFNs keep their activations.
        experts: ``2+14``: 2 that are always on and 14 routed ones, all of equal width; ``8``: routed ones alone. Their
            number must divide the FFN's width.
        top_k: routed experts that a token uses; all of them: the model computes the same.
        calibration, tokenizer: as in `hf_glu.convert`.
        layers, exclude: as in `hf_glu.plan`.
        similarity: units go together by ``coactivation`` (how much stronger than usual they are at each token), by
            which tokens open their ``gate`` widest, or by their ``weights``.
        router: ``fitted`` to predict how much each expert adds; or ``units``: an expert's score is the gate of its
            most typical unit.
        refit: whether the out-projection makes up for the experts that a token leaves out, where that is better on
            held-out tokens. With more experts on than ``top_k`` the model isn't the old one then.

    Raises:
        OptionError: a number of experts that doesn't divide the width, or another option out of range.
        ConversionError, NoSiteError: as `hf_glu.plan`.
    """
    change = Split(experts=experts, top_k=top_k, similarity=similarity, router=router, refit=refit)
    planned = make_plan(model, change, layers=layers, exclude=exclude)
    report = planned.apply(calibration=calibration, tokenizer=tokenizer, check=False)
    return SplitReport(experts=experts, top_k=top_k, curves=report.curves, perplexity=report.perplexity)


@dataclass(frozen=True, kw_only=True)
class Split(ExpertChange):
    """Divide FFNs' units among experts.

    Attributes:
        experts, top_k, similarity, router, refit: as in `split_experts`.
        options: what `rows` makes of them, once it knows the FFNs.
    """

    experts: int | str
    top_k: int
    similarity: str = "coactivation"
    router: str = "fitted"
    refit: bool = True
    options: ExpertOptions = UNKNOWN
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, known in (("similarity", SIMILARITIES), ("router", ROUTERS)):
            if (value := getattr(self, name)) not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, got {value!r}; {nearest(value, known)}")
        self.counts  # noqa: B018  raises what can't be read

    @property
    def counts(self) -> tuple[int, int]:
        """The always-on and the routed experts."""
        return read_split(self.experts)

    @property
    def target(self) -> str:
        """The experts, as reports say them."""
        return f"{self.experts} experts, top {self.top_k}"

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all FFNs, which are to be alike."""
        sources = self.read(model, sites)
        for site in sites:
            _check_plain(site)
        bias = any(source.biased or source.site.out_proj.bias is not None for source in sources)
        change = replace(self, options=_options(sources, self.counts, self.top_k), bias=bias)
        return tuple(change._row(source) for source in sources)

    def _row(self, source: Source) -> Step:
        always, routed = self.counts
        on = f"{always} always on and {self.top_k} of {routed}" if always else f"{self.top_k} of {routed}"
        promise, note = APPROXIMATE, f"{on} experts: the error's curve is measured"
        if self.top_k == routed:
            promise, note = ROUNDING, ""
        route = Route(name=f"split into {self.target}", promise=promise, note=note)
        return self.row(source, exact_targets(source.name)[0], route, width=source.width // (always + routed))

    def needs_calibration(self, step: Step) -> bool:
        return True  # for the routers

    @torch.no_grad()
    def apply(self, work: Work, step: Step) -> Fit | None:
        """Divide one FFN; the curve of its error is left in ``work``."""
        source = read_source(work.model, step.site)
        x = work.inputs_ahead(step.site)
        if len(x) < step.site.hidden:
            raise OptionError(
                f"the calibration data have {len(x):,} tokens, and {step.site.name} needs {step.site.hidden:,} at "
                "least, as many as its hidden size"
            )
        made = self.make(source, width=source.width // sum(self.counts))
        work.curves[step.site.name] = self._split(source, made, x)
        put_experts(work.model, step.site, made)
        return None

    def _split(self, source: Source, made: ExpertFFN, x: Tensor) -> list[float]:
        """Fill the experts and the router; return the error's curve."""
        how: dict[str, Any] = {"similarity": self.similarity, "router": self.router, "refit": self.refit}
        division, curve = divide(source, x, counts=self.counts, top_k=self.top_k, **how)
        write(made, division)
        return curve


def _check_plain(site: Site) -> None:
    """Raise ConversionError where an activation has learned what is of the whole FFN: its parts can't keep it."""
    for module in site.act.modules():
        if isinstance(module, OwnedModule) and any(True for _ in module.parameters(recurse=False)):
            raise ConversionError(
                f"{site.name} has {site.activation or type(site.act).__name__}, of which experts would lose what it "
                "has learned: split the model first, or freeze_mix or revert it"
            )


def _options(sources: list[Source], counts: tuple[int, int], top_k: int) -> ExpertOptions:
    kinds = {(source.name, source.gated, source.width) for source in sources}
    if len(kinds) > 1:
        raise OptionError("the FFNs' activations or widths differ: split them in layers that are alike")
    name, gated, width = kinds.pop()
    always, routed = counts
    if width % (always + routed):
        how = f"{always} + {routed}" if always else routed
        raise OptionError(f"{how} experts don't divide the {width} units of {sources[0].site.name}")
    own = exact_targets(name)[0] if gated else name
    groups = [write_groups((Group(name=own, count=n, width=width // (always + routed)),)) for n in counts if n]
    return ExpertOptions(groups=groups[-1], shared=groups[0] if always else None, top_k=top_k, weights="ones")
