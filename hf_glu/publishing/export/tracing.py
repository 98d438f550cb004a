"""Having our experts compute, while any tracer runs, what they compute under `torch.jit.trace`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_glu.compat.of_others import PATCHED
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.native import MixedBank
from hf_glu.ffn.experts.tracing import native_experts


@contextmanager
def traceable() -> Iterator[None]:
    """Make our modules compute what can be traced, inside of the block."""
    ways: list[tuple[type, str, Callable[..., Any]]] = [
        (ExpertFFN, "forward", ExpertFFN.traced),
        (MixedBank, "forward", native_experts),
    ]  # fmt: skip
    with PATCHED.find()([(owner, name, lambda _, way=way: way) for owner, name, way in ways]):
        yield
