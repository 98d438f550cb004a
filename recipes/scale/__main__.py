"""Prints the tables of recipes/SCALE.md, or compares the formulas with what is measured.

python -m recipes.scale [--json] [--check]
"""

from __future__ import annotations

from typing import Annotated

import typer

from hf_glu.checkpoint.jsonio import to_json
from recipes.scale import tables
from recipes.scale.check import run


def main(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the formulae with small points, here and now.")
    ] = False,
) -> None:
    """Print the tables, or the comparison with what is measured here."""
    data: tables.Data = run() if check else {title: make() for title, make in tables.TABLES.items()}
    print(
        to_json(data)
        if json
        else "\n\n".join(f"**{title}**\n\n{tables.markdown(rows)}" for title, rows in data.items())
    )


if __name__ == "__main__":
    typer.run(main)
