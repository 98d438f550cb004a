"""Converting a dense checkpoint while Transformers loads it into a gated model, through its own weight conversion.

``from_pretrained(DENSE, hidden_act="geglu")`` names the gate and, in ``config.hf_glu``, remembers the activation that
the checkpoint had (`remember_dense`); the weights of each widened in-projection then go through `Widen`, which leaves
alone what has the right shape already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D

from hf_glu.activation import is_elementwise, registry
from hf_glu.activation.learnable import mix_options
from hf_glu.config import GluConfig
from hf_glu.errors import ConversionError
from hf_glu.layers.fields import activation_field, activation_of, plain_name
from hf_glu.layers.sites import Site, find_sites
from hf_glu.layers.source import governing_configs
from hf_glu.registry import GATED, LEARNABLE
from hf_glu.routes import APPROXIMATE, Route, find_route, mix_route


def remember_dense(config: Any, loaded: Mapping[str, Any]) -> None:
    """Note in ``config.hf_glu`` what a conversion while loading needs, where an override has made the activation ours.

    Args:
        config: after the override.
        loaded: what the checkpoint's ``config.json`` says.
    """
    field, target = activation_field(config), activation_of(config)
    entry = registry.find(target)
    if field is None or entry is None or GATED not in entry.flags or str(getattr(config, field)).startswith("gated-"):
        return
    source = plain_name(loaded.get(field, getattr(type(config), field, None)))
    if source is None or source == target or not is_elementwise(source) or GluConfig.of(config).dense_act:
        return
    route = exact_route(source, str(target))
    if route is None:
        return
    options = GluConfig.of(config)
    noted = {"dense_act": source, **({"bias": True} if route.up_bias else {}), **options.to_dict()}
    if LEARNABLE in entry.flags:
        noted["mix"] = mix_options([source], [entry.name], options.mix)
    config.hf_glu = GluConfig.from_dict(noted).to_dict()


def exact_route(source: str, target: str) -> Route | None:
    """Return the route from ``source`` to ``target``, None where there is no exact one."""
    if LEARNABLE in registry[target].flags:
        return mix_route(source, gated=True)
    try:
        route = find_route(source, target)
    except ConversionError:
        return None
    return None if route.promise == APPROXIMATE else route


class Widen(ConversionOps):
    """A dense in-projection's weight or bias as ``[gate | up]``, where the model wants that shape."""

    def __init__(self, route: Route, *, transposed: bool, bias: bool, adds_bias: bool) -> None:
        self.route, self.transposed, self.bias, self.adds_bias = route, transposed, bias, adds_bias

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Widen the one tensor of ``input_dict``."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        wanted = kwargs["model"].get_parameter_or_buffer(kwargs["full_layer_name"]).shape
        dim = int(self.transposed and not self.bias)
        if tensor.shape == wanted or 2 * tensor.shape[dim] != wanted[dim]:
            return {target_patterns[0]: tensor}
        converted = {target_patterns[0]: self.route.widen(tensor, bias=self.bias, dim=dim)}
        if self.adds_bias:
            zeros = tensor.new_zeros(tensor.shape[dim])
            converted[target_patterns[1]] = self.route.widen(zeros, bias=True)
        return converted


def converters(model: Any) -> list[WeightConverter]:
    """Return the conversions for the widened in-projections of ``model`` whose dense activation is known."""
    found: dict[str, list[WeightConverter]] = {}
    routes: dict[str, Route] = {}
    for site in find_sites(model):
        dense = GluConfig.of(governing_configs(model, site)[0]).dense_act
        route = exact_route(dense, str(site.activation)) if site.widened and dense else None
        if route is not None and not routes.setdefault(site.row.in_proj, route).same_weights(route):
            raise ConversionError(
                f"{site.name}: its layers convert in different ways, which loading can't do: hf_glu.convert can"
            )
        if route is not None and site.row.in_proj not in found:
            found[site.row.in_proj] = _site_converters(site, route)
    return [converter for made in found.values() for converter in made]


def _site_converters(site: Site, route: Route) -> list[WeightConverter]:
    weight, bias = f"{site.row.in_proj}.weight", f"{site.row.in_proj}.bias"
    transposed = isinstance(site.in_proj, Conv1D)
    if site.in_proj.bias is not None and site.out_proj.bias is None:  # the bias is the conversion's own: T5
        op = Widen(route, transposed=transposed, bias=False, adds_bias=True)
        return [WeightConverter([weight], [weight, bias], [op])]
    kinds = ((weight, False), (bias, True))
    return [
        WeightConverter([key], [key], [Widen(route, transposed=transposed, bias=is_bias, adds_bias=False)])
        for key, is_bias in kinds
        if not is_bias or site.in_proj.bias is not None
    ]


def forget_converters(model: Any) -> None:
    """Drop our conversions from what the model remembers of its loading: saving must not undo them."""
    remembered = getattr(model, "_weight_conversions", None)
    if remembered:
        kept = [made for made in remembered if not any(isinstance(op, Widen) for op in getattr(made, "operations", []))]
        model._weight_conversions = kept or None
