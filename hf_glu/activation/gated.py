"""The gated family: one line an entry; it drives the tests, the table in the README and ``hf-glu activations``."""

from __future__ import annotations

from functools import partial

from hf_glu.activation.kernels.formulas import swiglu_oss
from hf_glu.activation.module import GatedActivation
from hf_glu.config.registry import GATED, Activation, Derived, Formula, registry

SUFFIX = "_glu"
DAUPHIN = "Dauphin et al. 2016, https://arxiv.org/abs/1612.08083"
SHAZEER = "Shazeer 2020, https://arxiv.org/abs/2002.05202"
PRIMER = "So et al. 2021 (Primer), https://arxiv.org/abs/2109.08668"
GPT_OSS = "OpenAI 2025 (gpt-oss), https://arxiv.org/abs/2508.10925"

# name, equation, elementwise part, source
_FAMILY = (
    ("glu", "sigmoid(g) * u", "sigmoid", DAUPHIN),
    ("bilinear", "g * u", "linear", SHAZEER),
    ("reglu", "relu(g) * u", "relu", SHAZEER),
    ("geglu", "gelu(g) * u", "gelu", SHAZEER),
    ("geglu_new", "gelu_new(g) * u (tanh form)", "gelu_new", SHAZEER),
    ("swiglu", "silu(g) * u", "silu", SHAZEER),
    ("relu2glu", "relu(g)^2 * u", "relu2", PRIMER),
)


def _entry(name: str, equation: str, gate: str | None, paper: str, formula: Formula | None = None) -> Activation:
    factory = partial(GatedActivation, name)
    return Activation(
        name=name, equation=equation, gate=gate, paper=paper, flags=frozenset({GATED}), factory=factory, formula=formula
    )


def _derive(name: str, gate: str, _: Activation | None) -> Activation:
    """Return ``N_glu``: N(g) * u for any elementwise N that Transformers has now."""
    return _entry(name, f"{gate}(g) * u", gate, SHAZEER)


for _row in _FAMILY:
    registry.add(_entry(*_row))
registry.add(
    _entry("swiglu_oss", "g * sigmoid(1.702 g) * (u + 1), g and u clamped at 7", None, GPT_OSS, formula=swiglu_oss)
)
registry.add_family(
    Derived(
        pattern=f"N{SUFFIX}",
        place="suffix",
        equation="N(g) * u for any elementwise N in ACT2FN",
        paper=SHAZEER,
        derive=_derive,
    )
)
