"""FFNs a tile of tokens at a time: values and gradients of the whole, less memory, and what can't be tiled."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_same
from peft import LoraConfig, get_peft_model
from pico import FAMILIES, VOCAB
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_glu
from hf_glu.bench.memory import peak_bytes
from hf_glu.bench.tiles import STOCK, ffns
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.tiled import TiledFFN

IDS = torch.randint(3, VOCAB, (2, 21), generator=torch.Generator().manual_seed(0))


def llama(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, **more))


def gpt2(name: str | None):
    model = FAMILIES["gpt2"].make("GPT2LMHeadModel", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if name:
        hf_glu.convert(model, name, check=False)
    return model


def t5():
    model = FAMILIES["t5"].make(dropout_rate=0.0)
    hf_glu.convert(model, "reglu", check=False)
    return model


MAKE = {
    "llama": llama, "gpt2": lambda: gpt2(None), "gpt2 geglu": lambda: gpt2("geglu"),
    "gpt2 moa": lambda: gpt2("moa_geglu"), "t5 reglu": t5,
}  # fmt: skip


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_tiles_are_the_whole(kind, checkpointing):
    plain = MAKE[kind]().train()
    tiled = copy.deepcopy(plain)
    assert hf_glu.save_memory(tiled, tile=8) == hf_glu.save_memory(tiled, tile=8) > 0
    if checkpointing:
        tiled.gradient_checkpointing_enable({"use_reentrant": False})
    found, expected = step(tiled), step(plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(tiled(input_ids=IDS, labels=IDS).loss, plain(input_ids=IDS, labels=IDS).loss)


def test_dropout_inside_of_a_tile_is_the_same_in_both_passes():
    model = FAMILIES["gpt2"].make("GPT2LMHeadModel", resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0).train()
    hf_glu.save_memory(model, tile=8)
    ffn, x = model.transformer.h[0].mlp, torch.randn(20, 16, requires_grad=True)
    y = ffn(x)
    (dropped,) = torch.autograd.grad(y, ffn.c_proj.bias, (y == 0).to(y.dtype))
    torch.testing.assert_close(dropped, torch.zeros_like(dropped))  # what was dropped has no gradient


def test_memory_of_a_long_text_is_bounded():
    shape = {"tokens": 4096, "hidden": 32, "width": 128, "dtype": "float32"}
    made = ffns(shape)
    stock, tiled = (peak_bytes(made[name].call) for name in (STOCK, "save_memory(tile=1,024)"))
    assert tiled < 0.5 * stock


def test_what_is_saved_is_the_stock_model(tmp_path):
    model = llama()
    hf_glu.save_memory(model, tile=4)
    assert isinstance(model.model.layers[0].mlp, TiledFFN)
    assert type(copy.deepcopy(model).model.layers[0].mlp).__name__ == "LlamaMLP"
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(loaded.model.layers[0].mlp, TiledFFN)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_compiling_and_transforms_have_the_whole():
    model = llama()
    hf_glu.save_memory(model, tile=4)
    ffn, x = model.model.layers[0].mlp, torch.randn(9, 16)
    compiled = torch.compile(ffn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ffn(x))
    torch.testing.assert_close(torch.func.vmap(ffn)(x.unsqueeze(0))[0], ffn(x))


@pytest.mark.parametrize("tile", [0, -3, 2.5, True, "all"])
def test_no_number_of_tokens_is_refused(tile):
    with pytest.raises(OptionError, match="number of tokens"):
        hf_glu.save_memory(llama(), tile=tile)


def test_ffns_that_cannot_be_tiled_are_refused_or_left():
    spread = FAMILIES["bert"].make()
    hf_glu.convert(spread, "geglu", check=False)
    with pytest.raises(OptionError, match="spread"):
        hf_glu.save_memory(spread, tile=8)
    assert not any(getattr(module, "saves_memory", False) for module in spread.modules())
    remembering = gpt2("stateful_geglu")
    with pytest.raises(OptionError, match="in order"):
        hf_glu.save_memory(remembering, tile=8)
    with pytest.raises(NoSiteError):
        hf_glu.save_memory(nn.Linear(3, 3), tile=8)


def test_adapters_come_after_tiles():
    found = []
    for tile in (None, 8):
        model = llama()
        if tile:
            hf_glu.save_memory(model, tile=tile)
        torch.manual_seed(1)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False))
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: each.grad for name, each in wrapped.named_parameters() if each.grad is not None})
    assert_same(found[1], found[0], "trained")
    with pytest.raises(NoSiteError, match="before PEFT wraps projections"):
        hf_glu.save_memory(wrapped, tile=8)
