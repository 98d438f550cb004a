"""Putting a constant modulation into the weights of a model: thresholds into biases, slopes into rows.

Shapes: H hidden size, W channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.compat.of_models import FROM_CONFIG
from hf_glu.errors import ConversionError
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.linear import LINEAR, AnyLinear, weight_rows
from hf_glu.ffn.sites import Site, follow
from hf_glu.instruments.pre_activations import gate_rows
from hf_glu.instruments.probe import max_abs_difference, probe_inputs, try_run
from hf_glu.instruments.steering.attached import GateShift
from hf_glu.instruments.steering.places import gate_places

# what families call the entry of their config that gives an FFN's projections biases, the narrowest first
BIAS_FIELDS = ("mlp_bias", "use_mlp_bias", "ffn_bias", "use_bias", "bias", "enable_bias")
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of outputs, relative to the largest where that is above 1
HALF = 0.1  # of half precision


def fold_gates(
    model: Any, shifts: Mapping[str, GateShift], strength: float, *, compared: AbstractContextManager[None] | None
) -> None:
    """Fold ``shifts``, by the names of gates, into ``model`` in place.

    Args:
        model: the model.
        shifts: of its gates.
        strength: of all.
        compared: the block within which the model computes what it has to compute afterwards; None: isn't compared.

    Raises:
        ConversionError: see `GateSteering.fold`. Nothing is changed.
    """
    sites = {name: site for name, site in gate_places(model).items() if name in shifts}
    for name, site in sites.items():
        if gate_rows(site)[0].weight.device.type == "meta":
            raise ConversionError(f"{name}: its weights aren't in memory (offloaded): load the model whole to fold")
        if not all(isinstance(follow(model, part), LINEAR) for part in site.parts):
            raise ConversionError(f"{name}: PEFT has wrapped its projections: model.merge_and_unload() first")
    biases = _missing_biases(model, sites)
    inputs = probe_inputs(model) if compared is not None else None
    expected = None
    if compared is not None:
        assert inputs is not None
        with compared:
            expected = try_run(model, inputs)
    undo = [(linear, linear.weight.detach().clone(), _clone(linear.bias)) for linear in _linears(sites)]
    for linear in biases.linears:
        linear.bias = nn.Parameter(_zeros(linear), requires_grad=linear.weight.requires_grad)
    for name, site in sites.items():
        fold_gate(site, shifts[name], strength)
    if expected is not None and inputs is not None and (worst := _worst(expected, try_run(model, inputs))) > 1:
        for linear in biases.linears:
            linear.bias = None
        for linear, weight, bias in undo:
            linear.weight.data = weight
            if bias is not None and linear.bias is not None:
                linear.bias.data = bias
        raise ConversionError(
            f"{type(model).__name__} folded isn't {type(model).__name__} steered: its outputs differ by {worst:.1f} "
            "times what rounding does, since something beside its in-projections makes its gates"
        )
    biases.write()


@torch.no_grad()
def fold_gate(site: Site, shift: GateShift, strength: float) -> None:
    """Fold the modulation of one gate into its projection: rows of ``weight`` ``[., H]`` and ``bias``."""
    linear, begin = gate_rows(site)
    rows, width = weight_rows(linear)[begin : begin + site.width], site.width
    threshold, slope = shift.at(strength, rows.new_empty(0, dtype=torch.float64))
    assert linear.bias is not None
    bias = linear.bias[begin : begin + width]
    moved = bias.double() - threshold
    if slope is not None:
        moved = moved * slope
        rows.copy_(rows.double() * slope.unsqueeze(1))
    bias.copy_(moved)


class _Biases:
    """Biases that a model gets, and the entries of its configs that say so."""

    def __init__(self) -> None:
        self.linears: list[AnyLinear] = []
        self.entries: list[tuple[Any, str]] = []

    def write(self) -> None:
        """Write the entries."""
        for config, entry in self.entries:
            setattr(config, entry, True)


def _missing_biases(model: Any, sites: Mapping[str, Site]) -> _Biases:
    """Return the biases that gates lack, with all others that the entry of the config stands for.

    Raises:
        ConversionError: the family has no such entry.
    """
    found = _Biases()
    lacking = {name: site for name, site in sites.items() if gate_rows(site)[0].bias is None}
    if not lacking:
        return found
    first, site = next(iter(lacking.items()))
    config = governing_configs(model, site)[0]
    entry = next((name for name in BIAS_FIELDS if getattr(config, name, None) is False), None)
    advice = "keep the modulation beside the model (save, load), or convert its gates: hf_glu.convert gives T5 biases"
    if entry is None:
        raise ConversionError(
            f"{first}: its in-projection has no bias, and a {type(config).__name__} has no entry that gives it one: "
            f"{advice}"
        )
    models = [part for part in model.modules() if hasattr(type(part), "post_init")]
    inner = next(part for part in models if part.config is config)
    for name in _added(inner, config, entry):
        owner, _, kind = name.rpartition(".")
        linear: Any = inner.get_submodule(owner)
        if kind != "bias" or not isinstance(linear, LINEAR):
            raise ConversionError(f"{first}: {entry}=True gives {type(inner).__name__} {name}, too: {advice}")
        found.linears.append(linear)
    given = {id(linear) for linear in found.linears}
    if odd := next((name for name, site in lacking.items() if id(gate_rows(site)[0]) not in given), None):
        raise ConversionError(f"{odd}: its in-projection has no bias, and {entry}=True gives it none: {advice}")
    found.entries = [(part, entry) for part in _same_configs(model, config, entry)]
    return found


def _added(inner: Any, config: Any, entry: str) -> list[str]:
    """Return the names of what a model has with an entry of its config, and hasn't without it."""
    other = copy.deepcopy(config)
    setattr(other, entry, True)
    with torch.device("meta"):
        built = FROM_CONFIG.of(type(inner))(other)
    return sorted(set(built.state_dict()) - set(inner.state_dict()))


def _same_configs(model: nn.Module, config: Any, entry: str) -> Iterator[Any]:
    """Yield the config that an entry is written to, and copies of it in the model's parts."""
    seen: set[int] = set()
    for part in model.modules():
        own = getattr(part, "config", None)
        if type(own) is type(config) and id(own) not in seen and getattr(own, entry, None) is False:
            seen.add(id(own))
            yield own


def _linears(sites: Mapping[str, Site]) -> list[AnyLinear]:
    return [gate_rows(site)[0] for site in sites.values()]


def _clone(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _zeros(linear: AnyLinear) -> Tensor:
    """Return a bias of 0 for a projection."""
    return linear.weight.new_zeros(weight_rows(linear).shape[0])


def _worst(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return the largest difference of outputs, in units of what is allowed."""
    differences = max_abs_difference(expected, found)
    allowed = {
        key: TOLERANCE.get(value.dtype, HALF) * max(1.0, float(value.abs().max())) for key, value in expected.items()
    }
    return max(difference / allowed[key] for key, difference in differences.items())
