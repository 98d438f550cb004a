"""What every method promises, asked of each row of the table in tests/helpers/methods.py; no method is named here."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_same, fresh_outputs, outputs
from covering import alternating
from methods import CASES, METHODS, awaken, make, missing
from pico import LAYERS
from short_training import snapshot
from states import CLOSE, batch, memories, whole_and_chunks
from torch import Tensor

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.stateful import Memory
from hf_glu.config.registry import Activation, Derived
from hf_glu.conversion import Report
from hf_glu.ffn.sites import convertible_sites

every_case = pytest.mark.parametrize(("method", "model"), alternating(CASES, 1))


@dataclass(frozen=True)
class Made:
    """A model that a method has changed, what the method reports, and what the model was before."""

    model: Any
    report: Any
    outputs: dict[str, Tensor]
    shapes: dict[str, torch.Size]


@functools.cache  # all suites ask for all cases, and pico models are small
def _made(method: str, name: str) -> Made:
    model = make(name)
    before, shapes = outputs(model), {key: parameter.shape for key, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model, report = METHODS[method].carry_out(model, name, Path(folder))
    return Made(model, report, before, shapes)


def made(method: str, name: str) -> Made:
    """Return a copy of a changed model, which is made once for all the suites."""
    known = _made(method, name)
    return replace(known, model=copy.deepcopy(known.model))


def step(model: Any, optimizer: Any, number: int) -> set[str]:
    """Take a step; return the parameters that had a gradient."""
    torch.manual_seed(number)
    model.train()(**batch(model))[0].float().square().mean().backward()
    found = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return found


@dataclass(frozen=True)
class Trained:
    """Three steps of a changed model: it before and after them, with gradients, and a checkpoint after the second."""

    model: Any
    start: dict[str, Tensor]
    gradients: set[str]
    new: set[str]
    checkpoint: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train each case once for the suites that look at it."""

    @functools.cache
    def train(method: str, name: str) -> Trained:
        case, folder = made(method, name), tmp_path_factory.mktemp("checkpoint")
        new = {n for n, p in case.model.named_parameters() if case.shapes.get(n) != p.shape and p.requires_grad}
        start, optimizer = snapshot(case.model), torch.optim.Adam(case.model.parameters(), lr=1e-2)
        gradients = step(case.model, optimizer, 0)
        step(case.model, optimizer, 1)
        case.model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        step(case.model, optimizer, 2)
        return Trained(case.model, start, gradients, new, folder)

    return train


@every_case
def test_the_function_at_the_start_is_what_is_promised(method, model):
    case = made(method, model)
    found = outputs(case.model)
    if METHODS[method].start is None:
        assert any(float((found[key] - case.outputs[key]).abs().max()) > 1e-6 for key in found)
    else:
        assert_same(found, case.outputs, METHODS[method].start)
    for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert_same(outputs(other), found, "bitwise")


@every_case
def test_the_report_says_what_is_promised_and_counts_all_parameters(method, model):
    case, row = _made(method, model), METHODS[method]
    if row.then or not isinstance(case.report, Report):
        pytest.skip("reports nothing of what comes out at the end")
    assert case.report.plan.promise == ("approximate" if row.start is None else row.promise)
    assert case.report.plan.parameters_before == sum(shape.numel() for shape in case.shapes.values())
    assert case.report.plan.parameters_after == sum(parameter.numel() for parameter in case.model.parameters())


def dead(found: Trained, quiet: tuple[str, ...], least: float = 0.6) -> dict[str, float]:
    """Return the new parameters that have no gradient or mostly stay as they are, and how much of each has moved."""
    moved = {key: float((found.model.get_parameter(key) != found.start[key]).float().mean()) for key in found.new}
    still = {key for key, share in moved.items() if share <= least and not key.endswith(quiet or ("nothing",))}
    return {key: moved[key] for key in still | (found.new - found.gradients)}


@every_case
def test_all_that_is_new_is_alive_within_three_steps(method, model, trained):
    assert not dead(trained(method, model), METHODS[method].quiet, METHODS[method].moved)


def test_what_is_dead_is_found(trained):
    found = trained(*CASES[0])
    assert found.new
    assert dead(replace(found, gradients=set()), ()).keys() == found.new
    assert dead(replace(found, start=snapshot(found.model)), ()) == dict.fromkeys(found.new, 0.0)


def without(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a config's fields without some of them."""
    return {key: value for key, value in config.to_dict().items() if key not in keys}


@every_case
def test_doing_it_again_changes_nothing(method, model, tmp_path):
    case, row = made(method, model), METHODS[method]
    state, config = snapshot(case.model), without(case.model.config, ("_name_or_path",))
    changed = case.model
    if row.again is None:
        changed, report = row.repeat(changed, model, tmp_path)
        assert not isinstance(report, Report) or not report.plan.changes
    else:
        with pytest.raises(row.again):
            row.repeat(changed, model, tmp_path)
    assert_same(dict(changed.state_dict()), state, "bitwise")
    assert without(changed.config, ("_name_or_path",)) == config


@every_case
def test_a_resumed_training_is_the_uninterrupted_one(method, model, trained):
    whole = trained(method, model)
    resumed, info = type(whole.model).from_pretrained(whole.checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    optimizer = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    optimizer.load_state_dict(torch.load(whole.checkpoint / "optimizer.pt"))
    step(resumed, optimizer, 2)
    assert_same(dict(resumed.state_dict()), dict(whole.model.state_dict()), "bitwise")


@every_case
def test_chunks_with_the_cache_are_the_whole(method, model):
    whole, chunks = whole_and_chunks(awaken(made(method, model).model))
    if not chunks:
        pytest.skip("sees all tokens at once")
    loud = max(1.0, float(whole.abs().max()))
    for found in chunks:
        torch.testing.assert_close(found, whole, **{key: value * loud for key, value in CLOSE.items()})


def test_chunks_that_lose_what_a_gate_remembers_are_found(monkeypatch):
    case = next(case for case in CASES if case[1] == "gpt2" and memories(_made(*case).model))
    monkeypatch.setattr(Memory, "cache", lambda self: None)
    whole, chunks = whole_and_chunks(awaken(made(*case).model))
    assert all((found - whole).abs().max() > 1e-2 for found in chunks)


def hooks(model: Any) -> list[int]:
    """Return how many hooks each module has, of each kind."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [len(vars(module)[name]) for module in model.modules() for name in names]


LOADED = ("hf_glu", "architectures", "dtype")  # ours, and what saving and loading write into a config


@every_case
def test_it_is_taken_back_where_that_is_promised(method, model):
    changed, stock, promised = made(method, model).model, make(model), METHODS[method].reverts
    if promised is not None:
        state = snapshot(changed)
        with pytest.raises(promised):
            hf_glu.revert(changed)
        assert_same(dict(changed.state_dict()), state, "bitwise")
        return
    sites = len(convertible_sites(stock))
    assert hf_glu.revert(changed) == (sites // LAYERS if "layers" in METHODS[method].options else sites)
    assert_same(dict(changed.state_dict()), dict(stock.state_dict()), METHODS[method].back)
    assert_same(outputs(changed), outputs(stock), METHODS[method].back)
    assert [type(module) for module in changed.modules()] == [type(module) for module in stock.modules()]
    assert hooks(changed) == hooks(stock)
    assert without(changed.config, LOADED) == without(stock.config, LOADED)


@pytest.mark.slow
def test_a_fresh_process_loads_all_of_them_bitwise(tmp_path):
    expected, folders = {}, {}
    for method, name in CASES:
        model, key = awaken(made(method, name).model), f"{method} {name}".replace(":", "-")
        expected[key], folders[key] = outputs(model), tmp_path / key
        model.save_pretrained(tmp_path / key)
    found = fresh_outputs(folders)
    assert found.keys() == expected.keys()
    for key in found:
        assert_same(found[key], expected[key], "bitwise")


def test_everything_that_changes_a_model_has_a_row():
    assert not missing(METHODS)


def test_what_has_no_row_is_found(monkeypatch):
    few = {key: replace(row, then=()) for key, row in METHODS.items() if row.target != "glu" and row.verb == "convert"}
    assert {"glu", "split_experts", "revert", "freeze_mix", "to_native"} <= missing(few)
    states = {key: row for key, row in METHODS.items() if "stateful" not in json.dumps(row.target)}
    assert missing(states) == {"stateful_N"}
    no = dict.fromkeys(("equation", "paper"), "")
    with hf_glu.scoped():
        registry.add(Activation(name="fresh", flags=frozenset({"gated"}), factory=torch.nn.Identity, **no))
        registry.add_family(Derived(pattern="fresh_N", place="wrapper", derive=lambda *names: None, **no))
        registry.add_family(Derived(pattern="N_fresh", place="suffix", derive=lambda *names: None, **no))
        assert missing(METHODS) == {"fresh", "fresh_N", "N_fresh"}
    assert not missing(METHODS)
    monkeypatch.setattr(hf_glu, "__all__", [*hf_glu.__all__, "another"])
    monkeypatch.setattr(hf_glu, "another", type("Verb", (), {"__module__": "hf_glu.conversion.another"}), raising=False)
    assert missing(METHODS) == {"another"}
