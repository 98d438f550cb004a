"""Activations and their wrappers against the formulas, however their gradients are asked for.

A case is one activation with its options, an input (its layout, where it comes from, what else uses it) and a tool: a
way of asking for values and derivatives. The same tool is used on the formula in float64, which is right, and on the
formula in the case's precision, which shows how much rounding is to be expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_glu.activation.context.confidence import Confidence
from hf_glu.config.glu import GluConfig

from . import formulas, tools
from .formulas import Name
from .running import Tally, main

LAYOUTS: dict[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]] = {
    "contiguous": lambda shape: (shape, lambda t: t),
    "transposed": lambda shape: ((*shape[:-2], shape[-1], shape[-2]), lambda t: t.transpose(-1, -2)),
    "strided": lambda shape: ((*shape[:-1], 2 * shape[-1]), lambda t: t[..., ::2]),
    "inside": lambda shape: ((*shape[:-1], shape[-1] + 3), lambda t: t[..., 1:-2]),
    "rows": lambda shape: ((2 * shape[0], *shape[1:]), lambda t: t[::2]),
    "expanded": lambda shape: ((1, *shape[1:]), lambda t: t.expand(shape)),
    "stretched": lambda shape: ((*shape[:-1], 1), lambda t: t.expand(shape)),
    "offset": lambda shape: ((1 + torch.Size(shape).numel(),), lambda t: t[1:].view(shape)),
}
NEEDS_ROWS = ("transposed", "rows", "expanded")
OVERLAPPING = ("expanded", "stretched")  # of which torch's checks by difference quotients want nothing to know
ORIGINS = ("leaf", "view", "product", "numpy")
COMPANIONS = ("", "", "sin", "kept", "alias")
SECTIONS = {"stateful_": "state", "canon_": "canon", "smear_": "smear"}  # of those that read other tokens
LOUD = (
    "mix", "choice", "features", "alpha", "beta", "decay", "threshold", "slope", "taps", "share", "offset", "response",
)  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One activation, its input, and how it is asked.

    Attributes:
        name: of the activation.
        options: as ``config.hf_glu`` has them.
        width: its channels.
        lead: the input's dimensions before the last.
        layout: of `LAYOUTS`.
        origin: where the input comes from: a leaf, a view of one, what an operation gives, what numpy gives.
        companion: what else uses the input: a built-in function, one that keeps it by itself, an alias of its memory.
        tool: of `tools.TOOLS`.
        dtype, training, autocast: of the activation.
        seed: of all values.
    """

    name: Name
    options: dict[str, Any]
    width: int
    lead: tuple[int, ...]
    layout: str
    origin: str
    companion: str
    tool: str
    dtype: torch.dtype
    training: bool
    autocast: bool
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The input's."""
        return (*self.lead, self.width * (1 + self.name.gated))


def draw_name(random: Random, *, hearing: bool = False) -> Name:
    """Return any name that the registry is to know, but for those of Transformers; ``hearing``: of an expert's, too."""
    known = (*formulas.WRAPPERS, *formulas.HEARING) if hearing else formulas.WRAPPERS
    wrappers = tuple(wrapper for wrapper in known if random.random() < 0.3)
    bases = [*formulas.GATES, *formulas.FORMULAS, *(f"{name}_glu" for name in formulas.ELEMENTWISE)]
    mix = random.choice(("", "", *formulas.MIXES))
    if wrappers or mix:
        bases += formulas.ELEMENTWISE
    base = random.choice(bases)
    if base in formulas.FORMULAS:
        return Name(base, wrappers)
    functions = tuple(random.sample(sorted(formulas.ELEMENTWISE), random.randint(1, 3)))
    return Name(base, wrappers, mix, functions if mix and random.random() < 0.5 else ())


def draw_options(random: Random, name: Name, width: int) -> dict[str, Any]:
    """Return options that an activation of this name takes."""
    options: dict[str, Any] = {}
    if name.mix:
        options["mix"] = {"per": random.choice(("layer", "channel"))}
        if name.functions:
            options["mix"]["functions"] = list(name.functions)
        if name.mix == "moa_":
            rank = random.choice((None, 1, min(2, width)))
            options["mix"] |= {"gate": random.choice(("softmax", "linear"))} | ({"rank": rank} if rank else {})
    if "stateful_" in name.wrappers:
        options["state"] = {"direction": random.choice(("forward", "both")), "learnable": random.random() < 0.7}
    if "canon_" in name.wrappers:
        options["canon"] = {"direction": random.choice(("forward", "both")), "kernel": random.randint(2, 5)}
    if "smear_" in name.wrappers:
        options["smear"] = {"direction": random.choice(("forward", "both")), "open": random.choice((0.1, 0.5))}
    return options


def causal(options: dict[str, Any]) -> None:
    """Have what reads other tokens read those before only."""
    for key in SECTIONS.values():
        if key in options:
            options[key]["direction"] = "forward"


def draw(random: Random) -> Case:
    """Return any case."""
    name, dtype = draw_name(random, hearing=True), random.choice(DTYPES)
    tool = random.choice([tool for tool in tools.TOOLS if dtype == torch.float64 or tool not in tools.EXACT])
    small, functional = tool in tools.SMALL, tool in tools.FUNCTIONAL
    width = random.choice((1, 2, 3) if small else (1, 3, 8, 17, 64))
    lead = tuple(random.choice((1, 2) if small else (1, 2, 5, 0)) for _ in range(random.randint(0, 2)))
    if functional and (not lead or 0 in lead):
        lead = (2,)
    layouts = [layout for layout in LAYOUTS if lead or layout not in NEEDS_ROWS]
    layouts = [layout for layout in layouts if tool not in tools.EXACT or layout not in OVERLAPPING]
    plain, once = functional or tool in tools.EXACT, tool not in tools.TWICE
    origins = ORIGINS if once and dtype in (torch.float32, torch.float64) else ORIGINS[:-1]
    companions = [companion for companion in COMPANIONS if once or companion != "kept"]
    return Case(
        name=name,
        options=draw_options(random, name, width),
        width=width,
        lead=lead,
        layout="contiguous" if functional else random.choice(layouts),
        origin="leaf" if plain else random.choice(origins),
        companion="" if plain else random.choice(companions),
        tool=tool,
        dtype=dtype,
        training=random.random() < 0.5,
        autocast=dtype == torch.float32 and not plain and random.random() < 0.15,
        seed=random.randrange(10**6),
    )


@torch.no_grad()
def stir(act: nn.Module, seed: int) -> None:
    """Give an activation constants that do something."""
    for name, tensor in (*act.named_parameters(), *act.named_buffers()):
        key = name.rpartition(".")[2]
        if key == "annealed":
            tensor.fill_((0.0, 1.0, 0.3)[seed % 3])
        elif key in LOUD and tensor.ndim:
            tensor.normal_()
        elif key in ("weight", "alpha_p", "alpha_n"):
            tensor.uniform_(0.1, 0.9)


def copies(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name, as leaves of another precision."""
    learned = dict(module.named_parameters())
    tensors = {**learned, **dict(module.named_buffers())}
    return {name: each.detach().to(dtype, copy=True).requires_grad_(name in learned) for name, each in tensors.items()}


def constants_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an activation's parameters and buffers under the names that the formulas have for them."""
    found = {}
    depths = sorted({depth for name in tensors if (depth := _depth(name)) is not None})
    for name, tensor in tensors.items():
        *path, key = name.split(".")
        if "functions" in path:
            key = f"{path[path.index('functions') + 1]}.{key}"
        elif (depth := _depth(name)) is not None:
            key = f"{depths.index(depth)}:{key}"
        elif key not in ("mix", "annealed", "choice", "features"):
            key = f"own.{key}"
        found[key] = tensor
    return found


def _depth(name: str) -> int | None:
    """Return how deep a wrapper's parameter is, None for what is no wrapper's: shift, then inner, inner_2, ..."""
    owner = name.rpartition(".")[0]
    if (inner := re.fullmatch(r"inner(?:_(\d+))?", owner)) is not None:
        return int(inner[1] or 1)
    return owner.count(".") if owner.endswith("shift") else None


def formula_of(name: Name, options: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the formula of an activation with options."""
    kind = (options.get("mix") or {}).get("gate", "softmax")
    directions = {wrapper: (options.get(key) or {}).get("direction", "forward") for wrapper, key in SECTIONS.items()}
    return partial(formulas.evaluate, name, kind=kind, directions=directions)


def build(case: Case) -> nn.Module:
    """Return the activation as a model would have it."""
    act: Any = ACT2FN[str(case.name)]
    act.configure(GluConfig.from_dict(case.options), case.width)
    stir(act.to(case.dtype).train(case.training), case.seed)
    return act  # type: ignore[no-any-return]


def scores_of(case: Case) -> Tensor:
    """Return what a router gives the rows of an input, the same in each member of the first dimension."""
    return torch.rand(case.lead[1:], generator=torch.Generator().manual_seed(case.seed)).to(case.dtype)


def check(case: Case) -> Tally:
    """Compare an activation with its formula."""
    torch.manual_seed(case.seed)
    tally, act = Tally(), build(case)
    base, view = LAYOUTS[case.layout](case.shape)
    leaf = (2 * torch.randn(base, dtype=torch.float64)).to(case.dtype)
    leaf = view(leaf) if case.origin == "leaf" else leaf
    before, watched = leaf.clone(), tools.Watched()
    formula = partial(formula_of(case.name, case.options), scores=scores_of(case))
    hears = bool(set(case.name.wrappers) & set(formulas.HEARING))
    said = (Confidence(scores_of(case), 0),) if hears else ()

    def through(function: Callable[[Tensor], Tensor], ours: bool) -> Callable[[Tensor], Tensor]:
        def called(t: Tensor) -> Tensor:
            x = t if case.origin == "leaf" else view(tools.come_from(case.origin, t, ours))
            with torch.autocast("cpu", torch.bfloat16, enabled=ours and case.autocast):
                return tools.accompanied(function, x, case.companion, ours, watched)

        return called

    def answers(dtype: torch.dtype, ours: bool = False) -> dict[str, Tensor]:
        tensors = copies(act, dtype)
        constants = constants_of(tensors)
        function = (lambda x: act(x, *said)) if ours else lambda x: formula(x, constants)[0]
        parameters = list(act.parameters()) if ours else [each for each in tensors.values() if each.requires_grad]
        asked = leaf.detach() if ours else leaf.detach().to(dtype, copy=True)
        generator = torch.Generator().manual_seed(case.seed)
        return tools.TOOLS[case.tool](through(function, ours), asked.requires_grad_(), parameters, generator)

    rounded = torch.bfloat16 if case.autocast else case.dtype
    kinks = _undecided(case, formula, act, leaf, view)
    got, right, low = answers(case.dtype, ours=True), answers(torch.float64), answers(rounded)
    for label, value in got.items():
        if kinks and label != "value":
            tally.undecided += 1
        else:
            tally.close(label, value, right[label], low[label], rounded)
    if not case.autocast:
        tally.expect(got.get("value", leaf).dtype == case.dtype, f"the value is {got.get('value', leaf).dtype}")
    tally.same("the input afterwards", leaf.detach(), before)
    for alias, then in watched:
        tally.same("the input's memory afterwards", alias, then)
    return tally


def _undecided(case: Case, formula: Any, act: nn.Module, leaf: Tensor, view: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether rounding may put a value on the other side of a kink, or a difference quotient reaches across."""
    if not case.name.kinks or 0 in case.shape:
        return False
    t = leaf.detach().double()
    x = t if case.origin == "leaf" else view(tools.come_from(case.origin, t, False))
    z = formula(x, constants_of(copies(act, torch.float64)))[1].detach()
    near = min(float((z - kink).abs().min()) for kink in case.name.kinks)
    exact = not case.name.wrappers and case.origin != "numpy" and case.tool not in tools.EXACT
    margin = 1e-4 if case.tool in tools.EXACT else 64 * torch.finfo(case.dtype).eps * (1 + float(z.abs().max()))
    return not exact and near < margin


if __name__ == "__main__":
    main("activations", draw, check, 6000)
