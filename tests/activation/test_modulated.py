"""Modulated activations: exact at first, alive, causal, blind to padding, the same with a cache, steered by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from contexts import awake, make
from pico import FAMILIES, make_native
from states import CLOSE, GENERATE, batch, ids, logits, without_dropout
from torch import Tensor
from transformers.models.bert.modeling_bert import BertLayer
from versions import generate

import hf_glu
from hf_glu.activation.modulated import ContextSource
from hf_glu.bench.coverage.tiny import tiny_inputs, tiny_model
from hf_glu.config.context import ContextOptions
from hf_glu.errors import ConversionError, NoSiteError, OptionError, UnknownNameError
from hf_glu.ffn.sites import find_sites

DECODERS = ("gpt2", "llama", "opt", "t5")


def test_parameters_are_few():
    config = transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=2, vocab_size=30522)
    model = transformers.BertModel(config)
    plain = hf_glu.plan(model, "geglu")
    report = hf_glu.convert(model, "modulated_geglu", check=False)
    added = report.plan.parameters_after - plain.parameters_after
    ffn = sum(step.parameters_after for step in plain.steps)
    assert 0 < added < 0.02 * ffn


@pytest.mark.parametrize("name", [*DECODERS, "Mamba2"])
def test_causality(name):
    model, tokens = awake(name), ids(2, 12)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 7) % 50 + 5
    first, second = logits(model, tokens), logits(model, other)
    assert_same(second[:, :6], first[:, :6], "exact up to rounding")
    assert (second[:, 7:] - first[:, 7:]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*DECODERS, "bert", "modernbert", "Mamba2"])
def test_padding_and_rows(name):
    model, tokens = awake(name), ids(3, 9)
    alone = logits(model, tokens)
    if name != "t5":  # whose encoder gets another source for another batch here
        assert_same(logits(model, tokens[1:2]), alone[1:2], "exact up to rounding")
    mask = torch.tensor([[1] * 9 + [0] * 4] * 3)
    right = torch.cat([tokens, ids(3, 4, seed=5)], 1)
    torch.testing.assert_close(logits(model, right, attention_mask=mask)[:, :9], alone, **CLOSE)
    if name in ("gpt2", "llama", "Mamba2"):
        left, mask = torch.cat([ids(3, 4, seed=5), tokens], 1), mask.flip(1)
        positions = {} if name == "Mamba2" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        torch.testing.assert_close(logits(model, left, attention_mask=mask, **positions)[:, 4:], alone, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("how", GENERATE)
def test_generation_is_the_same_without_cache(name, how):
    model = awake(name)
    prompt = ids(1 if how == "lookup" else 2, 5).repeat(1, 2)
    shared = {"max_new_tokens": 10, "pad_token_id": 0}
    plain = {key: value for key, value in GENERATE[how].items() if how not in ("static", "lookup")}
    torch.manual_seed(0)
    with_cache = generate(model, prompt, **shared, **GENERATE[how])
    torch.manual_seed(0)
    assert_same(with_cache, generate(model, prompt, **shared, **plain, use_cache=False), "bitwise")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        losses = [model(**batch(model)).logits.float().square().mean() for _ in range(2)]
        sum(losses).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model = without_dropout(awake(name))
    expected = gradients(model)
    assert any("context_source" in key and value.abs().max() > 0 for key, value in expected.items())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model), expected, "trained")


def test_an_encoders_vector_drives_the_decoder(tmp_path):
    model = awake("t5", context={"pool": "encoder", "size": 4})
    assert [m.pool for m in model.modules() if isinstance(m, ContextSource)] == ["mean", "encoder"]
    tokens, source = ids(2, 6), ids(2, 9, seed=3)
    with torch.no_grad():
        alone = model(input_ids=source, decoder_input_ids=tokens).logits
        padded, mask = torch.cat([source, ids(2, 3, seed=4)], 1), torch.tensor([[1] * 9 + [0] * 3] * 2)
        again = model(input_ids=padded, attention_mask=mask, decoder_input_ids=tokens).logits
    torch.testing.assert_close(again, alone, **CLOSE)
    more = {"max_new_tokens": 6, "pad_token_id": 0}
    assert_same(model.generate(source, **more), model.generate(source, use_cache=False, **more), "bitwise")
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "opt", "Mamba", "Mamba2"])
@pytest.mark.parametrize("converted", [True, False])
def test_steering_by_hand(name, converted):
    model = awake(name) if converted else make(name)
    tokens = ids(2, 7)
    plain = logits(model, tokens)
    with hf_glu.modulation(model, threshold=0.0, slope=1.0):
        assert_same(logits(model, tokens), plain, "bitwise")
    with hf_glu.modulation(model, "strict"):
        strict = logits(model, tokens)
    with hf_glu.modulation(model, threshold=0.3, slope=1.2):
        assert_same(logits(model, tokens), strict, "bitwise")
    assert (strict - plain).abs().max() > 1e-4
    assert_same(logits(model, tokens), plain, "bitwise")  # and nothing is left of it
    if name != "opt":
        with hf_glu.modulation(model, threshold=torch.tensor([0.0, 0.3]), slope=torch.tensor([1.0, 1.2])):
            torch.testing.assert_close(logits(model, tokens), torch.stack([plain[0], strict[1]]), **CLOSE)
    with hf_glu.modulation(model, threshold=0.3, layers=[1]):
        assert (logits(model, tokens) - plain).abs().max() > 0


def test_experts_are_steered_by_their_layers():
    model = make("gpt2")
    hf_glu.convert(model, "geglu_new", experts=2, layers="0", check=False)
    tokens = ids(2, 7)
    plain = logits(model, tokens)
    found = {}
    for layers in ("0", "1", None):
        with hf_glu.modulation(model, threshold=2.0, layers=layers):
            found[layers] = logits(model, tokens)
        assert (found[layers] - plain).abs().max() > 1e-4
    assert (found["0"] - found["1"]).abs().max() > 1e-4
    assert (found["0"] - found[None]).abs().max() > 1e-4
    for layers, says in (("7", "out of range"), ([], "selects none"), ("decoder", "selects none")):
        with pytest.raises(OptionError, match=says), hf_glu.modulation(model, threshold=2.0, layers=layers):
            pass


def test_vectors_and_amounts_stay_with_their_texts_beams():
    model = awake("llama")
    prompt, vectors = ids(2, 6), hf_glu.context_vector(model, input_ids=ids(2, 6, seed=1))
    more = {"max_new_tokens": 5, "num_beams": 2, "pad_token_id": 0}
    amounts = torch.tensor([0.5, -0.5])
    with hf_glu.modulation(model, threshold=amounts, vector=vectors):
        both = model.generate(prompt, **more)
    for row in range(2):
        with hf_glu.modulation(model, threshold=float(amounts[row]), vector=vectors[row : row + 1]):
            assert torch.equal(both[row : row + 1], model.generate(prompt[row : row + 1], **more))
    assert "generate" not in vars(model)
    for odd, says in ((vectors[..., :1], "vector is"), (vectors.repeat(2, 1, 1)[:3], "3 context vectors for a batch")):
        with pytest.raises(OptionError, match=says), hf_glu.modulation(model, vector=odd):
            logits(model, prompt)


@pytest.mark.parametrize("family", ["xlnet", "fsmt"])
def test_each_sequence_has_its_amount_in_families_that_transpose(family):
    """They hand their FFNs [T, B, H]: as many tokens as sequences would hide an exchange of the two."""
    model = tiny_model(family).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    given, amounts = {name: ids(3, 3) for name in tiny_inputs(model)}, torch.tensor([0.0, 1.0, -2.0])
    with torch.no_grad():
        plain = model(**given)[0]
        with hf_glu.modulation(model, threshold=amounts):
            found = model(**given)[0]
        for row, amount in enumerate(amounts.tolist()):
            with hf_glu.modulation(model, threshold=amount):
                torch.testing.assert_close(found[row], model(**given)[0][row], **CLOSE)
    assert (found - plain)[1:].abs().max() > 1e-3


def test_steering_is_slope_times_gate_minus_threshold():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu")
    site = find_sites(model)[0]
    x = torch.randn(1, 4, site.hidden)
    gate, up = site.in_proj(x).chunk(2, -1)
    with hf_glu.modulation(model, threshold=0.5, slope=2.0):
        found = site.act(site.in_proj(x))
    assert_same(found.detach(), (torch.nn.functional.gelu(2 * (gate - 0.5)) * up).detach(), "exact")


def test_one_texts_vector_for_another():
    model, one, other = awake("gpt2"), ids(1, 8), ids(1, 8, seed=7)
    vector = hf_glu.context_vector(model, input_ids=one)
    assert vector.shape == (1, 1, ContextOptions.size)
    padded, mask = torch.cat([one, ids(1, 2)], 1), torch.tensor([[1] * 8 + [0] * 2])
    torch.testing.assert_close(hf_glu.context_vector(model, input_ids=padded, attention_mask=mask), vector, **CLOSE)
    with hf_glu.modulation(model, vector=vector):
        imposed = logits(model, other)
    assert (imposed - logits(model, other)).abs().max() > 1e-3
    bert = awake("bert")
    with hf_glu.modulation(bert, vector=hf_glu.context_vector(bert, input_ids=one)):
        assert_same(logits(bert, one), logits(bert, one), "exact")
    with pytest.raises(NoSiteError, match="context vector"):
        hf_glu.context_vector(FAMILIES["bert"].make(), input_ids=one)


def test_options_and_what_cant_be(tmp_path):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "modulated_geglu", context={"layer": 1, "size": 3})
    assert [n for n, m in model.named_modules() if isinstance(m, ContextSource)] == [
        "bert.encoder.layer.1.context_source"
    ]
    assert model.config.hf_glu["context"] == {"size": 3, "layer": 1}
    for bad in ({"layer": -1}, {"size": 0}, {"pool": "max"}, {"decay": [0.5]}, {"sizes": 3}):
        with pytest.raises((OptionError, UnknownNameError)):
            hf_glu.GluConfig(context=bad)
    for name, target, context, error in (
        ("bert", "modulated_geglu", {"layer": 9}, OptionError),
        ("bert", "geglu", {"layer": 0}, OptionError),
        ("gpt2", "modulated_geglu_new", {"pool": "mean"}, OptionError),
        ("gpt2", "modulated_geglu_new", {"pool": "encoder"}, OptionError),
    ):
        with pytest.raises(error):
            hf_glu.convert(FAMILIES[name].make(), target, context=context)
    with pytest.raises(ConversionError, match="no sequences"):
        hf_glu.convert(make_native("mixtral"), "modulated_swiglu")
    with pytest.raises(OptionError, match="strict"), hf_glu.modulation(model, "strickt"):
        pass


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_whose_hooks_run_inside_of_a_checkpoint(reentrant, monkeypatch):
    """Transformers before 5.23 checkpoints a layer's call, hooks and all: the vector is for the later layers, too."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        plain = partial(super(BertLayer, layer).__call__, **kwargs)
        return layer._gradient_checkpointing_func(plain, *args) if layer.checkpointed else plain(*args)

    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch(model)).logits.float().square().mean().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model = without_dropout(awake("bert"))
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for layer in model.bert.encoder.layer:
        layer.checkpointed, layer.gradient_checkpointing = True, False  # by `call` alone
    monkeypatch.setattr(BertLayer, "__call__", call, raising=False)
    assert_same(gradients(model), expected, "trained")
