"""The config field that names a model's activation: reading it, writing it, keeping derived fields in step."""

from __future__ import annotations

from typing import Any

from hf_glu.layers.table import ACTIVATION_FIELDS, DERIVED_FIELDS, WIDTH_FIELDS

GATED_PREFIX = "gated-"  # T5's way of naming a natively gated FFN: "gated-gelu"


def activation_field(config: Any) -> str | None:
    """Return the name of the config's activation field, or None where it has none."""
    return next((field for field in ACTIVATION_FIELDS if isinstance(getattr(config, field, None), str)), None)


def activation_of(config: Any) -> str | None:
    """Return the activation that the config names, without T5's ``gated-``."""
    field = activation_field(config)
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


def default_activation(config: Any) -> str:
    """Return the elementwise activation that the config's class has by default."""
    field = activation_field(config)
    default = getattr(type(config), field, None) if field else None
    return default.removeprefix(GATED_PREFIX) if isinstance(default, str) else "gelu"


def write_activation(config: Any, name: str) -> None:
    """Write an activation into the config's own field (with ``gated-`` where it is there now)."""
    field = activation_field(config)
    if field is None:
        return
    prefix = GATED_PREFIX if getattr(config, field).startswith(GATED_PREFIX) else ""
    setattr(config, field, prefix + name)
    sync_derived(config, always=True)


def sync_derived(config: Any, *, always: bool = False) -> None:
    """Derive again what Transformers derives once, where the field or what it left behind names one of ours.

    T5 reads ``feed_forward_proj`` in ``__post_init__`` only: assigned later, or overridden in ``from_pretrained``,
    it would silently keep the old activation.
    """
    from hf_glu.activation import registry  # not above: this module is hooked while they are still being imported

    for field, (act_field, gated_field) in DERIVED_FIELDS.items():
        value = config.__dict__.get(field)
        if not isinstance(value, str) or act_field not in config.__dict__:
            continue
        act = value.removeprefix(GATED_PREFIX)
        if always or registry.find(act) or registry.find(config.__dict__[act_field]):
            setattr(config, act_field, "gelu_new" if value == "gated-gelu" else act)
            setattr(config, gated_field, value.startswith(GATED_PREFIX))
