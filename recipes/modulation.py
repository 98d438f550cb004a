"""What a context vector knows of a text, and what thresholds and slopes set by hand do to a fine-tuned BERT.

Texts: movie reviews, product reviews, newspaper editorials and tweets (from the source distribution of
``vaderSentiment``, MIT; Hutto and Gilbert, ICWSM 2014), equally many of each. A linear probe (logistic regression,
five-fold cross-validation) tells the four apart from the context vector of a converted BERT, never trained on this,
beside two other views of the same layer: its whole mean, and 8 principal components of that mean.

The hand control: a BERT fine-tuned on the movie reviews is evaluated with every gate's threshold, or slope, shifted.

    python recipes/modulation.py [--model FOLDER] [--layers 0,2,4] [--sentences 1000] [--output FOLDER] [--json]

``--model`` is a run's folder (`hf-glu finetune --to modulated_swiglu ...`); without it one is trained first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from demo import BASE_MODEL, SUBSET, model_folder
from rich.console import Console
from small_training import read_numbers

import hf_glu
from hf_glu.checkpoint.jsonio import write_json
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.cli import tables
from hf_glu.errors import HfGluError
from hf_glu.instruments.probe import evaluating
from hf_glu.tasks import movies
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.options import JobOptions, TrainingOptions

SOURCES = {
    "movie reviews": movies.MEMBER,
    "product reviews": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
THRESHOLDS = (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0)
SLOPES = (0.4, 0.7, 0.9, 1.0, 1.2, 1.6, 2.4)
TARGET, SIZE, FOLDS, BATCH, LENGTH, SEED = "modulated_swiglu", 8, 5, 64, 64, 0
COLUMNS = {"threshold": "+.1f", "slope": ".1f", "accuracy": ".2%", "positive": ".1%"}
Data = dict[str, Any]


def read_texts(sentences: int) -> tuple[list[str], np.ndarray]:
    """Return as many sentences of each source, and the number of the source of each."""
    texts, labels = [], []
    for number, name in enumerate(SOURCES.values()):
        found = list(dict.fromkeys(text.strip() for text in movies.read_rated(movies.fetch_file(name))))
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED)).tolist()[:sentences]
        texts += [found[index] for index in order]
        labels += [number] * len(order)
    return texts, np.array(labels)


def views(layer: int, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the context vector of each text, and the mean of what it is made of, the layer's input."""
    model = load_model(model_folder())
    hf_glu.convert(model, "modulated_geglu", context={"layer": layer, "size": SIZE}, check=False)
    tokenizer, vectors, means = load_tokenizer(model_folder()), [], []
    for begin in range(0, len(texts), BATCH):
        inputs = tokenizer(
            texts[begin : begin + BATCH], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        vectors.append(hf_glu.context_vector(model, **inputs)[:, 0])
        with evaluating(model):
            hidden = model(**inputs, output_hidden_states=True).hidden_states[layer]
        mask = inputs["attention_mask"].unsqueeze(-1)
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return {"context vector": torch.cat(vectors).numpy(), "whole mean": torch.cat(means).numpy()}


def probe(features: np.ndarray, labels: np.ndarray, *, components: int | None = None) -> float:
    """Return the accuracy of a linear probe on held-out texts."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = [PCA(components)] if components else []
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    chain = make_pipeline(*parts, StandardScaler(), LogisticRegression(max_iter=2000))
    return float(cross_val_score(chain, features, labels, cv=folds).mean())


def separation(layers: list[int], sentences: int) -> list[Data]:
    """Return the probe's accuracy for each layer that the vector may be made of."""
    texts, labels = read_texts(sentences)
    rows = []
    for layer in layers:
        found = views(layer, texts)
        whole = found["whole mean"]
        rows.append(
            {
                "layer": layer, "texts": len(texts), "chance": float(np.bincount(labels).max() / len(labels)),
                "context_vector": probe(found["context vector"], labels), "numbers": SIZE,
                "components": probe(whole, labels, components=SIZE), "whole_mean": probe(whole, labels),
                "hidden": whole.shape[1],
            }
        )  # fmt: skip
    return rows


def hand_control(folder: str, rows: int | None) -> list[Data]:
    """Return the accuracy on the movie reviews under each threshold and slope, and how open the gates are then."""
    from hf_glu.tasks.table import find_task
    from hf_glu.training.data.features import make_features
    from hf_glu.training.data.models import load_for_task
    from hf_glu.training.data.prediction import predict

    task = find_task("movie_reviews")
    model, tokenizer, text = load_for_task(folder, task, form="auto", seed=SEED)
    data = movies.load_movies(ratings=False)["validation"]
    data = data.select(range(min(rows or len(data), len(data))))
    features = make_features(task, data, tokenizer, max_length=128, text=text)
    settings = [{"threshold": value} for value in THRESHOLDS] + [{"slope": value} for value in SLOPES if value != 1]
    found = []
    for setting in settings:
        with hf_glu.modulation(model, **setting):
            logits = predict(model, features, tokenizer, title=str(setting))
        positive = logits.argmax(1)
        accuracy = float((positive == np.array(data["label"])).mean())
        found.append({"threshold": 0.0, "slope": 1.0, **setting, "accuracy": accuracy, "positive": positive.mean()})
    return found


def train(folder: Path) -> str:
    """Fine-tune a modulated BERT on the movie reviews; return its folder."""
    job = JobOptions(
        model=model_folder(), task="movie_reviews", to=TARGET, output=str(folder), base_model=BASE_MODEL,
        train_size=SUBSET,
    )  # fmt: skip
    options = TrainingOptions(epochs=1.0, lr=5e-5, activation_lr=1e-3, seed=SEED, evaluate_every=0)
    finetune_and_report(job, options)
    return str(folder)


def show(result: Data, console: Console) -> None:
    """Print two tables."""
    first = result["separation"][0]
    shown = tables.table(
        f"Which of four sources is a text from? Linear probe, {first['texts']:,} texts, {FOLDS}-fold",
        "#layer", f"#context vector ({SIZE})", f"#PCA of the mean ({SIZE})", f"#mean ({first['hidden']})", "#chance",
    )  # fmt: skip
    for row in result["separation"]:
        found = (f"{row[key]:.1%}" for key in ("context_vector", "components", "whole_mean", "chance"))
        shown.add_row(str(row["layer"]), *found)
    console.print(shown)
    shown = tables.table("All gates shifted by hand: movie reviews", "#threshold", "#slope", "#accuracy", "#positive")
    for row in result["control"]:
        shown.add_row(*(f"{row[key]:{form}}" for key, form in COLUMNS.items()))
    console.print(shown)


def main(
    model: Annotated[
        str | None, typer.Option(help="Folder of a fine-tuned modulated model; else one is trained.")
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers whose input the context vector is made of.")] = "0,2,4",
    sentences: Annotated[int, typer.Option(help="Texts of each source.")] = 1000,
    rows: Annotated[int | None, typer.Option(help="Validation rows of the hand control.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for modulation.json.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Probe the context vectors, turn the hand control, print two tables."""
    try:
        chosen = read_numbers(layers, "--layers")
        with tempfile.TemporaryDirectory() as scratch:
            control = hand_control(model or train(Path(scratch) / "run"), rows)
        result = {"separation": separation(chosen, sentences), "control": control}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "modulation.json", result)
    except HfGluError as error:
        print(f"modulation: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    tables.emit(result, show, json=json)


if __name__ == "__main__":
    typer.run(main)
