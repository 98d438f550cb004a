"""Options of expert FFNs, as ``config.hf_glu["experts"]`` has them: which experts, how many are used, which losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_glu.config.section import MAX_EXPERTS, MAX_UNITS, MAX_WIDTH, is_number
from hf_glu.errors import OptionError, refuse_unknown, shown

ROUTERS = ("softmax", "sigmoid")
WEIGHTS = ("scores", "ones")
BACKENDS = ("grouped", "loop")
ACTIVE = ("one", "all")
MERGES = {"router": ("random", "hidden"), "attention": ("average", "first")}
LARGEST, LONGEST = 1e4, 10_000
_NAME, _COUNT = r"(?P<name>[a-z]\w{0,199})(?::(?P<width>\d{1,9}))?", r"(?P<times>\*)?(?P<count>\d{1,9})"
_SPLIT = re.compile(r"(?:(?P<always>\d{1,9})\+)?(?P<routed>\d{1,9})")
_GROUP = re.compile(f"(?:{_NAME})?(?:{_COUNT})?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Experts that are alike.

    Attributes:
        name: their activation, gated or plain.
        count: how many.
        width: their hidden units; None: as the dense FFN has.
    """

    name: str
    count: int
    width: int | None = None


def read_groups(text: str, default: str | None = None) -> tuple[Group, ...]:
    """Read ``relu*2,gelu:1024*2,swiglu*4`` (a name, a width, a count), or ``8`` for so many of ``default``.

    Raises:
        OptionError: it can't be read, has no expert, or more than any model has.
    """
    if len(text) > LONGEST:
        raise OptionError(f"experts={shown(text)} is longer than any list of experts")
    groups = []
    for part in text.replace(" ", "").split(","):
        match = _GROUP.fullmatch(part)
        name = match["name"] if match and match["name"] else default
        if not match or not part or name is None or (match["name"] and match["count"] and not match["times"]):
            where = f"experts={shown(text)} can't be read at {shown(part)}"
            raise OptionError(f"{where}; write such as relu*2,gelu:1024*2,swiglu*4")
        count = int(match["count"]) if match["count"] else 1
        width = int(match["width"]) if match["width"] else None
        if count < 1 or width == 0:
            raise OptionError(f"experts={shown(text)}: {part!r} has no {'expert' if count < 1 else 'unit'}")
        groups.append(Group(name=name, count=count, width=width))
    check_size(groups, text)
    return tuple(groups)


def read_split(text: str | int) -> tuple[int, int]:
    """Read ``2+14``, experts that are always on and routed ones, or ``14`` for routed ones alone.

    Raises:
        OptionError: it can't be read, has no routed expert, or more experts than any model has.
    """
    match = _SPLIT.fullmatch(str(text).replace(" ", "")) if type(text) in (int, str) else None
    if match is None:
        raise OptionError(f"experts={shown(text)} can't be read: write 2+14 (always on + routed), or a number")
    always, routed = int(match["always"] or 0), int(match["routed"])
    if not routed:
        raise OptionError(f"experts={shown(text)} don't divide anything: there is no routed expert")
    if always + routed > MAX_EXPERTS:
        raise OptionError(f"experts={shown(text)} are more than any model has: {MAX_EXPERTS:,} at most")
    return always, routed


def check_merge(**given: str) -> None:
    """Raise OptionError for a ``router`` or ``attention`` of `hf_glu.merge_experts` that isn't one of theirs."""
    for option, value in given.items():
        if value not in (known := MERGES[option]):
            raise OptionError(f"{option} must be one of {', '.join(known)}, got {shown(value)}")


def check_growth(times: int, active: str) -> None:
    """Raise OptionError for a number of copies, or a choice of those that a token uses, that can't be."""
    if type(times) is not int or not 2 <= times <= MAX_EXPERTS:
        raise OptionError(f"times must be a number of copies, 2 to {MAX_EXPERTS:,}, got {shown(times)}")
    if active not in ACTIVE:
        raise OptionError(f"active must be one of {', '.join(ACTIVE)}, got {shown(active)}")


def check_size(groups: Sequence[Group], text: str) -> None:
    """Raise OptionError where there are more experts, or units in them, than any model has."""
    count, units = (sum(group.count * (group.width or 1 if wide else 1) for group in groups) for wide in (False, True))
    if count > MAX_EXPERTS or units > MAX_UNITS or any((group.width or 1) > MAX_WIDTH for group in groups):
        raise OptionError(
            f"experts={shown(text)} are {count:,} experts with {units:,} units or more, which no model has: at most "
            f"{MAX_EXPERTS:,} experts of {MAX_WIDTH:,} units, {MAX_UNITS:,} units in all"
        )


def write_groups(groups: tuple[Group, ...]) -> str:
    """Return what `read_groups` reads."""
    return ",".join(f"{g.name}{f':{g.width}' if g.width else ''}*{g.count}" for g in groups)


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """How the experts of one FFN are chosen and trained.

    Attributes:
        groups: the experts, such as ``relu*2,gelu*2,swiglu*4``.
        top_k: experts that each token uses; their weights sum to 1.
        shared: experts that every token uses beside them, such as ``swiglu:512``; None: none.
        router: ``softmax`` or ``sigmoid`` scores.
        weights: ``scores`` (renormalised to sum to 1) or ``ones``: what the outputs are multiplied by.
        balance: coefficient of the load-balancing loss (Switch, https://arxiv.org/abs/2101.03961).
        z: coefficient of the router z-loss (ST-MoE, https://arxiv.org/abs/2202.08906).
        bias_rate: step of the loss-free balancing (https://arxiv.org/abs/2408.15664), such as 0.001: a bias that only
            the choice of experts sees goes up where fewer tokens went, after each backward pass; 0: none.
        jitter: the router's inputs are multiplied by uniform noise within 1 - jitter and 1 + jitter in training.
        backend: ``grouped`` (one GEMM for a group) or ``loop``; None: what the device, dtype and shape allow.
        copies: what `hf_glu.grow_experts` has made of each expert, on the mean: the router chooses among the number of
            experts divided by this, and a second one among the copies of each.
        sources: the names of the models that the experts come from, in their order (`hf_glu.merge_experts`); None:
            they come from one.

    Raises:
        OptionError: a value out of range, or more experts a token than there are.
    """

    groups: str
    top_k: int = 2
    shared: str | None = None
    router: str = "softmax"
    weights: str = "scores"
    balance: float = 0.01
    z: float = 0.001
    bias_rate: float = 0.0
    jitter: float = 0.0
    backend: str | None = None
    copies: int = 1
    sources: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for key in ("groups", "shared"):
            value = getattr(self, key)
            if not isinstance(value, str) and not (key == "shared" and value is None):
                raise OptionError(f"experts {key} must be such as 'relu*2,swiglu*4', got {shown(value)}")
        if type(self.copies) is not int or self.copies < 1 or any(g.count % self.copies for g in self.experts):
            raise OptionError(
                f"copies must divide the experts of each group of {self.groups}, got {shown(self.copies)}"
            )
        if type(self.top_k) is not int or not 1 <= self.top_k <= self.originals:
            raise OptionError(f"top_k must be 1 to {self.originals}, the number of experts, got {shown(self.top_k)}")
        if self.router not in ROUTERS:
            raise OptionError(f"router must be one of {', '.join(ROUTERS)}, got {shown(self.router)}")
        if self.weights not in WEIGHTS:
            raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, got {shown(self.weights)}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, got {shown(self.backend)}")
        for key in ("balance", "z", "bias_rate", "jitter"):
            value = getattr(self, key)
            if not is_number(value) or not 0 <= value < LARGEST:
                raise OptionError(f"experts {key} must be at least 0 and below {LARGEST:g}, got {shown(value)}")
        if self.shared:
            read_groups(self.shared)
        self._check_sources()

    def _check_sources(self) -> None:
        """Keep the names of the sources in a tuple; raise OptionError where they are none, or not one for each."""
        names = self.sources
        if names is None:
            return
        listed = isinstance(names, (list, tuple)) and len(names) == self.count
        if not listed or not all(isinstance(name, str) and len(name) <= LONGEST for name in names):
            raise OptionError(f"experts sources must be a list of {self.count} names, got {shown(names)}")
        object.__setattr__(self, "sources", tuple(names))

    @property
    def experts(self) -> tuple[Group, ...]:
        """The routed experts."""
        return read_groups(self.groups)

    @property
    def always_on(self) -> tuple[Group, ...]:
        """The shared experts."""
        return read_groups(self.shared) if self.shared else ()

    @property
    def count(self) -> int:
        """The number of routed experts."""
        return sum(group.count for group in self.experts)

    @property
    def originals(self) -> int:
        """The number of experts that the router chooses among."""
        return self.count // self.copies

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any] | None) -> ExpertOptions | None:
        """Validate an entry of ``config.hf_glu``; None: no experts."""
        if entry is None:
            return None
        if not isinstance(entry, Mapping) or "groups" not in entry:
            raise OptionError(f"config.hf_glu experts must be a dict with groups, got {shown(entry)}")
        refuse_unknown(entry, (field.name for field in fields(cls)), "config.hf_glu experts")
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """Return what isn't the default."""
        defaults = {field.name: field.default for field in fields(self)}
        values = {**asdict(self), "sources": None if self.sources is None else list(self.sources)}
        return {key: value for key, value in values.items() if key == "groups" or value != defaults[key]}
