"""`hf_glu.plan` and `hf_glu.convert`: which change is asked for; the engine does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_glu.config.experts import ExpertOptions
from hf_glu.config.registry import hears, registry, unmixed, unwrapped
from hf_glu.conversion.changes.gate import Gate
from hf_glu.conversion.checks import check_convertible
from hf_glu.conversion.engine import Plan, make_plan
from hf_glu.conversion.experts.native.banks import RegateBank
from hf_glu.conversion.experts.upcycling import Upcycle
from hf_glu.conversion.report import Report
from hf_glu.conversion.steps import Change, Target
from hf_glu.conversion.targets import check_section_names, read_dictionary
from hf_glu.errors import OptionError
from hf_glu.ffn.experts.group import is_gated
from hf_glu.ffn.sites import find_banks

Experts = str | int | ExpertOptions
_SAME = {"width": "keep", "fitted": False, "bias": None}  # what leaves FFNs the shape that they have
_UNROUTED = {"top_k": None, "drop": 0.0}


def plan(
    model: Any,
    target: Target | Change | None = None,
    *,
    width: int | str = "keep",
    layers: Any = None,
    exclude: str | None = None,
    fitted: bool = False,
    bias: bool | None = None,
    mix: Mapping[str, Any] | None = None,
    experts: Experts | None = None,
    top_k: int | None = None,
    drop: float = 0.0,
    **sections: Mapping[str, Any] | None,
) -> Plan:
    """Plan a conversion of ``model``'s FFNs; nothing is changed before the plan's ``apply()``.

    Args:
        model: a Transformers model of any head; no weights are read, so that it may be on the meta device.
        target: a gated name, see `hf_glu.activations`; or one for each selection of layers, ``{"0-3": "geglu",
            "4,5": "swiglu"}`` (the first key that selects a layer counts; what none selects stays dense). A mix may
            have its dictionary in parentheses, ``moa_swiglu(silu,relu)``. Or another `hf_glu.conversion.Change`.
        width: hidden units: ``keep``, ``iso`` (as many parameters as the dense FFN has, see `iso_width`)
            or a number. FFNs that are gated already are pruned to the number.
        layers: which layers (see `hf_glu.config.layers`); None: all.
        exclude: regular expression; sites whose name it finds are left alone.
        fitted: whether there will be calibration data to fit FFNs on, so that any activation may become any gate.
        bias: False: give no bias to in-projections that have none (T5), even where the route needs one.
        mix: of ``learnable_`` and ``moa_`` names, as ``config.hf_glu["mix"]``; the model's own activation comes first.
        experts: make experts of each FFN, ``relu*2,gelu*2,swiglu*4`` (`experts.upcycling`), once it has
            ``width``; where the model has banks of them (Mixtral), their activations (`experts.banks`), with no target.
            A ``kappa_`` target by itself is for all experts of such banks.
        top_k, drop: experts that a token uses, 2 unless given; share of each expert's units to initialise anew.
        sections: options of wrappers, as ``config.hf_glu`` has them: ``state`` of ``stateful_`` activations (see
            `hf_glu.config.state.StateOptions`), ``context`` of ``modulated_`` ones (`hf_glu.config.context.
            ContextOptions`), ``canon={"kernel": 4}`` of ``canon_`` ones, and so on.

    Raises:
        HfGluError: an unknown name; options that can't be, or don't go together; no FFN that is chosen; no route; a
            model that can't be converted as it is.
    """
    check_section_names(sections, plan)
    check_convertible(model)
    where = {"layers": layers, "exclude": exclude}
    shape: dict[str, Any] = {"width": width, "fitted": fitted, "bias": bias}
    acts: dict[str, Any] = {"mix": mix, "sections": sections}
    if isinstance(target, Change):
        if shape != _SAME or experts is not None or top_k is not None or drop or mix or any(sections.values()):
            raise OptionError(f"{target.name} has its own options: give plan only layers and exclude beside it")
        return make_plan(model, target, **where)
    if experts is not None:
        return _plan_experts(model, target, experts, {"top_k": top_k, "drop": drop}, shape, acts, where)
    if banks := _hearing(model, target, acts):
        return _plan_experts(model, None, banks, {"top_k": top_k, "drop": drop}, shape, acts, where)
    if target is None:
        raise OptionError("give the gated activation to convert to, such as swiglu: hf_glu.activations() lists them")
    if top_k is not None or drop:
        raise OptionError("top_k and drop are for experts: give experts, such as 'relu*2,swiglu*2'")
    return make_plan(model, Gate.of(target, **shape, **acts), **where)


def _hearing(model: Any, target: Target | None, acts: dict[str, Any]) -> str:
    """Return the experts of a model's own banks, where the target is an activation that hears their router; else ""."""
    banks = find_banks(model) if isinstance(target, str) else []
    name, mix = read_dictionary(target, acts["mix"]) if banks and target is not None else ("", None)
    if not hears(name):
        return ""
    acts["mix"] = mix
    return f"{name}*{len(banks[0].anchor.get_parameter('down_proj'))}"


def _plan_experts(
    model: Any, target: Target | None, experts: Experts, routing: dict[str, Any], shape: dict[str, Any],
    acts: dict[str, Any], where: dict[str, Any],
) -> Plan:  # fmt: skip
    """Plan experts in FFNs' places, or other activations for a model's own banks."""
    resized = shape | {"fitted": False} != _SAME
    if banks := find_banks(model):
        if target is not None or resized or routing != _UNROUTED or any(acts["sections"].values()):
            known = f"no target, width, top_k, drop, bias, {' or '.join(registry.sections)}"
            where_banks = f"{type(model).__name__} has experts of its own ({banks[0].name})"
            raise OptionError(f"{where_banks}: give experts= their activations, and {known}")
        return make_plan(model, RegateBank(experts=experts, mix=acts["mix"]), **where)
    if target is not None:
        target, acts["mix"] = read_dictionary(target, acts["mix"])
    if not isinstance(target, str):
        raise OptionError("experts take one target, such as swiglu")
    upcycle = Upcycle.of(target, experts, **routing, **acts)
    if not resized and not shape["fitted"]:
        return make_plan(model, upcycle, **where)
    plain = next((group.name for group in upcycle.groups if not is_gated(group.name)), None)
    if plain is not None:
        raise OptionError(f"experts with width, bias or calibration are copies of a gated FFN: {plain} has no gate")
    first = make_plan(model, Gate.of(unmixed(unwrapped(target)), **shape), **where)
    return make_plan(model, upcycle.after(first), **where, first=first)


def convert(
    model: Any,
    target: Target | Change | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    distill_steps: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    check: bool | str = True,
    **options: Any,
) -> Report:
    """Convert ``model``'s feed-forward networks to gated activations, in place: plan it, and carry the plan out.

    The in-projection becomes ``[gate | up]`` (twice as many rows), the activation ``target``, and the config says so.
    What the routes promise is measured on ``inputs`` and reported. Converting again to the same target changes nothing.
    Make the optimizer after the conversion: the projections' parameters are new ones.

    With ``calibration``, what a route only approximates is fitted to the old FFNs' outputs (`hf_glu.conversion.fit`),
    from the first layer on, so that each layer sees what the converted ones before it give.

    Args:
        model: a Transformers model of any head.
        target: as in `hf_glu.plan`.
        calibration: texts (with ``tokenizer``), token ids ``[sequences, length]``, embeddings ``[sequences, length,
            hidden]``, or batches of the model's inputs; ``tokenizer`` is of the texts.
        distill_steps: None: 400 where units are dropped or a bias is missing, else 0.
        inputs: what to compare the model on before and after; None: random token ids.
        check: whether to; ``report``: a difference above what the routes promise is reported, and doesn't raise.
        options: ``width``, ``layers``, ``exclude``, ``bias``, ``mix``, ``experts``, ``top_k``, ``drop`` and those of
            wrappers (``state``, ``context``, ...), as in `hf_glu.plan`; fewer units need ``calibration``.

    Raises:
        UnknownNameError, NoSiteError, ConversionError, OptionError: see `hf_glu.plan`; or more differs than promised.
    """
    check_section_names(options, plan, convert)
    fitted = calibration is not None and not isinstance(target, Change)
    return plan(model, target, fitted=fitted, **options).apply(
        calibration=calibration, tokenizer=tokenizer, distill_steps=distill_steps, inputs=inputs, check=check
    )
