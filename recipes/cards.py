"""The project's model cards, rendered again from the results beside them; first read from a run, where one is given.

``model_cards/NAME.json`` holds what is known of a checkpoint, and no weights; ``model_cards/NAME.md`` is made of it.

    python recipes/cards.py
    python recipes/cards.py runs/demo --name minilm-geglu-movie-reviews
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_glu.checkpoint.jsonio import write_json
from hf_glu.errors import HfGluError
from hf_glu.publishing.card.card import render_card
from hf_glu.publishing.card.facts import read_facts

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def main(
    folder: Annotated[Path | None, typer.Argument(help="A run or a conversion to read a card's facts from.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the card; the folder's.")] = None,
) -> None:
    """Write the cards."""
    if folder is not None:
        try:
            facts = read_facts(folder)
        except HfGluError as error:
            print(f"cards: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        facts["name"] = name or facts["name"]
        write_json(CARDS / f"{facts['name']}.json", facts)
    for path in sorted(CARDS.glob("*.json")):
        path.with_suffix(".md").write_text(render_card(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
        print(path.with_suffix(".md").relative_to(CARDS.parent))


if __name__ == "__main__":
    typer.run(main)
