"""`hf_glu.sparsify`: FFNs that leave out the small entries of their inputs and units, with what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.config.glu import GluConfig
from hf_glu.config.layers import check_layers, read_exclude, selected
from hf_glu.config.sparsity import METHODS, Method, SparsityOptions, check_sparsity
from hf_glu.conversion.allocating import LEAST, choose_shares, scores, square_error, threshold
from hf_glu.conversion.checks import check_convertible, check_values
from hf_glu.conversion.fit.calibration import inputs_at, make_batches
from hf_glu.conversion.forms import governed
from hf_glu.conversion.held_out import hold_out
from hf_glu.conversion.sparse_report import SparseSite, SparsityReport
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn.forward import ffn_output, ffn_units, projections
from hf_glu.ffn.identify import governing_configs
from hf_glu.ffn.sites import Site
from hf_glu.ffn.sparse import lay_out
from hf_glu.ffn.sparse_kernel import DTYPES, find_kernel
from hf_glu.ffn.sparse_linear import SparseLinear, cuttable_sites, places_of, put_cuts, take_off
from hf_glu.inplace import become

GATHERED = 2048  # tokens of calibration, of which so many are taken
TOKENS = 256
HELD_OUT_TOKENS = 128


def sparsify(
    model: Any, calibration: Any = None, *, keep: float = 0.7, method: str = "wina", tokenizer: Any = None,
    layers: Any = None, exclude: str | None = None,
) -> SparsityReport | None:  # fmt: skip
    """Make the FFNs of ``model`` leave out the small entries of their inputs and units, whatever their activation.

    While a token is decoded on a CPU, the weights of what is left out aren't read. A text is read as it would be token
    by token, and trains so, with gradients straight through. Thresholds are made on ``calibration``, from which a tenth
    of the texts is held out; how much of inputs and units is chosen so that each FFN errs least.

    The config says it (``config.hf_glu["sparsity"]``): the model is saved and loaded as it is, and without hf_glu loads
    with dense FFNs. ``keep=1`` takes it off again. Calling it again begins anew.

    Args:
        model: a Transformers model of any head.
        calibration: texts (with ``tokenizer``), token ids or batches, as in `hf_glu.convert`.
        keep: share of the FFNs' weights that a token reads.
        method: what an entry's score is: ``wina``, |x_i| times the norm of its weights
            (https://arxiv.org/abs/2505.19427); ``teal``, |x_i| (https://arxiv.org/abs/2408.14690); ``spark``, of units
            alone, as ``wina``, with a threshold in standard deviations above the token's mean score
            (https://arxiv.org/abs/2506.06644).
        tokenizer: of the texts.
        layers, exclude: as in `hf_glu.plan`.

    Returns:
        What was measured; None where it was taken off.

    Raises:
        OptionError: an option out of range, no calibration, or more is to be left out than the method can.
        NoSiteError: the model has no FFN that can leave anything out.
        ConversionError: as `hf_glu.convert`.
    """
    check_sparsity(method, keep)
    check_convertible(model)
    if keep == 1:
        _forget(model)
        return None
    check_values(model)
    if calibration is None:
        raise OptionError("sparsify needs calibration: texts (with tokenizer=), token ids or batches")
    sites = _chosen(model, layers, exclude)
    _check_least(sites, METHODS[method], keep)
    before = _forget(model)
    try:
        return _sparsified(model, sites, calibration, keep=keep, method=method, tokenizer=tokenizer)
    except BaseException:
        _forget(model)
        _restore(before)
        raise


def _sparsified(
    model: Any, sites: list[Site], calibration: Any, *, keep: float, method: str, tokenizer: Any
) -> SparsityReport:
    """Make a dense model sparse."""
    text, calibration = hold_out(model, calibration, tokenizer)
    inputs = _inputs(model, sites, make_batches(model, calibration, tokenizer))
    found = [_cut(site, x, method, keep) for site, x in zip(sites, inputs, strict=True)]
    known = {site.name: cuts for site, (_, cuts) in zip(sites, found, strict=True)}
    _write(model, sites, lambda places: SparsityOptions(
        method=method, keep=keep, cuts={places[name]: cuts for name, cuts in known.items() if name in places}
    ))  # fmt: skip
    measured = []
    for site, x, (shares, cuts) in zip(sites, inputs, found, strict=True):
        measured.append(_put(site, x[:HELD_OUT_TOKENS], shares, method, cuts))
    return SparsityReport(
        method=method, keep=keep, read=_read(sites, [shares for shares, _ in found]), sites=tuple(measured),
        perplexity=None if text is None else text.finish(model), kernel=_kernel(model),
    )  # fmt: skip


def _chosen(model: nn.Module, layers: Any, exclude: str | None) -> list[Site]:
    chosen, pattern = check_layers(layers), read_exclude(exclude)
    sites = [
        site
        for site in cuttable_sites(model)
        if selected(chosen, site.layer, site.stack) and not (pattern and pattern.search(site.name))
    ]
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no FFN of linear projections that is chosen")
    for site in sites:
        if any("forward" in vars(linear) for linear in projections(site)):
            raise ConversionError(
                f"a projection of {site.name} has a forward of its own (a hook of Accelerate's, offloading, another "
                "kernel), which would go past what is left out: take it off first (remove_hook_from_module)"
            )
    _check_told_apart(model, sites)
    return sites


def _check_told_apart(model: nn.Module, chosen: list[Site]) -> None:
    """Raise OptionError where a layer has another FFN than a chosen one: what a config says of it is of both."""
    names = {site.name for site in chosen}
    for _, own in governed(model, cuttable_sites(model)):
        first: dict[str, str] = {}
        for name, place in places_of(own).items():
            other = first.setdefault(place, name)
            if other != name and names & {name, other}:
                raise OptionError(
                    f"{other} and {name} are FFNs of one layer, which the config can't tell apart: leave the layer out"
                )


def _inputs(model: nn.Module, sites: list[Site], batches: Any) -> list[Tensor]:
    """Return what each FFN is given, ``[N, H]``, from all over the texts; the first tokens are for measuring errors."""
    found = inputs_at(model, sites, batches, limit=GATHERED)
    for site, x in zip(sites, found, strict=True):
        if x is None or len(x) < 2 * HELD_OUT_TOKENS:
            count = 0 if x is None else len(x)
            raise OptionError(
                f"the calibration data give {site.name} {count} tokens, and sparsify needs {2 * HELD_OUT_TOKENS}"
            )
    return [x[:: max(1, len(x) // (TOKENS + HELD_OUT_TOKENS))] for x in found if x is not None]


def _check_least(sites: list[Site], method: Method, keep: float) -> None:
    """Raise OptionError where less is to be kept than a method can."""
    for site in sites:
        whole, own = (0, _weights(site)) if method.inputs else (_weights(site) - (out := _out(site)), out)
        least = (whole + LEAST * own) / _weights(site)
        if keep < least:
            why = "" if method.inputs else ": it reads the in-projections whole"
            raise OptionError(f"keep={keep} is less than this method can, which is {least:.2f} at least{why}")


@torch.no_grad()
def _cut(site: Site, x: Tensor, method: str, keep: float) -> tuple[tuple[float, float], list[float | None]]:
    """Return an FFN's shares of inputs and units, and the threshold of each projection."""
    how, known = METHODS[method], x[HELD_OUT_TOKENS:]
    shares = choose_shares(site, known, how, keep)
    *ins, out = projections(site)
    units = ffn_units(site, known)
    cuts = [threshold(scores(known, linear, how), shares[0]) for linear in ins]
    return shares, [*cuts, threshold(scores(units, out, how), shares[1])]


@torch.no_grad()
def _put(site: Site, x: Tensor, shares: tuple[float, float], method: str, cuts: list[float | None]) -> SparseSite:
    """Make one FFN sparse, and measure it on held-out tokens."""
    before = ffn_output(site, x)
    put_cuts(site, method, cuts)
    for linear in projections(site):
        lay_out(linear, by_input=True)
    error = math.sqrt(square_error(before, ffn_output(site, x)))
    return SparseSite(name=site.name, inputs=shares[0], units=shares[1], relative_error=error)


def _weights(site: Site) -> int:
    return sum(linear.weight.numel() for linear in projections(site))


def _out(site: Site) -> int:
    return site.out_proj.weight.numel()


def _read(sites: list[Site], shares: list[tuple[float, float]]) -> float:
    parts = zip(sites, shares, strict=True)
    read = sum(first * (_weights(site) - _out(site)) + second * _out(site) for site, (first, second) in parts)
    return read / sum(map(_weights, sites))


def _kernel(model: nn.Module) -> str:
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return "dense"
    return "torch" if find_kernel(weight.dtype) is None else "compiled"


def _write(model: nn.Module, sites: list[Site], options: Callable[[dict[str, str]], SparsityOptions] | None) -> None:
    """Let the configs that govern the sites say what ``options`` makes of their places; None: that there is nothing."""
    names = {site.name for site in sites}
    for config, own in governed(model, cuttable_sites(model)):
        given, said = GluConfig.of(config), options and options(places_of(own))
        if not names & {site.name for site in own} or (given.sparsity is None and said is None):
            continue
        entry = said and {"method": said.method, "keep": said.keep, "cuts": dict(said.cuts)}
        written = replace(given, sparsity=entry or None).to_dict()
        config.hf_glu = written if written.keys() != {"version"} else None


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What a model was before it is made sparse anew."""

    cuts: list[tuple[Any, Any]]
    configs: list[tuple[Any, Any]]


def _forget(model: nn.Module) -> _Before:
    """Make a model dense; return what it was."""
    sites = cuttable_sites(model)
    sparse = [linear for site in sites for linear in projections(site) if isinstance(linear, SparseLinear)]
    configs = {id(each): each for site in sites for each in governing_configs(model, site)}.values()
    before = _Before(
        cuts=[(linear, vars(linear)["hf_glu_cut"]) for linear in sparse],
        configs=[(config, getattr(config, "hf_glu", None)) for config in configs],
    )
    take_off(sites)
    _write(model, sites, None)
    return before


def _restore(before: _Before) -> None:
    for linear, cut in before.cuts:
        become(linear, SparseLinear)
        vars(linear)["hf_glu_cut"] = cut
    for config, entry in before.configs:
        config.hf_glu = entry
