"""Folding what hf_glu made into an architecture that stock Transformers has, where one computes the same.

A converted T5 is one of v1.1 (`hf_glu.to_native`), an untouched conversion is dense again (`hf_glu.revert`), and a
family that gates by itself needs no more than the name of a stock activation: a mix that is pure, or a wrapper that has
no effect, is one. What reads stock checkpoints (vLLM, llama.cpp's converter to GGUF) then reads this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_glu import plugin
from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.learnable import mixes
from hf_glu.activation.module import OwnedActivation, innermost
from hf_glu.activation.stock import is_elementwise
from hf_glu.activation.wrapped import shifts
from hf_glu.checkpoint.loading import load_model
from hf_glu.config.registry import core
from hf_glu.conversion import freeze_mix, revert, to_native
from hf_glu.errors import ConversionError, NoSiteError
from hf_glu.ffn.build import owned_activations
from hf_glu.ffn.config_fields import activation_field, plain_name, write_activation
from hf_glu.ffn.context_sites import remove_sources
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.native import MixedBank
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.sites import Site, convertible_sites
from hf_glu.ffn.sparse_linear import SparseLinear
from hf_glu.publishing.export.samples import Outputs, expected_outputs

ELSEWHERE = "export it as onnx or program instead, or keep hf_glu"


def fold(model: Any) -> str:
    """Give ``model``, in place, the parts and the config of the stock architecture that computes the same.

    It is there to be saved: a state-space model can't run afterwards.

    Returns:
        What it is now, such as ``LlamaForCausalLM, hidden_act=silu``.

    Raises:
        NoSiteError: it is stock already.
        ConversionError: no stock architecture computes the same; the message says what is in the way.
    """
    kind, sites = type(model).__name__, convertible_sites(model)
    if find_experts(model) or any(isinstance(module, MixedBank) for module in model.modules()):
        raise ConversionError(f"{kind} has experts of hf_glu's, which no stock architecture has: {ELSEWHERE}")
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ConversionError(
            f"{kind} leaves small entries out (hf_glu.sparsify), which no stock architecture does: sparsify(model, "
            f"keep=1) first, or {ELSEWHERE}"
        )
    if not owned_activations(model) and not any(site.widened for site in sites):
        raise NoSiteError(f"{kind} has nothing of hf_glu's: it is stock already, and loads anywhere as it is")
    if mixes(model):
        freeze_mix(model)
    if any(site.widened for site in sites):
        _fold_dense(model)
    else:
        _fold_native(model, [site for site in sites if site.activation])
        remove_sources(model)
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            vars(config).pop("hf_glu", None)
    field = activation_field(model.config)
    return kind if field is None else f"{kind}, {field}={getattr(model.config, field)}"


def _fold_dense(model: Any) -> None:
    """Give gated FFNs, in families that have none of their own, T5 v1.1's layout or their dense form."""
    reasons = []
    for way in (to_native, revert):
        try:
            way(model)
            return
        except NoSiteError:  # no T5
            continue
        except ConversionError as error:
            reasons.append(str(error))
    raise ConversionError(f"{type(model).__name__} folds into no stock model: {'; '.join(reasons)}; {ELSEWHERE}")


def _fold_native(model: Any, sites: list[Site]) -> None:
    """Give FFNs of families that gate by themselves the stock activation inside of ours."""
    plain = {id(site): _stock_name(site) for site in sites}
    if len(set(plain.values())) > 1:
        raise ConversionError(
            f"its layers have different activations, {', '.join(sorted(set(plain.values())))}, and a stock config "
            f"names one for all: {ELSEWHERE}"
        )
    for site in sites:
        for config in governing_configs(model, site):
            write_activation(config, plain[id(site)])
            config.hf_glu = None
            field = activation_field(config)
            if field is None or plain_name(getattr(config, field)) != plain[id(site)]:
                raise ConversionError(f"a stock {type(config).__name__} can't name {plain[id(site)]}: {ELSEWHERE}")
        inner = innermost(site.act)[1]
        stock = build_elementwise(plain[id(site)]) if isinstance(inner, OwnedActivation) else inner
        site.set_act(stock.train(site.act.training))


def _stock_name(site: Site) -> str:
    """Return the stock activation that a site's own computes."""
    name = core(str(site.activation))
    if not all(shift.neutral() for shift in shifts(site.act)):
        raise ConversionError(
            f"{site.name}: {site.activation} has learned to depend on the text, which no stock activation does: "
            f"{ELSEWHERE}"
        )
    if registry.find(name) is not None or not is_elementwise(name) or (site.kind == "mixer" and name != "silu"):
        raise ConversionError(f"{site.name}: stock has no {site.activation} gate: {ELSEWHERE}")
    return name


def write_folded(model: Any, folder: Path) -> tuple[str, Outputs, Outputs]:
    """Fold a model, save it, and load it again without the plugin.

    Returns:
        What it is now, and the outputs before folding and of the loaded one.

    Raises:
        NoSiteError, ConversionError: see `fold`.
    """
    before, kind = expected_outputs(model), type(model).__name__
    note = fold(model)
    model.save_pretrained(folder)
    with unplugged():
        stock = load_model(folder)
        if odd := sorted(set(model.state_dict()) ^ set(stock.state_dict())):
            raise ConversionError(f"{kind} folds into no stock model: that has no {odd[0]}; {ELSEWHERE}")
        return note, before, expected_outputs(stock)


@contextmanager
def unplugged() -> Iterator[None]:
    """Give Transformers back as it is without hf_glu, inside of the block."""
    before = plugin.is_registered()
    plugin.unregister()
    try:
        yield
    finally:
        if before:
            plugin.register()
