"""Least squares, narrower FFNs and pruning, against what they must reproduce."""

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, HIDDEN, WIDTH, make_native
from taskdata import make_tokenizer
from torch import nn

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.config.glu import iso_width
from hf_glu.conversion.fit.calibration import make_batches, site_inputs
from hf_glu.conversion.fit.fitting import (
    contributions,
    damped,
    normal_equations,
    relative_error,
    solve_out_projection,
    token_sizes,
)
from hf_glu.conversion.work import Work
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.forward import ffn_output, ffn_units

IDS = torch.randint(5, 60, (40, 12), generator=torch.Generator().manual_seed(3))


def test_iso_width_is_as_documented():
    assert [iso_width(d) for d in (3072, 1536, 1024, 192, 40, 1)] == [2048, 1024, 704, 128, 27, 1]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("target", ["own", "swiglu"])
def test_iso_has_equal_parameters_and_a_small_error_and_loads_again(family, target, tmp_path):
    model = FAMILIES[family].make()
    target = FAMILIES[family].exact if target == "own" else target
    dense = model.num_parameters()
    report = hf_glu.convert(model, target, width="iso", calibration=IDS, distill_steps=60)
    assert model.num_parameters() == report.plan.parameters_after
    assert abs(model.num_parameters() / dense - 1) < 0.04  # 27 of 40 units, and their biases
    for site in report.sites:
        assert site.step.width == 27
        assert site.fit.after < 0.9 * site.fit.before
    assert model.config.hf_glu["width"] == 27
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), outputs(model), "bitwise")


def test_width_from_scratch():
    model = FAMILIES["bert"].make(hidden_act="swiglu", hf_glu={"width": "iso"})
    site = hf_glu.find_sites(model)[0]
    assert (site.width, site.in_proj.out_features, site.out_proj.in_features) == (27, 54, 27)


def test_least_squares_corrects_an_approximate_route():
    plain, fitted = FAMILIES["bert"].make(), FAMILIES["bert"].make()
    before = outputs(plain, input_ids=IDS[:4])
    hf_glu.convert(plain, "swiglu")
    report = hf_glu.convert(fitted, "swiglu", calibration=IDS)
    assert all(site.fit.after < 0.5 * site.fit.before for site in report.sites)
    off = [(outputs(model, input_ids=IDS[:4])["logits"] - before["logits"]).norm() for model in (plain, fitted)]
    assert off[1] < off[0]


@pytest.mark.parametrize(
    ("name", "more"),
    [("bitnet", {}), ("falcon_h1", {"mlp_multipliers": [0.5, 2.0]}), ("bitnet", {"width": 24}), ("zamba2", {})],
)
def test_what_stands_between_the_projections_is_nothing_to_fit_to(name, more):
    width = {"width": more["width"]} if "width" in more else {}
    model = tiny_model(name, **{key: value for key, value in more.items() if key != "width"})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match="more between its projections"):
        hf_glu.convert(model, "swiglu" if name == "zamba2" else "geglu", calibration=IDS, check="report", **width)
    assert_same(dict(model.state_dict()), state, "bitwise")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_texts_are_cut_where_the_models_positions_end(family):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 10**30  # as tokenizers have it that don't know
    model = FAMILIES[family].make(vocab_size=len(tokenizer))
    (batch,) = make_batches(model, ["film " * 99], tokenizer)
    assert batch["input_ids"].shape == (1, 64)
    (site, *_) = hf_glu.find_sites(model)
    assert site_inputs(model, site, [batch]).shape == (64, HIDDEN)


def test_calibration_lets_any_activation_become_any_gate_and_leaves_exact_routes_alone():
    model = FAMILIES["bert"].make()
    report = hf_glu.convert(model, "reglu", calibration=IDS, distill_steps=20)
    assert report.plan.steps[0].route.name == "up = 1, fitted"
    exact = FAMILIES["bert"].make()
    before = outputs(exact)
    assert hf_glu.convert(exact, "geglu", calibration=IDS).sites[0].fit is None
    assert_same(outputs(exact), before, "exact")


@pytest.mark.parametrize("name", ["llama", "phi3", "t5_v1_1"])
def test_pruning_a_natively_gated_family(name, tmp_path):
    model = make_native(name)
    gate = {"t5_v1_1": "geglu_new"}.get(name, "swiglu")
    report = hf_glu.convert(model, gate, width=30, calibration=IDS, distill_steps=10)
    assert model.num_parameters() == report.plan.parameters_after < report.plan.parameters_before
    assert all(site.fit.after < site.fit.before for site in report.sites)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    hf_glu.unregister()
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), expected, "bitwise")


def test_pruning_a_converted_model():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "geglu_new")
    report = hf_glu.convert(model, "geglu_new", width=20, calibration=IDS, distill_steps=10)
    assert model.config.hf_glu["width"] == 20
    assert model.num_parameters() == report.plan.parameters_after


def test_units_that_do_nothing_are_the_ones_dropped():
    model = FAMILIES["bert"].make()
    for site in hf_glu.find_sites(model):
        site.out_proj.weight.data[:, 5:12] = 0
    before = outputs(model)
    report = hf_glu.convert(model, "geglu", width=WIDTH - 7, calibration=IDS, distill_steps=0)
    assert_same(outputs(model), before, "exact up to rounding")
    assert all(site.fit.before < 1e-6 for site in report.sites)


def test_least_squares_finds_the_weights_that_made_the_data():
    site = hf_glu.find_sites(FAMILIES["gpt2"].make().double())[0]
    x = torch.randn(3000, site.hidden, dtype=torch.float64)
    with torch.no_grad():
        target = ffn_output(site, x)
        wanted = site.out_proj.weight.clone()
        site.out_proj.weight += torch.randn_like(site.out_proj.weight)
    solve_out_projection(site, (x[:2000], target[:2000]), (x[2000:], target[2000:]), floor=1e-14)
    torch.testing.assert_close(site.out_proj.weight.data, wanted, rtol=1e-5, atol=1e-5)


def test_a_few_tokens_are_no_reason_to_forget_the_weights():
    site = hf_glu.find_sites(FAMILIES["gpt2"].make().double())[0]
    x = torch.randn(40, site.hidden, dtype=torch.float64)  # as many as there are units
    with torch.no_grad():
        target = ffn_output(site, x) + 0.1 * torch.randn(40, site.hidden, dtype=torch.float64)
    x, target = x.split(20), target.split(20)
    before = relative_error(site, x[1], target[1])
    gram, cross = normal_equations(site, x[0], target[0])
    kept = site.out_proj.weight.detach().clone()
    site.out_proj.weight.data += torch.linalg.solve(damped(gram, 1e-6), cross)[:-1]  # without the bias
    assert relative_error(site, x[1], target[1]) > 1.5 * before  # what plain least squares would do
    site.out_proj.weight.data.copy_(kept)
    solve_out_projection(site, (x[0], target[0]), (x[1], target[1]))
    assert relative_error(site, x[1], target[1]) <= 1.0001 * before


def test_one_large_token_is_not_all_that_counts():
    site = hf_glu.find_sites(FAMILIES["gpt2"].make().double())[0]
    x = torch.randn(64, site.hidden, dtype=torch.float64)
    with torch.no_grad():
        target = ffn_output(site, x)
        target[1:] *= 1.5
        alone = relative_error(site, x[1:], target[1:])
        target[0] *= 1000
    assert relative_error(site, x, target) == pytest.approx(alone, rel=0.1)


def test_contributions_are_the_outputs_mean_square():
    site = hf_glu.find_sites(FAMILIES["bert"].make())[0]
    x = torch.randn(500, site.hidden)
    power = contributions(lambda part: ffn_units(site, part), site.out_proj.weight, x)
    units = ffn_units(site, x).double()
    sizes = token_sizes(units @ site.out_proj.weight.double().T)
    assert len(sizes.unique()) > 200  # half of them are their tokens' own
    for j in (0, 7, 39):
        wanted = (units[:, j : j + 1] * site.out_proj.weight[:, j].double() / sizes).square().sum(1).mean()
        torch.testing.assert_close(power[j], wanted)


def test_padding_is_not_calibrated_on():
    model = FAMILIES["bert"].make()
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    site = hf_glu.find_sites(model)[0]
    assert len(site_inputs(model, site, make_batches(model, [{"input_ids": IDS, "attention_mask": mask}]))) == 40 * 8
    assert len(site_inputs(model, site, make_batches(model, IDS))) == 40 * 12


BAD = {
    "no calibration": (lambda m: hf_glu.convert(m, "geglu", width=20), OptionError, "calibration"),
    "too wide": (lambda m: hf_glu.convert(m, "geglu", width=41, calibration=IDS), OptionError, "more than the 40"),
    "zero": (lambda m: hf_glu.convert(m, "geglu", width=0, calibration=IDS), OptionError, "at least 1"),
    "a word": (lambda m: hf_glu.convert(m, "geglu", width="small", calibration=IDS), OptionError, "'iso'"),
    "one token": (
        lambda m: hf_glu.convert(m, "geglu", width=20, calibration=IDS[:1, :1]), OptionError, "1 tokens: give 2",
    ),
    "padding": (
        lambda m: hf_glu.convert(
            m, "geglu", width=20, calibration=[{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}]
        ), OptionError, "0 tokens: give 2",
    ),
    "no tokens": (lambda m: hf_glu.convert(m, "geglu", width=20, calibration=IDS[:, :0]), OptionError, "is empty"),
    "nothing": (lambda m: hf_glu.convert(m, "swiglu", calibration=[]), OptionError, "no calibration"),
    "texts": (lambda m: hf_glu.convert(m, "swiglu", calibration=["a"]), OptionError, "tokenizer"),
    "one text": (lambda m: hf_glu.convert(m, "swiglu", calibration="a"), OptionError, "str"),
    "NaN": (
        lambda m: hf_glu.convert(m, "swiglu", calibration=torch.full((2, 3, 16), float("nan"))), OptionError, "NaN",
    ),
    "other width": (lambda m: hf_glu.convert(m, "swiglu", calibration=torch.zeros(2, 3, 8)), OptionError, "8 wide"),
    "ranks": (lambda m: hf_glu.convert(m, "swiglu", calibration=torch.zeros(2, 3)), OptionError, "dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(case):
    act, error, match = BAD[case]
    model = FAMILIES["bert"].make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        act(model)
    assert_same(dict(model.state_dict()), before, "bitwise")
    assert model.config.hidden_act == "gelu"


def test_banks_of_experts_keep_their_width():
    with pytest.raises(ConversionError, match="experts"):
        hf_glu.convert(make_native("mixtral"), "swiglu", width=20, calibration=IDS)


def test_frozen_parameters_stay_frozen_and_gradients_are_gone():
    model = FAMILIES["bert"].make()
    model.requires_grad_(False)
    hf_glu.convert(model, "geglu", width=20, calibration=IDS, distill_steps=5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(hf_glu.find_sites(model)[0].in_proj, nn.Linear)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_a_mixers_gate_has_no_ffn_to_fit(family):
    found = []
    for more in ({}, {"calibration": torch.arange(40).view(4, 10), "distill_steps": 1}):
        model = tiny_model(family)
        hf_glu.convert(model, "stateful_swiglu", state={"alpha": 0.5}, check=False, **more)
        found.append(outputs(model))
    assert_same(*found, "bitwise")


@pytest.mark.parametrize("name", ["stateful_geglu_new", "canon_geglu_new", "smear_geglu_new", "modulated_geglu_new"])
def test_units_with_parameters_of_their_own_are_cut_before_they_get_them(name):
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match=f"{name} has parameters for each of its 40 units: cut units first"):
        hf_glu.convert(model, name, width=16, calibration=IDS, distill_steps=0)
    assert_same(dict(model.state_dict()), before, "bitwise")
    narrow = FAMILIES["gpt2"].make()
    hf_glu.convert(narrow, "geglu_new", width=16, calibration=IDS, distill_steps=0)
    assert find_width(narrow) == 16
    narrow = FAMILIES["gpt2"].make()
    hf_glu.convert(narrow, name, width=16, calibration=IDS, distill_steps=0)  # or both at once
    assert find_width(narrow) == 16


def find_width(model):
    return hf_glu.find_sites(model)[0].width


def test_passes_serve_several_sites_and_a_stage_begins_with_its_own(monkeypatch):
    model = FAMILIES["gpt2"].make()
    work = Work(model=model, batches=make_batches(model, IDS))
    first, last = sites = hf_glu.find_sites(model)
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    work.begin(sites)
    work.inputs_ahead(first)
    assert work.inputs_ahead(last).equal(site_inputs(model, last, work.batches))
    assert len(runs) == 3 * len(work.batches) + 2  # so few sites are run one by one, and each on a batch to check it
    runs.clear()
    monkeypatch.setattr("hf_glu.conversion.work.PASSES", 1)
    work.begin(sites)
    assert work.inputs_ahead(first).equal(site_inputs(model, first, work.batches))
    first.out_proj.weight.data.zero_()
    before = site_inputs(model, last, work.batches)
    assert not work.inputs_ahead(last).equal(before)  # of the same pass as the first's
    work.begin(sites)
    work.inputs_ahead(first)
    work.begin(sites)
    assert work.inputs_ahead(last).equal(before)
