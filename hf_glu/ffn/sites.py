"""Finding a model's FFN sites with the table's rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_glu.activation.module import OwnedActivation
from hf_glu.compat.of_torch import CHILDREN
from hf_glu.config.layers import STACKS
from hf_glu.config.showing import Shown, ShownTable
from hf_glu.errors import NoSiteError, OptionError, shown
from hf_glu.ffn.experts.native import is_bank
from hf_glu.ffn.families import BANK, MIXER, NO_FFN, SITE_TABLE, Kind, SiteRow
from hf_glu.ffn.linear import LINEAR, AnyLinear, in_features, out_features, parameter_count


class NoModule(nn.Module):
    """What stands for the modules of a site that a report holds: reports are kept, and must not keep a model alive."""

    def get_submodule(self, target: str) -> nn.Module:
        """Raise NoSiteError."""
        raise NoSiteError(f"a report holds no modules, such as {target}: hf_glu.find_sites(model) finds them")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Site:
    """One FFN of a model.

    Attributes:
        name: path of the module that holds all parts; where it holds two FFNs, of the second one's in-projection.
        row: the layout.
        path: path of the module that holds all parts.
        anchor: that module.
        layer: index of the layer in its stack.
        stack: ``encoder``, ``decoder`` or None.
    """

    name: str
    row: SiteRow
    path: str
    anchor: nn.Module
    layer: int
    stack: str | None

    def __repr__(self) -> str:
        return f"Site({self.name!r}, layout={self.row.layout!r}, kind={self.kind!r})"

    def without_modules(self) -> Site:
        """Return what it says of its place, without the modules that are there."""
        return replace(self, anchor=NoModule())

    @property
    def kind(self) -> Kind:
        """The layout's kind."""
        return self.row.kind

    @property
    def in_proj(self) -> AnyLinear:
        """The in-projection: ``[width or 2 * width, hidden]``."""
        return self.anchor.get_submodule(self.row.in_proj)

    @property
    def out_proj(self) -> AnyLinear:
        """The out-projection: ``[hidden, width]``."""
        return self.anchor.get_submodule(self.row.out_proj)

    @property
    def act(self) -> nn.Module:
        """The activation."""
        return self.anchor.get_submodule(self.row.act)

    def set_act(self, act: nn.Module) -> None:
        """Put another activation in its place."""
        owner, _, attribute = self.row.act.rpartition(".")
        setattr(self.anchor.get_submodule(owner), attribute, act)

    @property
    def parts(self) -> list[str]:
        """The paths of its projections in the model."""
        paths = [path for path in (self.row.gate, self.row.in_proj, self.row.out_proj) if path]
        return [f"{self.path}.{path}" if self.path else path for path in paths]

    @property
    def native(self) -> bool:
        """Whether the stock family itself multiplies by an up half."""
        return self.kind != "dense"

    @property
    def hidden(self) -> int:
        """Size of the FFN's input."""
        if self.kind == "experts":
            return self._bank[0]
        return in_features(self.in_proj)

    @property
    def width(self) -> int:
        """Number of hidden units (of the product, where gated)."""
        if self.kind == "experts":
            return self._bank[1]
        return in_features(self.out_proj)

    @property
    def _bank(self) -> tuple[int, int]:
        """A bank's sizes, hidden and width: ``[E, 2 W, H]`` and ``[E, H, W]``, or transposed, as of Llama 4."""
        parts = (follow(self.anchor, path) for path in (self.row.in_proj, self.row.out_proj))
        (rows, columns), (first, second) = (tuple(part.shape[1:]) for part in parts)
        return (second, first) if (rows, columns) == (second, 2 * first) else (first, second)

    @property
    def widened(self) -> bool:
        """Whether a dense site's in-projection is ``[gate | up]``."""
        return self.kind == "dense" and out_features(self.in_proj) == 2 * self.width

    @property
    def activation(self) -> str | None:
        """Name of the activation of ours that it has, or None."""
        return self.act.name if isinstance(self.act, OwnedActivation) else None

    @property
    def parameters(self) -> int:
        """Number of parameters of its projections and activation."""
        if self.kind == "experts":
            return parameter_count(self.anchor)
        gate = [self.anchor.get_submodule(self.row.gate)] if self.row.gate else []
        projections = sum(parameter_count(part) for part in [self.in_proj, self.out_proj, *gate])
        return projections + sum(parameter.numel() for parameter in self.act.parameters())

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing shows, as plain data."""
        return {
            "name": self.name,
            "layout": self.row.layout,
            "kind": self.kind,
            "stack": self.stack,
            "layer": self.layer,
            "hidden": self.hidden,
            "width": self.width,
            "activation": self.activation or type(self.act).__name__,
            "parameters": self.parameters,
        }


class Sites(Shown, list[Site]):
    """A model's FFN sites: a list, and a table where it is shown."""

    def _table(self) -> ShownTable:
        rows = [
            (site["name"], site["layout"], site["kind"], f"{site['hidden']:,}", f"{site['width']:,}",
             site["activation"], f"{site['parameters']:,}")
            for site in map(Site.to_dict, self)
        ]  # fmt: skip
        columns = ("site", "layout", "kind", "#hidden", "#width", "activation", "#parameters")
        return ShownTable(title=f"{len(self)} FFN sites", columns=columns, rows=rows)


def need_model(model: Any) -> None:
    """Raise OptionError for what is no model, such as the name of a folder."""
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"a model is needed, got the {type(model).__name__} {shown(model)}: AutoModel.from_pretrained(...) loads "
            "one, and `hf-glu sites` takes a folder or a Hub id"
        )


def find_sites(model: nn.Module) -> Sites:
    """Return every FFN site of ``model``, once each where layers share modules, in the order of its modules."""
    need_model(model)
    sites = Sites()
    seen: set[int] = set()
    for name, module in model.named_modules():
        # most modules have no child that could be an activation; but a wrapper may answer for what it holds
        held = CHILDREN.of(module) if type(module).__getattr__ is nn.Module.__getattr__ else None
        for row in SITE_TABLE:
            if held is not None and row.act.partition(".")[0] not in held:
                continue
            if not _matches(module, row) or (row.exclusive and _model_type(model) not in row.families):
                continue
            key = id(follow(module, row.out_proj))
            if key not in seen:
                seen.add(key)
                second = bool(sites) and sites[-1].anchor is module
                own = f"{name}.{row.in_proj}".rpartition(".")[0].strip(".") if second else name
                sites.append(_site(own, name, row, module, stack_at(name, model)))
    return sites


def _site(name: str, path: str, row: SiteRow, anchor: nn.Module, stack: str | None) -> Site:
    return Site(name=name, row=row, path=path, anchor=anchor, layer=layer_of(path), stack=stack)


def find_banks(model: nn.Module) -> list[Site]:
    """Return every bank of gated experts of Transformers' own, also those without a module for their activation."""
    return [
        _site(name, name, BANK, module, stack_at(name, model))
        for name, module in model.named_modules()
        if is_bank(module)
    ]


def find_mixers(model: nn.Module) -> list[Site]:
    """Return the gates of a state-space model's mixers."""
    if _model_type(model) not in MIXER.families:
        return []
    return [
        _site(name, name, MIXER, module, None)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "A_log", None), nn.Parameter) and isinstance(follow(module, "act"), nn.Module)
    ]


def convertible_sites(model: nn.Module) -> list[Site]:
    """Return a model's FFN sites; where it has none, the gates of its mixers."""
    return find_sites(model) or find_mixers(model)


def is_adapted(model: nn.Module) -> bool:
    """Return whether PEFT has wrapped any module, and with it the projections of FFNs, perhaps."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def follow(module: nn.Module, path: str) -> Any:
    """Return what ``path`` leads to, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None) if isinstance(found, nn.Module) else None
    return found


def _matches(module: nn.Module, row: SiteRow) -> bool:
    if type(module).__name__ in NO_FFN or (row.absent and hasattr(module, row.absent)):
        return False
    if not isinstance(follow(module, row.act), nn.Module):
        return False
    in_proj, out_proj = follow(module, row.in_proj), follow(module, row.out_proj)
    if row.kind == "experts":
        return all(isinstance(part, nn.Parameter) and part.ndim == 3 for part in (in_proj, out_proj))
    if not isinstance(in_proj, LINEAR) or not isinstance(out_proj, LINEAR):
        return False
    ratio = 2 if row.kind == "packed" else 1
    if row.gate is not None:
        gate = follow(module, row.gate)
        return isinstance(gate, LINEAR) and out_features(gate) == out_features(in_proj) == in_features(out_proj)
    act = follow(module, row.act)
    if row.kind == "dense" and isinstance(act, OwnedActivation) and out_features(in_proj) == 2 * in_features(out_proj):
        return act.gated
    return out_features(in_proj) == ratio * in_features(out_proj)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def layer_of(name: str) -> int:
    """Return the first number in a module's path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def stack_of(model: nn.Module) -> str | None:
    """Return the stack that a model is, by its class's name; None: it is a whole model."""
    return next((stack for stack in STACKS if type(model).__name__.lower().endswith(stack)), None)


def stack_at(name: str, model: nn.Module) -> str | None:
    """Return the stack that a site is in: from its path, else from what the model itself is."""
    parts, config = name.split("."), getattr(model, "config", None)
    if stack := next((part for part in parts if part in STACKS), stack_of(model)):  # a decoder may be a whole BERT
        return stack
    if getattr(config, "is_encoder_decoder", False) or type(model).__name__.endswith("Stack"):
        named = next((stack for part in parts for stack in STACKS if part.endswith(f"_{stack}")), None)
        return named or ("decoder" if getattr(config, "is_decoder", False) else "encoder")
    return None
