"""Putting an FFN of experts where a stock FFN is: in its module's place, or, where its parts are spread, in them."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

import torch
from torch import nn

from hf_glu.config.experts import ExpertOptions
from hf_glu.config.glu import GluConfig
from hf_glu.errors import ConversionError
from hf_glu.ffn.class_rules import carry_rules
from hf_glu.ffn.experts import ExpertFFN, find_experts
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.families import OURS
from hf_glu.ffn.forward import projections
from hf_glu.ffn.sites import Site, layer_of, stack_at
from hf_glu.inplace import stock_class

# what may stand in an FFN's own module beside its parts
BESIDE = (nn.Dropout, nn.Identity)
# an FFN's parameters by what they take the place of
IN, OUT = (rf"(banks|shared)\.\d+\.{kind}_(proj|bias)$" for kind in ("in", "out"))


class FirstOnly(nn.Module):
    """Takes an out-projection's place after the experts: gives back what they gave."""

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        """Return ``x``."""
        return x


def own_module(site: Site) -> bool:
    """Return whether the site's module is the FFN and nothing else (GPT-2, T5, Llama), so that it can be replaced.

    Bloom's and MPT's take the residual stream, too, and add it: experts take the place of what is inside of them.
    """
    paths = [path for path in (site.row.gate, site.row.in_proj, site.row.act, site.row.out_proj) if path]
    if not site.name or any("." in path for path in paths):
        return False
    stock: Any = stock_class(site.anchor)
    if len(signature(stock.forward).parameters) != 2:  # itself and its input
        return False
    return all(name in paths or isinstance(child, BESIDE) for name, child in site.anchor.named_children())


def make_experts(
    site: Site, options: ExpertOptions, *, bias: bool, width: int, acts: GluConfig | None = None
) -> ExpertFFN:
    """Return fresh experts for a site, in its device and dtypes, and trainable where the site's own parts are."""
    weight = site.in_proj.weight
    dropout = next((child for child in site.anchor.children() if isinstance(child, nn.Dropout)), None)
    with torch.device(weight.device):
        kept = dropout if own_module(site) else None
        made = ExpertFFN(site.hidden, width, options, bias=bias, acts=acts, dropout=kept)
    made.to(dtype=weight.dtype).train(site.anchor.training)
    for name, parameter in made.named_parameters():
        if re.search(OUT, name):
            parameter.data = parameter.data.to(site.out_proj.weight.dtype)
    _freeze_as(site, made)
    return made


def own_sites(model: nn.Module) -> list[Site]:
    """Return the places of a model's experts of ours as sites."""
    return [
        Site(name=name, row=OURS, path=name, anchor=experts, layer=layer_of(name), stack=stack_at(name, model))
        for name, experts in find_experts(model).items()
    ]


def _carry(model: nn.Module, site: Site) -> None:
    """Let the class rules for a site's projections hold for those of the experts in its place."""
    place = site.name if own_module(site) else f"{site.name}.{site.row.in_proj}".lstrip(".")
    ins = [path for path in (site.row.gate, site.row.in_proj) if path]
    for paths, kind in ((ins, IN), ([site.row.out_proj], OUT)):
        for path in paths:
            old = [f"{site.name}.{path}.{part}".lstrip(".") for part in ("weight", "bias")]
            carry_rules(model, old, place, kind)


def _freeze_as(site: Site, experts: ExpertFFN) -> None:
    """Leave to training what was left to it; a router among frozen experts, which are alike, has nothing to learn."""
    ins, outs = projections(site)[:-1], site.out_proj
    inside, outside = any(part.weight.requires_grad for part in ins), outs.weight.requires_grad
    in_bias = any(inside if part.bias is None else part.bias.requires_grad for part in ins)
    out_bias = outside if outs.bias is None else outs.bias.requires_grad
    for bank in banks_of(experts):
        bank.in_proj.requires_grad_(inside)
        bank.out_proj.requires_grad_(outside)
        if bank.in_bias is not None and bank.out_bias is not None:
            bank.in_bias.requires_grad_(in_bias)
            bank.out_bias.requires_grad_(out_bias)
    experts.router.weight.requires_grad_(inside or outside or in_bias or out_bias)


def put_experts(model: nn.Module, site: Site, experts: ExpertFFN) -> None:
    """Put experts in a site's place.

    Raises:
        ConversionError: the family's parts can't be replaced one by one.
    """
    experts.router.label = site.name
    _carry(model, site)
    if own_module(site):
        owner, _, attribute = site.name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, experts)
        return
    if site.row.gate or site.kind != "dense":
        raise ConversionError(f"{site.name}: this family's gated FFN is spread over its layer, experts have no place")
    for path, part in ((site.row.in_proj, experts), (site.row.act, FirstOnly()), (site.row.out_proj, FirstOnly())):
        owner, _, attribute = path.rpartition(".")
        setattr(site.anchor.get_submodule(owner), attribute, part)
