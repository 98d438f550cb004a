"""Costs on paper: equal to what real models have and keep, right at the limits, and the page says what is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from covering import few
from transformers import LlamaConfig, LlamaForCausalLM

import hf_glu
from hf_glu.bench.ffn import FusedFFN
from hf_glu.bench.memory import saved_bytes
from hf_glu.bench.steps import llama_ffns
from hf_glu.compat.of_models import POST_NORM
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.lean import keep_less
from recipes.scale import check as scale_check
from recipes.scale import tables as scale
from recipes.scale.__main__ import main as show
from recipes.scale.formulas import (
    Shape,
    conversion_cost,
    kept_bytes,
    parameters,
    step_time,
    training_flops,
    training_memory,
)

NAMED = {f"{size}: {name}": (name, shape, base) for size, name, shape, base in scale.named_shapes()}
DENSE, GATED = scale.BASES["GPT 7B"], scale.BASES["Llama 7B"]
MIXTRAL = scale.BASES["Mixtral 8x7B"]
RATES = {"tokens": 8192, "sequence": 4096, "flops": 1e15, "efficiency": 0.4, "bandwidth": 4e11}


@pytest.mark.parametrize("key", few(NAMED, 4))
def test_parameters_equal_those_of_the_real_model_at_full_size(key):
    name, shape, base = NAMED[key]
    assert parameters(shape).total == scale_check.counted(shape, iso_of=base.width if name == scale.ISO else None)


def test_published_sizes():
    assert parameters(GATED).total == 6_738_415_616
    assert parameters(MIXTRAL).total == 46_702_792_704
    assert parameters(GATED).active == parameters(GATED).total
    assert round(parameters(MIXTRAL).active / 1e9, 1) == 12.9


def test_a_gate_of_the_familys_own_costs_nothing():
    shape = scale_check.SHAPES["Llama"]
    model = scale_check.build(shape)
    hf_glu.convert(model, "geglu", check=False)
    assert model.num_parameters() == parameters(shape).total
    with pytest.raises(NoSiteError):
        hf_glu.save_memory(model)
    with pytest.raises(OptionError, match="save_memory is for fused"):
        kept_bytes(shape, save_memory=True)
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
        config.hidden_act = "geglu"
        assert LlamaForCausalLM(config).num_parameters() == parameters(
            Shape(hidden=64, width=96, layers=1, heads=4, kv_heads=4, vocab=config.vocab_size)
        ).total  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_ffn_keeps_what_the_formula_says(dtype):
    """The FFNs' input, H, is the output of the norm, and counted there."""
    hidden, width, tokens = 16, 48, 5
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    native = llama_ffns({"silu": torch.nn.SiLU()}, hidden, width)["silu"]
    dense = torch.nn.Sequential(
        torch.nn.Linear(hidden, width), torch.nn.GELU(), torch.nn.Linear(width, hidden)
    )  # fmt: skip
    weights = (torch.randn(width, hidden), torch.randn(width, hidden), torch.randn(hidden, width))
    fused, lean = FusedFFN(hidden, width, "geglu", weights), FusedFFN(hidden, width, "geglu", weights)
    keep_less(lean.act, lean.out_proj)
    for ffn, module in (("native", native), ("dense", dense), ("fused", fused), ("fused", lean)):
        module.to(dtype)
        shape = Shape(hidden=hidden, width=width, layers=1, heads=1, kv_heads=1, vocab=1, ffn=ffn)
        said = kept_bytes(shape, dtype_bytes=dtype.itemsize, save_memory=module is lean)["ffn"]
        found = saved_bytes(lambda module=module: module(x), module.parameters())
        assert found == tokens * (said + hidden * dtype.itemsize), ffn


SMALL = {f"{name}-{dtype}": (shape, lean, dtype)
         for name, shape, lean in scale_check.small_shapes() for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip


@pytest.mark.parametrize("key", SMALL)
def test_a_model_keeps_what_the_formula_says(key):
    """Beside it are indices, the routers' scores and the rotary angles, which don't grow with H, W or L."""
    shape, lean, dtype = SMALL[key]
    if "stock" in key and not POST_NORM.is_present():
        pytest.skip("this Transformers' stock models keep more")
    measured, said = scale_check.kept(shape, dtype, save_memory=lean)
    assert 1 <= measured / said < 1.025


def test_the_gate_costs_a_third_of_the_ffn_and_iso_width_nothing():
    made = scale.variants(DENSE)
    dense, full, iso = (parameters(made[name]) for name in (scale.STOCK, scale.FULL, scale.ISO))
    ffn = DENSE.layers * DENSE.hidden * DENSE.width
    assert full.total - dense.total == ffn + DENSE.layers * DENSE.width
    assert abs(iso.total / dense.total - 1) < 0.01
    assert kept_bytes(made[scale.FULL])["ffn"] == kept_bytes(DENSE)["ffn"] * 2
    assert kept_bytes(made[scale.FULL], save_memory=True)["ffn"] == kept_bytes(DENSE)["ffn"]


def test_memory_at_the_limits():
    fused = replace(DENSE, ffn="fused")
    alone = training_memory(fused, tokens=8)
    total = parameters(fused).total
    assert (alone.weights, alone.gradients, alone.optimizer, alone.gathered) == (2 * total, 2 * total, 12 * total, 0)
    spread = [training_memory(fused, tokens=8, sharding=n) for n in (8, 64, 512)]
    assert [each.weights for each in spread] == [2 * total / n for n in (8, 64, 512)]
    assert spread[0].total > spread[1].total > spread[2].total > spread[2].gathered > 0
    assert len({(each.kept, each.loss, each.gathered) for each in spread}) == 1
    less = [training_memory(fused, tokens=8, sharding=8, **option).kept
            for option in ({}, {"save_memory": True}, {"checkpointing": True})]  # fmt: skip
    assert less[0] > less[1] > less[2]
    assert training_memory(fused, tokens=16).kept == 2 * alone.kept


def test_a_devices_own_experts_only():
    shared = training_memory(MIXTRAL, tokens=8, sharding=8, expert_parallel=8)
    assert shared.weights == training_memory(MIXTRAL, tokens=8, sharding=8).weights
    counts = parameters(MIXTRAL)
    common = counts.layer - counts.routed // MIXTRAL.layers
    assert shared.gathered == 2 * (3 * common + counts.outer)  # experts are where they are used
    more = training_memory(MIXTRAL, tokens=8, sharding=16, expert_parallel=8)
    assert more.gathered == 2 * (3 * (common + counts.routed / MIXTRAL.layers / 8) + counts.outer)
    for sharding, expert_parallel in ((8, 3), (12, 8), (0, 1), (8, 0), (32, 16)):
        with pytest.raises(OptionError, match="must divide"):
            training_memory(MIXTRAL, tokens=8, sharding=sharding, expert_parallel=expert_parallel)


def test_communication_at_the_limits():
    alone = step_time(MIXTRAL, devices=1, **RATES)
    assert alone.fsdp == alone.experts == 0
    assert alone.overlapped == alone.exposed == alone.compute
    total = parameters(DENSE).total
    assert step_time(DENSE, devices=4, **RATES).fsdp == pytest.approx(3 * 2 * total * 3 / 4 / 4e11)
    spread = [step_time(DENSE, devices=n, **RATES) for n in (2, 8, 512)]
    assert spread[0].fsdp < spread[1].fsdp < spread[2].fsdp < 6 * total / 4e11
    assert len({each.compute for each in spread}) == 1
    shared = step_time(MIXTRAL, devices=8, expert_parallel=8, expert_bandwidth=2e11, **RATES)
    assert shared.experts == pytest.approx(4 * 8192 * 2 * 32 * 4096 * 2 * 7 / 8 / 2e11)
    assert shared.fsdp < step_time(MIXTRAL, devices=8, **RATES).fsdp
    assert shared.compute < shared.overlapped < shared.exposed


def test_flops_are_six_for_each_active_weight():
    counts = parameters(MIXTRAL)
    matrices = counts.active - MIXTRAL.vocab * MIXTRAL.hidden - MIXTRAL.hidden  # neither lookup nor last norm
    assert training_flops(MIXTRAL, sequence=0) == 6 * matrices
    longer = training_flops(MIXTRAL, sequence=100) - training_flops(MIXTRAL, sequence=0)
    assert longer == 6 * MIXTRAL.layers * 100 * MIXTRAL.hidden
    again = training_flops(MIXTRAL, sequence=100, checkpointing=True) / training_flops(MIXTRAL, sequence=100)
    assert 1.3 < again < 4 / 3


def test_streaming_needs_no_more_for_a_longer_model():
    full = replace(DENSE, ffn="fused")
    costs = [
        conversion_cost(replace(DENSE, layers=n), replace(full, layers=n), disk=1e9, constant=1e8, stream=stream)
        for stream in (False, True) for n in (8, 80)
    ]  # fmt: skip
    assert costs[0]["memory"] < costs[1]["memory"]
    assert costs[2]["memory"] == costs[3]["memory"] == 1e8 + 8 * DENSE.hidden * DENSE.width < costs[0]["memory"]
    assert costs[0]["seconds"] == costs[2]["seconds"] < costs[3]["seconds"]
    for other in (replace(full, experts=8, top_k=2), replace(full, width=64)):
        with pytest.raises(OptionError, match="aren't streamed"):
            conversion_cost(DENSE, other, disk=1e9, constant=1e8, stream=True)


@pytest.mark.parametrize("wrong", [{"ffn": "wide"}, {"block": "bert"}, {"top_k": 1}, {"experts": 8},
                                   {"experts": 2, "top_k": 3}], ids=str)  # fmt: skip
def test_shapes_that_cannot_be_are_refused(wrong):
    with pytest.raises(OptionError):
        replace(GATED, **wrong)


@pytest.mark.parametrize("title", scale.TABLES)
def test_the_page_says_what_the_recipe_prints(title, capsys):
    page = (Path(scale.__file__).parents[1] / "SCALE.md").read_text(encoding="utf-8")
    table = scale.markdown(scale.TABLES[title]())
    assert f"**{title}**\n\n{table}\n" in page
    show()
    assert table in capsys.readouterr().out
