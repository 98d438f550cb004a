"""Finding the gates of a model, also where PEFT has wrapped the projections of its FFNs (LoRA).

Only activations are hooked, which are given what a wrapped projection makes, adapter and all. What reads weights reads
those inside of the wrapper.
"""

from __future__ import annotations

from torch import nn

from hf_glu.compat.of_torch import CHILDREN
from hf_glu.ffn.sites import Site, find_mixers, find_sites, is_adapted


def gate_sites(model: nn.Module) -> list[Site]:
    """Return the FFN sites of ``model``; where it has none, the gates of its mixers. Adapters are seen through."""
    return find_sites(_inside(model) if is_adapted(model) else model) or find_mixers(model)


def _inside(module: nn.Module) -> nn.Module:
    """Return a module without PEFT's wrappers in it: itself where there are none, else what stands for it."""
    base = getattr(module, "base_layer", None)
    if type(module).__module__.startswith("peft.") and isinstance(base, nn.Module):
        return _inside(base)
    own = CHILDREN.of(module)
    children = {name: child if child is None else _inside(child) for name, child in own.items()}
    if all(children[name] is own[name] for name in own):
        return module
    standing = object.__new__(type(module))
    vars(standing).update(vars(module) | {CHILDREN.name: children})
    return standing
