"""FFNs divided into experts: perplexity on held-out text, and the time of a prefill, by the share of active units.

Beside the dense model and ours: CMoE, and the limit, the best choice of units for each token (`hf_glu.bench.cmoe`). The
16 parts of each FFN are 2 always on and 14 routed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_glu.bench.cmoe import cmoe, limit
from hf_glu.bench.on_text import BATCH, OnText
from hf_glu.bench.options import Shape
from hf_glu.bench.running import BenchOptions, Cell, Claim, Contender
from hf_glu.conversion import split_experts
from hf_glu.instruments.perplexity import next_token_perplexity
from hf_glu.training.language.blocks import IDS

ALWAYS, ROUTED = 2, 14
TOKENS = (16_384, 8_192)  # of the calibration, and those held out
PREFILL = 512
# routed experts that a token uses -> the largest ratio of a prefill's time to the dense model's
CHOSEN: dict[int, float | None] = {10: None, 6: None, 2: 1 / 1.3}


def cells(options: BenchOptions) -> Iterator[Cell]:
    """Yield a cell for each share of active units."""
    divided = Divided(options)
    divided.check()
    for top_k, target in CHOSEN.items():
        share = (ALWAYS + top_k) / (ALWAYS + ROUTED)
        shape: Shape = {"of": f"{ALWAYS}+{ROUTED} experts", "pass": "prefill", "tokens": PREFILL, "top_k": top_k}
        shape |= {"active": share, "dtype": options.dtype}
        claims = {"ours": Claim(peers=("dense",), target=target)}
        yield Cell(shape=shape, build=partial(divided.contenders, top_k, share), claims=claims)


class Divided(OnText):
    """The model that is divided, and its texts."""

    bench, tokens = "carving", TOKENS

    def contenders(self, top_k: int, share: float) -> dict[str, Contender]:
        """Return dense model, ours, CMoE and the limit, each with its perplexity."""
        batches = [{IDS: part} for part in self.texts[0].split(BATCH)]
        counts = (ALWAYS, ROUTED)
        ways: dict[str, Callable[[Any], object]] = {
            "dense": lambda model: None,
            "ours": lambda model: split_experts(model, f"{ALWAYS}+{ROUTED}", top_k=top_k, calibration=batches),
            "CMoE": lambda model: cmoe(model, batches, counts, top_k),
            "limit": lambda model: limit(model, share),
        }
        made: dict[str, Contender] = {}
        for name, change in ways.items():
            model = copy.deepcopy(self.model)
            change(model)
            found, _ = next_token_perplexity(model, [{IDS: part} for part in self.texts[1].split(BATCH)])
            dense = made["dense"].facts["perplexity"] if made else found
            facts = {"perplexity": found, "of dense": found / dense}
            made[name] = Contender(call=partial(_prefill, model, self.texts[1][:1]), tokens=PREFILL, facts=facts)
        return made


@torch.no_grad()
def _prefill(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, logits_to_keep=1)
