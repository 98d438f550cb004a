"""The recurrence of a stateful gate against a token-by-token reference in float64, and its gradient."""

import pytest
import torch
from comparing import assert_same
from scans import BATCH, OPTIONS, TIMES, WIDTH, inputs, masks, options_of, reference
from torch.autograd import gradcheck

from hf_glu.activation.kernels.scan import bidirectional, linear, stateful
from hf_glu.errors import OptionError

BACKENDS = tuple(linear.BACKENDS)


def gradients(outputs, leaves):
    """Gradients of a sum with fixed weights, so that no two elements weigh the same."""
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (out.double() * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum() for out in outputs
    )
    return dict(enumerate(torch.autograd.grad(total, leaves, retain_graph=True)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few tokens and rows: states and gradients are handed from one to the next."""
    for name, backend in linear.BACKENDS.items():
        small = linear.Backend(scan=backend.scan, size=5 * 2 * WIDTH, steps=5)
        monkeypatch.setitem(linear.BACKENDS, name, small)


@pytest.mark.parametrize("both_outputs", [True, False], ids=["z and states", "z"])
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: "-".join(key for key, on in case.items() if on) or "plain")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_are_the_references(backend, case, both_outputs):
    *leaves, start = inputs()
    options = options_of(case, start)
    leaves = [*leaves, start] if case["start"] else leaves
    actual, expected = stateful(*leaves[:4], **options, backend=backend), reference(*leaves[:4], **options)
    assert_same(dict(enumerate(actual)), dict(enumerate(expected)), "formula")
    used = slice(None) if both_outputs else slice(1)
    assert_same(gradients(actual[used], leaves), gradients(expected[used], leaves), "formula")


@pytest.mark.usefixtures("small_blocks")
def test_the_comparison_can_fail():
    *leaves, start = inputs()
    expected = reference(*leaves, start=start)
    for change in ({"start": None}, {"reverse": True}, {"valid": masks()[0]}, {"restart": masks()[1]}):
        actual = stateful(*leaves, **{"start": start, **change})
        for ours, theirs in zip(actual, expected, strict=True):
            with pytest.raises(AssertionError):
                assert_same(ours, theirs, "formula")
        with pytest.raises(AssertionError):
            assert_same(gradients(actual, leaves), gradients(expected, leaves), "formula")


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_directions(backend):
    *leaves, _ = inputs()
    gate, alpha, beta, _ = leaves
    valid, restart = masks()
    options = {"valid": valid, "restart": restart}
    (_, forth), (_, back) = (reference(*leaves, **options, reverse=reverse) for reverse in (False, True))
    zeros = torch.zeros_like(forth[:, :1])
    earlier = torch.cat([zeros, forth[:, :-1]], 1).masked_fill(restart[..., None], 0)
    later = torch.cat([back[:, 1:].masked_fill(restart[:, 1:, None], 0), zeros], 1)
    mean = (earlier + later) / 2
    expected = gate + alpha * mean + beta * (torch.sigmoid(gate) - mean)
    actual = bidirectional(*leaves, **options, backend=backend)
    assert_same(actual, expected, "formula")
    assert_same(gradients([actual], leaves), gradients([expected], leaves), "formula")


@pytest.mark.parametrize("case", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, case):
    gate, *parameters, start = inputs(times=11, width=2)
    options = options_of(case, None, times=11)

    def function(gate, alpha, beta, decay, start):
        return stateful(gate, alpha, beta, decay, **{**options, "start": start}, backend=backend)

    assert gradcheck(function, (gate, *parameters, start))


@pytest.mark.parametrize("decay", [1e-6, 1e-3, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_near_the_ends(backend, dtype, decay):
    gate, alpha, beta, decays, start = inputs(times=300, dtype=torch.float32, decay=decay)
    kinds = (dtype, dtype, dtype, torch.float32, dtype)
    tensors = zip((gate, alpha, beta, decays, start), kinds, strict=True)
    leaves = [tensor.detach().to(kind).requires_grad_() for tensor, kind in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    actual, expected = stateful(*leaves[:4], start=leaves[4], backend=backend), reference(*exact[:4], start=exact[4])
    assert (actual[0].dtype, actual[1].dtype) == (dtype, torch.float32)
    assert_same(actual[1].double(), expected[1], "exact up to rounding")
    found, wanted = gradients(actual, leaves), gradients(expected, exact)
    tolerance = "bf16" if dtype == torch.bfloat16 else "exact up to rounding"
    for key, tensor in wanted.items():
        assert found[key].dtype == leaves[key].dtype
        scale = tensor.abs().max()  # a sum over time may cancel
        assert_same(found[key].double() / scale, tensor / scale, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    gate, *parameters, start = (tensor.detach().to(dtype) for tensor in inputs(times=100))
    z, states = stateful(gate, *parameters, start=start, backend=backend)
    expected = reference(*(tensor.double() for tensor in (gate, *parameters)), start=start.double())
    assert z.dtype == dtype
    assert_same(z.double(), expected[0], "bf16")
    assert_same(states.double(), expected[1], "exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_alpha_and_beta_z_is_the_gate(backend, dtype):
    gate = inputs(dtype=dtype)[0]
    zero, decay = torch.zeros(WIDTH), torch.rand(WIDTH)
    assert_same(stateful(gate, zero, zero, decay, backend=backend)[0], gate, "bitwise")
    assert_same(bidirectional(gate, zero, zero, decay, backend=backend), gate, "bitwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(5, 8), (1,) * TIMES, (0, TIMES)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_chunks_that_carry_the_last_state_are_the_whole(dtype, cuts, masked):
    # whole vector registers: torch computes what is left over with another sigmoid
    gate, alpha, beta, decay, state = (tensor.detach() for tensor in inputs(dtype=dtype, width=64))
    valid, restart = masks() if masked else (None, None)
    parts = [None if mask is None else mask.split(cuts, 1) for mask in (valid, restart)]
    whole = stateful(gate, alpha, beta, decay, start=state, valid=valid, restart=restart)
    outputs = []
    for index, chunk in enumerate(gate.split(cuts, 1)):
        v, r = (None if part is None else part[index] for part in parts)
        outputs.append(stateful(chunk, alpha, beta, decay, start=state, valid=v, restart=r))
        state = outputs[-1][1][:, -1] if chunk.shape[1] else state
    for actual, expected in zip(zip(*outputs, strict=True), whole, strict=True):
        assert_same(torch.cat(actual, 1), expected, "bitwise")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("times", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_and_one_token(backend, times, reverse):
    *leaves, start = inputs(times=times)
    options = {"start": start, "valid": torch.ones(BATCH, times, dtype=torch.bool), "reverse": reverse}
    z, states = stateful(*leaves, **options, restart=~options["valid"], backend=backend)
    assert z.shape == states.shape == (BATCH, times, WIDTH)
    found = gradients((z, states), [*leaves, start])
    if times:
        expected = reference(*leaves, **options)
        assert_same({0: z, 1: states}, dict(enumerate(expected)), "formula")
        assert_same(found, gradients(expected, [*leaves, start]), "formula")
    else:
        assert not any(tensor.any() for tensor in found.values())


def test_one_token_without_gradient_is_the_operators():
    gate, start = torch.randn(3, 1, 16), torch.rand(3, 16)
    alpha, beta, decay = torch.randn(16), torch.randn(16), torch.rand(16) * 0.9 + 0.05
    expected = stateful(gate, alpha, beta, decay, start=start)
    with torch.no_grad():
        found = stateful(gate, alpha, beta, decay, start=start)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, "exact")


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives_of_every_kind(reverse):
    *leaves, start = inputs(times=3, width=2)
    valid, restart = (mask[:, :3] for mask in masks())

    def function(*tensors):
        *given, start = tensors
        return stateful(*given, start=start, valid=valid, restart=restart, reverse=reverse)

    given = (*leaves, start)
    assert torch.autograd.gradcheck(function, given, check_batched_grad=True, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, check_batched_grad=True, fast_mode=True)
    found = torch.func.vmap(lambda gate: stateful(gate.unsqueeze(0), *leaves[1:])[0].squeeze(0))(leaves[0])
    assert_same(found, stateful(*leaves)[0], "formula")


def test_a_walk_is_refused_where_torch_would_not_go_in_order():
    gate, *parameters, _ = (tensor.detach().to("meta") for tensor in inputs())
    with pytest.raises(OptionError, match="parallel"):
        stateful(gate, *parameters, backend="walk")


def test_views_and_expanded_gradients():
    *leaves, _ = inputs()
    half = torch.cat([leaves[0], leaves[0]], -1).detach()[..., WIDTH:].requires_grad_()
    for gate in (half, leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()):
        wanted = torch.autograd.grad(reference(*leaves)[0].sum(), leaves)
        found = torch.autograd.grad(stateful(gate, *leaves[1:])[0].sum(), [gate, *leaves[1:]])
        assert_same(dict(enumerate(found)), dict(enumerate(wanted)), "formula")


def test_little_is_saved_for_the_gradient():
    gate, *parameters, _ = inputs(times=64, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        z, _ = stateful(gate, *parameters)
    assert z.grad_fn is not None
    assert sum(tensor.numel() for tensor in saved) <= 2 * gate.numel() + (BATCH + 3) * WIDTH


@pytest.mark.slow
def test_torch_checks_the_operators():
    gate, *parameters, start = inputs(times=5, width=4)
    valid, restart = masks(times=5 + 4)
    for reverse in (False, True):
        arguments = (gate, *parameters, start, valid[:, :5], restart[:, :5], reverse, "walk")
        torch.library.opcheck(torch.ops.hf_glu.stateful.default, arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()

    def ffn(gate, up, alpha, beta, decay, start, valid):
        z, states = stateful(gate, alpha, beta, decay, start=start, valid=valid)
        both = bidirectional(gate, alpha, beta, decay, valid=valid)
        return torch.nn.functional.silu(z) * up + both, states[:, -1]

    gate, *parameters, start = inputs(dtype=torch.float32)
    leaves = [gate, gate.detach().flip(0).requires_grad_(), *parameters, start]
    valid, _ = masks()
    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)(*leaves, valid)
    plain = ffn(*leaves, valid)
    assert_same(dict(enumerate(compiled)), dict(enumerate(plain)), "exact")
    assert_same(gradients(compiled, leaves), gradients(plain, leaves), "exact up to rounding")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.ones(3, 4)}, "gate must be"),
        ({"gate": torch.ones(2, 3, 4, dtype=torch.long)}, "gate must be"),
        ({"alpha": torch.ones(5)}, r"alpha must be \[4\]"),
        ({"beta": torch.ones(1)}, r"beta must be \[4\]"),
        ({"decay": torch.ones(1, 4)}, r"decay must be \[4\]"),
        ({"start": torch.ones(4)}, r"start must be \[2, 4\]"),
        ({"valid": torch.ones(3, 2, dtype=torch.bool)}, r"valid must be \[2, 3\]"),
        ({"restart": torch.ones(2, 3)}, "restart must be bool"),
        ({"backend": "wlak"}, "did you mean 'walk'"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    good = {"gate": torch.ones(2, 3, 4), "alpha": torch.ones(4), "beta": torch.ones(4), "decay": torch.full((4,), 0.5)}
    stateful(**good)
    with pytest.raises(OptionError, match=message):
        stateful(**{**good, **change})
