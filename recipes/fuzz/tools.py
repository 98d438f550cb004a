"""Ways of asking a function for its values and derivatives, and what may surround it meanwhile.

A tool is given a function of one tensor, the tensor, the parameters that it uses, and a generator for directions; it
returns tensors by label. It is right if it returns the same for two functions that compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[[Tensor], Tensor]
Answers = dict[str, Tensor]
Watched = list[tuple[Tensor, Tensor]]


def _direction(like: Tensor, generator: torch.Generator) -> Tensor:
    # drawn alike for all precisions: bf16 has all of these values
    return torch.randint(-8, 9, like.shape, generator=generator).to(like.dtype) / 4


def _gradients(y: Tensor, wanted: Sequence[Tensor], d: Tensor, **more: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, wanted, d, materialize_grads=True, **more)


def _labelled(what: str, found: Sequence[Tensor]) -> Answers:
    return {f"{what} {'of the input' if k == 0 else f'of parameter {k}'}": each for k, each in enumerate(found)}


def values(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for the value with and without gradients recorded."""
    with torch.no_grad():
        quiet = f(t)
    with torch.inference_mode():
        inference = f(t.detach().clone()).clone()
    return {"value": f(t).detach(), "value without gradients": quiet, "value in inference mode": inference}


def first(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for the gradient of everything."""
    y = f(t)
    kept = y.detach().clone()
    return {"value": kept, **_labelled("gradient", _gradients(y, [t, *parameters], _direction(y, generator)))}


def backward(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Go back through one graph twice, as `retain_graph` allows, and add up."""
    wanted = [t, *parameters]
    for each in wanted:
        each.grad = None
    y = f(t)
    d = _direction(y, generator)
    y.backward(d, retain_graph=True)
    y.backward(d)
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in wanted]
    return {"value": y.detach(), **_labelled("gradient of two passes", found)}


def created(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for the gradient with a graph of its own, and for its gradient."""
    wanted, y = [t, *parameters], f(t)
    once = _gradients(y, wanted, _direction(y, generator), create_graph=True)
    total = sum((each * _direction(each, generator)).sum() for each in once)
    answers = {"value": y.detach(), **_labelled("gradient with create_graph", [each.detach() for each in once])}
    if isinstance(total, Tensor) and total.requires_grad:
        twice = torch.autograd.grad(total, wanted, materialize_grads=True, allow_unused=True)
    else:
        twice = tuple(torch.zeros_like(each) for each in wanted)
    return {**answers, **_labelled("second gradient", twice)}


def one_copy(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask under a hook that keeps one copy of each tensor that is saved."""
    store: dict[Any, tuple[Tensor, Any]] = {}

    def pack(kept: Tensor) -> Any:
        key = (kept.data_ptr(), kept.shape, kept.stride(), kept.dtype)
        store.setdefault(key, (kept.detach().clone(), kept.untyped_storage()))  # so that no other gets its address
        return key

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda key: store[key][0]):
        return first(f, t, parameters, generator)


def offloaded(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask while what is saved lies on a CPU."""
    with torch.autograd.graph.save_on_cpu():
        return first(f, t, parameters, generator)


def recorded(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask under a mode that keeps all results."""
    kept = []

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kept.append(function(*args, **(kwargs or {})))
            return kept[-1]

    with Keep():
        return first(f, t, parameters, generator)


def checkpointed(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for the gradient of what is computed again in the backward pass."""

    def again(t: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(f, t, use_reentrant=False)
        return y

    return first(again, t, parameters, generator)


def batched(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for the gradients in three directions at once."""
    y = f(t)
    d = torch.stack([_direction(y, generator) for _ in range(3)])
    wanted = [t, *parameters]
    found = torch.autograd.grad(y, wanted, d, is_grads_batched=True, allow_unused=True)
    none = [torch.zeros(3, *each.shape, dtype=each.dtype) for each in wanted]
    return _labelled("batched gradient", [z if each is None else each for each, z in zip(found, none, strict=True)])


def vmapped(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for values and gradients of each row by itself."""
    t = t.detach()
    gradient = torch.func.vmap(torch.func.grad(lambda row: f(row).sum()))(t)
    return {"value": torch.func.vmap(f)(t).detach(), "gradient of each row": gradient.detach()}


def forward(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for a derivative in forward mode, both ways."""
    v = _direction(t, generator)
    value, tangent = torch.func.jvp(f, (t.detach(),), (v,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(t, v))).tangent
    dual = torch.zeros_like(value) if dual is None else dual
    return {"value": value.detach(), "tangent": tangent.detach(), "tangent of a dual": dual.detach().clone()}


def jacobian(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
    """Ask for whole Jacobians, in one go."""
    t = t.detach()
    return {
        "Jacobian": torch.autograd.functional.jacobian(f, t, vectorize=True),
        "Jacobian by forward mode": torch.func.jacfwd(f)(t).detach(),
        "Hessian": torch.func.hessian(lambda x: f(x).square().sum())(t).detach(),
    }


# torch can't batch the forward mode of some of its own operators, such as PReLU's on one row after a product
TORCHS_OWN = "Trying to set a forward gradient that has a different size"


def _quotients(check: Callable[..., bool], **more: bool) -> Callable[..., Answers]:
    def tool(f: Function, t: Tensor, parameters: list[Tensor], generator: torch.Generator) -> Answers:
        try:
            try:
                fine = check(f, (t,), **more)
            except RuntimeError as error:
                if TORCHS_OWN not in str(error):
                    raise
                fine = check(f, (t,), **more | {"check_batched_forward_grad": False})
        except RuntimeError as error:  # as torch's own checks say what they found
            raise AssertionError(f"{check.__name__}: {str(error)[:300]}") from error
        return {check.__name__: torch.tensor(float(fine), dtype=t.dtype)}

    return tool


TOOLS: dict[str, Callable[[Function, Tensor, list[Tensor], torch.Generator], Answers]] = {
    "values": values,
    "first": first,
    "backward": backward,
    "create_graph": created,
    "one copy": one_copy,
    "offloaded": offloaded,
    "recorded": recorded,
    "checkpointed": checkpointed,
    "batched": batched,
    "vmap": vmapped,
    "forward": forward,
    "jacobian": jacobian,
    "gradcheck": _quotients(
        torch.autograd.gradcheck, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
    ),
    "gradgradcheck": _quotients(torch.autograd.gradgradcheck, check_batched_grad=True),
}
EXACT = ("gradcheck", "gradgradcheck")  # of float64 alone
SMALL = (*EXACT, "jacobian")
TWICE = ("create_graph", "batched")  # which what keeps tensors by itself has no answer to
FUNCTIONAL = ("vmap", "forward", "jacobian")  # torch.func's: a function of one tensor that keeps nothing


class _NumpyTanh(torch.autograd.Function):
    """A producer whose result torch shares with an array."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = np.tanh(x.detach().numpy())
        return torch.from_numpy(ctx.y)

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Tensor:
        return d[0] * torch.from_numpy(1 - ctx.y**2)


class _KeptSin(torch.autograd.Function):
    """A consumer that keeps its input by itself, not as a saved tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Tensor:
        return d[0] * ctx.x.detach().cos()


def come_from(origin: str, t: Tensor, ours: bool) -> Tensor:
    """Return what an activation is given, of a leaf."""
    if origin == "numpy":
        return _NumpyTanh.apply(t) if ours and t.requires_grad else t.tanh()  # type: ignore[no-any-return]
    return t * 1 if origin == "product" else t


def accompanied(f: Function, x: Tensor, companion: str, ours: bool, watched: Watched) -> Tensor:
    """Return f(x) plus what the companion makes of x."""
    if companion == "alias" and ours:
        alias = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        watched.append((alias, alias.clone()))
    if companion in ("", "alias"):
        return f(x)
    added: Tensor = _KeptSin.apply(x) if companion == "kept" and ours else x.sin()
    return f(x) + added.sum(-1, keepdim=True)
