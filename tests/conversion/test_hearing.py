"""Conversions to ``kappa_N``, of FFNs to experts of ours and of a family's own banks; and where there is no router."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from banks import MODELS as BANKS
from banks import SOURCE
from banks import make as make_banked
from comparing import assert_same, outputs
from contexts import make, target_of
from hearing import MODELS, awake, converted
from peft import get_peft_model
from pico import FAMILIES
from short_training import snapshot
from states import batch, ids
from torch import Tensor

import hf_glu
from hf_glu import cli
from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.wrapped import shifts
from hf_glu.config.experts import ExpertOptions
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.native import MixedBank
from hf_glu.ffn.sites import find_banks
from hf_glu.publishing.card.wording import traits

# at widths that torch's vectors divide a view of a tensor has the bits of a copy
EVEN = {
    name: {next(key for key in ("moe_intermediate_size", "intermediate_size") if key in sizes): 64}
    for name, sizes in BANKS.items()
}


@pytest.mark.parametrize(
    ("prefix", "name"),
    [*(("kappa_", name) for name in MODELS), ("stateful_kappa_", "gpt2"), ("kappa_learnable_", "llama")],
)
def test_a_conversion_computes_what_the_same_experts_do_bit_by_bit(name, prefix, tmp_path):
    found = []
    for start in (prefix, prefix.replace("kappa_", "")):
        model = make(name)
        torch.manual_seed(1)
        report = hf_glu.convert(model, f"{start}{target_of(name)}", experts=3, top_k=1)
        assert report.plan.promise == "exact"
        assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
        found.append((model, outputs(model)))
    (model, ours), (_, plain) = found
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    if "stateful" in prefix:
        return
    awake(model).save_pretrained(tmp_path, max_shard_size="20KB")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), outputs(model), "bitwise")
    assert any(float((outputs(model)[key] - plain[key]).abs().max()) > 1e-4 for key in plain)


def test_lora_trains_it():
    model = converted("llama")
    wrapped = get_peft_model(model, hf_glu.lora_config(model))
    assert not hf_glu.frozen_activations(wrapped)
    start, before = snapshot(wrapped), outputs(wrapped)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        wrapped(input_ids=ids(2, 8), labels=ids(2, 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, each in wrapped.named_parameters() if not torch.equal(each, start[key])}
    assert any("modules_to_save" in key and key.endswith("response") for key in moved)
    after = outputs(wrapped.eval())
    assert any(float((after[key] - before[key]).abs().max()) > 1e-5 for key in after)
    assert_same(outputs(wrapped.merge_and_unload()), after, "exact up to rounding")


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "Mamba"])
def test_without_a_router_it_is_refused(name):
    model = make(name)
    state = snapshot(model)
    target = f"kappa_{target_of(name)}"
    for convert in (hf_glu.plan, hf_glu.convert):
        with pytest.raises(OptionError, match=r"has no router for kappa_\w+ to hear: .*experts=8 .* or use \w+glu"):
            convert(model, target)
        with pytest.raises(OptionError, match="has no router"):
            convert(model, {"0": target})
    assert all(torch.equal(each, state[key]) for key, each in model.named_parameters())
    config = copy.deepcopy(model.config)
    if name in FAMILIES:
        setattr(config, FAMILIES[name].field, target)
        with pytest.raises(OptionError, match=f"has no router for {target} to hear"):
            type(model)(config)


def test_experts_that_are_always_on_hear_no_router():
    options = ExpertOptions(groups="kappa_geglu*2", shared="kappa_geglu")
    with pytest.raises(OptionError, match="shared='kappa_geglu': experts that are always on hear no router: use geglu"):
        hf_glu.convert(make("bert"), "geglu", experts=options)
    with pytest.raises(OptionError, match="always on"):
        ExpertFFN(8, 16, options, bias=True)


def test_the_card_and_the_mix_that_is_frozen():
    model = converted("bert", "kappa_learnable_")
    hf_glu.anneal(model, 1.0)
    before = outputs(model.eval())
    hf_glu.freeze_mix(model)
    assert_same(outputs(model), before, "exact up to rounding")
    assert model.config.hf_glu["experts"]["groups"] == "kappa_geglu*3"
    facts = {"config": model.config.to_dict(), "base": {}, "run": {}, "conversion": {}}
    (kind,) = (kind for kind in registry.kinds if kind.flag == "kappa")
    assert kind.trait in traits(facts)


def banked(name: str, experts: str | None = None) -> Any:
    """Return a model whose banks' a do something; all experts hear the router unless ``experts`` says else."""
    model, source = make_banked(name, **EVEN[name]), SOURCE.get(name, "silu")
    options = {"experts": experts.format(source)} if experts else {"target": f"kappa_{source}"}
    hf_glu.convert(model, check=False, **options)
    return awake(model)


def by_tokens(bank: Any, names: list[str], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return what a bank is to give, one token and one expert after the other."""
    rows, responses = [], iter([row for act in bank.acts for shift in shifts(act) for row in shift.response])
    own = [next(responses) if name.startswith("kappa_") else torch.zeros(()) for name in names]
    for token, chosen, shares in zip(x, index.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for e, share in zip(chosen, shares, strict=True):
            weight, out, phi = (
                bank.gate_up_proj[e],
                bank.down_proj[e],
                build_elementwise(names[e].removeprefix("kappa_")),
            )
            if bank.has_bias:  # gpt-oss
                both = token @ weight + bank.gate_up_proj_bias[e].flatten()
                g, u = both[::2].clamp(max=bank.limit), both[1::2].clamp(-bank.limit, bank.limit) + 1
                total = total + share * ((phi(g * (1 + own[e] * share)) * u) @ out + bank.down_proj_bias[e])
            else:
                g, u = (weight @ token).chunk(2)
                total = total + share * (out @ (phi(g * (1 + own[e] * share)) * u))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", [name for name in BANKS if name not in ("Qwen3Moe", "DeepseekV2")])
def test_a_bank_is_the_old_one_bit_by_bit_at_first(name, tmp_path):
    model, target = make_banked(name, **EVEN[name]), f"kappa_{SOURCE.get(name, 'silu')}"
    before, count = outputs(model), sum(parameter.numel() for parameter in model.parameters())
    report = hf_glu.convert(model, target)
    found = outputs(model)
    assert report.plan.promise == "exact"
    assert all(torch.equal(found[key], before[key]) for key in before)
    new = sum(p.numel() for key, p in model.named_parameters() if key.endswith("response"))
    assert report.plan.parameters_after == count + new == sum(parameter.numel() for parameter in model.parameters())
    assert new == 4 * 64 * len(find_banks(model))
    awake(model)
    assert any(float((outputs(model)[key] - before[key]).abs().max()) > 1e-4 for key in before)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(outputs(other), outputs(model), "bitwise")
    with pytest.raises(ConversionError, match="already"):
        hf_glu.convert(model, target)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("experts", ["kappa_{0}*4", "kappa_{0},tanh,kappa_relu*2"])
def test_a_bank_is_the_formula(name, experts):
    model = banked(name, experts)
    bank, source = find_banks(model)[0].anchor, SOURCE.get(name, "silu")
    names = [f"kappa_{source}"] * 4 if "*4" in experts else [f"kappa_{source}", "tanh", "kappa_relu", "kappa_relu"]
    assert isinstance(bank.double(), MixedBank)
    x, index = torch.randn(9, 32).double().requires_grad_(), torch.randint(0, 4, (9, 2))
    index[:, 1] = (index[:, 0] + 1) % 4
    weights = torch.rand(9, 2).double().requires_grad_()
    expected, inputs = by_tokens(bank, names, x, index, weights), [x, weights, *bank.parameters()]
    assert_same(bank(x, index, weights), expected, "formula")
    probe = torch.randn(9, 32).double()
    found, wanted = (torch.autograd.grad((out * probe).sum(), inputs) for out in (bank(x, index, weights), expected))
    assert_same(dict(enumerate(found)), dict(enumerate(wanted)), "formula")
    traced = torch.jit.trace(bank, (x[:5].detach(), index[:5], weights[:5].detach()))
    assert_same(traced(x, index, weights), expected, "formula")


def test_a_banks_mix_begins_at_its_activation():
    model = make_banked("Mixtral", **EVEN["Mixtral"])
    before = outputs(model)
    report = hf_glu.convert(model, experts="kappa_learnable_relu*2,kappa_moa_swiglu*2")
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact up to rounding")
    other = make_banked("Mixtral", **EVEN["Mixtral"])
    hf_glu.convert(other, "kappa_moa_swiglu(silu,tanh)", layers=[1])
    assert other.config.hf_glu["experts"]["groups"] == "kappa_moa_swiglu*4"
    assert other.config.hf_glu["layers"] == [1]
    assert_same(outputs(other), before, "exact up to rounding")


def test_a_banks_router_learns_from_it():
    model = banked("Mixtral").train()
    model(**batch(model))[0].float().square().mean().backward()
    for key, parameter in model.named_parameters():
        if key.endswith("response"):
            assert bool(parameter.grad.any(1).all()), f"{key}: each of the four experts"


def test_banks_refuse_what_they_cannot_have(tmp_path):
    for target, message in (
        ("stateful_kappa_swiglu", "see no sequences, which stateful_kappa_swiglu needs"),
        ({"0": "kappa_swiglu"}, r"a bank hears its router by experts=, such as experts='kappa_swiglu\*8'"),
    ):
        with pytest.raises((OptionError, ConversionError), match=message):
            hf_glu.convert(make_banked("Mixtral"), target)
    with pytest.raises(OptionError, match="has none for the router to sharpen: use ungated_N alone"):
        hf_glu.convert(make_banked("Mixtral"), experts="ungated_kappa_relu*4", calibration=ids(4, 8))
    with pytest.raises(OptionError, match="a bank hears its router by experts="):
        make_banked("Mixtral", hidden_act="kappa_swiglu")
    with pytest.raises(OptionError, match="no target, width, top_k"):
        hf_glu.convert(make_banked("Mixtral"), "kappa_swiglu", width=8)


def test_on_the_command_line(tmp_path, capsys):
    make_banked("Olmoe").save_pretrained(tmp_path / "olmoe")
    FAMILIES["bert"].make().save_pretrained(tmp_path / "bert")
    assert cli.run(["convert", str(tmp_path / "olmoe"), str(tmp_path / "out"), "--to", "kappa_swiglu"]) == 0
    assert cli.run(["convert", str(tmp_path / "bert"), str(tmp_path / "none"), "--to", "kappa_geglu"]) == 2
    assert "has no router for kappa_geglu to hear" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
