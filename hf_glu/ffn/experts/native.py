"""Transformers' own banks of experts (Mixtral, Qwen-MoE, OLMoE, gpt-oss, DeepSeek) with an activation for each expert.

The bank stays what it is: its class is subclassed in place, so that its parameters' names, its initialisation and its
place in the family's plans stay. Only the forward is ours: sort once, and give each group of experts its activation.

Not a function registered with Transformers' ``ExpertsInterface``: one is chosen by name for a whole model, by whoever
loads it or calls ``set_experts_implementation``, and any other choice would compute one activation for all experts
without a word. The forward of the class can't be chosen away, and uses public operations of torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation import registry
from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kappa import for_experts
from hf_glu.activation.kernels.autodiff import numbers
from hf_glu.activation.module import OwnedActivation
from hf_glu.activation.stock import elementwise_names, is_elementwise
from hf_glu.compat.of_models import (
    APPLY_GATE,
    EXPERT_PARALLEL,
    HAS_BIAS,
    IS_TRANSPOSED,
    POST_NORM,
    is_concatenated,
)
from hf_glu.compat.of_torch import grouped_mm, is_traced
from hf_glu.config.experts import Group
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import hears, reads_text, unwrapped
from hf_glu.errors import ConversionError, OptionError, UnknownNameError, nearest
from hf_glu.ffn.experts import tracing
from hf_glu.ffn.experts.copies import Copies
from hf_glu.ffn.experts.group import choose_backend
from hf_glu.inplace import InPlace, become

UNGATED = "ungated_"
SLOPE = 1.702


def is_bank(module: nn.Module) -> bool:
    """Return whether a module is one of Transformers' banks of gated experts with 3-D parameters."""
    weights = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    known = all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)
    return known and hasattr(module, IS_TRANSPOSED.name) and hasattr(module, APPLY_GATE.name)


def bank_width(bank: Any) -> int:
    """Return the hidden units of one expert."""
    return int(bank.down_proj.shape[1 if IS_TRANSPOSED.of(bank) else 2])


def inner_gate(name: str) -> tuple[str, bool]:
    """Return the elementwise activation that an expert's name means in a bank, and whether its gate is kept.

    ``relu`` and ``reglu`` are relu(g) * u, ``ungated_relu`` is relu(g).

    Raises:
        UnknownNameError: neither.
        OptionError: one that needs to see sequences, or that sharpens a gate that isn't kept.
    """
    plain = name.removeprefix(UNGATED)
    if hears(plain) and plain != name:
        raise OptionError(f"{name}: an expert without a gate has none for the router to sharpen: use {UNGATED}N alone")
    entry = registry.find(plain)
    if entry is not None and entry.gate is not None:
        plain = entry.gate
    if reads_text(plain):
        raise OptionError(f"a family's own experts see no sequences, which {name} needs: use {unwrapped(plain)}")
    if not is_elementwise(plain):
        raise UnknownNameError(
            f"{name!r} is no gate that a bank of experts can have; {nearest(plain, elementwise_names())}"
        )
    return plain, not name.startswith(UNGATED)


class MixedBank(InPlace, nn.Module):
    """What a bank becomes: out_e(phi_e(g) * u) of each expert e, [g | u] = in_e(x); see `mix_bank`.

    What activations hear of the router (``kappa_``) are the weights ``top_k_weights``.
    Where it has copies of the family's experts, each token goes to one copy of each expert that it is sent to.

    Shapes: T tokens, k experts a token, H hidden size.
    """

    acts: nn.ModuleList
    groups: tuple[Group, ...]
    copies: Copies | None

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return ``[T, H]`` for ``hidden_states`` ``[T, H]``, each with its experts and their weights ``[T, k]``.

        Raises:
            ConversionError: the experts are spread over several processes.
        """
        if is_traced():
            return tracing.native_experts(self, hidden_states, top_k_index, top_k_weights)
        if EXPERT_PARALLEL.of(self, False):
            raise ConversionError("experts with activations of their own can't be spread over processes")
        if not len(hidden_states):
            return hidden_states
        top_k_index, top_k_weights = self.sent(hidden_states, top_k_index, top_k_weights)
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        counts = numbers(torch.bincount(experts, minlength=self.num_experts))
        rows, which = hidden_states[order // top_k_index.shape[1]], experts[order]
        biases = (
            (self.gate_up_proj_bias.flatten(1)[which], self.down_proj_bias[which])
            if HAS_BIAS.of(self)
            else (None, None)
        )
        projected = grouped_linear(rows, self.gate_up_proj, counts, biases[0], transposed=IS_TRANSPOSED.of(self))
        each = iter(counts)
        sizes = [sum(islice(each, group.count)) for group in self.groups]
        said = self.heard(top_k_weights.reshape(-1)[order], which, sizes)
        parts = zip(projected.split(sizes), said, strict=True)
        units = torch.cat([self.gate(number, *part) for number, part in enumerate(parts)])
        out = grouped_linear(units, self.down_proj, counts, biases[1], transposed=IS_TRANSPOSED.of(self))
        if POST_NORM.of(self, False):
            out = self.post_expert_norm(out)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        weighted = out[back].view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def sent(self: Any, x: Tensor, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return which experts tokens ``[T, H]`` go to, and their weights, both ``[T, k]``: of copies, one of each."""
        if self.copies is None:
            return experts, weights
        chosen, factor, _ = self.copies(x, experts)
        return chosen, weights * factor.to(weights.dtype)

    def heard(self: Any, scores: Tensor, experts: Tensor, sizes: list[int]) -> Iterator[Confidence]:
        """Yield what the router says of each group's rows: of them all, ``scores`` and ``experts`` ``[N]``."""
        first = accumulate((group.count for group in self.groups), initial=0)
        for begin, given, whose in zip(first, scores.split(sizes), experts.split(sizes), strict=False):
            yield Confidence(given, whose - begin)

    def gate(self: Any, number: int, projected: Tensor, confidence: Confidence) -> Tensor:
        """Return the units of group ``number``: ``[N, W]`` for ``[N, 2 W]``, of which its router says something."""
        name, act = self.groups[number].name, self.acts[number]
        if hears(name):
            act = partial(act, confidence=confidence)
        return apply_gate(self, act, projected, kept=not name.startswith(UNGATED))


def grouped_linear(x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None, *, transposed: bool) -> Tensor:
    """Return x W_e^T + b for each expert's rows, in the weights' dtype whatever autocast says, as stock banks do.

    Args:
        x: ``[N, in]``, the first ``counts[0]`` rows expert 0's, and so on.
        weight: ``[E, out, in]``, ``[E, in, out]`` where ``transposed``.
        counts: E numbers of rows.
        bias: of each row ``[N, out]``, or None.
        transposed: how the weights lie.
    """
    x, weight = x.to(weight.dtype), weight if transposed else weight.mT
    if choose_backend(x, weight) == "grouped":
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        out = grouped_mm(x, weight, ends)
    else:
        with torch.autocast(x.device.type, enabled=False):
            out = torch.cat([rows @ each for rows, each in zip(x.split(counts), weight, strict=True)])
    return out if bias is None else out + bias


def apply_gate(bank: Any, act: Callable[[Tensor], Tensor], projected: Tensor, *, kept: bool = True) -> Tensor:
    """Return act(g) * u as the bank's family does it: where the halves lie, its clamps, its u + 1."""
    halves = projected.chunk(2, dim=-1) if is_concatenated(bank) else (projected[..., ::2], projected[..., 1::2])
    gate, up = halves
    limit = getattr(bank, "limit", getattr(bank, "swiglu_limit", None))
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    gate = act(gate)
    return gate * (up + 1 if _slope(bank) else up) if kept else gate


def _slope(bank: Any) -> float | None:
    """Return the slope of gpt-oss' gate g sigmoid(slope g) * (u + 1), None in other families."""
    return getattr(bank, "alpha", getattr(bank, "swiglu_alpha", None))


def built_in(bank: Any) -> str | None:
    """Return the activation of a bank that has no module for it, None where it has one."""
    if isinstance(getattr(bank, "act_fn", None), nn.Module):
        return None
    slope = _slope(bank)
    if slope not in (None, SLOPE):
        raise ConversionError(f"this bank's gate g sigmoid({slope} g) has no name")
    return "silu" if slope is None else "quick_gelu"


def check_groups(groups: tuple[Group, ...], count: int) -> None:
    """Raise where ``groups`` can't be the activations of a bank of ``count`` experts."""
    for group in groups:
        inner_gate(group.name)
        if group.width:
            raise OptionError(f"{group.name}:{group.width}: the width of a bank's experts can't be changed")
    given = sum(group.count for group in groups)
    if given != count:
        raise OptionError(f"the bank has {count} experts, and {given} are given activations")


def mix_bank(bank: Any, groups: tuple[Group, ...], mix: dict[str, Any] | None, copies: int = 1) -> None:
    """Give the experts of a bank activations of their own, in place, and make so many ``copies`` of each.

    Where the family reads no activation from its config (gpt-oss), the bias of its in-projection is kept as ``[E, W,
    2]``: stock Transformers, which would compute something else, then refuses the checkpoint.

    Raises:
        OptionError, UnknownNameError: see `check_groups`.
        ConversionError: nothing could tell stock Transformers of it.
    """
    check_groups(groups, copies * len(bank.down_proj))
    silent = built_in(bank) is not None
    if silent and not HAS_BIAS.of(bank):
        raise ConversionError(
            f"{type(bank).__name__} reads no activation from its config: nothing could tell stock Transformers of it"
        )
    bank.groups = groups
    bank.acts = nn.ModuleList(build_gate(group, bank_width(bank), GluConfig(mix=mix)) for group in groups)
    if silent:
        bias = bank.gate_up_proj_bias
        bank.gate_up_proj_bias = nn.Parameter(bias.detach().unflatten(1, (-1, 2)), requires_grad=bias.requires_grad)
    bank.acts.to(device=bank.down_proj.device, dtype=bank.down_proj.dtype)
    bank.copies = None
    become(bank, MixedBank)
    if copies > 1:
        copy_experts(bank, copies)


def copy_experts(bank: Any, copies: int, owner: Tensor | None = None) -> None:
    """Copy each expert of a bank of ours, whose groups say all copies already, and give it their router, in place.

    Args:
        bank: the bank.
        copies: of an expert, on the mean.
        owner: whose copy each is, in the experts' order; None: as many of each.
    """
    count, down = len(bank.down_proj), bank.down_proj
    with torch.device(down.device):
        bank.copies = Copies(down.shape[2 if IS_TRANSPOSED.of(bank) else 1], count, copies).to(down.dtype)
    if owner is not None:
        bank.copies.owner = owner.to(down.device)
    bank.copies.weight.requires_grad_(any(part.requires_grad for part in bank.parameters(recurse=False)))
    repeat_rows(bank, count, copies, owner)
    bank.num_experts = count * copies


def repeat_rows(module: nn.Module, count: int, copies: int, owner: Tensor | None = None) -> None:
    """Give a module new tensors in the places of its own with ``count`` rows: each row so many times, or by owner."""
    for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if old.ndim and len(old) == count:
            rows = old.detach()
            new = rows.repeat_interleave(copies, 0) if owner is None else rows[owner.to(rows.device)]
            put_rows(module, name, old, new)


def put_rows(module: nn.Module, name: str, old: Tensor, rows: Tensor) -> None:
    """Give a module ``rows`` under a name: a parameter, trained or not, as ``old`` is one; else a buffer."""
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(rows, requires_grad=old.requires_grad) if is_parameter else rows)


def build_gate(group: Group, width: int, options: GluConfig) -> nn.Module:
    """Return the activation of a bank's experts of one group, each of ``width`` units."""
    act = build_elementwise(inner_gate(group.name)[0])
    if hears(group.name):
        for_experts(act, group.count)
    if isinstance(act, OwnedActivation):
        act.configure(options, width)
    return act
