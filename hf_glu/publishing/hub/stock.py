"""The stock classes that Transformers' Auto classes have for a config, and what their code asks of ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch

from hf_glu.compat.of_models import MODEL_CLASS, MODEL_MAPPING
from hf_glu.ffn.config_fields import configs_of
from hf_glu.ffn.families import LOOK_UP_IN_FORWARD, NAME_ATTRIBUTES, SITE_TABLE, SiteRow
from hf_glu.ffn.sites import find_sites
from hf_glu.plugin.standalone import say_dense


def served_classes(config: Any) -> dict[str, str]:
    """Return the names of the Auto classes that know a config, with the stock class that each takes for it."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {}
    for name in modeling_auto.__all__:
        mapping = MODEL_MAPPING.of(getattr(modeling_auto, name), None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            stock = MODEL_CLASS.find()(config, mapping).__name__
            if hasattr(transformers, stock):
                found[name] = stock
    return found


@dataclass(frozen=True)
class Stock:
    """What the stock classes for a config have.

    Attributes:
        layouts: of their FFNs.
        names: whether a module keeps the activation's name, or looks it up in its forward.
    """

    layouts: tuple[SiteRow, ...]
    names: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        """Build the classes for ``config``, on no device, and look at their modules."""
        import transformers

        dense = copy.deepcopy(config)
        say_dense(dense)
        for part in configs_of(dense):
            part.hf_glu = None
        layouts, names = set(), False
        for name in sorted(set(served_classes(config).values())):
            with torch.device("meta"):
                model = getattr(transformers, name)(copy.deepcopy(dense))
            layouts |= {site.row.layout for site in find_sites(model)}
            for module in model.modules():
                named = (module.__dict__.get(key) for key in NAME_ATTRIBUTES)
                names |= type(module).__name__ in LOOK_UP_IN_FORWARD or any(isinstance(key, str) for key in named)
        return cls(tuple(row for row in SITE_TABLE if row.layout in layouts), names)
