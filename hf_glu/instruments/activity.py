"""What the activations of a model do on data: how open the gates are, how sparse the hidden units, and how many dead.

With g ``[tokens, width]`` the pre-activation of a gate (of the activation, where the FFN is dense) and a
``[tokens, width]`` the hidden units that the out-projection is given, over all tokens that are no padding:

    open = mean(g > 0)    sparsity = mean(|a| <= e)    dead = mean over units of (max |a| <= e),    e = 1e-3 rms(a)

Where there are experts: how their routers spread those tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.config.layers import STACKS
from hf_glu.errors import DataError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.forward import projections
from hf_glu.ffn.identify import describe_site
from hf_glu.ffn.sites import Site, find_sites, layer_of
from hf_glu.instruments.probe import evaluating, with_decoder
from hf_glu.instruments.routing import expert_statistics

THRESHOLD = 1e-3  # of the site's rms: what counts as zero
IGNORED = -100  # the label of a position that is padding

Masks: TypeAlias = dict[str | None, list[Tensor]]


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
        return THRESHOLD * sqrt(self.energy / self.units)

    def add_gate(self, g: Tensor) -> None:
        g = g[..., : self.site.width]  # [gate | up] where both come from one projection
        self.values += g.numel()
        self.open += int((g > 0).sum())
        self.total += float(g.sum(dtype=torch.float64))
        self.squares += float(g.square().sum(dtype=torch.float64))

    def add_units(self, a: Tensor) -> None:
        self.units += a.numel()
        self.energy += float(a.square().sum(dtype=torch.float64))
        if len(a):
            self.largest = torch.maximum(self.largest.to(a.device), a.abs().amax(0))

    def count_small(self, a: Tensor) -> None:
        self.small += int((a.abs() <= self.threshold).sum())

    def to_dict(self, model: nn.Module) -> dict[str, Any]:
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


_Reader: TypeAlias = tuple[_Sums, int, Callable[[Tensor], None]]  # of the first (0) or last (-1) projection


def activation_statistics(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the activations of each FFN site do on ``batches``, as rows of plain data.

    Each batch is run twice, since what counts as zero depends on the rms of all; only sums are kept. The model
    computes without dropout and autocast. Expert banks are skipped, and so are sites that the batches never reach.

    Args:
        model: the model, in any mode.
        batches: the forward's arguments; ``attention_mask`` and ``decoder_attention_mask`` (else the labels -100) tell
            what is padding, which doesn't count.

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
    readers: list[_Reader] = [(sums, 0, sums.add_gate) for sums in found]
    _stream(model, inputs, readers + [(sums, -1, sums.add_units) for sums in found])
    found = [sums for sums in found if sums.values and sums.units]
    _stream(model, inputs, [(sums, -1, sums.count_small) for sums in found])
    return [sums.to_dict(model) for sums in found]


def expert_loads(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
    with ExitStack() as stack:  # each stack has its own padding
        counted = {name: stack.enter_context(expert_statistics(model)) for name in (None, *STACKS)}

        def see(masks: Masks) -> None:
            for name, statistics in counted.items():
                statistics.mask = next(iter(masks[name]), None)

        run_batches(model, batches, see)
    stacks = {name: next((part for part in name.split(".") if part in STACKS), None) for name in found}
    rows = [row for name, each in counted.items() for row in each.to_dict()["rows"] if stacks[row["layer"]] == name]
    by_site = {row["layer"]: row for row in rows}
    return [
        {"site": name, "layer": layer_of(name),
         "stack": stacks[name], "activations": [g.name for g in ffn.options.experts for _ in range(g.count)],
         **{key: by_site[name][key] for key in ("load", "entropy", "tokens")}}
        for name, ffn in found.items() if name in by_site
    ]  # fmt: skip


def _stream(model: Any, batches: list[Mapping[str, Any]], readers: list[_Reader]) -> None:
    """Run the batches; hand the output of the first, or the input of the last projection of a site to its reader."""
    masks: Masks = {}
    with _hooked(readers, masks):
        run_batches(model, batches, masks.update)


def run_batches(model: Any, batches: Iterable[Mapping[str, Any]], see: Callable[[Masks], None]) -> None:
    """Run the batches; hand what tells padding to ``see`` before each."""
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            see(_padding(model, inputs))
            model(**inputs if "labels" in inputs else with_decoder(model, inputs))


@contextmanager
def _hooked(readers: list[_Reader], masks: Masks) -> Iterator[None]:
    handles = []
    for sums, part, read in readers:
        module, take = projections(sums.site)[part], partial(read_valid, sums.site.stack, masks, read)
        if part == 0:
            handles.append(module.register_forward_hook(lambda module, args, output, take=take: take(output)))
        else:
            handles.append(module.register_forward_pre_hook(lambda module, args, take=take: take(args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_valid(stack: str | None, masks: Masks, read: Callable[[Tensor], None], x: Tensor) -> None:
    """Hand the rows of ``x`` that are no padding to ``read``."""
    x = x.detach().reshape(-1, x.shape[-1])
    # none is of its size where the model packs its tokens without padding, or runs the FFN in chunks
    mask = next((mask for mask in masks[stack] if mask.numel() == len(x)), None)
    read((x if mask is None else x[mask.reshape(-1)]).float())


def _padding(model: Any, batch: Mapping[str, Any]) -> Masks:
    """Return, for each stack, what may tell which tokens count, the best first."""
    given = {key: batch[key] for key in batch if batch[key] is not None}
    encoder = [given["attention_mask"].bool()] if "attention_mask" in given else []
    decoder = encoder
    if getattr(model.config, "is_encoder_decoder", False):
        if "decoder_attention_mask" in given:
            decoder = [given["decoder_attention_mask"].bool()]
        else:  # without ids of its own the decoder is given the labels, or the encoder's ids
            labels = [given["labels"] != IGNORED] if "labels" in given else []
            decoder = [*labels, *(encoder if "decoder_input_ids" not in given else [])]
    return {None: encoder, "encoder": encoder, "decoder": decoder}
