"""Telling a model's readers, in each forward pass, which tokens come and which cache there is.

A stack (the innermost Transformers model around a reader) knows mask and positions; a block (its layer) knows the
cache. The hooks are functions of this module and hold nothing: copies and pickles of a model work like the model. What
they tell is the running pass's (`passes.py`). Under gradient checkpointing a layer runs again after the
forward pass, when another may have begun: the pass is carried along (`Carrying`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.context.finding import find
from hf_glu.activation.context.passes import Pass, current_pass, enter, leave, within
from hf_glu.activation.context.reader import Reader
from hf_glu.activation.context.reading import read
from hf_glu.activation.context.states import self_attention, tokens_seen
from hf_glu.compat.of_models import ATTENTION, CHECKPOINTING, PAGED
from hf_glu.compat.of_torch import ALWAYS_CALLED, CHILDREN, FORWARD_HOOKS, FORWARD_PRE_HOOKS, GRAPH_TASK, WITH_KWARGS
from hf_glu.errors import OptionError, TrainingError

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")


PADDING = ("longformer", "led", "big_bird", "bigbird_pegasus")  # model types that pad texts to whole windows
TIME_FIRST = ("fsmt", "xlnet")  # model types that hand their layers [T, B, H]
REVERSIBLE = ("reformer",)  # model types that compute their layers once more in the backward pass
SERVERS = ("vllm", "sglang", "tgi")  # attentions of servers that have one row of all texts, and caches of their own
SOURCE, CHUNKS = "context_source", "chunk_size_feed_forward"  # attributes of blocks: ours, and Transformers' own


def watch_context(model: nn.Module) -> None:
    """Hook ``model`` so that every reader is told of its tokens and cache; does nothing the second time.

    Raises:
        OptionError: an FFN is given its texts in chunks, or transposed, or computed again without its model.
    """
    for name, reader in named_readers(model):
        stack, block = _around(model, name)
        _refuse_family(stack, reader)
        _hook(stack, before_stack)
        if after_stack not in FORWARD_HOOKS.of(stack).values():
            stack.register_forward_hook(after_stack, always_call=True)
        if block is not None:
            _hook(block, before_block)
        for chunking in _chunking(model, name) if reader.needs_sequences else ():
            refuse_chunks(chunking, (), {})
            _hook(chunking, refuse_chunks)


def unwatch_context(model: nn.Module) -> None:
    """Take away what `watch_context` has put into ``model``, once no reader is left in it."""
    if any(True for _ in named_readers(model)):
        return
    for module in model.modules():
        for hooks in (FORWARD_PRE_HOOKS.of(module), FORWARD_HOOKS.of(module)):
            for key in [
                key for key, hook in hooks.items() if hook in (before_stack, after_stack, before_block, refuse_chunks)
            ]:
                for known in (hooks, WITH_KWARGS.of(module), ALWAYS_CALLED.of(module)):
                    known.pop(key, None)
        _stop_carrying(module)


def _stop_carrying(module: nn.Module) -> None:
    """Give a module its own checkpointing function back."""
    carrying = vars(module).get(CHECKPOINTING.name)
    if isinstance(carrying, Carrying):
        CHECKPOINTING.put(module, carrying.plain)


def end_carrying(stack: nn.Module) -> None:
    """Undo what `before_stack` did for gradient checkpointing, where nothing watches the stack any more."""
    if before_stack not in FORWARD_PRE_HOOKS.of(stack).values():
        for module in stack.modules():
            _stop_carrying(module)


def named_readers(model: nn.Module) -> Iterator[tuple[str, Reader]]:
    """Yield the readers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Reader):
            yield name, module


def _refuse_family(stack: Any, reader: Reader) -> None:
    kind = getattr(stack.config, "model_type", "")
    if kind in TIME_FIRST and reader.needs_sequences:
        raise OptionError(f"{kind} hands its FFNs the texts transposed, which activations that read them can't have")
    if kind in REVERSIBLE:
        raise OptionError(f"{kind} runs its layers again without their texts, which {type(reader).__name__} reads")


def _chunking(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules around a reader that can give their FFN a text in chunks."""
    parts = name.split(".")
    for end in range(len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        if hasattr(module, CHUNKS):
            yield module


def refuse_chunks(layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Raise where a layer gives its FFN chunks of the text: what one chunk reads depends on those before."""
    if getattr(layer, CHUNKS):
        some = f"{type(layer).__name__} gives its FFN {getattr(layer, CHUNKS)} tokens at a time"
        raise OptionError(f"{some}, and activations that read the text need all of them: set {CHUNKS} to 0")


def _hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    if hook not in FORWARD_PRE_HOOKS.of(module).values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def stack_and_blocks(model: nn.Module, name: str) -> tuple[nn.Module, list[nn.Module] | None]:
    """Return the stack around the module called ``name``, and the stack's layers in order (None: it has no list)."""
    stack, layers = _paths(model, name)
    members = model.get_submodule(layers[0].rpartition(".")[0]).children() if layers else ()
    lists = (each if isinstance(each, nn.ModuleList) else (each,) for each in members)  # Funnel has lists of lists
    return model.get_submodule(stack), list(chain.from_iterable(lists)) if layers else None


def _paths(model: nn.Module, name: str) -> tuple[str, list[str]]:
    """Return the path of the stack around a module, and of the members of lists between the two, outermost first."""
    parts = name.split(".")
    inside = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    stacks = [path for path in inside if hasattr(model.get_submodule(path), "config") and _is_model(model, path)]
    stack = stacks[-1] if stacks else ""
    layers = [
        path
        for path in inside
        if path.startswith(stack) and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList)
    ]
    return stack, layers


def _around(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module | None]:
    """Return the stack and the block around the reader called ``name``, and give it its slot."""
    stack, layers = _paths(model, name)
    reader = model.get_submodule(name)
    assert isinstance(reader, Reader)
    reader.slot = name.removeprefix(stack).strip(".")
    inside = (model.get_submodule(path) for path in layers)
    return model.get_submodule(stack), next((part for part in inside if not isinstance(part, nn.ModuleList)), None)


def _is_model(model: nn.Module, path: str) -> bool:
    return hasattr(model.get_submodule(path), "post_init")


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a forward's arguments by name."""
    if not args:
        return dict(kwargs)
    forward = type(module).forward
    names = _names(forward) if torch.compiler.is_compiling() else _cached_names(forward)
    # no zip: what torch 2.6 compiles of one refuses lists of two lengths
    return {**{name: args[at] for at, name in enumerate(names[: len(args)])}, **kwargs}


def _names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


_cached_names = lru_cache(maxsize=256)(_names)


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """Return the cache among a forward's arguments, that of the decoder's own tokens, or None."""
    for name in CACHES:
        if (cache := inputs.get(name)) is not None:
            return self_attention(cache)
    return None


def before_stack(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pass on to the readers of a stack which tokens come."""
    inputs = by_name(stack, args, kwargs)
    why = _in_one_row(stack, inputs)
    if why and find(stack, _needs_texts):
        raise OptionError(f"{type(stack).__name__} has activations that read the text, whose states {why}")
    kind = getattr(getattr(stack, "config", None), "model_type", "")
    enter(stack, None if why else read(inputs, partial(tokens_seen, cache_of(inputs))), pads=kind in PADDING)
    if stack.training:
        _carry(stack)


def _in_one_row(stack: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Return who gives all texts in one row, token by token, and what to do about it; None: nobody does."""
    if type(inputs.get("cache")).__name__ == PAGED.name:
        return "a paged cache doesn't keep: generate without continuous batching"
    server = ATTENTION.of(getattr(stack, "config", None), None)
    return f"{server} doesn't keep: serve the model with Transformers' own generate" if server in SERVERS else None


def _needs_texts(module: nn.Module) -> bool:
    return isinstance(module, Reader) and module.needs_sequences


def after_stack(stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Let go of masks and caches."""
    leave(stack)


def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note which cache a layer has, and the context vector of what it is given, where that is made here."""
    now = current_pass()
    if now is None or now.told is block:
        return
    reads = now.pads or SOURCE in CHILDREN.of(block)
    inputs = by_name(block, args, kwargs) if reads or len(args) > 1 else kwargs  # hidden states come first
    now.cache, hidden = cache_of(inputs), inputs.get("hidden_states") if reads else None
    if now.reading is None or not isinstance(hidden, Tensor):
        return
    if now.pads and hidden.ndim == 3:
        now.reading = now.reading.padded(hidden.shape[1], hidden.device)
    if (source := CHILDREN.of(block).get(SOURCE)) is not None:
        now.reading.vector = source(hidden, inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask"))


HOOKS = (before_stack, after_stack, before_block, refuse_chunks)


class Carrying:
    """A checkpointing function that takes along the pass in which a layer runs."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` as the plain one does, within the present pass each time it runs."""
        now, block = current_pass(), _called(function)
        if block is not None:  # its vector is for later blocks, too: it mustn't be made inside of the checkpoint alone
            before_block(block, args, getattr(function, "keywords", {}))
        # the vector as an argument, which is how a reentrant checkpoint finds what its gradients belong to
        vector = None if now is None or now.reading is None else now.reading.vector
        known = None if now is None else replace(now, told=block)
        return self.plain(partial(_run_again, function, known), vector, *args, **kwargs)


def _called(function: Any) -> nn.Module | None:
    """Return the watched block that ``function`` calls, hooks and all, as layers do before Transformers 5.23."""
    called = getattr(function, "func", function)
    block = called if isinstance(called, nn.Module) else getattr(called, "__self__", None)
    watched = isinstance(block, nn.Module) and before_block in FORWARD_PRE_HOOKS.of(block).values()
    return block if watched else None


def _run_again(function: Any, known: Pass | None, vector: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    if known is None:
        return function(*args, **kwargs)
    if any(held.ended for held in known.held.values()) and GRAPH_TASK.find()() != -1:
        raise TrainingError(
            f"{type(known.stack).__name__} was changed for its forward pass by a block that has ended, and its layers "
            "are computed again in the backward pass: call backward() inside of the block"
        )
    reading = None if known.reading is None else replace(known.reading, vector=vector)
    with within(replace(known, reading=reading, cache=None)):
        return function(*args, **kwargs)


def _carry(stack: nn.Module) -> None:
    for module in stack.modules():
        plain = module.__dict__.get(CHECKPOINTING.name)
        if plain is not None and not isinstance(plain, Carrying):
            CHECKPOINTING.put(module, Carrying(plain))
