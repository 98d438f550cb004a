"""``smear_N``: the token before, mixed into the gate by a learned gate of its own.

    z_t = g_t + a sigmoid(v g_t + c) g_(t-1)
    y_t = N(z_t) [* u_t]

per channel; g_(t-1) is the gate at the valid token before in the same text, 0 at its first. a and v are 0 at a
conversion. With a = 0, z is g and nothing changes; the gate inside is half open then (c = 0, or what the options
say), so that a has the gradient sum_t dz_t sigmoid(c) g_(t-1) from the first step on; a shut sigmoid in place of a
would have next to none. v and c have theirs as soon as a is not 0: from the second step on. The token before comes in
by a learned gate in the smeared keys of Olsson et al. 2022, "In-context Learning and Induction Heads"
(https://arxiv.org/abs/2209.11895), and in the smear gate of modded-nanogpt, on embeddings.

Shapes: T tokens, W channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.recent import Before, Recent
from hf_glu.config.smear import SmearOptions

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig

PAPER = "cf. smeared keys, Olsson et al. 2022, https://arxiv.org/abs/2209.11895"
EQUATION = "z = g + a sigmoid(v g + c) g[t - 1]"


class Smear(Recent):
    """z of g, both ``[..., W]``.

    Attributes:
        share, slope, offset: a, v and c, ``[W]``.
    """

    options = SmearOptions()

    def configure(self, options: GluConfig, width: int) -> None:
        """Make the parameters of ``width`` channels."""
        self.options = options.read(SmearOptions)
        self.reach, self.direction = 1, self.options.direction
        self.share, self.slope, self.offset = (nn.Parameter(torch.empty(width)) for _ in range(3))
        if self.share.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Without effect at first, and as open as the options say."""
        for parameter in self.parameters():
            init.zeros_(parameter)
        if self.reach:
            init.constant_(self.offset, math.log(self.options.open / (1 - self.options.open)))

    def neutral(self) -> bool:
        """Return whether z is g."""
        return not self.reach or not bool(self.share.any())

    def mixed(self, now: Tensor, before: Before) -> Tensor:
        """Return g + a sigmoid(v g + c) g_(t-1)."""
        share, slope, offset = self.share.to(now.dtype), self.slope.to(now.dtype), self.offset.to(now.dtype)
        return torch.addcmul(now, share * torch.addcmul(offset, slope, now).sigmoid(), before(1))


def curves(g: Tensor) -> dict[str, Tensor]:
    """Return z of gates ``[G]`` in some cases, by their labels in a figure."""
    return {
        "a = 1, g[t - 1] = 2": g + 1, "a = 1, v = 2, g[t - 1] = 2": g + 2 * (2 * g).sigmoid(),
        "a = 1, v = -2, g[t - 1] = 2": g + 2 * (-2 * g).sigmoid(),
    }  # fmt: skip
