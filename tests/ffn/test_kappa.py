"""``kappa_N`` in experts of ours: against its formula along every path, and refused where there is no router."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import assert_same
from hearing import converted
from states import batch, ids
from torch import Tensor
from torch.nn import functional

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.kappa import Sharpness, response_of
from hf_glu.activation.wrapped import shifts
from hf_glu.config.experts import ExpertOptions
from hf_glu.errors import OptionError
from hf_glu.ffn.experts import ExpertFFN, find_experts
from hf_glu.ffn.experts.group import banks_of

TOKENS, HIDDEN, WIDTH = 13, 8, 16


def experts(groups: str = "kappa_swiglu*3", *, bias: bool = True, **options: Any) -> ExpertFFN:
    torch.manual_seed(0)
    made = ExpertFFN(HIDDEN, WIDTH, ExpertOptions(groups=groups, **options), bias=bias).double()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.5)
    return made


def by_tokens(ffn: ExpertFFN, x: Tensor) -> Tensor:
    """Return what ``ffn`` is to give, token by token, in words of the equation."""
    options, rows = ffn.options, []
    each = [(bank, number) for bank in banks_of(ffn.banks) for number in range(bank.count)]
    for token in x:
        logits = ffn.router.weight @ token
        scores = logits.softmax(-1) if options.router == "softmax" else logits.sigmoid()
        best, chosen = scores.topk(options.top_k)
        weights = best / (best.detach() if options.weights == "ones" else best.sum())
        outs = []
        for r, expert in zip(best, chosen.tolist(), strict=True):
            bank, e = each[expert]
            z = bank.in_proj[e] @ token + (0 if bank.in_bias is None else bank.in_bias[e])
            g, u = z.chunk(2) if bank.name.endswith("glu") else (z, torch.ones(()))
            a = shifts(bank.act)[0].response[e] if bank.hears else 0
            phi = functional.silu if "swiglu" in bank.name else functional.relu
            out = bank.out_proj[e] @ (phi((1 + a * r) * g) * u)
            outs.append(out if bank.out_bias is None else out + bank.out_bias[e])
        rows.append(weights @ torch.stack(outs))
    return torch.stack(rows)


def gradients(function: Callable[[Tensor], Tensor], ffn: ExpertFFN, x: Tensor) -> list[Tensor]:
    probe = torch.randn(len(x), HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    return list(torch.autograd.grad((function(x) * probe).sum(), [x, *ffn.parameters()]))


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("groups", ["kappa_swiglu*3", "kappa_swiglu*2,swiglu", "kappa_relu*2,kappa_reglu"])
@pytest.mark.parametrize(
    ("router", "weights", "top_k"), [("softmax", "scores", 2), ("softmax", "scores", 1), ("sigmoid", "ones", 2)]
)
def test_every_path_is_the_formula(groups, router, weights, top_k):
    ffn = experts(groups, router=router, weights=weights, top_k=top_k, balance=0.0, z=0.0)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    expected = by_tokens(ffn, x)
    assert_same(ffn(x), expected, "formula")
    found, wanted = gradients(ffn, ffn, x), gradients(lambda x: by_tokens(ffn, x), ffn, x)
    assert all(bool(each.any()) for each in wanted)
    assert_same(dict(enumerate(found)), dict(enumerate(wanted)), "formula")
    traced = torch.jit.trace(ffn, x.detach()[:5])
    with torch.no_grad():
        assert_same(ffn(x), expected, "formula")
        assert_same(torch.cat([ffn(token) for token in x.split(1)]), expected, "formula")
        assert_same(traced(x), expected, "formula")
    few = copy.deepcopy(ffn).float().eval()
    few.options = few.router.options = ExpertOptions(**{**few.options.to_dict(), "backend": "grouped"})
    with torch.no_grad():
        assert_same(few(x.float()).double(), expected, "trained")


def test_the_formula_can_fail():
    ffn, x = experts(), torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        before = ffn(x)
        shifts(ffn.banks[0].act)[0].response[1] += 0.1
        assert 0 < int((ffn(x) != before).any(1).sum()) < TOKENS
        shifts(ffn.banks[0].act)[0].response.zero_()
        plain = experts("swiglu*3")
        plain.load_state_dict({key: each for key, each in ffn.state_dict().items() if "response" not in key})
        assert torch.equal(ffn(x), plain(x))


def test_derivatives_of_derivatives_and_functional_calls():
    ffn = experts().eval()
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ffn, x)
    assert torch.autograd.gradgradcheck(ffn, x)
    state = {key: each.detach() for key, each in ffn.named_parameters()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(ffn, state, (x.detach(),)).square().sum()

    other = {key: each + 0.1 for key, each in state.items()}
    found = torch.func.grad(loss)(other)
    with torch.no_grad():
        for key, parameter in ffn.named_parameters():
            parameter.copy_(other[key])
    ffn(x.detach()).square().sum().backward()
    assert_same(found, {key: each.grad for key, each in ffn.named_parameters()}, "formula")


def test_parameters_that_change_before_the_backward_pass_are_noticed():
    ffn = experts()
    assert response_of(ffn.banks[0].act) is not None, "it is computed again in the backward pass"
    y = ffn(torch.randn(TOKENS, HIDDEN, dtype=torch.float64))
    with torch.no_grad():
        shifts(ffn.banks[0].act)[0].response.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_hooked_activation_is_called_as_it_is():
    ffn, seen = experts(), []
    ffn.banks[0].act.register_forward_pre_hook(lambda act, args: seen.append(args))
    assert response_of(ffn.banks[0].act) is None
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert_same(ffn(x), by_tokens(ffn, x), "formula")
    assert sum(len(confidence.scores) for _, confidence in seen) == 2 * TOKENS


def test_nothing_is_told_but_by_the_experts():
    act: Any = registry["kappa_swiglu"].factory()
    x = torch.randn(4, 2 * WIDTH)
    assert torch.equal(act(x), registry["swiglu"].factory()(x)), "it has no parameters yet"
    act.configure(hf_glu.GluConfig(), WIDTH)
    with pytest.raises(OptionError, match="are told of none here"):
        act(x)
    act(x, Confidence(torch.rand(4), 0))
    with pytest.raises(OptionError, match="are told of none here"):
        act(x)
    bank = experts().banks[0]
    for graded in (True, False):
        with torch.set_grad_enabled(graded), pytest.raises(OptionError, match="are told of none here"):
            bank(torch.randn(6, HIDDEN).double(), [1, 2, 3], None)


def test_a_formula_of_its_own_hears():
    act: Any = registry["stateful_kappa_swiglu_oss"].factory()
    act.configure(hf_glu.GluConfig(), WIDTH)
    act.double()
    (sharpness,) = (shift for shift in act.shifts() if isinstance(shift, Sharpness))
    sharpness.response.data.normal_()
    x, r = torch.randn(5, 2 * WIDTH, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    g, u = x.chunk(2, -1)
    expected = registry["swiglu_oss"].factory()(torch.cat([g * (1 + r.unsqueeze(1) * sharpness.response), u], -1))
    assert_same(act(x, Confidence(r, 0)), expected.detach(), "formula")


def trained(model: Any, run: Any = None) -> dict[str, Tensor]:
    model.train().zero_grad()
    (model if run is None else run)(**batch(model))[0].float().square().mean().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefix", ["kappa_", "stateful_kappa_"])
def test_gradient_checkpointing(prefix, reentrant):
    model = converted(prefix=prefix)
    expected = trained(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(trained(model), expected, "trained")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_and_under_autocast():
    model = converted("llama")
    expected = trained(model)
    torch._dynamo.reset()
    assert_same(trained(model, torch.compile(model, backend="aot_eager")), expected, "trained")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = trained(model)
    assert rounded.keys() == expected.keys()
    for key in expected:
        if key.endswith("response"):
            assert functional.cosine_similarity(rounded[key].flatten(), expected[key].flatten(), 0) > 0.95
    half = experts(bias=False, backend="grouped").to(torch.bfloat16).eval()
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(half, fullgraph=True, backend="aot_eager")(x), half(x), "bf16")


def test_the_router_learns_from_it_with_one_expert_a_token():
    routers = []
    for prefix in ("kappa_", ""):
        model = converted("llama", prefix, top_k=1)
        for ffn in find_experts(model).values():
            ffn.options = ffn.router.options = ExpertOptions(groups=ffn.options.groups, top_k=1, balance=0.0, z=0.0)
        model.config.router_aux_loss_coef = 0.0
        found = trained(model)
        routers.append(max(float(each.abs().max()) for key, each in found.items() if "router" in key))
    assert routers[0] > 100 * routers[1]


def test_two_threads_may_run_one_model():
    model, found = converted("llama").eval(), {}
    texts = [ids(2, 9, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(text).logits for text in texts]

    def serve(number: int) -> None:
        with torch.no_grad():
            found[number] = [model(texts[number]).logits for _ in range(5)]

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected[number]) for number in found for each in found[number])
    assert len(found) == 4
