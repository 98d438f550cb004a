"""What hf_glu uses of torch without torch's promise to keep it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as every_module

from hf_glu.compat.private import Private

SEEN = "2.6 to 2.14"
_MODULE, _TENSOR = "torch.nn:Module()", "torch:Tensor"
_HOOKS = "knowing whether a module computes what its class says"
_GATES = "training one half of a gated projection"
_READING = "activations that read the text"

CHILDREN = Private(where=_MODULE, name="_modules", seen=SEEN, need="finding a model's activations again in each pass")
OWN_PARAMETERS = Private(where=_MODULE, name="_parameters", seen=SEEN, need="converting a model")
FORWARD_HOOKS = Private(where=_MODULE, name="_forward_hooks", seen=SEEN, need=_HOOKS)
FORWARD_PRE_HOOKS = Private(where=_MODULE, name="_forward_pre_hooks", seen=SEEN, need=_HOOKS)
BACKWARD_HOOKS = Private(where=_MODULE, name="_backward_hooks", seen=SEEN, need=_HOOKS)
BACKWARD_PRE_HOOKS = Private(where=_MODULE, name="_backward_pre_hooks", seen=SEEN, need=_HOOKS)
HOOKS = (FORWARD_HOOKS, FORWARD_PRE_HOOKS, BACKWARD_HOOKS, BACKWARD_PRE_HOOKS)
WITH_KWARGS = Private(where=_MODULE, name="_forward_pre_hooks_with_kwargs", seen=SEEN, need=_READING)
ALWAYS_CALLED = Private(where=_MODULE, name="_forward_hooks_always_called", seen=SEEN, need=_READING)
COMPILED_CALL = Private(where=_MODULE, name="_compiled_call_impl", seen=SEEN, need="training a compiled model")
GLOBAL_HOOKS = tuple(
    Private(where="torch.nn.modules.module", name=f"_global_{when}_hooks", seen=SEEN, need=_HOOKS)
    for when in ("forward", "forward_pre", "backward", "backward_pre")
)
VERSION = Private(where=_TENSOR, name="_version", seen=SEEN, need="sparse FFNs of weights that change")
TENSOR_HOOKS = Private(where=_TENSOR, name="_backward_hooks", seen=SEEN, need=_GATES)
GRAPH_TASK = Private(where="torch._C", name="_current_graph_task_id", seen=SEEN, need="telling a recomputation")
TRANSFORMS = Private(
    where="torch._C", name="_are_functorch_transforms_active", seen=SEEN, need="transforms of torch.func"
)
BATCHED = Private(where="torch._C._functorch", name="is_legacy_batchedtensor", seen=SEEN, need="batched gradients")
MULTIPLY_ADD = Private(where="torch", name="_foreach_addcmul_", seen=SEEN, need="the scan of stateful gates on a CPU")
CHECK = Private(where="torch", name="_check", seen=SEEN, need="exporting stateful gates")
FLAT_PARAMETER = Private(
    where="torch.distributed.fsdp._flat_param", name="_flat_param", seen=SEEN, mark=True,
    need="telling a model that FSDP has sharded", otherwise="such a model isn't told",
)  # fmt: skip
IGNORED_BY_DDP = Private(
    where="torch.nn.parallel.distributed", name="_ddp_params_and_buffers_to_ignore", seen=SEEN, mark=True,
    need="counting experts' loads in each process", otherwise="DDP gives all processes the first one's counts",
)  # fmt: skip
COMPILER = Private(
    where="torch._inductor.cpp_builder", name="get_cpp_compiler", seen=SEEN,
    need="kernels on a CPU (hf_glu.fuse, hf_glu.sparsify)",
)  # fmt: skip
NO_COMPILER = Private(where="torch._inductor.exc", name="InvalidCxxCompiler", seen=SEEN, need="hf_glu.fuse on a CPU")
FAST_BF16 = Private(
    where="torch:ops.mkldnn", name="_is_mkldnn_bf16_supported", seen=SEEN,
    need="choosing bfloat16 on a CPU", otherwise="float32 is chosen",
)  # fmt: skip
GROUPED_MM = Private(
    where="torch.nn.functional", name="grouped_mm", seen="2.10 to 2.14",
    need="experts with backend='grouped'", otherwise="experts are a loop",
)  # fmt: skip
MUON = Private(where="torch.optim", name="Muon", seen="2.9 to 2.14", need="hf_glu.muon")
MUON_GROUP = Private(where="torch.optim:Muon", name="_init_group", seen="2.9 to 2.14", need="hf_glu.muon")
IS_EXPORTING = Private(
    where="torch.compiler", name="is_exporting", seen="2.7 to 2.14", need="exporting a graph of stateful gates"
)
PYTREE_CONSTANT = Private(
    where="torch.utils._pytree", name="register_constant", seen="2.7 to 2.14",
    need="torchao from 0.17 on (beside torch 2.6: torchao 0.16)",
    otherwise="beside torchao 0.17 or newer Transformers isn't imported: pip install torchao==0.16.0",
)  # fmt: skip

_FORMULA = "the formula is computed by plain operations"
_KERNELS = "gates that keep less for the backward pass"
OPERATORS = tuple(
    Private(where=f"torch:ops.aten.{operator}", name=name, seen=SEEN, need=_KERNELS, otherwise=_FORMULA)
    for operator, name in (
        ("gelu", "out"),
        ("gelu_backward", "default"),
        ("gelu_backward", "grad_input"),
        ("silu", "out"),
        ("silu_backward", "grad_input"),
        ("threshold_backward", "grad_input"),
        ("tanh_backward", "grad_input"),
        ("sigmoid_backward", "default"),
        ("sigmoid_backward", "grad_input"),
    )
)
aten = torch.ops.aten  # which looks an operator up when it is named


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody hooks a module; so it is, too, in a torch that doesn't tell."""
    for hooks in HOOKS:  # each forward asks, of each layer: no calls in Python
        if getattr(module, hooks.name, True):
            return True
    return False


def has_global_hooks() -> bool:
    """Return whether somebody hooks all modules; so it is, too, in a torch that doesn't tell."""
    for hooks in GLOBAL_HOOKS:
        if getattr(every_module, hooks.name, True):
            return True
    return False


def is_exporting() -> bool:
    """Return whether torch.export is at work; False in a torch that doesn't tell, where nothing is exported."""
    return bool(torch.compiler.is_exporting()) if hasattr(torch.compiler, "is_exporting") else False


def is_traced() -> bool:
    """Return whether a graph is being written down: control flow would be that of the example."""
    return bool(torch.jit.is_tracing()) or is_exporting()


def has_operators() -> bool:
    """Return whether torch has all the `OPERATORS`."""
    return all(operator.is_present() for operator in OPERATORS)


def has_grouped_mm(device: str) -> bool:
    """Return whether torch has a grouped product of any matrices; on CPUs 2.10's takes no memory-mapped ones."""
    return hasattr(functional, GROUPED_MM.name) and (device != "cpu" or torch.__version__ >= "2.11")


def grouped_mm(x: Any, weights: Any, ends: Any) -> Any:
    """Return the product of each group of rows ``[N, K]``, up to its end, with its own matrix of ``[E, K, M]``."""
    if not hasattr(functional, GROUPED_MM.name):
        raise GROUPED_MM.missing()
    return functional.grouped_mm(x, weights, offs=ends)
