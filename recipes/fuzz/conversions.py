"""Random conversions: kept promises, saving and loading, reverting; or a refusal that changes nothing."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

import hf_glu
from hf_glu.errors import HfGluError

from . import formulas, models
from .activations import draw_name, draw_options
from .formulas import Name
from .models import Source
from .running import Tally, main
from .shelf import Shelf

# promise -> the most that outputs may differ, relative to the largest; in bf16 one rounding of a GEMM is more
PROMISED = {"exact": 1e-5, "exact up to rounding": 1e-4}
HALF = 3e-2
WRITTEN_BY_SAVING = {"architectures", "dtype"}
EXPERTS = (2, 3, "relu*1,own*2", "own*2", "own*2,stateful_own*1", "kappa_own*2,own*1")
LAYERS = (None, None, None, "0", "1", [1], "every 2", "encoder", "decoder 0", {"decoder": "all"}, "0-1")


@dataclass(frozen=True)
class Case:
    """One conversion.

    Attributes:
        source: the model.
        target: a name or names by layer, where ``own`` stands for the gated form of the model's own activation, and
            ``dense`` for that itself; None for banks.
        options: of `hf_glu.convert`.
        calibrated: whether calibration data are given.
        dtype: of the model.
        frozen: whether nothing is trained.
        tied: whether the layers share their FFNs' weights.
        seed: of the inputs.
    """

    source: Source
    target: Name | dict[str, Name] | None
    options: dict[str, Any]
    calibrated: bool
    dtype: torch.dtype
    frozen: bool
    tied: bool
    seed: int


def _draw_target(random: Random) -> Name:
    name = draw_name(random)
    chance = random.random()
    if chance < 0.6:
        return replace(name, base="own")
    if chance < 0.75 and (name.wrappers or name.mix):
        return replace(name, base="dense")
    return replace(name, base=random.choice(sorted(formulas.GATES))) if chance < 0.9 else name


def draw(random: Random) -> Case:
    """Return any case."""
    source, name = models.draw_source(random), _draw_target(random)
    options = {key: value for key, value in draw_options(random, name, 8).items() if random.random() < 0.6}
    target: Name | dict[str, Name] | None = name
    if "stateful_" in name.wrappers and random.random() < 0.3:
        options["state"] = random.choice(({"alpha": 0.5}, {"beta": -1}, {"decay": [0.1, 0.9]}, {"alpha": 0.0}))
    if "modulated_" in name.wrappers and random.random() < 0.4:
        options["context"] = random.choice(({"size": 3}, {"layer": 1}, {"pool": "mean"}, {"pool": "encoder"}))
    if random.random() < 0.15:
        target = {"0": name, "1": _draw_target(random)}
    options["layers"] = random.choice(LAYERS)
    kind = random.choice(("keep",) * 7 + ("width", "experts", "experts", "bias", "exclude"))
    if kind == "width":
        options["width"] = random.choice(("iso", 24))
    if kind == "experts":
        options["experts"] = random.choice(
            (2, 3, "relu*1,own*2", "own*2", "own*2,stateful_own*1", "own:24*2", "kappa_own*2,own*1")
        )
        if isinstance(target, Name) and random.random() < 0.3:
            target = replace(target, wrappers=(*target.wrappers, *formulas.HEARING))
        options["top_k"] = random.choice((None, 1, 2))
        options["drop"] = random.choice((0.0, 0.0, 0.1))
    if kind == "bias":
        options["bias"] = False
    if kind == "exclude":
        options["exclude"] = random.choice((r"\.0\.", r"decoder", r"nothing like it"))
    calibrated = random.random() < (0.9 if kind in ("width", "bias") else 0.05)
    if calibrated:
        options["distill_steps"] = random.choice((0, 1, 2))
    if source.family == "mixtral" and random.random() < 0.7:
        target, options = None, {"experts": options.get("experts", "own*2"), "layers": options["layers"]}
    return Case(
        source=source,
        target=target,
        options={key: value for key, value in options.items() if value is not None},
        calibrated=calibrated and target is not None,
        dtype=torch.bfloat16 if random.random() < 0.1 else torch.float32,
        frozen=random.random() < 0.1,
        tied=random.random() < 0.05,
        seed=random.randrange(1000),
    )


def _gated(dense: str) -> str:
    return next((name for name, gate in formulas.GATES.items() if gate == dense), f"{dense}_glu")


def written(name: Name, dense: str) -> str:
    """Return a name with the model's own activation in it."""
    return str(replace(name, base={"own": _gated(dense), "dense": dense}.get(name.base, name.base)))


def arguments(case: Case, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `hf_glu.convert` is given: the target and the options."""
    dense = models.own_activation(model)
    options = dict(case.options)
    if isinstance(options.get("experts"), str):
        options["experts"] = options["experts"].replace("own", _gated(dense))
    if case.calibrated:
        inputs = models.inputs_of(model, seed=case.seed + 1, batch=4)
        options["calibration"] = [inputs] if len(inputs) > 1 else inputs["input_ids"]
    if isinstance(case.target, dict):
        return {layer: written(name, dense) for layer, name in case.target.items()}, options
    return case.target if case.target is None else written(case.target, dense), options


def tie(model: Any) -> bool:
    """Have the second layer's FFNs share the first one's parameters, where the model has such; tell whether."""
    sites = [site for site in hf_glu.find_sites(model) if site.kind == "dense"][:2]
    if len(sites) < 2:
        return False
    for part in ("in_proj", "out_proj"):
        first, second = (getattr(site, part) for site in sites)
        if type(first) is not type(second) or first.weight.shape != second.weight.shape:
            return False
        for name, parameter in list(first.named_parameters(recurse=False)):
            setattr(second, name, parameter)
    return True


def check(case: Case, shelf: Shelf | None = None) -> Tally:
    """Convert, and try all that is promised of a converted model."""
    tally = Tally()
    model = models.make(case.source).to(case.dtype)
    inputs = models.inputs_of(model, seed=case.seed)
    tied = case.tied and tie(model)
    if case.frozen:
        model.requires_grad_(False)
    try:
        before, known = models.outputs(model, inputs), models.snapshot(model)
    except (RuntimeError, ValueError):  # the stock model can't do that: DeBERTa in bf16
        return Tally(undecided=1)
    target, options = arguments(case, model)
    said = f"convert(model, {target!r}, { ({key: value for key, value in options.items() if key != 'calibration'}) })"
    try:
        report = hf_glu.convert(model, target, **options)
    except HfGluError as error:
        tally.refused += 1
        differs = models.changed(known, models.snapshot(model))
        tally.expect(not differs, f"{said}: refused ({error}), but changed: {differs}")
        tally.expect(models.difference(before, models.outputs(model, inputs)) == 0, f"{said}: refused, outputs changed")
        return tally
    after = models.outputs(model, inputs)
    most = PROMISED.get(report.plan.promise, float("inf"))
    off = models.difference(before, after)
    most = most if case.dtype == torch.float32 else max(most, HALF)
    tally.expect(off <= most, f"{said}: promised {report.plan.promise}, but outputs are off by {off:.3g}")
    count = sum(parameter.numel() for parameter in model.parameters())
    planned = report.plan.parameters_after
    tally.expect(planned == count, f"{said}: {planned} parameters planned, {count} found")
    if case.frozen and isinstance(case.target, Name) and not (case.target.wrappers or case.target.mix):
        learning = [name for name, each in model.named_parameters() if each.requires_grad]
        tally.expect("experts" in options or not learning, f"{said}: was frozen, now trains {learning[:3]}")
    if tied:
        outs = [site.out_proj.weight for site in hf_glu.find_sites(model) if site.kind == "dense"][:2]
        tally.expect(len(outs) < 2 or outs[0] is outs[1], f"{said}: shared parameters came apart")
    else:  # Transformers saves no parameters that are shared in secret
        tally.add(_saved(case, said, model, inputs, after, shelf))
    tally.add(_reverted(said, model, inputs, before, known))
    return tally


def _saved(case: Case, said: str, model: Any, inputs: Any, after: dict[str, torch.Tensor], shelf: Any) -> Tally:
    """Save and load, here or (where there is a shelf) in a fresh process."""
    tally = Tally()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        model.save_pretrained(folder)
        if shelf is not None and case.dtype == torch.float32 and not case.frozen and shelf.wants():
            shelf.put(folder, type(model).__name__, inputs, after, f"{case}\n    {said}")
            return tally
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        tally.expect(False, f"{said}: saved, but not loaded: {type(error).__name__}: {str(error)[:300]}")
    else:
        found = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
        tally.expect(not found, f"{said}: loading found {found}")
        differs = _difference(model, loaded, inputs)
        if differs and _difference(*_stock_and_loaded(case), inputs):
            tally.undecided += 1
        else:
            tally.expect(not differs, f"{said}: loaded, {differs}")
    finally:
        if shelf is None or folder not in shelf:
            shutil.rmtree(folder)
    return tally


def _difference(model: Any, loaded: Any, inputs: Any) -> str:
    """Return how a loaded model differs: in its tensors, or what it computes."""
    if not models.same_tensors(model.state_dict(), loaded.state_dict()):
        return "tensors differ"
    try:
        off = models.difference(models.outputs(model, inputs), models.outputs(models.aligned(loaded), inputs))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return f"outputs are off by {off:.3g}" if off else ""


def _stock_and_loaded(case: Case) -> tuple[Any, Any]:
    """Return the stock model and what is loaded of it: not the same with buffers in bf16, for one."""
    stock = models.make(case.source).to(case.dtype).requires_grad_(not case.frozen)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        return stock, type(stock).from_pretrained(folder)


def _reverted(said: str, model: Any, inputs: Any, before: dict[str, torch.Tensor], known: dict[str, Any]) -> Tally:
    """Revert: the dense model comes back, or a refusal changes nothing."""
    tally, converted, now = Tally(), models.snapshot(model), models.outputs(model, inputs)
    try:
        hf_glu.revert(model)
    except HfGluError as error:
        differs = models.changed(converted, models.snapshot(model))
        tally.expect(not differs, f"{said}, revert: refused ({error}), but changed: {differs}")
        return tally
    after, found = models.snapshot(model)["tensors"], models.outputs(model, inputs)
    if models.difference(now, found) <= 1e-5 < models.difference(before, now):
        return tally  # a gate that had become another function, or narrower: it computes what it did as converted
    tally.expect(after.keys() == known["tensors"].keys(), f"{said}, revert: other tensors than before")
    off = models.difference(known["tensors"], after)
    tally.expect(off <= 1e-6, f"{said}, revert: tensors are off by {off:.3g}")
    off = models.difference(before, found)
    tally.expect(off <= 1e-5, f"{said}, revert: outputs are off by {off:.3g}")
    config, config_before = _unsaved(model.config.to_dict()), _unsaved(known["config"])
    keys = {*config, *config_before}
    differs = sorted(key for key in keys if config.get(key) != config_before.get(key))
    tally.expect(not differs, f"{said}, revert: the config differs in {differs}")
    return tally


def quiet() -> None:
    """Have Transformers say nothing."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _unsaved(config: Any) -> Any:
    """Return a config's content without what saving writes into it, at any depth."""
    if not isinstance(config, dict):
        return config
    return {key: _unsaved(value) for key, value in config.items() if key not in WRITTEN_BY_SAVING}


if __name__ == "__main__":
    quiet()
    shelf = Shelf()
    main("conversions", draw, lambda case: check(case, shelf), 2000, finish=shelf.finish)
