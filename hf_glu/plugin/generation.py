"""Hook of ``transformers.generation.utils``: ``generate`` steers as its generation config says, in its own thread only.

    hf-glu run --modulation glad=FOLDER -- ...
    model.generate(..., generation_config=GenerationConfig(modulation={"glad": 1.5}))

Only installed where an operator has named modulations. A generate that is steered isn't compiled. Continuous batching
puts all requests into one row, in which they can't be told apart: who asks there is refused. So is who asks a class
that has its own ``generate``, as it prepares its config, and by a server before (`check_reached`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_glu.compat.of_others import PREPARE_GENERATION
from hf_glu.errors import OptionError
from hf_glu.plugin import ENTRY
from hf_glu.plugin.patching import Patches, require

if TYPE_CHECKING:
    from hf_glu.plugin.modulations import Wanted


BATCHED = (
    "continuous batching puts all requests into one row, so that none can be steered by itself: leave out the "
    f"{ENTRY}, or run without continuous batching"
)
OWN = "{} has a generate of its own, which can't be steered by request"
_local = threading.local()  # wanted: of the generate that this thread is in


def install(module: ModuleType, patches: Patches) -> None:
    """Wrap ``generate``, and both ways into continuous batching."""
    mixin = require(module, "GenerationMixin")
    plain = require(mixin, "generate", "inputs", "generation_config")

    @wraps(plain)
    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        _refuse_keyword(kwargs)
        wanted = _wanted(self, generation_config)
        if not wanted or wanted == _running():  # an assistant is handed the config of the model that it proposes to
            return plain(self, inputs, generation_config, *args, **kwargs)
        if generation_config is None:
            kwargs["disable_compile"] = True
        else:  # which each strength would compile anew
            generation_config = copy.deepcopy(generation_config)
            generation_config.disable_compile = True
        with _steering(self, wanted, {"inputs": inputs, **kwargs}):
            return plain(self, inputs, generation_config, *args, **kwargs)

    generate.hf_glu_steers = True  # type: ignore[attr-defined]
    patches.set(mixin, "generate", generate)
    for name in ("init_continuous_batching", "generate_batch"):
        patches.set(mixin, name, _unsteered(require(mixin, name, "generation_config")))
    if (prepare := PREPARE_GENERATION.of(mixin, None)) is not None:
        patches.set(mixin, PREPARE_GENERATION.name, _within(prepare))


def _within(plain: Any) -> Any:
    """Return one that refuses what asks to be steered outside of the ``generate`` that steers."""

    @wraps(plain)
    def prepare(self: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not _running() and _wanted(self, generation_config):
            raise OptionError(OWN.format(type(self).__name__))
        return plain(self, generation_config, *args, **kwargs)

    return prepare


def _unsteered(plain: Any) -> Any:
    """Return one that refuses to be steered."""
    parameters = signature(plain)

    @wraps(plain)
    def batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_keyword(kwargs)
        if _wanted(self, parameters.bind(self, *args, **kwargs).arguments.get("generation_config")):
            raise OptionError(BATCHED)
        return plain(self, *args, **kwargs)

    return batch


def _refuse_keyword(kwargs: dict[str, Any]) -> None:
    if ENTRY in kwargs:
        raise OptionError(f"{ENTRY} is said in a generation config: GenerationConfig({ENTRY}={{'glad': 1.5}})")


def _running() -> tuple[Wanted, ...]:
    found: tuple[Wanted, ...] = getattr(_local, "wanted", ())
    return found


def _wanted(model: Any, config: Any) -> tuple[Wanted, ...]:
    from hf_glu.plugin.modulations import wanted_of  # with models, which are imported as this hook is installed

    return wanted_of(model, config)


@contextmanager
def _steering(model: Any, wanted: tuple[Wanted, ...], arguments: dict[str, Any]) -> Iterator[None]:
    """Steer while ``generate`` runs with its arguments, by name."""
    from hf_glu.instruments.steering.generating import noting_prompt
    from hf_glu.plugin.modulations import steering

    before, _local.wanted = _running(), wanted
    try:
        with steering(model, wanted), noting_prompt(arguments):
            yield
    finally:
        _local.wanted = before


def check_reached(model: Any) -> None:
    """Check that the ``generate`` of ``model`` is the one that is hooked.

    Raises:
        OptionError: its class or itself has another, which may know nothing of modulations.
    """
    from hf_glu.instruments.steering.generating import Generating

    own = vars(model).get("generate")
    found = own.plain if isinstance(own, Generating) else getattr(model, "generate", None)
    if not getattr(found, "hf_glu_steers", False):
        raise OptionError(OWN.format(type(model).__name__))
