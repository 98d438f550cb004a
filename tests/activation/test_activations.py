"""Each registry entry against an independent formula, its gradient, and its names in ``ACT2FN``."""

import math

import pytest
import torch
from comparing import assert_same
from torch.autograd import gradcheck
from transformers.activations import ACT2FN, get_activation

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.kernels.formulas import split_gate_up
from hf_glu.activation.module import GatedActivation
from hf_glu.activation.stock import elementwise_names
from hf_glu.config.registry import GATED
from hf_glu.errors import DuplicateNameError, OptionError, UnknownNameError


def _gelu_new(g):
    return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


# an entry without a row here fails
FORMULAS = {
    "glu": lambda g, u: u / (1 + torch.exp(-g)),
    "bilinear": lambda g, u: g * u,
    "reglu": lambda g, u: torch.where(g > 0, g, 0.0) * u,
    "geglu": lambda g, u: 0.5 * g * (1 + torch.erf(g / math.sqrt(2))) * u,
    "geglu_new": lambda g, u: _gelu_new(g) * u,
    "swiglu": lambda g, u: g / (1 + torch.exp(-g)) * u,
    "relu2glu": lambda g, u: torch.where(g > 0, g**2, 0.0) * u,
    "dreglu": lambda g, u: torch.where(g > 0, g, 0.0) * torch.where(u > 0, u, 0.0),
    "swiglu_oss": lambda g, u: (
        torch.where(g > 7, 7.0, g) / (1 + torch.exp(-1.702 * torch.where(g > 7, 7.0, g))) * (u.clip(-7, 7) + 1)
    ),
}
NAMES = [entry.name for entry in registry if GATED in entry.flags]


def _input(*shape, scale=3.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_value(name):
    x = _input(4, 3, 10)
    assert_same(ACT2FN[name](x), FORMULAS[name](x[..., :5], x[..., 5:]), "formula")


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name):
    assert gradcheck(ACT2FN[name].double(), _input(3, 8).requires_grad_())


@pytest.mark.parametrize("elementwise", [name for name in elementwise_names() if name != "xielu"])
def test_derived_name(elementwise):
    module = ACT2FN[f"{elementwise}_glu"].double()
    assert isinstance(module, GatedActivation)
    x = _input(4, 10).abs() + 0.1  # sqrt(softplus) and others are smooth there
    phi = ACT2FN[elementwise].double()
    assert_same(module(x), phi(x[..., :5]) * x[..., 5:], "formula")
    assert gradcheck(module, x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    x = _input(4, 10, scale=1.0)
    result = ACT2FN[name](x.to(dtype))
    assert result.dtype == dtype
    assert_same(result.double(), ACT2FN[name](x.to(dtype).double()), "bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elementwise", elementwise_names())
def test_an_up_half_of_one_gives_the_dense_activations_bits(elementwise, dtype):
    gate = _input(64, 48).to(dtype)
    dense, gated = ACT2FN[elementwise].to(dtype), ACT2FN[f"{elementwise}_glu"].to(dtype)
    assert_same(gated(torch.cat([gate, torch.ones_like(gate)], dim=-1)), dense(gate), "bitwise")


def test_names_are_in_the_table_and_build_afresh():
    assert set(NAMES) <= set(ACT2FN)
    assert "relu6_glu" in ACT2FN
    assert "nothing_glu" not in ACT2FN
    assert ACT2FN["prelu_glu"] is not ACT2FN["prelu_glu"]
    assert ACT2FN["prelu_glu"].phi.weight is not ACT2FN["prelu_glu"].phi.weight
    assert get_activation("swiglu").name == "swiglu"


def test_elementwise_name_of_a_user():
    class Sine(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x)

    ACT2FN["sine"] = Sine
    try:
        x = _input(2, 6)
        assert_same(ACT2FN["sine_glu"](x), torch.sin(x[:, :3]) * x[:, 3:], "formula")
    finally:
        del ACT2FN["sine"]
    assert "sine_glu" not in ACT2FN


def test_unknown_names_say_the_nearest():
    with pytest.raises(KeyError, match="swiglu"):
        ACT2FN["swigul"]
    with pytest.raises(UnknownNameError, match="geglu"):
        registry["gegul"]


def test_an_entry_is_all_that_a_new_activation_needs():
    def cubed(g, u):
        return g**3 * u

    entry = hf_glu.Activation(
        name="cubeglu", equation="g^3 * u", paper="none", flags=frozenset({"gated"}), formula=cubed,
        factory=lambda: GatedActivation("cubeglu"),
    )  # fmt: skip
    with hf_glu.scoped():
        registry.add(entry)
        registry.add(entry)  # the same again is a no-op
        x = _input(2, 6)
        assert_same(ACT2FN["cubeglu"](x), x[:, :3] ** 3 * x[:, 3:], "formula")
        other = {key: getattr(entry, key) for key in ("name", "paper", "flags", "factory")}
        with pytest.raises(DuplicateNameError, match="cubeglu"):
            registry.add(hf_glu.Activation(**other, equation="something else"))
    assert registry.find("cubeglu") is None


def test_a_name_with_a_dash_is_refused():
    with pytest.raises(UnknownNameError, match="snake_case"):
        hf_glu.Activation(name="my-glu", equation="", paper="", flags=frozenset(), factory=lambda: None)


def test_odd_width_is_refused():
    with pytest.raises(OptionError, match="even"):
        split_gate_up(torch.ones(2, 7))


def test_listing():
    listing = hf_glu.activations().to_dict()
    assert [entry["name"] for entry in listing["activations"]] == [entry.name for entry in registry]
    assert "relu" in listing["elementwise"]
    known = ("Dauphin", "Shazeer", "So et al", "Song et al", "OpenAI", "Zhuo")
    assert all(entry["paper"].startswith(known) for entry in listing["activations"])
