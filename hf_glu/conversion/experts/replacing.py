"""What all changes have in common that put experts of ours in FFNs' places."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from hf_glu.activation.stock import is_elementwise
from hf_glu.config.experts import ExpertOptions
from hf_glu.config.glu import GluConfig
from hf_glu.config.router_fields import router_fields
from hf_glu.conversion.experts.copying import Source, read_source
from hf_glu.conversion.forms import ConfigEntry, governed, selection_of, size
from hf_glu.conversion.routes import Route
from hf_glu.conversion.steps import Change, Rows, Step
from hf_glu.errors import ConversionError
from hf_glu.ffn.build import give_dense_configs
from hf_glu.ffn.config_fields import activation_field
from hf_glu.ffn.expert_sites import make_experts
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.losses import watch
from hf_glu.ffn.sites import Site, convertible_sites, find_sites
from hf_glu.instruments.routing import active_parameters


@dataclass(frozen=True, kw_only=True)
class ExpertChange(Change, abstract=True):
    """Put experts in the places of FFNs.

    Attributes:
        options: the experts.
        acts: options of their activations.
        bias: whether they have biases: a config says it of all.
    """

    options: ExpertOptions
    acts: GluConfig = field(default_factory=GluConfig)
    bias: bool = False
    replaces: ClassVar[bool] = True

    def read(self, model: nn.Module, sites: list[Site]) -> list[Source]:
        """Return the FFNs at ``sites``; raise ConversionError where others are converted: a config can't say both."""
        names = {site.name for site in sites}
        other = next((site for site in find_sites(model) if site.activation and site.name not in names), None)
        if other is not None:
            raise ConversionError(f"{other.name} is converted to {other.activation}: experts and others can't be mixed")
        return [read_source(model, site) for site in sites]

    def row(self, source: Source, target: str, route: Route, *, width: int, **more: Any) -> Step:
        """Return the row of one FFN, with the parameters of experts of ``width`` as they will be built."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = ExpertFFN(source.site.hidden, width, self.options, bias=self.bias, acts=self.acts)
        more |= {"width_before": source.width, "width": source.width}
        more |= {"parameters_after": size(made), "active_after": active_parameters(made)}
        return Step.at(source.site, self, source.name, target, route, **more)

    def make(self, source: Source, *, width: int) -> ExpertFFN:
        """Return fresh experts for one FFN."""
        return make_experts(source.site, self.options, bias=self.bias, width=width, acts=self.acts)

    def entries(self, model: nn.Module, planned: Rows) -> list[ConfigEntry]:
        """Return what the configs are to say: which layers have experts, and which; the name is one of ours."""
        sources = {step.site.name: read_source(model, step.site) for step in planned.steps}
        target, entries = planned.steps[0].target, []
        for config, every in governed(model, convertible_sites(model)):
            sites = [site for site in every if site.name in sources]
            if not sites:
                continue
            old, here = GluConfig.of(config), [sources[site.name] for site in sites]
            written = GluConfig(
                activation=None if activation_field(config, sites[0].stack) else target,
                dense_act=old.dense_act or (here[0].name if is_elementwise(here[0].name) else None),
                bias=True if self.bias and not all(source.wholly_biased for source in here) else old.bias,
                layers=selection_of(sites, every),
                mix=self.acts.mix,
                sections=self.acts.sections,
                width=old.width,
                experts=self.options.to_dict(),
            )
            own, said = router_fields(config, self.options), written.to_dict()
            stacks = dict.fromkeys((site.stack for site in sites), target)
            entries.append(ConfigEntry(config=config, activations=stacks, options=said, fields=own))
        return entries

    def finish(self, model: nn.Module, planned: Rows) -> None:
        """Make the model add its new routers' losses, and leave the dense name to whoever looks one up."""
        dense = planned.steps[0].source
        give_dense_configs(model, dense if is_elementwise(dense) else "gelu")
        watch(model)
