"""``polynorm``: a trained sum of normalised powers (PolyCom, https://arxiv.org/abs/2411.03884).

    y = a_1 x / rms(x) + a_2 x^2 / rms(x^2) + a_3 x^3 / rms(x^3) + b,   rms(v) = sqrt(mean_channels(v^2) + 1e-6)

It has no gate, but isn't elementwise: a channel's value depends on all channels of its token. ``a`` begins at 1/3,
``b`` at 0; an activation has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.module import OwnedActivation

ORDER, EPSILON = 3, 1e-6


def polynorm(x: Tensor, coefficients: Tensor, offset: Tensor) -> Tensor:
    """Return the sum of normalised powers.

    Args:
        x: ``[..., width]``; the result has its shape.
        coefficients: ``[ORDER]``, of x, x^2, ...
        offset: ``[1]``.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # whose cubes float16 can't hold
    result, power = offset.to(wide.dtype), torch.ones_like(wide)
    for coefficient in coefficients.to(wide.dtype):
        power = power * wide
        result = result + coefficient * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + EPSILON)
    return result.to(x.dtype)


class PolyNorm(OwnedActivation):
    """A trained sum of normalised powers. Shapes: input and output ``[..., width]``."""

    name = "polynorm"
    gated = False
    elementwise = False

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.empty(ORDER))
        self.offset = nn.Parameter(torch.empty(1))
        if self.offset.device.type != "meta":
            self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return polynorm(x, self.coefficients, self.offset)

    def reset_parameters(self) -> None:
        """Begin at equal shares of the powers."""
        init.constant_(self.coefficients, 1 / ORDER)
        init.zeros_(self.offset)
