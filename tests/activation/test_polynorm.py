"""PolyNorm: its formula, what may be around it, and where it must not be cut by channels."""

import pytest
import torch
from comparing import assert_same
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaModel
from transformers.activations import ACT2FN

from hf_glu.activation import registry
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.compat.of_models import TP_PLAN
from hf_glu.errors import UnknownNameError
from hf_glu.instruments.curves import GRID, curve_rows


def _act():
    act = ACT2FN["polynorm"].double()
    with torch.no_grad():
        act.coefficients.copy_(torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64))
        act.offset.fill_(0.1)
    return act


def _x(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _by_hand(row):
    powers = [[value**order for value in row] for order in (1, 2, 3)]
    norms = [(sum(value**2 for value in power) / len(row) + 1e-6) ** 0.5 for power in powers]
    return [sum(a * power[at] / norm for a, power, norm in zip((0.2, -0.5, 0.9), powers, norms, strict=True)) + 0.1
            for at in range(len(row))]  # fmt: skip


def test_value_and_gradient():
    x, act = _x(2, 3, 5), _act()
    expected = torch.tensor([[_by_hand(row) for row in each] for each in x.tolist()], dtype=torch.float64)
    with torch.no_grad():
        assert_same(act(x), expected, "formula")
    assert gradcheck(act, x.requires_grad_())
    assert act.coefficients.grad is None
    act(x).sum().backward()
    assert bool((act.coefficients.grad != 0).all())


def test_as_a_gate_and_in_half_precision():
    x = _x(4, 10)
    gated = ACT2FN["polynorm_glu"].double()
    plain = build_elementwise("polynorm").double()
    assert_same(gated(x), plain(x[:, :5]) * x[:, 5:], "formula")
    large = (100 * x).half()  # whose cubes are beyond float16
    torch.testing.assert_close(ACT2FN["polynorm"](large).double(), plain(large.double()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["learnable_polynorm", "moa_polynorm_glu"])
def test_a_mix_has_a_coefficient_for_each_channel_and_this_reads_all(name):
    assert registry.find(name) is None
    with pytest.raises(UnknownNameError, match="can't have"):
        registry[name]


def test_a_tensor_parallel_plan_leaves_its_ffns_whole():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 11}  # fmt: skip
    plans = {name: TP_PLAN.of(LlamaModel(LlamaConfig(**sizes, hidden_act=name)), {}) for name in ("silu", "polynorm")}
    assert any("mlp" in pattern for pattern in plans["silu"])
    assert not any("mlp" in pattern for pattern in plans["polynorm"])
    assert any("self_attn" in pattern for pattern in plans["polynorm"])


def test_its_curve_is_of_the_grid_as_one_token():
    act = ACT2FN["polynorm_glu"]
    values = curve_rows((act, None), None, None)["after"]
    expected = act.phi(GRID)
    torch.testing.assert_close(torch.tensor(values), expected.detach(), atol=1e-3, rtol=1e-3)
