"""One FFN's units divided among experts (MoEfication, https://arxiv.org/abs/2110.01786).

Units that are active together go into one expert, all of equal size; a linear router is fitted on calibration data to
predict how much each expert adds to a token's output. With all experts on, the FFN computes the same.

Shapes: T tokens, H hidden size, W units, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.config.experts import ExpertOptions, Group, write_groups
from hf_glu.conversion.engine import make_plan
from hf_glu.conversion.experts.copying import Source, read_source
from hf_glu.conversion.experts.replacing import ExpertChange
from hf_glu.conversion.fit.calibration import site_inputs
from hf_glu.conversion.fit.fitting import HELD_OUT, RIDGE, Fit
from hf_glu.conversion.routes import APPROXIMATE, ROUNDING, Route, exact_targets
from hf_glu.conversion.steps import Step
from hf_glu.conversion.work import Work
from hf_glu.errors import OptionError
from hf_glu.ffn.expert_sites import put_experts
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.forward import ffn_units
from hf_glu.ffn.linear import weight_rows
from hf_glu.ffn.sites import Site

SIMILARITIES = ("coactivation", "weights")
ROUNDS = 10
SAMPLE = 4096  # tokens that units' activities are compared on
NUMBERS = 2**24  # of one chunk of contributions
UNKNOWN = ExpertOptions(groups="gelu", top_k=1)  # until the FFNs are known


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What splitting did.

    Attributes:
        experts, top_k: of each FFN.
        curves: site -> relative errors of its output on held-out tokens with 1, 2, ... experts active.
    """

    experts: int
    top_k: int
    curves: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"experts": self.experts, "top_k": self.top_k, "curves": self.curves}


def split_experts(
    model: Any, experts: int, *, top_k: int, calibration: Any, tokenizer: Any = None, layers: Any = None,
    exclude: str | None = None, similarity: str = "coactivation",
) -> SplitReport:  # fmt: skip
    """Divide the units of each FFN among ``experts`` experts, in place, from the first layer on.

    ``hf_glu.plan(model, hf_glu.conversion.Split(experts=8, top_k=2))`` says beforehand what that would be.

    Args:
        model: a Transformers model; its FFNs keep their activations.
        experts: how many; must divide the FFN's width.
        top_k: experts that a token uses; all of them: the model computes the same.
        calibration, tokenizer: as in `hf_glu.convert`.
        layers, exclude: as in `hf_glu.plan`.
        similarity: units go together by ``coactivation`` on the calibration data, or by their ``weights``.

    Raises:
        OptionError: a number of experts that doesn't divide the width, or another option out of range.
        ConversionError, NoSiteError: as `hf_glu.plan`.
    """
    change = Split(experts=experts, top_k=top_k, similarity=similarity)
    planned = make_plan(model, change, layers=layers, exclude=exclude)
    report = planned.apply(calibration=calibration, tokenizer=tokenizer, check=False)
    return SplitReport(experts=experts, top_k=top_k, curves=report.curves)


@dataclass(frozen=True, kw_only=True)
class Split(ExpertChange):
    """Divide FFNs' units among experts.

    Attributes:
        experts, top_k, similarity: as in `split_experts`.
        options: what `rows` makes of them, once it knows the FFNs.
    """

    experts: int
    top_k: int
    similarity: str = "coactivation"
    options: ExpertOptions = UNKNOWN

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise OptionError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {self.similarity!r}")

    @property
    def target(self) -> str:
        """The experts, as reports say them."""
        return f"{self.experts} experts, top {self.top_k}"

    def rows(self, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
        """Return the rows of all FFNs, which are to be alike."""
        sources = self.read(model, sites)
        bias = any(source.biased or source.site.out_proj.bias is not None for source in sources)
        change = replace(self, options=_options(sources, self.experts, self.top_k), bias=bias)
        return tuple(change._row(source) for source in sources)

    def _row(self, source: Source) -> Step:
        promise, note = APPROXIMATE, f"{self.top_k} of {self.experts} experts: the error's curve is measured"
        if self.top_k == self.experts:
            promise, note = ROUNDING, ""
        route = Route(name=f"split into {self.target}", promise=promise, note=note)
        return self.row(source, exact_targets(source.name)[0], route, width=source.width // self.experts)

    def needs_calibration(self, step: Step) -> bool:
        return True  # for the routers

    @torch.no_grad()
    def apply(self, work: Work, step: Step) -> Fit | None:
        """Divide one FFN; the curve of its error is left in ``work``."""
        source = read_source(work.model, step.site)
        x = site_inputs(work.model, step.site, work.batches or [])
        made = self.make(source, width=source.width // self.experts)
        work.curves[step.site.name] = _split(source, made, x, self.similarity)
        put_experts(work.model, step.site, made)
        return None


def _options(sources: list[Source], experts: int, top_k: int) -> ExpertOptions:
    kinds = {(source.name, source.gated, source.width) for source in sources}
    if len(kinds) > 1:
        raise OptionError("the FFNs' activations or widths differ: split them in layers that are alike")
    name, gated, width = kinds.pop()
    if type(experts) is not int or experts < 1 or width % experts:
        raise OptionError(f"{experts} experts don't divide the {width} units of {sources[0].site.name}")
    group = Group(name=exact_targets(name)[0] if gated else name, count=experts, width=width // experts)
    return ExpertOptions(groups=write_groups((group,)), top_k=top_k, weights="ones")


def _split(source: Source, made: ExpertFFN, x: Tensor, similarity: str) -> list[float]:
    """Fill the experts and the router; return the error's curve."""
    site, (bank,) = source.site, banks_of(made.banks)
    rows, bias, out = source.rows, source.bias, weight_rows(site.out_proj)
    if similarity == "weights":
        features = rows.view(-1, source.width, rows.shape[1]).transpose(0, 1).flatten(1)
    else:
        features = ffn_units(site, x[:SAMPLE].to(out.dtype)).T
    parts = balanced_clusters(features.float(), bank.count)
    for expert, units in enumerate(parts):
        halves = torch.cat([units, units + source.width]) if source.gated else units
        bank.in_proj[expert] = rows[halves]
        bank.out_proj[expert] = out[:, units]
        if bank.in_bias is not None and bank.out_bias is not None:
            bank.in_bias[expert] = 0 if bias is None else bias[halves]
            whole = site.out_proj.bias  # as many parts of it as experts are active make it whole
            bank.out_bias[expert] = 0 if whole is None else whole / made.options.top_k
    held = max(1, int(HELD_OUT * len(x)))
    train, test = x[:-held], x[-held:]
    norms = torch.cat([part.norm(dim=-1) for part in _contributions(source, parts, train)])
    made.router.weight.copy_(_fit_router(train, norms).to(made.router.weight))
    return _curve(source, parts, test, made.router.weight)


def balanced_clusters(features: Tensor, count: int) -> list[Tensor]:
    """Return the indices of ``count`` clusters of equal size by the cosine of ``features`` ``[W, F]`` (k-means).

    Units take the nearest centre that has room, the surest first.
    """
    points = torch.nn.functional.normalize(features, dim=1)
    size = len(points) // count
    centres = points[torch.linspace(0, len(points) - 1, count).long()]
    owner = torch.zeros(len(points), dtype=torch.long)
    for _ in range(ROUNDS):
        near = (points @ centres.T).cpu()
        best = near.topk(min(2, count), dim=1).values
        room, before = [size] * count, owner.clone()
        for unit in (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist():
            owner[unit] = next(c for c in near[unit].argsort(descending=True, stable=True).tolist() if room[c])
            room[int(owner[unit])] -= 1
        if torch.equal(owner, before):
            break
        centres = torch.stack([points[(owner == c).to(points.device)].mean(0) for c in range(count)])
    return [(owner == c).nonzero()[:, 0].to(features.device) for c in range(count)]


def _contributions(source: Source, parts: list[Tensor], x: Tensor) -> Any:
    """Yield what each expert adds to the outputs of some tokens: ``[tokens, E, H]``."""
    site, out = source.site, weight_rows(source.site.out_proj).float()
    for chunk in x.split(max(1, NUMBERS // (len(parts) * out.shape[0]))):
        units = ffn_units(site, chunk.to(site.out_proj.weight.dtype)).float()
        yield torch.stack([units[:, part] @ out[:, part].T for part in parts], dim=1)


def _fit_router(x: Tensor, norms: Tensor) -> Tensor:
    """Return W ``[E, H]`` with the least |x W' - norms|^2 (ridge)."""
    x, norms = x.double(), norms.double() / norms.double().mean().clamp_min(1e-20)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(gram, x.T @ norms).T


def _curve(source: Source, parts: list[Tensor], x: Tensor, router: Tensor) -> list[float]:
    error = torch.zeros(len(parts), dtype=torch.float64)
    total, begin = 0.0, 0
    bias = source.site.out_proj.bias
    for each in _contributions(source, parts, x):
        tokens = x[begin : begin + len(each)]
        begin += len(each)
        order = (tokens.float() @ router.float().T).argsort(dim=1, descending=True, stable=True)
        summed = each.gather(1, order.unsqueeze(-1).expand_as(each)).cumsum(1).double()
        error += (summed - each.double().sum(1, keepdim=True)).square().sum((0, 2)).cpu()
        whole = each.sum(1) if bias is None else each.sum(1) + bias.float()
        total += float(whole.double().square().sum())
    return (error / max(total, 1e-300)).sqrt().tolist()
