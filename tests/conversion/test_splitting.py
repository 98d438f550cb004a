"""FFNs divided among experts: exact with all of them on, a falling error with fewer, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES, NATIVE, VOCAB, make_native
from taskdata import make_tokenizer

import hf_glu
from hf_glu.conversion.experts.splitting import carving
from hf_glu.conversion.experts.splitting.carving import balanced_clusters
from hf_glu.conversion.experts.splitting.dividing import SIMILARITIES
from hf_glu.errors import ConversionError, OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.forward import ffn_output
from hf_glu.ffn.linear import weight_rows

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


MORE_GATED = {
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8}, "Gemma2ForCausalLM"),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2}, "MistralForCausalLM"),
}


def make_gated(name, width=64, **more):
    """Return a pico model of a gated family with ``width`` units."""
    if name not in MORE_GATED:
        return make_native(name, **{"d_ff" if name == "t5_v1_1" else "intermediate_size": width}, **more)
    config, arguments, head = MORE_GATED[name]
    torch.manual_seed(0)
    sizes = NATIVE["llama"][1] | arguments | {"vocab_size": VOCAB, "intermediate_size": width}
    return getattr(transformers, head)(getattr(transformers, config)(**sizes)).eval()


def make_dense(name):
    return FAMILIES[name].make(**{{"gpt2": "n_inner", "opt": "ffn_dim"}.get(name, "intermediate_size"): 64})


@pytest.mark.parametrize("name", [*MORE_GATED, "llama", "phi3", "t5_v1_1", "modernbert", "bert", "gpt2", "opt"])
def test_always_on_experts_are_exact_with_all_on_and_come_back(name, tmp_path):
    model = make_dense(name) if name in FAMILIES else make_gated(name)
    before = outputs(model)
    report = hf_glu.split_experts(model, "2+14", top_k=14, calibration=TOKENS)
    assert_same(outputs(model), before, "exact up to rounding")
    assert all(len(curve) == 14 and curve[-1] < 1e-5 for curve in report.curves.values())
    entry = model.config.hf_glu["experts"]
    assert entry["shared"].endswith(":4*2")
    assert entry["groups"].endswith(":4*14")
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("more", [{}, *[{"similarity": name} for name in SIMILARITIES], {"router": "units"}])
@pytest.mark.parametrize("name", ["llama", "phi3", "bert"])
def test_every_way_divides_all_units_and_says_its_error(name, more):
    model = make_dense(name) if name in FAMILIES else make_gated(name)
    site = next(iter(hf_glu.find_sites(model)))
    out, x = weight_rows(site.out_proj).clone(), torch.randn(500, 16)
    wanted = ffn_output(site, x)
    report = hf_glu.split_experts(model, "2+6", top_k=3, calibration=TOKENS, refit=False, **more)
    experts = next(iter(find_experts(model).values()))
    columns = torch.cat([bank.out_proj for bank in (*experts.shared, *experts.banks)]).transpose(1, 2).reshape(64, 16)
    assert sorted(map(tuple, columns.tolist())) == sorted(map(tuple, out.T.tolist()))
    curve = next(iter(report.curves.values()))
    assert 0 < curve[5] + 1e-6 < curve[2] < curve[0] < 1
    with torch.no_grad():
        error = float((experts(x) - wanted).norm() / wanted.norm())
    assert 0 < error < 1.5


def test_the_refitted_out_projection_is_the_nearest():
    model, plain = (make_gated("llama") for _ in range(2))
    ids = torch.randint(3, VOCAB, (200, 12), generator=torch.Generator().manual_seed(1))
    for each in (model, plain):
        for site in hf_glu.find_sites(each):
            site.in_proj.weight.data *= 20
    fitted = hf_glu.split_experts(model, "1+7", top_k=2, calibration=ids).curves
    kept = hf_glu.split_experts(plain, "1+7", top_k=2, calibration=ids, refit=False).curves
    name = next(iter(kept))
    assert fitted[name][1] < kept[name][1]
    assert kept[name][-1] < 1e-5 < fitted[name][-1]


def test_refit_solves_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(300, 8, generator=generator, dtype=torch.float64).float()
    out = torch.randn(5, 8, generator=generator)
    on = torch.rand(300, 8, generator=generator) < 0.6
    fit = carving.Refit(out)
    fit.add(units[:100], on[:100])
    fit.add(units[100:], on[100:])
    scaled = (units / (units @ out.T).norm(dim=1, keepdim=True)).double()
    u, r = scaled * on, (scaled * ~on) @ out.T.double()
    power = u.square().sum(0)
    ridge = carving.STRENGTH * (power + carving.FLOOR * power.mean())
    wanted = (
        out.double() + torch.linalg.lstsq(torch.cat([u, ridge.sqrt().diag()]), torch.cat([r, r.new_zeros(8, 5)]))[0].T
    )
    assert_same(fit.rows().double(), wanted, "exact up to rounding")
    nothing_off = carving.Refit(out)
    nothing_off.add(units, torch.ones_like(on))
    assert_same(nothing_off.rows(), out, "bitwise")


def test_always_on_are_those_that_fire_most_and_strongest():
    strength = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    strength[:, [3, 8]] += 2
    strength[:, 5] = 0
    strength[7, 5] = 25  # strong, but once
    assert set(carving.ranked(strength, torch.ones(200, 1))[:2].tolist()) == {3, 8}
    always, groups = carving.grouped(carving.relative(strength), carving.ranked(strength, torch.ones(200, 1)), 2, 5)
    assert set(always.tolist()) == {3, 8}
    assert sorted(int(unit) for part in (always, *groups) for unit in part) == list(range(12))
    assert [len(group) for group in groups] == [2] * 5
    strength[7] *= 1000  # one token of a huge output, which only unit 5 makes
    assert int(carving.ranked(strength, torch.ones(200, 1).index_fill_(0, torch.tensor([7]), 1000.0))[0]) == 5


def test_a_language_model_is_measured_on_texts_that_it_is_not_fitted_on():
    texts = [f"some words of text number {number} that nobody reads" for number in range(40)]
    tokenizer = make_tokenizer()
    model = make_gated("llama")
    report = hf_glu.split_experts(model, "2+14", top_k=4, calibration=texts, tokenizer=tokenizer)
    held = [tokenizer(text, return_tensors="pt") for text in texts[-4:]]
    loss, count = 0.0, 0
    for batch in held:
        with torch.no_grad():
            logits = model(**batch).logits.double()[0, :-1].log_softmax(-1)
        loss -= float(logits.gather(1, batch["input_ids"][0, 1:, None]).sum())
        count += len(logits)
    assert report.perplexity["tokens"] == count
    assert report.perplexity["after"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert report.perplexity["before"] != report.perplexity["after"]
    dense = make_dense("bert")
    assert hf_glu.split_experts(dense, "2+14", top_k=4, calibration=texts, tokenizer=tokenizer).perplexity is None


@pytest.mark.parametrize(
    ("experts", "more", "says"),
    [
        ("2+15", {"top_k": 2}, r"2 \+ 15 experts don't divide the 64 units of"),
        ("2+14", {"top_k": 15}, "top_k must be 1 to 14"),
        ("2+14", {"top_k": 0}, "top_k must be 1 to 14"),
        ("2+", {"top_k": 1}, r"can't be read: write 2\+14"),
        ("2-14", {"top_k": 1}, r"can't be read: write 2\+14"),
        ("16+0", {"top_k": 1}, "no routed expert"),
        (True, {"top_k": 1}, "can't be read"),
        ("2+14", {"top_k": 2, "router": "unit"}, "router must be one of fitted, units, got 'unit'"),
        ("2+14", {"top_k": 2, "calibration": TOKENS[:1]}, "have 12 tokens, and .* needs 16 at least"),
    ],
)
def test_bad_input_of_always_on_experts(experts, more, says):
    model = make_gated("llama")
    config, state = model.config.to_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OptionError, match=says) as raised:
        hf_glu.split_experts(model, experts, **{"calibration": TOKENS, **more})
    assert "\n" not in str(raised.value)
    assert model.config.to_dict() == config
    assert_same(dict(model.state_dict()), state, "bitwise")


TEXT = torch.randint(2, VOCAB, (8, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["stateful_", "canon_", "smear_", "modulated_", "learnable_", "moa_"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_whole_ffns_activation_has_learned_is_not_dropped(family, kind):
    model = FAMILIES[family].make() if family in FAMILIES else make_native(family)
    hf_glu.convert(model, kind + ("geglu_new" if family == "gpt2" else "swiglu"))
    before = model.state_dict().keys()
    with pytest.raises(
        ConversionError, match=f"{kind}.* experts would lose what it has learned: split the model first"
    ):
        hf_glu.split_experts(model, 4, top_k=4, calibration=TEXT)
    assert model.state_dict().keys() == before


def test_parameters_of_an_elementwise_activation_come_along():
    model = FAMILIES["bert"].make(hidden_act="prelu")
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn.weight.data.fill_(0.7)
    before = outputs(model)
    hf_glu.split_experts(model, "1+4", top_k=4, calibration=TEXT)
    assert_same(outputs(model), before, "exact up to rounding")
