"""The only part of hf_glu that touches the globals of Transformers, PEFT and kernels for them, reversibly.

`register` imports neither: it hooks the modules that it patches as they are imported, or at once if they
already are.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import ModuleType

import wrapt

from hf_glu.plugin.patching import Patches

# a module of another library -> ours, whose `install(module, patches)` patches it
HOOKED = {
    "transformers.activations": "hf_glu.plugin.names",
    "transformers.configuration_utils": "hf_glu.plugin.configs",
    "transformers.modeling_utils": "hf_glu.plugin.models",
    "transformers.trainer": "hf_glu.plugin.trainers",
    "peft.tuners.lora.dora": "hf_glu.plugin.dora",
    "peft.tuners.tuners_utils": "hf_glu.plugin.merging",
    "lm_eval.models": "hf_glu.plugin.lm_eval_names",
    "kernels.layer.kernelize": "hf_glu.plugin.kernels",
    "liger_kernel.transformers.monkey_patch": "hf_glu.plugin.kernels",
}
# the same where an operator has named modulations, which requests may ask for
STEERED = {
    "transformers.generation.utils": "hf_glu.plugin.generation",
    "transformers.cli.serving.utils": "hf_glu.plugin.serving",
}
MODULATIONS = "HF_GLU_MODULATIONS"  # environment variable: their names and folders, as JSON
ENTRY = "modulation"  # of a generation config: which of them, how strongly
_patches: dict[str, Patches] = {}
_hooked: set[str] = set()
failed: dict[str, str] = {}  # a module of `hooked` that couldn't be patched -> why
_lock = threading.RLock()  # never held while something is imported, which has locks of its own
_kept = False  # by `register`, until `unregister`
_scopes = 0  # blocks that threads are in now


def hooked() -> dict[str, str]:
    """Return the modules of other libraries that are patched, and those of ours that patch them."""
    return {**HOOKED, **STEERED} if os.environ.get(MODULATIONS) else HOOKED


def register() -> None:
    """Put the gated activations into Transformers' ``ACT2FN`` and make its models build gated FFNs for them.

    Idempotent; ``import hf_glu`` calls it.

    Raises:
        IncompatibleTransformersError: the installed Transformers lacks something that is hooked.
    """
    global _kept
    _kept = True
    _activate()


def unregister() -> None:
    """Give Transformers back as it was. Models that were built go on working."""
    global _kept
    _kept = False
    _deactivate()


def is_registered() -> bool:
    """Return whether the plugin is active."""
    return _kept or _scopes > 0


@contextmanager
def scoped() -> Iterator[None]:
    """Activate the plugin inside of a ``with`` block; after it, also after an exception, all is as it was before.

    Activations that are added to the registry inside of the block are gone after it, too. Several threads may be in
    such blocks at once: the plugin is active until the last has left, and each takes back what it has added itself.
    """
    global _scopes
    known = "hf_glu.activation" in sys.modules
    with _lock:
        _scopes += 1
    try:
        _activate()
        with sys.modules["hf_glu.config.registry"].registry.scoped() if known else nullcontext():
            yield
    finally:
        with _lock:
            _scopes -= 1
            if not is_registered():
                _deactivate()


def _activate() -> None:
    for name in hooked():
        with _lock:
            first = name not in _hooked
            _hooked.add(name)
        if first:
            wrapt.register_post_import_hook(_install, name)
        elif name in sys.modules:
            _install(sys.modules[name])


def _deactivate() -> None:
    with _lock:
        for patches in reversed(_patches.values()):
            patches.undo()
        _patches.clear()


def _install(module: ModuleType) -> None:
    name = module.__name__
    ours = hooked().get(name)
    if ours is None or not is_registered() or name in _patches:
        return
    hook = import_module(ours)
    with _lock:
        if not is_registered() or name in _patches:
            return
        patches = _patches[name] = Patches()
        try:
            hook.install(module, patches)
            failed.pop(name, None)
        except BaseException as error:
            failed[name] = str(error)
            _patches.pop(name).undo()
            raise
