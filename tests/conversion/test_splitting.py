"""FFNs divided among experts: exact with all of them on, a falling error with fewer, bad input."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, NATIVE, VOCAB, make_native

import hf_glu
from hf_glu.conversion.experts.carving import balanced_clusters
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.experts import find_experts

TOKENS = torch.randint(3, VOCAB, (64, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("similarity", ["coactivation", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_with_all_experts_on(family, similarity, tmp_path):
    model = FAMILIES[family].make()
    before = outputs(model)
    report = hf_glu.split_experts(model, 4, top_k=4, calibration=TOKENS, similarity=similarity)
    assert_same(outputs(model), before, "exact up to rounding")
    for curve in report.to_dict()["curves"].values():
        assert len(curve) == 4
        assert curve[-1] < 1e-5 < curve[0]
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("name", [name for name in NATIVE if name != "mixtral"])
def test_gated_families(name):
    model = make_native(name)
    before = outputs(model)
    hf_glu.split_experts(model, 4, top_k=4, calibration=TOKENS)
    assert len(find_experts(model)) >= 2
    assert_same(outputs(model), before, "exact up to rounding")


def test_the_fitted_router_is_better_than_any_other():
    def error(router):
        model = FAMILIES["bert"].make("BertModel")
        for site in hf_glu.find_sites(model):  # units that only some tokens use
            site.in_proj.weight.data *= 20
        before = outputs(model)["last_hidden_state"]
        hf_glu.split_experts(model, 8, top_k=4, calibration=TOKENS, layers=[1])
        for experts in find_experts(model).values():
            router(experts.router.weight.data)
        return float((outputs(model)["last_hidden_state"] - before).norm())

    fitted = error(lambda weight: None)
    assert fitted > 0
    assert fitted < error(lambda weight: weight.neg_())
    assert fitted < min(error(lambda weight: weight.normal_()) for _ in range(3))


def test_clusters_are_of_equal_size_and_of_a_kind():
    kinds = torch.eye(4).repeat_interleave(6, 0) + 0.05 * torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    parts = balanced_clusters(kinds[order], 4)
    assert [len(part) for part in parts] == [6] * 4
    assert sorted(int(i) for part in parts for i in part) == list(range(24))
    assert all(len(set((order[part] // 6).tolist())) == 1 for part in parts)


def test_the_router_learns_though_every_weight_is_one():
    model = FAMILIES["gpt2"].make()
    hf_glu.split_experts(model, 4, top_k=2, calibration=TOKENS)
    experts = next(iter(find_experts(model).values()))
    routing = experts.router(torch.randn(5, 16))
    assert_same(routing.weights.detach(), torch.ones(5, 2), "bitwise")
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    assert experts.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("experts", "more", "says"),
    [
        (7, {"top_k": 2}, "don't divide the 40 units"),
        (0, {"top_k": 1}, "don't divide"),
        (4, {"top_k": 5}, "top_k must be 1 to 4"),
        (4, {"top_k": 2, "similarity": "names"}, "coactivation"),
    ],
)
def test_bad_input(experts, more, says):
    model = FAMILIES["bert"].make()
    before = model.config.to_dict()
    with pytest.raises(OptionError, match=says):
        hf_glu.split_experts(model, experts, calibration=TOKENS, **more)
    assert model.config.to_dict() == before
    with pytest.raises(ConversionError, match="bank of experts already"):
        hf_glu.split_experts(make_native("mixtral"), 2, top_k=1, calibration=TOKENS)
