"""What can be asked for together: families by kinds, wrappers with other widths, layers and adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_same, fresh_outputs, outputs
from peft import get_peft_model
from pico import FAMILIES
from short_training import changed, snapshot
from test_modulated import make, target_of
from test_stateful import batch, ids

import hf_glu
from hf_glu.activation.modulated import ContextSource
from hf_glu.errors import OptionError
from hf_glu.experts import find_experts

KINDS = {
    "plain": "{base}", "stateful": "stateful_{base}", "modulated": "modulated_{base}",
    "learnable": "learnable_{base}", "moa": "moa_{base}", "all": "modulated_stateful_learnable_{base}",
    "experts": "{base}",
}  # fmt: skip
EXPERTS = {"bert": "gelu*2,geglu*2", "gpt2": "gelu_new,geglu_new", "t5": "relu,reglu", "llama": "swiglu*4"}
GRID = [
    (name, kind)
    for name in ("bert", "gpt2", "t5", "llama", "Mamba")
    for kind in KINDS
    if name != "Mamba" or kind in ("stateful", "modulated", "moa")
]


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_conversion_reload_and_training(name, kind, tmp_path):
    model = make(name)
    before, names = outputs(model), {key for key, _ in model.named_parameters()}
    more = {"experts": EXPERTS[name]} if kind == "experts" else {}
    report = hf_glu.convert(model, KINDS[kind].format(base=target_of(name)), **more)
    rounded = name == "Mamba" and kind == "moa"  # where the activation takes the place of the scan's silu
    assert report.plan.promise == ("exact up to rounding" if rounded else "exact")
    assert_same(outputs(model), before, "exact up to rounding")
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    new = {key for key, _ in model.named_parameters()} - names
    assert new or kind == "plain"
    start = snapshot(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        torch.manual_seed(0)
        model.train()(**batch(model))[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {key for key in new if "router" not in key} <= changed(model, start)
    model.eval().save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")


def test_wrappers_with_iso_width_in_some_layers(tmp_path):
    model: Any = FAMILIES["bert"].make()
    report = hf_glu.convert(
        model, "modulated_stateful_swiglu", width="iso", calibration=ids(16, 12), distill_steps=2, layers=[1],
        state={"direction": "both"}, context={"layer": 1, "size": 2},
    )  # fmt: skip
    assert report.fit
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    found = fresh_outputs({type(model).__name__: tmp_path / "model"})
    assert_same(found[type(model).__name__], outputs(model), "bitwise")
    with pytest.raises(OptionError, match="no sequences"):
        hf_glu.convert(FAMILIES["bert"].make(), "geglu", experts="modulated_geglu*2")


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
