"""Language modelling on real text with and without a state in the gate: a small GPT-2 and a small Mamba from scratch.

The text is that of ``domains.py``: sentences of movie reviews and of newspaper editorials (from the source distribution
of ``vaderSentiment``, MIT; Hutto and Gilbert, ICWSM 2014), each a sequence of its own, of which the same tenth is held
out whatever the seed. With one seed, both models of a family start from the same weights (alpha and beta are 0 then,
so that they are the same function), and see the same batches. The states add 3 numbers a channel: 0.3 and 0.4 %.

Alpha, beta and the decays are in an optimizer group without weight decay; ten times the learning rate (``--factor 10``)
makes the stateful models 0.02 nats worse (seed 3, which chose the default).

    python recipes/stateful_lm.py [--quick] [--epochs 0.5] [--factor 1] [--seeds 0,1,2] [--output FOLDER] [--json]
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from domains import END, IGNORED, PAD, Rows, make_batch, read_domains, train_tokenizer
from rich.console import Console
from small_training import read_numbers, train
from transformers import AutoConfig, AutoModelForCausalLM

import hf_glu  # noqa: F401  (the activations' names)
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.cli import tables
from hf_glu.errors import HfGluError
from hf_glu.training.comparing.statistics import paired_p
from hf_glu.training.data.prediction import eval_mode
from hf_glu.training.loop.batches import BatchPlan

Data = dict[str, Any]
# the config's field of the activation, the plain and the stateful one, and the sizes; Mamba's scan is slow on a CPU
FAMILIES: dict[str, Data] = {
    "gpt2": {
        "field": "activation_function", "activations": ["geglu_new", "stateful_geglu_new"],
        "config": {"n_embd": 96, "n_layer": 2, "n_head": 4, "n_inner": 192},
    },
    "mamba": {
        "field": "hidden_act", "activations": ["silu", "stateful_silu"],
        "config": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    },
}  # fmt: skip
STATE: Data = {"decay": [0.5, 0.99]}
# of the training and its text (sentences of each domain; None: all)
SIZES: Data = {
    "vocabulary": 2048, "length": 64, "batch_size": 32, "epochs": 0.5, "lr": 3e-3, "factor": 1.0, "sentences": None,
}  # fmt: skip
QUICK = {"vocabulary": 300, "length": 16, "batch_size": 16, "sentences": 60}


def read_rows(sizes: Any) -> dict[str, Rows]:
    """Return the sentences of both splits as tokens."""
    texts = {split: [text for each in domains.values() for text in each]
             for split, domains in read_domains(sizes.sentences).items()}  # fmt: skip
    tokenizer = train_tokenizer(texts["train"], sizes)
    return {split: [each.ids for each in tokenizer.encode_batch(found)] for split, found in texts.items()}


def make_model(family: str, activation: str, sizes: Any, seed: int) -> Any:
    """Return a fresh model; with the same seed, all of a family begin with the same weights."""
    entry = FAMILIES[family]
    positions = {"n_positions": sizes.length} if family == "gpt2" else {}
    config = AutoConfig.for_model(
        family, vocab_size=sizes.vocabulary, bos_token_id=END, eos_token_id=END, pad_token_id=PAD, use_cache=False,
        **entry["config"], **positions, **{entry["field"]: activation},
    )  # fmt: skip
    if activation.startswith("stateful_"):
        config.hf_glu = {"state": STATE}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.loss_type = "ForCausalLM"  # which GPT-2's name doesn't say
    return model


def evaluate(model: Any, rows: Rows, batch_size: int) -> float:
    """Return the loss in nats a token."""
    ordered, loss, tokens = sorted(rows, key=len), 0.0, 0
    with eval_mode(model):
        for begin in range(0, len(ordered), batch_size):
            batch = make_batch(ordered[begin : begin + batch_size])
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss += count * float(model(**batch).loss)
            tokens += count
    return loss / tokens


def run(family: str, activation: str, seed: int, data: dict[str, Rows], sizes: Any) -> Data:
    """Train and evaluate one model; the order of the data is the seed's, whatever the model."""
    model, start, rows = make_model(family, activation, sizes, seed), time.perf_counter(), data["train"]
    plan = BatchPlan([len(row) for row in rows], sizes.batch_size, seed)
    steps = max(1, math.ceil(sizes.epochs * plan.steps_per_epoch))
    train(
        model, lambda step: make_batch([rows[index] for index in plan[step]]), steps,
        lr=sizes.lr, factor=sizes.factor, title=f"{family}, {activation}, seed {seed}",
    )  # fmt: skip
    return {
        "family": family, "activation": activation, "seed": seed, "parameters": model.num_parameters(), "steps": steps,
        "loss": evaluate(model, data["validation"], 2 * sizes.batch_size), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def summarise(runs: list[Data]) -> list[Data]:
    """Return a row for each model: mean and standard deviation over the seeds, and the test against the plain one."""
    rows: list[Data] = []
    for family, entry in FAMILIES.items():
        values = {name: [run for run in runs if (run["family"], run["activation"]) == (family, name)]
                  for name in entry["activations"]}  # fmt: skip
        plain = [run["loss"] for run in values[entry["activations"][0]]]
        for name, found in values.items():
            losses = [run["loss"] for run in found]
            apart = [mine - other for mine, other in zip(losses, plain, strict=True)]
            baseline = name == entry["activations"][0]
            rows.append({
                "family": family, "activation": name, "parameters": found[0]["parameters"], "losses": losses,
                "mean": fmean(losses), "std": stdev(losses) if len(losses) > 1 else None,
                "difference": None if baseline else fmean(apart),
                "difference_std": None if baseline or len(apart) < 2 else stdev(apart),
                "p_value": None if baseline else paired_p(losses, plain),
                "seconds": fmean(run["seconds"] for run in found),
            })  # fmt: skip
    return rows


def experiment(sizes: Any, seeds: list[int], output: Path | None) -> Data:
    """Run everything with every seed; return plain data, and write it where there is a folder."""
    start, data = time.perf_counter(), read_rows(sizes)
    result: Data = {"sizes": vars(sizes), "state": STATE, "families": FAMILIES, "seeds": seeds, "runs": []}
    result["sentences"] = {split: len(rows) for split, rows in data.items()}
    result["tokens"] = {split: sum(len(row) - 1 for row in rows) for split, rows in data.items()}
    for seed in seeds:  # seed by seed: what is interrupted has compared all models so far
        for family, entry in FAMILIES.items():
            result["runs"] += [run(family, activation, seed, data, sizes) for activation in entry["activations"]]
        result |= {"rows": summarise(result["runs"]), "seconds": time.perf_counter() - start}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "stateful_lm.json", result)
    return result


def show(data: Data, console: Console) -> None:
    """Print the losses and their differences."""
    shown = tables.table(
        f"Validation loss in nats a token, {len(data['seeds'])} seeds; {data['sizes']['epochs']:g} epochs of "
        f"{data['tokens']['train']:,} tokens",
        "model", "activation", "#parameters", "#loss", "#stateful - plain", "#p (paired t-test)", "#s a run",
    )  # fmt: skip
    for row in data["rows"]:
        apart, spread = (tables.number(row[key], form)
                         for key, form in (("difference", "+.4f"), ("difference_std", ".4f")))  # fmt: skip
        shown.add_row(
            row["family"], row["activation"], f"{row['parameters']:,}",
            f"{row['mean']:.4f} ± {tables.number(row['std'], '.4f')}",
            apart if row["difference"] is None else f"{apart} ± {spread}",
            tables.number(row["p_value"], ".3f"), f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(shown)
    rate = f"its learning rate {data['sizes']['factor']:g} times the others'"
    console.print(f"state {data['state']}, {rate}; {data['seconds']:.0f} s in all")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Seconds only, to see that it works.")] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training sentences.")] = None,
    factor: Annotated[float, typer.Option(help="Of the learning rate of alpha, beta and the decays.")] = 1.0,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    output: Annotated[Path | None, typer.Option(help="Folder for stateful_lm.json: every run's numbers.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train both families with and without a state, and print one table, whichever way it falls."""
    try:
        torch.set_num_threads(1)  # more of them wait for each other longer than such small models compute
        chosen = {"factor": factor} | ({} if epochs is None else {"epochs": epochs})
        sizes = SimpleNamespace(**SIZES | (QUICK if quick else {}) | chosen)
        result = experiment(sizes, read_numbers(seeds, "--seeds"), output)
    except HfGluError as error:
        print(f"stateful_lm: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    tables.emit(result, show, json=json)


if __name__ == "__main__":
    typer.run(main)
