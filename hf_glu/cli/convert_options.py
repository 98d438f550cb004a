"""What ``hf-glu convert`` is asked for: what can't be is said before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_glu.config.experts import check_growth, read_split
from hf_glu.errors import OptionError

if TYPE_CHECKING:
    from hf_glu.conversion import Change


def read_early(
    source: str, destination: Path | None, target: Any, calibration: Path | None, options: dict[str, Any]
) -> list[str] | None:
    """Return the texts of a calibration, once everything is checked that waits for no torch."""
    from hf_glu.checkpoint.loading import read_texts
    from hf_glu.cli import early

    early.check_conversion(target, **options)
    texts = None if calibration is None else read_texts(calibration)
    early.check_destinations(destination)
    early.check_sources(source)
    return texts


def check_split(split: str | None, top_k: int | None, asked: dict[str, Any], *, calibrated: bool) -> None:
    """Raise OptionError for a --split that can't be, or that other ways to convert are given beside."""
    if split is None:
        return
    _, routed = read_split(split)
    if given := [name for name, value in asked.items() if value]:
        raise OptionError(f"--split divides FFNs as they are: leave {' and '.join(given)} out")
    if top_k is None or not 1 <= top_k <= routed:
        raise OptionError(f"--split {split} needs --top-k, 1 to {routed}: how many of the routed experts a token uses")
    if not calibrated:
        raise OptionError("--split needs --calibration: a file of texts that experts and routers are fitted on")


def check_grow(times: int | None, active: str | None, calibrated: bool, asked: dict[str, Any]) -> None:
    """Raise OptionError for a --grow or --active that can't be, or that other ways to convert are given beside."""
    if times is None:
        if active is not None:
            raise OptionError("--active says which of the copies that --grow makes a token uses: give --grow, too")
        return
    if given := [name for name, value in asked.items() if value]:
        raise OptionError(f"--grow copies experts as they are: leave {' and '.join(given)} out")
    check_growth(times, active or "one")
    if calibrated and active == "all":
        raise OptionError("--active all makes as many copies of each expert: leave --calibration out")


def check_experts(
    split: str | None, grow: int | None, active: str | None, options: dict[str, Any], asked: dict[str, Any], *,
    calibrated: bool, plan: bool,
) -> None:  # fmt: skip
    """Raise OptionError for a --split, --grow or --active that can't be, or that others are given beside."""
    check_split(split, options["top_k"], asked, calibrated=plan or calibrated)
    where = {f"--{name.replace('_', '-')}": options[name] for name in ("top_k", "layers", "exclude")}
    check_grow(grow, active, calibrated, {**asked, "--split": split, **where})


def way(split: str | None, grow: int | None, active: str | None, options: dict[str, Any]) -> Change | None:
    """Return what --split and --grow mean, None without both; ``top_k`` is taken out of ``options`` for the first."""
    from hf_glu.conversion import Grow, Split

    if split:
        return Split(experts=split, top_k=options.pop("top_k"))
    return Grow(times=grow, active=active or "one") if grow else None


def check_fit(steps: int | None, calibration: Path | None, asked: dict[str, Any]) -> None:
    """Raise OptionError for a fit that streaming can't make, or a length of none."""
    if asked["--stream"] and (asked["--width"] or asked["--native"] or calibration is not None):
        raise OptionError("streaming computes no fit: leave --width, --calibration, --native or --stream out")
    if steps is not None and (steps < 0 or calibration is None):
        raise OptionError("--distill-steps is how long --calibration fits: a number, 0 at least, with that")


def check_healing(heal: list[str] | None, options: Path | None, *, stream: bool, plan: bool) -> None:
    """Raise OptionError for a healing that can't be."""
    if options and not heal:
        raise OptionError("--heal-options says how --heal trains: give --heal, too")
    if heal and (stream or plan):
        raise OptionError(f"{'streaming' if stream else 'a plan'} trains nothing: leave --heal out")


def healer(source: str, data: list[str], options: Path | None) -> Callable[[Any], Any]:
    """Return what heals a model converted from ``source``; what can't be raises before it is converted."""
    from hf_glu.cli.quiet import quieten
    from hf_glu.config.extras import OF_TRAINING, need
    from hf_glu.training.filling import read_yaml
    from hf_glu.training.language.heal import check_healing, heal
    from hf_glu.training.packaged import find_config

    values = read_yaml(find_config(options)) if options else {}
    need(*OF_TRAINING, *(["peft"] if values.get("peft") == "lora" else []), what="convert --heal")
    quieten()
    check_healing(source, data, values)
    return lambda model: heal(model, source, data, **values)


def target_of(to: list[str], *, needed: bool) -> str | dict[str, str] | None:
    """Read ``--to``: a name, or LAYERS=NAME any number of times; None: it isn't given, nor ``needed``."""
    if not to:
        if needed:
            raise OptionError("convert needs --to NAME, the gated activation: `hf-glu activations` lists them")
        return None
    if len(to) == 1 and "=" not in to[0]:
        return to[0]
    pairs = [part.partition("=") for part in to]
    if not all(layers and name for layers, _, name in pairs):
        raise OptionError(f"--to is one name, or LAYERS=NAME such as 0-3=geglu for each choice, got {' '.join(to)!r}")
    return {layers.strip(): name.strip() for layers, _, name in pairs}
