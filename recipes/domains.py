"""One language model for two domains: experts with different activations against experts that are all alike.

A small GPT-2 is trained from scratch on sentences of movie reviews and of newspaper editorials (from the source
distribution of ``vaderSentiment``, MIT; Hutto and Gilbert, ICWSM 2014), with three sets of eight experts, of which a
token uses two. Active parameters are equal: a gated expert of width W has 3 H W weights and a plain one of width 3/2 W
just as many, so that plain experts are half as wide again (their biases differ by less than 0.1 % of the model).

    python recipes/domains.py [--quick] [--epochs 1.5] [--seeds 0,1,2] [--output FOLDER] [--json]
"""

from __future__ import annotations

import math
import sys
import time
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Annotated, Any

import small_training
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

import hf_glu
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.cli import tables
from hf_glu.config.experts import read_groups
from hf_glu.errors import HfGluError
from hf_glu.instruments.routing import active_parameters
from hf_glu.tasks import movies
from hf_glu.training.comparing.statistics import paired_p
from hf_glu.training.data.prediction import eval_mode
from hf_glu.training.loop.batches import BatchPlan
from hf_glu.training.options import TrainingOptions

Rows = list[list[int]]
Data = dict[str, Any]
DOMAINS = {"films": movies.MEMBER, "editorials": "nytEditorialSnippets_GroundTruth.txt"}
PAD, END, IGNORED = 0, 1, -100
HELD_OUT, SPLIT_SEED = 0.1, 0
WHEN = ("before", "after")
MIXED = "relu*2,gelu*2,swiglu*4"
# {plain}: 3/2 {gated}, so that the experts have as many weights
GROUPS = {
    MIXED: "relu:{plain}*2,gelu:{plain}*2,swiglu:{gated}*4",
    "swiglu*8": "swiglu:{gated}*8",
    "gelu*8": "gelu:{plain}*8",
}
# of the model, its training and its text (sentences of each domain; None: all)
SIZES: Data = {
    "hidden": 128, "layers": 3, "heads": 4, "width": 128, "vocabulary": 4096, "length": 64, "batch_size": 32,
    "epochs": 1.5, "lr": 2e-3, "sentences": None,
}  # fmt: skip
QUICK = {"hidden": 32, "layers": 2, "width": 16, "vocabulary": 300, "epochs": 1.0, "sentences": 120}


def read_domains(sentences: int | None) -> dict[str, dict[str, list[str]]]:
    """Return the sentences of each split and domain, each once; the validation split is always the same."""
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}}
    for domain, name in DOMAINS.items():
        texts = list(dict.fromkeys(text.strip() for text in movies.read_rated(movies.fetch_file(name))))[:sentences]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        held_out = int(HELD_OUT * len(texts))
        splits["validation"][domain] = [texts[index] for index in order[:held_out]]
        splits["train"][domain] = [texts[index] for index in order[held_out:]]
    return splits


def train_tokenizer(texts: list[str], sizes: Any) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on ``texts``; it puts an END before and after each sentence."""
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = level
    special: Any = {"special_tokens": ["<pad>", "<end>"], "initial_alphabet": level.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=sizes.vocabulary, show_progress=False, **special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A <end>", special_tokens=[("<end>", END)])
    tokenizer.enable_truncation(sizes.length)
    return tokenizer


def make_model(groups: str, sizes: Any, seed: int) -> GPT2LMHeadModel:
    """Return a fresh GPT-2 of experts: the activation field names a gated activation, config.hf_glu the experts."""
    config = GPT2Config(
        vocab_size=sizes.vocabulary, n_positions=sizes.length, n_embd=sizes.hidden, n_layer=sizes.layers,
        n_head=sizes.heads, n_inner=sizes.width, activation_function="swiglu", use_cache=False,
        bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    config.hf_glu = {"experts": {"groups": groups, "top_k": 2}}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which GPT-2's name doesn't say
    return model


def make_batch(rows: Rows) -> dict[str, torch.Tensor]:
    """Return token rows as a padded batch with its mask and labels."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, IGNORED)}


def train(model: GPT2LMHeadModel, rows: Rows, sizes: Any, seed: int, title: str) -> None:
    """Train; the order of the data is the seed's, whatever the model."""
    plan = BatchPlan([len(row) for row in rows], sizes.batch_size, seed)
    steps = max(1, math.ceil(sizes.epochs * plan.steps_per_epoch))
    small_training.train(
        model, lambda step: make_batch([rows[index] for index in plan[step]]), steps, lr=sizes.lr,
        warmup=TrainingOptions.warmup, title=title,
    )  # fmt: skip


def evaluate(model: GPT2LMHeadModel, validation: dict[str, Rows], batch_size: int) -> Data:
    """Return the loss (nats a token) and the experts' load by domain, and how far those loads are apart.

    To compare with, how far the loads of two ``halves`` of the same domain are.
    """
    losses, tokens = dict.fromkeys(validation, 0.0), dict.fromkeys(validation, 0)
    with eval_mode(model), hf_glu.expert_statistics(model) as whole, hf_glu.expert_statistics(model) as halves:
        for domain, rows in validation.items():
            ordered, size = sorted(rows, key=len), 2 * batch_size
            for begin in [*range(0, len(ordered), size), *range(1, len(ordered), size)]:
                batch = make_batch(ordered[begin : begin + size : 2])
                whole.label, halves.label = domain, f"{domain} {begin % 2}"
                whole.mask = halves.mask = batch["attention_mask"]
                count = int((batch["labels"][:, 1:] != IGNORED).sum())
                losses[domain] += count * float(model(**batch).loss)
                tokens[domain] += count
    loss = {domain: losses[domain] / tokens[domain] for domain in validation}
    loss["all"] = sum(losses.values()) / sum(tokens.values())
    apart = {"domains": whole.distance(*DOMAINS)}
    apart["halves"] = fmean(halves.distance(f"{domain} 0", f"{domain} 1") for domain in DOMAINS)
    return {"loss": loss, "tokens": tokens, "experts": whole.to_dict()["rows"], "distance": apart}


def group_loads(runs: list[Data], name: str) -> list[Data]:
    """Return the load of each layer's activation groups by domain, before and after, on the mean of the seeds."""
    groups = read_groups(name)
    ends = list(accumulate(group.count for group in groups))
    layers = dict.fromkeys(row["layer"] for row in runs[0]["after"]["experts"])

    def share(when: str, domain: str, layer: str, at: int) -> float:
        rows = [row for run in runs for row in run[when]["experts"] if (row["layer"], row["label"]) == (layer, domain)]
        return fmean(sum(row["load"][ends[at] - groups[at].count : ends[at]]) for row in rows)

    return [
        {"layer": number, "group": group.name}
        | {f"{domain} {when}": share(when, domain, layer, at) for domain in DOMAINS for when in WHEN}
        for number, layer in enumerate(layers) for at, group in enumerate(groups)
    ]  # fmt: skip


def summarise(runs: list[Data]) -> list[Data]:
    """Return a row for each variant: means and standard deviations over the seeds, and the test against MIXED."""
    rows: list[Data] = []
    for name in GROUPS:
        found = [run for run in runs if run["variant"] == name]
        values = {key: [run["after"]["loss"][key] for run in found] for key in ("all", *DOMAINS)}
        mixed = [run["after"]["loss"]["all"] for run in runs if run["variant"] == MIXED]
        rows.append({
            "variant": name, **{key: found[0][key] for key in ("parameters", "active_parameters")},
            "loss": {key: fmean(each) for key, each in values.items()},
            "std": {key: stdev(each) if len(each) > 1 else None for key, each in values.items()},
            "difference": None if name == MIXED else fmean(mixed) - fmean(values["all"]),
            "p_value": None if name == MIXED else paired_p(mixed, values["all"]),
            "distance": {
                f"{key} {when}": fmean(run[when]["distance"][key] for run in found)
                for key in ("domains", "halves") for when in WHEN
            },
            "groups": group_loads(found, name),
        })  # fmt: skip
    return rows


def run(name: str, seed: int, data: Data, sizes: Any) -> Data:
    """Train and evaluate one variant with one seed."""
    groups = GROUPS[name].format(plain=3 * sizes.width // 2, gated=sizes.width)
    model, start = make_model(groups, sizes, seed), time.perf_counter()
    found = {"before": evaluate(model, data["validation"], sizes.batch_size)}
    train(model, [row for rows in data["train"].values() for row in rows], sizes, seed, f"{name}, seed {seed}")
    found["after"] = evaluate(model, data["validation"], sizes.batch_size)
    return {
        "variant": name, "groups": groups, "seed": seed, "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model), "seconds": time.perf_counter() - start, **found,
    }  # fmt: skip


def experiment(sizes: Any, seeds: list[int], output: Path | None) -> Data:
    """Run all variants with all seeds; return everything as plain data, and write it where there is a folder."""
    start, splits = time.perf_counter(), read_domains(sizes.sentences)
    tokenizer = train_tokenizer([text for texts in splits["train"].values() for text in texts], sizes)
    data = {
        split: {domain: [each.ids for each in tokenizer.encode_batch(texts)] for domain, texts in domains.items()}
        for split, domains in splits.items()
    }
    result: Data = {"sizes": vars(sizes), "seeds": seeds, "runs": []}
    result["sentences"] = {split: {key: len(rows) for key, rows in each.items()} for split, each in data.items()}
    for seed in seeds:  # seed by seed: what is interrupted has compared all variants so far
        result["runs"] += [run(name, seed, data, sizes) for name in GROUPS]
        result |= {"variants": summarise(result["runs"]), "seconds": time.perf_counter() - start}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "domains.json", result)
    return result


def show(data: Data, console: Console) -> None:
    """Print the variants, and where the mixed one's tokens go."""
    sentences = ", ".join(f"{count:,} {domain}" for domain, count in data["sentences"]["train"].items())
    shown = tables.table(
        f"Validation loss in nats a token, {len(data['seeds'])} seeds; trained on {sentences}; mixed: {MIXED}",
        "experts", "#parameters", "#active", "#loss", *(f"#{domain}" for domain in DOMAINS), "#mixed - this",
        "#p (paired t-test)", "#apart before", "#apart after", "#halves",
    )  # fmt: skip
    for row in data["variants"]:
        losses = [f"{row['loss'][key]:.4f} ± {tables.number(row['std'][key], '.4f')}" for key in ("all", *DOMAINS)]
        tests = [tables.number(row["difference"], "+.4f"), tables.number(row["p_value"], ".3f")]
        apart = [f"{row['distance'][key]:.3f}" for key in ("domains before", "domains after", "halves after")]
        name = "mixed" if row["variant"] == MIXED else row["variant"]
        shown.add_row(name, f"{row['parameters']:,}", f"{row['active_parameters']:,}", *losses, *tests, *apart)
    console.print(shown)
    console.print("apart: total variation distance of the domains' loads, mean of the layers; halves: of one domain")
    layers = data["variants"][0]["groups"]
    shown = tables.table("Where mixed sends the tokens", *(f"#{key}" for key in layers[0]))
    for row in layers:
        shown.add_row(*(f"{value:.1%}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(shown)
    console.print(f"{data['seconds']:.0f} s in all")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Seconds only, to see that it works.")] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training sentences.")] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0,1,2",
    output: Annotated[Path | None, typer.Option(help="Folder for domains.json: every run's numbers.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train every variant with every seed, and print one table, whichever way it falls."""
    try:
        sizes = SIZES | (QUICK if quick else {}) | ({} if epochs is None else {"epochs": epochs})
        result = experiment(SimpleNamespace(**sizes), small_training.read_numbers(seeds, "--seeds"), output)
    except HfGluError as error:
        print(f"domains: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    tables.emit(result, show, json=json)


if __name__ == "__main__":
    typer.run(main)
