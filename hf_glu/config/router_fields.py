"""The fields by which others know a model with experts: trainers read them, as they read those of Mixtral's config.

They are attributes of the config, beside ``config.hf_glu["experts"]``, where the config's class has none of its own:

    output_router_logits  whether a pass returns its routers' logits (see `hf_glu.ffn.experts.asked`)
    router_aux_loss_coef  the coefficient of the balance loss: what training uses, whoever changes it
    num_experts, num_experts_per_tok
"""

from __future__ import annotations

from typing import Any

from hf_glu.config.experts import LARGEST, ExpertOptions
from hf_glu.config.section import is_number
from hf_glu.errors import OptionError, shown

ASKED, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"


def has_own(config: Any, name: str) -> bool:
    """Return whether the config's class has a field of this name itself, as those of native experts."""
    return class_has(type(config), name)


def class_has(config_class: type, name: str) -> bool:
    """Return whether a class of configs has a field of this name itself."""
    return hasattr(config_class, name) or name in getattr(config_class, "attribute_map", ())


def router_fields(config: Any, options: ExpertOptions) -> dict[str, Any]:
    """Return the fields that a config with experts of ours has, and their values."""
    values = {ASKED: False, COEFFICIENT: options.balance, "num_experts": options.count}
    values["num_experts_per_tok"] = options.top_k
    return {name: value for name, value in values.items() if not has_own(config, name)}


def add_router_fields(config: Any, options: ExpertOptions) -> None:
    """Give a config that was written without them its fields; what a user has changed stays."""
    for name, value in router_fields(config, options).items():
        if name not in vars(config):
            setattr(config, name, value)


def remove_router_fields(config: Any) -> None:
    """Take the fields away again, where there are experts no more."""
    if (getattr(config, "hf_glu", None) or {}).get("experts"):
        for name in router_fields(config, ExpertOptions(groups="gelu", top_k=1)):
            vars(config).pop(name, None)


def coefficient_in(config: Any) -> float | None:
    """Return the coefficient of the balance loss that a config of ours says; None: it says none.

    Raises:
        OptionError: it is none.
    """
    if config is None or has_own(config, COEFFICIENT):
        return None
    value = getattr(config, COEFFICIENT, None)
    if value is not None and (not is_number(value) or not 0 <= value < LARGEST):
        raise OptionError(f"{COEFFICIENT} must be at least 0 and below {LARGEST:g}, got {shown(value)}")
    return value


def told_of_balance(config: Any) -> dict[str, Any] | None:
    """Return ``config.hf_glu`` with the coefficient that the field says: a user's change outlives saving."""
    said, value = getattr(config, "hf_glu", None), coefficient_in(config)
    if value is None or not isinstance(said, dict) or not isinstance(said.get("experts"), dict):
        return said
    options = ExpertOptions.from_dict({**said["experts"], "balance": value})
    return said if options is None else {**said, "experts": options.to_dict()}
