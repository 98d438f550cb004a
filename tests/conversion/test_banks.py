"""Transformers' own banks of experts with an activation for each: against one token at a time, saved, refused."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from banks import MODELS, SOURCE, make
from comparing import assert_same, outputs
from torch import Tensor

import hf_glu
from hf_glu import cli
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.errors import ConversionError, OptionError, UnknownNameError
from hf_glu.ffn.experts.native import MixedBank, inner_gate
from hf_glu.ffn.sites import find_banks


def reference(bank: Any, names: list[str], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert after the other, by the families' formulas."""
    rows = []
    for token, chosen, shares in zip(x, index.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(chosen, shares, strict=True):
            weight, out = bank.gate_up_proj[expert], bank.down_proj[expert]
            act = build_elementwise(names[expert])
            if bank.has_bias:  # gpt-oss
                both = token @ weight + bank.gate_up_proj_bias[expert].flatten()
                gate, up = both[::2].clamp(max=bank.limit), both[1::2].clamp(-bank.limit, bank.limit) + 1
                total = total + share * ((act(gate) * up) @ out + bank.down_proj_bias[expert])
            else:
                gate, up = (weight @ token).chunk(2)
                total = total + share * (out @ (act(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_has_its_activation(name):
    model = make(name)
    source = SOURCE.get(name, "silu")
    hf_glu.convert(model, experts=f"{source},reglu,tanh*2")
    bank = find_banks(model)[0].anchor
    x, index = torch.randn(9, 32), torch.randint(0, 4, (9, 2))
    index[:, 1] = (index[:, 0] + 1) % 4
    weights = torch.rand(9, 2)
    with torch.no_grad():
        wanted = reference(bank, [source, "relu", "tanh", "tanh"], x, index, weights)
        assert_same(bank(x, index, weights), wanted, "exact up to rounding")
        wrong = reference(bank, [source, "relu", "relu", "tanh"], x, index, weights)
    assert (wrong - wanted).abs().max() > 1e-3, "the reference can't tell them apart"
    assert bank(x[:0], index[:0], weights[:0]).shape == (0, 32)


@pytest.mark.parametrize("name", MODELS)
def test_kept_and_learnable_experts_are_exact_and_reload(name, tmp_path):
    model = make(name)
    before, types = outputs(model), [type(module).__name__ for module in model.modules()]
    report = hf_glu.convert(model, experts=f"{SOURCE.get(name, 'silu')}*2,learnable_relu*2")
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact up to rounding")
    assert set(types) <= {type(module).__name__ for module in model.modules()}
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(outputs(other), outputs(model), "bitwise")
    with pytest.raises(ConversionError, match="already"):
        hf_glu.convert(again, experts="silu*4")


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_stock_transformers_refuses_them(name, tmp_path):
    model = make(name)
    hf_glu.convert(model, experts="relu*2,gelu*2")
    model.save_pretrained(tmp_path)
    hf_glu.unregister()
    try:
        with pytest.raises((KeyError, RuntimeError), match=r"swiglu|ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path)
    finally:
        hf_glu.register()


def test_from_config_with_gradients_for_every_expert():
    model = make("Mixtral", hidden_act="swiglu", hf_glu={"experts": {"groups": "relu*2,learnable_silu*2", "top_k": 1}})
    assert all(isinstance(bank.anchor, MixedBank) for bank in find_banks(model))
    ids = torch.randint(3, 60, (8, 24))
    model.train()(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for b in find_banks(model) for p in b.anchor.parameters())


def test_some_layers_only():
    model = make("Olmoe")
    hf_glu.convert(model, experts="relu*4", layers=[1])
    assert [isinstance(bank.anchor, MixedBank) for bank in find_banks(model)] == [False, True]
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "DeepseekV3"])
def test_dropped_gates_are_fitted(name, tmp_path):
    model, source = make(name), SOURCE.get(name, "silu")
    with torch.no_grad():
        for bank in find_banks(model):  # gates that matter little: the up half is nearly constant
            if bank.anchor.has_bias:
                bank.anchor.gate_up_proj[..., 1::2] *= 0.05
    report = hf_glu.convert(model, experts=f"{source}*2,ungated_{source}*2", calibration=torch.randint(3, 60, (64, 24)))
    assert report.plan.promise == "approximate"
    fit = report.sites[0].fit
    assert fit is not None
    assert fit.after < fit.before
    bank: Any = find_banks(model)[0].anchor
    up = bank.gate_up_proj[2][..., 1::2] if name == "GptOss" else bank.gate_up_proj[2].chunk(2)[1]
    assert not up.any()
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


@pytest.mark.parametrize(
    ("experts", "more", "error", "says"),
    [
        ("silu*3", {}, OptionError, "4 experts, and 3"),
        ("8", {}, OptionError, "4 experts already"),
        ("silu:16*4", {}, OptionError, "width"),
        ("sillu*4", {}, UnknownNameError, "silu"),
        ("swiglu_oss*4", {}, UnknownNameError, "no gate"),
        ("stateful_silu*4", {}, OptionError, "no sequences"),
        ("ungated_silu*4", {}, OptionError, "calibration"),
        ("relu*4", {"calibration": torch.zeros(2, 4, dtype=torch.long)}, OptionError, "only those"),
        ("relu*4", {"top_k": 2}, OptionError, "experts of its own"),
        ("relu*4", {"layers": [7]}, OptionError, "out of range"),
        ("relu*4", {"exclude": "0"}, OptionError, "layers="),
    ],
)
def test_bad_input_changes_nothing(experts, more, error, says):
    model = make("Mixtral")
    before, config = outputs(model), model.config.to_dict()
    with pytest.raises(error, match=says):
        hf_glu.convert(model, experts=experts, **more)
    assert_same(outputs(model), before, "bitwise")
    assert model.config.to_dict() == config


def test_a_target_for_experts_of_their_own_is_refused():
    with pytest.raises(OptionError, match="experts of its own"):
        hf_glu.convert(make("Mixtral"), "swiglu", experts="relu*4")
    with pytest.raises(OptionError, match="swiglu"):
        hf_glu.convert(make("Mixtral"))


def test_families_that_compute_something_else_are_refused():
    model = make("Mixtral")
    type(find_banks(model)[0].anchor)._apply_gate, plain = lambda self, x: x.chunk(2, -1)[0], None
    from transformers.integrations.moe import _default_apply_gate

    try:
        with pytest.raises(ConversionError, match="way of its own"):
            hf_glu.convert(model, experts="relu*4")
    finally:
        type(find_banks(model)[0].anchor)._apply_gate = plain or _default_apply_gate


def test_names():
    assert inner_gate("reglu") == ("relu", True)
    assert inner_gate("ungated_gelu") == ("gelu", False)


def test_the_command_line(tmp_path, capsys):
    make("Mixtral").save_pretrained(tmp_path / "src")
    assert (
        cli.run(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--experts", "silu*2,relu*2", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["promise"] == "approximate"
    assert report["target"] == "silu*2,relu*2"
    assert cli.run(["convert", str(tmp_path / "src"), str(tmp_path / "other")]) == 2
    assert "--to" in capsys.readouterr().err
    assert cli.run(["sites", str(tmp_path / "dst")]) == 0
