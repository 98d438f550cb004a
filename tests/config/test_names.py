"""The one grammar of activations' names: wrappers in any order, one mix at most, a base; and what it refuses."""

import itertools
import subprocess
import sys
import time

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES
from torch import nn
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.module import GatedActivation
from hf_glu.config.registry import LONGEST, Activation, Derived, adds_wrappers, core, unmixed, unwrapped
from hf_glu.errors import UnknownNameError

WRAPPERS = ("modulated_", "stateful_")
FLAGS = {"modulated_": "modulated", "stateful_": "stateful", "learnable_": "learnable", "moa_": "adaptive"}
# base -> its gate
BASES = {"swiglu": "silu", "geglu_new": "gelu_new", "relu_glu": "relu", "silu": None, "relu6": None}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mix", ["", "learnable_", "moa_"])
@pytest.mark.parametrize("wrappers", [(), *((w,) for w in WRAPPERS), WRAPPERS])
def test_every_order_is_one_reading(wrappers, mix, base):
    names = {"".join(order) + mix + base for order in itertools.permutations(wrappers)}
    canonical = "".join(wrappers) + mix + base
    for name in names:
        entry, reading = registry.find(name), registry.read(name)
        assert (reading.wrappers, reading.mix, reading.base) == (wrappers, mix, base)
        if name == base and BASES[base] is None:
            assert entry is None  # Transformers' own
            continue
        assert entry.name == canonical
        assert {FLAGS[prefix] for prefix in (*wrappers, mix) if prefix} <= entry.flags
        assert ("gated" in entry.flags) == (BASES[base] is not None)
        assert entry.gate == (BASES[base] and "".join(wrappers) + mix + BASES[base])
        assert unwrapped(name) == mix + base
        assert unmixed(name) == "".join(wrappers) + base
        assert core(name) == mix + (BASES[base] or base)
        assert name in ACT2FN


@pytest.mark.parametrize("name", ["modulated_relu_glu", "stateful_gelu_new", "stateful_modulated_swiglu_oss"])
def test_what_a_name_says_is_in_the_model(name):
    model = FAMILIES["gpt2"].make(activation_function=name)
    parameters = {key.rpartition(".")[2] for key, _ in model.named_parameters()}
    assert ("threshold" in parameters) == ("modulated" in name)
    assert ("alpha" in parameters) == ("stateful" in name)
    modulated = [module for module in model.modules() if type(module).__name__ == "ContextSource"]
    assert bool(modulated) == ("modulated" in name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("stateful_stateful_silu", "stateful_ stands there twice"),
        ("stateful_modulated_stateful_swiglu", "stateful_ stands there twice"),
        ("learnable_stateful_silu", "after learnable_ comes no stateful_"),
        ("moa_learnable_silu", "after moa_ comes no learnable_"),
        ("moa_swiglu_oss", "swiglu_oss can't have moa_"),
        ("stateful_swigul", "did you mean 'stateful_swiglu'"),
        ("silu_glu_glu", "unknown "),
        ("stateful_", "unknown "),
        ("", "unknown "),
        ("stateful_modulated_" * 10_000 + "swiglu", "at most 128 characters"),
        ("learnable_stateful_" * 6 + "geglu", "after learnable_ comes no stateful_"),
        ("silu" + "_glu" * 1_000, "at most 128 characters"),
        ("x" * 10_000_000, "at most 128 characters"),
    ],
)
def test_what_is_refused_is_refused_at_once_by_one_line(name, why):
    start = time.perf_counter()
    assert registry.find(name) is None
    assert name not in ACT2FN
    for look_up in (registry.__getitem__, ACT2FN.__getitem__):
        with pytest.raises(UnknownNameError) as raised:
            look_up(name)
        assert why in str(raised.value)
        assert len(str(raised.value)) < 1_000
        assert "\n" not in str(raised.value)
    assert time.perf_counter() - start < 1


def test_the_longest_name_is_read():
    name = "x" * (LONGEST - len("modulated_stateful_moa__glu"))
    ACT2FN[name] = nn.ReLU
    try:
        assert len(f"modulated_stateful_moa_{name}_glu") == LONGEST
        assert registry.find(f"modulated_stateful_moa_{name}_glu").gate == f"modulated_stateful_moa_{name}"
        assert registry.find(f"modulated_stateful_moa_{name}x_glu") is None
    finally:
        del ACT2FN[name]


@pytest.mark.parametrize("name", [None, 5, ["swiglu"], {"swiglu": 1}, b"swiglu"])
def test_what_is_no_text_is_no_name(name):
    assert registry.find(name) is None
    with pytest.raises(UnknownNameError, match="a name is text"):
        registry[name]


def test_a_base_that_looks_wrapped_is_a_base():
    """Whoever registers a name has it, whatever it begins with."""
    ACT2FN["moa_net"] = nn.Tanh
    try:
        assert registry.read("stateful_moa_net").base == "moa_net"
        assert registry.find("moa_net") is None
        x = torch.randn(3, 8)
        assert_same(ACT2FN["moa_net_glu"](x), x[:, :4].tanh() * x[:, 4:], "bitwise")
    finally:
        del ACT2FN["moa_net"]


def test_a_new_wrapper_registers_itself():
    def derive(name, inner, entry):
        flags = frozenset({"doubled"}) | (entry.flags if entry else frozenset())
        return Activation(
            name=name, equation=f"2 {inner}", paper="none", flags=flags, factory=lambda: Doubled(inner),
            gate=entry and entry.gate and f"doubled_{entry.gate}",
        )  # fmt: skip

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = ACT2FN[inner]

        def forward(self, x):
            return 2 * self.inner(x)

    doubled = Derived(pattern="doubled_N", place="wrapper", order=5, equation="2 N", paper="none", derive=derive)
    with hf_glu.scoped():
        registry.add_family(doubled)
        registry.add_family(doubled)  # the same again is a no-op
        for order in itertools.permutations(("doubled_", "stateful_", "modulated_")):
            assert registry.find("".join(order) + "silu").name == "modulated_doubled_stateful_silu"
        x = torch.randn(3, 8)
        assert_same(ACT2FN["doubled_tanh"](x), 2 * x.tanh(), "bitwise")
        assert adds_wrappers("stateful_silu", "stateful_doubled_silu")
    assert registry.find("doubled_tanh") is None


def test_adding_wrappers():
    assert adds_wrappers("swiglu", "stateful_swiglu")
    assert adds_wrappers("modulated_swiglu", "stateful_modulated_swiglu")
    assert adds_wrappers("stateful_moa_geglu", "modulated_stateful_moa_geglu")
    for source, target in (
        ("stateful_swiglu", "swiglu"),
        ("swiglu", "swiglu"),
        ("stateful_swiglu", "modulated_swiglu"),
        ("swiglu", "stateful_geglu"),
        ("swiglu", "learnable_swiglu"),
        ("nothing", "stateful_silu"),
    ):
        assert not adds_wrappers(source, target), (source, target)


@pytest.mark.parametrize("name", ["geglu_new", "swiglu_oss"])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(WRAPPERS)))
def test_a_second_wrapper_keeps_what_the_first_one_learnt(name, first, second):
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, first + name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".shift." in key:
                parameter.normal_(std=0.5)
    before = outputs(model)
    assert hf_glu.convert(model, second + first + name).plan.promise == "exact"
    assert {site.activation for site in hf_glu.find_sites(model)} == {f"modulated_stateful_{name}"}
    assert_same(outputs(model), before, "exact")


def test_names_are_read_before_transformers_is_there():
    code = "from hf_glu.config.registry import registry, unwrapped; print(registry.find('swiglu'), unwrapped('silu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "silu"]


def test_a_gated_entry_of_a_user_takes_every_prefix():
    entry = Activation(
        name="sinelu", equation="relu(g) * u", paper="none", flags=frozenset({"gated"}), gate="relu",
        factory=lambda: GatedActivation("sinelu"),
    )  # fmt: skip
    with hf_glu.scoped():
        registry.add(entry)
        assert registry.find("stateful_moa_sinelu").gate == "stateful_moa_relu"
