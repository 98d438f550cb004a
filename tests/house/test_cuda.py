"""On a GPU: conversions keep what they promise, gradients are the CPU's, and what is saved there loads anywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import outputs
from pico import FAMILIES, make_native

import hf_glu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MODELS = ("bert", "gpt2", "t5", "llama")
NAMES = (
    "{exact}",
    "learnable_{exact}",
    "moa_{exact}",
    "stateful_{exact}",
    "modulated_{exact}",
    "canon_{exact}",
    "smear_{exact}",
    "modulated_canon_smear_stateful_{exact}",
)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # other kernels, TF32 off


def make(name: str) -> Any:
    return FAMILIES[name].make() if name in FAMILIES else make_native(name)


def exact(name: str) -> str:
    return FAMILIES[name].exact if name in FAMILIES else "swiglu"


def awake(model: Any) -> Any:
    """Return the model with parameters of its activations that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif key.endswith(("alpha", "beta")):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    tokens = torch.randint(5, 60, (3, 11), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    model(input_ids=tokens, attention_mask=mask, **more)[0].float().square().mean().backward()
    return {key: part.grad.cpu() for key, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_conversion_outputs_gradients_and_saving(name, target, tmp_path):
    model = make(name).cuda()
    before = outputs(model)
    target = target.format(exact=exact(name))
    if name == "llama" and target == "swiglu":
        target = "reglu"  # it is swiglu
    report = hf_glu.convert(model, target, check=False)
    if report.plan.promise == "exact":
        torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
    awake(model)
    there = copy.deepcopy(model).cpu()
    here, on_cpu = outputs(model), outputs(there)
    for key in on_cpu:
        torch.testing.assert_close(here[key].cpu(), on_cpu[key], **CLOSE)
    mine, theirs = gradients(model), gradients(there)
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).cuda()
    torch.testing.assert_close(outputs(again), here, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", ["geglu_new*2,relu*2,swiglu*2", "kappa_geglu_new*3", "kappa_geglu_new*2,relu"])
def test_experts(groups, dtype):
    model = FAMILIES["gpt2"].make().cuda().to(dtype)
    before = outputs(model)
    hf_glu.convert(model, "geglu_new", experts=groups, check=False)
    if "kappa" in groups:
        awake(model)
    there = copy.deepcopy(model).cpu().float()
    wide = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else CLOSE
    for key, value in outputs(there).items():
        torch.testing.assert_close(outputs(model)[key].cpu().float(), value, **wide)
        assert before[key].shape == value.shape
    gradients(model.train())


@pytest.mark.parametrize("target", ["geglu_new", "stateful_geglu_new", "canon_geglu_new"])
def test_decoding_by_steps_is_the_whole_text(target):
    model = FAMILIES["gpt2"].make().cuda()
    hf_glu.convert(model, target, check=False)
    awake(model)
    tokens = torch.randint(5, 60, (2, 12)).cuda()
    with torch.no_grad():
        whole = model(tokens).logits
        cache, found = None, []
        for at in range(0, 12, 3):
            out = model(tokens[:, at : at + 3], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


@pytest.mark.parametrize("target", ["geglu", "moa_geglu", "modulated_geglu"])
def test_save_memory_gives_the_same_gradients_from_less(target):
    model = FAMILIES["bert"].make().cuda()
    hf_glu.convert(model, target, check=False)
    awake(model)
    plain = gradients(copy.deepcopy(model))
    hf_glu.save_memory(model)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[key], rtol=1e-3, atol=1e-3 * float(plain[key].abs().max()) + 1e-8)


@pytest.mark.parametrize("target", ["geglu_new", "stateful_geglu_new"])
def test_compiled(target):
    model = FAMILIES["gpt2"].make().cuda()
    hf_glu.convert(model, target, check=False)
    awake(model)
    tokens = torch.randint(5, 60, (2, 12)).cuda()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        found = torch.compile(model)(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, **CLOSE)
