"""The config fields that name a model's activations: reading them, writing them, keeping derived fields in step.

A family may have one field for each stack (Moonshine: ``encoder_hidden_act``); its other fields are then not those of
that stack's FFNs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_glu.activation import registry
from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import STACKS
from hf_glu.ffn.families import ACTIVATION_FIELDS, DERIVED_FIELDS, WIDTH_FIELDS

GATED_PREFIX = "gated-"  # T5's way of naming a natively gated FFN: "gated-gelu"


def activation_field(config: Any, stack: str | None = None) -> str | None:
    """Return the name of the field for the activation of the config's model (or of its ``stack``); None: it has none.

    >>> activation_field(MoonshineConfig(), "encoder")
    'encoder_hidden_act'
    """
    own = [f"{stack}_{field}" for field in ACTIVATION_FIELDS] if stack else []
    return next((field for field in (*own, *ACTIVATION_FIELDS) if isinstance(getattr(config, field, None), str)), None)


def activation_fields(config: Any) -> list[str]:
    """Return the fields of all stacks."""
    return list(dict.fromkeys(field for stack in (None, *STACKS) if (field := activation_field(config, stack))))


def activation_of(config: Any, stack: str | None = None) -> str | None:
    """Return the activation that the config names, without T5's ``gated-``."""
    field = activation_field(config, stack)
    if field is None:
        return None
    return plain_name(getattr(config, field))


def plain_name(value: Any) -> str | None:
    """Return the activation that a config's value names, without T5's ``gated-``."""
    if not isinstance(value, str):
        return None
    return "gelu_new" if value == "gated-gelu" else value.removeprefix(GATED_PREFIX)


def width_field(config: Any) -> str | None:
    """Return the name of the config's field for the width of its FFNs, or None where it has none."""
    return next((field for field in WIDTH_FIELDS if isinstance(getattr(config, field, None), int)), None)


def default_activation(config: Any, stack: str | None = None) -> str:
    """Return the elementwise activation that the config's class has by default."""
    field = activation_field(config, stack)
    return field_default(config, field) if field else "gelu"


def field_default(config: Any, field: str) -> str:
    """Return the elementwise activation that the config's class has in ``field`` by default."""
    default = getattr(type(config), field, None)
    return default.removeprefix(GATED_PREFIX) if isinstance(default, str) else "gelu"


def write_activation(config: Any, name: str, stack: str | None = None) -> None:
    """Write an activation into the config's own field (with ``gated-`` where it is there now)."""
    field = activation_field(config, stack)
    if field is not None:
        write_field(config, field, name)


def gated_name(name: str) -> str:
    """Return T5's name of a natively gated FFN; the inverse of `plain_name`."""
    return GATED_PREFIX + ("gelu" if name == "gelu_new" else name)


def write_field(config: Any, field: str, name: str) -> None:
    """Write an activation into one field (with ``gated-`` where it is there now)."""
    gated = getattr(config, field).startswith(GATED_PREFIX)
    setattr(config, field, gated_name(name) if gated else name)
    sync_derived(config, always=True)


def configs_of(config: Any) -> Iterator[Any]:
    """Yield a config and those inside of it."""
    from transformers.configuration_utils import PreTrainedConfig  # not above: its import is what hooks this module

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value)


def names_ours(config: Any) -> bool:
    """Return whether a config, or one inside of it, names an activation of ours or has experts of ours."""
    for part in configs_of(config):
        options = GluConfig.of(part)
        if options.activation or options.experts is not None:
            return True
        if any(registry.find(plain_name(getattr(part, field))) for field in activation_fields(part)):
            return True
    return False


def sync_derived(config: Any, *, always: bool = False) -> None:
    """Derive again what Transformers derives once, where the field or what it left behind names one of ours.

    T5 reads ``feed_forward_proj`` in ``__post_init__`` only: assigned later, or overridden in ``from_pretrained``,
    it would silently keep the old activation.
    """
    for field, (act_field, gated_field) in DERIVED_FIELDS.items():
        value = config.__dict__.get(field)
        if not isinstance(value, str) or act_field not in config.__dict__:
            continue
        act = value.removeprefix(GATED_PREFIX)
        if always or registry.find(act) or registry.find(config.__dict__[act_field]):
            setattr(config, act_field, "gelu_new" if value == "gated-gelu" else act)
            setattr(config, gated_field, value.startswith(GATED_PREFIX))
