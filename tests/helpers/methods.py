"""The table of methods: every way to change a model's FFNs, with pico models, arguments and what is promised.

The suites in tests/house/test_methods.py run over this table and know no method's name. A new activation, wrapper, mix
or conversion verb has **one row here**, and without one `missing` names it, which fails a test:

- a wrapper or mix, say ``canon_N``: ``"canon": Method(target="canon_{base}", models=EVERY)``, where ``{base}`` is the
  gated activation that a model converts to exactly and ``{dense}`` the elementwise one that it has; with options of its
  config section, ``options={"canon": {...}}`` as well. It is then asked for the same outputs at the start, new
  parameters that are alive within three steps, a fresh process that loads it, nothing done twice, a resumed training,
  chunks with a cache, and the model back;
- another activation, say ``xglu``: a model that it is exact for, ``"xglu": Method(target="xglu", models=("gpt2:x",))``;
- a new verb: ``verb="..."`` where it changes a model by itself, ``then=("...",)`` where it comes after a conversion.

What isn't promised is said in the row: ``start=None`` for a function that changes, ``again=SomeError`` for a verb that
can't be called twice, ``reverts=SomeError`` for what can't be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contexts
import mixers
import torch
from pico import FAMILIES, NATIVE, make_native
from states import ids

import hf_glu
from hf_glu.activation import registry
from hf_glu.config.experts import read_groups
from hf_glu.conversion.experts.native.banks import UNGATED
from hf_glu.errors import ConversionError, NoSiteError

DENSE = tuple(FAMILIES)
GATED = tuple(name for name in NATIVE if name != "mixtral")
MIXERS = tuple(mixers.MODELS)
EVERY = (*DENSE, *GATED, *MIXERS)
FEW = ("bert", "gpt2", "t5", "llama")
TEXTS = ids(16, 12)
SILU = {"llama": "silu", "phi3": "silu", "mixtral": "silu", "t5_v1_1": "gelu_new", "modernbert": "gelu"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to change a model's FFNs.

    Attributes:
        models: what it is tried on: a family's name, ``family:activation`` for one with another activation.
        target: of the verb: an activation's name, a mapping from layers to names, None: the verb has none.
        options: further arguments of the verb. In texts, here and in ``target``, ``{base}`` and ``{dense}`` stand for
            the model's own names.
        verb: a public function of hf_glu that takes the model, or a checkpoint's folder and another one.
        then: further verbs, called with the model alone.
        promise: what the report promises of the function at the start, where ``start`` is given; else ``approximate``.
        start: the row of `comparing.TOLERANCE` that the outputs stay within; None: the function changes.
        again: what calling it (the last of ``then``, where there are some) once more raises; None: it changes nothing.
        reverts: what `hf_glu.revert` raises; None: it gives back the model as it was.
        back: the row of `comparing.TOLERANCE` that the weights it gives back stay within.
        moved: share of each new parameter that three steps move, at least.
        quiet: endings of parameters that three steps may leave as they are.
    """

    models: tuple[str, ...]
    target: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    verb: str = "convert"
    then: tuple[str, ...] = ()
    promise: str = "exact"
    start: str | None = "exact up to rounding"
    again: type[Exception] | None = None
    reverts: type[Exception] | None = None
    back: str = "bitwise"
    moved: float = 0.6
    quiet: tuple[str, ...] = ()

    def carry_out(self, model: Any, name: str, folder: Path) -> tuple[Any, Any]:
        """Change a model; return it (or what loads from the folder that the verb has written) and the report."""
        target = [filled(self.target, name)] if self.target is not None else []
        options = filled(self.options, name)
        if self.verb in ("convert_checkpoint", "convert_stream"):
            model.save_pretrained(folder / "source")
            report = getattr(hf_glu, self.verb)(folder / "source", folder / "converted", *target, **options)
            model = type(model).from_pretrained(folder / "converted").eval()
        else:
            report = getattr(hf_glu, self.verb)(model, *target, **options)
        for verb in self.then:
            self.follow(verb, model)
        return model, report

    def repeat(self, model: Any, name: str, folder: Path) -> tuple[Any, Any]:
        """Do the last thing once more; return what `carry_out` does."""
        if not self.then:
            return self.carry_out(model, name, folder)
        self.follow(self.then[-1], model)
        return model, None

    def follow(self, verb: str, model: Any) -> None:
        """Call a verb of ``then``."""
        getattr(hf_glu, verb)(model, *MORE.get(verb, ()))

    def names(self) -> Iterator[str]:
        """Yield every activation's name that the method is given, on each of its models."""
        for model in self.models:
            target, experts = filled(self.target, model), filled(self.options, model).get("experts")
            yield from target.values() if isinstance(target, dict) else [target] if isinstance(target, str) else []
            if isinstance(experts, str):
                yield from (group.name.removeprefix(UNGATED) for group in read_groups(experts, target))


MORE = {"anneal": (1.0,)}  # verbs of ``then`` that take more than the model


def make(name: str) -> Any:
    """Return a fresh pico model of a family, ``family:activation``."""
    family, _, activation = name.partition(":")
    if activation:
        return FAMILIES[family].make(**{FAMILIES[family].field: activation})
    return make_native(family) if family in NATIVE else contexts.make(family)


def filled(value: Any, name: str) -> Any:
    """Return a row's value with ``{base}`` and ``{dense}`` replaced by a model's own names."""
    family, _, activation = name.partition(":")
    if isinstance(value, Mapping):
        return {key: filled(each, name) for key, each in value.items()}
    if isinstance(value, str):
        dense = activation or (FAMILIES[family].dense if family in FAMILIES else SILU.get(family, "silu"))
        base = f"{activation}_glu" if activation else contexts.target_of(family)
        return value.format(base=base, dense=dense)
    return value


_CALIBRATED = {"calibration": TEXTS}

METHODS = {
    # dense FFNs become gated ones
    "gated": Method(target="{base}", models=DENSE, start="exact"),
    "glu": Method(target="glu", models=("gpt2:sigmoid",)),
    "glu of itself": Method(target="glu", models=("bert:silu",), promise="exact up to rounding"),
    "bilinear": Method(target="bilinear", models=("gpt2:linear",)),
    "reglu": Method(target="reglu", models=("t5", "opt", "gpt2:relu2")),
    "dreglu": Method(target="dreglu", models=("t5", "opt")),
    "geglu": Method(target="geglu", models=("bert", "gpt_neox")),
    "geglu_new": Method(target="geglu_new", models=("gpt2",)),
    "swiglu": Method(target="swiglu", models=("gpt2:silu", "t5:silu")),
    "relu2glu": Method(target="relu2glu", models=("gpt2:relu2",)),
    "swiglu_oss": Method(target="swiglu_oss", models=("bert",), start=None),
    "polynorm": Method(target="polynorm", models=("bert",), start=None, reverts=ConversionError),
    "gated already": Method(target="{base}", models=("llama",), start="bitwise", reverts=NoSiteError),
    "any": Method(target="{dense}_glu", models=("gpt2:mish", "bert:tanh")),
    "approximate": Method(target="swiglu", models=("bert", "gpt2"), start=None, back="exact"),
    "half": Method(target="{base}", models=("bert", "gpt2", "t5"), options={"layers": [1]}),
    "by layer": Method(target={"0": "{base}", "1": "learnable_{base}"}, models=("bert", "gpt2", "t5", "bart")),
    "narrower": Method(
        target="{base}", models=("bert", "gpt2", "t5"), options={"width": "iso", "distill_steps": 2, **_CALIBRATED},
        start=None, reverts=ConversionError,
    ),
    "narrower, wrapped": Method(
        target="modulated_stateful_swiglu", models=("bert",), start=None, reverts=ConversionError,
        options={"width": "iso", "distill_steps": 2, "layers": [1], "state": {"direction": "both"},
                 "context": {"layer": 1, "size": 2}, **_CALIBRATED},
    ),
    # other activations in gated families
    "regated": Method(target="reglu", models=GATED, start=None, reverts=NoSiteError),
    # wrappers and mixes
    "learnable": Method(target="learnable_{base}", models=FEW),
    "learnable, another": Method(target="learnable_swiglu", models=("bert", "t5")),
    "learnable, not gated": Method(target="learnable_relu", models=("bert",), reverts=ConversionError),
    "moa": Method(target="moa_{base}", models=FEW),
    "moa, mixers": Method(target="moa_{base}", models=("Mamba",), promise="exact up to rounding"),
    "stateful": Method(target="stateful_{base}", models=tuple(name for name in (*DENSE, *GATED) if name != "opt")),
    # a decay has a gradient from the second step on, of units that relu left open before and leaves open then: by the
    # draw of the weights, which is another in each Transformers, 0.5 to 0.75 of them
    "stateful, of relu": Method(target="stateful_{base}", models=("opt",), moved=0.4),
    "stateful, mixers": Method(target="stateful_{base}", models=MIXERS, start="bitwise", moved=0.9),
    "stateful, not gated": Method(target="stateful_{dense}", models=("bert",), reverts=ConversionError),
    "modulated": Method(target="modulated_{base}", models=EVERY),
    "canon": Method(target="canon_{base}", models=(*DENSE, *GATED)),
    "canon, longer": Method(target="canon_{base}", models=("gpt2",), options={"canon": {"kernel": 6}}),
    "smear": Method(target="smear_{base}", models=FEW),
    "modulated stateful": Method(target="modulated_stateful_{base}", models=(*FEW, *MIXERS)),
    "all wrappers": Method(target="modulated_canon_smear_stateful_learnable_{base}", models=FEW),
    # experts
    "experts": Method(
        target="{base}", models=("bert", "gpt2", "t5"), options={"experts": "{dense}*2,{base}*2"},
        again=ConversionError, reverts=NoSiteError, quiet=("router.weight",),
    ),
    "gated experts": Method(
        target="swiglu", models=("llama",), options={"experts": 4}, again=ConversionError, reverts=NoSiteError,
        quiet=("router.weight",),
    ),
    "wrapped experts": Method(
        target="modulated_stateful_learnable_{base}", models=FEW, options={"experts": 3}, again=ConversionError,
        reverts=NoSiteError, quiet=("router.weight",),
    ),
    "hearing experts": Method(
        target="kappa_{base}", models=FEW, options={"experts": "kappa_{base}*2,{base}"}, again=ConversionError,
        reverts=NoSiteError, quiet=("router.weight",),
    ),
    "hearing experts of plain ones": Method(
        target="kappa_{base}", models=("bert",), options={"experts": "kappa_{dense}*2"},
        again=ConversionError, reverts=NoSiteError, quiet=("router.weight",),
    ),
    "hearing, wrapped experts": Method(
        target="modulated_canon_stateful_kappa_learnable_{base}", models=("gpt2", "t5"), options={"experts": 2},
        again=ConversionError, reverts=NoSiteError, quiet=("router.weight",),
    ),
    "narrower experts": Method(
        target="modulated_stateful_{base}", models=("bert", "gpt2", "t5"), start=None, again=ConversionError,
        reverts=NoSiteError, quiet=("router.weight", "decay"), options={  # few tokens of a text meet the same expert
            "experts": 4, "width": "iso", "distill_steps": 2, "state": {"decay": [0.5, 0.9]}, "context": {"size": 2},
            **_CALIBRATED,
        },
    ),
    "split": Method(
        verb="split_experts", models=FEW, options={"experts": 4, "top_k": 4, **_CALIBRATED}, again=ConversionError,
        reverts=NoSiteError, quiet=("router.weight",),
    ),
    "banks": Method(
        models=("mixtral",), options={"experts": "silu,learnable_relu"}, again=ConversionError, reverts=NoSiteError
    ),
    "hearing banks": Method(target="kappa_swiglu", models=("mixtral",), again=ConversionError, reverts=NoSiteError),
    "hearing banks, mixed": Method(
        models=("mixtral",), options={"experts": "kappa_learnable_relu,kappa_silu"}, again=ConversionError,
        reverts=NoSiteError,
    ),
    "banks without gates": Method(
        models=("mixtral",), options={"experts": "silu,ungated_silu", **_CALIBRATED}, start=None,
        again=ConversionError, reverts=NoSiteError,
    ),
    "grown banks": Method(
        verb="grow_experts", models=("mixtral",), again=ConversionError, reverts=NoSiteError
    ),
    "grown experts": Method(
        target="{base}", models=FEW, options={"experts": 2}, then=("grow_experts",), again=ConversionError,
        reverts=NoSiteError, quiet=("router.weight",),
    ),
    # after a conversion
    "frozen": Method(
        target="learnable_{base}", models=("bert", "gpt2", "t5"), then=("anneal", "freeze_mix"), again=NoSiteError
    ),
    "taken back": Method(
        target="{base}", models=DENSE, then=("revert",), start="bitwise", again=NoSiteError, reverts=NoSiteError
    ),
    "native": Method(
        target="reglu", models=("t5:relu2",), options={"bias": False}, then=("to_native",), again=NoSiteError,
        reverts=NoSiteError,
    ),
    # folders
    "checkpoint": Method(verb="convert_checkpoint", target="{base}", models=("bert", "t5")),
    "stream": Method(verb="convert_stream", target="{base}", models=("bert", "gpt2")),
}  # fmt: skip
CASES = [(method, model) for method, row in METHODS.items() for model in row.models]

# public names of the rooms that convert, and why they have no row
NO_METHOD = {
    "merge_experts": "makes a new model of several: tests/conversion/test_merging.py",
    "plan": "changes nothing: convert carries it out",
    "sparsify": "leaves entries out, and converts nothing: tests/ffn/test_sparse_linear.py",
    "verify": "compares two folders",
}
ROOMS = ("hf_glu.conversion", "hf_glu.checkpoint")


def verbs() -> set[str]:
    """Return the public functions that convert a model or a checkpoint."""
    homes = {name: getattr(getattr(hf_glu, name), "__module__", "") for name in hf_glu.__all__}
    return {name for name, home in homes.items() if home.startswith(ROOMS)} - set(NO_METHOD)


def missing(methods: Mapping[str, Method]) -> set[str]:
    """Return the entries and families of the registry, and the verbs, that have no row."""
    names = {name for row in methods.values() for name in row.names()}
    affixes, bases = set(), set()
    for reading in filter(None, map(registry.read, names)):
        affixes |= {*reading.wrappers, reading.mix}
        bases.add(reading.base)
    plain = bases - {entry.name for entry in registry}
    suffixed = {f.pattern for f in registry.families if f.place == "suffix" and any(b.endswith(f.affix) for b in plain)}
    found = {entry.name for entry in registry} - bases
    found |= {f.pattern for f in registry.families if f.affix not in affixes} - suffixed
    return found | verbs() - {verb for row in methods.values() for verb in (row.verb, *row.then)}


def awaken(model: Any, seed: int = 1) -> Any:
    """Return the model with everything that starts without effect moved, and its matrices louder."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "backbone" not in name:
                parameter.mul_(3)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()
