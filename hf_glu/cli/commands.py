"""The commands: each reads its options, calls the library, and prints a table or, with ``--json``, one object."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_glu.checkpoint.writing import user_path, write_text
from hf_glu.cli import tables
from hf_glu.cli.convert_options import (
    check_experts,
    check_fit,
    check_healing,
    healer,
    read_early,
    target_of,
    way,
)
from hf_glu.cli.forms import Commands
from hf_glu.errors import OptionError, UnknownNameError, nearest
from hf_glu.version import __version__

app = Commands(
    help="Gated feed-forward networks for stock Transformers models.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Layers = Annotated[str | None, typer.Option(help="Which layers: '0-5,8', 'every 2', 'encoder', 'decoder'. All.")]
Native = Annotated[bool, typer.Option("--native", help="A T5 in the layout of v1.1, for use without hf_glu.")]
_EXPERTS_HELP = "Make experts: relu*2,gelu*2,swiglu*4, or a number; a Mixtral's own: silu*4,relu*4 (no --to)."
Experts = Annotated[str | None, typer.Option(help=_EXPERTS_HELP)]
_TO_HELP = "The gated activation; or LAYERS=NAME such as 0-3=geglu (again for more)."
To = Annotated[list[str] | None, typer.Option("--to", help=_TO_HELP)]
Exclude = Annotated[str | None, typer.Option(help="Regular expression: sites whose name it finds are left alone.")]
_SPLIT_HELP = "Divide FFNs' units among experts: 2+14 are 2 always on and 14 routed, --top-k of which a token uses."
_GROW_HELP = "Make so many copies of each expert that SRC has; with --calibration, more of those that matter."
_HEAL_HELP = "Text (again for more): train the result to be like SRC on it, as `pretrain --teacher` does."

_NAMED = "A modulation that requests may ask for by that name (again): folder, .safetensors file or Hub id."


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def activations(
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw their curves into this .png, .svg or .pdf file.")] = None,
) -> None:
    """List the gated activations: name, value, source."""
    import hf_glu

    if len(given := [f"--{name}" for name, value in {"json": json, "markdown": markdown}.items() if value]) > 1:
        raise OptionError(f"one form at a time, got {' and '.join(given)}")
    if plot is not None:
        from hf_glu.publishing.report.family import check_plot

        check_plot(plot)
        from hf_glu.publishing.report.family_curves import plot_family

        drawn = {"plot": str(plot_family(plot))}
        tables.emit(drawn, lambda data, console: console.print(data["plot"], soft_wrap=True), json=json)
        return
    listing = hf_glu.activations()
    if markdown:
        print(listing.markdown())
    else:
        tables.emit(listing, tables.activations, json=json)


@app.command()
def sites(model: Annotated[str, typer.Argument(help="Local folder or Hub id.")], json: Json = False) -> None:
    """List a model's feed-forward networks (its weights are not loaded)."""
    from hf_glu.cli.early import check_sources

    check_sources(model)

    from hf_glu.checkpoint.loading import load_skeleton
    from hf_glu.ffn.experts import find_experts
    from hf_glu.ffn.identify import describe_site
    from hf_glu.ffn.sites import convertible_sites

    skeleton = load_skeleton(model)
    found = [describe_site(skeleton, site) for site in convertible_sites(skeleton)]
    found += [{**experts.to_dict(), "name": name} for name, experts in find_experts(skeleton).items()]
    tables.emit({"model": model, "sites": found}, tables.sites, json=json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Dense checkpoint: local folder, Hub id or FILE.gguf.")],
    destination: Annotated[Path | None, typer.Argument(metavar="DST", help="New folder.")] = None,
    to: To = None,
    width: Annotated[str, typer.Option(help="Hidden units: keep, iso (equal parameters) or a number.")] = "keep",
    calibration: Annotated[Path | None, typer.Option(help="Text file, a text a line, to fit fewer units on.")] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of the fit of an FFN; 400 for fewer units.")] = None,
    heal: Annotated[list[str] | None, typer.Option(help=_HEAL_HELP)] = None,
    heal_options: Annotated[Path | None, typer.Option(help="YAML file of options of pretrain, for --heal.")] = None,
    native: Native = False,
    experts: Experts = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that a token uses: 2.")] = None,
    split: Annotated[str | None, typer.Option(help=_SPLIT_HELP)] = None,
    grow: Annotated[int | None, typer.Option(help=_GROW_HELP)] = None,
    active: Annotated[str | None, typer.Option(help="Copies of a chosen expert that a token uses: one, all.")] = None,
    layers: Layers = None,
    exclude: Exclude = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would change; nothing is written.")] = False,
    check: Annotated[bool, typer.Option(help="Run the model before and after, and report the difference.")] = True,
    lenient: Annotated[bool, typer.Option("--lenient", help="Convert even where it breaks its promise.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Tensor by tensor, for models larger than memory.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Name of SRC for the card, where it is a folder.")] = None,
    json: Json = False,
) -> None:
    """Convert a dense checkpoint to gated feed-forward networks, and write its model card."""
    target: Any = target_of(to or [], needed=not experts and split is None and grow is None)
    options: dict[str, Any] = {"layers": layers, "exclude": exclude, "experts": experts, "top_k": top_k}
    options["width"] = int(width) if width.isdecimal() and len(width) < 10 else width
    if destination is None and not plan:
        raise OptionError("convert needs a destination folder DST (or --plan, which writes nothing)")
    asked = {"--to": to, "--experts": experts, "--native": native, "--stream": stream, "--width": width != "keep"}
    asked["--distill-steps"] = distill_steps is not None
    check_fit(distill_steps, calibration, asked)
    check_healing(heal, heal_options, stream=stream, plan=plan)
    check_experts(split, grow, active, options, asked, calibrated=calibration is not None, plan=plan)
    texts = read_early(source, None if plan else destination, target, calibration, options)

    import hf_glu
    from hf_glu.checkpoint.convert import plan_checkpoint
    from hf_glu.checkpoint.folders import staged_folder
    from hf_glu.publishing.card.card import write_card

    target = way(split, grow, active, options) or target
    if plan:
        fitted = texts is not None and not (split or grow)
        planned = plan_checkpoint(source, target, fitted=fitted, native=native, **options)
        tables.emit(planned, tables.plan, json=json)
        return
    assert destination is not None  # checked above
    with staged_folder(destination) as stage:  # with its card, or not at all
        if stream:
            report = hf_glu.convert_stream(source, stage, target, base_model=base_model, **options)
        else:
            report = hf_glu.convert_checkpoint(
                source, stage, target, calibration=texts, distill_steps=distill_steps, native=native,
                check="report" if check and lenient else check, base_model=base_model,
                heal=healer(source, heal, heal_options) if heal else None, **options,
            )  # fmt: skip
        write_card(stage, repo_id=destination.absolute().name)
    tables.emit(report, tables.report, json=json)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Local folder or Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Local folder or Hub id.")],
    tolerance: Annotated[float, typer.Option(help="Largest difference that counts as the same.")] = 1e-5,
    text: Annotated[
        list[str] | None, typer.Option(help="Compare on this text (again for more); random tokens.")
    ] = None,
    json: Json = False,
) -> int:
    """Compare the outputs of two checkpoints; exit code 1 where they differ by more than the tolerance."""
    from hf_glu.cli.early import check_sources

    check_sources(a, b)

    import hf_glu
    from hf_glu.checkpoint.loading import encode
    from hf_glu.cli.exits import EXIT_DIFFERENT

    inputs = encode(a, text) if text else None
    result = hf_glu.verify(a, b, inputs=inputs, tolerance=tolerance)
    tables.emit(result, tables.verification, json=json)
    return 0 if result.same else EXIT_DIFFERENT


@app.command()
def doctor(json: Json = False) -> int:
    """Check that the installed Transformers has what hf_glu hooks, and what else is installed."""
    from hf_glu.cli.exits import EXIT_BAD_INPUT
    from hf_glu.plugin.doctor import examine

    result = examine()
    tables.emit(result, tables.diagnosis, json=json)
    return 0 if result.healthy else EXIT_BAD_INPUT


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    modulation: Annotated[list[str] | None, typer.Option(metavar="NAME=FOLDER", help=_NAMED)] = None,
) -> int:
    """Run another program (`hf-glu run -- lm_eval ...`) with the plugin loaded in it and in its Python children."""
    from hf_glu.plugin.launch import run_with_plugin

    return run_with_plugin(context.args, modulation or ())


@app.command()
def coverage(
    only: Annotated[list[str] | None, typer.Option(help="A model type (again for more); all text families.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file, too.")] = None,
    json: Json = False,
) -> None:
    """Convert a tiny model of each of Transformers' text families by an exact route, save and reload it."""
    import time

    from hf_glu.checkpoint.writing import check_file
    from hf_glu.config.showing import progress_bar

    if markdown:
        check_file(markdown)

    from hf_glu.bench.coverage import tiny
    from hf_glu.bench.coverage.survey import Coverage, survey

    types = tiny.model_types()
    for name in only or []:
        if name not in types:
            raise UnknownNameError(f"unknown model type {name!r}; {nearest(name, types)}")
    start = time.perf_counter()
    rows = tuple(progress_bar(survey(only), total=len(only or types), desc="families", leave=False))
    result = Coverage(rows=rows, seconds=time.perf_counter() - start)
    if markdown:
        write_text(user_path(markdown), result.markdown())
    tables.emit(result, tables.coverage, json=json)
