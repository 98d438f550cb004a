"""Small models of many families, what they are given, and what is seen of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from hf_glu.bench.coverage.tiny import UNBUILDABLE, model_types, tiny_inputs, tiny_model

from .formulas import ELEMENTWISE

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

from pico import FAMILIES, NATIVE, make_native

FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj", "act_fn")
FIELDS += ("hidden_act_fn", "ffn_activation", "mlp_hidden_act", "encoder_activation_function", "act")
GATED_FAMILIES = {"gated-gelu": "gelu_new", "gated-silu": "silu"}
SPECIAL = 10  # ids from here on are ordinary ones in all vocabularies


@dataclass(frozen=True)
class Source:
    """A model to start from.

    Attributes:
        kind: ``pico``, ``native`` (both of `tests/helpers/pico.py`) or ``tiny`` (`hf_glu.bench.coverage.tiny`).
        family: a key there.
        head: its class; None: the first.
        activation: another one than the family's own.
        seed: of its weights.
    """

    kind: str
    family: str
    head: str | None = None
    activation: str | None = None
    seed: int = 0


def draw_source(random: Random) -> Source:
    """Return any source, half of them of the families that most people use."""
    seed, chance = random.randrange(1000), random.random()
    acts = (None, None, "relu", "silu", "gelu", "gelu_new", "quick_gelu", "relu2", "tanh")
    if chance < 0.5:
        family = random.choice(sorted(FAMILIES))
        heads = [head for head in FAMILIES[family].heads if "MultipleChoice" not in head]
        return Source("pico", family, random.choice(heads), random.choice(acts), seed)
    if chance < 0.65:
        family = random.choice(sorted(NATIVE))
        return Source("native", family, None, None if family.startswith("t5") else random.choice(acts), seed)
    return Source("tiny", random.choice(sorted(set(model_types()) - set(UNBUILDABLE))), seed=seed)


def make(source: Source) -> Any:
    """Return the model in eval mode."""
    if source.kind == "pico":
        family = FAMILIES[source.family]
        more = {} if source.activation is None else {family.field: source.activation}
        return family.make(source.head, source.seed, **more)
    if source.kind == "native":
        field = NATIVE[source.family][3]
        return make_native(source.family, **({} if source.activation is None else {field: source.activation}))
    return tiny_model(source.family, seed=source.seed)


def own_activation(model: Any) -> str:
    """Return the elementwise activation that the config names, GELU where it names none."""
    for config in (model.config, model.config.get_text_config(), model.config.get_text_config(decoder=True)):
        for field in FIELDS:
            name = getattr(config, field, None)
            if isinstance(name, str):
                name = GATED_FAMILIES.get(name, name)
                if name in ELEMENTWISE:
                    return name
    return "gelu"


def inputs_of(model: Any, seed: int = 0, batch: int = 2, length: int = 9) -> dict[str, Any]:
    """Return random token ids; what else a family needs is the same each time."""
    inputs, generator = tiny_inputs(model), torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    vocabulary, eos = getattr(config, "vocab_size", 99), getattr(config, "eos_token_id", None)
    if inputs.keys() - {"input_ids", "decoder_input_ids"}:
        return inputs
    if getattr(config, "pad_token_id", None) is None:  # with which a classifier would find the last token
        batch = 1
    for key in inputs:
        inputs[key] = torch.randint(min(SPECIAL, vocabulary - 1), vocabulary, (batch, length), generator=generator)
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is not None and 0 <= eos < vocabulary:  # where BART's classifier looks
        inputs["input_ids"][:, -1] = eos
    return inputs


@torch.no_grad()
def aligned(model: Any) -> Any:
    """Return a loaded model with its tensors moved: those in a file aren't aligned, and GEMMs may round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the floating-point outputs."""
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    found = model.eval()(**given)
    return {
        key: value.clone() for key, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()
    }


def snapshot(model: Any) -> dict[str, Any]:
    """Return copies of all that a conversion may change: tensors, what is trained, the config, the modules' classes."""
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": model.config.to_dict(),
        "modules": {name: type(module) for name, module in model.named_modules()},
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return which parts of two snapshots differ."""
    found = [key for key in ("trained", "config", "modules") if before[key] != after[key]]
    if not same_tensors(before["tensors"], after["tensors"]):
        found.append("tensors")
    return found


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two mappings hold the same tensors, bit by bit, NaN being NaN."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(_bits(first[key]), _bits(second[key])) for key in first
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return max |difference| over all outputs, relative to the largest value where that exceeds 1."""
    if first.keys() != second.keys() or any(first[key].shape != second[key].shape for key in first):
        return float("inf")
    worst = 0.0
    for key, value in first.items():
        if value.numel():
            off = (value.double() - second[key].double()).abs()
            same = (value == second[key]) | (value.isnan() & second[key].isnan())
            scale = max(1.0, float(value.double().nan_to_num(posinf=0, neginf=0).abs().max()))
            worst = max(worst, float(torch.where(same, 0.0, off).nan_to_num(nan=float("inf")).max()) / scale)
    return worst
