"""Growing a family's own experts (Mixtral, Qwen-MoE, OLMoE, DeepSeek): in its bank, or in all that its config builds.

Where one copy of each chosen expert is active, the family's router isn't touched: the bank itself sends each token on
to a copy. Where all are, the family's config says the new numbers, and what it builds of them says which tensors have a
row for each expert, and which attributes count them. Each layer is then compared with what it was.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.kappa import copy_responses
from hf_glu.compat.of_models import IS_TRANSPOSED, is_concatenated
from hf_glu.config.experts import ExpertOptions, Group, write_groups
from hf_glu.config.glu import GluConfig
from hf_glu.conversion.experts.copying import drop_units
from hf_glu.conversion.experts.growing.growth import Growth, first_of_each, growth_route
from hf_glu.conversion.experts.growing.same_layer import SAME, compare_layers, sample
from hf_glu.conversion.experts.growing.utility import owners, owners_in_layer
from hf_glu.conversion.experts.native.banks import bank_source
from hf_glu.conversion.foresight import skeleton_of
from hf_glu.conversion.forms import ConfigEntry, governed, size
from hf_glu.conversion.routes import exact_targets
from hf_glu.conversion.steps import Step
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError
from hf_glu.ffn.build import mix_banks
from hf_glu.ffn.experts.native import MixedBank, bank_width, copy_experts, put_rows
from hf_glu.ffn.identify import CHOSEN, top_k_of
from hf_glu.ffn.sites import Site, find_banks

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def form(site: Site) -> str:
    """Return what a bank is now, as far as growing it goes."""
    bank: Any = site.anchor
    copies = getattr(bank, "copies", None)
    return f"{len(bank.down_proj)} experts" + (f", copies of {copies.count}" if copies is not None else "")


def _groups(model: nn.Module, site: Site) -> tuple[Group, ...]:
    """Return the activations of a bank's experts; raise ConversionError where they have copies already."""
    bank: Any = site.anchor
    if not isinstance(bank, MixedBank):
        return (Group(name=bank_source(model, site), count=len(bank.down_proj)),)
    if bank.copies is not None:
        raise ConversionError(f"the experts of {site.name} have copies already: grow them at once, by times=")
    return bank.groups


def _row(change: Growth, model: nn.Module, site: Site, more: int, name: str) -> Step:
    """Return the row of one bank, which gets ``more`` parameters beside the copies'."""
    bank, top_k, times = site.anchor, top_k_of(model, site.name), change.times
    count, whole = len(bank.get_parameter("down_proj")), size(bank)
    used = whole if top_k is None else round(whole * top_k / count)
    groups, width = write_groups(_groups(model, site)), bank_width(bank)
    route = growth_route(change, ties=change.active == "all" and bank.get_parameter("down_proj").dtype not in SAME)
    return Step.at(
        site, change, groups, name, route, width_before=width, width=width, parameters_before=whole,
        parameters_after=whole * times + more, active_before=used,
        active_after=used * (times if change.active == "all" else 1) + more,
    )  # fmt: skip


def rows_of_one(change: Growth, model: nn.Module, sites: list[Site]) -> tuple[Step, ...]:
    """Return the rows of banks that are to send each token to one copy."""
    _check_alike(model, sites)
    groups = _grown(_groups(model, sites[0]), change.times)
    more = sum(group.count for group in groups) * sites[0].hidden
    return tuple(_row(change, model, site, more, write_groups(groups)) for site in sites)


def _check_alike(model: nn.Module, sites: list[Site]) -> None:
    if len(kinds := {_groups(model, site) for site in sites}) > 1:
        listed = " and ".join(sorted(map(write_groups, kinds)))
        raise ConversionError(f"layers have different experts, {listed}, which a config can't say grown")


def _grown(groups: tuple[Group, ...], times: int) -> tuple[Group, ...]:
    return tuple(replace(group, count=group.count * times) for group in groups)


def entries(change: Growth, model: nn.Module, sites: list[Site]) -> list[ConfigEntry]:
    """Return what the configs are to say: that there are copies, or, where all are active, the family's own numbers."""
    found, groups = [], _groups(model, sites[0])
    mixed = isinstance(sites[0].anchor, MixedBank)
    grown, one = _grown(groups, change.times), change.active == "one"
    experts = ExpertOptions(groups=write_groups(grown), top_k=1, copies=change.times if one else 1).to_dict()
    for config, own in governed(model, sites):
        old = GluConfig.of(config)
        fields = {} if one else grown_fields(config, len(own[0].anchor.get_parameter("down_proj")), change.times)
        if not one and not mixed:
            found.append(
                ConfigEntry(config=config, activations={}, options=getattr(config, "hf_glu", None), fields=fields)
            )
            continue
        dense = old.dense_act or (None if mixed else groups[0].name)
        said = replace(old, dense_act=dense, experts=experts).to_dict()
        names: dict[str | None, str] = {} if mixed else {None: exact_targets(groups[0].name)[0]}
        found.append(ConfigEntry(config=config, activations=names, options=said, fields=fields))
    return found


def grown_fields(config: Any, count: int, times: int) -> dict[str, int]:
    """Return the fields of a family's own that count its experts and those that a token uses, with their new values.

    Raises:
        ConversionError: it has none that is known, or chooses among groups of experts first.
    """
    said = {name: getattr(config, name, None) for name in (*COUNTS, *CHOSEN)}
    found = {name: value for name, value in said.items() if type(value) is int}
    counts = [name for name in COUNTS if found.get(name) == count]
    chosen = [name for name in CHOSEN if name in found]
    if not counts or not chosen:
        raise ConversionError(
            f"{type(config).__name__} has no field that is known to count experts: active='one' needs none"
        )
    groups, kept = (getattr(config, name, None) for name in ("n_group", "topk_group"))
    if isinstance(groups, int) and isinstance(kept, int) and kept < groups:
        raise ConversionError(
            f"{type(config).__name__} chooses {kept} of {groups} groups first, by the best experts in them, which "
            "copies would change: active='one' doesn't"
        )
    return {name: found[name] * times for name in (*counts, *chosen)}


def rows_of_all(change: Growth, model: Any, sites: list[Site]) -> tuple[Step, ...]:
    """Return the rows of banks of whose copies all are to be active."""
    _check_alike(model, sites)
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    for entry in entries(change, model, sites):
        if (mine := copies.get(id(entry.config))) is not None:
            entry.write(mine)
    like = skeleton_of(type(model), config)
    wanted = change.times * len(sites[0].anchor.get_parameter("down_proj"))
    if any(len(bank.anchor.get_parameter("down_proj")) != wanted for bank in find_banks(like)):
        raise ConversionError(f"{type(model).__name__}'s config doesn't say how many experts it has: give active='one'")
    for name, module in model.named_modules():
        _check_tensors(name, module, like, change.times)
    change, name = replace(change, like=like), write_groups(_grown(_groups(model, sites[0]), change.times))
    return tuple(_row(change, model, site, 0, name) for site in sites)


def _check_tensors(name: str, module: nn.Module, like: nn.Module, times: int) -> None:
    """Raise ConversionError where a tensor would become another one than its rows so many times."""
    theirs = dict(_tensors(like.get_submodule(name)))
    for key, tensor in _tensors(module):
        shape = theirs[key].shape if key in theirs else None
        if shape not in (tensor.shape, (times * len(tensor), *tensor.shape[1:])):
            raise ConversionError(
                f"{name}.{key} would be {'absent' if shape is None else list(shape)}, no copies of its rows: "
                "active='one' leaves it alone"
            )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in found if tensor.ndim]


def added(change: Growth, model: nn.Module, steps: tuple[Step, ...]) -> int:
    """Return how many parameters there will be outside of the banks: rows of routers."""
    inside = sum(step.parameters_after - step.parameters_before for step in steps)
    return size(change.like) - size(model) - inside


def apply_one(change: Growth, work: Work, step: Step, utility: Tensor | None) -> None:
    """Give a bank copies of its experts, and the router that chooses among them."""
    site, bank = step.site, step.site.anchor
    groups, layer = _groups(work.model, site), _layer(work.model, site)
    count = len(bank.get_parameter("down_proj"))
    before = sample(layer, site)
    mix_banks([site], GluConfig(experts=ExpertOptions(groups=write_groups(groups), top_k=1).to_dict()))
    bank.groups = _grown(groups, change.times)  # type: ignore[assignment]
    sizes = [group.count for group in groups]
    whose = owners(sizes, change.times, utility)
    owner = owners_in_layer(whose, sizes)
    copy_experts(bank, change.times, owner)
    for act, own in zip(bank.acts, whose, strict=True):  # type: ignore[arg-type]
        copy_responses(act, own)
    assert len(bank.get_parameter("down_proj")) == change.times * count
    compare_layers(site, before, sample(layer, site))
    drop_copies(bank, owner, change.drop, work.generator)


def apply_all(change: Growth, work: Work, step: Step) -> None:
    """Repeat the rows of a layer's experts and router, and have it count them."""
    site, (path, layer) = step.site, _named_layer(work.model, step.site)
    count = len(site.anchor.get_parameter("down_proj"))
    before = sample(layer, site)
    if isinstance(site.anchor, MixedBank):
        site.anchor.groups = _grown(site.anchor.groups, change.times)
    like = change.like.get_submodule(path)
    _repeat(layer, like, change.times)
    follow(layer, like, change.times)
    if before is None:
        raise ConversionError(
            f"{path} can't be run by itself, to see that it stays what it is: active='one' needs none of that"
        )
    compare_layers(site, before, sample(layer, site), ": active='one' leaves it alone")
    owner = torch.arange(count).repeat_interleave(change.times)
    drop_copies(site.anchor, owner, change.drop, work.generator)


def _repeat(module: nn.Module, like: nn.Module, times: int) -> None:
    for name, part in module.named_modules():
        theirs = dict(_tensors(like.get_submodule(name)))
        for key, tensor in _tensors(part):
            if theirs[key].shape != tensor.shape:
                put_rows(part, key, tensor, tensor.detach().repeat_interleave(times, 0))


def follow(module: nn.Module, like: nn.Module, times: int) -> None:
    """Set the numbers that modules keep to those of ``like``, where these are ``times`` as large."""
    for name, part in module.named_modules():
        theirs = vars(like.get_submodule(name))
        for key, value in list(vars(part).items()):
            if type(value) is int and type(theirs.get(key)) is int and theirs[key] == times * value != value:
                setattr(part, key, theirs[key])


def _named_layer(model: nn.Module, site: Site) -> tuple[str, nn.Module]:
    """Return the module around a bank, its router in it, with its path."""
    path = site.name.rpartition(".")[0]
    return path, model.get_submodule(path)


def _layer(model: nn.Module, site: Site) -> nn.Module:
    return _named_layer(model, site)[1]


def drop_copies(bank: Any, owner: Tensor, share: float, generator: torch.Generator) -> None:
    """Draw a share of the units of each copy but an expert's first anew."""
    width = bank_width(bank)
    for expert, first in enumerate(first_of_each(owner)):
        if not share or first:
            continue
        rows, out = bank.gate_up_proj[expert], bank.down_proj[expert]
        rows, out = (rows.T, out.T) if IS_TRANSPOSED.of(bank) else (rows, out)
        halves = [rows[:width], rows[width:]] if is_concatenated(bank) else [rows[::2], rows[1::2]]
        drop_units(halves, out, share, generator)
