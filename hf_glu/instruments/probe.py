"""Running a model on inputs made for it, and comparing what two models compute."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from hf_glu.config.traits import longest_text, token_id, vocabulary
from hf_glu.errors import HfGluError, OptionError
from hf_glu.ffn.modes import keeping_modes

LENGTH = 24
IDS = ("input_ids", "inputs")  # the names that families have for token ids
MORE = ("pixel_values", "input_features", "input_values", "inputs_embeds", "bbox")  # which others may be needed
CHARACTERS = 256  # ids of a model without a vocabulary, which reads characters (CANINE)
GENERATORS = ("cuda", "xpu")  # devices with generators of their own, one each
ELSE = ": give inputs={...} to compare it on, or check=False (--no-check)"


def probe_inputs(model: Any, *, seed: int = 0, length: int = LENGTH) -> dict[str, Tensor]:
    """Return random token ids that any head of a text model takes: one sequence, ``[1, length]``.

    Raises:
        OptionError: the model isn't a text model.
    """
    name, count = getattr(model, "main_input_name", "input_ids"), vocabulary(model.config)
    if name not in IDS or (count is None and name not in signature(model.forward).parameters):
        raise OptionError(f"{type(model).__name__} doesn't take token ids{ELSE}")
    count = count or CHARACTERS
    positions = longest_text(model.config) or length
    generator = torch.Generator().manual_seed(seed)
    shape = (1, min(length, positions - 4 if positions > 8 else positions))
    ids = torch.randint(min(5, count - 1), count, shape, generator=generator)
    eos = token_id(model.config, "eos_token_id")
    if eos is not None and eos < count:
        ids[:, -1] = eos  # BART's classification head reads the hidden state at the end-of-sequence token
    inputs = with_decoder(model, {name: ids})
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {key: value.unsqueeze(1) for key, value in inputs.items()}
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in inputs.items()}


def forward_arguments(model: nn.Module) -> Mapping[str, Any]:
    """Return the arguments of a model's forward by name: of Transformers' own, where PEFT or a compiler wraps that."""
    inner = next((part for part in model.modules() if hasattr(type(part), "post_init")), model)
    return signature(inner.forward).parameters


def with_decoder(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Add the encoder's ids as the decoder's where an encoder-decoder is given none."""
    needed = getattr(model.config, "is_encoder_decoder", False) and "input_ids" in inputs
    if needed and "decoder_input_ids" in forward_arguments(model):
        return {"decoder_input_ids": inputs["input_ids"].clone(), **inputs}
    return dict(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout, autocast and gradients off for ``model`` within the block.

    Afterwards every module is in the mode that it was in, and the generators of random numbers are where they were.
    """
    device = next(model.parameters()).device.type
    with keeping_modes(model, training=False), torch.no_grad(), torch.autocast(device, enabled=False):
        with same_randomness(model):
            yield


@contextmanager
def same_randomness(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Leave the generators of random numbers as they were: Python's, NumPy's, torch's on CPU and GPUs of the model.

    Args:
        model: the model.
        seed: what torch's generators start from within the block; None: they go on.
    """
    gpus = {part.device for part in model.parameters() if part.device.type in GENERATORS}
    generators = [torch.default_generator]
    generators += [torch.get_device_module(gpu).default_generators[gpu.index] for gpu in gpus]
    states = [generator.get_state() for generator in generators]
    python, arrays = random.getstate(), numpy.random.get_state()
    for generator in generators if seed is not None else ():
        generator.manual_seed(seed or 0)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the floating-point outputs (logits, hidden states) of ``model`` on ``inputs``.

    What a model draws at random (Reformer's hashes) is the same each time.
    """
    with evaluating(model), same_randomness(model, seed=0):
        outputs = model(**inputs)
    return {
        key: value.detach().clone()
        for key, value in outputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def try_run(model: nn.Module, inputs: Mapping[str, Any], *, instead: str = ELSE) -> dict[str, Tensor]:
    """Return `run`'s outputs.

    Args:
        model, inputs: as of `run`.
        instead: how the message ends: what to do.

    Raises:
        OptionError: the model doesn't take these inputs, or not them alone (CLIP reads images, too).
    """
    try:
        return run(model, inputs)
    except HfGluError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        more = [name for name in signature(model.forward).parameters if name in MORE and name not in inputs]
        takes = f"; it takes {', '.join(more)}, too" if more else ""
        raise OptionError(
            f"{type(model).__name__} doesn't run on {', '.join(inputs)} ({why}{takes}){instead}"
        ) from error


def max_abs_difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return max |a - b| per output.

    Raises:
        OptionError: the two don't have the same outputs in the same shapes, or one that is NaN everywhere in both, so
            that nothing can be compared.
    """
    if before.keys() != after.keys() or not before:
        raise OptionError(f"the outputs differ in kind: {sorted(before)} and {sorted(after)}")
    for key in before:
        if before[key].shape != after[key].shape:
            raise OptionError(f"{key} has shape {list(before[key].shape)} and {list(after[key].shape)}")
        if before[key].numel() and before[key].isnan().all() and after[key].isnan().all():
            raise OptionError(f"{key} is NaN everywhere, before as after: nothing can be compared")
    return {key: _max_abs(before[key], after[key]) for key in before}


def _max_abs(a: Tensor, b: Tensor) -> float:
    """Return max |a - b|, 0 where both are the same infinity, NaN where a NaN is in the one and not the other."""
    a, b = a.double().cpu(), b.double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).max()) if a.numel() else 0.0


def give_pad_token(tokenizer: Any) -> None:
    """Give a tokenizer without a token to pad with (GPT-2's) the one that ends a text."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
