"""``hf-glu gates``."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_glu.cli import tables
from hf_glu.cli.commands import Json, app
from hf_glu.errors import DataError, OptionError
from hf_glu.publishing.report.formats import label

MAX_TOKENS = 256  # more would not be seen
_MEASURES = ("openness", "state", "shift")


@app.command()
def gates(
    model: Annotated[str, typer.Argument(help="Local folder or Hub id.")],
    text: Annotated[str, typer.Option(help=f"The text that it reads; cut at {MAX_TOKENS} tokens.")],
    html: Annotated[Path | None, typer.Option(help="Write heat maps of tokens and layers to this file.")] = None,
    json: Json = False,
) -> None:
    """Show how open a model's gates are on a text, and what stateful ones remember."""
    from hf_glu.checkpoint.writing import check_file
    from hf_glu.cli.early import check_sources
    from hf_glu.config.extras import need
    from hf_glu.publishing.report.gates import gates_page
    from hf_glu.publishing.report.page import write_page

    if not text.strip():
        raise OptionError("--text is empty: give a text that the model reads")
    if html is not None:
        need("jinja2", "matplotlib", what="--html")
        check_file(html)
    check_sources(model)
    data = read_gates(model, text)
    if html is not None:
        data["html"] = str(write_page(gates_page(data), html, command="gates"))
    tables.emit(data, show, json=json)


def read_gates(source: str, text: str) -> dict[str, Any]:
    """Return what the gates of a checkpoint do on a text, its tokens as strings, and each layer's means.

    Raises:
        CheckpointError: it or its tokenizer can't be loaded.
        DataError: the tokenizer makes no tokens of the text.
        NoSiteError: it has no gates.
    """
    import torch

    from hf_glu.checkpoint.loading import load_model, load_tokenizer
    from hf_glu.config.traits import cut_at
    from hf_glu.instruments.gates import record_gates
    from hf_glu.instruments.probe import evaluating, with_decoder

    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32)
    limit = cut_at(model.config, tokenizer, MAX_TOKENS)
    encoded = tokenizer([text], truncation=True, max_length=limit, return_tensors="pt")
    if not encoded["input_ids"].numel():
        raise DataError(f"the tokenizer of {source} makes no tokens of {text!r}")
    known = signature(model.forward).parameters
    inputs = {key: value for key, value in encoded.items() if key in known}
    with record_gates(model) as recorded, evaluating(model):
        model(**with_decoder(model, inputs))
    rows = [{**record.to_dict(), "mean": record.means()} for record in recorded.layers]
    tokens = [label(tokenizer.decode([token])) for token in encoded["input_ids"][0].tolist()]
    return {"model": source, "text": text, "tokens": tokens, "html": None, "rows": rows}


def show(data: tables.Data, console: Console) -> None:
    """Show each layer's means."""
    shown = tables.table(
        f"Gates on {len(data['tokens'])} tokens", "layer", "activation", "#tokens", "#openness", "#state", "#shift"
    )
    for row in data["rows"]:
        means = [tables.number(row["mean"][key], ".3f" if key == "shift" else ".1%") for key in _MEASURES]
        shown.add_row(row["layer"], row["activation"], str(row["tokens"]), *means)
    console.print(shown)
    if data["html"]:
        console.print(data["html"], soft_wrap=True)
