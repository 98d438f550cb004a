"""Converting a dense checkpoint while Transformers loads it into a gated model, through its own weight conversion.

``from_pretrained(DENSE, hidden_act="geglu")`` names the gate and, in ``config.hf_glu``, remembers the activation that
the checkpoint had (`remember_dense`); the weights of each widened in-projection then go through `Widened`, which leaves
alone what has the right shape already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from hf_glu.activation import registry
from hf_glu.activation.learnable import mix_options
from hf_glu.activation.stock import is_elementwise, same_function
from hf_glu.compat.of_others import CONVERSION_OPS, CONVERTER, REMEMBERED
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, LEARNABLE, Activation, core
from hf_glu.conversion.routes import APPROXIMATE, Route, find_route, mix_route
from hf_glu.errors import CheckpointError, ConversionError
from hf_glu.ffn.completeness import activations_in, checkpoint_config, names_in
from hf_glu.ffn.config_fields import GATED_PREFIX, activation_fields, default_activation, plain_name
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.sites import Site, find_sites


def remember_dense(config: Any, loaded: Mapping[str, Any]) -> None:
    """Note in ``config.hf_glu`` what a conversion while loading needs, where an override has made the activation ours.

    Args:
        config: after the override.
        loaded: what the checkpoint's ``config.json`` says.
    """
    for field in activation_fields(config):
        source, target = loaded.get(field, getattr(type(config), field, None)), getattr(config, field)
        if not str(source).startswith(GATED_PREFIX) and not target.startswith(GATED_PREFIX) and source != target:
            _note(config, plain_name(source), registry.find(target))


def _note(config: Any, source: str | None, target: Activation | None) -> None:
    """Note the activation ``source`` that the checkpoint has, where there is an exact route to the model's own."""
    options = GluConfig.of(config)
    if source is None or target is None or GATED not in target.flags or options.dense_act:
        return
    had = registry.find(source)
    if had is not None and GATED in had.flags:  # gated already: only a mix has to know where to start
        if LEARNABLE in target.flags and had.gate and LEARNABLE not in had.flags and options.mix is None:
            mix = mix_options([core(source)], [target.name], None)
            config.hf_glu = GluConfig.from_dict({**options.to_dict(), "mix": mix}).to_dict()
        return
    route = exact_route(source, target.name) if is_elementwise(source) else None
    if route is None:
        return
    noted = {"dense_act": source, **({"bias": True} if route.up_bias else {}), **options.to_dict()}
    if LEARNABLE in target.flags:
        noted["mix"] = mix_options([source], [target.name], options.mix)
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


class Widened(CONVERSION_OPS.find_or(object)):  # type: ignore[misc]
    """A dense in-projection's weight or bias as ``[gate | up]``, where the model wants that shape.

    Args:
        routes: how the in-projection of each path is widened; those of other paths stay as they are.
        transposed, bias: of the tensor.
        adds_bias: whether the weight brings the bias along that the route needs.

    Attributes:
        widened: the paths of those that were.
    """

    def __init__(self, routes: Mapping[str, Route], *, transposed: bool, bias: bool, adds_bias: bool) -> None:
        self.routes, self.transposed, self.bias, self.adds_bias = routes, transposed, bias, adds_bias
        self.widened: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Widened:
        """Return itself: Transformers makes a copy for every tensor, and what was widened is told of all."""
        return self

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Widen the one tensor of ``input_dict``."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        name = kwargs["full_layer_name"]
        wanted = kwargs["model"].get_parameter_or_buffer(name).shape
        route = self.routes.get(name.rpartition(".")[0])
        dim = int(self.transposed and not self.bias)
        if route is None or tensor.shape == wanted or 2 * tensor.shape[dim] != wanted[dim]:
            return {target_patterns[0]: tensor}
        self.widened.add(name.rpartition(".")[0])
        converted = {target_patterns[0]: route.widen(tensor, bias=self.bias, dim=dim)}
        if self.adds_bias:
            zeros = tensor.new_zeros(tensor.shape[dim])
            converted[target_patterns[1]] = route.widen(zeros, bias=True)
        return converted


def converters(model: Any) -> list[Any]:
    """Return the conversions for the widened in-projections of ``model`` whose dense activation is known."""
    found: dict[str, dict[str, Route]] = {}
    first: dict[str, Site] = {}
    for site in find_sites(model):
        dense = GluConfig.of(governing_configs(model, site)[0]).dense_act if site.widened else None
        route = exact_route(dense, str(site.activation)) if dense else None
        if route is not None and not (route.up_bias and site.in_proj.bias is None):  # else there is no place for up = 1
            first.setdefault(site.row.in_proj, site)
            found.setdefault(site.row.in_proj, {})[site.parts[-2]] = route
    return [converter for row, routes in found.items() for converter in _site_converters(first[row], routes)]


def _site_converters(site: Site, routes: Mapping[str, Route]) -> list[Any]:
    weight, bias = f"{site.row.in_proj}.weight", f"{site.row.in_proj}.bias"
    transposed = isinstance(site.in_proj, Conv1D)
    if site.in_proj.bias is not None and site.out_proj.bias is None:  # the bias is the conversion's own: T5
        op = Widened(routes, transposed=transposed, bias=False, adds_bias=True)
        return [CONVERTER.find()([weight], [weight, bias], operations=[op])]
    kinds = ((weight, False), (bias, True))
    return [
        CONVERTER.find()(
            [key], [key], operations=[Widened(routes, transposed=transposed, bias=is_bias, adds_bias=False)]
        )
        for key, is_bias in kinds
        if not is_bias or site.in_proj.bias is not None
    ]


def forget_converters(model: Any) -> set[str]:
    """Drop our conversions from what the model remembers of its loading; return the in-projections that were widened.

    Saving must not undo them.
    """
    remembered = REMEMBERED.of(model, None) or []
    ops = {id(made): [op for op in getattr(made, "operations", []) if isinstance(op, Widened)] for made in remembered}
    if any(ops.values()):
        REMEMBERED.put(model, [made for made in remembered if not ops[id(made)]] or None)
    return {path for found in ops.values() for op in found for path in op.widened}


def is_as_stored(model: Any, load_config: Any) -> bool:
    """Return whether the checkpoint that is being loaded names the activations and options that the model has."""
    said = checkpoint_config(load_config)
    now = model.config.to_dict()
    return said is None or (names_in(said) == names_in(now) and said.get("hf_glu") == now.get("hf_glu"))


def check_source(model: Any, load_config: Any, widened: set[str]) -> None:
    """Raise where in-projections were widened for another dense activation than the checkpoint says that it has.

    Raises:
        CheckpointError: it says another one.
    """
    said = checkpoint_config(load_config) if widened else None
    if said is None:
        return
    has = set(activations_in(said)) or {default_activation(model.config)}
    for site in find_sites(model):
        dense = GluConfig.of(governing_configs(model, site)[0]).dense_act
        if site.parts[-2] in widened and not any(same_function(str(dense), name) for name in has):
            raise CheckpointError(
                f"{load_config.pretrained_model_name_or_path} has {', '.join(sorted(has))}, but config.hf_glu says "
                f"that its dense activation is {dense}: load it as it is "
                f"and call hf_glu.convert(model, {site.activation!r})"
            )
