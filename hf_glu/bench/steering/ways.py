"""Ways of steering that are compared: gates, a prompt, the residual stream of one layer.

Shapes: H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_glu.activation.context.hooks import stack_and_blocks
from hf_glu.bench.steering.options import SteerOptions, Texts
from hf_glu.errors import OptionError
from hf_glu.instruments.recorder import Call, Watch
from hf_glu.instruments.steering.contrast import read_contrast
from hf_glu.instruments.steering.directions import best_place, find_directions
from hf_glu.instruments.steering.places import gate_places
from hf_glu.publishing.modulations import GateModulation, fit_modulation

GATES, PROMPT = "gates", "prompt"
EXAMPLES = 4  # texts before a prompt, at the largest strength


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringWay:
    """One way of steering.

    Attributes:
        name: of it.
        note: where it steers.
        on: a block within which the model is steered at a strength.
        prefix: the ids that come before each text at a strength.
        unit: what strengths are multiplied by.
    """

    name: str
    note: str
    on: Callable[[float], AbstractContextManager[None]] = lambda _: nullcontext()
    prefix: Callable[[float], list[int]] = lambda _: []
    unit: float = 1.0

    def stretched(self, unit: float) -> SteeringWay:
        """Return it with other units."""
        return replace(self, unit=unit)


def make_ways(
    model: Any, tokenizer: Any, texts: Texts, options: SteerOptions, seed: int
) -> tuple[list[SteeringWay], GateModulation]:
    """Fit each way on a split's texts; return them, and the modulation of gates.

    Raises:
        HfGluError: see `hf_glu.fit_modulation`.
    """
    made = fit_modulation(
        model, tokenizer, *texts.fitted, method=options.method, layers=options.layers, slopes=options.slopes,
        batch_size=options.batch_size, seed=seed,
    )  # fmt: skip
    ways = [gates_way(model, made)]
    if options.peers:
        most = max(map(abs, options.strengths()))
        ways += [prompt_way(tokenizer, texts, most), *residual_ways(model, tokenizer, texts, options)]
    return ways, made


def gates_way(model: nn.Module, made: GateModulation) -> SteeringWay:
    """Return steering by gates."""
    return SteeringWay(
        name=f"{GATES}, {made.method}", note=f"{len(made.thresholds)} layers", on=partial(made.on, model)
    )


def prompt_way(tokenizer: Any, texts: Texts, most: float) -> SteeringWay:
    """Return steering by texts of the class before each prompt: `EXAMPLES` at the strength ``most``, fewer below."""
    sides = [
        [tokenizer(text + "\n", add_special_tokens=False)["input_ids"] for text in side[:EXAMPLES]]
        for side in texts.fitted
    ]

    def prefix(strength: float) -> list[int]:
        count = round(EXAMPLES * abs(strength) / most)
        return [each for ids in sides[int(strength < 0)][:count] for each in ids]

    return SteeringWay(name=PROMPT, note=f"up to {EXAMPLES} texts before", prefix=prefix)


def residual_ways(model: Any, tokenizer: Any, texts: Texts, options: SteerOptions) -> Iterator[SteeringWay]:
    """Yield the difference of means and the first component of what a layer gives, added to it at all tokens.

    The layer is the one whose output tells held-out texts apart best (cf. CAA, https://arxiv.org/abs/2312.06681).
    """
    blocks = blocks_of(model)
    contrast = read_contrast(model, tokenizer, *texts.fitted)
    places = {name: partial(watch_output, block) for name, block in blocks.items()}
    found = find_directions(model, contrast, places, method="pca", slopes=False, batch_size=options.batch_size)
    place = best_place(found)
    direction = found[place]
    for method, moved in {"diffmean": direction.means[0] - direction.means[1], "pca": direction.difference}.items():
        yield SteeringWay(name=f"residual, {method}", note=place, on=partial(_added, blocks[place], moved))


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a decoder by name.

    Raises:
        OptionError: it has no list of layers.
    """
    site = next(iter(gate_places(model).values()))
    blocks = stack_and_blocks(model, site.path)[1]
    if not blocks:
        raise OptionError(f"{type(model).__name__} has no list of layers, whose residual stream could be steered")
    return {f"layers.{number}": block for number, block in enumerate(blocks)}


def watch_output(block: nn.Module, see: Callable[[Call, Tensor], None]) -> Watch:
    """Return the watch by which ``see`` is called with what a layer gives, ``[B, T, H]``."""
    return Watch(module=block, after=True, see=lambda call: see(call, _hidden(call.output)))


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _added(block: nn.Module, direction: Tensor, strength: float) -> Iterator[None]:
    """Add ``strength`` times a direction ``[H]`` to what a layer gives, within the block."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        moved = hidden + (direction * strength).to(hidden)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
