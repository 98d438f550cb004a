"""How phi(g) * u and its gradient are computed without keeping phi(g): by torch's kernels, block by block.

With d the gradient of y:  dg = d u phi'(g),  du = d phi(g).

Shapes: x ``[..., 2 W]`` = ``[g | u]``, y and d ``[..., W]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from hf_glu.activation.blocks import LARGE, rows_of, split
from hf_glu.activation.elementwise import OTHER_LIBRARY
from hf_glu.activation.mixing import Kernel, aten, by_autograd, kernel_of

# torch's kernels of what Transformers writes as a formula: other bits, so that gradients only are made with them
ROUNDED = {
    NewGELUActivation: Kernel(
        lambda x, y: aten.gelu.out(x, approximate="tanh", out=y),
        lambda d, x, y, out: aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=out),
    )
}
VECTOR = 64  # elements that torch's kernels take at once at most; the last ones of fewer have other bits, by an ulp
SIZE = 2**20  # elements of a block for each thread: smaller ones cost more to start than a cache's misses


def product(phi: nn.Module, contiguous: bool, x: Tensor, opened: Tensor | None = None) -> Tensor:
    """Return y of ``x``, bit by bit what `hf_glu.functional.gated` gives; phi(g) goes into ``opened``, too."""
    kernel, width = kernel_of(phi), x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    for x_b, y_b, opened_b in blocks(x, y, opened):
        g, u = x_b.split(width, -1)
        if contiguous:
            g = g.contiguous()
        value = y_b if opened_b is None else opened_b
        kernel.value(g, value) if kernel else value.copy_(phi(g))
        torch.mul(value, u, out=y_b)
    return y


def by_layout(phi: nn.Module, x: Tensor) -> bool:
    """Tell whether phi of a view of half of ``x`` has other bits than phi of a copy."""
    if x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():  # which can't trace what follows
        return True
    return x.shape[-1] // 2 % (VECTOR * torch.get_num_threads()) != 0 or isinstance(phi, OTHER_LIBRARY)


def fill_gradient(
    phi: nn.Module, contiguous: bool, x: Tensor, d: Tensor, dx: Tensor, opened: Tensor | None = None
) -> None:
    """Fill ``dx``, which may be ``x``; ``opened`` is phi(g), where torch has a kernel and that is known."""
    kernel, width = kernel_of(phi) or ROUNDED.get(type(phi)), d.shape[-1]
    value = slope = None
    for x_b, d_b, dx_b, opened_b in blocks(x, d, dx, opened):
        (g, u), (dg, du) = x_b.split(width, -1), dx_b.split(width, -1)
        if slope is None or value is None or len(slope) != len(g):
            value, slope = torch.empty_like(d_b), torch.empty_like(d_b)
        torch.mul(d_b, u, out=slope)
        if kernel:
            g_c = g.contiguous() if contiguous else g
            if opened_b is None:
                kernel.value(g_c, opened_b := value)
            torch.mul(d_b, opened_b, out=du)
            if contiguous and isinstance(phi, OTHER_LIBRARY):  # where its gradient is twice as fast
                kernel.slope(slope, g_c, opened_b, out := torch.empty_like(slope))
                dg.copy_(out)
            else:
                kernel.slope(slope, g, opened_b, dg)
        else:
            found, grown = by_autograd(phi, g, slope)
            torch.mul(d_b, found, out=du)
            dg.copy_(grown)


def blocks(x: Tensor, *others: Tensor | None) -> list[tuple[Any, ...]]:
    """Return the blocks of tensors that share the leading dimensions of ``x``; None stays None."""
    if x.numel() <= (SIZE * torch.get_num_threads() if x.device.type == "cpu" else LARGE):
        return [(x, *others)]
    flat = [None if tensor is None else tensor.flatten(end_dim=-2) for tensor in (x, *others)]
    rows = -(-rows_of(x.flatten(end_dim=-2), SIZE) // VECTOR) * VECTOR  # whole vectors
    return split(rows, *flat)
