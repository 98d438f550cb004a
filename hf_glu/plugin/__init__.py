"""The only part of hf_glu that touches Transformers' and PEFT's globals, reversibly.

`register` imports neither: it hooks the modules that it patches as they are imported, or at once if they
already are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import wrapt

from hf_glu.plugin.patching import Patches

# a module of Transformers' or PEFT's -> ours, whose `install(module, patches)` patches it
HOOKED = {
    "transformers.activations": "hf_glu.plugin.names",
    "transformers.configuration_utils": "hf_glu.plugin.configs",
    "transformers.modeling_utils": "hf_glu.plugin.models",
    "peft.tuners.lora.dora": "hf_glu.plugin.dora",
    "peft.tuners.tuners_utils": "hf_glu.plugin.merging",
}
_patches: dict[str, Patches] = {}
_hooked: set[str] = set()
_registered = False


def register() -> None:
    """Put the gated activations into Transformers' ``ACT2FN`` and make its models build gated FFNs for them.

    Idempotent; ``import hf_glu`` calls it.

    Raises:
        IncompatibleTransformersError: the installed Transformers lacks something that is hooked.
    """
    global _registered
    _registered = True
    for name in HOOKED:
        if name not in _hooked:
            _hooked.add(name)
            wrapt.register_post_import_hook(_install, name)
        elif name in sys.modules:
            _install(sys.modules[name])


def unregister() -> None:
    """Give Transformers back as it was. Models that were built go on working."""
    global _registered
    _registered = False
    for patches in reversed(_patches.values()):
        patches.undo()
    _patches.clear()


def is_registered() -> bool:
    """Tell whether the plugin is active."""
    return _registered


@contextmanager
def scoped() -> Iterator[None]:
    """Have the plugin active inside of a ``with`` block, and all as it was before after it, also after an exception.

    Activations that are added to the registry inside of the block are gone after it, too.
    """
    before = _registered
    restore: Callable[[], None] | None = None
    if "hf_glu.activation" in sys.modules:
        restore = sys.modules["hf_glu.registry"].registry.snapshot()
    register()
    try:
        yield
    finally:
        if restore is not None:
            restore()
        if not before:
            unregister()


def _install(module: ModuleType) -> None:
    name = module.__name__
    if not _registered or name in _patches:
        return
    patches = _patches[name] = Patches()
    try:
        import_module(HOOKED[name]).install(module, patches)
    except BaseException:
        _patches.pop(name).undo()
        raise
