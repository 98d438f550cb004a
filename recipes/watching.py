"""What watching costs: ``python recipes/watching.py [pairs]``, training steps with and without it, in turns.

Each model is a GPT-2 from scratch on random tokens, forward, backward and AdamW on one thread. Seconds are those of the
processor, which other programs on the machine add less to. Beside the ratio of medians: the share of the watched steps
that is spent inside of the hooks.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_glu
from hf_glu.instruments import recorder
from hf_glu.instruments.while_training import TrainingStatistics

SIZES = {
    "pico": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 400}, (4, 32)),
    "4M": ({"n_embd": 192, "n_layer": 6, "n_head": 6, "vocab_size": 2000}, (8, 128)),
}
EXPERTS: dict[str, dict[str, Any]] = {"dense": {}, "4 experts, top 2": {"experts": "geglu_new*4", "top_k": 2}}
WARM = 2


class Clock:
    """Adds up the seconds inside of a function, in whose place it is put."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, plain = 0.0, getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begin

        setattr(owner, name, timed)


def measure(size: str, more: dict[str, Any], pairs: int, clocks: list[Clock]) -> str:
    """Return the row of one model."""
    config, shape = SIZES[size]
    model = GPT2LMHeadModel(GPT2Config(n_positions=shape[1], bos_token_id=1, eos_token_id=2, **config)).train()
    hf_glu.convert(model, "geglu_new", check=False, **more)
    ids = torch.randint(5, config["vocab_size"], shape)
    optimizer, statistics = torch.optim.AdamW(model.parameters(), lr=1e-4), TrainingStatistics(model)

    def step() -> float:
        begin = time.process_time()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return time.process_time() - begin

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(-WARM, 2 * pairs):
        watched = bool(turn // 2 % 2) != bool(turn % 2)  # neither is always the first of a pair
        if turn == 0:
            for clock in clocks:
                clock.seconds = 0.0
        if watched:
            with statistics.watching():
                took = step()
        else:
            took = step()
        if turn >= 0:
            seconds[watched].append(took)
    plain, watching = median(seconds[False]), median(seconds[True])
    inside = sum(clock.seconds for clock in clocks) / sum(seconds[True])
    return f"{1e3 * plain:8.1f} ms  {1e3 * watching:8.1f} ms  {watching / plain:.3f}  {inside:.1%} inside of hooks"


def main(pairs: int = 40) -> None:
    """Print a line for each model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clocks = [Clock(recorder._Watching, "tell"), Clock(recorder, "_begin"), Clock(recorder, "_note")]
    print("model                          plain      watched   ratio")
    for size in SIZES:
        for name, more in EXPERTS.items():
            few = pairs if size == "pico" else max(4, pairs // 4)
            print(f"{f'{size}, {name}':24} {measure(size, more, few, clocks)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
