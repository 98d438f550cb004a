"""The recurrence of a stateful gate, token by token in float64, and inputs and options to run it on."""

from __future__ import annotations

import itertools

import torch

BATCH, TIMES, WIDTH = 3, 13, 16


def reference(gate, alpha, beta, decay, *, start=None, valid=None, restart=None, reverse=False):
    """The equations, one token after another."""
    batch, times, _ = gate.shape
    ends = torch.zeros(batch, times, dtype=torch.bool) if restart is None else restart
    if reverse:  # a state goes from t + 1 to t, unless a text starts at t + 1
        ends = torch.cat([ends[:, 1:], torch.zeros(batch, 1, dtype=torch.bool)], dim=1)
    s = torch.zeros_like(gate[:, 0]) if start is None else start
    z, states = [None] * times, [None] * times
    for t in reversed(range(times)) if reverse else range(times):
        p = torch.where(ends[:, t, None], 0.0, s)
        n = torch.sigmoid(gate[:, t])
        z[t] = gate[:, t] + alpha * p + beta * (n - p)
        s = decay * p + (1 - decay) * n
        if valid is not None:
            s = torch.where(valid[:, t, None], s, p)
        states[t] = s
    return torch.stack(z, 1), torch.stack(states, 1)


def inputs(times=TIMES, width=WIDTH, dtype=torch.float64, **decay):
    generator = torch.Generator().manual_seed(times)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    decays = torch.sigmoid(2 * randn(width)) if not decay else torch.full((width,), decay["decay"])
    gate, alpha, beta, start = 2 * randn(BATCH, times, width), randn(width), randn(width), randn(BATCH, width).abs()
    return [tensor.to(dtype).requires_grad_() for tensor in (gate, alpha, beta, decays, start)]


def masks(times=TIMES):
    """Padding at the left, in the middle and at the right; texts that start at the first token and elsewhere."""
    valid = torch.ones(BATCH, times, dtype=torch.bool)
    valid[0, :3] = valid[1, 4:6] = valid[2, -4:] = False
    restart = torch.zeros(BATCH, times, dtype=torch.bool)
    restart[0, 5] = restart[1, 0] = restart[1, 5] = restart[2, 7:9] = True
    return valid, restart


OPTIONS = [
    {"start": start, "valid": valid, "restart": restart, "reverse": reverse}
    for start, valid, restart, reverse in itertools.product((False, True), repeat=4)
]


def options_of(case, start, times=TIMES):
    valid, restart = masks(times)
    return {
        "start": start if case["start"] else None, "valid": valid if case["valid"] else None,
        "restart": restart if case["restart"] else None, "reverse": case["reverse"],
    }  # fmt: skip
