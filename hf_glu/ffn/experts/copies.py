"""Which copy of a chosen expert computes a token: the second, small router of experts that were grown.

The first router chooses k of E experts as ever. Of each, one of its copies computes the token, chosen by a linear map
of its own among the copies of that expert alone: with logits c = V x and the copies C(e) of expert e,

    q_j = softmax of c over C(e), j = argmax of q over C(e), y_j times weight_e q_j / q_j.detach()

The factor is 1, so that copies that are alike compute what their expert did, bit by bit, whatever V is; and it has a
gradient, which the choice learns from. As many copies as experts before compute a token.

Shapes: T tokens, H hidden size, E experts, M copies of all of them, k experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from hf_glu.activation.module import OwnedModule

STD = 0.02


def full_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in float32 at least, whatever autocast says: ``[T, E]`` of ``[T, H]`` and ``[E, H]``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(dtype), weight.to(dtype))
    return functional.linear(x.to(dtype), weight.to(dtype))


class Copies(OwnedModule):
    """Chooses one copy of each expert that a token was sent to.

    Args:
        hidden: H.
        count: E.
        times: M / E, the copies of an expert on the mean.

    Attributes:
        weight: V, ``[M, H]``.
        owner: whose copy each is, ``[M]``; at least one of each.
    """

    owner: Tensor

    def __init__(self, hidden: int, count: int, times: int) -> None:
        super().__init__()
        self.count, self.times = count, times
        self.weight = nn.Parameter(torch.empty(count * times, hidden))
        self.register_buffer("owner", torch.empty(count * times, dtype=torch.long))
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random weights: copies need different tokens to become different. As many copies of each expert."""
        init.normal_(self.weight, std=STD)
        init.copy_(self.owner, torch.arange(self.count, device=self.owner.device).repeat_interleave(self.times))

    def forward(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose for tokens ``[T, H]`` among the copies of their ``experts`` ``[T, k]``.

        Returns:
            The copies ``[T, k]``, what their weights are multiplied by ``[T, k]``, and the log q of all ``[T, M]``.
        """
        logits = full_linear(x, self.weight)
        index = self.owner.expand_as(logits)
        blank = logits.new_zeros(logits.shape[0], self.count)
        most = torch.full_like(blank, -torch.inf).scatter_reduce(1, index, logits.detach(), "amax")
        above = logits - most.gather(1, index)
        shares = above - blank.scatter_add(1, index, above.exp()).log().gather(1, index)
        last = self.weight.shape[0] - 1
        places = torch.arange(last + 1, device=x.device).expand_as(logits)
        best = torch.where(above.detach() == 0, places, last)  # the first where several are
        first = torch.full_like(blank, last, dtype=torch.long).scatter_reduce(1, index, best, "amin")
        chosen = first.gather(1, experts)
        share = shares.gather(1, chosen).exp()
        return chosen, share / share.detach(), shares

    def extra_repr(self) -> str:
        """Show how many there are in the model's printout."""
        return f"{len(self.owner)} copies of {self.count}"
