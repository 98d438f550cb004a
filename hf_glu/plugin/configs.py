"""Hook of ``transformers.configuration_utils``: ``config.hf_glu`` and fields that go stale when assigned."""

from __future__ import annotations

import sys
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from hf_glu.compat.of_others import CONVERTER
from hf_glu.config.glu import GluConfig
from hf_glu.config.router_fields import told_of_balance
from hf_glu.ffn.config_fields import sync_derived
from hf_glu.ffn.families import DERIVED_FIELDS
from hf_glu.plugin.patching import Patches, require

REMOTE_CODE = "modeling_hf_glu"  # the module of a checkpoint's own code, whose place the plugin takes


def install(module: ModuleType, patches: Patches) -> None:
    """Validate ``config.hf_glu``, and derive T5's ``dense_act_fn`` again whenever its source has changed."""
    base = require(module, "PreTrainedConfig")
    plain_post_init = require(base, "__post_init__")
    plain_from_dict = require(base, "from_dict", "config_dict").__func__

    @wraps(plain_post_init)
    def post_init(self: Any, **kwargs: Any) -> None:
        plain_post_init(self, **kwargs)
        settle(self)
        _watch(type(self), patches)

    @wraps(plain_from_dict)
    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        loaded = dict(config_dict)
        built = plain_from_dict(cls, config_dict, **kwargs)
        config = built[0] if isinstance(built, tuple) else built
        settle(config)
        if CONVERTER.module in sys.modules:
            import_module("hf_glu.plugin.loading").remember_dense(config, loaded)
        return built

    patches.set(base, "__post_init__", post_init)
    patches.set(base, "from_dict", classmethod(from_dict))
    # `from_pretrained(..., hf_glu={...})` hands on to the config only what it already has
    patches.set(base, "hf_glu", None)


def settle(config: Any) -> None:
    """Validate a config's hf_glu entry, bring its derived fields in step, and name no class that the plugin replaces.

    Without those in ``auto_map`` the Auto classes take the stock class, execute nothing of the checkpoint, and saving
    leaves no mention of code that isn't saved.
    """
    named = config.__dict__.get("auto_map")
    if isinstance(named, dict) and any(is_remote_code(value) for value in named.values()):
        config.auto_map = {key: value for key, value in named.items() if not is_remote_code(value)}
        if not config.auto_map:
            del config.auto_map
    if config.__dict__.get("hf_glu") is not None:
        import hf_glu.activation  # noqa: F401  (its kinds have sections there; torch is loaded for no other config)

        config.hf_glu = GluConfig.from_dict(told_of_balance(config)).to_dict()
    sync_derived(config)


def is_remote_code(reference: Any) -> bool:
    """Return whether an entry of ``auto_map`` (``REPO--MODULE.CLASS``) is of the code that hf_glu writes."""
    return isinstance(reference, str) and reference.rpartition("--")[2].partition(".")[0] == REMOTE_CODE


def _watch(config_class: type, patches: Patches) -> None:
    """Re-derive upon assignment, in the classes that have such fields.

    Their own ``__setattr__`` is wrapped: each config class keeps the base's that it was defined with.
    """
    if not any(hasattr(config_class, field) for field in DERIVED_FIELDS) or patches.has(config_class, "__setattr__"):
        return
    plain = config_class.__setattr__

    @wraps(plain)
    def assign(self: Any, name: str, value: Any) -> None:
        plain(self, name, value)  # type: ignore[call-arg]
        if name in DERIVED_FIELDS:
            sync_derived(self)

    patches.set(config_class, "__setattr__", assign)
