"""What the FFNs of a model get to see: calibration texts or tensors as batches, and the inputs of one site on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_glu.activation.context import Reader
from hf_glu.config.traits import cut_at, longest_text, vocabulary
from hf_glu.errors import ConversionError, OptionError, shown
from hf_glu.ffn.forward import ffn_units
from hf_glu.ffn.sites import Site
from hf_glu.instruments.probe import evaluating, give_pad_token, with_decoder
from hf_glu.instruments.recorder import first_inputs, inputs_of

BATCH = 32
CHECKED, SAME = 16, 1e-2  # tokens that units are compared on, and how near they are, relative to the largest
MAX_LENGTH = 128
MAX_TOKENS = 65_536
LEAST = 2  # tokens that anything is fitted to: one of them is held out

Batches = list[dict[str, Tensor]]


def make_batches(model: Any, calibration: Any, tokenizer: Any = None) -> Batches:
    """Return ``calibration`` as batches of the model's inputs.

    Args:
        model: the model.
        calibration: texts (with ``tokenizer``), token ids ``[sequences, length]``, embeddings ``[sequences, length,
            hidden]``, or batches: mappings as the model's forward takes them.
        tokenizer: of the texts.

    Raises:
        OptionError: nothing in it, texts without a tokenizer, token ids that the model doesn't have, more of them than
            it has positions, embeddings of another width, NaN or infinite values.
    """
    if isinstance(calibration, Tensor):
        calibration = _tensor_batches(calibration)
    elif isinstance(calibration, (str, Mapping)) or not isinstance(calibration, Iterable):
        raise OptionError(f"calibration must be texts, a tensor or batches, got {type(calibration).__name__}")
    items = list(calibration)
    if not items:
        raise OptionError("there are no calibration data")
    if all(isinstance(item, str) for item in items):
        items = list(_text_batches(model, items, tokenizer))
    if not all(isinstance(item, Mapping) for item in items):
        raise OptionError("calibration must be texts, a tensor or batches (mappings of the forward's arguments)")
    device = next(model.parameters()).device
    batches = [{key: value.to(device) for key, value in _tensors(batch).items()} for batch in items]
    for batch in batches:
        _check(model, batch)
    return [with_decoder(model, {key: batch[key] for key in batch if key != "labels"}) for batch in batches]


def _tensor_batches(values: Tensor) -> list[dict[str, Tensor]]:
    name, ranks = ("inputs_embeds", (3,)) if values.is_floating_point() else ("input_ids", (2,))
    if values.ndim not in ranks:
        raise OptionError(f"calibration {name} must have {ranks[0]} dimensions, got {list(values.shape)}")
    return [{name: part} for part in values.split(BATCH)]


def _text_batches(model: Any, texts: list[str], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    if tokenizer is None:
        raise OptionError("calibration texts need tokenizer=")
    give_pad_token(tokenizer)
    limit = cut_at(model.config, tokenizer, MAX_LENGTH)
    for begin in range(0, len(texts), BATCH):
        part = texts[begin : begin + BATCH]
        yield dict(tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt"))


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a batch's entries as tensors, without those that are None."""
    found: dict[str, Tensor] = {}
    for key, value in batch.items():
        try:
            found |= {} if value is None else {key: torch.as_tensor(value)}
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"calibration {key} must be a tensor, got {shown(value)}") from error
    return found


def _check_ids(model: Any, ids: Tensor) -> None:
    """Raise OptionError where token ids ``[sequences, ..., length]`` are none of the model's, or too many."""
    if ids.ndim < 2 or ids.is_floating_point():
        raise OptionError(
            f"calibration input_ids must be whole numbers [sequences, length], got {ids.dtype} {list(ids.shape)}"
        )
    count, longest = vocabulary(model.config), longest_text(model.config)
    if count is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise OptionError(
            f"calibration input_ids must be from 0 to {count - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    if longest is not None and ids.shape[1] > longest:
        raise OptionError(f"calibration input_ids have {ids.shape[1]} tokens, and the model {longest} positions")


def _check(model: Any, batch: Mapping[str, Tensor]) -> None:
    for key, value in batch.items():
        if not value.numel():
            raise OptionError(f"calibration {key} is empty: {list(value.shape)}")
        if value.is_floating_point() and not value.isfinite().all():
            raise OptionError(f"calibration {key} has NaN or infinite values")
    if "input_ids" in batch:
        _check_ids(model, batch["input_ids"])
    if (embeds := batch.get("inputs_embeds")) is None:
        return
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE has hashes of characters
        return
    if isinstance(table, nn.Embedding) and embeds.shape[-1] != table.embedding_dim:
        raise OptionError(f"calibration inputs_embeds are {embeds.shape[-1]} wide, the model is {table.embedding_dim}")


def inputs_at(model: Any, sites: Sequence[Site], batches: Batches, *, limit: int = MAX_TOKENS) -> list[Tensor | None]:
    """Return what each FFN is given on ``batches``, ``[tokens, hidden]`` without padding; None: it is never run.

    Raises:
        ConversionError: an out-projection isn't given its FFN's units, as where a norm or an adapter stands between
            (BitNet, Kosmos-2, Zamba 2): whatever is fitted to the units would be fitted to something else.
    """
    found = inputs_of(model, [site.in_proj for site in sites], batches, limit=limit)
    parts = [part for site in sites for part in (site.in_proj, site.out_proj)]
    pairs = iter(inputs_of(model, parts, batches[:1], limit=CHECKED))
    with evaluating(model):
        for site, x, given in zip(sites, pairs, pairs, strict=True):
            if x is not None and given is not None and not _are_units(site, x, given.float()):
                raise ConversionError(
                    f"{site.name}: {type(site.anchor).__name__} has more between its projections than the activation: "
                    "nothing can be fitted to its units"
                )
    return found


def _are_units(site: Site, x: Tensor, given: Tensor) -> bool:
    """Return whether an out-projection was given the units of ``x``, as far as they are known without a text."""
    units = ffn_units(site, x).float()
    if units.shape != given.shape or not len(given) or any(isinstance(part, Reader) for part in site.act.modules()):
        return True
    return torch.allclose(units, given, rtol=SAME, atol=SAME * float(given.abs().max()))


def site_inputs(model: Any, site: Site, batches: Batches, *, limit: int = MAX_TOKENS) -> Tensor:
    """Return what the FFN at ``site`` is given on ``batches``: ``[tokens, hidden]`` in float32, without padding.

    Raises:
        OptionError: the model never runs the site on these batches.
    """
    return reached(site, first_inputs(model, site.in_proj, batches, limit=limit))


def reached(site: Site, inputs: Tensor | None) -> Tensor:
    """Return what a site was given in float32; raise OptionError where it was never run."""
    if inputs is None:
        raise OptionError(f"the calibration data never reach {site.name}: give what its stack reads, too")
    if len(inputs) < LEAST:
        raise OptionError(f"the calibration data give {site.name} {len(inputs)} tokens: give {LEAST} at least")
    return inputs.float()
