"""The one engine: what is planned is what is done, whatever the change, and a new change takes one class."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from comparing import assert_same, outputs
from covering import few
from pico import FAMILIES, make_native
from whole import RESIDUAL, structure

import hf_glu
from hf_glu import cli
from hf_glu.conversion import CHANGES, Change, Grow, Merge, Split, Step
from hf_glu.conversion.changes.freeze import FreezeMix
from hf_glu.conversion.changes.revert import Revert
from hf_glu.conversion.changes.t5_layout import ToNative
from hf_glu.conversion.routes import APPROXIMATE, Route
from hf_glu.conversion.targets import check_section_names
from hf_glu.conversion.work import TensorRule
from hf_glu.errors import CheckpointError, ConversionError, DuplicateNameError, OptionError, UnknownNameError
from hf_glu.ffn.linear import set_rows, weight_rows
from hf_glu.ffn.sites import convertible_sites
from hf_glu.instruments.probe import probe_inputs

IDS = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class ScaleGates(Change):
    """Multiply what goes into the activations: all that a new way to convert takes."""

    factor: float

    def plan(self, model, site):
        """Return the row of one site."""
        name = site.activation or "gelu_new"
        return Step.at(site, self, name, name, Route(name=f"times {self.factor}", promise=APPROXIMATE))

    def apply(self, work, step):
        """Scale one in-projection."""
        linear = step.site.in_proj
        set_rows(linear, weight_rows(linear) * self.factor, linear.bias * self.factor)

    def tensors(self, step):
        """Return the same for a stored one."""
        return [TensorRule.of(step.site, lambda tensor, bias, dim: tensor * self.factor)]


def gpt2():
    return FAMILIES["gpt2"].make()


def converted(make, target, **more):
    model = make()
    hf_glu.convert(model, target, **more)
    return model


def annealed():
    model = converted(gpt2, "learnable_geglu_new")
    hf_glu.anneal(model, 1.0)
    return model


def flat_t5():
    make = FAMILIES["t5"].make
    return converted(make, "reglu", bias=False, calibration=[probe_inputs(make())])


# every change: (name of the class in CHANGES, its case) -> model, what plan takes, what apply takes
CASES = {
    ("gate", "widened"): (gpt2, {"target": "geglu_new"}, {}),
    ("gate", "mixed"): (FAMILIES["bert"].make, {"target": "learnable_swiglu"}, {}),
    ("gate", "wrapped"): (lambda: make_native("llama"), {"target": "stateful_modulated_swiglu"}, {}),
    ("gate", "regated"): (lambda: make_native("llama"), {"target": "geglu"}, {}),
    ("gate", "narrowed"): (gpt2, {"target": "geglu_new", "width": 20, "fitted": True}, {"calibration": IDS}),
    ("gate", "by layer"): (gpt2, {"target": {"0": "geglu_new", "1": "modulated_geglu_new"}}, {}),
    ("upcycle", "plain"): (gpt2, {"target": "geglu_new", "experts": "geglu_new*2,gelu_new*2"}, {}),
    ("upcycle", "modulated"): (gpt2, {"target": "geglu_new", "experts": "modulated_geglu_new*2,learnable_relu*2"}, {}),
    ("upcycle", "t5"): (FAMILIES["t5"].make, {"target": "reglu", "experts": "reglu*2,relu*2", "layers": [1]}, {}),
    ("upcycle", "after narrowing"): (
        gpt2, {"target": "geglu_new", "experts": 2, "width": 20, "fitted": True}, {"calibration": IDS}
    ),
    ("regate_bank", "learnable"): (lambda: make_native("mixtral"), {"experts": "silu,learnable_relu"}, {}),
    ("regate_bank", "ungated"): (lambda: make_native("mixtral"), {"experts": "ungated_relu*2"}, {"calibration": IDS}),
    ("split", "half"): (FAMILIES["opt"].make, {"target": Split(experts=4, top_k=2)}, {"calibration": IDS}),
    ("split", "all"): (gpt2, {"target": Split(experts=4, top_k=4)}, {"calibration": IDS}),
    ("grow", "bank"): (lambda: make_native("mixtral"), {"target": Grow(times=3)}, {}),
    ("grow", "bank, all"): (lambda: make_native("mixtral"), {"target": Grow(active="all")}, {}),
    ("grow", "ours"): (lambda: converted(gpt2, "geglu_new", experts=3), {"target": Grow()}, {}),
    ("grow", "ours, all"): (lambda: converted(gpt2, "geglu_new", experts=3), {"target": Grow(active="all")}, {}),
    ("merge", "two"): (gpt2, {"target": Merge(others=(FAMILIES["gpt2"].make(seed=1),), names=("a", "b"))}, {}),
    ("merge", "of itself"): (FAMILIES["t5"].make, {"target": Merge(others=(FAMILIES["t5"].make(),))}, {}),
    ("revert", "dense"): (lambda: converted(gpt2, "modulated_geglu_new"), {"target": Revert()}, {}),
    ("revert", "approximate"): (lambda: converted(gpt2, "swiglu"), {"target": Revert()}, {}),
    ("revert", "t5"): (lambda: converted(FAMILIES["t5"].make, "reglu"), {"target": Revert()}, {}),
    ("revert", "native"): (
        lambda: converted(lambda: make_native("llama"), "learnable_swiglu"), {"target": Revert()}, {}
    ),
    ("freeze_mix", "gpt2"): (annealed, {"target": FreezeMix()}, {}),
    ("to_native", "t5"): (flat_t5, {"target": ToNative()}, {}),
    ("scale_gates", "half"): (gpt2, {"target": ScaleGates(factor=0.5)}, {}),
}  # fmt: skip


CARRIED_OUT = ("gate", "upcycle", "regate_bank", "split", "grow")


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_change_has_a_row():
    assert {name for name, _ in CASES} == set(CHANGES)


@pytest.mark.parametrize("case", few(CASES, 3), ids=" ".join)
def test_what_was_planned_is_what_is_done(case, tmp_path):
    make, planning, applying = CASES[case]
    model = make()
    before, logits, mode = structure(model), outputs(model), torch.random.get_rng_state()
    planned = hf_glu.plan(model, **planning)
    assert structure(model) == before
    assert torch.equal(torch.random.get_rng_state(), mode), "planning draws random numbers"
    said = copy.deepcopy(planned.to_dict())
    assert {row["change"] for row in said["sites"]} == {case[0]}
    assert said["parameters_before"] == size(model)
    assert planned.needs_calibration == bool(applying)
    if applying:
        with pytest.raises(OptionError, match="calibration="):
            planned.apply()
        assert structure(model) == before
    report = planned.apply(**applying)
    assert structure(model) != before
    assert said["parameters_after"] == size(model)
    done = report.to_dict()
    if case[0] == "split":
        assert list(done["curves"]) == [row["site"] for row in said["sites"]]
    for row, site in zip(said.pop("sites"), done["sites"], strict=True):
        assert {key: site[key] for key in row} == row
    assert {key: done[key] for key in said} == said
    if said["promise"] != "approximate":
        assert_same(outputs(model), logits, said["promise"])
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("case", few([case for case in CASES if case[0] in CARRIED_OUT], 3))
def test_a_plan_for_a_model_without_weights_is_carried_out_on_the_one_with_them(case):
    make, planning, applying = CASES[case]
    model, other = make(), make()
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    planned = hf_glu.plan(skeleton, **planning)
    for module in (model, other):
        torch.manual_seed(0)
        (planned if module is model else hf_glu.plan(other, **planning)).apply(module, **applying)
    assert_same(dict(model.state_dict()), dict(other.state_dict()), "bitwise")
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())


def narrow(model):
    hf_glu.convert(model, "geglu_new", width=20, calibration=IDS, distill_steps=0, check=False)


SINCE = {
    "converted": lambda model: hf_glu.convert(model, "geglu_new"),
    "narrowed": narrow,
    "other activation": lambda model: convertible_sites(model)[1].set_act(torch.nn.ReLU()),
    "gone": lambda model: hf_glu.convert(model, "geglu_new", experts=2),
    "a layer less": lambda model: model.transformer.h.__delitem__(1),
    "wider": lambda model: set_rows(convertible_sites(model)[0].in_proj, torch.zeros(80, 16), torch.zeros(80)),
}


@pytest.mark.parametrize("how", SINCE)
@pytest.mark.parametrize("planning", [{"target": "geglu_new"}, {"target": "geglu_new", "experts": 2}])
def test_a_plan_for_a_model_that_has_changed_since_is_refused(how, planning):
    model = gpt2()
    planned = hf_glu.plan(model, **planning)
    SINCE[how](model)
    before = structure(model)
    with pytest.raises(ConversionError, match="has changed since, plan anew"):
        planned.apply()
    assert structure(model) == before


def test_a_plan_is_carried_out_once():
    model = gpt2()
    planned = hf_glu.plan(model, "geglu_new")
    planned.apply()
    with pytest.raises(ConversionError, match=r"was gelu_new.* and is geglu_new"):
        planned.apply()
    again = hf_glu.plan(model, "geglu_new")
    before = structure(model)
    assert not again.changes
    again.apply()
    assert structure(model) == before


def test_a_new_change_takes_one_class(tmp_path):
    model, logits = gpt2(), outputs(gpt2())
    old = [weight_rows(site.in_proj).clone() for site in hf_glu.find_sites(model)]
    report = hf_glu.convert(model, ScaleGates(factor=2.0), layers=[1])
    rows = [weight_rows(site.in_proj) for site in hf_glu.find_sites(model)]
    assert_same(dict(enumerate(rows)), {0: old[0], 1: old[1] * 2}, "bitwise")
    assert report.to_dict()["sites"][0]["route"] == "times 2.0"
    assert report.sites[0].relative_error > 0.01
    measured = float((outputs(model)["logits"] - logits["logits"]).abs().max())
    assert report.max_abs_difference == pytest.approx(measured, rel=1e-4)
    gpt2().save_pretrained(tmp_path / "a")
    for verb, name in ((hf_glu.convert_checkpoint, "b"), (hf_glu.convert_stream, "c")):
        verb(tmp_path / "a", tmp_path / name, ScaleGates(factor=2.0), layers=[1])
        again = type(model).from_pretrained(tmp_path / name)
        assert_same(dict(again.state_dict()), dict(model.state_dict()), "bitwise")
    with pytest.raises(OptionError, match="its own options"):
        hf_glu.plan(model, ScaleGates(factor=2.0), width=20)


def test_a_change_that_fails_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model, apply = gpt2(), ScaleGates.apply

    def fails(self, work, step):
        apply(self, work, step)
        if step.site.layer == 1:
            raise ZeroDivisionError

    monkeypatch.setattr(ScaleGates, "apply", fails)
    before, state = structure(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        hf_glu.convert(model, ScaleGates(factor=2.0))
    assert structure(model) == before
    assert_same(dict(model.state_dict()), state, "bitwise")


def test_an_option_of_plan_is_one_of_convert():
    for verb in (hf_glu.convert, hf_glu.plan):
        with pytest.raises(UnknownNameError, match="wdth"):
            verb(gpt2(), "geglu_new", wdth=20)
    for name, part in signature(hf_glu.plan).parameters.items():
        if part.kind is part.KEYWORD_ONLY and name != "fitted":
            check_section_names([name], hf_glu.plan, hf_glu.convert)


def test_two_changes_of_one_name_are_refused():
    with pytest.raises(DuplicateNameError, match="'gate' is registered"):
        type("Gate", (Change,), {"__module__": "another"})


def test_what_takes_a_model_is_not_streamed(tmp_path):
    gpt2().save_pretrained(tmp_path / "a")
    for target, more, name in (
        ("geglu_new", {"experts": 2}, "upcycle"),
        ("geglu_new", {"experts": 2, "width": 20}, "upcycle"),
        ("geglu_new", {"width": 20}, "gate"),
        (Split(experts=4, top_k=2), {}, "split"),
        (Merge(others=(gpt2(),)), {}, "merge"),
    ):
        with pytest.raises(CheckpointError, match=f"{name} takes a whole model and isn't streamed"):
            hf_glu.convert_stream(tmp_path / "a", tmp_path / "b", target, **more)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


COMMANDS = {
    "experts": (gpt2, ["--to", "geglu_new", "--experts", "geglu_new*2,gelu_new*2"], "exact"),
    "narrow experts": (gpt2, ["--to", "geglu_new", "--experts", "2", "--width", "20"], "approximate"),
    "banks": (lambda: make_native("mixtral"), ["--experts", "silu,learnable_relu"], "exact"),
    "grown": (lambda: make_native("mixtral"), ["--grow", "2"], "exact"),
    "grown, all": (lambda: make_native("mixtral"), ["--grow", "3", "--active", "all"], "exact up to rounding"),
    "layers": (gpt2, ["--to", "0=geglu_new", "--to", "1=swiglu"], "approximate"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_plans_all_of_them(name, tmp_path, capsys):
    make, arguments, promise = COMMANDS[name]
    make().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()  # no weight is read
    command = ["convert", str(tmp_path / "a"), *arguments, "--plan"]
    assert cli.run([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["promise"] == promise
    assert planned["parameters_after"] >= planned["parameters_before"]
    assert planned["flops_per_token_after"] > 0 < planned["memory_bytes_after"]
    assert cli.run(command) == 0
    assert "Plan: 2 FFNs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_frozen_mix_of_a_family_without_a_field_loads_frozen(tmp_path):
    model = RESIDUAL["bloom"]().eval()
    hf_glu.convert(model, "learnable_geglu")
    hf_glu.anneal(model, 1.0)
    logits = outputs(model)
    hf_glu.freeze_mix(model)
    assert model.config.hf_glu["activation"] == "geglu"
    assert "mix" not in model.config.hf_glu
    assert_same(outputs(model), logits, "exact")
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again.eval()), outputs(model), "bitwise")


@pytest.mark.parametrize("first", [0, 1])
def test_experts_of_ffns_of_which_only_some_have_a_bias_all_have_one(first, tmp_path):
    model = FAMILIES["bert"].make()
    site = convertible_sites(model)[first]
    set_rows(site.in_proj, weight_rows(site.in_proj), None)
    planned = hf_glu.plan(model, "geglu", experts="gelu*2")
    planned.apply()
    assert planned.parameters_after == size(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")
