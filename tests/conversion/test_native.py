"""Converted T5 models in the layout of T5 v1.1, which stock Transformers loads by itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, VOCAB, WIDTH

import hf_glu
from hf_glu.errors import ConversionError, NoSiteError, OptionError

GATED = {"reglu": "gated-relu", "swiglu": "gated-silu", "geglu_new": "gated-gelu"}
TOKENS = torch.randint(2, VOCAB, (64, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make():
    def make(prefix="T5"):
        config = getattr(transformers, f"{prefix}Config")(**FAMILIES["t5"].arguments, vocab_size=VOCAB)
        if prefix in ("MT5", "UMT5"):
            config.feed_forward_proj, config.dense_act_fn, config.is_gated_act = "relu", "relu", False
        torch.manual_seed(0)
        return getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()

    return make


@pytest.mark.parametrize(("prefix", "target"), covering(["T5", "MT5", "UMT5", "LongT5"], GATED))
def test_loads_without_the_plugin(make, prefix, target, tmp_path):
    model, native = make(prefix), GATED[target]
    report = hf_glu.convert(model, target, calibration=TOKENS, bias=False, distill_steps=50)
    assert report.plan.promise == "approximate"
    assert all(site.fit.after < 0.9 * site.fit.before for site in report.sites)
    expected = outputs(model)
    assert hf_glu.to_native(model) == 4
    assert model.config.feed_forward_proj == native
    assert getattr(model.config, "hf_glu", None) is None
    assert_same(outputs(model), expected, "exact")
    model.save_pretrained(tmp_path)
    hf_glu.unregister()
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    hf_glu.register()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(outputs(again), outputs(model), "bitwise")
    assert not any(site.in_proj.bias is not None for site in hf_glu.find_sites(again))


def test_narrower_and_exact_without_a_bias(make, tmp_path):
    model = make()
    hf_glu.convert(model, "reglu", calibration=TOKENS, bias=False, width=24, distill_steps=5)
    hf_glu.to_native(model)
    assert model.config.d_ff == 24
    torch.manual_seed(0)
    squared = transformers.T5Model(FAMILIES["t5"].make_config(feed_forward_proj="relu2")).eval()
    before = outputs(squared)
    hf_glu.convert(squared, "reglu", bias=False)  # relu^2 is relu(x) * x: no constant is needed
    hf_glu.to_native(squared)
    assert squared.config.d_ff == WIDTH
    assert_same(outputs(squared), before, "exact")


def refuse(says, error, change):
    return pytest.param(says, error, change, id=says)


@pytest.mark.parametrize(
    ("says", "error", "change"),
    [
        refuse("has a bias", ConversionError, lambda model: hf_glu.convert(model, "reglu")),
        refuse("one gated activation", ConversionError, lambda model: hf_glu.convert(model, "reglu", layers=[0])),
        refuse("tanh form", ConversionError, lambda m: hf_glu.convert(m, "geglu", calibration=TOKENS, bias=False)),
        refuse("one width in all", ConversionError, lambda model: None),
    ],
)
def test_what_the_layout_cant_hold(make, says, error, change):
    model = make()
    change(model)
    before = model.config.to_dict()
    with pytest.raises(error, match=says):
        hf_glu.to_native(model)
    assert model.config.to_dict() == before


def test_other_families_and_missing_calibration(make):
    with pytest.raises(NoSiteError, match=r"T5 v1\.1"):
        hf_glu.to_native(FAMILIES["bert"].make())
    with pytest.raises(OptionError, match="no bias"):
        hf_glu.convert(make(), "reglu", bias=False)
