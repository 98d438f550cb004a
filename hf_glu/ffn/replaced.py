"""Finding FFNs whose forward somebody has replaced by one that computes an activation of its own.

Hub kernels, Liger, fusions and patches put other classes or other forwards in the place of a stock FFN; those made for
SwiGLU compute SiLU whatever stands in ``act_fn``. A forward that isn't the stock one may do as it likes with the
activation that the model has, but it has to name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, partial
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.module import OwnedModule
from hf_glu.activation.stock import SAME_FUNCTION, same_function
from hf_glu.errors import ConversionError
from hf_glu.ffn.config_fields import activation_fields, configs_of, field_default, names_ours, plain_name
from hf_glu.ffn.experts.native import MixedBank
from hf_glu.ffn.families import NO_FFN, SITE_TABLE, SiteRow
from hf_glu.ffn.linear import LINEAR
from hf_glu.ffn.sites import Site, find_sites, follow

STOCK = ("transformers", "hf_glu", "torch", "peft", "accelerate")  # whose forwards are known to call what they have
USUAL = sorted(frozenset().union(*SAME_FUNCTION))  # what there are kernels for
KERNELS = ("liger_kernel", "kernels")  # whose FFNs have an activation of their own, whatever a config names
ANOTHER = "super"  # what a forward names that leaves the work to the one it replaces


def no_kernel_for(module: nn.Module) -> bool:
    """Return whether a part of a model has gates that aren't those which kernels for its class compute.

    They are ours, or a stock activation that isn't the one that a natively gated family has by default (of a converted
    Llama, say).
    """
    if hasattr(module, "post_init"):  # a whole model, whose forward loses and heads may take
        return False
    if any(isinstance(part, (OwnedModule, MixedBank)) for part in module.modules()):
        return True
    return any(_is_odd(site) for site in find_sites(module) if site.native)


def _is_odd(site: Site) -> bool:
    config = getattr(site.anchor, "config", None)
    return names_another(config) if config is not None else not isinstance(site.act, _usual())


@cache
def _usual() -> tuple[type[nn.Module], ...]:
    return (nn.SiLU, nn.GELU, *{type(build_elementwise(name)) for name in USUAL})


def names_another(config: Any) -> bool:
    """Return whether a config, or one inside of it, names another activation than its class has by default."""
    for part in configs_of(config):
        for field in activation_fields(part):
            if not same_function(str(plain_name(getattr(part, field))), field_default(part, field)):
                return True
    return False


def check_forwards(model: nn.Module, config: Any) -> None:
    """Check the FFNs of a model that is being built.

    Where its config names nothing of ours, only those that a library of `KERNELS` computes, in a model of Transformers
    whose config names another activation than its class has (as a converted Llama's does, which is stock otherwise):
    what anybody else puts into a stock model may compute what it likes.

    Raises:
        ConversionError: see `refuse_replaced`.
    """
    if names_ours(config):
        refuse_replaced(model, find_sites(model))
    elif names_another(config) and not _is_foreign(type(model).__module__):
        for name, other, module in _replaced(model, [site for site in find_sites(model) if site.native]):
            if _is_kernel(other, module) and names_another(getattr(module, "config", config)):
                raise _refused(name, other)


def refuse_replaced(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise where the forward of an FFN doesn't use the activation that stands in it.

    Raises:
        ConversionError: one doesn't, or an FFN of somebody else's has no activation that could be changed.
    """
    for name, other, _ in _replaced(model, sites):
        raise _refused(name, other)


def _replaced(model: nn.Module, sites: Iterable[Site]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the FFNs whose forward doesn't use what stands in them: name, what computes them, and module."""
    for site in sites:
        for module, part in _on_the_way(site):
            if other := _ignoring(module, part):
                yield site.name, other, module
    own = _package(type(model).__module__)  # a model of somebody else's has FFNs of its own
    for name, module in model.named_modules():
        home = type(module).__module__
        if _is_foreign(home) and _package(home) != own and _lacks_activation(module):
            yield name, f"{home}.{type(module).__name__}", module


def _is_kernel(other: str, module: nn.Module) -> bool:
    return any(_package(home) in KERNELS for home in (other, *(base.__module__ for base in type(module).__mro__)))


def _refused(name: str, other: str) -> ConversionError:
    return ConversionError(
        f"{name} is computed by {other}, which has an activation of its own and would ignore the model's: leave that "
        "kernel, fusion or patch out for gated FFNs of hf_glu's"
    )


def _on_the_way(site: Site) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules from a site's own to its activation, each with the name of the next one."""
    module = site.anchor
    for part in site.row.act.split("."):
        yield module, part
        module = module.get_submodule(part)


def _ignoring(module: nn.Module, part: str) -> str | None:
    """Return the forward of ``module`` that isn't stock and doesn't name ``part``; None where it is or does."""
    forward, own = _inside(module.forward), type(module)
    home = str(getattr(forward, "__module__", None) or type(forward).__module__)
    derived = any(not _is_foreign(base.__module__) for base in own.__mro__ if base not in (nn.Module, object))
    if not _is_foreign(home) or (home == own.__module__ and not derived and "forward" not in vars(module)):
        return None  # stock, or of a model that is nobody else's
    if isinstance(forward, FunctionType):
        functions = [forward, *_called(forward, own)]
        if any({part, ANOTHER} & set(_names(function.__code__)) for function in functions):
            return None
    return f"{home}.{getattr(forward, '__qualname__', type(forward).__name__)}"


def _inside(call: Any) -> Any:
    """Return the function inside of what Accelerate and others put around it, which says what is inside."""
    while (inner := call.func if isinstance(call, partial) else unwrap(call)) is not call:
        call = inner
    return getattr(call, "__func__", call)


def _called(function: FunctionType, own: type) -> Iterator[FunctionType]:
    """Yield the functions that a forward may hand its work to: of its closure, its module, its class and others'."""
    for cell in function.__closure__ or ():
        try:
            found = [cell.cell_contents]
        except ValueError:  # empty
            continue
        yield from filter(_is_function, map(_inside, found))
    for name in set(_names(function.__code__)) - {"forward"}:  # the class's own is what has been replaced
        for each in (function.__globals__.get(name), getattr(own, name, None)):
            call = _inside(getattr(each, "forward", None) if isinstance(each, type) else each)
            if _is_function(call):
                yield call


def _is_function(call: Any) -> bool:
    return isinstance(call, FunctionType)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and those defined in it look up."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_foreign(module: str) -> bool:
    return _package(module) not in STOCK


def _package(module: str) -> str:
    return module.partition(".")[0]


def _lacks_activation(module: nn.Module) -> bool:
    """Return whether a module has the projections of a gated FFN, but no activation under any name that these have."""
    rows = [row for row in SITE_TABLE if row.gate is not None and _has_projections(module, row)]
    named = any(isinstance(follow(module, row.act), nn.Module) for row in rows)
    return bool(rows) and not named and type(module).__name__ not in NO_FFN


def _has_projections(module: nn.Module, row: SiteRow) -> bool:
    return all(isinstance(follow(module, str(path)), LINEAR) for path in (row.gate, row.in_proj, row.out_proj))
