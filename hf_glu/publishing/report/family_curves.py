"""The curves of ``hf-glu activations --plot``: every activation, and examples of each wrapper and mix.

Shapes: G points of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kinds import SUFFIX
from hf_glu.activation.learnable import LearnableMix
from hf_glu.activation.moa import TokenMix
from hf_glu.activation.stock import elementwise_names
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED
from hf_glu.publishing.report.family import Panel, write_family

BASE, INNER = "swiglu", "silu"  # what the families are drawn with
GRID = torch.linspace(-4, 4, 161)
WIDE = torch.linspace(-12, 12, 97)  # where curves that are one on the grid differ: relu and relu6

# label -> the coefficients of silu, gelu, relu and tanh
MIXES = {
    BASE: (1.0, 0.0, 0.0, 0.0),
    "half relu": (0.5, 0.0, 0.5, 0.0),
    "half tanh": (0.5, 0.0, 0.0, 0.5),
    "and tanh": (1.0, 0.0, 0.0, 1.0),
    "less gelu": (1.5, -1.0, 0.0, 0.0),
}
# label -> V of each of them
GATES = {
    BASE: (0.0, 0.0, 0.0, 0.0),
    "tanh where g > 0": (0.0, 0.0, 0.0, 2.0),
    "tanh where g < 0": (0.0, 0.0, 0.0, -2.0),
    "relu where g < 0": (0.0, 0.0, -2.0, 0.0),
}


def plot_family(path: Path) -> Path:
    """Draw the whole family into a file; return its path.

    Raises:
        OptionError: a suffix that is none of .png, .svg and .pdf, or a file that can't be written.
        HfGluError: matplotlib isn't installed.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # xIELU tells of a kernel that isn't there
    return write_family(panels, path)


@torch.no_grad()
def panels() -> list[list[Panel]]:
    """Return two groups of panels: all gated activations, then the wrappers and mixes."""
    found = [_panel(entry.name, {"": _gated(entry.name)}) for entry in registry]
    found += [_panel(name, {"": _gated(name)}) for name in _derived()]
    mixes: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, tuple[float, ...]]]] = {
        "learnable_": (_learnable, MIXES), "moa_": (_adaptive, GATES),
    }  # fmt: skip
    families = [
        _panel(
            f"{kind.flag}_{BASE}", {label: _gated(BASE, z) for label, z in {BASE: GRID, **kind.curves(GRID)}.items()}
        )
        for kind in registry.kinds
        if kind.curves is not None
    ]
    families += [
        _panel(prefix + BASE, {label: value(*case) for label, case in cases.items()})
        for prefix, (value, cases) in mixes.items()
    ]
    return [found, families]


def _panel(name: str, lines: Mapping[str, Tensor]) -> Panel:
    values = {label: value.tolist() for label, value in lines.items()}
    return Panel(name=name, equation=registry[name].equation, g=GRID.tolist(), lines=values)


def _gated(name: str, g: Tensor = GRID) -> Tensor:
    """Compute a gated activation at the gates ``g``, ``[G]``, with u = 1."""
    act = registry[name].factory()
    if GATED not in registry[name].flags:
        return act(g)  # as the channels of one token
    value: Tensor = act(torch.stack([g, torch.ones_like(g)], dim=1))[:, 0]
    return value


def _derived() -> Iterator[str]:
    """Yield ``N_glu`` for every N whose function isn't that of another name."""
    known = [build_elementwise(entry.gate)(WIDE) for entry in registry if entry.gate]
    for name in elementwise_names():
        value = build_elementwise(name)(WIDE)
        if not any(torch.allclose(value, other, atol=1e-5) for other in known):
            known.append(value)
            yield name + SUFFIX


def _learnable(*coefficients: float) -> Tensor:
    act = LearnableMix(f"learnable_{INNER}")
    act.mix.copy_(torch.tensor(coefficients))
    return _mixed(act)


def _adaptive(*gates: float) -> Tensor:
    act = TokenMix(f"moa_{INNER}")
    act.configure(GluConfig(), width=1)
    assert act.choice is not None
    act.choice.copy_(torch.tensor(gates).unsqueeze(1))
    return _mixed(act)


def _mixed(act: nn.Module) -> Tensor:
    value: Tensor = act(GRID.unsqueeze(1))[:, 0]
    return value
