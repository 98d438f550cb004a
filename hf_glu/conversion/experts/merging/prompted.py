"""A router's rows from texts: each expert's is what the FFN gets to see on the texts that are to go there.

Shapes: E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_glu.conversion.fit.calibration import make_batches, reached
from hf_glu.errors import OptionError
from hf_glu.ffn.sites import convertible_sites
from hf_glu.instruments.recorder import Batch, Call, Watch, run_batches, watching


def check_prompts(prompts: Any, count: int, tokenizer: Any) -> None:
    """Raise OptionError unless there is a list of texts (or batches, or a tensor of ids) for each of the models."""
    if prompts is None:
        raise OptionError(f"router='hidden' needs prompts=, a list of texts for each of the {count} models")
    listed = isinstance(prompts, (list, tuple))
    if not listed or len(prompts) != count or any(isinstance(each, str) for each in prompts):
        given = f"{len(prompts)} of type {type(prompts[0]).__name__}" if listed and prompts else type(prompts).__name__
        raise OptionError(f"prompts must be a list of texts for each of the {count} models, got {given}")
    for number, each in enumerate(prompts, 1):
        if isinstance(each, (list, tuple)) and not each:
            raise OptionError(f"model {number} has no prompts")
        if tokenizer is None and isinstance(each, (list, tuple)) and any(isinstance(text, str) for text in each):
            raise OptionError("prompts need tokenizer=, which all models share")


def hidden_rows(models: Sequence[Any], prompts: Sequence[Any], tokenizer: Any) -> dict[str, Tensor]:
    """Return the router's rows for each FFN, by its site's name: ``[E, H]`` in float32.

    Row e is the mean of the FFN's inputs in model e on its own prompts, divided by its length.

    Raises:
        OptionError: the prompts can't be read, or never reach an FFN.
    """
    pairs = zip(models, prompts, strict=True)
    means = [site_means(model, make_batches(model, each, tokenizer)) for model, each in pairs]
    rows = {name: torch.stack([each[name].to(means[0][name]) for each in means]) for name in means[0]}
    return {name: normalize(values, dim=1).float() for name, values in rows.items()}


def site_means(model: Any, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean of what each FFN is given on ``batches``, without padding: ``[H]`` in float64."""
    sites = convertible_sites(model)
    found = mean_inputs(model, [site.in_proj for site in sites], batches)
    return {site.name: reached(site, mean).double() for site, mean in zip(sites, found, strict=True)}


def mean_inputs(model: nn.Module, modules: Sequence[nn.Module], batches: Iterable[Batch]) -> list[Tensor | None]:
    """Return the mean of all tokens that each module is given on ``batches``, without padding: ``[H]`` in float64.

    None: it is never run.
    """
    sums: dict[int, Tensor] = {}
    counts = [0 for _ in modules]

    def see(number: int, call: Call) -> None:
        rows = call.tokens.rows(call.x).detach().double()
        sums[number] = rows.sum(0) if number not in sums else sums[number] + rows.sum(0)
        counts[number] += len(rows)

    with watching(model, [Watch(module=module, see=partial(see, number)) for number, module in enumerate(modules)]):
        run_batches(model, batches)
    return [sums[number] / max(1, count) if number in sums else None for number, count in enumerate(counts)]
