"""A group of experts that share an activation: their weights as one 3-D parameter, computed group by group.

Shapes: N token-expert pairs sorted by expert, E experts of the group, H hidden size, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, starmap

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation import registry
from hf_glu.activation.context.confidence import Confidence
from hf_glu.activation.context.routed import told
from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kappa import for_experts, response_of
from hf_glu.activation.kernels.autodiff import needs_formula, numbers
from hf_glu.activation.kernels.known import is_bare
from hf_glu.activation.kernels.spans import spans_of
from hf_glu.activation.module import OwnedActivation, OwnedModule, is_recomputable
from hf_glu.compat.of_torch import grouped_mm, has_grouped_mm
from hf_glu.config.experts import ExpertOptions, Group
from hf_glu.config.glu import GluConfig
from hf_glu.config.registry import GATED, KAPPA, hears, reads_text
from hf_glu.errors import OptionError, shown
from hf_glu.ffn.experts.loop import ExpertLoop, linear, plain_loop

STD = 0.02
ALIGNMENT = 16  # bytes of a row: torch's grouped GEMM wants no less


def build_activation(name: str) -> nn.Module:
    """Return the activation of a group, ours or Transformers' own."""
    entry = registry.find(name)
    return build_elementwise(name) if entry is None else entry.factory()


def is_gated(name: str) -> bool:
    """Return whether an expert's in-projection is ``[gate | up]``."""
    entry = registry.find(name)
    return entry is not None and GATED in entry.flags


def flags_of(options: ExpertOptions) -> frozenset[str]:
    """Return the flags of all experts' activations."""
    entries = (registry.find(group.name) for group in (*options.experts, *options.always_on))
    return frozenset().union(*(entry.flags for entry in entries if entry))


def check_shared(options: ExpertOptions) -> None:
    """Raise OptionError where experts that are always on are to be told how much a router gives them: it doesn't."""
    for group in options.always_on:
        if hears(group.name):
            plain = f"use {group.name.replace(f'{KAPPA}_', '')}"
            raise OptionError(f"shared={shown(options.shared)}: experts that are always on hear no router: {plain}")


class Bank(OwnedModule):
    """out_e(act(in_e(x))) for each expert e of one group.

    ``in_proj`` is ``[E, W or 2 W, H]``, ``out_proj`` ``[E, H, W]``; biases ``[E, W or 2 W]`` and ``[E, H]``, or None.

    Args:
        group: which experts.
        hidden: H.
        width: W, where the group doesn't say.
        bias: whether there are biases.
        acts: options of the activations.
    """

    def __init__(self, group: Group, hidden: int, width: int, *, bias: bool, acts: GluConfig) -> None:
        super().__init__()
        self.name, self.count, self.width = group.name, group.count, group.width or width
        rows = self.width * (2 if is_gated(group.name) else 1)
        self.in_proj = nn.Parameter(torch.empty(group.count, rows, hidden))
        self.out_proj = nn.Parameter(torch.empty(group.count, hidden, self.width))
        self.in_bias = nn.Parameter(torch.empty(group.count, rows)) if bias else None
        self.out_bias = nn.Parameter(torch.empty(group.count, hidden)) if bias else None
        # what reads the text has something of its own in each expert; the rest is shared
        self.reads, self.hears = reads_text(group.name), hears(group.name)
        # a list: PEFT, having wrapped a bank, trains no child of it, but a child's child
        self.acts = nn.ModuleList(build_activation(group.name) for _ in range(group.count if self.reads else 1))
        for act in self.acts:
            if self.hears:
                for_experts(act, group.count // len(self.acts))
            if isinstance(act, OwnedActivation):
                act.configure(acts, self.width)
        if self.in_proj.device.type != "meta":
            self.reset_parameters()

    @property
    def act(self) -> nn.Module:
        """The activation of all experts, of the first where each has its own."""
        return self.acts[0]

    def reset_parameters(self) -> None:
        """Normal weights, biases of 0."""
        for weight in (self.in_proj, self.out_proj):
            init.normal_(weight, std=STD)
        for bias in (self.in_bias, self.out_bias):
            if bias is not None:
                init.zeros_(bias)

    def forward(
        self,
        x: Tensor,
        counts: Tensor | Sequence[int],
        backend: str | None,
        scale: Tensor | None = None,
        tokens: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Return the outputs for ``x``, both ``[N, H]``, each row times its ``scale`` ``[N]``.

        The first ``counts[0]`` rows of ``x`` go to expert 0, and so on; row i is the model's token ``tokens[i]``, and
        its router gave it ``scores[i]``.
        """
        weights = x, in_proj, out_proj = _autocast(x, self.in_proj, self.out_proj)
        if self.reads or in_proj.dtype != out_proj.dtype:
            return _each(self, numbers(counts), (scale, tokens, scores), *weights)
        if self.saves_memory and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            backend = "loop"
        if (backend or choose_backend(*weights)) == "loop" or not len(x):
            return _loop(self, numbers(counts), scale, scores, *weights)
        counts = torch.as_tensor(counts, device=x.device)
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden, which = grouped_mm(x, in_proj.mT, ends), None
        if self.in_bias is not None or self.hears:
            which = torch.repeat_interleave(counts, output_size=len(x))
        if self.in_bias is not None:
            hidden = hidden + self.in_bias.to(hidden.dtype)[which]
        out = grouped_mm(self.act(hidden, *self.heard(scores, which)).to(x.dtype), out_proj.mT, ends)
        out = out if self.out_bias is None else out + self.out_bias.to(out.dtype)[which]
        return out if scale is None else out * scale.unsqueeze(1)

    def one(self, x: Tensor, expert: int, scores: Tensor | float | None = None) -> Tensor:
        """Return one expert's output, both ``[N, H]``, without a gradient of its own."""
        in_bias = None if self.in_bias is None else self.in_bias.to(x.dtype)
        out_bias = None if self.out_bias is None else self.out_bias.to(self.out_proj.dtype)
        hidden = linear(x, self.in_proj, in_bias, expert)
        hidden = self.acts[0](hidden, *self.heard(scores, expert)).to(self.out_proj.dtype)
        return linear(hidden, self.out_proj, out_bias, expert)

    def heard(self, scores: Tensor | float | None, experts: Tensor | int | None) -> tuple[Confidence, ...]:
        """Return what an activation is called with beside its input: what the router says, where it is to hear that.

        Args:
            scores: of the rows, ``[N]``, or of the only one; None: it says nothing.
            experts: of this bank, whose rows they are: of each ``[N]``, or one for all.
        """
        whose = 0 if self.reads else experts  # each expert has an activation of its own, or all one
        return (Confidence(scores, whose),) if self.hears and scores is not None and whose is not None else ()

    def is_plain(self) -> bool:
        """Return whether nobody has wrapped, hooked or offloaded this bank, so that `one` gives what it gives."""
        return type(self) is Bank and not self.reads and is_bare(self) and type(self.in_proj) is nn.Parameter

    def extra_repr(self) -> str:
        """Show the group in the model's printout."""
        return f"{self.count} x {self.name}, width={self.width}"


def banks_of(modules: nn.Module) -> list[Bank]:
    """Return the banks in a list of modules, also those that PEFT has wrapped."""
    return [module for module in modules.modules() if isinstance(module, Bank)]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in autocast's dtype, where that is on: the grouped GEMM has no rule of its own there."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def choose_backend(x: Tensor, *weights: Tensor) -> str:
    """Return ``grouped`` where torch's grouped GEMM takes these tensors, else ``loop``, which keeps less in training.

    Transforms of torch and subclasses of tensors have no rule for it, inductor none in float32.
    """
    cpu = x.device.type == "cpu"
    known = (torch.bfloat16, torch.float16, torch.float32) if cpu else (torch.bfloat16,)
    rows = [weight.shape[dim] * weight.element_size() for weight in weights for dim in (1, 2)]
    alike = len({x.dtype, *(weight.dtype for weight in weights)}) == 1
    takes = x.dtype in known and alike and all(size % ALIGNMENT == 0 for size in rows)
    barred = cpu and needs_formula(x, *weights) and (torch.is_grad_enabled() or x.dtype == torch.float32)
    return "grouped" if takes and not barred and has_grouped_mm(x.device.type) else "loop"


def _each(bank: Bank, sizes: Sequence[int], by_row: Sequence[Tensor | None], *weights: Tensor) -> Tensor:
    """Return the outputs of experts one after the other.

    So those are computed that read the text (also those without a token, whose states go on), and those whose
    out-projection is in another dtype, which the outputs then have.
    """
    (scale, tokens, scores), (x, in_proj, out_proj) = by_row, weights
    in_bias = None if bank.in_bias is None else bank.in_bias.to(x.dtype)
    out_bias = None if bank.out_bias is None else bank.out_bias.to(out_proj.dtype)
    parts = []
    for expert, span in enumerate(starmap(slice, pairwise(accumulate(sizes, initial=0)))):
        act, said = bank.acts[expert if bank.reads else 0], None if scores is None else scores[span]
        with told(None if tokens is None else tokens[span]):
            hidden = act(linear(x[span], in_proj, in_bias, expert), *bank.heard(said, expert)).to(out_proj.dtype)
        parts.append(linear(hidden, out_proj, out_bias, expert))
    out = torch.cat(parts)
    return out if scale is None else out * scale.unsqueeze(1)


def _loop(bank: Bank, sizes: Sequence[int], scale: Tensor | None, scores: Tensor | None, *weights: Tensor) -> Tensor:
    x, in_proj, out_proj = weights
    in_bias, out_bias = (None if bias is None else bias.to(x.dtype) for bias in (bank.in_bias, bank.out_bias))
    if torch.is_grad_enabled():
        inputs = (x, x.new_ones(len(x)) if scale is None else scale, in_proj, out_proj, in_bias, out_bias)
        response = response_of(bank.act) if bank.hears else None
        said = (scores, response) if bank.hears and scores is not None else ()
        y: Tensor = (
            ExpertLoop.apply(bank.act, sizes, *inputs, *said)
            if (response is not None or is_recomputable(bank.act)) and not needs_formula(*inputs, *said)
            else plain_loop(bank.act, sizes, *inputs, *said)
        )
        return y
    spans, parts = spans_of(sizes), []
    for expert, rows in spans:
        heard = bank.heard(None if scores is None else scores[rows], expert)
        parts.append(bank.act(linear(x[rows], in_proj, in_bias, expert), *heard).to(x.dtype))
    parts = [linear(part, out_proj, out_bias, expert) for part, (expert, _) in zip(parts, spans, strict=True)]
    out = torch.cat(parts) if parts else x.new_empty(0, out_proj.shape[1])
    return out if scale is None else out * scale.unsqueeze(1)
