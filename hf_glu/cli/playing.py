"""``hf-glu play``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_glu.cli import tables
from hf_glu.cli.commands import app
from hf_glu.config.extras import need

HOST = "127.0.0.1"
_SPACE = "Write a folder ready as a Space on the Hub, instead of serving the page."


@app.command()
def play(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id or FILE.gguf.")],
    compare: Annotated[str | None, typer.Option(help="A model that stands beside it: the dense one, say.")] = None,
    modulation: Annotated[
        list[str] | None, typer.Option(help="Preset: folder, .safetensors file or Hub id of a modulation (again).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: for all who reach this machine.")] = HOST,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on.")] = None,
    space: Annotated[Path | None, typer.Option(help=_SPACE)] = None,
) -> None:
    """Serve a page on which a model's gates are watched and moved, beside another model or the same unsteered."""
    from hf_glu.cli.early import check_destinations, check_sources

    given = modulation or []
    need("gradio", what="hf-glu play")
    check_destinations(space)
    if space is None:
        from hf_glu.publishing.play.serving import choose_port, is_loopback

        choose_port(host, port)
        if not is_loopback(host):
            tables.tell(f"{host}: whoever reaches this machine can use the page")
    check_sources(*filter(None, (model, compare)))

    from hf_glu.publishing.play.playing import Playground

    ground = Playground(model, compare, given)
    if space is not None:
        from hf_glu.publishing.play.space import write_space

        print(write_space(ground, space))
        return

    from hf_glu.publishing.play.serving import serve

    serve(ground, lambda line: print(line, flush=True), host=host, port=port)
