"""The routers' losses, for any head, loop and Trainer: A, added to the main loss L that trains the model.

They accompany the tensor that holds L: whatever is done to it afterwards (accumulation's division, a GradScaler's
factor, a mean over processes) reaches both alike. For the micro-batches m of a step, the gradient is

    sum_m w_m d(L_m + A_m), where L_m is micro-batch m's mean loss, A_m the mean of its tokens, sum_m w_m = 1;

where L_m is its items' sum over the whole step's count N (``num_items_in_batch``), that is w_m L_m with w_m = n_m / N,
and A_m is given the same w_m. So the z-loss of equal micro-batches is that of the whole batch; the balance loss, which
isn't linear in the tokens, is a mean over the micro-batches that it is taken in.

Who adds them: the model, where it returns a loss (`watch`); Transformers' Trainer and our own loop, where the loss is
computed outside; elsewhere `with_router_losses`. Whether a loss has them is asked of autograd: a model may return one
that nobody trains, as TRL's do beside the tokens' log-probabilities. Their gradient is injected elsewhere (`scale.py`).

Beside a loss outside that nobody has added them to, they weigh what the cross-entropies of the logits in it weigh (see
`cross_entropies`). Where it is made of something else, they weigh 1, right for one mean that is not scaled, and it
is refused where that is known to be wrong: under accumulation, and in float16, which needs a scaled loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_glu.activation.context.finding import find, forget
from hf_glu.activation.context.hooks import CHUNKS, by_name
from hf_glu.activation.context.passes import Asking, end_asking
from hf_glu.compat.of_torch import FORWARD_HOOKS, IGNORED_BY_DDP
from hf_glu.errors import OptionError, TrainingError
from hf_glu.ffn.experts.asked import answer, ask
from hf_glu.ffn.experts.scale import ADD, AddToLoss, Scale
from hf_glu.ffn.experts.shares import ITEMS, cross_entropies, nodes_behind, share, shifts, traced


def watch(model: nn.Module) -> None:
    """Let ``model``, and the models with experts inside of it, add their routers' losses to what they return.

    Does nothing the second time.
    """
    forget(model)
    for part in model.modules():
        inside = part is model or (hasattr(part, "post_init") and any(map(injects, part.modules())))
        if inside and add_router_losses not in FORWARD_HOOKS.of(part).values():
            part.register_forward_pre_hook(reset_losses, with_kwargs=True)
            part.register_forward_hook(add_router_losses, with_kwargs=True, always_call=True)
    # each process counts for itself until the routers add up
    loads = {f"{name}.load" for name, module in model.named_modules() if getattr(module, "load", None) is not None}
    if loads:
        ignored = IGNORED_BY_DDP.of(model, ())
        IGNORED_BY_DDP.put(model, sorted({*ignored, *loads}))


def injects(module: nn.Module) -> bool:
    """Return whether a module injects a loss: it has a `Scale`."""
    return isinstance(module.__dict__.get("scale"), Scale)


def _experts(model: nn.Module) -> list[Any]:
    return find(model, injects)


def reset_losses(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Begin a pass, and forget the last step's losses and scales (not where checkpointing repeats a layer).

    Raises:
        TrainingError: a second micro-batch comes, and nobody has added the routers' losses of the first to its loss.
        OptionError: experts are given parts of the text.
    """
    kwargs = ask(model, kwargs)
    graded = torch.is_grad_enabled()
    found = _experts(model) if model.training or graded else []
    for experts in found if model.training else ():
        if experts.router.steps is not None and not has_gradients(experts):  # once a step of the optimizer
            experts.router.rebalance()
    if not graded:
        return args, kwargs
    for experts in found:
        experts.loss = None
    if not model.training:
        return args, kwargs
    if any(vars(one).get(CHUNKS) and _experts(one) for one in model.modules()):
        raise OptionError(f"experts are trained on whole texts, not on chunks of them: set {CHUNKS} to 0")
    for experts in found:
        refuse_accumulation(experts)
        experts.scale.value = None
    items = kwargs.get(ITEMS)
    return args, kwargs if items is None else {**kwargs, ITEMS: traced(items)}


@torch.compiler.disable
def has_gradients(experts: Any) -> bool:
    """Return whether gradients of an earlier micro-batch wait for a step of the optimizer."""
    return any(bool(each.grad.any()) for each in experts.parameters() if each.grad is not None)


def refuse_accumulation(experts: Any) -> None:
    """Raise where gradients of a pass wait for more whose routers' losses weighed 1, whatever its loss did."""
    experts.scale.alone = experts.scale.alone and has_gradients(experts)
    if experts.scale.alone:
        raise TrainingError(f"the loss of several micro-batches is computed outside of the model: {ADD}")


def add_router_losses(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Add the routers' losses to the loss in ``output``, where there is one to train, and what was asked for."""
    now, trained = end_asking(model), model.training and torch.is_grad_enabled()
    asked = now is not None and bool(now.layers) and now.wanted is not False
    if output is None or not (trained or asked):  # None: the pass was interrupted
        return output
    return _add(model, by_name(model, args, kwargs), output, now if asked else None)


@torch.compiler.disable
def _add(model: nn.Module, inputs: dict[str, Any], output: Any, now: Asking | None) -> Any:
    labels, shifted = inputs.get("shift_labels"), False
    if labels is None:
        labels, shifted = inputs.get("labels"), shifts(model)
    plain = type(output) is tuple and labels is not None  # return_dict=False
    loss = output[0] if plain else getattr(output, "loss", None)
    found, weight = pending(model), cast(Tensor | float, 1.0)
    logits, scales = getattr(output, "logits", None), [experts.scale for experts in found]
    if found and isinstance(logits, Tensor) and logits.requires_grad:  # of which a loss may be made outside
        logits.register_hook(partial(_read, logits.detach(), scales))
    if isinstance(loss, Tensor) and loss.requires_grad and found:
        weight = share(loss, inputs.get(ITEMS), labels, shifted=shifted)
        loss = with_router_losses(loss, model, weight)
        if plain:
            output = (loss, *output[1:])
        else:
            output.loss = loss
    return output if now is None else answer(now, output, loss, weight)


def _read(logits: Tensor, scales: list[Scale], gradient: Tensor) -> None:
    """Let the cross-entropies of ``logits`` in a loss that nobody has added the routers' losses to weigh them."""
    alone = [scale for scale in scales if scale.value is None and scale.default is None]
    weight = cross_entropies(logits, gradient) if alone else None
    for scale in alone:
        scale.value = weight


def pending(model: nn.Module) -> list[Any]:
    """Return the expert FFNs that have a loss of the last pass."""
    return [experts for experts in _experts(model) if experts.loss is not None]


def with_router_losses(loss: Tensor, model: nn.Module, share: Tensor | float = 1.0) -> Tensor:
    """Return a loss that was computed outside of a model, with the losses of its routers in its last pass.

    Divide it by the number of micro-batches, or have it scaled, afterwards. Where autograd leads from ``loss`` to one
    that they were added to, such as the one that the model returned, or the model has no routers, nothing changes.

    Args:
        loss: to train.
        model: with experts, perhaps.
        share: which part of its step's mean loss ``loss`` is: n / N, where it is the sum of n items' losses over the
            step's count N; 1: a mean, of which a step may have several.
    """
    found = _missing(loss, pending(model)) if loss.requires_grad else []
    if not found:
        return loss
    return AddToLoss.apply(loss, share, [experts.scale for experts in found], [experts.loss for experts in found])


def _missing(loss: Tensor, found: list[Any]) -> list[Any]:
    """Return those of the expert FFNs whose losses ``loss`` doesn't have: no node behind it has added them."""
    left = {id(experts.loss): experts for experts in found}
    for node in nodes_behind(loss) if left else ():
        for added in getattr(node, "router_losses", ()):
            left.pop(id(added), None)
        if not left:
            break
    return list(left.values())
