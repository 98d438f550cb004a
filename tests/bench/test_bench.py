"""The benches: interleaved timing's arithmetic, what is kept for a backward pass, cells at tiny sizes, bad input."""

from __future__ import annotations

import json
import subprocess
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from comparing import assert_same
from pico import FAMILIES
from torch import nn

from hf_glu import cli
from hf_glu.bench import activations, experts, ffn, running, scan, start, timing
from hf_glu.bench.memory import peak_bytes, saved_bytes
from hf_glu.bench.result import BenchResult, BenchRow, mean_ratios, physical_cores
from hf_glu.bench.running import BenchOptions, Cell, Claim, Contender
from hf_glu.bench.timing import Spread, interleave
from hf_glu.config.experts import ExpertOptions
from hf_glu.errors import OptionError, UnknownNameError
from hf_glu.ffn.experts import ExpertFFN

# one thread: several wait for each other at sizes where nothing can be shared out
SIZES = ["--tokens", "6", "--hidden", "16", "--width", "32", "--threads", "1"]
TINY = [*SIZES, "--rounds", "2", "--warmup", "1"]


class Stage:
    """A clock, and contenders that move it on by what they take, slower in some rounds than in others."""

    def __init__(self, seconds, slowness=(1.0,)):
        self.now, self.calls, self.slowness = 0.0, [], slowness
        self.contenders = {name: lambda name=name: self.run(name, seconds[name]) for name in seconds}

    def run(self, name, seconds):
        self.now += seconds * self.slowness[len(self.calls) // len(self.contenders) % len(self.slowness)]
        self.calls.append(name)

    def time(self, **options):
        return interleave(self.contenders, clock=lambda: self.now, **options)


def test_rounds_rotate():
    stage = Stage({"a": 1.0, "b": 2.0, "c": 3.0})
    stage.time(rounds=4, warmup=1)
    assert stage.calls[:3] == ["a", "b", "c"]
    assert stage.calls[3:] == ["a", "b", "c", "a", "c", "b", "c", "a", "b", "c", "b", "a"]


def test_a_slow_round_doesnt_change_the_ratio():
    stage = Stage({"a": 1.0, "b": 1.5}, slowness=(1.0, 40.0, 3.0))
    found = stage.time(rounds=6, warmup=0, repeats=1)
    ratio = found.ratio("b", "a")
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.spread("a").median == pytest.approx(3.0)
    assert found.spread("a").high > 10
    assert found.fastest(["b", "a"]) == "a"
    with pytest.raises(UnknownNameError, match="'a'"):
        found.ratio("b", "aa")


def test_short_calls_are_repeated_and_averaged():
    stage = Stage({"short": 0.004, "long": 1.0})
    found = stage.time(rounds=3, warmup=1)
    assert stage.calls.count("short") == 1 + 3 * 5
    assert stage.calls.count("long") == 1 + 3
    assert found.seconds["short"] == pytest.approx((0.004,) * 3)
    assert stage.time(rounds=1, warmup=0, repeats=7).seconds["long"] == pytest.approx((1.0,))
    assert Stage({"instant": 0.0}).time(rounds=1).seconds == {"instant": (0.0,)}


def test_nothing_to_time():
    for bad in ({"rounds": 0}, {"warmup": -1}):
        with pytest.raises(OptionError):
            interleave({"a": int}, **bad)
    with pytest.raises(OptionError):
        interleave({})


def test_quartiles():
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(median=3, low=2, high=4)
    assert Spread.of([7]) == Spread(median=7, low=7, high=7)


def test_saved_bytes():
    x = torch.randn(10, 4, requires_grad=True)
    weight = nn.Parameter(torch.randn(6, 4))
    assert saved_bytes(lambda: x @ weight.T, [weight]) == 10 * 4 * 4
    assert saved_bytes(lambda: x @ weight.T) == (10 * 4 + 6 * 4) * 4
    assert saved_bytes(lambda: (x * x[:]).exp()) == 2 * 10 * 4 * 4  # x once, although twice; and the result
    assert saved_bytes(lambda: x + 1) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 10 * 4 * 4


def test_peak_bytes_are_the_most_at_a_time():
    def call():
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        third = torch.empty(500)
        return second, third

    assert peak_bytes(call) == 3000 * 4
    assert peak_bytes(lambda: torch.empty(1000)) == 1000 * 4
    row = peak_rows(call)[1]
    assert (row.saved_bytes, row.saved_ratio, row.saved_met) == (3000 * 4, 3.0, False)


def peak_rows(call):
    made = {"lean": Contender(call=lambda: torch.empty(1000), peak=True), "ours": Contender(call=call, peak=True)}
    claims = {"ours": Claim(peers=("lean",), saved_peers=("lean",), saved_target=2)}
    cell = Cell(shape={}, build=lambda: made, claims=claims)
    return running.measure("fake", cell, BenchOptions(rounds=1))


def cell_of(calls, claims):
    return Cell(shape={"tokens": 1}, build=lambda: {k: Contender(call=v) for k, v in calls.items()}, claims=claims)


@pytest.fixture
def staged(monkeypatch):
    """Measure cells with a stage's clock."""

    def measure(seconds, claims, **options):
        stage = Stage(seconds)
        monkeypatch.setattr(running, "interleave", lambda calls, **more: stage.time(**more))
        return running.measure("fake", cell_of(stage.contenders, claims), BenchOptions(**options))

    return measure


def test_a_claim_is_against_the_fastest_peer(staged):
    claims = {name: Claim(peers=("slow", "fast", "left out"), target=1.1) for name in ("good", "bad")}
    rows = {row.contender: row for row in staged({"slow": 3.0, "fast": 1.0, "good": 1.05, "bad": 1.2}, claims)}
    assert rows["good"].peer == rows["bad"].peer == "fast"
    assert rows["good"].ratio.median == pytest.approx(1.05)
    assert [rows[name].met for name in rows] == [None, None, True, False]
    assert rows["bad"].to_dict()["met"] is False


def test_a_limit_holds_on_whatever_machine(staged):
    claims = {"a": Claim(peers=("b",), target=3.0, limit=1.5), "b": Claim(peers=("a",), limit=1.5)}
    assert [row.met for row in staged({"a": 2.0, "b": 1.0}, claims)] == [False, True]
    claims = {"a": Claim(peers=("b",), target=1.9, limit=2.5)}
    assert [row.met for row in staged({"a": 2.0, "b": 1.0}, claims)] == [False, None]


def test_a_device_that_is_not_there_is_named(capsys):
    assert cli.run(["bench", "ffn", "--device", "cudda"]) == 2
    assert "no device 'cudda'" in capsys.readouterr().err


def test_starting_is_processes_and_a_conversion(tmp_path):
    first, second = start.cells(BenchOptions(model=str(tmp_path)))
    assert second.shape["of"] == "model given"
    contenders = first.build()
    assert set(start.STARTED) < set(contenders)
    contenders["hf-glu --help"].call()
    contenders["import hf_glu"].call()
    assert start.STARTED["hf-glu --help"].limit == 0.5
    model: Any = FAMILIES["bert"].make()
    model.save_pretrained(tmp_path)
    made = second.build()
    made["load"].call()
    made["convert to geglu"].call()
    made["convert to geglu"].call()  # a copy each time


def test_a_process_that_fails_is_no_time(monkeypatch):
    monkeypatch.setitem(start.CODE, "broken", "raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        start.processes()["broken"].call()


def test_what_is_kept_is_against_the_leanest_peer():
    x = torch.randn(8, 4, requires_grad=True)

    def contender(forward):
        return Contender(call=forward, forward=forward)

    made = {"fat": lambda: x.exp().exp(), "lean": lambda: x.exp(), "ours": lambda: x.exp().exp().exp()}
    claims = {"ours": Claim(peers=("lean",), saved_peers=("fat", "lean"), saved_target=2.5)}
    cell = Cell(shape={}, build=lambda: {name: contender(forward) for name, forward in made.items()}, claims=claims)
    row = running.measure("fake", cell, BenchOptions(rounds=1))[-1]
    assert (row.saved_peer, row.saved_ratio, row.saved_met) == ("lean", 3.0, False)
    assert row.met is None


def test_the_summary_counts_misses():
    one = Spread(median=1.0, low=1.0, high=1.0)
    row = BenchRow(bench="b", cell={}, contender="c", seconds=one, peer="p", ratio=one, target=1.0)
    worse = BenchRow(bench="b", cell={}, contender="d", seconds=one, peer="p", ratio=one, target=0.9)
    assert BenchResult(bench="b", machine={}, rows=(row, worse)).summary == "1 of 2 targets met"


def test_the_contenders_compute_the_same():
    shape = {"hidden": 16, "width": 32, "experts": 8, "top_k": 2, "tokens": 12, "dtype": "float32", "pass": "decode"}
    x = torch.randn(1, 12, 16)
    with torch.no_grad():
        found = {name: module(x) for name, module in experts.modules(shape).items()}
    different = found.pop("heterogeneous")
    assert {"stock eager", "stock grouped_mm", "stock batched_mm", "homogeneous", "hearing"} == set(found)
    for one, other in pairwise(found.values()):
        assert_same(one, other, "exact")
    assert not torch.allclose(different, one, atol=1e-6)
    skipped = experts.modules(shape | {"hidden": 512, "width": 1024, "tokens": 100, "pass": "forward"})
    assert "stock batched_mm" not in skipped


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_at_a_tiny_size(dtype, capsys):
    assert cli.run(["bench", "experts", *TINY, "--dtype", dtype, "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert captured.err.count("measuring") == 2
    assert set(data["machine"]) >= {"cpu", "cores", "threads", "torch", "transformers", "device"}
    assert data["machine"]["threads"] == 1
    assert physical_cores() == data["machine"]["cores"] >= 1
    rows = [row for row in data["rows"] if row["cell"]["pass"] != "decode"]
    assert rows[0]["cell"]["dtype"] == dtype
    assert len(data["rows"]) - len(rows) == 6
    for row in rows:
        assert row["bench"] == "experts"
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["saved_bytes"] > 0
        assert (row["met"] is None) == (row["target"] is None)
    ours = {row["contender"]: row for row in rows if row["target"] or row["saved_target"]}
    assert ours.pop("hearing")["target"] == 1.03
    assert set(ours) == {"homogeneous", "heterogeneous", experts.LEAN}
    lean = ours.pop(experts.LEAN)["saved_bytes"]  # which doesn't depend on the machine
    assert all(lean < 0.8 * row["saved_bytes"] for row in ours.values())


def test_the_scan_at_a_tiny_size(capsys):
    assert cli.run(["bench", "scan", *TINY, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["contender"] for row in rows] == [scan.LOOP, scan.SCAN, scan.PLAIN, scan.STATEFUL]
    assert [row["target"] for row in rows] == [None, 0.8, None, 1.25]
    assert rows[1]["saved_met"]
    inputs = scan._inputs({"batch": 2, "width": 8, "dtype": "float32"}, 6)
    assert_same(scan._scanned(*inputs).detach(), scan.unbound(*inputs).detach(), "exact")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activations_at_a_tiny_size(dtype, monkeypatch, capsys):
    monkeypatch.setattr(activations, "has_compiler", lambda device: False)  # whose kernels take their time to make
    assert cli.run(["bench", "activations", *TINY, "--dtype", dtype, "--json"]) == 0
    rows = {row["contender"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == [activations.PLAIN, *activations.CONTENDERS]
    assert [row["target"] for row in rows.values()] == [None, *[1.10, 1.15, 1.30] * 2, 1.05, 1.08, 1.15]
    assert rows["moa_swiglu, save_memory"]["saved_met"]
    shape = {"tokens": 6, "hidden": 16, "width": 32, "dtype": dtype}
    found = [contender.forward() for contender in activations.ffns(shape).values()]
    assert all((one - other).abs().max() > 0 for one, other in pairwise(found))  # none is asleep


def test_the_table_shows_ratios_beside_targets(capsys):
    assert cli.run(["bench", "experts", *TINY]) == 0
    out = capsys.readouterr().out
    assert "tokens 6, hidden 16, width 32, experts 8, top_k 2, float32" in out
    assert "1.05" in out
    assert "targets met" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["expert"], "unknown bench 'expert'; did you mean 'experts'?"),
        (["experts", "--dtype", "float31"], "did you mean 'float32'"),
        (["experts", "--tokens", "12,x"], "tokens must be numbers such as 512,2048, got '12,x'"),
        (["experts", "--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert cli.run(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-glu: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_the_threads_are_put_back():
    before = torch.get_num_threads()
    running.run("experts", BenchOptions(threads=before + 1, tokens="2", hidden=8, width=8, rounds=1, warmup=1))
    assert torch.get_num_threads() == before


def make_ffn(groups, *, bias=True, **more):
    torch.manual_seed(0)
    ffn = ExpertFFN(8, 16, ExpertOptions(groups=groups, **more), bias=bias)
    for parameter in ffn.parameters():
        parameter.data.normal_(std=0.3)
    return ffn


def test_no_loss_of_the_router_where_both_coefficients_are_0(monkeypatch):
    x, found = torch.randn(6, 8), []
    for more in ({"balance": 0.0, "z": 0.0}, {"z": 0.0}, {"balance": 0.0}, {}):
        ffn = make_ffn("swiglu*4", **more).train()
        ffn(x)
        found.append(float(ffn.loss))
    assert found[0] == 0
    assert all(found[1:])
    assert found[1] + found[2] == pytest.approx(found[3])
    monkeypatch.setattr(torch.Tensor, "logsumexp", None)
    make_ffn("swiglu*4", balance=0.0, z=0.0).train()(x)


@pytest.mark.parametrize("frozen", ["router", "in_proj", "out_proj", "bias", "act", "banks", "x"])
def test_gradients_where_some_parts_are_frozen(frozen):
    found = []
    for freeze in (False, True):
        ffn = make_ffn("learnable_swiglu*2,gelu,swiglu*3")
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(not (freeze and frozen == "x"))
        for name, parameter in ffn.named_parameters():
            parameter.requires_grad_(not (freeze and frozen in name))
        ffn(x).square().sum().backward()
        found.append({"x": x.grad} | {name: p.grad for name, p in ffn.named_parameters()})
    left = {name: gradient for name, gradient in found[1].items() if gradient is not None}
    assert 0 < len(left) < len(found[0])
    assert_same(left, {name: found[0][name] for name in left}, "bitwise")


def test_learnable_and_autocast_gradients_are_those_of_the_plain_computation():
    for autocast, tolerance in ((False, "trained"), (True, "bf16")):
        found = []
        for backend in ("loop", "grouped"):
            ffn = make_ffn("learnable_swiglu*2,prelu*2,swiglu*2", backend=backend)
            x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = ffn(x)
            out.square().mean().backward()
            found.append({"x": x.grad, **{name: p.grad for name, p in ffn.named_parameters()}})
        assert_same(found[0], found[1], tolerance)


@pytest.mark.parametrize("groups", ["swiglu*4", "relu*2,swiglu*2"])
def test_no_tokens_and_decoding(groups):
    ffn = make_ffn(groups).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert ffn(x[:0]).shape == (0, 8)
        assert_same(ffn(x), ffn.requires_grad_()(x).detach(), "bitwise")
    assert_same(ffn(x).detach(), torch.stack([ffn(row) for row in x]).detach(), "exact")


def test_second_derivatives():
    ffn = make_ffn("learnable_swiglu*2,swiglu*2").double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ffn, (x,))
    grown = torch.autograd.grad(ffn(x).sum(), list(ffn.parameters()), create_graph=True, materialize_grads=True)
    ffn.zero_grad()
    ffn(x).sum().backward()
    assert_same(dict(enumerate(grown)), dict(enumerate(p.grad for p in ffn.parameters())), "formula")


def test_repeats_are_bounded(monkeypatch):
    monkeypatch.setattr(timing, "MOST_REPEATS", 3)
    stage = Stage({"a": 1e-6})
    stage.time(rounds=1, warmup=1)
    assert len(stage.calls) == 1 + 3


def test_the_ffns_compute_the_same_and_the_mean_has_a_verdict():
    shape = {"tokens": 6, "hidden": 16, "width": 32, "dtype": "float64"}
    found = {name: contender.forward() for name, contender in ffn.ffns(shape).items() if name != ffn.COMPILED}
    for name in (name for name in ffn.CLAIMS if name.startswith("swiglu")):
        torch.testing.assert_close(found[name], found[ffn.STOCK])
    torch.testing.assert_close(found["geglu_new, save_memory"], found[ffn.T5])
    rows = [
        BenchRow(bench="ffn", cell={"tokens": n}, contender="swiglu", seconds=Spread.of([1]), ratio=Spread.of([r]))
        for n, r in ((1, 0.5), (2, 2.0))
    ]
    (mean,) = mean_ratios(rows, {"swiglu": 0.97, "other": 1.0})
    assert mean.ratio == pytest.approx(1.0)
    assert not mean.met


@pytest.mark.slow
def test_a_run_beside_a_committed_one(tmp_path, capsys):
    file, small = tmp_path / "ratios.json", [*SIZES, "--rounds", "1"]
    assert cli.run(["bench", "experts", *small, "--save", str(file)]) == 0
    capsys.readouterr()
    assert cli.run(["bench", "experts", *small, "--against", str(file), "--tolerance", "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against"]
    assert found["same"]
    assert {change["of"] for change in found["changes"]} == {"time", "memory"}
    data = json.loads(file.read_text())
    for row in data["benches"][0]["rows"]:
        if row["saved_ratio"]:
            row["saved_ratio"] /= 2
    file.write_text(json.dumps(data))
    assert cli.run(["bench", "experts", *small, "--against", str(file), "--tolerance", "1000"]) == 0
    assert cli.run(["bench", "experts", *small, "--against", str(file), "--tolerance", "0.5"]) == 1
    assert "WORSE" in capsys.readouterr().out
    file.write_text("{}")
    for bad in (["--against", str(file)], ["--against", str(tmp_path / "none")], ["--save", str(tmp_path / "a" / "b")]):
        assert cli.run(["bench", "experts", *small, *bad]) == 2
    assert cli.run(["bench", "experts", "expert", *small]) == 2


@pytest.mark.slow
def test_a_run_of_limited_time_says_what_is_missing(monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("no kernel image\nmore of it")

    def cells(options):
        works, fails = running.Contender(call=lambda: None), running.Contender(call=broken)
        claims = {"ours": running.Claim(peers=("theirs",), target=1.0)}
        yield running.Cell(shape={"of": "first"}, build=lambda: {"theirs": works, "ours": fails}, claims=claims)
        yield running.Cell(shape={"of": "second"}, build=broken, claims={})
        yield running.Cell(shape={"of": "third"}, build=lambda: {"theirs": works}, claims={})

    monkeypatch.setattr(scan, "cells", cells)
    found = running.run("scan", BenchOptions(rounds=1), until=time.monotonic() + 60)
    assert [row.contender for row in found.rows] == ["theirs", "theirs"]
    missing = [(failure.cell["of"], failure.contender, failure.why) for failure in found.failures]
    assert missing == [("first", "ours", "no kernel image"), ("second", None, "no kernel image")]
    late = running.run("scan", BenchOptions(rounds=1), until=time.monotonic() - 1)
    assert (late.rows, len(late.failures)) == ((), 3)
    with pytest.raises(RuntimeError, match="no kernel"):  # without a limit nothing is left out
        running.run("scan", BenchOptions(rounds=1))
    saved = tmp_path / "found.json"
    assert cli.run(["bench", "scan", "--seconds", "60", "--rounds", "1", "--save", str(saved)]) == 1
    assert "MISSING: ours of first: no kernel image" in capsys.readouterr().out
    assert len(json.loads(saved.read_text())["benches"][0]["failures"]) == 2


def test_a_preset_names_benches_and_options(monkeypatch, capsys):
    seen = []

    def run(name, options, **more):
        seen.append((name, options))
        return running.BenchResult(bench=name, machine={}, rows=())

    monkeypatch.setattr(running, "run", run)
    assert cli.run(["bench", "--preset", "8min", "--rounds", "2", "--json"]) == 0
    assert [name for name, _ in seen] == ["ffn", "experts", "scan", "activations", "whole", "tiles"]
    assert all(options.rounds == 2 and options.dtype == "bfloat16" and options.seconds == 400 for _, options in seen)
    capsys.readouterr()
    for command in (["bench"], ["bench", "--preset", "9min"]):
        assert cli.run(command) == 2
    assert "8min" in capsys.readouterr().err
