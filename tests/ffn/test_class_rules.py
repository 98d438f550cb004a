"""What Transformers' classes say of parameters by name holds for the experts in their place."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from comparing import assert_same
from covering import covering
from pico import FAMILIES, VOCAB, make_native

import hf_glu
from hf_glu.compat.of_models import NO_SPLIT as NO_SPLIT_ROW
from hf_glu.errors import ConversionError
from hf_glu.ffn.class_rules import PATTERNS, TIES, carry_rules
from hf_glu.ffn.expert_sites import IN, OUT
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.families import SITE_TABLE

NO_SPLIT = NO_SPLIT_ROW.name

MODELS = Path(transformers.__file__).parent / "models"
WIDE = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
# their FFN gives float16 more than it holds
GATED = {"relu": ("reglu", "reglu*2,relu*2"), "gated-silu": ("swiglu", "swiglu*4")}


def make(family, projection):
    torch.manual_seed(0)
    config = getattr(transformers, f"{WIDE[family]}Config")(
        vocab_size=VOCAB, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj=projection, dropout_rate=0.0,
    )  # fmt: skip
    model = getattr(transformers, f"{WIDE[family]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "DenseReluDense" in name:
                parameter.mul_(4000 if "wo" in name else 40)
    return model


def encoded(model):
    with torch.no_grad():
        return model.encoder(torch.arange(12).reshape(2, 6) + 5).last_hidden_state.float()


@pytest.mark.parametrize(("projection", "family"), covering(GATED, WIDE))
def test_out_projections_that_stay_in_float32(family, projection, tmp_path):
    model, (target, experts) = make(family, projection), GATED[projection]
    model.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float16).eval()
    hf_glu.convert(model, target, experts=experts)
    model.save_pretrained(tmp_path / "experts")
    half = type(model).from_pretrained(tmp_path / "experts", dtype=torch.float16).eval()
    again = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float16).eval()
    hf_glu.convert(again, target, experts=experts, check=False)
    for each in (half, again):
        kept = {name for name, parameter in each.named_parameters() if parameter.dtype == torch.float32}
        assert kept == {name for name, _ in each.named_parameters() if re.search(OUT, name)}
        assert len(kept) >= 4
        assert_same(encoded(each), encoded(dense), "bf16")
    ids = torch.arange(12).reshape(2, 6) + 5
    half.train()(input_ids=ids, labels=ids).loss.backward()
    for ffn in find_experts(half).values():
        assert all(parameter.grad.dtype == parameter.dtype for parameter in ffn.parameters())


def class_rules():
    """Yield (family, class, attribute, rules) as the installed Transformers' sources have them."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for each in ast.parse(text).body if any(name in text for name in (*PATTERNS, *TIES, NO_SPLIT)) else ():
            for line in each.body if isinstance(each, ast.ClassDef) else ():
                name = line.targets[0].id if isinstance(line, ast.Assign) and hasattr(line.targets[0], "id") else None
                if name in (*PATTERNS, *TIES, NO_SPLIT) and isinstance(line.value, (ast.List, ast.Dict, ast.Set)):
                    yield path.parent.name, each.name, name, ast.literal_eval(line.value)


PLACE = "model.layers.7.mlp"
OURS = {IN: ["banks.0.in_proj", "shared.0.in_bias"], OUT: ["banks.11.out_proj", "banks.0.out_bias"]}


@pytest.mark.slow
def test_every_classes_rules_are_carried_over():
    parts = {(path, IN) for row in SITE_TABLE for path in (row.gate, row.in_proj) if path}
    parts |= {(row.out_proj, OUT) for row in SITE_TABLE}
    found, unsplit = {}, 0
    for family, name, attribute, rules in class_rules():
        if attribute == NO_SPLIT:
            unsplit += 1
        for path, kind in parts:
            model, old = type(name, (), {attribute: rules})(), f"{PLACE}.{path}.weight"
            if attribute in TIES:
                if any(re.match(pattern, old) for pair in rules.items() for pattern in pair):
                    found.setdefault(attribute, set()).add(family)
                    with pytest.raises(ConversionError, match="ties"):
                        carry_rules(model, [old], PLACE, kind)
                continue
            carry_rules(model, [old], PLACE, kind)
            if attribute == NO_SPLIT:
                assert not rules or "ExpertFFN" in model._no_split_modules
                continue
            holds = any(re.search(rule, old) for rule in rules)
            if holds:
                found.setdefault(attribute, set()).add(family)
            for ours in (f"{PLACE}.{each}" for each in OURS[kind]):
                now = any(re.search(rule, ours) for rule in getattr(model, attribute))
                assert now == holds, (family, attribute, old, ours)
    assert unsplit > 300
    assert {"t5", "mt5", "umt5", "udop", "pop2piano"} <= found["_keep_in_fp32_modules"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_experts_are_replicated_and_stay_in_one_piece(family):
    model = make_native(family)
    planned = {name for name in model._tp_plan if "mlp" in name}
    assert planned
    hf_glu.convert(model, "swiglu", experts="swiglu*4")
    again = type(model)(model.config)
    assert {name for name in again._tp_plan if "mlp" in name} == set()
    assert set(again._tp_plan) == set(model._tp_plan) - planned
    sizes = {0: 20_000, 1: 20_000, 2: 20_000, "cpu": 10**6}
    plan = infer_auto_device_map(again, sizes, no_split_module_classes=sorted(again._no_split_modules))
    for name in find_experts(again):
        assert not [part for part in plan if part.startswith(f"{name}.")]


def test_a_rule_that_ties_an_ffn_refuses_experts(monkeypatch):
    model = FAMILIES["gpt2"].make()
    ties = {"transformer.h.1.mlp.c_fc.weight": "transformer.h.0.mlp.c_fc.weight"}
    monkeypatch.setattr(model, "all_tied_weights_keys", ties)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConversionError, match=r"ties transformer\.h\.0\.mlp\.c_fc"):
        hf_glu.convert(model, "geglu_new", experts="gelu_new*4")
    assert_same(dict(model.named_parameters()), before, "bitwise")
