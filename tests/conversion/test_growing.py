"""Experts of experts: exactly the same function at the start, copies by utility, what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, NATIVE, VOCAB, make_native
from whole import structure

import hf_glu
from hf_glu.conversion import Grow
from hf_glu.conversion.experts.growing.utility import deal, utilities
from hf_glu.errors import ConversionError, HfGluError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.sites import find_banks
from hf_glu.instruments.probe import run

IDS = torch.randint(3, VOCAB - 1, (4, 12), generator=torch.Generator().manual_seed(0))
_SMALL = NATIVE["llama"][1] | {"vocab_size": VOCAB, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_shared_experts": 1}
BANKS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 24, "num_key_value_heads": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "norm_topk_prob": True, "num_key_value_heads": 2, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_key_value_heads": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3", _ROUTED | _LATENT | {"n_group": 1, "topk_group": 1}),
}
OURS = {
    "bert": ("gelu", "geglu"),
    "gpt2": ("gelu_new", "geglu_new"),
    "t5": ("relu", "reglu"),
    "llama": (None, "swiglu"),
}


def make(name, seed=0, **more):
    """Return a pico model with experts, its family's own or ours, in which every weight is moved."""
    if name in BANKS:
        prefix, arguments = BANKS[name]
        config = getattr(transformers, f"{prefix}Config")(**{**_SMALL, **arguments, **more})
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    else:
        dense, gated = OURS[name]
        model = FAMILIES[name].make(seed=seed) if name in FAMILIES else make_native(name)
        hf_glu.convert(model, gated, experts=f"{gated}*4" if dense is None else f"{dense}*2,{gated}*2", **more)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("how", "name"), covering([{}, {"active": "all"}, {"times": 3, "calibration": IDS}], [*BANKS, *OURS])
)
def test_the_function_is_the_same_and_comes_back(name, how, tmp_path):
    model = make(name)
    before, config = outputs(model), model.config.to_dict()
    report = hf_glu.grow_experts(model, **how).to_dict()
    assert report["promise"] == ("exact up to rounding" if "active" in how else "exact")
    assert_same(outputs(model), before, "exact up to rounding")
    assert report["parameters_after"] == size(model)
    times, ratio = how.get("times", 2), report["flops_per_token_after"] / report["flops_per_token_before"]
    assert ratio == pytest.approx(times, rel=0.01) if "active" in how else 1 < ratio < 1.2
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")
    for now, then in ((4 * times, 4),):
        counts = {value for key, value in model.config.to_dict().items() if key in FIELDS and config.get(key) == then}
        assert not counts or counts == {now if name in OURS or "active" in how else then}


FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


@pytest.mark.parametrize("name", BANKS)
def test_with_all_active_stock_transformers_loads_it(name, tmp_path):
    model = make(name)
    before = outputs(model)
    hf_glu.grow_experts(model, 3, active="all")
    assert getattr(model.config, "hf_glu", None) is None
    assert model.config.num_experts_per_tok == 6
    model.save_pretrained(tmp_path)
    hf_glu.unregister()
    try:
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        after = run(again.eval(), {"input_ids": IDS})
    finally:
        hf_glu.register()
    assert not any(info.values()), info
    assert_same(after, outputs(model, input_ids=IDS), "bitwise")
    assert_same(outputs(model), before, "exact up to rounding")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "bert"])
def test_half_precision(name):
    for active, promise in (("one", "exact"), ("all", "exact up to rounding" if name in OURS else "approximate")):
        model = make(name).bfloat16()
        before = outputs(model)["logits"].float()
        report = hf_glu.grow_experts(model, active=active)
        assert report.plan.promise == promise
        errors = (outputs(model)["logits"].float() - before).abs().amax(-1) / before.abs().max()
        assert float(errors.median()) < 0.02, "only tokens whose experts tie may differ"
        assert active == "all" or float(errors.max()) < 0.02


@pytest.mark.parametrize("how", [{}, {"router": "sigmoid"}, {"weights": "ones"}, {"bias_rate": 0.01}])
def test_the_first_router_chooses_as_ever(how):
    options = hf_glu.conversion.converting.ExpertOptions(groups="geglu*4", **how)
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", experts=options, check=False)
    old, x = copy.deepcopy(next(iter(find_experts(model).values()))).router, torch.randn(50, 16)
    hf_glu.grow_experts(model)
    new = next(iter(find_experts(model).values())).router
    before, after = old(x), new(x)
    assert torch.equal(new.copies.owner[after.experts], before.experts)
    assert torch.equal(after.weights, before.weights)
    assert_same(after.logits.view(50, 4, 2).logsumexp(-1), before.logits, "exact")
    assert len(after.experts.unique()) == 8, "some copies are never chosen"
    shares = (x @ new.copies.weight.T).view(50, 4, 2)
    best = shares.argmax(-1).gather(1, before.experts) + 2 * before.experts
    assert torch.equal(after.experts, best)
    if how.get("bias_rate"):
        assert new.loads(after).tolist() == old.loads(before).tolist()


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_the_second_router_learns_and_copies_become_different(name):
    model = make(name).train()
    hf_glu.grow_experts(model)
    routers = {key: value for key, value in model.named_parameters() if key.endswith("copies.weight")}
    assert len(routers) == 2
    start = {key: value.detach().clone() for key, value in routers.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(value, start[key]) for key, value in routers.items())
    banks = [bank.anchor.down_proj for bank in find_banks(model)]
    banks += [bank.out_proj for experts in find_experts(model).values() for bank in experts.banks]
    assert all(not torch.equal(bank[0], bank[1]) for bank in banks)


def test_copies_that_are_all_active_stay_alike_but_for_drop():
    for drop in (0.0, 0.5):
        model = make("mixtral").train()
        report = hf_glu.grow_experts(model, active="all", drop=drop)
        down = find_banks(model)[0].anchor.down_proj
        assert torch.equal(down[0], make("mixtral").model.layers[0].mlp.experts.down_proj[0])
        assert torch.equal(down[0], down[1]) == (not drop)
        assert report.plan.promise == ("approximate" if drop else "exact up to rounding")
        note = report.to_dict()["sites"][0]["note"]
        assert ("50% of the units" if drop else "stay alike in training") in note
        assert "2 times their FLOPs" in note


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2", "llama"])
def test_drop_draws_units_of_all_copies_but_the_first(name):
    plain, dropped = make(name), make(name)
    hf_glu.grow_experts(plain)
    hf_glu.grow_experts(dropped, drop=0.25)
    theirs = dict(plain.named_parameters())
    for key, value in dropped.named_parameters():
        if key.endswith(("down_proj", "out_proj")) and value.ndim == 3:
            same = (value == theirs[key]).flatten(1)
            assert same[::2].all()
            assert same[1::2].float().mean(1).tolist() == pytest.approx([0.75] * (len(value) // 2), abs=0.1)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_utility_is_the_squared_effect_of_each_tokens_experts(name):
    model = make(name).double()
    model.set_experts_implementation("eager")  # the grouped GEMM knows no float64
    sites = Grow().choose(model, None, None)
    ids = IDS[:1, :6]
    found = utilities(model, sites[1:], [{"input_ids": ids}])[sites[1].name]
    layer, seen = sites[1].anchor, []

    def loss(token, rank, change):
        def scaled(weights):
            return weights * (1 + change * torch.nn.functional.one_hot(torch.tensor(2 * token + rank), 12).view(6, 2))

        def after(module, args, routing):
            seen.append(routing.experts)
            return dataclasses.replace(routing, weights=scaled(routing.weights))

        def before(module, args):
            seen.append(args[1])
            return args[0], args[1], scaled(args[2])

        ours = hasattr(layer, "router")
        hook = layer.router.register_forward_hook(after) if ours else layer.register_forward_pre_hook(before)
        with torch.no_grad():
            value = float(model(input_ids=ids, labels=ids).loss) * ids.numel()
        hook.remove()
        return value

    wanted = torch.zeros(4, dtype=torch.float64)
    for token in range(6):
        for rank in range(2):
            slope = (loss(token, rank, 0.05) - loss(token, rank, -0.05)) / 0.1  # of a loss in float32
            wanted[seen[-1][token, rank]] += slope**2
    assert torch.allclose(found, wanted, rtol=5e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_copies_are_dealt_to_those_that_matter():
    assert deal(torch.tensor([8.0, 1.0, 0.0, 3.0]), 2).tolist() == [4, 1, 1, 2]
    assert deal(torch.zeros(3), 2).sum() == 6
    model = make("mixtral")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    useful = utilities(model, Grow().choose(model, None, None), [{"input_ids": IDS}])
    hf_glu.grow_experts(model, 3, calibration=IDS)
    for site in find_banks(model):
        assert torch.equal(site.anchor.copies.owner.bincount(), deal(useful[site.name], 3))
        assert not any(parameter.requires_grad for parameter in site.anchor.parameters())


def test_groups_of_different_activations_keep_their_copies():
    model = make("bert")
    hf_glu.grow_experts(model, 3, calibration=IDS)
    for experts in find_experts(model).values():
        owner = experts.router.copies.owner
        assert owner[:6].tolist() == sorted(owner[:6].tolist())
        assert set(owner[:6].tolist()) == {0, 1}
        assert set(owner[6:].tolist()) == {2, 3}
    assert model.config.hf_glu["experts"] == {"groups": "gelu*6,geglu*6", "copies": 3}


def test_banks_with_activations_of_their_own_grow():
    for active in ("one", "all"):
        model = make("mixtral")
        hf_glu.convert(model, experts="silu*2,relu*2", check=False)
        before = outputs(model)
        hf_glu.grow_experts(model, active=active)
        assert model.config.hf_glu["experts"]["groups"] == "silu*4,relu*4"
        assert_same(outputs(model), before, "exact up to rounding")


def test_wrapped_experts_shared_ones_and_split_ones_grow():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "modulated_stateful_learnable_geglu_new", experts=3)
    split = make_native("llama")
    hf_glu.split_experts(split, "2+8", top_k=8, calibration=torch.cat([IDS] * 4))
    for grown in (model, split):
        for active in ("one", "all"):
            copied = copy.deepcopy(grown)
            before = outputs(copied)
            hf_glu.grow_experts(copied, active=active)
            assert_same(outputs(copied), before, "exact up to rounding")


def test_copies_that_remember_other_tokens_are_no_exact_ones():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "stateful_geglu_new", experts=3, check=False)
    assert hf_glu.plan(model, Grow(times=2)).promise == "exact"  # they remember nothing yet
    for name, parameter in model.named_parameters():
        parameter.data += 0.5 if name.endswith("alpha") else 0.0
    assert hf_glu.plan(model, Grow(times=2)).promise == "approximate"
    assert hf_glu.plan(model, Grow(times=2, active="all")).promise != "approximate"


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "llama"])
def test_copies_hear_the_router_as_their_experts_did(name, tmp_path):
    native = name in BANKS
    model = make(name) if native else FAMILIES[name].make() if name in FAMILIES else make_native(name)
    kind = {"gpt2": "kappa_geglu_new", "llama": "stateful_kappa_swiglu"}.get(name, "kappa_swiglu")
    hf_glu.convert(model, kind, check=False, **({} if native else {"experts": 2}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("response"):
                parameter.normal_()
    before = run(model, {"input_ids": IDS})
    with pytest.raises(ConversionError, match="kappa_ gates hear: active='one'"):
        hf_glu.grow_experts(model, active="all")
    hf_glu.grow_experts(model, 3)
    after = run(model, {"input_ids": IDS})
    assert_same(after, before, "exact up to rounding")
    model.save_pretrained(tmp_path)
    assert_same(run(type(model).from_pretrained(tmp_path).eval(), {"input_ids": IDS}), after, "bitwise")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_asked_for_router_logits():
    for name, layer in (("mixtral", "model.layers.0.mlp"), ("gpt2", "transformer.h.0.mlp")):
        model = make(name)
        hf_glu.grow_experts(model)
        part, x = model.get_submodule(layer), torch.randn(2, 1, 30, 16)
        with torch.no_grad():
            traced = torch.jit.trace(part, (x[0],), check_trace=False)
            assert_same(traced(x[1]), part(x[1]), "exact up to rounding")
    model.config.output_router_logits = True
    found = model(input_ids=IDS, labels=IDS)
    assert found.router_logits[0].shape == (48, 8)
    assert found.aux_loss.isfinite()


def tied_devices():
    model = make("gpt2")
    model.lm_head = torch.nn.Linear(16, VOCAB, device="meta")
    return model


def grown():
    model = make("mixtral")
    hf_glu.grow_experts(model)
    return model


def grown_ours():
    model = make("gpt2")
    hf_glu.grow_experts(model)
    return model


BAD = {
    "times": (lambda: make("mixtral"), {"times": 1}, "times must be a number of copies, 2 to .*, got 1"),
    "no number": (lambda: make("mixtral"), {"times": 2.5}, "got 2.5"),
    "too many": (lambda: make("gpt2"), {"times": 10**5}, "which no model has|2 to"),
    "active": (lambda: make("mixtral"), {"active": "two"}, "active must be one of one, all, got 'two'"),
    "drop": (lambda: make("mixtral"), {"drop": 1}, "drop must be a share"),
    "dense": (lambda: FAMILIES["bert"].make(), {}, "has no experts to grow: hf_glu.convert"),
    "calibrated": (lambda: make("mixtral"), {"active": "all", "calibration": IDS}, "leave calibration out"),
    "devices": (tied_devices, {}, "the weights are spread over cpu, meta: load the model on one device"),
    "twice": (grown, {}, "have copies already: grow them at once, by times="),
    "twice, ours": (grown_ours, {"active": "all"}, "have copies already"),
    "groups": (
        lambda: make("deepseek_v3", n_group=2, topk_group=1), {"active": "all"}, "chooses 1 of 2 groups first",
    ),
    "sigmoid": (
        lambda: make("deepseek_v3", norm_topk_prob=False), {"active": "all"}, "weighs copies in a way of its own",
    ),
    "no loss": (
        lambda: hf_glu.convert(model := FAMILIES["bert"].make("BertModel"), "geglu", experts=2) and model,
        {"calibration": IDS}, "told by a language model's loss, which BertModel has none of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case):
    made, options, says = BAD[case]
    model = made()
    before = structure(model)
    with pytest.raises(HfGluError, match=says) as raised:
        hf_glu.grow_experts(model, **options)
    assert "\n" not in str(raised.value)
    assert structure(model) == before


def test_a_grown_model_is_converted_no_further():
    with pytest.raises(ConversionError):
        hf_glu.convert(grown(), experts="silu*8")
