"""``learnable_N``: a trainable mix of elementwise activations (Learnable Activations, https://arxiv.org/abs/2605.26647).

    y = sum_k a_k phi_k(x),   a = (1 - t) m + t e_target

``m`` are the trained coefficients, per layer ``[K]`` or per channel ``[K, width]``; they start at 1 for the first
function and 0 for the others, so that a model whose activation is the first function computes the same. ``t`` is 0
unless an annealing schedule drives it to 1, where the mix is purely the target N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_glu.activation.elementwise import build_elementwise
from hf_glu.activation.kernels.compiled import has_kernels
from hf_glu.activation.kernels.mixture import mix, recomputed_mix
from hf_glu.activation.module import OwnedActivation, reset_elementwise
from hf_glu.config.registry import ADAPTIVE, registry, unmixed, unwrapped

if TYPE_CHECKING:
    from hf_glu.config.glu import GluConfig

PAPER = "Learnable Activations, https://arxiv.org/abs/2605.26647"
DEFAULT_FUNCTIONS = ("silu", "gelu", "relu", "tanh")


class LearnableMix(OwnedActivation):
    """sum_k a_k phi_k(x). Shapes: input and output ``[..., width]``.

    Args:
        name: ``learnable_N``, or of another family of mixes.
        functions: the dictionary; the mix starts at its first function. None: N and `DEFAULT_FUNCTIONS`.
        width: channels with coefficients of their own; None: one set for all.
    """

    gated = False

    def __init__(self, name: str, functions: tuple[str, ...] | None = None, width: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.target = unmixed(name)
        self._build(functions or _default_functions(self.target), width)

    def _build(self, functions: tuple[str, ...], width: int | None) -> None:
        self.names = functions if self.target in functions else (*functions, self.target)
        self.functions = nn.ModuleList(build_elementwise(function) for function in self.names)
        shape = (len(self.names),) if width is None else (len(self.names), width)
        self.mix = nn.Parameter(torch.empty(shape))
        self.annealed = nn.Buffer(torch.zeros(()))
        if self.mix.device.type != "meta":
            self.reset_parameters()

    def configure(self, options: GluConfig, width: int) -> None:
        """Take the dictionary and the coefficients' shape from ``config.hf_glu``."""
        mix = options.mix or {}
        functions = tuple(mix.get("functions", self.names))
        channels = width if mix.get("per") == "channel" else None
        if functions != self.names or channels is not None:
            self._build(functions, channels)

    @torch.no_grad()
    def start_at(self, name: str, function: nn.Module) -> None:
        """Start at ``function``, which takes the place of the dictionary's own one of that name."""
        index = self.names.index(name)
        self.functions[index] = function
        self.mix.zero_()
        self.mix[index] = 1

    def coefficients(self) -> Tensor:
        """Return a: ``[K]`` or ``[K, width]``."""
        return (1 - self.annealed) * self.mix + self.annealed * self.pure()

    def pure(self) -> Tensor:
        """Return the coefficients of the target alone, in the shape of the mix."""
        pure = torch.zeros_like(self.mix)
        pure[self.names.index(self.target)] = 1
        return pure

    def is_pure(self) -> bool:
        """Return whether the mix is exactly its target."""
        return bool(torch.equal(self.coefficients(), self.pure()))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mix."""
        rows = x.reshape(-1, x.shape[-1])
        channel, row = self.weights(rows)
        if self.saves_memory or self.is_fused:
            return recomputed_mix(tuple(self.functions), rows, channel, row, fused=self.is_fused).view(x.shape)
        return mix(tuple(self.functions), rows, channel, row).view(x.shape)

    def is_fusible(self, device: str) -> bool:
        """Return whether there is a kernel for all of its functions."""
        return has_kernels(self.functions, device)

    def weights(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the coefficients of each channel ``[K, W]`` and of each row of ``x``: ``[N, K]``; or None."""
        found = self.coefficients().to(torch.promote_types(x.dtype, torch.float32))
        return (found, None) if found.ndim == 2 else (None, found.expand(x.shape[0], -1))

    def reset_parameters(self) -> None:
        """Start at the first function, unannealed."""
        start = torch.zeros(self.mix.shape)
        start[0] = 1
        init.copy_(self.mix, start)
        init.zeros_(self.annealed)
        for name, function in zip(self.names, self.functions, strict=True):
            reset_elementwise(function, name)

    def extra_repr(self) -> str:
        """Show the name and the dictionary in the model's printout."""
        return f"{self.name!r}, {', '.join(self.names)}"


def mix_functions(sources: Iterable[str], target: str, given: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the dictionary with which ``target`` (gated or not) can start at each of ``sources``.

    Args:
        sources: the activations that a model has.
        target: a mix's name.
        given: the dictionary to add; none: what the family of ``target`` adds.
    """
    entry = registry[target]
    base = unmixed(unwrapped(entry.gate or target))
    given = tuple(given) or (DEFAULT_FUNCTIONS if ADAPTIVE in entry.flags else ())
    functions = tuple(dict.fromkeys([*sources, *given, base]))
    return functions if len(functions) > 1 else _default_functions(base)


def mix_options(sources: Iterable[str], targets: Iterable[str], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options with which mixes can start at ``sources``; see `mix_functions`."""
    given, sources = given or {}, tuple(sources)
    found = (name for target in targets for name in mix_functions(sources, target, given.get("functions", ())))
    return {**given, "functions": list(dict.fromkeys(found))}


def _default_functions(base: str) -> tuple[str, ...]:
    return (base, *(function for function in DEFAULT_FUNCTIONS if function != base))


def mixes(model: nn.Module) -> list[LearnableMix]:
    """Return every learnable mix of a model."""
    return [module for module in model.modules() if isinstance(module, LearnableMix)]
