"""Telling whether two models are the same: bit by bit in their weights, and in their outputs.

A tensor that a file was mapped into need not lie where a tensor of torch's own would, and a matrix product on it may
round in another way: models are `align`ed before their outputs are compared.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes, of torch's own allocations on a CPU


def checksum(*tensors: Tensor) -> str:
    """Return a checksum of tensors' bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def checksums(model: nn.Module) -> dict[str, str]:
    """Return a checksum of each tensor of a model's state."""
    return {name: checksum(tensor) for name, tensor in model.state_dict().items()}


def align(model: nn.Module) -> None:
    """Move the tensors of ``model`` that torch would put elsewhere, so that products on them round as always."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
