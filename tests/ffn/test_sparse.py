"""Closed gates skipped at inference: the same outputs, fewer units computed, nothing else changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import accelerate
import peft
import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, make_native
from torch.autograd import forward_ad
from torch.nn import functional

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn import sparse
from hf_glu.ffn.linear import weight_rows
from hf_glu.ffn.sparse import SkipZeros, Units
from hf_glu.ffn.sparse_kernel import find_kernel, multiply_open

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def make(name: str) -> Any:
    """Return a model with ReLU gates of random weights."""
    torch.manual_seed(0)
    if name == "llama":
        model = make_native("llama", hidden_act="relu")
    else:
        field = "feed_forward_proj" if name == "t5" else "activation_function"
        model = FAMILIES[name].make(**{field: "relu2glu" if name == "gpt2" else "reglu"})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be no compiler."""
    monkeypatch.setattr(sparse, "find_kernel", lambda dtype: None)


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_generation_is_the_same_and_closed_units_are_skipped(name, monkeypatch):
    without_kernels(monkeypatch)
    model = make(name)
    ids, more = torch.arange(5, 11).view(1, 6), {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    expected, sizes = model.generate(ids, **more), []
    skipping = copy.deepcopy(model)
    assert hf_glu.skip_zeros(skipping, most_open=1.0) == len(hf_glu.find_sites(skipping))
    plain = functional.embedding_bag
    monkeypatch.setattr(functional, "embedding_bag", lambda i, *a, **k: sizes.append(i.numel()) or plain(i, *a, **k))
    assert_same(skipping.generate(ids, **more), expected, "bitwise")
    width = hf_glu.find_sites(skipping)[0].width
    assert sizes
    assert max(sizes) < width
    with torch.no_grad():
        key = {"decoder_input_ids": ids[:, :1]} if name == "t5" else {}
        found, wanted = (each(input_ids=ids[:, :1], **key).logits for each in (skipping, model))
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.skipif(find_kernel(torch.float32) is None, reason="no compiler")
@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_kernels_read_the_open_units_alone(name, monkeypatch):
    model, shares = make(name), []
    assert hf_glu.skip_zeros(model)
    (site, *_) = hf_glu.find_sites(model)
    x = torch.randn(1, 1, site.hidden)
    plain = sparse.multiply_kept
    monkeypatch.setattr(
        sparse, "multiply_kept", lambda u, *a, **k: shares.append(float((u != 0).float().mean())) or plain(u, *a, **k)
    )
    with torch.no_grad():
        expected = site.anchor(x)
        (gate, bias), (up, _) = vars(site.anchor)["hf_glu_units"].halves()
        closed = functional.linear(x[0, 0], gate, bias) <= 0
        for weights in (up, weight_rows(site.out_proj).T):
            weights[closed] = float("nan")
        assert_same(site.anchor(x), expected, "bitwise")
    assert shares == [1 - float(closed.float().mean())] * 2


@pytest.mark.parametrize("kernels", [True, False])
def test_what_torch_follows_sees_no_kernel(kernels, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    model = make("llama")
    plain = copy.deepcopy(model)
    hf_glu.skip_zeros(model, most_open=0.0)
    (ours, *_), (theirs, *_) = (hf_glu.find_sites(each) for each in (model, plain))
    x, way = torch.randn(2, 1, 1, ours.hidden)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, way)
        found, expected = (forward_ad.unpack_dual(site.anchor(dual)).tangent for site in (ours, theirs))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_dots_have_bias_threads_and_every_remainder():
    for hidden, width in ((1, 1), (7, 33), (64, 130), (200, 64)):
        for dtype, close in ((torch.float32, CLOSE), (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2})):
            if find_kernel(dtype) is None:
                pytest.skip("no compiler")
            x, w, b = (torch.randn(*shape).to(dtype) for shape in ((hidden,), (width, hidden), (width,)))
            gates = torch.randn(width).relu().to(dtype)
            for bias, threads in ((b, 1), (None, 2), (b, 5)):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    found = multiply_open(gates.clone(), x, w, bias)
                finally:
                    torch.set_num_threads(before)
                wanted = gates.double() * functional.linear(
                    x.double(), w.double(), None if bias is None else b.double()
                )
                torch.testing.assert_close(found.double(), wanted, **close)
    nan = torch.tensor([float("nan"), 0.0])
    assert multiply_open(nan, torch.ones(1), torch.ones(2, 1), None).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
@pytest.mark.parametrize(("tokens", "kernels"), [(1, True), (1, False), (3, True)])
def test_an_ffn_alone(name, tokens, kernels, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    model = make(name)
    x = torch.randn(1, tokens, hf_glu.find_sites(model)[0].hidden)
    (site, *_) = hf_glu.find_sites(model)
    with torch.no_grad():
        expected = site.anchor(x)
    for share in (0.0, 1.0, None):
        hf_glu.skip_zeros(model, most_open=share)
        with torch.no_grad():
            torch.testing.assert_close(site.anchor(x), expected, **CLOSE)
            half = copy.deepcopy(site.anchor).bfloat16()
            torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=5e-2, atol=5e-2)


def test_weights_that_change_are_seen():
    model = make("llama")
    hf_glu.skip_zeros(model, most_open=1.0)
    (site, *_) = hf_glu.find_sites(model)
    x = torch.randn(1, 1, site.hidden)
    with torch.no_grad():
        first = site.anchor(x)
        site.out_proj.weight.mul_(2)
        torch.testing.assert_close(site.anchor(x), 2 * first, **CLOSE)


def one_token(model: Any) -> torch.Tensor:
    """Return what one token gives, without gradients, so that closed units may be skipped."""
    ids = torch.full((1, 1), 7)
    with torch.no_grad():
        return model(input_ids=ids).logits


def changed(model: Any, how: str) -> Any:
    """Return ``model`` with its FFNs changed in one of the ways in which weights, or what is made of them, change."""
    mlp = next(site.anchor for site in hf_glu.find_sites(model))
    up, down = ("c_fc", "c_proj") if hasattr(mlp, "c_fc") else ("up_proj", "down_proj")
    if how == "data":
        for name in (up, down):
            mlp.get_submodule(name).weight.data.mul_(1.5)
    elif how == "another parameter":
        mlp.get_submodule(down).weight = torch.nn.Parameter(-mlp.get_submodule(down).weight.detach().contiguous())
    elif how == "hooks":
        mlp.get_submodule(up).register_forward_hook(lambda module, args, out: out + 0.3)
        mlp.get_submodule(down).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif how == "activation":
        mlp.act.register_forward_pre_hook(lambda module, args: (args[0] + 0.2,))
    elif how == "parametrization":
        torch.nn.utils.parametrizations.weight_norm(mlp.get_submodule(down))
        mlp.get_submodule(down).parametrizations.weight.original0.data.mul_(2)
    elif how == "dropout":
        mlp.dropout.p = 1.0
        mlp.train()
    elif how == "offloaded":
        accelerate.cpu_offload(model)
    else:
        given = peft.LoraConfig(target_modules=[up, down], init_lora_weights=False, fan_in_fan_out=up == "c_fc")
        model = peft.get_peft_model(model, given).eval()
        model = model.merge_and_unload() if how == "merged" else model
    return model


@pytest.mark.parametrize(
    "how",
    [
        "data",
        "another parameter",
        "hooks",
        "activation",
        "parametrization",
        "offloaded",
        "adapter",
        "merged",
        "dropout",
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_whatever_changes_is_what_is_computed(name, how):
    if (name, how) in {("gpt2", "parametrization"), ("llama", "dropout"), ("llama", "activation")}:
        pytest.skip("Conv1D has no norm for it; Llama has no dropout there, and another name for its activation")
    plain = make(name)
    skipping = copy.deepcopy(plain)
    hf_glu.skip_zeros(skipping, most_open=1.0)
    first = one_token(skipping)
    torch.manual_seed(1)
    expected = one_token(changed(plain, how))
    torch.manual_seed(1)
    found = one_token(changed(skipping, how))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert how == "offloaded" or (found - first).abs().max() > 1e-4


def test_training_saving_and_copies_are_as_before(tmp_path):
    model = make("gpt2")
    hf_glu.skip_zeros(model)
    ids = torch.arange(5, 11).view(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, SkipZeros) for module in again.modules())
    assert_same(outputs(again), outputs(model), "bitwise")
    other = pickle.loads(pickle.dumps(model))
    assert_same(outputs(other), outputs(model), "bitwise")
    unit = next(m for m in other.modules() if isinstance(m, SkipZeros)).hf_glu_units
    assert isinstance(unit, Units)
    assert unit.site.anchor in list(other.modules())


def test_an_out_projection_in_float32_gives_what_half_precision_cannot_hold():
    model = make("t5").half()
    (site, *_) = hf_glu.find_sites(model)
    site.out_proj.float().weight.data.mul_(1e6)  # as Transformers keeps it in a T5 of float16
    x = torch.randn(1, 1, site.hidden).half()
    for share in (0.0, 1.0):
        with torch.no_grad():
            expected = copy.deepcopy(site.anchor)(x)
            hf_glu.skip_zeros(model, most_open=share)
            found = site.anchor(x)
        assert expected.abs().max() > torch.finfo(torch.float16).max
        assert_same(found, expected, "exact up to rounding")


def test_autocast_is_the_familys_own():
    plain = make("llama")
    sparse = copy.deepcopy(plain)
    hf_glu.skip_zeros(sparse, most_open=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(one_token(sparse), one_token(plain), "bitwise")


def test_a_module_that_does_more_than_its_parts_is_refused():
    torch.manual_seed(0)
    model = tiny_model("falcon_h1", hidden_act="relu", mlp_multipliers=[0.5, 3.0])
    with pytest.raises(NoSiteError, match="reglu"):  # it multiplies its gate
        hf_glu.skip_zeros(model)
    assert hf_glu.skip_zeros(tiny_model("falcon_h1", hidden_act="relu", mlp_multipliers=[1.0, 1.0]))


def test_what_has_no_relu_gate_is_refused():
    for model in (FAMILIES["gpt2"].make(), FAMILIES["gpt2"].make(activation_function="swiglu"), make_native("llama")):
        with pytest.raises(NoSiteError, match="reglu"):
            hf_glu.skip_zeros(model)
    with pytest.raises(OptionError, match="share"):
        hf_glu.skip_zeros(make("gpt2"), most_open=2)
