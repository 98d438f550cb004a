"""Models of several stacks: which one an FFN is in, and what a config says of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    LxmertConfig,
    LxmertModel,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
)

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.ffn.sparse_linear import SparseLinear

TOKENS = torch.arange(800).view(40, 20) % 55 + 5
BATCH = {"input_ids": TOKENS[:2], "decoder_input_ids": TOKENS[2:4]}


def _joined(decoder: str) -> Any:
    """Return a BERT that reads beside a decoder that writes, each with a config of its own."""
    family = FAMILIES[decoder]
    more = {"is_decoder": True, "add_cross_attention": True}
    made = family.make("BertLMHeadModel" if decoder == "bert" else "GPT2LMHeadModel", **more)
    assert isinstance(made, (BertLMHeadModel, GPT2LMHeadModel))
    model = EncoderDecoderModel(encoder=FAMILIES["bert"].make("BertModel"), decoder=made)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.eval()


def _moonshine() -> Any:
    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2,
    )  # fmt: skip
    return MoonshineForConditionalGeneration(config).eval()


SOUND = {"input_values": torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)),
         "decoder_input_ids": torch.tensor([[5, 6, 7]])}  # fmt: skip


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_a_decoder_that_is_a_model_of_its_own_is_a_decoder(decoder):
    model = _joined(decoder)
    for stack in ("encoder", "decoder"):
        steps = hf_glu.plan(model, FAMILIES["bert"].exact, layers=stack).steps
        assert len(steps) == 2
        assert all(step.site.name.startswith(stack) for step in steps)


def test_a_text_decoder_is_a_decoder():
    steps = hf_glu.plan(tiny_model("seamless_m4t"), "reglu", layers="decoder").steps
    assert steps
    assert all(step.site.name.startswith("text_decoder") for step in steps)


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
@pytest.mark.parametrize("layers", [None, "decoder", [1]])
def test_sparse_ffns_of_each_stack_are_loaded(decoder, layers, tmp_path):
    model = _joined(decoder)
    hf_glu.sparsify(model, [{"input_ids": TOKENS, "decoder_input_ids": TOKENS}], keep=0.5, layers=layers)
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    assert_same(outputs(loaded, **BATCH), outputs(model, **BATCH), "bitwise")
    count, again = (sum(isinstance(part, SparseLinear) for part in each.modules()) for each in (model, loaded))
    assert count == again == (8 if layers is None else 4)


def test_a_sparse_encoder_is_loaded_without_its_decoder(tmp_path):
    model = FAMILIES["t5"].make()
    hf_glu.sparsify(model, [{"input_ids": TOKENS, "decoder_input_ids": TOKENS}], keep=0.5)
    model.save_pretrained(tmp_path)
    loaded = FAMILIES["t5"].make("T5EncoderModel").from_pretrained(tmp_path)
    whole = model.get_encoder()
    assert_same(outputs(loaded, input_ids=TOKENS[:2]), outputs(whole, input_ids=TOKENS[:2]), "bitwise")


@pytest.mark.parametrize("change", ["freeze", "revert", "experts"])
def test_a_family_with_a_field_for_each_stack(change, tmp_path):
    model = _moonshine()
    before = outputs(model, **SOUND)
    if change == "experts":
        hf_glu.convert(model, "geglu", experts=4, inputs=SOUND)
    elif change == "revert":
        hf_glu.convert(model, "stateful_geglu", inputs=SOUND)
        hf_glu.revert(model)
    else:
        hf_glu.convert(model, "learnable_geglu", inputs=SOUND)
        hf_glu.anneal(model, 1.0)
        hf_glu.freeze_mix(model)
    after = outputs(model, **SOUND)
    if change == "revert":
        assert_same(after, before, "bitwise")
        assert (model.config.encoder_hidden_act, model.config.decoder_hidden_act) == ("gelu", "silu")
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path), **SOUND), after, "bitwise")


def test_a_bert_of_its_own_is_an_encoder():
    model = BertModel(BertConfig(**FAMILIES["bert"].arguments, vocab_size=61))
    assert len(hf_glu.plan(model, "geglu", layers="encoder").steps) == 2


def test_both_ffns_of_a_layer_that_reads_two_inputs(tmp_path):
    config = LxmertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_attention_heads=2, l_layers=1, r_layers=1, x_layers=1,
        visual_feat_dim=8,
    )  # fmt: skip
    model = LxmertModel(config).eval()
    pictures = {"visual_feats": torch.randn(2, 4, 8), "visual_pos": torch.randn(2, 4, 4)}
    report = hf_glu.convert(model, "geglu", inputs={"input_ids": TOKENS[:2], **pictures})
    assert len(report.sites) == 4
    assert report.max_abs_difference == 0
    model.save_pretrained(tmp_path)
    read = {"input_ids": TOKENS[:2], **pictures}
    assert_same(outputs(LxmertModel.from_pretrained(tmp_path), **read), outputs(model, **read), "bitwise")


@pytest.mark.parametrize("text", [False, True])
def test_a_query_former_has_an_ffn_for_queries(text, tmp_path):
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        encoder_hidden_size=32, use_qformer_text_input=text,
    )  # fmt: skip
    model = Blip2QFormerModel(config).eval()
    queries = {"query_embeds": torch.randn(1, 3, 32), "encoder_hidden_states": torch.randn(1, 5, 32)}
    report = hf_glu.convert(model, "geglu", inputs=queries)
    assert len(report.sites) == (4 if text else 2)
    model.save_pretrained(tmp_path)
    assert_same(outputs(Blip2QFormerModel.from_pretrained(tmp_path), **queries), outputs(model, **queries), "bitwise")


@pytest.mark.parametrize(("stack", "target"), [("encoder", "geglu"), ("decoder", "geglu_new")])
def test_experts_in_one_of_two_joined_models(stack, target, tmp_path):
    model = _joined("gpt2")
    report = hf_glu.convert(model, target, experts=4, layers=stack, inputs=BATCH)
    assert report.plan.promise == "exact"
    assert all(step.site.name.startswith(stack) for step in report.plan.steps)
    model.save_pretrained(tmp_path)
    assert_same(outputs(EncoderDecoderModel.from_pretrained(tmp_path), **BATCH), outputs(model, **BATCH), "bitwise")
