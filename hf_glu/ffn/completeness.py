"""Whether a checkpoint has what the FFNs of the model need that it is loaded into, and nothing that they leave out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_glu.activation import registry
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.stock import same_function
from hf_glu.compat.of_models import IGNORE_UNEXPECTED, INITIALIZED
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import MODULATED, core
from hf_glu.errors import CheckpointError
from hf_glu.ffn.build import owned_activations
from hf_glu.ffn.config_fields import activation_of, configs_of, default_activation, plain_name
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.families import ACTIVATION_FIELDS
from hf_glu.ffn.sites import convertible_sites, find_banks

SOURCE = "context_source"  # where a layer keeps what its stack's context vector is made by


def refuse_losses(model: Any, load_config: Any, loading_info: Any) -> None:
    """Raise where a checkpoint and the model don't have the same weights in their FFNs, whatever the caller ignores.

    Transformers would fill at random what is missing, and drop what has no place, with no more than a report. Only what
    an activation of ours adds without effect at first (a mix at its first function, a state's alpha of 0) may be new.

    Raises:
        CheckpointError: they don't, and the model or the checkpoint has an activation of ours.
    """
    missing = _untied(model, loading_info.missing_keys)
    mismatched = {key: (list(found), list(wanted)) for key, found, wanted in loading_info.mismatched_keys}
    unexpected = _unmatched(loading_info.unexpected_keys, IGNORE_UNEXPECTED.of(model))
    if not (missing or mismatched or unexpected) or _no_checkpoint(model, missing, unexpected):
        return
    sites = [*convertible_sites(model), *find_banks(model)]
    projections = {path for site in sites for path in site.parts} | set(find_experts(model))
    activations = {f"{site.path}.{site.row.act}".removeprefix(".") for site in sites}
    activations |= {name for name, _ in owned_activations(model)}
    keys = {*missing, *mismatched, *unexpected}
    if not any(_within(key, projections | activations) or SOURCE in key.split(".") for key in keys):
        return
    said = checkpoint_config(load_config)
    if not (_has_ours(model) or names_in(said)):
        return
    wrong = {
        key: f"is {found} in the checkpoint, but the model needs {want}" for key, (found, want) in mismatched.items()
    }
    wrong |= dict.fromkeys(sorted(unexpected), "is in the checkpoint, but has no place in the model")
    lacked = dict.fromkeys(sorted(missing), "isn't in the checkpoint")
    bad = {key: why for key, why in {**wrong, **lacked}.items() if _within(key, projections)}
    bad |= {key: why for key, why in wrong.items() if _within(key, activations) or SOURCE in key.split(".")}
    bad |= {key: lacked[key] for key in sorted(_known_before(model, missing, said))}
    if bad:
        key, name = next(iter(bad)), activation_of(model.config) or "swiglu"
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{load_config.pretrained_model_name_or_path}: {key} {bad[key]}{more}: {name} with the options in "
            f"config.hf_glu is another FFN. To turn a dense checkpoint into a gated model, load it as it is and call "
            f"hf_glu.convert(model, {name!r}), or run `hf-glu convert SRC DST --to {name}`"
        )


def checkpoint_config(load_config: Any) -> Mapping[str, Any] | None:
    """Return what the ``config.json`` of the checkpoint that is being loaded says, None where there is none."""
    source = load_config.pretrained_model_name_or_path
    if source is None:
        return None
    try:
        found: Mapping[str, Any] = PreTrainedConfig.get_config_dict(source, **(load_config.download_kwargs or {}))[0]
    except (OSError, ValueError):
        return None
    return found


def activations_in(said: Any) -> Iterator[str]:
    """Yield the activations that a config and those inside of it name, read as plain data."""
    for key, value in said.items() if isinstance(said, Mapping) else ():
        if str(key).endswith(ACTIVATION_FIELDS) and isinstance(value, str):
            yield str(plain_name(value))
        elif key == "by_layer" and isinstance(value, Mapping):
            yield from (name for name in value.values() if isinstance(name, str))
        else:
            yield from activations_in(value)


def names_in(said: Any) -> set[str]:
    """Return the activations of ours that a config names, read as plain data."""
    return {name for name in activations_in(said) if registry.find(name)}


def _has_ours(model: Any) -> bool:
    options = (GluConfig.of(config) for config in configs_of(model.config))
    return any(entry != GluConfig() for entry in options) or bool(owned_activations(model))


def _untied(model: Any, missing: Iterable[str]) -> set[str]:
    """Return the missing keys without those that are tied to, or share their module with, one that was loaded."""
    missing = set(missing)
    tied: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        tied.setdefault(source, {source}).add(target)
    loaded = {key for group in tied.values() if not group <= missing for key in group}
    return {
        key
        for key in missing - loaded  # a tensor that was loaded under another name says so itself
        if not INITIALIZED.of(model.get_parameter_or_buffer(key), False)
    }


def _unmatched(keys: Iterable[str], patterns: Iterable[str] | None) -> set[str]:
    """Return ``keys`` without those that the model's class says to leave out."""
    return {key for key in keys if not any(re.search(pattern, key) for pattern in patterns or ())}


def _no_checkpoint(model: nn.Module, missing: set[str], unexpected: set[str]) -> bool:
    """Return whether no weight of any module is there: a model starts from nothing, as in Transformers' tests."""
    return not any("." in key for key in unexpected) and missing >= {name for name, _ in model.named_parameters()}


def _within(key: str, paths: Iterable[str]) -> bool:
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _known_before(model: Any, missing: set[str], said: Mapping[str, Any] | None) -> set[str]:
    """Return the missing keys of activations that can't start without effect.

    The checkpoint has such an activation itself, so that it should have them; it has another function than the one that
    a mix starts at; or nothing is known of it.
    """
    before = set(activations_in(said)) or {default_activation(model.config)}
    functions = {core(name) for name in before}
    found = {key for key in missing if SOURCE in key.split(".") and (said is None or _modulated(before))}
    for name, act in owned_activations(model):
        keys = {key for key in missing if _within(key, [name])}
        had = any(act.name in (other, getattr(registry.find(other), "gate", None)) for other in before)
        starts = [part.names[0] for part in act.modules() if isinstance(part, LearnableMix)]
        if said is None or had or any(not any(same_function(start, f) for f in functions) for start in starts):
            found |= keys
    return found


def _modulated(names: Iterable[str]) -> bool:
    return any((entry := registry.find(name)) and MODULATED in entry.flags for name in names)
