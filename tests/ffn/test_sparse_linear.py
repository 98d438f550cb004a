"""FFNs that leave out small entries: the same for a text and token by token; trained, saved, taken off."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import versions
from comparing import assert_same, outputs
from pico import FAMILIES, make_native
from torch.nn.functional import linear

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.config.glu import GluConfig
from hf_glu.conversion import allocating
from hf_glu.conversion.allocating import SHARES, least_error
from hf_glu.errors import ConversionError, NoSiteError, OptionError
from hf_glu.ffn import sparse_kernel, sparse_linear
from hf_glu.ffn.forward import projections
from hf_glu.ffn.sparse_kernel import find_kernel, kept, multiply_kept
from hf_glu.ffn.sparse_linear import SparseLinear

IDS = torch.randint(5, 60, (20, 16), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = {
    "llama": lambda: make_native("llama"),
    "phi3": lambda: make_native("phi3"),
    "gpt2": lambda: FAMILIES["gpt2"].make(),
    "gpt2, gated": lambda: FAMILIES["gpt2"].make(activation_function="stateful_swiglu"),
    "t5": lambda: FAMILIES["t5"].make(),
    "bert": lambda: FAMILIES["bert"].make(),
}


def make(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a model with weights that matter, sparse, and the report."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    return model.eval(), hf_glu.sparsify(model, IDS, **{"keep": 0.6, **options})


def cut_linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("method", ["teal", "wina", "spark"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_one_token_reads_what_a_text_is_masked_to(method, dtype, compiled, monkeypatch):
    if compiled and find_kernel(dtype) is None:
        pytest.skip("no compiler")
    if not compiled:
        monkeypatch.setattr(sparse_kernel, "find_kernel", lambda dtype: None)
    model, _ = make("llama", method=method, keep=0.75)
    model.to(dtype)
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    with torch.no_grad():
        for module in cut_linears(model)[:2]:
            x = torch.randn(5, 1, module.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
            whole = module(x)
            torch.testing.assert_close(torch.stack([module(row) for row in x]), whole, **tolerance)
            assert (whole - linear(x, module.weight)).abs().max() > 0.01


def test_the_kernel_has_bias_threads_and_every_remainder():
    for inputs, outputs_ in ((1, 1), (7, 33), (64, 130)):
        x, w, b = torch.randn(inputs), torch.randn(inputs, outputs_), torch.randn(outputs_)
        scale = torch.rand(inputs)
        for relative in (True, False):
            mask = kept(x, 0.3, relative=relative, scale=scale)
            for threads in (1, 2, 5):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    y = multiply_kept(x, w, b, 0.3, relative=relative, scale=scale)
                finally:
                    torch.set_num_threads(before)
                torch.testing.assert_close(y, (x * mask) @ w + b, **CLOSE)
    assert kept(torch.tensor([0.1, float("nan")]), 1.0, relative=False, scale=None).tolist() == [False, True]


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_is_the_whole_text(name):
    model, report = make(name)
    assert len(report.sites) == len(hf_glu.find_sites(model))
    assert report.read == pytest.approx(0.6, abs=1e-6)
    assert 0 < max(site.relative_error for site in report.sites) < 1
    if name in ("bert", "t5"):
        return
    text = IDS[:1, :9]
    with torch.no_grad():
        whole = model(text).logits
        cache, found = None, []
        for at in range(9):
            out = model(text[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-3, atol=1e-3)
    model.generate(text, max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize("name", ["llama", "gpt2, gated", "t5"])
def test_saved_loaded_copied_and_taken_off(name, tmp_path):
    torch.manual_seed(0)
    dense = copy.deepcopy(MODELS[name]())
    model, _ = make(name)
    before = outputs(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert len(cut_linears(again)) == len(cut_linears(model)) > 0
    torch.testing.assert_close(outputs(again), before, **CLOSE)
    torch.testing.assert_close(outputs(pickle.loads(pickle.dumps(copy.deepcopy(model)))), before, **CLOSE)
    part = again.get_decoder() if name == "llama" else None
    assert part is None or cut_linears(type(part).from_pretrained(tmp_path))
    state = again.state_dict()
    assert hf_glu.sparsify(again, keep=1) is None
    assert not cut_linears(again)
    assert GluConfig.of(again.config).sparsity is None
    dense.load_state_dict(state)
    assert_same(outputs(again), outputs(dense.eval()), "exact")


def test_it_trains_with_gradients_straight_through():
    model, _ = make("gpt2")
    module = cut_linears(model)[0]
    x = torch.randn(3, hf_glu.find_sites(model)[0].hidden, requires_grad=True)
    y = module(x)
    d = torch.randn_like(y)
    y.backward(d)
    mask = module.hf_glu_cut.keeps(x, module.hf_glu_norms[-1])
    assert 0 < mask.float().mean() < 1
    torch.testing.assert_close(x.grad, d @ module.weight.T, **CLOSE)
    torch.testing.assert_close(module.weight.grad, (x * mask).T @ d, **CLOSE)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_weights_that_change_are_seen():
    model, _ = make("llama", method="wina")
    text = IDS[:1, :4]
    with torch.no_grad():
        model(text[:, :1])
        for module in cut_linears(model):
            module.weight.mul_(torch.rand(module.weight.shape[1]) * 4)
        whole = model(text).logits[:, 0]
        torch.testing.assert_close(model(text[:, :1]).logits[:, 0], whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("write", ["load_state_dict", "optimizer", "merge", "train"])
def test_norms_are_those_of_the_weights(write, monkeypatch):
    model, _ = make("llama", method="wina")
    part = cut_linears(model)[0]
    x, times = torch.randn(2, 1, part.in_features), torch.rand(part.weight.shape[1]) * 4
    with torch.no_grad():
        part(x[:1])
        if write == "load_state_dict":
            part.load_state_dict({"weight": part.weight * times})
        elif write == "optimizer":
            part.weight.grad = torch.randn_like(part.weight)
            torch.optim.SGD([part.weight], lr=1.0).step()
        elif write == "merge":
            part.weight.data += torch.randn_like(part.weight)  # as PEFT does
        else:
            part.weight.data[0, 1] += 9
            model.train().eval()
        scale = part.weight.norm(dim=0)
        expected = torch.where(part.hf_glu_cut.keeps(x, scale), x, 0) @ part.weight.T
        torch.testing.assert_close(part(x[:1]), expected[:1], **CLOSE)
        monkeypatch.setattr(sparse_linear, "_norms", None)  # a step of several texts computes none
        torch.testing.assert_close(part(x), expected, **CLOSE)


def test_an_input_of_another_size_is_refused():
    model, _ = make("llama")
    for part in cut_linears(model)[:3]:
        for size in (1, part.in_features + 1):
            with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
                part(torch.ones(1, 1, size))


def test_quantized_weights_and_modules_are_refused(tmp_path, monkeypatch):
    model, _ = make("llama", method="wina")
    part = cut_linears(model)[0]

    class Quantized(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.norm:
                raise NotImplementedError("aten.linalg_vector_norm")
            return super().__torch_function__(function, types, args, kwargs or {})

    del part._parameters["weight"]
    part.weight = torch.randn(part.out_features, part.in_features).as_subclass(Quantized)
    with torch.no_grad(), pytest.raises(ConversionError, match="Quantized, whose norms"):
        part(torch.randn(1, part.in_features))
    model, _ = make("llama")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("hf_glu.plugin.models.resume_sparsity", lambda model, config: [])
    with pytest.raises(ConversionError, match="quantizer"):
        type(model).from_pretrained(tmp_path)


def test_compiled_it_is_masked():
    versions.needs_whole_graphs()
    model, _ = make("llama")
    with torch.no_grad():
        expected = model(IDS[:2], use_cache=False).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(IDS[:2], use_cache=False).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_beside_other_changes_in_place():
    model, _ = make("gpt2, gated")
    before = outputs(model)
    hf_glu.save_memory(model)
    torch.testing.assert_close(outputs(model), before, **CLOSE)
    hf_glu.sparsify(model, keep=1)
    assert not cut_linears(model)
    assert any(type(part).__bases__[0].__name__ == "LeanOut" for part in model.modules())


def test_a_conversion_wants_a_dense_model():
    model, _ = make("gpt2")
    with pytest.raises(ConversionError, match="keep=1"):
        hf_glu.convert(model, "geglu_new")
    hf_glu.sparsify(model, keep=1)
    hf_glu.convert(model, "geglu_new")


def test_shares_are_those_of_the_least_error():
    easy, hard = ([cost * (1 - share) ** 2 for share in SHARES] for cost in (0.01, 1.0))
    inputs, units = least_error(hard, easy, [200, 100], 0.8)
    assert units < 0.5 < 0.9 < inputs
    assert (2 * inputs + units) / 3 == pytest.approx(0.8)
    assert least_error(easy, easy, [100, 100], 0.6) == pytest.approx((0.6, 0.6), abs=0.1)


def test_a_threshold_leaves_the_share_that_is_asked_for():
    score = torch.rand(50, 20)
    for share in SHARES[1:]:
        level = allocating.threshold(score, share)
        assert abs(float((score > level).float().mean()) - share) < 2e-3
    assert allocating.threshold(score, 1.0) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "share"),
        ({"keep": 1.5}, "share"),
        ({"method": "tael"}, "teal"),
        ({"method": "spark", "keep": 0.5}, "in-projections whole"),
        ({"layers": [7]}, "no FFN"),
        ({"calibration": None}, "calibration"),
        ({"calibration": IDS[:2]}, "tokens"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    model = make_native("llama")
    given = {"calibration": IDS, **options}
    with pytest.raises((OptionError, NoSiteError), match=message):
        hf_glu.sparsify(model, **given)
    assert not cut_linears(model)
    assert model.config.hf_glu is None


@pytest.mark.parametrize("late", [False, True])
def test_what_fails_leaves_the_model_as_it_was(late, monkeypatch):
    model, _ = make("llama")
    before, entry = outputs(model), dict(model.config.hf_glu)
    if late:
        monkeypatch.setattr("hf_glu.conversion.sparsify.square_error", None)
    with pytest.raises((OptionError, TypeError)):
        hf_glu.sparsify(model, IDS if late else IDS[:1], keep=0.5)
    assert model.config.hf_glu == entry
    assert_same(outputs(model), before, "exact")


def test_a_hooked_projection_is_refused():
    model = make_native("llama")
    part = model.model.layers[0].mlp.up_proj
    part.forward = part.forward
    with pytest.raises(ConversionError, match="forward of its own"):
        hf_glu.sparsify(model, IDS)


def test_ffns_that_a_config_cannot_tell_apart_are_refused():
    model = tiny_model("lilt")  # has a second FFN in each layer, for where words stand
    for more in ({}, {"exclude": "layout_"}):
        with pytest.raises(OptionError, match="FFNs of one layer"):
            hf_glu.sparsify(model, IDS, **more)
    assert not cut_linears(model)


def test_units_that_a_norm_changes_are_refused():
    model = tiny_model("bitnet")
    with pytest.raises(ConversionError, match="more between its projections"):
        hf_glu.sparsify(model, IDS)
    assert not cut_linears(model)
    assert model.config.hf_glu is None


def test_inference_mode_leaves_weights_that_train():
    model = make_native("llama")
    with torch.inference_mode():
        hf_glu.sparsify(model, IDS)
    model(IDS[:2], labels=IDS[:2]).loss.backward()


def test_a_tensor_parallel_plan_leaves_sparse_ffns_whole():
    plan = set(make_native("llama")._tp_plan)
    model, _ = make("llama")
    left_out = plan - set(type(model)(model.config)._tp_plan)
    assert left_out == {name for name in plan if ".mlp." in name}
    assert left_out


def test_a_config_that_cannot_be_is_refused():
    with pytest.raises(OptionError, match="dict"):
        GluConfig(sparsity=3)
    for sparsity in ({"method": "best"}, {"cuts": {"0": [1.0]}}, {"cuts": {"0": ["a", None]}}, {"cuts": 3}):
        with pytest.raises(OptionError):
            make_native("llama", hf_glu={"sparsity": sparsity})
    with pytest.raises(OptionError, match="projections"):
        make_native("llama", hf_glu={"sparsity": {"cuts": {"0": [1.0, 1.0]}}})
    model = make_native("llama", hf_glu={"sparsity": {"cuts": {"1": [None, 1.0, 1.0]}}})
    assert len(cut_linears(model)) == 2
    assert [isinstance(part, SparseLinear) for part in projections(hf_glu.find_sites(model)[1])] == [False, True, True]
