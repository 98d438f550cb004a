"""Whole FFNs against the formula, with whatever may stand around the gate, and with what is switched on for a model.

Out-projection(act(in-projection(h))) of GPT-2, T5 and BERT: as it is, within `hf_glu.save_memory`, fused, or skipping
zeros; with hooks that change what passes, in place or not; before and after weights are changed through ``.data``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import hf_glu
from hf_glu.errors import NoSiteError

from . import tools
from .activations import causal, constants_of, copies, draw_name, draw_options, formula_of, stir
from .formulas import Name
from .running import Tally, main

sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))

from pico import FAMILIES

HIDDEN, WIDTH = 16, 40
ASKED = ("values", "first", "first", "backward", "create_graph", "one copy", "offloaded", "checkpointed")


@dataclass(frozen=True)
class Between:
    """Something around a gate: how it is put there, and what it multiplies by.

    Attributes:
        put: puts it into (in-projection, activation, out-projection).
        before, after, end: factors of what the in-projection, the activation and the out-projection give.
    """

    put: Callable[[nn.Module, nn.Module, nn.Module], object]
    before: float = 1.0
    after: float | Tensor = 1.0
    end: float = 1.0


MASK = (torch.arange(WIDTH) % 3 > 0).double() * 1.5  # as dropout's
BETWEEN = {
    "nothing": Between(lambda i, a, o: None),
    "hook": Between(lambda i, a, o: a.register_forward_hook(lambda m, x, y: y * 0.5), after=0.5),
    "hook in place": Between(lambda i, a, o: a.register_forward_hook(lambda m, x, y: y.mul_(0.5)), after=0.5),
    "dropout in place": Between(
        lambda i, a, o: a.register_forward_hook(lambda m, x, y: y.mul_(MASK.to(y.dtype))), after=MASK
    ),
    "pre-hook in place": Between(
        lambda i, a, o: o.register_forward_pre_hook(lambda m, x: (x[0].mul_(0.5),)), after=0.5
    ),
    "pre-hook": Between(lambda i, a, o: o.register_forward_pre_hook(lambda m, x: (x[0] * 0.5,)), after=0.5),
    "after the in-projection": Between(lambda i, a, o: i.register_forward_hook(lambda m, x, y: y * 2), before=2.0),
    "after the out-projection": Between(lambda i, a, o: o.register_forward_hook(lambda m, x, y: y * 2), end=2.0),
}
SWITCHES = ("nothing", "nothing", "save_memory", "save_memory", "skip_zeros", "fuse")
CLOSING = ("relu", "relu2")  # gates that skip_zeros knows


@dataclass(frozen=True)
class Case:
    """One FFN.

    Attributes:
        family: of `tests/helpers/pico.py`.
        name, options: of its activation.
        switch: what is switched on for the model.
        between: of `BETWEEN`.
        lead: the input's dimensions before the last.
        tool: of `tools.TOOLS`.
        dtype, training: of the model.
        frozen: the out-projection.
        seed: of all values.
    """

    family: str
    name: Name
    options: dict[str, Any]
    switch: str
    between: str
    lead: tuple[int, ...]
    tool: str
    dtype: torch.dtype
    training: bool
    frozen: bool
    seed: int


def draw(random: Random) -> Case:
    """Return any case; compiling takes long, so that fusing is rare."""
    switch = random.choice(SWITCHES if random.random() < 0.03 else SWITCHES[:-1])
    name = draw_name(random)
    while not name.gated:
        name = draw_name(random)
    if switch == "fuse":
        name = Name(random.choice(("swiglu", "geglu", "geglu_new")))
    if switch == "skip_zeros":
        name = Name(random.choice(("reglu", "relu2glu")))
    # by itself, an FFN that is computed again doesn't know its model's tokens, and says so
    asked = [tool for tool in ASKED if tool != "checkpointed" or not name.wrappers]
    tokens = (1, 2, 4) if switch == "skip_zeros" else (2, 5)
    family = random.choice(("gpt2", "t5") if switch == "skip_zeros" else ("gpt2", "t5", "bert"))
    options = draw_options(random, name, WIDTH)
    if family != "bert":  # a decoder would see later tokens, which is refused
        causal(options)
    return Case(
        family=family,
        name=name,
        options=options,
        switch=switch,
        between=random.choice(sorted(BETWEEN)),
        lead=random.choice(((1, random.choice(tokens)), (random.choice(tokens), 1))),
        tool="values" if switch == "skip_zeros" else random.choice(asked),
        dtype=random.choice((torch.float64, torch.float32, torch.float32, torch.bfloat16)),
        training=random.random() < 0.5,
        frozen=random.random() < 0.2,
        seed=random.randrange(10**6),
    )


class Spread(nn.Module):
    """BERT's FFN, which is spread over two modules."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first, self.second = layer.intermediate, layer.output.dense

    def forward(self, h: Tensor) -> Tensor:
        """Apply it."""
        out: Tensor = self.second(self.first(h))
        return out


# family -> the FFN, and its in-projection, activation and out-projection by name
PARTS: dict[str, tuple[Callable[[Any], nn.Module], tuple[str, str, str]]] = {
    "gpt2": (lambda model: model.transformer.h[0].mlp, ("c_fc", "act", "c_proj")),
    "t5": (lambda model: model.encoder.block[0].layer[1].DenseReluDense, ("wi", "act", "wo")),
    "bert": (lambda model: Spread(model.bert.encoder.layer[0]), ("first.dense", "first.intermediate_act_fn", "second")),
}
QUIET = {"gpt2": {"resid_pdrop": 0.0}, "t5": {"dropout_rate": 0.0}, "bert": {}}


def build(case: Case) -> nn.Module:
    """Return the FFN of a model that is made for the case."""
    family, (find, parts) = FAMILIES[case.family], PARTS[case.family]
    more = {family.field: str(case.name), **QUIET[case.family]}
    model = family.make(seed=case.seed, hf_glu=case.options or None, **more).to(case.dtype).train(case.training)
    if case.switch == "skip_zeros":
        model.eval()
        hf_glu.skip_zeros(model, most_open=1.0)
    elif case.switch != "nothing":
        try:
            getattr(hf_glu, case.switch)(model)
        except NoSiteError:
            assert case.switch == "fuse"
    ffn = find(model)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(std=0.3)
    stir(ffn.get_submodule(parts[1]), case.seed)
    in_proj, act, out_proj = (ffn.get_submodule(part) for part in parts)
    out_proj.requires_grad_(not case.frozen)
    BETWEEN[case.between].put(in_proj, act, out_proj)
    return ffn


def plainly(case: Case, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the FFN as a formula with these parameters, of its output and of what N is given."""
    formula, between = formula_of(case.name, case.options), BETWEEN[case.between]
    in_name, act_name, out_name = PARTS[case.family][1]
    inside = {name.removeprefix(f"{act_name}."): each for name, each in tensors.items() if name.startswith(act_name)}

    def project(x: Tensor, name: str) -> Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        y = x @ (weight if case.family == "gpt2" else weight.T)
        return y if bias is None else y + bias

    def called(h: Tensor) -> tuple[Tensor, Tensor]:
        after = between.after.to(h.dtype) if isinstance(between.after, Tensor) else between.after
        hidden, z = formula(project(h, in_name) * between.before, constants_of(inside))
        return project(hidden * after, out_name) * between.end, z

    return called


def check(case: Case) -> Tally:
    """Compare an FFN with its formula, and again after its weights were changed through ``.data``."""
    tally, ffn = Tally(), build(case)
    torch.manual_seed(case.seed)
    h = torch.randn(*case.lead, HIDDEN, dtype=torch.float64).to(case.dtype)
    before = h.clone()
    for tool in (case.tool, "values"):
        answers = {dtype: _answers(case, ffn, tool, h, dtype) for dtype in (None, torch.float64, case.dtype)}
        for label, value in answers[None].items():
            if "gradient" in label and _undecided(case, ffn, h):
                tally.undecided += 1
            else:
                tally.close(label, value, answers[torch.float64][label], answers[case.dtype][label], case.dtype)
        for parameter in ffn.parameters():
            parameter.data.mul_(1.25)
    tally.same("the input afterwards", h, before)
    return tally


def _answers(case: Case, ffn: nn.Module, tool: str, h: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = copies(ffn, dtype or case.dtype)
    learned = {name for name, parameter in ffn.named_parameters() if parameter.requires_grad}
    parameters = [
        each for name, each in (tensors if dtype else dict(ffn.named_parameters())).items() if name in learned
    ]
    asked = h.detach().to(dtype or case.dtype, copy=True).requires_grad_()
    formula = plainly(case, tensors)
    function = (lambda h: formula(h)[0]) if dtype else ffn
    return tools.TOOLS[tool](function, asked, parameters, torch.Generator().manual_seed(case.seed))


def _undecided(case: Case, ffn: nn.Module, h: Tensor) -> bool:
    """Tell whether rounding may put a value on the other side of a kink."""
    z = plainly(case, copies(ffn, torch.float64))(h.double())[1].detach()
    margin = 64 * torch.finfo(case.dtype).eps * (1 + float(z.abs().max()))
    return any(float((z - kink).abs().min()) < margin for kink in case.name.kinks)


if __name__ == "__main__":
    main("networks", draw, check, 2000)
