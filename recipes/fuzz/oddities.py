"""Elementwise functions that a user may have added to ``ACT2FN``: taken for what they are, and called once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_glu.config.glu import GluConfig

from .formulas import Name
from .running import Tally, main


class Twice(nn.Module):
    """Holds GELU as ``act``, as Transformers' own module does, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        """Return twice GELU."""
        return 2 * self.act(x)


class Sharper(nn.SiLU):
    """A subclass of a known class."""

    def forward(self, x: Tensor) -> Tensor:
        """Return SiLU of twice its input."""
        return super().forward(2 * x)


class Counting(nn.Module):
    """Counts its calls in a buffer, and depends on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the number of calls so far."""
        self.calls += 1
        return x * float(self.calls)


class Noisy(nn.Module):
    """Draws anew at each call."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with random slopes."""
        return x * torch.rand_like(x)


ODD = {"twice_gelu": Twice, "sharper": Sharper, "counting": Counting, "noisy": Noisy}


@contextmanager
def added() -> Iterator[None]:
    """Have these functions in Transformers' table."""
    for name, kind in ODD.items():
        ACT2FN[name] = kind
    try:
        yield
    finally:
        for name in ODD:
            del ACT2FN[name]


@dataclass(frozen=True)
class Case:
    """One function within an activation.

    Attributes:
        name: of the activation.
        width: channels.
        projected: whether the input is what an operation gives.
        seed: of all values.
    """

    name: Name
    width: int
    projected: bool
    seed: int


def draw(random: Random) -> Case:
    """Return any case."""
    mix = random.choice(("", "", "learnable_", "moa_"))
    wrappers = () if random.random() < 0.7 else ("stateful_",)
    base = f"{random.choice(sorted(ODD))}_glu"
    return Case(Name(base, wrappers, mix), random.choice((1, 8, 64)), random.random() < 0.7, random.randrange(10**6))


def check(case: Case) -> Tally:
    """Compare the gradient with the value: all of these are linear in u, and the slopes in g are known."""
    tally = Tally()
    torch.manual_seed(case.seed)
    with added():
        act: Any = ACT2FN[str(case.name)]
        act.configure(GluConfig(), case.width)
        act.train()
        leaf = torch.randn(3, 2 * case.width, dtype=torch.float64)
        act.double()
        t = leaf.clone().requires_grad_()
        y = act(t * 1 if case.projected else t)
        value = y.detach().clone()
        (gradient,) = torch.autograd.grad(y.sum(), t)
        (g, u), (dg, du) = leaf.chunk(2, -1), gradient.chunk(2, -1)
        tally.same("u times its gradient", u * du, value, 1e-12)
        counts = [float(module.calls) for module in act.modules() if isinstance(module, Counting)]
        tally.expect(all(count == 1 for count in counts), f"called {counts} times in one forward and backward pass")
        if "twice" in case.name.base or "sharper" in case.name.base:
            plain = {
                "twice_gelu_glu": lambda g: 2 * nn.functional.gelu(g),
                "sharper_glu": lambda g: 2 * g * (2 * g).sigmoid(),
            }
            x = leaf.clone().requires_grad_()
            right = plain[case.name.base](x[:, : case.width]) * x[:, case.width :]
            tally.same("the value", value, right, 1e-12)
            tally.same("the gradient", gradient, torch.autograd.grad(right.sum(), x)[0], 1e-12)
        elif not case.name.mix:  # x times a slope that is drawn or counted: g dg is y
            tally.same("g times its gradient", g * dg, value, 1e-12)
    return tally


if __name__ == "__main__":
    main("oddities", draw, check, 300)
