"""What can be asked for together: families by kinds, wrappers with other widths, layers and adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_same, outputs
from peft import get_peft_model
from pico import FAMILIES
from short_training import changed, snapshot
from states import ids

import hf_glu
from hf_glu.activation.modulated import ContextSource
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import banks_of


def test_wrappers_with_iso_width_in_some_layers(tmp_path):
    model: Any = FAMILIES["bert"].make()
    report = hf_glu.convert(
        model, "modulated_stateful_swiglu", width="iso", calibration=ids(16, 12), distill_steps=2, layers=[1],
        state={"direction": "both"}, context={"layer": 1, "size": 2},
    )  # fmt: skip
    assert report.fit
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_state_context_experts_and_iso_width_in_one_call(name, tmp_path):
    model: Any = FAMILIES[name].make()
    target = f"modulated_stateful_{FAMILIES[name].exact}"
    report = hf_glu.convert(
        model, target, experts=4, width="iso", calibration=ids(16, 12), distill_steps=2, state={"decay": [0.5, 0.9]},
        context={"size": 2},
    )  # fmt: skip
    assert report.plan.promise == "approximate"
    assert report.fit
    assert report.max_abs_difference > 0
    site = report.to_dict()["sites"][0]
    assert site["width_after"] < site["width_before"]
    assert "upcycled" in site["route"]
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.plan.parameters_before < report.plan.parameters_after
    narrow: Any = FAMILIES[name].make()
    hf_glu.convert(narrow, FAMILIES[name].exact, width="iso", calibration=ids(16, 12), distill_steps=2)
    assert_same(outputs(model), outputs(narrow), "exact up to rounding")  # experts, state and context change nothing
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


def test_an_expert_remembers_the_tokens_that_it_saw():
    torch.manual_seed(0)
    model: Any = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "stateful_geglu_new", experts=3, check=False)
    experts = next(iter(find_experts(model).values()))
    (bank,) = banks_of(experts.banks)
    for act in bank.acts:
        memory = act.phi.shift
        torch.nn.init.normal_(memory.alpha, std=2)
        torch.nn.init.normal_(memory.beta, std=2)
    x, seen = torch.randn(2, 7, experts.hidden), {}
    with torch.no_grad():
        found = run_inside(model, experts, x)
        routing = experts.router(x.view(-1, experts.hidden))
        expected = torch.zeros_like(x)
        for place in range(14):
            row, token = divmod(place, 7)
            for expert, weight in zip(routing.experts[place].tolist(), routing.weights[place], strict=True):
                memory = bank.acts[expert].phi.shift
                hidden = torch.nn.functional.linear(x[row, token], bank.in_proj[expert], bank.in_bias[expert])
                gate, up = hidden.chunk(2)
                state, openness = seen.get((expert, row), torch.zeros_like(gate)), gate.sigmoid()
                opened = gate + memory.alpha * state + memory.beta * (openness - state)
                units = torch.nn.functional.gelu(opened, approximate="tanh") * up
                out = torch.nn.functional.linear(units, bank.out_proj[expert], bank.out_bias[expert])
                expected[row, token] += weight * out
                seen[expert, row] = memory.decay.sigmoid() * state + (1 - memory.decay.sigmoid()) * openness
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def run_inside(model: Any, experts: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what the experts give for ``x``, as the model's own tokens."""
    handle = experts.register_forward_pre_hook(lambda module, args: (x,))
    kept = []
    other = experts.register_forward_hook(lambda module, args, out: kept.append(out))
    model(input_ids=ids(*x.shape[:2]), use_cache=False)
    handle.remove()
    other.remove()
    return kept[0]


def test_an_expert_without_tokens_has_gradients_of_zero():
    model: Any = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "modulated_stateful_geglu_new", experts="geglu_new,modulated_stateful_geglu_new*3", top_k=1)
    model.train()(input_ids=ids(1, 1), labels=ids(1, 1)).logits.sum().backward()
    assert all(parameter.grad is not None for key, parameter in model.named_parameters() if ".acts." in key)


def test_a_wrapped_layer_beside_a_plain_one():
    model = FAMILIES["gpt2"].make()
    before = outputs(model)
    hf_glu.convert(model, {"0": "geglu_new", "1": "modulated_geglu_new"})
    assert_same(outputs(model), before, "exact up to rounding")
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert_same(outputs(again), outputs(model), "bitwise")


def test_lora_trains_what_wrappers_have_of_their_own():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "modulated_stateful_geglu_new", check=False)
    wrapped = get_peft_model(model, hf_glu.lora_config(model))
    assert not hf_glu.frozen_activations(wrapped)
    start = snapshot(wrapped)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        wrapped(input_ids=ids(2, 8), labels=ids(2, 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = changed(wrapped, start)
    for part in ("alpha", "beta", "threshold", "slope", "context_source"):
        assert any(part in key for key in moved), part
    wrapped.eval()
    tokens = ids(1, 6)
    wrapped.base_model.model.generation_config.eos_token_id = None
    more = {"max_new_tokens": 6, "pad_token_id": 0}
    with_cache = wrapped.generate(input_ids=tokens, **more)
    assert_same(with_cache, wrapped.generate(input_ids=tokens, use_cache=False, **more), "bitwise")
    assert (
        sum(isinstance(module, ContextSource) for module in wrapped.modules()) == 2
    )  # PEFT's copy, and the frozen one
    assert not find_experts(wrapped)
