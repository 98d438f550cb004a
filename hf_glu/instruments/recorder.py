"""Watching what modules of a model are given and give, token by token: the hooks under every observer.

An observer says which modules it wants to see (`Watch`) and is called with each of their calls (`Call`), which knows
which rows are tokens and which padding (`hf_glu.instruments.tokens`). `watching` puts the hooks into a model and takes
them out again, whatever happens in between; the model computes what it computes without. It may train or not, be
wrapped by PEFT, generate, or compute layers again in the backward pass (gradient checkpointing), which isn't seen
twice. `Kept` keeps no more tokens than asked for.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_glu.activation.context.hooks import CHUNKS, after_stack, before_stack, by_name, end_carrying, stack_and_blocks
from hf_glu.activation.context.passes import current_pass
from hf_glu.activation.context.reading import Reading
from hf_glu.compat.of_torch import GRAPH_TASK
from hf_glu.instruments.hooks import Hook, hook_after, hook_before
from hf_glu.instruments.probe import evaluating, with_decoder
from hf_glu.instruments.tokens import Tokens, place, told_around

Batch: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a watched module.

    Attributes:
        inputs: its arguments, in the order of the forward's parameters.
        output: what it returned; None where it is watched before it runs.
        tokens: what the rows of its first input are.
        first: whether it is the module's first call in this forward pass.
        repeated: whether the backward pass computes it again (gradient checkpointing).
    """

    inputs: tuple[Any, ...]
    output: Any
    tokens: Tokens
    first: bool
    repeated: bool

    @property
    def x(self) -> Tensor:
        """Its first input."""
        x: Tensor = self.inputs[0]
        return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """A module that is watched.

    Attributes:
        module: the module.
        see: called with each `Call`.
        after: whether it is called after the module, with its output, instead of before.
        repeated: whether it is also called where the backward pass computes the module again. What takes part in the
            loss must be: checkpointing wants the same operations both times.
    """

    module: nn.Module
    see: Callable[[Call], None]
    after: bool = False
    repeated: bool = False


@contextmanager
def watching(model: nn.Module, watches: Iterable[Watch]) -> Iterator[None]:
    """Hook the watched modules of ``model`` within the block, and the models around them that know their tokens."""
    watches = list(watches)
    with ExitStack() as hooks:
        given = threading.local()  # by thread: two may run one model at once
        for outer in outermost(model):  # before the stack's own, where it is one
            note = partial(_note, given=given)
            hooks.callback(hook_before(outer, note, looks=True, with_kwargs=True).remove)
            hooks.callback(hook_after(outer, partial(_forget, given=given), looks=True, always_call=True).remove)
        for stack, decoder in stacks_around(model, [watch.module for watch in watches]):
            hooks.callback(end_carrying, stack)
            begin = partial(_begin, given=given, decoder=decoder)
            hooks.callback(hook_before(stack, begin, looks=True, with_kwargs=True).remove)
            hooks.callback(hook_after(stack, after_stack, looks=True, always_call=True).remove)
        chunking = _chunking(model)
        for watch in watches:
            hooks.callback(_Watching(watch, chunking.get(id(watch.module), [])).hook().remove)
        yield


def stacks_around(model: nn.Module, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """Return the stacks around ``modules``, and whether each is the decoder of an encoder-decoder."""
    watched, whole = {id(module) for module in modules}, _is_encoder_decoder(model)
    found: dict[int, tuple[nn.Module, bool]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in watched:
            stack, _ = stack_and_blocks(model, name)
            decodes = any(part.endswith("decoder") for part in name.split("."))  # seamless_m4t has a text_decoder
            found[id(stack)] = stack, decodes and (whole or _is_encoder_decoder(stack))
    return list(found.values())


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _chunking(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules around each module of ``model``, by its id, that may give it a text in chunks."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if hasattr(module, CHUNKS):
            for part in module.modules():
                found.setdefault(id(part), []).append(module)
    return found


def outermost(model: nn.Module) -> list[nn.Module]:
    """Return the outermost models of Transformers in ``model``: what they are given tells of their stacks' padding."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if not inner and hasattr(type(module), "post_init"):
            found[name] = module
    return list(found.values())


def _note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, given: threading.local) -> None:
    given.inputs = by_name(model, args, kwargs)


def _forget(model: nn.Module, args: Any, output: Any, *, given: threading.local) -> None:
    given.inputs = {}


def _begin(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, given: threading.local, decoder: bool
) -> None:  # fmt: skip
    """Begin the pass of a stack, and note what only the model around it is told of its tokens."""
    before_stack(stack, args, kwargs)
    now = current_pass()
    reading = None if now is None else now.reading
    if reading is not None and reading.valid is None:
        around, shape = getattr(given, "inputs", {}), (reading.batch, reading.length)
        reading.labelled = told_around(by_name(stack, args, kwargs), around, shape, decoder=decoder)


class _Watching(threading.local):
    """One watch while it is hooked: where each thread is in its text, if the module is given the text in chunks."""

    def __init__(self, watch: Watch, chunking: list[nn.Module]) -> None:
        self.watch, self.chunking, self.calls, self.at = watch, chunking, 0, 0
        self.reading: Reading | None = None

    def hook(self) -> Hook:
        """Hook the module."""
        hook = hook_after if self.watch.after else hook_before
        return hook(self.watch.module, self.tell, looks=True, with_kwargs=True)

    def tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Call the observer with one call of the module."""
        repeated = GRAPH_TASK.find()() != -1
        if repeated and not self.watch.repeated:
            return
        inputs = tuple(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()) if kwargs else args
        now = current_pass()
        reading = None if now is None else now.reading
        first = self.calls == 0 or reading is None or reading is not self.reading
        if first:
            self.reading, self.at = reading, 0
        chunks = any(getattr(module, CHUNKS) for module in self.chunking)
        tokens = place(inputs[0], now, self.at, chunks=chunks)
        self.calls, self.at = self.calls + 1, 0 if tokens.last else tokens.end
        self.watch.see(Call(inputs=inputs, output=output, tokens=tokens, first=first, repeated=repeated))


class Kept:
    """The first rows of what comes, at most ``limit`` of them: copies, without a gradient, as they are in the model."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.parts: list[Tensor] = []

    @property
    def full(self) -> bool:
        """Whether there is no room for more."""
        return self.count >= self.limit

    def see(self, call: Call) -> None:
        """Keep tokens that a module is given, without padding."""
        self.add(call.tokens.rows(call.x))

    def add(self, rows: Tensor) -> None:
        """Keep ``rows`` ``[N, ...]``, as long as there is room."""
        if not self.full:
            self.parts.append(rows.detach()[: self.limit - self.count].clone())
            self.count += len(self.parts[-1])

    def tensor(self) -> Tensor:
        """Return what was kept, ``[at most limit, ...]``; something must have come."""
        return torch.cat(self.parts)


class Reached(Exception):
    """Ends a forward pass of `run_batches`: nothing after the module that raises it is needed."""


def run_batches(model: nn.Module, batches: Iterable[Batch], *, enough: Callable[[], bool] = lambda: False) -> None:
    """Run ``model`` on batches, without dropout, autocast and gradients, until ``enough`` says so.

    Args:
        model: the model.
        batches: the forward's arguments, moved to its device; an encoder-decoder without labels and ids of its decoder
            is given the encoder's.
        enough: asked after each batch.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in batches:
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            with suppress(Reached):
                model(**inputs if inputs.get("labels") is not None else with_decoder(model, inputs))
            if enough():
                return


def first_inputs(model: nn.Module, module: nn.Module, batches: Iterable[Batch], *, limit: int) -> Tensor | None:
    """Return the first tokens that ``module`` is given on ``batches``, at most ``limit``, without padding: ``[N, W]``.

    A pass ends once the module has been given its text. None: it is never run.
    """
    return inputs_of(model, [module], batches, limit=limit)[0]


def inputs_of(
    model: nn.Module, modules: Sequence[nn.Module], batches: Iterable[Batch], *, limit: int
) -> list[Tensor | None]:
    """Return `first_inputs` of several modules, all from the same passes, which end once each has been given its text.

    What is kept for them has to fit in memory together.
    """
    kept = [Kept(limit) for _ in modules]
    waiting: set[int] = set()

    def see(number: int, call: Call) -> None:
        kept[number].see(call)
        if call.tokens.last:
            waiting.discard(number)
            if not waiting:
                waiting.update(range(len(kept)))
                raise Reached

    def enough() -> bool:
        waiting.update(range(len(kept)))
        return all(each.full for each in kept)

    enough()
    watches = [Watch(module=module, see=partial(see, number)) for number, module in enumerate(modules)]
    with watching(model, watches):
        run_batches(model, batches, enough=enough)
    return [each.tensor() if each.parts else None for each in kept]
