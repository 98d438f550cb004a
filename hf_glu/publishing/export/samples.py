"""The inputs on which an export is traced and compared, and the comparison.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from hf_glu.errors import OptionError
from hf_glu.instruments.probe import max_abs_difference, probe_inputs, run

Outputs = dict[str, dict[str, Tensor]]
# B and T: never the traced ones
CHECKED = ((1, 7), (3, 19))


def sample(model: Any, batch: int, tokens: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs, the first sequence with padding at its end where there is a mask.

    ``input_ids`` ``[B, T]``, ``attention_mask`` and ``token_type_ids`` where the model has them, and the ids of an
    encoder-decoder's decoder, which are fewer (none where its head makes them of the text).

    Raises:
        OptionError: the model takes no token ids.
    """
    rows = [probe_inputs(model, seed=1000 * seed + row, length=tokens) for row in range(batch)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if "input_ids" not in inputs:
        raise OptionError(f"{type(model).__name__} takes {', '.join(inputs)}: an export needs a model of input_ids")
    ids, accepted = inputs["input_ids"], signature(model.forward).parameters
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = ids[..., : ids.shape[-1] // 2 + 1].clone()
        if "For" in (head := type(model).__name__) and not head.endswith("Generation"):
            del inputs["decoder_input_ids"]  # a classifier's decoder reads the text itself
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, ..., -2:] = 0
    kinds = getattr(model.config, "type_vocab_size", 0)
    if "token_type_ids" in accepted and kinds > 1:
        inputs["token_type_ids"] = ids % kinds
    return inputs


def no_cache(model: Any) -> dict[str, bool]:
    """Return the argument that has a model keep no cache."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


def expected_outputs(model: Any) -> Outputs:
    """Return a model's outputs on each of the `CHECKED` shapes."""
    return on_samples(model, lambda inputs: run(model, {**inputs, **no_cache(model)}))


def on_samples(model: Any, outputs: Callable[[dict[str, Tensor]], Mapping[str, Any]]) -> Outputs:
    """Return what ``outputs`` makes of the inputs for ``model`` of each of the `CHECKED` shapes."""
    batches = [sample(model, *shape, seed=number) for number, shape in enumerate(CHECKED, start=1)]
    return {_shape(batch["input_ids"]): dict(outputs(batch)) for batch in batches}


def _shape(ids: Tensor) -> str:
    return f"{len(ids)} x {ids.shape[-1]} tokens"


def distances(expected: Outputs, actual: Outputs) -> dict[str, float]:
    """Return max |a - b| / max(1, max |b|) of all outputs by shape; what is expected nowhere doesn't count.

    Raises:
        OptionError: an output is missing, or has another shape.
    """
    found = {}
    for shape, wanted in expected.items():
        given = {name: value for name, value in actual[shape].items() if name in wanted}
        found[shape] = max(
            difference / max(1.0, float(wanted[name].abs().max()))
            for name, difference in max_abs_difference(wanted, given).items()
        )
    return found
