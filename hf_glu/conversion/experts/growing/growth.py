"""What growing experts is asked for, and promises, wherever the experts are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_glu.activation.wrapped import TextShift
from hf_glu.config.experts import check_growth
from hf_glu.conversion.routes import APPROXIMATE, EXACT, ROUNDING, Route
from hf_glu.conversion.steps import Change
from hf_glu.errors import OptionError, shown


@dataclass(frozen=True, kw_only=True)
class Growth(Change, abstract=True):
    """Make copies of experts.

    Attributes:
        times, active, drop: as in `hf_glu.grow_experts`.
        like: of a family's own experts that are all active, what the grown config builds, without weights.
    """

    times: int = 2
    active: str = "one"
    drop: float = 0.0
    like: Any = field(default=None, repr=False, compare=False)
    of_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_growth(self.times, self.active)
        if not isinstance(self.drop, (int, float)) or not 0 <= self.drop < 1:
            raise OptionError(f"drop must be a share of the units, 0 up to 1, got {shown(self.drop)}")

    @property
    def target(self) -> str:
        """What becomes of an expert, as reports say it."""
        return f"{self.times} copies of each expert, {self.active} active"


def growth_route(change: Growth, *, ties: bool = False, remembers: bool = False) -> Route:
    """Return the route of a growth: what it is, promises, and what to know.

    Args:
        change: the growth.
        ties: whether a router that breaks ties as it likes has scores in half precision, in which experts tie.
        remembers: whether experts remember tokens, of which each copy gets its own.
    """
    one = change.active == "one"
    notes = {
        "copies see the same tokens: without drop they stay alike in training": not one and not change.drop,
        f"a token uses {change.times} times as many experts: {change.times} times their FLOPs": not one,
        "where two experts' scores tie, which half precision has, copies of both may be taken": ties,
        "each copy remembers the tokens that come to it, and not its expert's": one and remembers,
        f"{change.drop:.0%} of the units of each copy but the first are initialised anew": bool(change.drop),
    }
    name = (
        f"{change.times} copies of each expert, {'one of which a token uses' if one else 'all of which a token uses'}"
    )
    promise = APPROXIMATE if change.drop or ties or (one and remembers) else EXACT if one else ROUNDING
    return Route(name=name, promise=promise, note="; ".join(note for note, holds in notes.items() if holds))


def remembers(experts: nn.Module) -> bool:
    """Return whether activations of experts read the tokens before, and make something of them."""
    return any(isinstance(part, TextShift) and not part.neutral() for part in experts.modules())


def first_of_each(owner: Tensor) -> list[bool]:
    """Return which copies are the first of their expert; those of one expert are beside each other."""
    every = owner.tolist()
    return [not place or every[place - 1] != expert for place, expert in enumerate(every)]
