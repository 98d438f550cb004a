"""Growing the experts of ours: one layer built anew with the grown options, of the old one's weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.kappa import copy_responses
from hf_glu.config.experts import ExpertOptions, write_groups
from hf_glu.config.glu import GluConfig
from hf_glu.config.router_fields import router_fields
from hf_glu.conversion.experts.copying import drop_from
from hf_glu.conversion.experts.growing.growth import Growth, first_of_each, growth_route, remembers
from hf_glu.conversion.experts.growing.utility import owners, owners_in_layer
from hf_glu.conversion.forms import ConfigEntry, governed, size
from hf_glu.conversion.steps import Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.group import Bank, banks_of
from hf_glu.ffn.experts.losses import watch
from hf_glu.ffn.experts.native import put_rows
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.sites import Site
from hf_glu.instruments.routing import active_parameters

KEPT = ("num_experts", "num_experts_per_tok")  # the fields that change; a user's coefficient stays


def grown(options: ExpertOptions, change: Growth) -> ExpertOptions:
    """Return the options of grown experts."""
    times, one = change.times, change.active == "one"
    groups = write_groups(tuple(replace(group, count=group.count * times) for group in options.experts))
    names = None if options.sources is None else [name for name in options.sources for _ in range(times)]
    top_k = options.top_k if one else options.top_k * times
    return replace(options, groups=groups, top_k=top_k, copies=times if one else 1, sources=names)


def rows(change: Growth, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
    """Return the rows of all layers.

    Raises:
        ConversionError: the experts have copies already.
    """
    return tuple(_row(change, model, site) for site in sites)


def _row(change: Growth, model: nn.Module, site: Site) -> Step:
    old: Any = site.anchor
    if old.options.copies > 1:
        raise ConversionError(f"the experts of {site.name} have copies already: grow them at once, by times=")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = _built(model, site, grown(old.options, change))
    groups, more = (f"{options.groups}, top {options.top_k}" for options in (old.options, made.options))
    route = growth_route(change, remembers=remembers(old))
    return Step.at(
        site, change, groups, more, route, width_before=old.width, width=old.width,
        parameters_before=size(old), parameters_after=size(made), active_before=active_parameters(old),
        active_after=active_parameters(made),
    )  # fmt: skip


def _built(model: nn.Module, site: Site, options: ExpertOptions) -> ExpertFFN:
    """Return fresh experts with grown options, like those at a site."""
    old: Any = site.anchor
    bias = any(bank.in_bias is not None for bank in banks_of(old))
    acts = GluConfig.of(governing_configs(model, site)[0])
    return ExpertFFN(old.hidden, old.width, options, bias=bias, acts=acts, dropout=old.dropout)


def entries(change: Growth, model: nn.Module, sites: list[Site]) -> list[ConfigEntry]:
    """Return what the configs are to say."""
    first: Any = sites[0].anchor
    options, found = grown(first.options, change), []
    for config, _ in governed(model, sites):
        said = replace(GluConfig.of(config), experts=options.to_dict()).to_dict()
        fields = {key: value for key, value in router_fields(config, options).items() if key in KEPT}
        found.append(ConfigEntry(config=config, activations={}, options=said, fields=fields))
    return found


def apply(change: Growth, work: Work, step: Step, utility: Tensor | None) -> None:
    """Put grown experts in the place of a layer's."""
    old: Any = step.site.anchor
    weight = old.router.weight
    with torch.device(weight.device):
        made = _built(work.model, step.site, grown(old.options, change))
    made.to(dtype=weight.dtype).train(old.training)
    made.router.label = old.router.label
    sizes = [group.count for group in old.options.experts]
    whose = owners(sizes, change.times, utility)
    for bank, new, own in zip(banks_of(old.banks), banks_of(made.banks), whose, strict=True):
        _copy_bank(bank, new, own.to(weight.device))
        if change.active == "all" and old.options.weights == "ones":  # each copy adds its part of the sum
            for part in (new.out_proj, new.out_bias):
                if part is not None:
                    part.div_(change.times)
        _drop_copies(new, own, change.drop, work.generator)
    for bank, new in zip(banks_of(old.shared), banks_of(made.shared), strict=True):
        _copy_bank(bank, new, torch.arange(bank.count, device=weight.device))
    _copy_router(old.router, made.router, owners_in_layer(whose, sizes).to(weight.device))
    owner, _, attribute = step.site.name.rpartition(".")
    setattr(work.model.get_submodule(owner), attribute, made)


def _copy_bank(old: Bank, new: Bank, owner: Tensor) -> None:
    for name, part in old.named_parameters(recurse=False):
        put_rows(new, name, part, part.detach()[owner])
    for number, act in enumerate(new.acts):  # one of each expert, or one of all
        source = old.acts[int(owner[number]) if old.reads else 0]
        act.to(next((part.dtype for part in source.parameters()), old.in_proj.dtype))
        copied = copy.deepcopy(source)
        if not old.reads:  # what each expert has of its own
            copy_responses(copied, owner)
        act.load_state_dict(copied.state_dict())
        for mine, theirs in zip(act.parameters(), source.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)


def _copy_router(old: Any, new: Any, owner: Tensor) -> None:
    """Give the new router the old one's rows: as they are where a second one chooses the copy, else each repeated."""
    for name, part in [*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)]:
        values = part.detach().clone() if new.copies is not None else part.detach()[owner]
        put_rows(new, name, part, values)
    if new.copies is not None:
        new.copies.owner = owner
        new.copies.weight.requires_grad_(old.weight.requires_grad)


def _drop_copies(bank: Bank, owner: Tensor, share: float, generator: torch.Generator) -> None:
    for expert, first in enumerate(first_of_each(owner)):
        if share and not first:
            drop_from(bank, expert, share, generator)


def finish(model: nn.Module) -> None:
    """Make the model add its new routers' losses."""
    watch(model)
