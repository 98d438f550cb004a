"""Projections that leave out the small entries of their input: the weights of these aren't read while decoding.

For one token at inference on a CPU a kernel reads what counts, else the entries are set to 0 and the projection is
computed as ever, so that a text gives the same whether it is read at once or token by token. Gradients go straight
through: to all entries, as if none were left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.kernels.autodiff import needs_formula
from hf_glu.compat.of_torch import VERSION
from hf_glu.config.glu import GluConfig
from hf_glu.config.sparsity import METHODS, SparsityOptions
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.forward import is_alone, projections
from hf_glu.ffn.linear import LINEAR, AnyLinear, in_features, weight_rows
from hf_glu.ffn.sites import Site, find_sites
from hf_glu.ffn.sparse import lay_out
from hf_glu.ffn.sparse_kernel import DTYPES, kept, multiply_kept
from hf_glu.inplace import InPlace, become, become_stock, stock_class


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which entries of an input are left out.

    Attributes:
        threshold: of an entry's score.
        weighed, relative: as of `hf_glu.config.sparsity.Method`.
    """

    threshold: float
    weighed: bool
    relative: bool

    def keeps(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Return which entries of ``x`` ``[..., inputs]`` stay."""
        return kept(x, self.threshold, relative=self.relative, scale=scale)


class SparseLinear(InPlace):
    """What a projection becomes."""

    hf_glu_cut: Cut
    hf_glu_norms: tuple[Any, Tensor, Tensor]  # what the weight was, and its diagonal; |W_i| of each input

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the projection to what isn't left out of ``x``.

        Raises:
            RuntimeError: ``x`` has another size.
            ConversionError: a quantizer has put weights here whose norms can't be computed.
        """
        linear: Any = self
        if x.shape[-1] != in_features(linear):  # a kernel would read past the weights, and torch's own may, too
            raise RuntimeError(f"a projection of {in_features(linear)} inputs is given the shape {tuple(x.shape)}")
        cut, one = self.hf_glu_cut, x.numel() == x.shape[-1] and not torch.compiler.is_compiling()
        scale = norms_of(linear, fresh=x.ndim > 1 and x.shape[-2] > 1) if cut.weighed else None
        if one and not args and not kwargs and _is_readable(linear, x):
            rows = input_rows(linear)
            flat = x.reshape(-1).contiguous()
            y = multiply_kept(flat, rows, linear.bias, cut.threshold, relative=cut.relative, scale=scale)
            return y.view(*x.shape[:-1], -1)
        masked = torch.where(cut.keeps(x, scale), x, 0)
        if torch.is_grad_enabled() and x.requires_grad:
            masked = x + (masked - x).detach()  # straight through
        return super().forward(masked, *args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """Forget the norms."""
        vars(self).pop("hf_glu_norms", None)
        return super().train(mode)  # type: ignore[misc]


def norms_of(linear: Any, *, fresh: bool) -> Tensor:
    """Return |W_i| of each input, ``[inputs]`` in float32: as they were, where the weight is what it was.

    That is: the same memory, the same count of writes (by optimizers, ``load_state_dict``, anything under ``no_grad``),
    the same diagonal (merges of adapters write past that count, into all of ``weight.data``). Norms are computed anew
    at each call for several tokens, so when a text is read, after ``train()`` and ``eval()``, and for weights made in
    inference mode, which count nothing. What would go unseen until then writes through ``.data`` and leaves the
    diagonal alone.
    """
    if torch.compiler.is_compiling():
        return _norms(linear)
    weight, own = linear.weight, vars(linear)
    if type(weight) is not nn.Parameter or weight.is_inference():  # DTensors, quantized weights; nothing is counted
        return _norms(linear)
    state, diagonal = (weight.data_ptr(), VERSION.of(weight), weight.dtype), weight.detach().diagonal()
    known, then, norms = own.get("hf_glu_norms", (None, None, None))
    if fresh or known != state or not torch.equal(then, diagonal):
        norms = _norms(linear)
        own["hf_glu_norms"] = state, diagonal.clone(), norms
    return norms


def _norms(linear: AnyLinear) -> Tensor:
    try:
        return weight_rows(linear).detach().float().norm(dim=0)
    except NotImplementedError as error:
        raise ConversionError(
            f"a sparse projection has weights of the class {type(linear.weight).__name__}, whose norms can't be "
            "computed: hf_glu.sparsify(model, keep=1) before quantizing, or sparsify with method='teal'"
        ) from error


def input_rows(linear: AnyLinear) -> Tensor:
    """Return the weights by input, ``[inputs, outputs]``, laid next to each other in memory if they aren't yet."""
    rows = weight_rows(linear).T
    if not rows.is_contiguous():
        lay_out(linear, by_input=True)
        rows = weight_rows(linear).T
    return rows.detach()


def _is_readable(linear: Any, x: Tensor) -> bool:
    """Return whether what a kernel reads is what calling the projection would compute."""
    weight = linear.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" == x.device.type
    alike = x.dtype == weight.dtype and x.dtype in DTYPES and (linear.bias is None or linear.bias.dtype == x.dtype)
    free = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return plain and alike and free and not needs_formula(x)


def places_of(sites: Iterable[Site]) -> dict[str, str]:
    """Return what ``config.hf_glu["sparsity"]`` calls the layer of each FFN that a config governs, by the FFN's name.

    It is the layer's number, after its stack where the config has several: a decoder of an encoder-decoder is loaded as
    a model of its own, which knows of no other.
    """
    sites = list(sites)
    several = len({site.stack for site in sites}) > 1
    return {site.name: f"{site.stack} {site.layer}" if several and site.stack else str(site.layer) for site in sites}


def cuts_of(site: Site, options: SparsityOptions) -> list[float | None] | None:
    """Return the thresholds that a config has for the FFN at a site; None: it has none."""
    return options.cuts.get(f"{site.stack} {site.layer}", options.cuts.get(str(site.layer)))


def cuttable_sites(model: nn.Module) -> list[Site]:
    """Return the FFNs whose projections can leave entries out."""
    return [site for site in find_sites(model) if is_alone(site) and all(_is_linear(p) for p in projections(site))]


def _is_linear(projection: nn.Module) -> bool:
    return stock_class(projection) in LINEAR


def put_cuts(site: Site, name: str, cuts: Sequence[float | None]) -> None:
    """Make the projections of a site leave out what is below thresholds, by the method of that name.

    Raises:
        OptionError: there aren't as many thresholds as projections.
    """
    method, parts = METHODS[name], projections(site)
    if len(cuts) != len(parts):
        raise OptionError(f"{site.name} has {len(parts)} projections, and sparsity {len(cuts)} thresholds for it")
    for linear, threshold in zip(parts, cuts, strict=True):
        if threshold is None:
            become_stock(linear, SparseLinear)
            continue
        become(linear, SparseLinear)
        cut = Cut(threshold=threshold, weighed=method.weighed, relative=method.relative)
        linear.__dict__["hf_glu_cut"] = cut


def take_off(sites: Iterable[Site]) -> int:
    """Give the projections of sites all of their input again; return how many FFNs had left something out."""
    found = 0
    for site in sites:
        parts = [linear for linear in projections(site) if isinstance(linear, SparseLinear)]
        found += bool(parts)
        for linear in parts:
            become_stock(linear, SparseLinear)
    return found


def resume_sparsity(model: nn.Module, config: Any) -> list[Site]:
    """Make a freshly built model leave out what its config says; return the sites that do."""
    entry = GluConfig.of(config).sparsity
    if entry is None:
        return []
    options = SparsityOptions.from_dict(entry)
    found = {site.name: (site, cuts) for site in cuttable_sites(model) if (cuts := cuts_of(site, options)) is not None}
    for site, cuts in found.values():
        put_cuts(site, options.method, cuts)
    return [site for site, _ in found.values()]


def refuse_swapped(model: nn.Module) -> None:
    """Raise where projections that a config says are sparse aren't, as where a quantizer has put others there.

    Raises:
        ConversionError: it is so, in the model or in a model inside of it.
    """
    for part in model.modules():
        whole: Any = part
        entry = GluConfig.of(whole.config).sparsity if hasattr(whole, "save_pretrained") else None  # else a layer
        if entry is None:
            continue
        options = SparsityOptions.from_dict(entry)
        sites = [site for site in find_sites(part) if is_alone(site) and any(_is_cut(cuts_of(site, options)))]
        dense = [site for site in sites if not any(isinstance(linear, SparseLinear) for linear in projections(site))]
        if dense or (part is model and not sites and any(_is_cut(chain(*options.cuts.values())))):
            raise ConversionError(
                f"{type(part).__name__} has other modules in the place of the projections that its config says are "
                "sparse (a quantizer's): hf_glu.sparsify(model, keep=1) before quantizing"
            )


def _is_cut(cuts: Iterable[float | None] | None) -> Iterator[bool]:
    return (cut is not None for cut in cuts or ())
