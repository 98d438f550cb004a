"""What loading a converted model would build, seen before anything is converted.

The configs are written on a copy, which goes through JSON as saving does it; the model's class then builds the model
that they say, without weights. A conversion that would not come back is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_glu.compat.of_models import FROM_CONFIG, META_SAFE
from hf_glu.conversion.forms import Form, form_of, has_bias
from hf_glu.conversion.steps import Rows, Step
from hf_glu.errors import CheckpointError, ConversionError, HfGluError
from hf_glu.ffn.build import native_gate
from hf_glu.ffn.families import NAME_ATTRIBUTES
from hf_glu.ffn.sites import convertible_sites, follow

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
LINE = 200  # letters of another's message


def forms_after(model: nn.Module, planned: Rows) -> dict[str, Form]:
    """Return what each FFN is after a conversion, by its site's name."""
    steps = {step.site.name: step for step in planned.steps if step.changes}
    return {
        site.name: _after(steps[site.name]) if site.name in steps else form_of(model, site)
        for site in convertible_sites(model)
    }


def _after(step: Step) -> Form:
    site = step.site
    name = native_gate(step.target) if site.native else step.target
    gated = site.kind == "dense" and (site.widened or step.gated)
    bias = has_bias(site) or step.adds_bias
    return Form(activation=name, width=step.width, widened=gated, bias=bias)


def foresee(model: Any, expected: Mapping[str, Form], write: Callable[[Mapping[int, Any]], None]) -> str | None:
    """Return how the model would come back otherwise than ``expected``, None where it wouldn't.

    Args:
        model: the model, which stays as it is.
        expected: its FFNs after the conversion.
        write: writes the conversion into copies of the model's configs, given as {id of the config: its copy}.
    """
    if not hasattr(type(model), FROM_CONFIG.name) or "swiglu" not in ACT2FN:
        return None  # no class of Transformers' to load it again, or nothing here that would build gated FFNs
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    write(copies)
    skeleton = skeleton_of(type(model), config)
    if (wrong := _difference(expected, skeleton)) is not None:
        return wrong
    mine, theirs = _other_activations(model), _other_activations(skeleton)
    for name, act in mine.items():
        if name in theirs and not _alike(act, theirs[name]):
            return f"{name}, which is to stay {_called(act)}, would load as {_called(theirs[name])}"
    return None


def _other_activations(model: nn.Module) -> dict[str, nn.Module | str]:
    """Return the activations outside FFNs, as a head's or a mixer's, by path: modules, and names that modules keep."""
    sites = {id(follow(site.anchor, site.row.act)) for site in convertible_sites(model)}
    found: dict[str, nn.Module | str] = {}
    for name, part in model.named_modules():
        if type(part).__module__.startswith(ACTIVATIONS) and id(part) not in sites:
            found[name] = part
        found |= {
            f"{name}.{key}": part.__dict__[key] for key in NAME_ATTRIBUTES if isinstance(part.__dict__.get(key), str)
        }
    return found


def _alike(first: nn.Module | str, second: nn.Module | str) -> bool:
    """Return whether two activations are of one class or name, or give the same values."""
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    x = torch.linspace(-6.0, 6.0, 97)
    return type(first) is type(second) or bool(torch.allclose(first(x), second(x)))


def _called(act: nn.Module | str) -> str:
    return act if isinstance(act, str) else type(act).__name__


def check_comes_back(model: Any) -> None:
    """Raise ConversionError where loading would build another model than ``model`` is, by its configs as they are."""
    if not hasattr(type(model), FROM_CONFIG.name) or "swiglu" not in ACT2FN:
        return
    skeleton = skeleton_of(type(model), copy.deepcopy(model.config))
    mine, theirs = ({key: tuple(part.shape) for key, part in made.state_dict().items()} for made in (model, skeleton))
    for key in {**mine, **theirs}:
        if mine.get(key) != theirs.get(key):
            raise ConversionError(f"{key} would be {mine.get(key, 'absent')}, and load as {theirs.get(key, 'absent')}")
    forms = {site.name: form_of(model, site) for site in convertible_sites(model)}
    if (wrong := _difference(forms, skeleton)) is not None:
        raise ConversionError(wrong)


def check_saved(model: Any) -> None:
    """Raise CheckpointError where a model's FFNs have other activations than the config that it is saved with says.

    So it is where a body is shared with a model that was converted, or layers were taken out of one that was converted
    by layer. Shapes aren't looked at, which wrappers may have split, nor classes that can't be built of a config alone.
    """
    try:
        skeleton = skeleton_of(type(model), copy.deepcopy(model.config))
    except ConversionError:
        return
    found = {site.name: form_of(skeleton, site) for site in convertible_sites(skeleton)}
    for site in convertible_sites(model):
        there, now = found.get(site.name), form_of(model, site)
        if there is not None and not replace(now, width=there.width, bias=there.bias).same(there):
            raise CheckpointError(
                f"{site.name} is {now.activation}, and would load as {there.activation}, which the config of "
                f"{type(model).__name__} says: the FFN was converted, or moved, without it"
            )


def _difference(expected: Mapping[str, Form], skeleton: nn.Module) -> str | None:
    """Return which FFN of a built model is another than expected, None where none is."""
    found = {site.name: form_of(skeleton, site) for site in convertible_sites(skeleton)}
    for name, form in expected.items():
        if name not in found or not form.same(found[name]):
            return f"{name} would be {form}, and load as {found.get(name, 'no FFN')}"
    return None


def skeleton_of(model_class: Any, config: Any) -> nn.Module:
    """Return what ``model_class`` builds of ``config`` after a file, on the meta device.

    Raises:
        ConversionError: it can't build it.
    """
    try:
        read = type(config).from_dict(json.loads(config.to_json_string(), object_hook=_number))
        with torch.random.fork_rng(devices=[]), torch.device("meta"), META_SAFE.find_or(nullcontext)():
            made: Any = FROM_CONFIG.of(model_class)(read)
            made.initialize_weights()  # as loading does with what a file lacks: a family may reach into its FFNs
        _check_ties(made)
    except HfGluError:
        raise
    except Exception as error:  # of any model's code: weights that it ties by names, for one
        line = (str(error).splitlines() or [""])[0]
        base = getattr(model_class, "base_model_prefix", "")
        hint = f"; its base model can be converted (.{base})" if base and "positional argument" in line else ""
        raise ConversionError(f"{model_class.__name__} can't be built as it would be: {line[:LINE]}{hint}") from error
    return made


def _check_ties(model: Any) -> None:
    """Raise ConversionError where layers that share weights by names have buffers, which Transformers can't share."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    tied = next((key for key in getattr(model, "all_tied_weights_keys", None) or {} if key in buffers), None)
    if tied is not None:
        raise ConversionError(
            f"{type(model).__name__}'s layers share all they have by names, and {tied} is no parameter, which is all "
            "that can be shared so: choose an activation without such a state"
        )


def _number(value: dict[str, Any]) -> Any:
    """Return the number that Transformers writes as a mapping, since JSON has no infinity."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
