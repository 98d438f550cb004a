"""`hf_glu.convert`: which of the conversions is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_glu.config.experts import ExpertOptions
from hf_glu.config.registry import registry, unmixed, unwrapped
from hf_glu.conversion.apply import carry_out
from hf_glu.conversion.checks import check_convertible
from hf_glu.conversion.experts.banks import convert_banks, read_bank_groups
from hf_glu.conversion.experts.upcycling import expert_options, expert_routes, upcycle
from hf_glu.conversion.measure import Comparison
from hf_glu.conversion.planning import plan
from hf_glu.conversion.report import Report, one_after_the_other
from hf_glu.conversion.steps import Target
from hf_glu.conversion.targets import check_sections, read_dictionary
from hf_glu.conversion.transaction import whole
from hf_glu.errors import OptionError
from hf_glu.ffn.experts.group import is_gated
from hf_glu.ffn.sites import find_banks


@whole
def convert(
    model: Any,
    target: Target | None = None,
    *,
    width: int | str = "keep",
    layers: Any = None,
    exclude: str | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    distill_steps: int | None = None,
    bias: bool | None = None,
    mix: Mapping[str, Any] | None = None,
    experts: str | int | ExpertOptions | None = None,
    top_k: int | None = None,
    drop: float = 0.0,
    inputs: Mapping[str, Any] | None = None,
    check: bool | str = True,
    **sections: Mapping[str, Any] | None,
) -> Report:
    """Convert ``model``'s feed-forward networks to gated activations, in place.

    The in-projection becomes ``[gate | up]`` (twice as many rows), the activation ``target``, and the config says so.
    What the routes promise is measured on ``inputs`` and reported. Converting again to the same target changes nothing.
    Make the optimizer after the conversion: the projections' parameters are new ones.

    With ``calibration``, what a route only approximates is fitted to the old FFNs' outputs (:mod:`hf_glu.conversion.
    fitting`), from the first layer on, so that each layer sees what the converted ones before it give.

    Args:
        model: a Transformers model of any head.
        target, layers, exclude: as in `hf_glu.plan`; no target for a model that has banks of experts, see ``experts``.
        width: as there; fewer units need ``calibration``.
        calibration: texts (with ``tokenizer``), token ids ``[sequences, length]``, embeddings ``[sequences, length,
            hidden]``, or batches of the model's inputs; ``tokenizer`` is of the texts.
        distill_steps: None: 400 where units are dropped or a bias is missing, else 0.
        bias: False: no bias on in-projections that have none (T5); where the route needs one, it takes ``calibration``.
        mix, sections: options of ``moa_`` activations, and of wrappers: ``state``, ``context``, as in `hf_glu.plan`.
        experts: make experts of each FFN, ``relu*2,gelu*2,swiglu*4`` (`experts.upcycling`), once it has
            ``width``; where the model has banks of them (Mixtral), their activations (`experts.banks`).
        top_k, drop: experts that a token uses, 2 unless given; share of each expert's units to initialise anew.
        inputs: what to compare the model on before and after; None: random token ids.
        check: whether to; ``report``: a difference above what the routes promise is reported, and doesn't raise.

    Raises:
        UnknownNameError, NoSiteError, ConversionError, OptionError: see `hf_glu.plan`; or more differs than promised.
    """
    check_sections(sections, convert)
    check_convertible(model)
    choice: dict[str, Any] = {"layers": layers, "exclude": exclude, "mix": mix}
    if experts is not None:
        choice |= {"drop": drop, "inputs": inputs, "sections": sections, "check": check}
        fitted = {"width": width, "bias": bias, "calibration": calibration, "tokenizer": tokenizer}
        return _to_experts(model, target, experts, top_k, fitted | {"distill_steps": distill_steps}, choice)
    if target is None:
        raise OptionError("give the gated activation to convert to, such as swiglu: hf_glu.activations() lists them")
    if top_k is not None or drop:
        raise OptionError("top_k and drop are for experts: give experts, such as 'relu*2,swiglu*2'")
    choice |= {"fitted": calibration is not None, **sections}
    planned = plan(model, target, width=width, bias=bias, **choice)
    return carry_out(model, planned, calibration, tokenizer, distill_steps, inputs, check)


def check_experts(
    model: Any, target: Target | None, experts: str, top_k: int | None, *, layers: Any, exclude: str | None,
    resized: bool,
) -> None:  # fmt: skip
    """Raise what `convert` to experts would, as far as that can be told of a model without weights."""
    check_convertible(model)
    if banks := find_banks(model):
        read_bank_groups(experts, len(banks[0].anchor.get_parameter("down_proj")))
        return
    if not isinstance(target, str):
        raise OptionError("experts take one target, such as swiglu")
    name = str(read_dictionary(target, None)[0])
    options = expert_options(experts, name, top_k)
    if not resized:
        expert_routes(model, name, options, layers=layers, exclude=exclude)


def _to_experts(
    model: Any, target: Target | None, experts: str | int | ExpertOptions, top_k: int | None, fitted: dict[str, Any],
    choice: dict[str, Any],
) -> Report:  # fmt: skip
    """Make experts of FFNs, or give a model's own banks other activations."""
    resized = fitted["width"] != "keep" or fitted["bias"] is not None
    if banks := find_banks(model):
        useless = {**choice.pop("sections"), "drop": choice.pop("drop")}
        if target is not None or resized or top_k is not None or any(useless.values()):
            where = f"{type(model).__name__} has experts of its own ({banks[0].name})"
            known = f"no target, width, top_k, drop, bias, {' or '.join(registry.sections)}"
            raise OptionError(f"{where}: give experts= their activations, and {known}")
        given = {key: fitted[key] for key in ("calibration", "tokenizer")}
        return convert_banks(model, experts, **given, **choice)
    if target is not None:
        target, choice["mix"] = read_dictionary(target, choice["mix"])
    if not isinstance(target, str):
        raise OptionError("experts take one target, such as swiglu")
    options = expert_options(experts, target, top_k)
    if not resized and fitted["calibration"] is None:
        return upcycle(model, target, options, **choice)
    return _fitted_experts(model, target, options, fitted, choice)


def _fitted_experts(
    model: Any, target: str, options: ExpertOptions, fitted: dict[str, Any], choice: dict[str, Any]
) -> Report:
    """Fit the FFNs to gated ones of the wanted width, and make experts of these."""
    plain = next((group.name for group in (*options.experts, *options.always_on) if not is_gated(group.name)), None)
    if plain is not None:
        raise OptionError(f"experts with width, bias or calibration are copies of a gated FFN: {plain} has no gate")
    base, inputs, calibration = unmixed(unwrapped(target)), choice["inputs"], fitted["calibration"]
    where = {key: choice[key] for key in ("layers", "exclude")}
    first = plan(
        model, base, width=fitted["width"], bias=fitted["bias"], fitted=calibration is not None, **where
    )  # fmt: skip
    comparison = Comparison(model, [], inputs, check=choice["check"]) if choice["check"] else None
    narrow = carry_out(
        model, first, calibration, fitted["tokenizer"], fitted["distill_steps"], inputs, check=False
    )  # fmt: skip
    report = upcycle(model, target, options, **{**choice, "check": False})
    joined = one_after_the_other(narrow, report, None)
    return replace(joined, differences=comparison.finish(joined.plan.promise)[0]) if comparison else joined
