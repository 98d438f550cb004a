"""Where a family's own router stands beside its bank of experts, and which part of its output the logits are.

A family says so itself, for callers that ask Transformers for ``router_logits``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_glu.compat.of_models import CAN_RECORD

LOGITS = "router_logits"


@dataclass(frozen=True, eq=False)
class NativeRouter:
    """A module that returns router logits.

    Attributes:
        module: the module.
        index: which part of its output they are, where that is a tuple.
    """

    module: nn.Module
    index: int

    def logits(self, output: Any) -> Tensor:
        """Return the logits ``[T, E]`` in an output of the module."""
        found: Tensor = output[self.index] if isinstance(output, tuple) else output
        return found.reshape(-1, found.shape[-1])


def router_of(model: nn.Module, bank: str) -> NativeRouter | None:
    """Return the router that sends tokens to the bank called ``bank``; None where its family doesn't say which it is.

    It stands beside the bank, in the module that holds both, or is that module itself.
    """
    block = bank.rpartition(".")[0]
    inside = (router for name, router in _routers(model) if name == block or name.startswith(f"{block}."))
    return next(inside, None)


def _routers(model: nn.Module) -> Iterator[tuple[str, NativeRouter]]:
    for outer, part in model.named_modules():
        told = CAN_RECORD.of(part, None)
        specs = told.get(LOGITS, []) if isinstance(told, dict) else []
        for spec in specs if isinstance(specs, list) else [specs]:
            for name, module in part.named_modules(prefix=outer):
                if _is_meant(spec, name, module):
                    yield name, NativeRouter(module, getattr(spec, "index", 1))


def _is_meant(spec: Any, name: str, module: nn.Module) -> bool:
    """Return whether a family's entry, a class or a record of one, means a module."""
    kind = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
    place = getattr(spec, "layer_name", None)
    return kind is not None and isinstance(module, kind) and (place is None or f".{place.strip('.')}." in f".{name}.")
