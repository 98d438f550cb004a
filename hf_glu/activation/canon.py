"""``canon_N``: a short convolution over the gate's pre-activations, beside them (a Canon layer in the gate).

    z_t = g_t + sum_i w_i g_(t-i),   i = 0 ... k - 1
    y_t = N(z_t) [* u_t]

per channel (depthwise), causal; g_(t-i) is the gate i valid tokens earlier in the same text, 0 before its first. The w
are 0 at a conversion, so that nothing changes, and each has the gradient sum_t dz_t g_(t-i), so that all are trained
from the first step on. This is the Canon layer of Allen-Zhu 2025, "Physics of Language Models: Part 4.1"
(https://arxiv.org/abs/2512.17351), with its residual, where it stands in an FFN, on the gate alone.

Shapes: T tokens, W channels, k tokens of the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.recent import Before, Recent
from hf_glu.config.canon import CanonOptions

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig

PAPER = "Allen-Zhu 2025 (Canon layers), https://arxiv.org/abs/2512.17351"
EQUATION = "z = g + sum_i w_i g[t - i]"
MAX_KERNEL = 64


class Convolution(Recent):
    """z of g, both ``[..., W]``.

    Attributes:
        taps: w ``[k, W]``.
    """

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the kernels of ``width`` channels."""
        found = options.read(CanonOptions)
        self.reach, self.direction = found.kernel - 1, found.direction
        self.taps = nn.Parameter(torch.empty(found.kernel, width))
        if self.taps.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Without effect at first."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def neutral(self) -> bool:
        """Return whether z is g."""
        return not self.reach or not bool(self.taps.any())

    def mixed(self, now: Tensor, before: Before) -> Tensor:
        """Return g + sum_i w_i g_(t-i)."""
        taps = self.taps.to(now.dtype)
        z = torch.addcmul(now, taps[0], now)
        for back in range(1, self.reach + 1):
            z = torch.addcmul(z, taps[back], before(back))
        return z

    def at_last(self, now: Tensor, line: Tensor) -> Tensor:
        """Return the same of one token, as one product and one sum."""
        return now + (line * self.taps.to(now.dtype).flip(0)).sum(1, keepdim=True)


def curves(g: Tensor) -> dict[str, Tensor]:
    """Return z of gates ``[G]`` in some cases, by their labels in a figure."""
    return {"w_0 = 1": 2 * g, "w_1 = 1, g[t - 1] = 1": g + 1, "w_1 = -1, g[t - 1] = 1": g - 1}
