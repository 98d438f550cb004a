"""An FFN of experts: route, sort once, compute each group's contiguous slice, weigh and put back.

Shapes: T tokens, H hidden size, k experts a token.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.context.passes import asking, current_pass
from hf_glu.activation.kernels.autodiff import numbers
from hf_glu.activation.module import OwnedModule
from hf_glu.compat.of_torch import is_traced
from hf_glu.config.experts import ExpertOptions
from hf_glu.config.glu import GluConfig
from hf_glu.ffn.experts import tracing
from hf_glu.ffn.experts.asked import keeps_losses, note_logits
from hf_glu.ffn.experts.group import Bank, banks_of, check_shared, choose_backend
from hf_glu.ffn.experts.loop import combine, dispatch, sum_rows
from hf_glu.ffn.experts.router import Router, Routing
from hf_glu.ffn.experts.scale import Scale, inject

FEW = 16  # pairs of token and expert


class ExpertFFN(OwnedModule):
    """y = sum over the k experts e of a token of weight_e out_e(act_e(in_e(x))), + the shared experts.

    No token is dropped, whatever the load. Takes the place of a stock FFN: input and output are ``[..., H]``.

    Args:
        hidden: H.
        width: units of an expert, where its group doesn't say.
        options: the experts.
        bias: whether the experts have biases.
        acts: options of the activations.
        dropout: of the FFN that it replaces.

    Raises:
        OptionError: shared experts that are to hear a router.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        options: ExpertOptions,
        *,
        bias: bool,
        acts: GluConfig | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_shared(options)
        own: dict[str, Any] = {"bias": bias, "acts": acts or GluConfig()}
        self.options, self.hidden, self.width, self.groups = options, hidden, width, options.experts
        self.router = Router(hidden, options)
        self.banks = nn.ModuleList(Bank(group, hidden, width, **own) for group in options.experts)
        self.shared = nn.ModuleList(Bank(group, hidden, width, **own) for group in options.always_on)
        self.reads = any(bank.reads for bank in banks_of(self))
        self.hears = any(bank.hears for bank in banks_of(self))
        self.dropout = dropout
        self.scale = Scale()
        self.loss: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a listing of FFNs shows."""
        groups = f"{self.options.groups}, top {self.options.top_k}"
        count = sum(parameter.numel() for parameter in self.parameters())
        return {
            "layout": "experts",
            "kind": "hf_glu experts",
            "hidden": self.hidden,
            "width": self.width,
            "activation": groups,
            "parameters": count,
            "active_parameters": round(count - self.idle),
        }

    @property
    def idle(self) -> float:
        """The parameters of routed experts that a token isn't sent to, on average over experts of different sizes."""
        routed = sum(part.numel() for bank in banks_of(self.banks) for part in bank.parameters(recurse=False))
        return routed * (1 - self.options.top_k / self.options.count)

    def reset_parameters(self) -> None:
        """Do nothing: router and expert groups initialise themselves."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the experts."""
        if is_traced():
            return self.traced(x)
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        note_logits(self.router, routing)
        out = self._routed(tokens, routing)
        for bank, group in zip(self.shared, self.options.always_on, strict=True):
            rows = self._rows(torch.arange(len(tokens), device=x.device).repeat(group.count), len(tokens))
            copies = tokens.repeat(group.count, 1)
            shared = bank(copies, [len(tokens)] * group.count, self.options.backend, None, rows)
            out = out + shared.view(group.count, *out.shape).sum(0).to(out.dtype)
        if self.training and len(tokens):
            loss = self.router.loss(routing)
            if keeps_losses():  # of all runs in a pass: ALBERT's layers are one
                self.loss = loss.detach() + (self.loss if self.loss is not None and asking() else 0)
            if torch.is_grad_enabled():  # not in the first pass of a layer that checkpointing repeats
                out = inject(out, loss, self.scale, self.router.loads(routing), self.router.load)
        out = out.to(self._dtype(x)).view(*x.shape[:-1], self.hidden)
        return self._drop(out)

    def traced(self, x: Tensor) -> Tensor:
        """Apply the experts by operations that any tracer can write down."""
        return self._drop(tracing.experts(x, self.router, self.banks, self.shared).to(self._dtype(x)))

    def _drop(self, out: Tensor) -> Tensor:
        return out if self.dropout is None else self.dropout(out)

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Return the outputs' dtype: the input's, or that of out-projections which the family keeps in another."""
        bank = next(part for part in self.banks.modules() if isinstance(part, Bank))  # PEFT may have wrapped it
        return x.dtype if bank.in_proj.dtype == bank.out_proj.dtype else bank.out_proj.dtype

    def _routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Return the weighted outputs of the routed experts: ``[T, H]``."""
        if torch.compiler.is_compiling() and not self._traceable(tokens):
            return self._untraced(tokens, routing)
        return self._compute(tokens, routing)

    def _traceable(self, tokens: Tensor) -> bool:
        """Return whether nothing needs to know how many rows an expert has; inductor's grouped GEMM is for bfloat16."""
        banks = banks_of(self.banks)
        backend = self.options.backend or choose_backend(tokens, banks[0].in_proj, banks[0].out_proj)
        return len(banks) == 1 and backend == "grouped" and tokens.dtype == torch.bfloat16

    @torch.compiler.disable  # one graph break instead of one for each expert
    def _untraced(self, tokens: Tensor, routing: Routing) -> Tensor:
        return self._compute(tokens, routing)

    def _compute(self, tokens: Tensor, routing: Routing) -> Tensor:
        experts, graded = routing.experts.reshape(-1), torch.is_grad_enabled()
        if not graded and self._is_few(tokens, experts):
            return self._few(tokens, routing)
        order = experts.argsort(stable=True)
        back = order.argsort().view_as(routing.experts)
        source, scale = order // routing.experts.shape[1], routing.weights.reshape(-1)[order]
        which = self._rows(source, len(tokens))
        scores = routing.scores.reshape(-1)[order] if self.hears else None
        counts = experts.new_zeros(routing.logits.shape[1]).scatter_add_(0, experts, torch.ones_like(experts))
        if graded:
            rows = dispatch(tokens, source, back)
            return combine(self._each(rows, counts, scale, which, scores), source, back)
        outputs = self._each(tokens.index_select(0, source), counts, None, which, scores)
        return sum_rows(outputs * scale.unsqueeze(1), back)

    def _is_few(self, tokens: Tensor, experts: Tensor) -> bool:
        """Return whether sorting would take longer than the experts: while decoding on a CPU."""
        few = tokens.shape[0] == 1 or (len(self.banks) > 1 and 0 < experts.shape[0] <= FEW)
        few = few and self.options.backend is None and tokens.device.type == "cpu"
        few = few and not torch.is_autocast_enabled("cpu")
        return few and all(isinstance(bank, Bank) and bank.is_plain() for bank in self.banks)

    def _few(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Compute one expert after the other, the same sums in the same order."""
        if tokens.shape[0] == 1:
            return self._one(tokens, routing)
        ranks = routing.experts.shape[1]
        chosen = [expert for row in routing.experts.tolist() for expert in row]
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        sizes = Counter(chosen[pair] for pair in order)
        rows = tokens[[pair // ranks for pair in order]]
        owners = [(bank, own) for bank in self.banks for own in range(bank.count)]  # type: ignore[arg-type]
        parts, begin, scores = [], 0, routing.scores.reshape(-1) if self.hears else None
        for expert, own in zip(sizes, rows.split(list(sizes.values())), strict=True):
            bank, number = owners[expert]
            pairs, begin = order[begin : begin + len(own)], begin + len(own)
            said = None if scores is None else scores[pairs] if len(pairs) > 1 else scores[pairs[0]].item()
            parts.append(bank.one(own, number, said))
        back = sorted(range(len(order)), key=order.__getitem__)
        outputs = torch.cat(parts)[back].view(*routing.experts.shape, -1)
        return (outputs * routing.weights.unsqueeze(-1)).sum(1)

    def _one(self, token: Tensor, routing: Routing) -> Tensor:
        """Return the same of one token, ``[1, H]``, whose experts need no order."""
        owners = [(bank, own) for bank in self.banks for own in range(bank.count)]  # type: ignore[arg-type]
        chosen = [owners[expert] for expert in routing.experts[0].tolist()]
        scores = routing.scores[0].tolist() if self.hears else [None] * len(chosen)
        parts = [bank.one(token, own, said) for (bank, own), said in zip(chosen, scores, strict=True)]
        return (torch.cat(parts).unsqueeze(0) * routing.weights.unsqueeze(-1)).sum(1)

    def _rows(self, source: Tensor, total: int) -> Tensor | None:
        """Return ``source`` where the experts read the text, and its tokens are the ``total`` ones given."""
        if not self.reads:
            return None
        now = current_pass()
        reading = None if now is None else now.reading
        return source if reading is not None and reading.batch * reading.length == total else None

    def _each(self, rows: Tensor, counts: Tensor, *by_row: Tensor | None) -> Tensor:
        """Return the experts' outputs for their rows; ``by_row``: scale, tokens and scores, as banks take them."""
        backend, (scale, which, _) = self.options.backend, by_row
        if len(self.banks) == 1:  # which may do without knowing the counts
            return self.banks[0](rows, counts, backend, *by_row)
        sizes, outputs, start, first = numbers(counts), [], 0, 0
        for bank, group in zip(self.banks, self.groups, strict=True):
            own = sizes[first : first + group.count]
            end = start + sum(own)
            # DDP waits for gradients of 0, too, and states go on
            if start < end or scale is not None or which is not None or not len(rows):
                mine = (None if part is None else part[start:end] for part in by_row)
                outputs.append(bank(rows[start:end], own, backend, *mine))
            start, first = end, first + group.count
        return torch.cat(outputs)


def find_experts(model: nn.Module) -> dict[str, ExpertFFN]:
    """Return the expert FFNs of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertFFN)}
