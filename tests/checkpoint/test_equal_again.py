"""What is loaded, merged or traced is the model that it was: bit by bit, or it is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, make_native
from short_training import train

import hf_glu
from hf_glu.errors import CheckpointError, OptionError
from hf_glu.instruments.equality import ALIGNMENT, align, checksums
from hf_glu.instruments.probe import probe_inputs
from hf_glu.publishing.hub.checking import check_loads, expected_outputs
from hf_glu.training.parameters.peft import lora_config

IDS = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def misaligned(model):
    """Have every parameter lie where a file's tensor may lie."""
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)
        parameter.data = room[1:].view(parameter.shape).copy_(parameter.data)


def test_align_moves_tensors_and_changes_nothing():
    model = FAMILIES["bert"].make()
    before, kept = checksums(model), list(model.parameters())
    misaligned(model)
    align(model)
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in model.parameters())
    assert checksums(model) == before
    assert all(one is other for one, other in zip(kept, model.parameters(), strict=True))


@pytest.mark.slow
def test_a_pushed_model_is_equal_wherever_its_tensors_lie(tmp_path):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", experts="geglu*2,gelu*2")
    misaligned(model)
    model.save_pretrained(tmp_path)
    expected = expected_outputs(model)
    assert check_loads(tmp_path, expected, code=False) == ("plugin",)
    name = "bert.encoder.layer.1.intermediate.dense.banks.0.in_proj"
    other = {**expected["weights"], name: "0"}
    with pytest.raises(CheckpointError, match=name):
        check_loads(tmp_path, {**expected, "weights": other}, code=False)


# experts with parameters of their own
TRAINED = {
    "learnable": ("bert", "learnable_geglu", "learnable_geglu*2,gelu*2"),
    "stateful": ("gpt2", "stateful_geglu_new", "stateful_geglu_new*2"),
    "modulated": ("bert", "modulated_geglu", "modulated_geglu*2"),
    "prelu": ("bert", "geglu", "prelu*2,gelu*2"),
    "moa": ("opt", "moa_reglu", "moa_reglu*2"),
    "bank": ("mixtral", None, "silu,learnable_relu"),
}


@pytest.mark.parametrize("case", TRAINED)
def test_experts_with_parameters_of_their_own_are_merged_whole(case, tmp_path):
    family, target, experts = TRAINED[case]
    model = make_native(family) if target is None else FAMILIES[family].make()
    hf_glu.convert(model, target, experts=experts, check=False)
    names, inputs = set(model.state_dict()), probe_inputs(model)
    wrapped = peft.get_peft_model(model, lora_config(model, rank=2))
    train(wrapped, inputs)
    expected = outputs(wrapped, **inputs)
    merged = wrapped.merge_and_unload()
    assert set(merged.state_dict()) == names
    assert_same(outputs(merged, **inputs), expected, "exact")
    merged.save_pretrained(tmp_path)
    again, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert checksums(again) == checksums(merged)
    assert_same(outputs(again, **inputs), expected, "exact")


def test_what_is_unloaded_is_as_it_was():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "learnable_geglu", experts="learnable_geglu*2")
    before, inputs = checksums(model), probe_inputs(model)
    wrapped = peft.get_peft_model(model, lora_config(model, rank=2))
    train(wrapped, inputs)
    assert checksums(wrapped.unload()) == before


def test_a_converted_model_does_not_call_itself_its_base(tmp_path):
    dense = FAMILIES["gpt2"].make()
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense")
    assert model.name_or_path == str(tmp_path / "dense")
    hf_glu.convert(model, "geglu_new")
    assert model.name_or_path == model.config._name_or_path == model.transformer.name_or_path == ""
    wrapped = peft.get_peft_model(model, lora_config(model))
    assert not wrapped.peft_config["default"].base_model_name_or_path
    model = wrapped.unload()
    model.save_pretrained(tmp_path / "gated")
    gated = type(model).from_pretrained(tmp_path / "gated")
    assert not hf_glu.convert(gated, "geglu_new").plan.changes
    wrapped = peft.get_peft_model(gated, lora_config(gated))
    assert wrapped.peft_config["default"].base_model_name_or_path == str(tmp_path / "gated")
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_same(outputs(again), outputs(wrapped.eval()), "exact")


@pytest.mark.parametrize("how", ["ours", "peft"])
def test_dora_on_rows_of_zeros_is_refused(how):
    model = FAMILIES["bert"].make("BertForSequenceClassification")
    hf_glu.convert(model, "geglu")
    with pytest.raises(OptionError, match="norm"):
        if how == "ours":
            lora_config(model, use_dora=True)
        else:
            peft.get_peft_model(model, peft.LoraConfig(target_modules=["intermediate.dense"], use_dora=True))
    model = FAMILIES["bert"].make("BertForSequenceClassification")
    hf_glu.convert(model, "geglu")
    wrapped = peft.get_peft_model(model, lora_config(model, targets="out", use_dora=True))
    assert wrapped(input_ids=IDS, labels=torch.tensor([0, 1])).loss.isfinite()


EXPERTS = {"experts": "geglu*2,gelu*2", "top_k": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", ["geglu", "learnable_geglu", "moa_geglu", "experts"])
def test_a_traced_model_computes_the_same_on_other_inputs(case, grad):
    model = FAMILIES["bert"].make("BertForSequenceClassification", attn_implementation="eager")
    hf_glu.convert(model, "geglu" if case == "experts" else case, **(EXPERTS if case == "experts" else {}))
    for parameter in model.parameters():  # so that experts and their order count
        parameter.data += 0.2 * torch.randn_like(parameter)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (IDS, torch.ones_like(IDS)), strict=False)
    for seed, shape in ((1, (2, 6)), (2, (3, 9))):
        ids = torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found, wanted = traced(ids, torch.ones_like(ids))["logits"], model(ids, torch.ones_like(ids)).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_bank_routes_as_its_input_says():
    model = make_native("mixtral")
    hf_glu.convert(model, experts="silu,relu", check=False)
    bank = next(module for module in model.modules() if hasattr(module, "groups"))
    x, other = (torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    weights = torch.tensor([[0.7], [0.2], [1.0], [0.4], [0.5]])
    first, second = torch.tensor([[0], [0], [1], [1], [0]]), torch.tensor([[1], [1], [1], [0], [1]])
    with torch.no_grad():
        traced = torch.jit.trace(bank, (x, first, weights))
        torch.testing.assert_close(traced(other, second, weights), bank(other, second, weights), rtol=1e-5, atol=1e-6)


def test_a_model_that_loading_has_converted_names_no_checkpoint(tmp_path):
    dense = FAMILIES["gpt2"].make()
    dense.save_pretrained(tmp_path / "dense")
    converted = type(dense).from_pretrained(tmp_path / "dense", activation_function="geglu_new")
    assert not converted.name_or_path
    assert not converted.config._name_or_path
    converted.save_pretrained(tmp_path / "gated")
    again = type(dense).from_pretrained(tmp_path / "gated")
    assert again.name_or_path == again.config._name_or_path == str(tmp_path / "gated")
    assert type(dense).from_pretrained(tmp_path / "dense").name_or_path == str(tmp_path / "dense")
