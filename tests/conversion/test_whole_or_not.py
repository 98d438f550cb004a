"""A conversion that raises changes nothing: whatever it is, wherever it raises."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from comparing import assert_same, outputs
from covering import few
from pico import FAMILIES, make_native
from torch import nn
from torch.nn.utils import prune
from whole import RESIDUAL, structure

import hf_glu
from hf_glu.conversion import engine
from hf_glu.conversion.changes import freeze, gate, parts
from hf_glu.conversion.changes import t5_layout as native
from hf_glu.conversion.experts import replacing, upcycling
from hf_glu.conversion.experts.native import banks, ungating
from hf_glu.conversion.experts.splitting import ffns as splitting
from hf_glu.conversion.fit import fitting
from hf_glu.conversion.forms import ConfigEntry
from hf_glu.conversion.transaction import whole
from hf_glu.errors import ConversionError, OptionError
from hf_glu.instruments.probe import probe_inputs

revert = import_module("hf_glu.conversion.changes.revert")  # the room, not the verb
FAMILY = {name: made.make for name, made in FAMILIES.items()}
IDS = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))


class Broken(BaseException):
    """What nobody catches, as Ctrl-C."""


def counted(monkeypatch, room, name, stop, calls):
    """Have the ``stop``-th call of a function of ``room`` raise after it has done its work."""
    plain = getattr(room, name)

    def broken(*args, **kwargs):
        done = plain(*args, **kwargs)
        calls.append(name)
        if len(calls) == stop:
            raise Broken
        return done

    monkeypatch.setattr(room, name, broken)


# what is called on the way, in the room that calls it
STEPS = {
    engine: ("_convert_sites", "settle", "watch_context", "unwatch_context", "unname", "Report"),
    ConfigEntry: ("write",),
    gate: ("fit_change", "config_entries", "place_parts", "give_dense_configs"),
    gate.Gate: ("apply", "_make", "finish"),
    parts: ("_start_at", "own_gate", "set_rows", "note_making"),
    parts.Widen: ("apply",),
    fitting: ("fit", "solve_out_projection", "distill", "relative_error"),
    replacing: ("read_source", "make_experts", "watch", "give_dense_configs"),
    upcycling: ("fill", "put_experts", "place_parts"),
    splitting: ("divide", "write", "put_experts"),
    banks: ("mix_banks", "_start_at", "drop_gates"),
    ungating: ("_fit_expert", "_clear_up"),
    native: ("_replace", "set_rows", "sync_derived"),
    revert: ("set_rows", "remove_sources"),
    freeze: ("_folded", "_entry", "plain_experts"),
}  # fmt: skip


def exact(family, prefix=""):
    return lambda model: hf_glu.convert(model, prefix + FAMILIES[family].exact)


def converted(make, *args, **kwargs):
    """Return a maker of models that are converted already."""

    def made():
        model = make()
        hf_glu.convert(model, *args, **kwargs)
        return model

    return made


def annealed():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "learnable_geglu_new")
    hf_glu.anneal(model, 1.0)
    return model


CASES = {
    **{f"{family}, exact": (FAMILY[family], exact(family)) for family in ("bert", "gpt2", "t5", "bart", "opt")},
    **{f"{family}, stateful": (FAMILY[family], exact(family, "stateful_")) for family in ("bert", "t5", "gpt2")},
    **{f"{family}, modulated": (FAMILY[family], exact(family, "modulated_")) for family in ("bert", "bart", "opt")},
    "llama, learnable": (lambda: make_native("llama"), lambda model: hf_glu.convert(model, "learnable_swiglu")),
    "phi3, stateful": (lambda: make_native("phi3"), lambda model: hf_glu.convert(model, "stateful_swiglu")),
    "bert, fitted": (FAMILY["bert"], lambda model: hf_glu.convert(model, "swiglu", calibration=IDS, distill_steps=3)),
    "gpt2, narrow": (
        FAMILY["gpt2"], lambda model: hf_glu.convert(model, "geglu_new", width=20, calibration=IDS, distill_steps=2)
    ),
    "llama, pruned": (
        lambda: make_native("llama"),
        lambda model: hf_glu.convert(model, "swiglu", width=20, calibration=IDS, distill_steps=2),
    ),
    "bert, experts": (FAMILY["bert"], lambda model: hf_glu.convert(model, "geglu", experts="geglu*2,gelu*2")),
    "gpt2, experts": (FAMILY["gpt2"], lambda model: hf_glu.convert(model, "geglu_new", experts=2)),
    "gpt2, narrow experts": (
        FAMILY["gpt2"],
        lambda model: hf_glu.convert(
            model, "geglu_new", experts=2, width=20, calibration=IDS, distill_steps=1, check=False
        ),
    ),
    "mixtral, banks": (
        lambda: make_native("mixtral"), lambda model: hf_glu.convert(model, experts="learnable_silu,relu")
    ),
    "mixtral, ungated": (
        lambda: make_native("mixtral"),
        lambda model: hf_glu.convert(model, experts="ungated_relu*2", calibration=IDS),
    ),
    "opt, split": (
        FAMILY["opt"], lambda model: hf_glu.split_experts(model, 4, top_k=2, calibration=IDS)
    ),
    "t5, native": (
        converted(FAMILY["t5"], "reglu", bias=False, calibration=[probe_inputs(FAMILIES["t5"].make())]),
        hf_glu.to_native,
    ),
    "bert, reverted": (converted(FAMILY["bert"], "modulated_geglu"), hf_glu.revert),
    "gpt2, frozen": (annealed, hf_glu.freeze_mix),
}  # fmt: skip


@pytest.mark.parametrize("case", few(CASES, 10))
def test_what_raises_at_any_step_changes_nothing(case, monkeypatch):
    make, verb = CASES[case]
    model = make()
    model.train()
    model.name_or_path = model.config.name_or_path = "someone/base"
    next(iter(model.parameters())).requires_grad_(False)
    removed = model.register_forward_hook(lambda *_: None)
    before, state = structure(model), {key: value.clone() for key, value in model.state_dict().items()}
    logits = outputs(model.eval())
    model.train()
    stop, calls = 0, []
    while stop <= len(calls):
        stop, calls = stop + (1 if stop < 12 else 5), []  # every step at first, then every fifth: sites are alike
        with monkeypatch.context() as patch:
            for room, names in STEPS.items():
                for name in names:
                    counted(patch, room, name, stop, calls)
            try:
                verb(model)
            except Broken:
                assert structure(model) == before
                assert_same(dict(model.state_dict()), state, "bitwise")
                if stop % 4 == 1:
                    assert_same(outputs(model.eval()), logits, "bitwise")
                    model.train()
                continue
        break
    assert stop > 2, "nothing was broken"
    assert structure(model) != before
    assert model.name_or_path == model.config.name_or_path == ""
    removed.remove()
    assert not any(hook is removed for hook in model._forward_hooks.values())


def test_the_handle_of_a_hook_removes_it_after_a_failure():
    model = FAMILIES["bert"].make()
    handle = hf_glu.find_sites(model)[0].in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        whole(lambda model: 1 / 0)(model)
    handle.remove()
    assert not hf_glu.find_sites(model)[0].in_proj._forward_hooks


@pytest.mark.parametrize("how", ["geglu", "experts", "split"])
def test_parameters_of_two_layers_stay_one_or_nothing_is_changed(how):
    model = FAMILIES["bert"].make()
    first, second = hf_glu.find_sites(model)
    second.in_proj.weight, second.out_proj.weight = first.in_proj.weight, first.out_proj.weight
    before = structure(model)
    with pytest.raises(ConversionError, match=r"layer\.0\..* and .*layer\.1\..* are one parameter"):
        if how == "split":
            hf_glu.split_experts(model, 4, top_k=2, calibration=IDS)
        else:
            hf_glu.convert(model, "geglu", **({"experts": 2} if how == "experts" else {}))
    assert structure(model) == before


def test_parameters_that_stay_may_be_shared():
    model = make_native("llama")
    first, second = hf_glu.find_sites(model)
    second.in_proj.weight = first.in_proj.weight
    hf_glu.convert(model, "learnable_swiglu")
    first, second = hf_glu.find_sites(model)
    assert first.in_proj.weight is second.in_proj.weight


REPARAMETRISED = {
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "pruned bias": lambda linear: prune.l1_unstructured(linear, "bias", 0.5),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*weight_norm:DeprecationWarning")
@pytest.mark.parametrize("part", ["in_proj", "out_proj"])
@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_projection_that_computes_its_weight_is_refused(kind, part):
    model = FAMILIES["bert"].make()
    REPARAMETRISED[kind](getattr(hf_glu.find_sites(model)[1], part))
    before, logits = structure(model), outputs(model)
    for more in ({}, {"experts": 2}):
        with pytest.raises(ConversionError, match="permanent"):
            hf_glu.convert(model, "geglu", **more)
    with pytest.raises(ConversionError, match="permanent"):
        hf_glu.plan(model, "geglu")
    with pytest.raises(ConversionError, match="permanent"):
        hf_glu.split_experts(model, 4, top_k=2, calibration=IDS)
    assert structure(model) == before
    assert_same(outputs(model), logits, "bitwise")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "opt"])
def test_what_was_frozen_stays_frozen(family):
    for more in ({}, {"experts": "gelu*2,relu_glu*2" if family == "t5" else 2}):
        model = FAMILIES[family].make()
        for parameter in model.parameters():
            parameter.requires_grad = False
        target = FAMILIES[family].exact
        more = {"experts": f"{target}*2"} if more else more
        hf_glu.convert(model, target, **more)
        assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_each_part_of_an_ffn_stays_as_trainable_as_it_was():
    for more in ({}, {"experts": "geglu*2"}):
        model = FAMILIES["bert"].make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.endswith("bias")
        hf_glu.convert(model, "geglu", **more)
        assert all(p.requires_grad == ("bias" in n or "router" in n) for n, p in model.named_parameters())
    model = FAMILIES["bert"].make()
    hf_glu.find_sites(model)[0].out_proj.weight.requires_grad = False
    hf_glu.convert(model, "geglu", experts="geglu*2")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["bert.encoder.layer.0.intermediate.dense.banks.0.out_proj"]


def test_a_native_t5_is_as_frozen_as_the_converted_one():
    model = CASES["t5, native"][0]()
    for site in hf_glu.find_sites(model):
        site.in_proj.weight.requires_grad = False
    hf_glu.to_native(model)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if not p.requires_grad} == {"wi_0", "wi_1"}


def test_a_conversion_in_inference_mode_can_be_trained():
    model = FAMILIES["gpt2"].make()
    with torch.inference_mode():
        hf_glu.convert(model, "learnable_geglu_new")
        inside = FAMILIES["bert"].make()
    hf_glu.convert(inside, "geglu")
    assert not any(p.is_inference() for site in hf_glu.find_sites(inside) for p in site.in_proj.parameters())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(site.in_proj.weight.grad.isfinite().all() for site in hf_glu.find_sites(model))


@pytest.mark.parametrize(("family", "head"), [("gpt2", None), ("opt", None), ("bert", "BertLMHeadModel"), ("t5", None)])
def test_a_state_that_would_look_ahead_is_refused_first(family, head):
    more = {"is_decoder": True} if head else {}
    model = FAMILIES[family].make(head, **more)
    before, target = structure(model), "stateful_" + FAMILIES[family].exact
    for choice in ({}, {"experts": 2}):
        with pytest.raises(OptionError, match="later tokens"):
            hf_glu.convert(model, target, state={"direction": "both"}, **choice)
        assert structure(model) == before
    with pytest.raises(OptionError, match="later tokens"):
        FAMILIES[family].make(head, **more, **{FAMILIES[family].field: target}, hf_glu={"state": {"direction": "both"}})


# what takes the residual stream, too, isn't replaced but filled
@pytest.mark.parametrize("family", RESIDUAL)
def test_experts_where_the_ffn_adds_the_residual_itself(family, tmp_path):
    torch.manual_seed(0)
    model = RESIDUAL[family]().eval()
    before = outputs(model)
    report = hf_glu.convert(model, "geglu", experts="geglu*2,gelu*2")
    assert_same(outputs(model), before, "exact")
    assert report.max_abs_difference <= 1e-5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same(dict(again.state_dict()), dict(model.state_dict()), "bitwise")
    assert_same(outputs(again), outputs(model), "exact")


@pytest.mark.parametrize("family", RESIDUAL)
def test_no_causal_family_sees_later_tokens(family):
    torch.manual_seed(0)
    model = RESIDUAL[family]().eval()
    with pytest.raises(OptionError, match="later tokens"):
        hf_glu.convert(model, "stateful_geglu", state={"direction": "both"})
    hf_glu.convert(model, "modulated_geglu")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 1) % 61
    with torch.no_grad():
        assert_same(model(IDS).logits[:, :-1], model(other).logits[:, :-1], "bitwise")


def test_memory_that_somebody_shares_stays_shared():
    model = FAMILIES["bert"].make()
    norm = model.bert.embeddings.LayerNorm
    flat = torch.cat([torch.zeros(1), norm.weight.detach(), norm.bias.detach()])  # not where torch would put them
    norm.weight.data, norm.bias.data = flat[1:17], flat[17:]
    hf_glu.convert(model, "geglu")
    flat[1:] += 1
    assert_same(torch.cat([norm.weight.detach(), norm.bias.detach()]), flat[1:], "bitwise")
