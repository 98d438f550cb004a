"""Router logits for whoever asks for them by ``output_router_logits``, in the call or the config, as of Mixtral's.

A base model's output has ``router_logits``, a tensor ``[T, E]`` for each run of a layer with experts, in that order (an
encoder's, then its decoder's). A head's has ``aux_loss``, too: Mixtral's balance loss, over the logits of all layers,

    E sum_e f_e P_e, f_e the share of tokens with e among their k best (their sum is k), P_e the mean softmax score,

where padding doesn't count (Switch, https://arxiv.org/abs/2101.03961). It takes the place of each layer's own balance
loss. Its coefficient is the config's ``router_aux_loss_coef``; with labels the head's loss has it. Whatever brings an
``aux_loss`` of its own, as TRL's fused head, adds it itself.

What one call asks for holds for all models inside of it. Layers of different numbers of experts, which one such loss
can't compare, are refused where a head would need it.

Shapes: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from hf_glu.activation.context.passes import Asking, asking, begin_asking, current_pass
from hf_glu.config.router_fields import ASKED, coefficient_in, has_own
from hf_glu.errors import OptionError, TrainingError
from hf_glu.ffn.experts.router import Routing
from hf_glu.ffn.experts.shares import depends_on

LOGITS, LOSS = "router_logits", "aux_loss"


@dataclass(frozen=True)
class RouterLogits:
    """What one run of a layer tells.

    Attributes:
        logits: ``[T, E]``.
        counts: which tokens are no padding, ``[T]``; None: all count.
        top_k: k.
        balance: the coefficient where no config says one.
        experts: which experts were used ``[T, k]``, where logits don't tell: of copies; None: the k best.
    """

    logits: Tensor
    counts: Tensor | None
    top_k: int
    balance: float
    experts: Tensor | None = None


def ask(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Begin a pass of ``model``, and return its arguments without what its forward doesn't know."""
    outer, config = asking(), getattr(model, "config", None)
    given, native = kwargs.get(ASKED), has_own(config, ASKED)
    wanted = given
    if wanted is None:
        wanted = getattr(config, ASKED, None) if outer is None or outer.wanted is None else outer.wanted
    known = None if outer is None else outer.coefficient
    coefficient = coefficient_in(config) if known is None else known
    graded = torch.is_grad_enabled() if outer is None else outer.graded
    begin_asking(Asking(model, False if native else wanted, coefficient, graded))
    head = getattr(model, "base_model", model) is not model  # which hands it on
    if ASKED not in kwargs or native or (head and _takes(type(model).forward)):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != ASKED}


@lru_cache(maxsize=256)
def _takes(forward: Callable[..., Any]) -> bool:
    """Return whether a forward takes the question and hands it on, or any argument."""
    parameters = inspect.signature(forward).parameters
    return ASKED in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def keeps_losses() -> bool:
    """Return whether a layer's loss is one to train: not of a pass without gradients, nor of a layer computed again."""
    now = asking()
    return current_pass() is None if now is None else now.graded


def note_logits(router: Any, routing: Routing) -> None:
    """Note a router's logits where the pass is asked for them.

    Raises:
        TrainingError: they would have no gradient.
    """
    now = asking()
    if now is None or not now.wanted:
        return
    if now.graded and not torch.is_grad_enabled():
        raise TrainingError(
            f"{ASKED}: reentrant gradient checkpointing gives router logits no gradient: "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    logits, experts = routing.logits, None if router.copies is None else routing.experts
    counts, options = router.counts(len(logits)), router.options
    now.layers.append(RouterLogits(logits, counts, options.top_k, options.balance, experts))


def balance_loss(layers: list[RouterLogits]) -> Tensor:
    """Return the balance loss over all layers, before its coefficient.

    Raises:
        OptionError: the layers have different numbers of experts.
    """
    kinds = {(layer.logits.shape[-1], layer.top_k) for layer in layers}
    if len(kinds) > 1:
        listed = ", ".join(f"{top_k} of {count}" for count, top_k in sorted(kinds))
        raise OptionError(f"one balance loss can't compare layers that use {listed} experts: {ASKED}=False")
    first = layers[0].logits
    used, scored, total = (first.new_zeros(()) for _ in range(3))
    for layer in layers:
        scores = layer.logits.softmax(-1).to(first)
        experts = scores.topk(layer.top_k).indices if layer.experts is None else layer.experts.to(scores.device)
        chosen = functional.one_hot(experts, scores.shape[-1]).sum(1).to(scores)
        counts = scores.new_ones(len(scores)) if layer.counts is None else layer.counts.to(scores)
        weights = counts.unsqueeze(1)  # no product of matrices, which autocast would round
        used, scored = used + (weights * chosen).sum(0), scored + (weights * scores).sum(0)
        total = total + counts.sum()
    total = total.clamp_min(1)
    return first.shape[-1] * (used / total * (scored / total)).sum()


def answer(now: Asking, output: Any, loss: Tensor | None, weight: Tensor | float) -> Any:
    """Return the output with the router logits and, of a head, with the balance loss, alone and in its loss.

    Args:
        now: the pass, which has ended.
        output: of the model.
        loss: in it, None: there is none.
        weight: which part of its step's mean loss ``loss`` is.

    Raises:
        OptionError: the output is a tuple, in which nobody would find them.
    """
    if now.outer is not None:
        now.outer.layers += now.layers
        now.outer.added = now.added
    if isinstance(output, tuple):
        if now.outer is None:
            raise OptionError(f"{ASKED}: a tuple has no place for router logits: return_dict=True, or {ASKED}=False")
        return output
    if getattr(output, LOSS, None) is not None:
        return output
    more: dict[str, Any] = {LOGITS: tuple(layer.logits for layer in now.layers)}
    if hasattr(output, "loss"):
        aux = more[LOSS] = balance_loss(now.layers)
        if isinstance(loss, Tensor) and not _has(loss, now.added):
            coefficient = now.layers[0].balance if now.coefficient is None else now.coefficient
            more["loss"] = loss + (weight * coefficient * aux).to(loss)
            if now.outer is not None:
                now.outer.added = aux
    if isinstance(output, ModelOutput):
        kind: Any = type(output)
        return _with_room(kind, *(name for name in (LOSS, LOGITS) if name in more))(**{**output, **more})
    for name, value in more.items():
        setattr(output, name, value)
    return output


def _has(loss: Tensor, added: Tensor | None) -> bool:
    """Return whether a model inside has added the balance loss; without gradients: to any loss."""
    if added is None or not (loss.requires_grad and added.requires_grad):
        return added is not None
    return depends_on(loss, added)


@lru_cache(maxsize=256)
def _with_room(kind: Any, *names: str) -> Any:
    """Return a class of outputs that has fields of these names, too: ``kind`` itself, or one like it."""
    known = {each.name for each in fields(kind)}
    new = [(name, Any, field(default=None)) for name in names if name not in known]
    named = {"__module__": __name__}
    return make_dataclass(f"{kind.__name__}OfExperts", new, bases=(kind,), namespace=named) if new else kind
