"""A state in the gate of Mamba's mixers: exact at first, causal, blind to padding, the same token by token."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import versions
from comparing import assert_same, outputs
from mixers import MODELS, awake, make
from states import CLOSE, ids, logits
from torch import Tensor

import hf_glu
from hf_glu import cli
from hf_glu.activation.stateful import Memory
from hf_glu.bench.decoding import cache_in
from hf_glu.compat.of_models import GATE_ALONE
from hf_glu.errors import ConversionError, IncompatibleTransformersError, OptionError, TrainingError
from hf_glu.ffn.mixers import GatedMixer


def in_parts(model: Any, tokens: Tensor, split: tuple[int, ...]) -> Tensor:
    """Return the logits of a text that is given part by part, with a cache."""
    parts, cache = [], {}
    for part in tokens.split(split, 1):
        with torch.no_grad():
            out = model(part, **cache, use_cache=True)
        cache = cache_in(out)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", MODELS)
def test_causality_padding_and_chunks(name):
    model, tokens = awake(name), ids(2, 12)
    assert model.config.hidden_act == "stateful_swiglu"
    plain = make(name)
    whole = logits(model, tokens)
    assert (whole - logits(plain, tokens)).abs().max() > 1e-2, "the state does nothing"
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 7) % 50 + 5
    assert_same(logits(model, other)[:, :6], whole[:, :6], "exact up to rounding")
    assert_same(logits(model, tokens[1:]), whole[1:], "exact up to rounding")
    mask = torch.tensor([[0] * 3 + [1] * 12] * 2)
    left = torch.cat([ids(2, 3, seed=5), tokens], 1)
    torch.testing.assert_close(logits(model, left, attention_mask=mask)[:, 3:], whole, **CLOSE)
    right = torch.cat([tokens, ids(2, 3, seed=5)], 1)
    torch.testing.assert_close(logits(model, right, attention_mask=mask.flip(1))[:, :12], whole, **CLOSE)
    for split in ((1,) * 12, (5,) + (1,) * 7):
        torch.testing.assert_close(in_parts(model, tokens, split), whole, **CLOSE)


def test_several_tokens_continue_a_text():
    """Only Mamba-2's do: Mamba's own state begins anew, stateful or not."""
    tokens, split = ids(2, 12), (5, 7)
    plain = make("Mamba2")
    versions.needs_continued_texts(in_parts(plain, tokens, split), logits(plain, tokens))
    model = awake("Mamba2")
    torch.testing.assert_close(in_parts(model, tokens, split), logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=["greedy", "sample", "beam"]
)
def test_generation_is_the_same_without_cache(name, how):
    if "num_beams" in how:
        versions.needs_beams_with_a_cache(make("Mamba2"), ids(2, 6))
    model, more = awake(name), {"max_new_tokens": 8, "pad_token_id": 0}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids(2, 6), **more, **how, use_cache=use_cache))
    assert_same(found[0], found[1], "bitwise")


def test_gradient_checkpointing():
    model = awake("Mamba2").train()
    mask = torch.tensor([[0] * 3 + [1] * 7] * 2)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids(2, 10), attention_mask=mask, labels=ids(2, 10), use_cache=False).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert_same(gradients(), expected, "trained")


def test_from_config_and_what_cant_be():
    model = make("Mamba", hidden_act="stateful_silu")
    assert sum(isinstance(module, GatedMixer) for module in model.modules()) == 2
    assert model.backbone.layers[0].mixer.activation == "silu"
    before = outputs(make("Mamba"))
    for target, more, error in (
        ("stateful_swiglu", {"width": 8}, ConversionError),
        ("swiglu", {"experts": 4}, ConversionError),
        ("stateful_swiglu", {"layers": [5]}, OptionError),
    ):
        model = make("Mamba")
        with pytest.raises(error):
            hf_glu.convert(model, target, **more)
        assert_same(outputs(model), before, "bitwise")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["learnable_reglu", "stateful_learnable_geglu", "reglu", "stateful_geglu"])
def test_other_activations(name, target, tmp_path):
    model, tokens = make(name), ids(2, 9)
    before = logits(model, tokens)
    report = hf_glu.convert(model, target)
    assert report.plan.promise == ("exact up to rounding" if "learnable" in target else "approximate")
    found = logits(model, tokens)
    if "learnable" in target:
        assert_same(found, before, "exact up to rounding")
    else:
        assert (found - before).abs().max() > 1e-5
    assert model.backbone.layers[0].mixer.activation == "silu"  # the convolution's
    torch.testing.assert_close(in_parts(model, tokens, (1,) * 9), found, **CLOSE)
    model.save_pretrained(tmp_path)
    assert_same(logits(type(model).from_pretrained(tmp_path), tokens), found, "bitwise")
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert logits(copy.deepcopy(model).bfloat16().eval(), tokens).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_another_activation_is_by_the_formula(name):
    """relu(g) in place of silu(g): scaling g by a large number makes both the same up to that number."""
    model, tokens = make(name), ids(2, 9)
    scale = 4096.0
    with torch.no_grad():
        for layer in model.backbone.layers:
            mixer = layer.mixer
            begin = mixer.intermediate_size if hasattr(mixer, "x_proj") else 0
            mixer.in_proj.weight[begin : begin + mixer.intermediate_size] *= scale
            if name != "Mamba2":  # whose norm takes the scale out
                mixer.out_proj.weight /= scale
    silu = logits(model, tokens)
    hf_glu.convert(model, "reglu", check=False)
    torch.testing.assert_close(logits(model, tokens), silu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["reglu", "stateful_swiglu"])
def test_before_5_15_another_convolution_is_refused(target, monkeypatch):
    from transformers.models.mamba import modeling_mamba

    monkeypatch.delattr(modeling_mamba, GATE_ALONE.name, raising=False)
    model = make("Mamba", hidden_act="gelu")
    with pytest.raises(IncompatibleTransformersError, match="another gate than its convolution's") as caught:
        hf_glu.convert(model, target, check=False)
    assert "\n" not in str(caught.value)
    hf_glu.convert(make("Mamba"), target, check=False)


def test_a_fused_kernel_isnt_ignored(monkeypatch):
    from transformers.models.mamba import modeling_mamba

    versions.needs(GATE_ALONE)  # before it, a kernel is chosen for what is on a GPU alone
    model = make("Mamba")
    hf_glu.convert(model, "reglu", check=False)
    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", lambda x, *args, **kwargs: x.transpose(1, 2)[..., :32])
    with pytest.raises(TrainingError, match="fused kernel"):
        model.train()(ids(1, 4), use_cache=False)


class Adapted(torch.nn.Module):
    """A projection with something added to what it gives, as adapters and quantised layers wrap one."""

    def __init__(self, inner: Any, added: Any) -> None:
        super().__init__()
        self.inner, self.added = inner, added

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.added(x)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
@pytest.mark.parametrize("target", ["stateful_swiglu", "stateful_geglu"])
def test_a_projection_that_is_wrapped_afterwards_is_gated_as_a_whole(name, target):
    merged, tokens = make(name), ids(2, 9)
    hf_glu.convert(merged, target, check=False)
    with torch.no_grad():
        for memory in (module for module in merged.modules() if isinstance(module, Memory)):
            memory.alpha.normal_(std=2)
    wrapped = copy.deepcopy(merged)
    for layer, other in zip(merged.backbone.layers, wrapped.backbone.layers, strict=True):
        for part in ("in_proj", "out_proj"):
            plain = getattr(layer.mixer, part)
            added = torch.nn.Linear(plain.in_features, plain.out_features, bias=False)
            with torch.no_grad():
                plain.weight += added.weight
            setattr(other.mixer, part, Adapted(getattr(other.mixer, part), added))
    torch.testing.assert_close(logits(wrapped, tokens), logits(merged, tokens), **CLOSE)


def test_some_layers(tmp_path):
    model = make("Mamba")
    hf_glu.convert(model, "stateful_swiglu", layers=[1])
    assert [isinstance(layer.mixer, GatedMixer) for layer in model.backbone.layers] == [False, True]
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


def test_the_command_line_lists_and_converts_them(tmp_path, capsys):
    make("Mamba").save_pretrained(tmp_path / "src")
    assert cli.run(["sites", str(tmp_path / "src"), "--json"]) == 0
    assert [site["kind"] for site in json.loads(capsys.readouterr().out)["sites"]] == ["mixer", "mixer"]
    assert cli.run(["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--to", "stateful_swiglu"]) == 0
    assert cli.run(["verify", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
