"""FFNs divided into experts: perplexity on held-out text, and the time of a prefill, by the share of active units.

Beside the dense model and ours: CMoE, and the limit, the best choice of units for each token (`hf_glu.bench.cmoe`). The
16 parts of each FFN are 2 always on and 14 routed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hf_glu.bench.cmoe import cmoe, limit
from hf_glu.bench.options import Shape
from hf_glu.bench.running import BenchOptions, Cell, Claim, Contender
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.conversion import split_experts
from hf_glu.conversion.held_out import is_causal
from hf_glu.errors import OptionError
from hf_glu.instruments.perplexity import next_token_perplexity
from hf_glu.training.language.blocks import IDS, Cutter
from hf_glu.training.language.reading import read_documents

ALWAYS, ROUTED = 2, 14
TOKENS = (16_384, 8_192)  # of the calibration, and those held out
BLOCK, PREFILL, BATCH = 512, 512, 4
DOCUMENTS = 10_000  # at most, of which blocks are taken
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


@dataclass
class Divided:
    """The model that is divided, and its texts.

    Attributes:
        options: of the bench.
    """

    options: BenchOptions

    def check(self) -> None:
        """Raise OptionError where model or text are missing, the text is short, or the model predicts no next token."""
        if not self.options.model or not self.options.text:
            raise OptionError("the bench of carving needs --model, a causal language model, and --text, its text")
        if not is_causal(self.model):
            raise OptionError(f"{self.options.model} is no causal language model: {type(self.model).__name__}")
        self.texts  # noqa: B018  raises where there are too few

    @cached_property
    def model(self) -> Any:
        """The dense model, in float32."""
        return load_model(str(self.options.model), dtype=torch.float32).eval()

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """Blocks of tokens ``[blocks, 512]`` to calibrate on, and held-out ones."""
        return texts_of(self.options, TOKENS)

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


def texts_of(options: BenchOptions, default: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return blocks of tokens ``[blocks, 512]`` to calibrate on, and held-out ones, ``default`` tokens unless asked.

    Raises:
        OptionError: the text is too short.
    """
    sizes = (*options.sizes(default), *default[1:])[:2]
    wanted = [max(1, size // BLOCK) for size in sizes]
    tokenizer = load_tokenizer(str(options.model))
    cutter = Cutter(tokenizer=tokenizer, length=BLOCK, framed=False)

    def blocks(name: str | None, count: int) -> list[list[int]]:
        documents = read_documents([str(name)], column=None)
        cut = cutter.cut(documents.select(range(min(len(documents), DOCUMENTS))))
        if len(found := [ids for ids in cut[IDS] if len(ids) == BLOCK]) < count:
            raise OptionError(f"{name} has too few tokens: {count * BLOCK:,} are needed")
        return found

    if options.held_out:
        first, last = blocks(options.text, wanted[0]), blocks(options.held_out, wanted[1])
    else:
        both = blocks(options.text, sum(wanted))
        first, last = both[: -wanted[1]], both[-wanted[1] :]
    return _spread(first, wanted[0]), _spread(last, wanted[1])


def _spread(blocks: list[list[int]], count: int) -> Tensor:
    """Return ``count`` of the blocks, from all over the text."""
    return torch.tensor([blocks[number * len(blocks) // count] for number in range(count)])


@torch.no_grad()
def _prefill(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, logits_to_keep=1)
