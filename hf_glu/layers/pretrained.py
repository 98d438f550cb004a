"""What a Transformers model with our activations does beyond its stock class: for the plugin, and without it."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_glu.activation import OwnedModule
from hf_glu.errors import CheckpointError
from hf_glu.layers.build import owned_activations
from hf_glu.layers.fields import activation_of
from hf_glu.layers.sites import Site, find_sites


def initialize(module: nn.Module) -> bool:
    """Initialise a module of ours, unless that has been done; return whether it was done now.

    What a checkpoint has loaded stays: ``transformers.initialization`` leaves it alone.
    """
    if not isinstance(module, OwnedModule) or getattr(module, "_is_hf_initialized", False):
        return False
    module.reset_parameters()
    module._is_hf_initialized = True  # type: ignore[assignment]
    return True


def refuse_mismatch(model: Any, load_config: Any, loading_info: Any) -> None:
    """Raise where a checkpoint's FFN has another shape than the model's gated one, whatever the caller ignores.

    ``ignore_mismatched_sizes=True`` would fill it at random.

    Raises:
        CheckpointError: it has.
    """
    mismatched = {key: (found, wanted) for key, found, wanted in loading_info.mismatched_keys}
    if not mismatched or not (owned_activations(model) or getattr(model.config, "hf_glu", None)):
        return
    for site in find_sites(model):
        for key in _projection_keys(site):
            if key in mismatched:
                found, wanted = mismatched[key]
                name = activation_of(model.config)
                raise CheckpointError(
                    f"{load_config.pretrained_model_name_or_path}: {key} is {list(found)} in the checkpoint, but "
                    f"{name} with the options in config.hf_glu needs {list(wanted)}. To turn a dense checkpoint into a "
                    f"gated model, load it as it is and call hf_glu.convert(model, {name!r}), or run "
                    f"`hf-glu convert SRC DST --to {name}`"
                )


def _projection_keys(site: Site) -> list[str]:
    prefix = f"{site.name}." if site.name else ""
    paths = [path for path in (site.row.gate, site.row.in_proj, site.row.out_proj) if path]
    return [f"{prefix}{path}.{kind}" for path in paths for kind in ("weight", "bias")]
