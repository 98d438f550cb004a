"""Memory in the gate, on a task that can't be done without: carry a flag over a distance that attention doesn't see.

A sequence is noise with one of four flags in it, and ``distance`` tokens later a query that the flag answers. The model
is a stock Mistral whose layers see ``window`` tokens each, so that nothing from further back than ``(window - 1) *
layers`` tokens reaches a token, and positions are relative: without a state, the answer is a guess (25 %). Parameters
are equal: the states' 3 W numbers a layer are as many as the 3 H W / H of W / H more units in the plain FFN, and those
of ``smear_swiglu``; ``canon_swiglu`` has W more. These two read the token before, and the 3 before, in each layer: they
reach 8 and 12 tokens back where attention reaches 6, and no further.

Alpha begins at 8: a flag among 64 tokens moves a running mean by a hundredth, and what isn't read isn't learned. (From
0, the state gets to 39 % at distance 32 in as many steps; seed 0.) Alpha, beta and the decays have no weight decay and
ten times the learning rate; that matters little here, they may as well be fixed (100 % at distance 32 both ways).

    python recipes/memory.py [--quick] [--distances 16,32,64] [--seeds 0,1,2] [--output FOLDER] [--json]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from small_training import read_numbers, train
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import hf_glu  # noqa: F401  (the activations' names)
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.cli import tables
from hf_glu.errors import HfGluError, OptionError
from hf_glu.training.data.prediction import eval_mode

Data = dict[str, Any]
FLAGS, QUERY, NOISE, VOCABULARY, IGNORED = 4, 4, 5, 16, -100
LEAD = 8  # the flag comes at one of the first places
PLAIN, STATEFUL, CANON, SMEAR = "swiglu", "stateful_swiglu", "canon_swiglu", "smear_swiglu"
ACTIVATIONS = (PLAIN, STATEFUL, CANON, SMEAR)
# of the model, its training and its test
SIZES: Data = {
    "hidden": 32, "layers": 2, "heads": 4, "width": 64, "window": 4, "state": {"decay": [0.5, 0.999], "alpha": 8.0},
    "vocabulary": VOCABULARY, "batch_size": 32, "steps": 500, "lr": 1e-2, "factor": 10.0, "test": 1000,
}  # fmt: skip
QUICK = {"hidden": 16, "width": 32, "batch_size": 8, "steps": 10, "test": 64}


def make_batch(count: int, distance: int, seed: int) -> dict[str, Tensor]:
    """Return ``count`` sequences ``[count, LEAD + distance + 1]`` with the flag as the label after the query."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(NOISE, VOCABULARY, (count, LEAD + distance + 1), generator=generator)
    flag = torch.randint(FLAGS, (count, 1), generator=generator)
    place = torch.randint(LEAD, (count, 1), generator=generator)
    ids.scatter_(1, place, flag).scatter_(1, place + distance, QUERY)
    labels = torch.full_like(ids, IGNORED).scatter_(1, place + distance + 1, flag)  # a causal LM shifts its labels
    return {"input_ids": ids, "labels": labels}


def make_model(activation: str, sizes: Any, seed: int) -> MistralForCausalLM:
    """Return a fresh Mistral; the plain one is wider by as many parameters as a state has. No window: it sees all."""
    more = -(-sizes.width // sizes.hidden) if activation == PLAIN else 0
    config = MistralConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.width + more,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
        sliding_window=sizes.window, hidden_act=activation, initializer_range=sizes.hidden**-0.5, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    if activation == STATEFUL:
        config.hf_glu = {"state": sizes.state}
    torch.manual_seed(seed)
    return MistralForCausalLM(config)


def reach(sizes: Any) -> int:
    """Return from how many tokens back anything arrives through all layers' windows."""
    return (sizes.window - 1) * sizes.layers


def accuracy(model: MistralForCausalLM, batch: dict[str, Tensor]) -> float:
    """Return how often the likeliest of all tokens is the flag."""
    with eval_mode(model):
        logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    asked = labels != IGNORED
    return float((logits[asked].argmax(-1) == labels[asked]).float().mean())


def run(activation: str, distance: int, seed: int, sizes: Any) -> Data:
    """Train and test one model; seeds decide the data, whatever the model: an odd one the test, even ones the steps."""
    model, start = make_model(activation, sizes, seed), time.perf_counter()
    first = 2 * seed * 10**6
    train(
        model, lambda step: make_batch(sizes.batch_size, distance, first + 2 * step), sizes.steps,
        lr=sizes.lr, factor=sizes.factor, title=f"{activation}, distance {distance}, seed {seed}",
    )  # fmt: skip
    return {
        "activation": activation, "distance": distance, "seed": seed, "parameters": model.num_parameters(),
        "accuracy": accuracy(model, make_batch(sizes.test, distance, first + 1)),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def summarise(runs: list[Data]) -> list[Data]:
    """Return a row for each activation and distance: mean and standard deviation of the accuracy over the seeds."""
    rows = []
    for distance, activation in dict.fromkeys((run["distance"], run["activation"]) for run in runs):
        found = [run for run in runs if (run["distance"], run["activation"]) == (distance, activation)]
        values = [run["accuracy"] for run in found]
        rows.append({
            "distance": distance, "activation": activation, "parameters": found[0]["parameters"],
            "accuracies": values, "mean": fmean(values), "std": stdev(values) if len(values) > 1 else None,
            "seconds": fmean(run["seconds"] for run in found),
        })  # fmt: skip
    return rows


def experiment(sizes: Any, distances: list[int], seeds: list[int], output: Path | None) -> Data:
    """Train all models at all distances with all seeds; return plain data, and write it where there is a folder.

    Raises:
        OptionError: a distance that attention can reach.
    """
    if min(distances) <= reach(sizes):
        raise OptionError(f"distances must be above {reach(sizes)}, what attention reaches, got {min(distances)}")
    start = time.perf_counter()
    result: Data = {"sizes": vars(sizes), "seeds": seeds, "chance": 1 / FLAGS, "reach": reach(sizes), "runs": []}
    for distance in distances:
        for seed in seeds:
            result["runs"] += [run(activation, distance, seed, sizes) for activation in ACTIVATIONS]
            result |= {"rows": summarise(result["runs"]), "seconds": time.perf_counter() - start}
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                write_json(output / "memory.json", result)
    return result


def show(data: Data, console: Console) -> None:
    """Print the accuracies beside chance."""
    shown = tables.table(
        f"A flag carried beyond attention's reach of {data['reach']} tokens: accuracy, {len(data['seeds'])} seeds; "
        f"state {data['sizes']['state']}",
        "#distance", "activation", "#parameters", "#accuracy", "#standard deviation", "#chance", "#s a run",
    )  # fmt: skip
    for row in data["rows"]:
        shown.add_row(
            str(row["distance"]), row["activation"], f"{row['parameters']:,}", f"{row['mean']:.1%}",
            tables.number(row["std"], ".1%"), f"{data['chance']:.1%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(shown)
    console.print(f"{data['seconds']:.0f} s in all")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Seconds only, to see that it works.")] = False,
    distances: Annotated[str, typer.Option(help="From the flag to the query, such as 16,32,64.")] = "16,32,64",
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    output: Annotated[Path | None, typer.Option(help="Folder for memory.json: every run's numbers.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train with and without memory at every distance, and print one table, whichever way it falls."""
    try:
        torch.set_num_threads(1)  # more of them wait for each other longer than such small models compute
        sizes = SimpleNamespace(**SIZES | (QUICK if quick else {}))
        far = read_numbers(distances, "--distances")
        result = experiment(sizes, far, read_numbers(seeds, "--seeds"), output)
    except HfGluError as error:
        print(f"memory: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    tables.emit(result, show, json=json)


if __name__ == "__main__":
    typer.run(main)
