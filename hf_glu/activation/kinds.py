"""All activations that hf_glu brings, as data: importing this fills the registry.

They drive the tests, the table in the README and ``hf-glu activations``, which waits for neither torch nor
Transformers: what computes is named as ``module:name``, and imported when one is built.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hf_glu.activation.families import Later, Mixes, Wrapper, gated
from hf_glu.activation.kernels.special import dreglu, swiglu_oss
from hf_glu.config.canon import CanonOptions
from hf_glu.config.context import ContextOptions
from hf_glu.config.kinds import Activation, Derived, Formula, Kind, refuse_lookahead
from hf_glu.config.registry import ADAPTIVE, GATED, KAPPA, LEARNABLE, MODULATED, NORMED, registry
from hf_glu.config.smear import SmearOptions
from hf_glu.config.state import StateOptions

SUFFIX = "_glu"
_DAUPHIN = "Dauphin et al. 2016, https://arxiv.org/abs/1612.08083"
_SHAZEER = "Shazeer 2020, https://arxiv.org/abs/2002.05202"
_PRIMER = "So et al. 2021 (Primer), https://arxiv.org/abs/2109.08668"
_GPT_OSS = "OpenAI 2025 (gpt-oss), https://arxiv.org/abs/2508.10925"
_POLYCOM = "Zhuo et al. 2024 (PolyCom), https://arxiv.org/abs/2411.03884"
_TURBO = "Song et al. 2024 (TurboSparse), https://arxiv.org/abs/2406.05955"
_MIXES = "Learnable Activations, https://arxiv.org/abs/2605.26647"

# name, equation, elementwise part, source
_GATED = (
    ("glu", "sigmoid(g) * u", "sigmoid", _DAUPHIN),
    ("bilinear", "g * u", "linear", _SHAZEER),
    ("reglu", "relu(g) * u", "relu", _SHAZEER),
    ("geglu", "gelu(g) * u", "gelu", _SHAZEER),
    ("geglu_new", "gelu_new(g) * u (tanh form)", "gelu_new", _SHAZEER),
    ("swiglu", "silu(g) * u", "silu", _SHAZEER),
    ("relu2glu", "relu(g)^2 * u", "relu2", _PRIMER),
    ("dreglu", "relu(g) * relu(u)", None, _TURBO, dreglu),
    ("swiglu_oss", "g * sigmoid(1.702 g) * (u + 1), g and u clamped at 7", None, _GPT_OSS, swiglu_oss),
)

FAMILIES = (
    Mixes(
        prefix="learnable_",
        coefficient="a_k",
        note="a trained",
        paper=_MIXES,
        flags=frozenset({LEARNABLE}),
        kind=Kind(flag=LEARNABLE, trait="The activation mixes {functions} with trainable coefficients."),
        options={"functions": None, "per": "layer"},
        make=Later("hf_glu.activation.learnable:LearnableMix"),
    ),
    Mixes(
        prefix="moa_",
        coefficient="a_k(g)",
        note="a of each token",
        paper=_MIXES,
        flags=frozenset({LEARNABLE, ADAPTIVE}),
        kind=Kind(flag=ADAPTIVE, trait="The mix depends on the token."),
        options={"functions": None, "per": "layer", "gate": "softmax", "rank": None},
        make=Later("hf_glu.activation.moa:TokenMix"),
    ),
    Wrapper(
        order=0,
        equation="slope (g - threshold)",
        paper="hf_glu; cf. NGT, https://arxiv.org/abs/2305.03232",
        shift=Later("hf_glu.activation.modulated:Modulation"),
        kind=Kind(
            flag=MODULATED,
            trait="A context vector, the same for all layers, sets threshold and slope of each gate.",
            section=ContextOptions,
            parts=Later("hf_glu.activation.modulated:source_parts"),
            curves=Later("hf_glu.activation.modulated:curves"),
        ),
    ),
    Wrapper(
        order=4,
        equation="z = g + sum_i w_i g[t - i]",
        paper="Allen-Zhu 2025 (Canon layers), https://arxiv.org/abs/2512.17351",
        shift=Later("hf_glu.activation.canon:Convolution"),
        kind=Kind(
            flag="canon",
            trait="Each gate sees the tokens before: a short convolution of its pre-activations is added to them.",
            section=CanonOptions,
            check=refuse_lookahead,
            curves=Later("hf_glu.activation.canon:curves"),
        ),
    ),
    Wrapper(
        order=6,
        equation="z = g + a sigmoid(v g + c) g[t - 1]",
        paper="cf. smeared keys, Olsson et al. 2022, https://arxiv.org/abs/2209.11895",
        shift=Later("hf_glu.activation.smear:Smear"),
        kind=Kind(
            flag="smear",
            trait="Each gate sees the token before: a learned part of its pre-activation is added.",
            section=SmearOptions,
            check=refuse_lookahead,
            curves=Later("hf_glu.activation.smear:curves"),
        ),
    ),
    Wrapper(
        order=10,
        equation="z = g + alpha s + beta (sigmoid(g) - s)",
        paper="hf_glu",
        shift=Later("hf_glu.activation.stateful:Memory"),
        kind=Kind(
            flag="stateful",
            trait="Each gate remembers how open it was: a running mean over the tokens before shifts it.",
            section=StateOptions,
            check=refuse_lookahead,
            curves=Later("hf_glu.activation.stateful:curves"),
        ),
    ),
    Wrapper(  # the innermost: it is the slope of N itself, and states are of what they would be without it
        order=20,
        equation="z = (1 + a r) g, r the router's score",
        paper="cf. kappa-SwiGLU, Li et al. 2026, https://arxiv.org/abs/2606.00761",
        shift=Later("hf_glu.activation.kappa:Sharpness"),
        kind=Kind(
            flag=KAPPA,
            trait="In an expert, how sure the router is of it sets the slope of each gate.",
            curves=Later("hf_glu.activation.kappa:curves"),
        ),
    ),
)


def _entry(name: str, equation: str, gate: str | None, paper: str, formula: Formula | None = None) -> Activation:
    return Activation(
        name=name, equation=equation, gate=gate, paper=paper, flags=frozenset({GATED}), factory=partial(gated, name),
        formula=formula,
    )  # fmt: skip


def _derive(name: str, gate: str, entry: Activation | None) -> Activation:
    """Return ``N_glu``: N(g) * u for any N without a gate that Transformers, or the registry, has now."""
    made = _entry(name, f"{gate}(g) * u", gate, _SHAZEER)
    return replace(made, flags=made.flags | {NORMED}) if entry is not None and NORMED in entry.flags else made


for _row in _GATED:
    registry.add(_entry(*_row))
registry.add(
    Activation(
        name="polynorm", equation="a_1 x / rms(x) + a_2 x^2 / rms(x^2) + a_3 x^3 / rms(x^3) + b", paper=_POLYCOM,
        flags=frozenset({NORMED}), factory=Later("hf_glu.activation.polynorm:PolyNorm"),
    )
)  # fmt: skip
registry.add_family(
    Derived(
        pattern=f"N{SUFFIX}", place="suffix", equation="N(g) * u for any elementwise N in ACT2FN", paper=_SHAZEER,
        derive=_derive,
    )
)  # fmt: skip
for _family in FAMILIES:
    registry.add_family(_family.derived())
