"""What is counted while a model trains is what one would count by hand; the training is the same, bit by bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import versions
from comparing import assert_same
from covering import few
from pico import FAMILIES, make_native
from routed import made
from seen import IDS, LEFT, RIGHT, TARGETS
from torch import Tensor, nn

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_inputs, tiny_model
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.sites import find_banks, find_sites
from hf_glu.instruments.activity import activation_statistics, expert_loads
from hf_glu.instruments.while_training import TrainingStatistics

MASK = {"right": RIGHT, "left": LEFT}
PADDED = {"input_ids": IDS, "attention_mask": RIGHT}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def watched(model: Any, *batches: dict[str, Any]) -> Any:
    """Return what is watched in training passes without dropout."""
    statistics = TrainingStatistics(model.train())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with statistics.watching():
        for batch in batches:
            model(**batch)
    return statistics.take()


def entropy(logits: Tensor) -> float:
    return float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize(("family", "side"), [("gpt2", "right"), ("gpt2", "left"), ("t5", "right")])
def test_experts_of_ours_are_counted_as_on_validation_data(family, side):
    model = made(family)
    batches = [{"input_ids": ids, "attention_mask": MASK[side]} for ids in (IDS, IDS.flip(0))]
    if family == "t5":
        batches = [{**batch, "labels": TARGETS.masked_fill(TARGETS > 40, -100)} for batch in batches]
    rows, expected = watched(model, *batches)["experts"], expert_loads(model, batches)
    assert [row["site"] for row in rows] == [row["site"] for row in expected] == list(find_experts(model))
    for row, other in zip(rows, expected, strict=True):
        assert (row["tokens"], row["load"], row["stack"]) == (other["tokens"], other["load"], other["stack"])
        assert row["router_entropy"] == pytest.approx(other["entropy"], rel=1e-5)
        uneven = -sum(share * math.log(share) for share in row["load"] if share) / math.log(4)
        assert row["load_entropy"] == pytest.approx(uneven)
        assert row["dead"] == [n for n, share in enumerate(row["load"]) if share == 0]


# families whose routers return their logits first
NATIVE = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe")


@pytest.mark.parametrize("family", NATIVE)
def test_a_familys_own_banks_are_counted(family):
    model = tiny_model(family).train()
    inputs = tiny_inputs(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    given, scored = [], []
    for bank in find_banks(model):
        bank.anchor.register_forward_pre_hook(lambda _, args: given.append(args[1]))
        block = model.get_submodule(bank.name.rpartition(".")[0])
        router = next(part for name, part in block.named_children() if name in ("gate", "router"))
        router.register_forward_hook(lambda _, args, out: scored.append(out[0].detach()))
    found = watched(model, {**inputs, "attention_mask": mask})
    assert len(found["experts"]) == len(given) == len(find_banks(model)) >= 1
    kept = mask.flatten().bool()
    if len(scored[0]) != len(kept):
        pytest.skip("this Transformers' router gives its choice first")
    for row, experts, logits in zip(found["experts"], given, scored, strict=True):
        count = torch.bincount(experts[kept].flatten(), minlength=logits.shape[-1])
        assert row["tokens"] == int(mask.sum())
        assert row["load"] == (count / count.sum(dtype=torch.float64)).tolist()
        versions.needs_router_logits(row["router_entropy"])
        assert row["router_entropy"] == pytest.approx(entropy(logits[kept].float()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5_v1_1", "gpt2", "bert", "opt"])
def test_dead_gates_are_those_on_data(family):
    more = {"dropout": 0} if family == "opt" else {}
    model = FAMILIES[family].make(**more) if family in FAMILIES else make_native(family)
    sites = find_sites(model)
    with torch.no_grad():  # a gate that never opens: its unit is 0 for all tokens
        for site in sites:
            site.out_proj(torch.zeros(1, site.width))  # it can be run by itself
        first = model.get_submodule(sites[0].parts[0])
        rows = first.weight if first.weight.shape[-1] == sites[0].hidden else first.weight.T
        rows[:3] = 0
        if first.bias is not None:
            first.bias[:3] = 0
    inputs = {**PADDED, "labels": TARGETS} if model.config.is_encoder_decoder else PADDED
    found = watched(model, inputs, {**inputs, "input_ids": IDS.flip(1)})["gates"]
    expected = activation_statistics(model, [inputs, {**inputs, "input_ids": IDS.flip(1)}])
    assert {row["site"]: row["dead"] for row in found} == {row["site"]: row["dead"] for row in expected}
    assert found[0]["dead"] >= 3 / found[0]["units"]
    assert found[0]["tokens"] == 2 * int(RIGHT.sum())


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_only_training_counts_and_what_is_computed_again_does_not(reentrant):
    model = made("gpt2")
    plain = watched(model, PADDED, PADDED)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    statistics = TrainingStatistics(model)
    with statistics.watching():
        for _ in range(2):
            model.zero_grad()
            model(**PADDED, labels=IDS, use_cache=False).loss.backward()
        with torch.no_grad():
            model.eval()(**PADDED)
        statistics.counting = False
        model.train()(**PADDED, use_cache=False)
    assert statistics.take() == plain
    assert statistics.take() == {"experts": [], "gates": []}, "it begins anew"


def stepped(model: Any, *, watch: bool, precision: str) -> tuple[dict[str, Tensor], int]:
    """Return weights and gradients after three steps with dropout, and the number of hooks that stay."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    statistics = TrainingStatistics(model)
    before = hooks(model)
    more = {"labels": TARGETS} if model.config.is_encoder_decoder else {"labels": IDS}
    with statistics.watching() if watch else torch.enable_grad():
        for mask in (RIGHT, LEFT, torch.ones_like(RIGHT)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(input_ids=IDS, attention_mask=mask, **more).loss
            loss.backward()
            optimizer.step()
    if watch:
        assert any(statistics.take().values())
    state = dict(model.state_dict())
    return state | {f"{n} gradient": p.grad for n, p in model.named_parameters() if p.grad is not None}, (
        hooks(model) - before
    )


def saving() -> Any:
    model = make_native("llama")
    hf_glu.convert(model, "moa_swiglu", check=False)
    hf_glu.save_memory(model)
    return model


def checkpointed(reentrant: bool) -> Any:
    model = FAMILIES["gpt2"].make("GPT2LMHeadModel")
    hf_glu.convert(model, "stateful_geglu_new", experts=3, check=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


MODELS = {
    "ours": lambda: made("llama", balance=0.1),
    "ours in an encoder-decoder": lambda: made("t5", balance=0.1),
    "a family's own": lambda: make_native("mixtral", num_local_experts=4),
    "mixed": lambda: (model := make_native("mixtral"), hf_glu.convert(model, experts="silu,relu"))[0],
    "dense": lambda: FAMILIES["gpt2"].make("GPT2LMHeadModel"),
    "less memory": saving,
    "checkpointing": lambda: checkpointed(False),
    "checkpointing with reentry": lambda: checkpointed(True),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    few([*((name, "no") for name in MODELS), ("ours", "bf16"), ("dense", "bf16")], 3, tuples=True),
)
def test_training_is_the_same_bit_by_bit(name, precision):
    plain, _ = stepped(MODELS[name](), watch=False, precision=precision)
    with_watch, more = stepped(MODELS[name](), watch=True, precision=precision)
    assert_same(with_watch, plain, "bitwise")
    assert more == 0


def test_hooks_are_gone_after_an_exception():
    model = made("gpt2")
    before, statistics = hooks(model), TrainingStatistics(model)
    with pytest.raises(ZeroDivisionError), statistics.watching():
        assert hooks(model) > before
        raise ZeroDivisionError
    assert hooks(model) == before


def test_what_can_not_be_watched():
    with pytest.raises(NoSiteError, match="Linear has neither"):
        TrainingStatistics(nn.Linear(2, 2))
    model = make_native("mixtral")
    find_banks(model)[0].anchor._is_expert_parallel = True
    with pytest.raises(OptionError, match="spread over several processes"):
        TrainingStatistics(model)
    model = make_native("llama")
    model._tp_size = 2
    with pytest.raises(OptionError, match="spread over several processes"):
        TrainingStatistics(model)
