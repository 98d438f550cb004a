"""Experts with activations of their own: the layer against a plain reference, upcycling, losses, statistics."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import versions
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, NATIVE, make_native
from taskdata import save_base, write_dataset
from torch import nn
from torch.nn import functional

import hf_glu
from hf_glu import cli
from hf_glu.bench.coverage.tiny import tiny_inputs, tiny_model
from hf_glu.bench.memory import saved_bytes
from hf_glu.compat.of_torch import GROUPED_MM
from hf_glu.config.experts import ExpertOptions, Group, read_groups, write_groups
from hf_glu.errors import ConversionError, NoSiteError, OptionError, TrainingError, UnknownNameError
from hf_glu.ffn.experts import ExpertFFN, find_experts
from hf_glu.ffn.experts.group import banks_of
from hf_glu.ffn.experts.router import Router
from hf_glu.training.job import run_job
from hf_glu.training.options import JobOptions, TrainingOptions

GROUPS = "relu*2,gelu:24*1,swiglu*3"


def make_ffn(groups=GROUPS, *, hidden=16, width=32, bias=True, dtype=torch.float32, **more):
    torch.manual_seed(0)
    ffn = ExpertFFN(hidden, width, ExpertOptions(groups=groups, **more), bias=bias).to(dtype)
    for parameter in ffn.parameters():
        parameter.data.normal_(std=0.3)
    return ffn.eval()


def reference(ffn, x):
    """One token and one expert after the other."""
    experts = [(bank, number) for bank in banks_of(ffn.banks) for number in range(bank.count)]
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        scores = (ffn.router.weight.float() @ token.float()).softmax(-1)
        if ffn.options.router == "sigmoid":
            scores = (ffn.router.weight.float() @ token.float()).sigmoid()
        best = scores.argsort(descending=True, stable=True)[: ffn.options.top_k]
        total = torch.zeros_like(token)
        for index in best:
            bank, number = experts[index]
            in_bias = None if bank.in_bias is None else bank.in_bias[number]
            out_bias = None if bank.out_bias is None else bank.out_bias[number]
            hidden = bank.act(functional.linear(token[None], bank.in_proj[number], in_bias))
            out = functional.linear(hidden, bank.out_proj[number], out_bias)[0]
            total = total + (scores[index] / scores[best].sum()).to(token.dtype) * out
        for bank in banks_of(ffn.shared):
            for number in range(bank.count):
                in_bias = None if bank.in_bias is None else bank.in_bias[number]
                out_bias = None if bank.out_bias is None else bank.out_bias[number]
                hidden = bank.act(functional.linear(token[None], bank.in_proj[number], in_bias))
                total = total + functional.linear(hidden, bank.out_proj[number], out_bias)[0]
        rows.append(total)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "more", [{}, {"top_k": 1}, {"top_k": 6}, {"router": "sigmoid"}, {"shared": "swiglu:8*2"}, {"backend": "loop"}]
)
def test_against_one_token_at_a_time(bias, more):
    ffn = make_ffn(bias=bias, **more)
    x = torch.randn(3, 7, 16)
    assert_same(ffn(x).detach(), reference(ffn, x).detach(), "exact up to rounding")


def test_the_reference_can_fail():
    ffn = make_ffn()
    x = torch.randn(2, 5, 16)
    other = copy.deepcopy(ffn)
    other.banks[1].in_proj.data[0, 0] += 0.5
    with pytest.raises(AssertionError):
        assert_same(other(x).detach(), reference(ffn, x).detach(), "exact up to rounding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_are_the_same_with_gradients(dtype):
    versions.needs(GROUPED_MM)
    x = torch.randn(40, 16, dtype=dtype)
    found = []
    for backend in ("grouped", "loop"):
        ffn = make_ffn(dtype=dtype, backend=backend)
        inputs = x.clone().requires_grad_()
        out = ffn(inputs)
        out.float().square().sum().backward()
        found.append({"out": out.detach(), "x": inputs.grad, **{n: p.grad for n, p in ffn.named_parameters()}})
    if dtype == torch.bfloat16:  # the biases are added to rounded sums in one and not in the other
        for first, second in zip(found[0].values(), found[1].values(), strict=True):
            assert (first - second).float().norm() <= 2e-2 * second.float().norm()
    else:
        assert_same(found[0], found[1], "trained")


@pytest.mark.parametrize("groups", [GROUPS, "swiglu*6"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_few_tokens_are_computed_as_many_are(groups, tokens, monkeypatch):
    ffn, calls, plain = make_ffn(groups).eval(), [], ExpertFFN._few
    monkeypatch.setattr(ExpertFFN, "_few", lambda *args: calls.append(1) or plain(*args))
    x = torch.randn(1, tokens, 16)
    with torch.no_grad():
        few = ffn(x)
        assert bool(calls) == (tokens == 1 or "," in groups)
        calls.clear()
        monkeypatch.setattr(ExpertFFN, "_is_few", lambda *args: False)
        torch.testing.assert_close(few, ffn(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(few, reference(ffn, x[0])[None], rtol=1e-5, atol=1e-5)
    assert not calls


def test_a_bank_that_somebody_watches_is_called():
    ffn, calls = make_ffn().eval(), []
    ffn.banks[0].register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        for token in torch.randn(20, 1, 1, 16):
            ffn(token)
    assert calls


def test_gradients_in_double_precision():
    ffn = make_ffn("relu,silu*2,swiglu*2", hidden=3, width=4, dtype=torch.float64, top_k=2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ffn, (x,), nondet_tol=1e-12)


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_traced_experts_give_what_half_precision_cannot_hold():
    ffn = make_ffn(dtype=torch.float16)
    for bank in banks_of(ffn):  # as T5 keeps its out-projections
        bank.out_proj.data = 1e6 * bank.out_proj.data.float()
    x = torch.randn(1, 5, 16).half()
    with torch.no_grad():
        expected, traced = ffn(x), torch.jit.trace(ffn, (x,), check_trace=False)(x)
    assert traced.dtype == expected.dtype == torch.float32
    assert expected.abs().max() > torch.finfo(torch.float16).max
    assert (traced - expected).abs().max() < 1e-2 * expected.abs().max()  # what float16 rounds before


def test_an_empty_batch_and_experts_without_a_token():
    ffn = make_ffn(top_k=1).train()
    assert ffn(torch.zeros(0, 16)).shape == (0, 16)
    out = ffn(torch.randn(1, 16))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in ffn.parameters())  # DDP waits for every one


def test_ties_go_to_the_first_experts_and_nan_is_an_error():
    ffn = make_ffn()
    nn.init.zeros_(ffn.router.weight)
    routing = ffn.router(torch.randn(9, 16))
    assert_same(routing.experts, torch.tensor([[0, 1]]).expand(9, 2), "bitwise")
    ffn.router.label = "layer.3"
    with pytest.raises(TrainingError, match=r"layer\.3 gave NaN"):
        ffn(torch.full((2, 16), torch.nan))


def test_jitter_in_training_only():
    ffn = make_ffn(jitter=0.5)
    x = torch.randn(6, 16)
    assert_same(ffn.router(x).logits, ffn.router(x).logits, "bitwise")
    ffn.train()
    assert not torch.equal(ffn.router(x).logits, ffn.router(x).logits)


def test_groups():
    assert read_groups("relu*2, gelu:1024*2,swiglu") == (
        Group(name="relu", count=2), Group(name="gelu", count=2, width=1024), Group(name="swiglu", count=1)
    )  # fmt: skip
    assert read_groups("8", default="geglu") == (Group(name="geglu", count=8),)
    assert read_groups(write_groups(read_groups(GROUPS))) == read_groups(GROUPS)
    for bad in ("", "relu*", "relu2*0", "relu**2", "*2", "relu:0*2", "8"):
        with pytest.raises(OptionError):
            read_groups(bad)


FAMILY_SPECS = ["{dense}*2,{exact}*2,learnable_swiglu*2,learnable_relu", "8"]


@pytest.mark.parametrize(("family", "spec"), covering(FAMILIES, FAMILY_SPECS))
def test_upcycling_is_exact_for_any_router(family, spec, tmp_path):
    made = FAMILIES[family]
    model = made.make()
    before = outputs(model)
    report = hf_glu.convert(model, made.exact, experts=spec.format(dense=made.dense, exact=made.exact), top_k=3)
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact")
    for ffn in find_experts(model).values():
        nn.init.normal_(ffn.router.weight)
    assert_same(outputs(model), before, "exact")
    assert getattr(model.config, made.field) == made.exact
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")
    with pytest.raises(ConversionError, match="has experts"):
        hf_glu.convert(again, made.exact, experts="4")


@pytest.mark.parametrize("name", [name for name in NATIVE if name != "mixtral"])
def test_native_families_upcycle(name, tmp_path):
    model = make_native(name)
    before = outputs(model)
    gate = hf_glu.find_sites(model)[0]
    hf_glu.convert(model, "swiglu", experts="learnable_swiglu*4", top_k=2)
    assert gate.name in find_experts(model)
    assert_same(outputs(model), before, "exact up to rounding")
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


@pytest.mark.parametrize("width", ["keep", 24])
def test_gated_ffns_upcycle(width, tmp_path):
    model = FAMILIES["t5"].make()
    tokens = torch.arange(3, 51).reshape(4, 12)
    hf_glu.convert(model, "reglu", width=width, distill_steps=1, calibration=None if width == "keep" else tokens)
    before = outputs(model)
    report = hf_glu.convert(model, "reglu", experts="reglu*2,learnable_swiglu*2")
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact")
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


def test_stock_transformers_refuses_experts(tmp_path):
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "geglu_new", experts="gelu_new*4")
    model.save_pretrained(tmp_path)
    hf_glu.unregister()
    try:
        with pytest.raises(KeyError, match="geglu_new"):
            type(model).from_pretrained(tmp_path)
    finally:
        hf_glu.register()


def test_some_layers_and_from_config(tmp_path):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", experts="gelu*4", layers=[1])
    assert [name.split(".")[3] for name in find_experts(model)] == ["1"]
    assert model.config.hf_glu["layers"] == [1]
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")
    scratch = FAMILIES["t5"].make(feed_forward_proj="swiglu", hf_glu={"experts": {"groups": GROUPS, "top_k": 1}})
    assert len(find_experts(scratch)) == 4
    out = scratch(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long))
    out.loss.backward()
    assert all(p.grad is not None for ffn in find_experts(scratch).values() for p in ffn.banks.parameters())


def test_narrower_and_dropped_experts_say_that_they_are_not_exact():
    model = FAMILIES["gpt2"].make()
    report = hf_glu.convert(model, "geglu_new", experts="gelu_new:24*2,gelu_new*2")
    assert report.plan.promise == "approximate"
    assert "largest weights" in report.plan.steps[0].route.note
    model = FAMILIES["gpt2"].make()
    report = hf_glu.convert(model, "geglu_new", experts=4, drop=0.5)
    assert report.plan.promise == "approximate"
    bank = next(iter(find_experts(model).values())).banks[0]
    assert 0.3 < (bank.in_proj[0] != bank.in_proj[1]).double().mean() < 0.9


def batch(model):
    ids = torch.arange(24).reshape(4, 6) % 50 + 3
    return {"input_ids": ids, "labels": ids}


def explicit_gradients(model, inputs, scale=1.0):
    """Return the gradients of the loss with the routers' losses written out."""
    found = []
    handles = [
        ffn.router.register_forward_hook(lambda router, args, routing: found.append(router.loss(routing)))
        for ffn in find_experts(model).values()
    ]
    for ffn in find_experts(model).values():
        ffn.scale.default = 0.0
    output = model(**{key: value for key, value in inputs.items() if key != "labels"})
    logits = output.logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()) + sum(found)
    model.zero_grad()
    (loss * scale).backward()
    for handle in handles:
        handle.remove()
    for ffn in find_experts(model).values():
        ffn.scale.default = 1.0
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, float(loss.detach())


@pytest.fixture
def gpt2():
    model = FAMILIES["gpt2"].make(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False)
    hf_glu.convert(model, "geglu_new", experts="gelu_new*2,learnable_swiglu*2", check=False)
    for ffn in find_experts(model).values():
        nn.init.normal_(ffn.router.weight)
        ffn.options = ffn.router.options = ExpertOptions(groups=ffn.options.groups, balance=0.5, z=0.1)
    return model.train()


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_routers_losses_are_in_the_models_loss(gpt2, checkpointing):
    inputs = batch(gpt2)
    expected, value = explicit_gradients(gpt2, inputs, 8.0)
    if checkpointing is not None:
        gpt2.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    gpt2.zero_grad()
    loss = gpt2(**inputs).loss
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    (loss * 8.0).backward()  # as a loss scaler or accumulation does
    assert_same({name: p.grad for name, p in gpt2.named_parameters()}, expected, "trained")


def test_without_a_loss_they_are_injected(gpt2):
    inputs = batch(gpt2)
    expected, _ = explicit_gradients(gpt2, inputs)
    gpt2.zero_grad()
    logits = gpt2(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()).backward()
    assert_same({name: p.grad for name, p in gpt2.named_parameters()}, expected, "trained")


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_loss_free_balancing(checkpointing, tmp_path):
    model = FAMILIES["gpt2"].make(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False)
    options = ExpertOptions(groups="gelu_new*4", balance=0, z=0, bias_rate=0.05)
    hf_glu.convert(model, "geglu_new", experts=options, check=False)
    for ffn in find_experts(model).values():  # all tokens to the first two
        nn.init.zeros_(ffn.router.weight)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    inputs, first = batch(model), next(iter(find_experts(model).values()))
    model.train()(**inputs).loss.backward()
    assert_same(first.router.load, torch.tensor([24, 24, 0, 0]), "bitwise")  # once, though computed twice
    assert not first.router.steps.any()
    model(**inputs).loss.backward()  # a second micro-batch: gradients wait for a step
    assert not first.router.steps.any()
    assert_same(first.router.load, torch.tensor([48, 48, 0, 0]), "bitwise")
    model.zero_grad()
    model(**inputs).loss.backward()
    assert_same(first.router.steps, torch.tensor([-1, -1, 1, 1]), "bitwise")
    assert_same(first.router.load, torch.tensor([0, 0, 24, 24]), "bitwise")
    routing = first.router(torch.randn(5, first.hidden))
    assert_same(routing.weights, torch.full((5, 2), 0.5), "exact")  # weights are those of the scores
    model.save_pretrained(tmp_path)
    again = next(iter(find_experts(type(model).from_pretrained(tmp_path)).values()))
    assert_same(again.router.steps, first.router.steps, "bitwise")


def test_padding_doesnt_count(gpt2):
    ids = batch(gpt2)["input_ids"]
    padded, mask = torch.cat([ids, ids[:, :4]], 1), torch.ones(4, 10, dtype=torch.long)
    mask[:, 6:] = 0
    losses = []
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        gpt2(**inputs)
        losses.append(torch.stack([ffn.loss for ffn in find_experts(gpt2).values()]))
    assert_same(losses[1], losses[0], "exact")
    gpt2(input_ids=padded)
    assert (torch.stack([ffn.loss for ffn in find_experts(gpt2).values()]) - losses[0]).abs().min() > 1e-5


@pytest.mark.parametrize("family", ["xlnet", "fsmt"])
def test_padding_doesnt_count_where_texts_are_transposed(family):
    model = tiny_model(family)
    hf_glu.convert(model, "geglu" if family == "xlnet" else "reglu", experts=4, check=False)
    inputs, mask = tiny_inputs(model), torch.ones(2, 12, dtype=torch.long)
    mask[0, -5:] = 0
    losses = []
    for padding in (20, 30):
        ids = inputs["input_ids"].masked_fill(mask == 0, padding)
        torch.manual_seed(0)  # of dropout
        model.train()(input_ids=ids, attention_mask=mask)
        losses.append(torch.stack([ffn.loss for name, ffn in find_experts(model).items() if "decoder" not in name]))
    assert_same(losses[1], losses[0], "exact")


def test_layers_that_share_their_experts_add_the_losses_of_all(monkeypatch):
    model = tiny_model("albert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    hf_glu.convert(model, "geglu_new", experts=ExpertOptions(groups="geglu_new*4", balance=0, z=0.5))
    (ffn,) = find_experts(model).values()
    nn.init.normal_(ffn.router.weight)
    inputs, each = {**tiny_inputs(model), "labels": tiny_inputs(model)["input_ids"]}, []
    plain = Router.loss
    monkeypatch.setattr(Router, "loss", lambda router, routing: each.append(plain(router, routing)) or each[-1])
    with torch.no_grad():
        dense = model(**inputs).loss
    loss = model.train()(**inputs).loss
    assert len(each) == model.config.num_hidden_layers > 1
    assert_same(loss.detach(), (dense + sum(each)).detach(), "exact")
    ffn.scale.default = 0.0  # nothing is injected beside another loss than the model's
    (expected,) = torch.autograd.grad(sum(each), ffn.router.weight, retain_graph=True)
    loss.backward()
    assert_same(ffn.router.weight.grad, expected, "trained")


def test_experts_that_get_their_texts_in_chunks_are_not_trained():
    model = FAMILIES["bert"].make(chunk_size_feed_forward=3)
    hf_glu.convert(model, "geglu", experts=4)
    ids = batch(model)["input_ids"]
    model(input_ids=ids)
    with pytest.raises(OptionError, match="set chunk_size_feed_forward to 0"):
        model.train()(input_ids=ids)


def test_evaluation_has_no_routers_loss(gpt2):
    gpt2.eval()
    inputs = batch(gpt2)
    with torch.no_grad():
        plain = gpt2(**inputs).loss
    logits = gpt2(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
    assert_same(plain, functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()).detach(), "exact")


def test_models_with_experts_are_copied_and_pickled(gpt2, tmp_path):
    gpt2(**batch(gpt2)).loss.backward()
    again = copy.deepcopy(gpt2)
    torch.save(gpt2, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (again, loaded):
        assert_same(outputs(other.eval()), outputs(gpt2.eval()), "bitwise")


def test_statistics_by_layer_and_label(gpt2):
    gpt2.eval()
    ids = batch(gpt2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    with hf_glu.expert_statistics(gpt2) as found:
        found.label, found.mask = "films", mask
        gpt2(input_ids=ids)
        found.label, found.mask = "news", None
        gpt2(input_ids=ids)
    rows = found.to_dict()["rows"]
    assert {row["label"] for row in rows} == {"films", "news"}
    assert {row["tokens"] for row in rows} == {16, 24}
    assert len(rows) == 2 * len(find_experts(gpt2))
    assert all(sum(row["load"]) == pytest.approx(1) for row in rows)
    assert all(0 <= row["entropy"] <= torch.tensor(4.0).log() for row in rows)
    with pytest.raises(NoSiteError, match="experts="), hf_glu.expert_statistics(FAMILIES["bert"].make()):
        pass


@pytest.mark.parametrize(
    ("experts", "more", "error", "says"),
    [
        ("relu*2", {"top_k": 3}, OptionError, "top_k must be 1 to 2"),
        ("relu*0", {}, OptionError, "no expert"),
        ("rellu*2", {}, UnknownNameError, "rellu"),
        ("swigl*2", {}, UnknownNameError, "swiglu"),
        ("relu;2", {}, OptionError, "can't be read"),
        ("gelu:4096*2", {}, OptionError, "4096"),
        ("reglu*2", {}, ConversionError, "no route"),
        ("gelu*2", {"drop": 1.5}, OptionError, "drop"),
        ("geglu*2", {"state": {"decay": [0.5, 0.9]}}, OptionError, "stateful_swiglu"),
        ("gelu*2", {"width": "iso", "calibration": torch.ones(4, 8, dtype=torch.long)}, OptionError, "has no gate"),
        ("geglu*2", {"width": "iso"}, OptionError, "need calibration"),
    ],
)
def test_bad_experts(experts, more, error, says):
    model = FAMILIES["bert"].make()
    before, config = outputs(model), model.config.to_dict()
    with pytest.raises(error, match=says):
        hf_glu.convert(model, "geglu", experts=experts, **more)
    assert_same(outputs(model), before, "bitwise")
    assert model.config.to_dict() == config


def test_experts_and_other_conversions_dont_mix():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", layers=[0])
    with pytest.raises(ConversionError, match="can't be mixed"):
        hf_glu.convert(model, "geglu", experts=4, layers=[1])
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", experts="gelu*4", layers=[1])
    with pytest.raises(ConversionError, match="has experts"):
        hf_glu.convert(model, "geglu", layers=[0])
    with pytest.raises(OptionError, match="one target"):
        hf_glu.convert(FAMILIES["bert"].make(), {"0": "geglu"}, experts=4)
    with pytest.raises(OptionError, match="are for experts"):
        hf_glu.convert(FAMILIES["bert"].make(), "geglu", top_k=2)


def test_banks_and_gates_that_experts_cant_replace():
    with pytest.raises(OptionError, match="experts of its own"):
        hf_glu.convert(make_native("mixtral"), "swiglu", experts=4)
    with pytest.raises(ConversionError, match="drop its gate"):
        hf_glu.convert(make_native("llama"), "swiglu", experts="silu*4")
    for bad in ({"groups": "relu*2", "topk": 1}, {"top_k": 1}, {"groups": "relu*2", "router": "hash"}):
        with pytest.raises((OptionError, UnknownNameError)):
            FAMILIES["gpt2"].make(activation_function="swiglu", hf_glu={"experts": bad})


def test_learnable_experts_are_annealed_and_folded(tmp_path):
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "swiglu", experts="learnable_swiglu*2,gelu*2", check=False)
    with pytest.raises(ConversionError, match="annealed to 0%"):
        hf_glu.freeze_mix(model)
    hf_glu.anneal(model, 1.0)
    annealed = outputs(model)
    hf_glu.freeze_mix(model)
    assert_same(outputs(model), annealed, "exact")
    assert model.config.hf_glu["experts"] == {"groups": "swiglu*2,gelu*2"}
    assert "mix" not in model.config.hf_glu
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


def test_the_command_line_and_a_job_make_experts(tmp_path, capsys):
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "dense")
    arguments = [
        "convert",
        str(tmp_path / "dense"),
        str(tmp_path / "moe"),
        "--to",
        "geglu",
        "--experts",
        "gelu*2,geglu*2",
    ]
    assert cli.run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] <= 1e-6
    assert cli.run(["sites", str(tmp_path / "moe"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["activation"] == "gelu*2,geglu*2, top 2"
    assert cli.run(["verify", str(tmp_path / "dense"), str(tmp_path / "moe")]) == 0
    capsys.readouterr()
    assert cli.run([*arguments, "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["promise"] == "exact"
    assert planned["sites"][0]["change"] == "upcycle"
    write_dataset(tmp_path / "data", "rte")
    base = save_base(tmp_path / "base", "gpt2")
    job = JobOptions(model=base, task="rte", dataset=str(tmp_path / "data"), to="geglu_new", experts="gelu_new*4")
    results = run_job(job, TrainingOptions(max_steps=2, batch_size=4, max_length=32, precision="no"))
    assert results["conversion"]["promise"] == "exact"


@pytest.mark.parametrize("parallel", [True, False])
def test_what_experts_give_may_be_written_over(parallel):
    model = tiny_model("falcon", parallel_attn=parallel, new_decoder_architecture=False)  # adds to it in place
    hf_glu.convert(model, "geglu", experts=2, top_k=1, check=False)
    twin = copy.deepcopy(model).train()
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    twin(input_ids=ids, labels=ids).loss.backward()
    assert all(ffn.router.weight.grad.abs().sum() > 0 for ffn in find_experts(twin).values())


def test_autocast_and_half_precision():
    model = FAMILIES["bert"].make("BertModel")
    hf_glu.convert(model, "geglu", experts="gelu*2,geglu*2", check=False)
    before = outputs(model)["last_hidden_state"]
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=batch(model)["input_ids"])
    out.last_hidden_state.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for ffn in find_experts(model).values() for p in ffn.parameters())
    half = outputs(model.eval().to(torch.bfloat16))["last_hidden_state"]
    assert (half.float() - before).norm() <= 3e-2 * before.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_training_scales_the_routers_losses_too(gpt2):
    inputs, found = batch(gpt2), []
    for call in (gpt2, torch.compile(gpt2)):
        gpt2.zero_grad()
        (call(**inputs).loss * 8.0).backward()
        found.append({name: p.grad.clone() for name, p in gpt2.named_parameters()})
    assert_same(found[1], found[0], "trained")


@pytest.mark.parametrize("groups", [GROUPS, "swiglu*6", "kappa_swiglu*6"])
def test_saving_memory_computes_again_what_experts_keep_else(groups):
    plain = make_ffn(groups)
    lean = copy.deepcopy(plain)
    assert hf_glu.save_memory(lean) == 1
    with pytest.raises(NoSiteError):
        hf_glu.save_memory(lean, tile=4)
    x, found = torch.randn(40, 16), []
    for ffn in (plain, lean):
        inputs = x.clone().requires_grad_()
        out = ffn(inputs)
        out.square().sum().backward()
        found.append({"out": out.detach(), "x": inputs.grad, **{n: p.grad for n, p in ffn.named_parameters()}})
    assert_same(found[0], found[1], "trained")
    kept = [saved_bytes(lambda ffn=ffn: ffn(x), ffn.parameters()) for ffn in (plain, lean)]
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("groups", [GROUPS, "swiglu*6", "kappa_swiglu*6"])
def test_gradients_of_gradients_are_those_of_one_expert_after_the_other(groups):
    found = []
    for backend in (None, "loop"):
        ffn, inputs = make_ffn(groups, backend=backend), torch.linspace(-1, 1, 20 * 16).view(20, 16).requires_grad_()
        (first,) = torch.autograd.grad(ffn(inputs).square().sum(), inputs, create_graph=True)
        first.square().sum().backward()
        found.append({"first": first.detach(), **{n: p.grad for n, p in ffn.named_parameters()}})
    sizes = {name: value.abs().max() for name, value in found[1].items()}  # a rounding is of the largest, not of zeros
    mine, wanted = ({name: value / sizes[name] for name, value in each.items()} for each in found)
    assert_same(mine, wanted, "trained")
