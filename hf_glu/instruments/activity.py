"""What the activations of a model do on data: how open the gates are, how sparse the hidden units, and how many dead.

With g ``[tokens, width]`` the pre-activation of a gate (of the activation, where the FFN is dense) and a
``[tokens, width]`` the hidden units that the out-projection is given, over all tokens that are no padding:

    open = mean(g > 0)    sparsity = mean(|a| <= e)    dead = mean over units of (max |a| <= e),    e = 1e-3 rms(a)

Where there are experts: how their routers spread those tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.errors import DataError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.forward import projections
from hf_glu.ffn.identify import describe_site
from hf_glu.ffn.sites import Site, find_sites, layer_of
from hf_glu.instruments.recorder import Batch, Call, Watch, run_batches, watching
from hf_glu.instruments.routing import expert_statistics, stack_of

THRESHOLD = 1e-3  # of the site's rms: what counts as zero


@dataclass(kw_only=True, eq=False)
class _Sums:
    """The running sums of one site; those of g in the first pass, the count below the threshold in the second."""

    site: Site
    values: int = 0
    open: int = 0
    total: float = 0.0
    squares: float = 0.0
    units: int = 0
    energy: float = 0.0
    small: int = 0
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def threshold(self) -> float:
        """What counts as zero: e."""
        return THRESHOLD * sqrt(self.energy / self.units)

    def watch_gate(self) -> Watch:
        """Return the watch of the projection that makes g."""
        return Watch(
            module=projections(self.site)[0], after=True, see=lambda call: self.add_gate(_wide(call, call.output))
        )

    def watch_units(self, add: Callable[[Tensor], None]) -> Watch:
        """Return the watch of the projection that is given the hidden units, which ``add`` is called with."""
        return Watch(module=projections(self.site)[-1], see=lambda call: add(_wide(call, call.x)))

    def add_gate(self, g: Tensor) -> None:
        """Add pre-activations ``[N, width]``, or ``[gate | up]`` where both come from one projection."""
        g = g[..., : self.site.width]
        self.values += g.numel()
        self.open += int((g > 0).sum())
        self.total += float(g.sum(dtype=torch.float64))
        self.squares += float(g.square().sum(dtype=torch.float64))

    def add_units(self, a: Tensor) -> None:
        """Add hidden units ``[N, width]``."""
        self.units += a.numel()
        self.energy += float(a.square().sum(dtype=torch.float64))
        if len(a):
            self.largest = torch.maximum(self.largest.to(a.device), a.abs().amax(0))

    def count_small(self, a: Tensor) -> None:
        """Count the hidden units ``[N, width]`` that are as good as zero."""
        self.small += int((a.abs() <= self.threshold).sum())

    def to_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return the row of `activation_statistics`."""
        described = describe_site(model, self.site)
        mean = self.total / self.values
        return {
            "site": self.site.name,
            **{key: described[key] for key in ("layer", "stack", "activation", "width")},
            "open": self.open / self.values,
            "sparsity": self.small / self.units,
            "dead": float((self.largest <= self.threshold).double().mean()),
            "gate_mean": mean,
            "gate_std": sqrt(max(0.0, self.squares / self.values - mean**2)),
        }


def _wide(call: Call, x: Tensor) -> Tensor:
    """Return the rows of ``x`` that are no padding, in float32."""
    return call.tokens.rows(x.detach()).float()


def activation_statistics(model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Return what the activations of each FFN site do on ``batches``, as rows of plain data.

    Each batch is run twice, since what counts as zero depends on the rms of all; only sums are kept. The model
    computes without dropout and autocast. Expert banks are skipped, and so are sites that the batches never reach.

    Args:
        model: the model, in any mode.
        batches: the forward's arguments; padding doesn't count (`hf_glu.instruments.tokens` says what tells of it).

    Returns:
        One row a site: ``site``, ``layer``, ``stack``, ``activation``, ``width``, and the shares ``open``,
        ``sparsity`` and ``dead``, the mean ``gate_mean`` and the standard deviation ``gate_std`` of g.

    Raises:
        DataError: there is no batch.
    """
    inputs = list(batches)
    if not inputs:
        raise DataError("there are no batches to compute the activations' statistics of")
    found = [_Sums(site=site) for site in find_sites(model) if site.kind != "experts"]
    if not found:
        return []
    with watching(model, [watch for sums in found for watch in (sums.watch_gate(), sums.watch_units(sums.add_units))]):
        run_batches(model, inputs)
    found = [sums for sums in found if sums.values and sums.units]
    with watching(model, [sums.watch_units(sums.count_small) for sums in found]):
        run_batches(model, inputs)
    return [sums.to_dict(model) for sums in found]


def expert_loads(model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """Return how the routers of ``model`` spread the tokens of ``batches`` that are no padding.

    Args:
        model, batches: as of `activation_statistics`.

    Returns:
        One row a layer with experts: ``site``, ``layer``, ``stack``, the ``activations`` of its experts, the ``load``
        (each expert's share of what the tokens are sent to, 1/E where all are used alike), the routers' mean
        ``entropy`` in nats, and the number of ``tokens``. None where the model has no experts.
    """
    found = find_experts(model)
    if not found:
        return []
    with expert_statistics(model) as counted:
        run_batches(model, batches)
    by_site = {row["layer"]: row for row in counted.to_dict()["rows"]}
    return [
        {"site": name, "layer": layer_of(name), "stack": stack_of(name),
         "activations": [group.name for group in ffn.options.experts for _ in range(group.count)],
         **{key: by_site[name][key] for key in ("load", "entropy", "tokens")}}
        for name, ffn in found.items() if name in by_site
    ]  # fmt: skip
