"""Tools that put other code in the place of a model's FFNs; where one isn't installed, a fake that does what it does.

Each function is given what makes a model, and a folder; it returns what the model computes under the tool, and without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
from ecosystem import Make, answers, saved
from torch import nn
from torch.nn import functional
from transformers import fusion_mapping, monkey_patching
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

MLPS = (modeling_llama.LlamaMLP, GPTNeoXMLP, modeling_mixtral.MixtralExperts)


def hard_coded(self: Any, x: Any, *more: Any, **named: Any) -> Any:
    """Compute an FFN as a kernel for SwiGLU does, whatever activation stands in the module."""
    if hasattr(self, "gate_proj"):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
    if hasattr(self, "dense_h_to_4h"):
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(functional.silu(gate) * up)
    index, weights = more
    out = torch.zeros_like(x)
    for expert in range(len(self.gate_up_proj)):
        gate, up = (x @ self.gate_up_proj[expert].T).chunk(2, -1)
        share = (weights * (index == expert)).sum(-1, keepdim=True)
        out = out + share * ((functional.silu(gate) * up) @ self.down_proj[expert].T)
    return out


@contextmanager
def module_of(name: str, **members: Any) -> Iterator[Any]:
    """Import a module of a library that isn't installed, as the plugin meets it: its hooks run."""
    import importlib
    from importlib.machinery import ModuleSpec

    class Finder:
        def find_spec(self, asked: str, *_: Any) -> ModuleSpec | None:
            return ModuleSpec(asked, self, is_package=asked != name) if f"{name}.".startswith(f"{asked}.") else None

        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            if module.__name__ == name:
                vars(module).update(members)

    finder, before = Finder(), dict(sys.modules)
    sys.meta_path.append(finder)  # after that of the plugin's hooks
    try:
        yield importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for each in set(sys.modules) - set(before):
            if each.partition(".")[0] == name.partition(".")[0]:
                del sys.modules[each]
        hooks_forget(name)


def hooks_forget(name: str) -> None:
    """Let the plugin meet a module of this name anew."""
    import hf_glu.plugin as plugin

    if (patches := plugin._patches.pop(name, None)) is not None:
        patches.undo()
    plugin._hooked.discard(name)
    plugin.register()


def kernelized(make: Make, folder: Path) -> tuple[Any, Any]:
    """``kernels.kernelize``: modules whose class names a layer of the Hub get its forward."""

    def kernelize_layer(module: nn.Module, **_: Any) -> None:
        module.forward = MethodType(hard_coded, module)

    def kernelize(model: nn.Module) -> nn.Module:
        for _, module in model.named_modules():
            if hasattr(type(module), "kernel_layer_name"):
                library.kernelize_layer(module, mode="inference")
        return model

    model = make()
    expected = answers(model)
    for mlp in MLPS:
        mlp.kernel_layer_name = "SwiGLUMLP"  # what @use_kernel_forward_from_hub does
    try:
        with module_of("kernels.layer.kernelize", kernelize_layer=kernelize_layer) as library:
            return answers(kernelize(model)), expected
    finally:
        for mlp in MLPS:
            del mlp.kernel_layer_name


def liger_on_a_model(make: Make, folder: Path) -> tuple[Any, Any]:
    """``use_liger_kernel``: Liger binds its own forward to each FFN of a model."""

    def _bind_method_to_module(module: nn.Module, method_name: str, new_method: Any) -> None:
        module.__dict__[method_name] = new_method.__get__(module, module.__class__)

    def _apply_liger_kernel_to_instance(model: Any) -> None:
        for layer in model.base_model.layers:
            ffn = layer.mlp.experts if isinstance(layer.mlp, modeling_mixtral.MixtralSparseMoeBlock) else layer.mlp
            library._bind_method_to_module(ffn, "forward", hard_coded)
            library._bind_method_to_module(ffn, "_get_name", lambda self: "LigerSwiGLUMLP")

    model = make()
    expected = answers(model)
    name = "liger_kernel.transformers.monkey_patch"
    with module_of(name, _bind_method_to_module=_bind_method_to_module) as library:
        _apply_liger_kernel_to_instance(model)
    return answers(model), expected


class LigerSwiGLUMLP(nn.Module):
    """A class for an FFN that looks at the activation's name, as Liger's for SwiGLU does."""

    strict = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        if self.strict and config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"Activation function {config.hidden_act} not supported.")

    forward = hard_coded


class LigerGEGLUMLP(LigerSwiGLUMLP):
    """One that doesn't, as Liger's for GeGLU."""

    __module__ = "liger_kernel.transformers.geglu"
    strict = False


def _before_building(make: Make, folder: Path, other: type[nn.Module]) -> tuple[Any, Any]:
    expected = answers(model := make())
    plain = modeling_llama.LlamaMLP
    modeling_llama.LlamaMLP = other
    try:
        return answers(type(model).from_pretrained(saved(model, folder)).eval()), expected
    finally:
        modeling_llama.LlamaMLP = plain


def liger_classes(make: Make, folder: Path) -> tuple[Any, Any]:
    """``apply_liger_kernel_to_llama()`` before building: another class, which looks at the activation's name."""
    return _before_building(make, folder, LigerSwiGLUMLP)


def liger_careless_classes(make: Make, folder: Path) -> tuple[Any, Any]:
    """The same for GeGLU, whose class looks at nothing."""
    return _before_building(make, folder, LigerGEGLUMLP)


class FusedFFN(fusion_mapping.ModuleFusionSpec):
    """A fusion of FFNs, as ``fusion_config`` asks for one."""

    def is_fusable(self, module: nn.Module) -> bool:
        return type(module) in MLPS

    def make_fused_class(self, original_cls: type[nn.Module]) -> type[nn.Module]:
        return type(f"Fused{original_cls.__name__}", (original_cls,), {"forward": hard_coded, "__module__": __name__})

    def make_transforms(self, config: Any) -> list[Any]:
        return []


def fused(make: Make, folder: Path) -> tuple[Any, Any]:
    """``from_pretrained(fusion_config=...)``: a fusion puts a subclass in the FFN's place."""
    expected = answers(model := make())
    fusion_mapping._FUSION_REGISTRY["ffn"] = FusedFFN()
    places = [(sys.modules[mlp.__module__], mlp) for mlp in MLPS]
    try:
        found = type(model).from_pretrained(saved(model, folder), fusion_config={"ffn": True}).eval()
        return answers(found), expected
    finally:
        for module, mlp in places:  # which Transformers leaves patched where building fails
            setattr(module, mlp.__name__, mlp)
        del fusion_mapping._FUSION_REGISTRY["ffn"]
        fusion_mapping._FUSION_DISCOVERY_CACHE.pop("ffn", None)
        monkey_patching.clear_patch_mapping()


class Bridge(nn.Module):
    """What a wrapper puts around every module: it hooks what goes in and out, and calls what it holds."""

    def __init__(self, original_component: nn.Module) -> None:
        super().__init__()
        self.original_component = original_component
        self.seen = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original_component"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return self.original_component(*args, **kwargs)


def bridged(make: Make, folder: Path) -> tuple[Any, Any]:
    """TransformerBridge: every attention, norm and FFN of every layer stands in a wrapper."""
    expected = answers(model := make())
    bridges = []
    for layer in model.base_model.layers:
        for name, child in list(layer.named_children()):
            setattr(layer, name, bridge := Bridge(child))
            bridges.append(bridge)
    found = answers(model)
    assert all(bridge.seen for bridge in bridges)
    return found, expected


def traced(make: Make, folder: Path) -> tuple[Any, Any]:
    """Nnsight: hooks on every module that read what comes out, and may put something else in its place."""
    expected = answers(model := make())
    seen: set[str] = set()

    def intervene(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            seen.add(name)
            return output.clone() if isinstance(output, torch.Tensor) else output

        return hook

    handles = [module.register_forward_hook(intervene(name)) for name, module in model.named_modules()]
    found = answers(model)
    assert len(seen) > 10
    for handle in handles:
        handle.remove()
    return found, expected
