"""``kappa_N``: a gate that is the sharper, or the softer, the surer the router is of its expert.

    y = N(slope g) [* u],   slope_j = 1 + a_j r

for each unit j of an expert; r is how much the router gives a token's expert. In experts of ours it is the expert's
score (softmax or sigmoid) before the chosen ones are renormalised, so that it says something with one expert a token,
and where all weigh 1; in a family's own bank it is the weight ``top_k_weights`` that the family hands over, since no
logits arrive there. Either way it has its gradient, and the router learns from it. The a are 0 at a conversion, so that
nothing changes, and each has the gradient sum_t dz_t r_t g_t from the first step on. Cf. kappa-SwiGLU, Li et al. 2026
(https://arxiv.org/abs/2606.00761), whose slope is one of silu and of the router's logit.

r is an argument of each call, from the experts to here: nothing is kept, so that none is of another call. Outside of
experts there is no router: conversions and configs that ask for it there are refused.

Shapes: N rows, which are pairs of token and expert; E experts; W units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.kernels.known import is_bare, is_known
from hf_glu.activation.kernels.sharpening import sharpen
from hf_glu.activation.kernels.special import FORMULAS
from hf_glu.activation.module import GatedActivation
from hf_glu.activation.wrapped import Shift, WrappedFormula, WrappedGate, shifts
from hf_glu.errors import OptionError

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig

_PURE = (GatedActivation, WrappedFormula, WrappedGate)  # what computes nothing but what is inside of it


class Sharpness(Shift):
    """slope g, both ``[N, W]``.

    Attributes:
        experts: E, those that share the activation: 1, unless `for_experts` says more.
        response: a ``[E, W]``.
    """

    hears = True

    def __init__(self) -> None:
        super().__init__()
        self.experts = 1
        self.response: nn.Parameter | None = None

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the parameters of ``width`` units."""
        self.response = nn.Parameter(torch.empty(self.experts, width))
        if self.response.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Without effect at first."""
        if self.response is not None:
            init.zeros_(self.response)

    def neutral(self) -> bool:
        """Return whether it does nothing."""
        return self.response is None or not bool(self.response.any())

    def forward(self, gate: Tensor, confidence: Confidence | None = None) -> Tensor:
        """Return the sharpened gate; the gate itself until it is `configure`d.

        Raises:
            OptionError: it is called by what is no expert, or by one that doesn't say what its router gave.
        """
        if self.response is None:
            return gate
        if confidence is None:
            raise OptionError("kappa_ activations read what a router gives their expert, and are told of none here")
        scores, experts, own = confidence
        if own is None and isinstance(experts, Tensor) and isinstance(scores, Tensor):
            return sharpen(gate, scores.to(gate.dtype), self.response.to(gate.dtype), experts)
        own = (self.response[experts] if own is None else own).to(gate.dtype)
        if not isinstance(scores, Tensor):  # while decoding, where each operation takes longer than what it does
            return torch.addcmul(gate, gate, own, value=scores)
        return sharpen(gate, scores.to(gate.dtype), own)


def for_experts(act: nn.Module, experts: int) -> None:
    """Let an activation be that of so many experts, each with an a of its own; before it is configured."""
    for shift in shifts(act):
        if isinstance(shift, Sharpness):
            shift.experts = experts


def copy_responses(act: nn.Module, owner: Tensor) -> None:
    """Let an activation be that of copies of its experts, each with the a of the one that ``owner`` ``[M]`` says."""
    for shift in shifts(act):
        if isinstance(shift, Sharpness) and shift.response is not None:
            old, shift.experts = shift.response, len(owner)
            shift.response = nn.Parameter(old.detach()[owner.to(old.device)], requires_grad=old.requires_grad)


def response_of(act: nn.Module) -> Tensor | None:
    """Return the a ``[E, W]`` of an activation that is a known function of it, of its input and of r.

    It has no other parameters then, and may be computed again. None: any other activation.
    """
    found = shifts(act)
    if len(found) != 1 or not isinstance(found[0], Sharpness) or not isinstance(act, _PURE):
        return None
    formula = getattr(act, "formula", None)
    known = formula in (None, *FORMULAS) and all(map(_is_pure, act.modules()))
    return found[0].response if known else None


def _is_pure(part: nn.Module) -> bool:
    return (type(part) in (*_PURE, Sharpness) and is_bare(part)) or is_known(part)


# label of a figure -> a r
CASES = {"a r = 1": 1.0, "a r = -0.5": -0.5}


def curves(g: Tensor) -> dict[str, Tensor]:
    """Return gates ``[G]`` as they are in some cases, by their labels in a figure."""
    return {label: sharpen(g, g.new_tensor(steeper), torch.ones_like(g)) for label, steeper in CASES.items()}
