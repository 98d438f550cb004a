"""The one rule for padding, situation by situation: what a raw hook sees, cut by the mask that is known to be right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from comparing import assert_same
from pico import FAMILIES, HIDDEN, WIDTH, make_native
from seen import IDS, LEFT, MASKS, OTHER, RIGHT, TARGETS, B, T, raw, recorded
from torch import Tensor

import hf_glu
from hf_glu.bench.coverage import tiny
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.sites import find_banks, find_sites
from hf_glu.instruments.expert_tokens import routed_inputs
from hf_glu.instruments.recorder import Kept, Watch, watching


def check(model: Any, valid: Tensor, *, stack: str | None = None, **inputs: Any) -> None:
    """Assert that each FFN's recorded input is the raw one where ``valid``, which leaves something out."""
    sites = [site for site in find_sites(model) if stack is None or site.stack == stack]
    assert sites
    for site in sites:
        (x,) = raw(model, site.in_proj, **inputs)
        expected = x.reshape(-1, x.shape[-1])[valid.reshape(-1).bool()]
        assert_same(recorded(model, site.in_proj, **inputs), expected, "bitwise")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama", "modernbert"])  # OPT's tokens are in one row
def test_padding_on_either_side(family, side):
    model = FAMILIES[family].make() if family in FAMILIES else make_native(family)
    check(model, MASKS[side], input_ids=IDS, attention_mask=MASKS[side])
    check(model, torch.ones_like(IDS), input_ids=IDS)


def test_the_check_can_fail():
    with pytest.raises(AssertionError):
        check(FAMILIES["bert"].make(), LEFT, input_ids=IDS, attention_mask=RIGHT)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_and_decoder_each_have_their_own_masks(family):
    model = FAMILIES[family].make()
    inputs = {"input_ids": IDS, "attention_mask": LEFT, "decoder_input_ids": TARGETS, "decoder_attention_mask": OTHER}
    check(model, LEFT, stack="encoder", **inputs)
    check(model, OTHER, stack="decoder", **inputs)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ({"labels": TARGETS.masked_fill(OTHER == 0, -100)}, OTHER),
        ({"labels": TARGETS.masked_fill(OTHER == 0, -100), "decoder_input_ids": TARGETS}, OTHER),
        ({"labels": TARGETS}, torch.ones_like(OTHER)),
        ({"decoder_input_ids": TARGETS}, torch.ones_like(OTHER)),
        ({"decoder_input_ids": IDS.flip(0)}, torch.ones_like(RIGHT)),  # of the encoder's size, but another text
        ({"decoder_input_ids": IDS.clone()}, RIGHT),
    ],
)
def test_a_decoder_without_a_mask(family, given, valid):
    model = FAMILIES[family].make()
    check(model, valid, stack="decoder", input_ids=IDS, attention_mask=RIGHT, **given)
    check(model, RIGHT, stack="encoder", input_ids=IDS, attention_mask=RIGHT, **given)


def test_a_decoder_that_reads_the_encoders_ids_by_itself():
    model = FAMILIES["bart"].make("BartModel")
    check(model, RIGHT, stack="decoder", input_ids=IDS, attention_mask=RIGHT)


def test_labels_tell_nothing_of_a_model_without_an_encoder():
    labels = IDS.masked_fill(RIGHT == 0, -100)  # a prompt that isn't learned is read all the same
    check(FAMILIES["gpt2"].make(), torch.ones_like(IDS), input_ids=IDS, labels=labels)


def test_texts_that_are_packed_by_their_positions_have_no_padding():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(B, -1)
    check(make_native("llama"), torch.ones_like(IDS), input_ids=IDS, position_ids=positions)


def test_texts_that_are_packed_by_a_mask_of_pairs_of_tokens():
    text = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0, 0], [1] * 9, [0, 1, 1, 1, 2, 2, 2, 2, 0]])
    pairs = (text.unsqueeze(1) == text.unsqueeze(2)) & (text.unsqueeze(1) > 0) & torch.ones(T, T).tril().bool()
    additive = torch.zeros(B, 1, T, T).masked_fill(~pairs.unsqueeze(1), torch.finfo(torch.float32).min)
    for mask in (pairs.unsqueeze(1), additive):
        check(make_native("llama"), text > 0, input_ids=IDS, attention_mask=mask)


def test_several_choices_a_text():
    model = FAMILIES["bert"].make("BertForMultipleChoice")
    ids, mask = IDS.view(1, B, T).repeat(2, 1, 1), torch.stack([RIGHT, LEFT])
    check(model, mask, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("batch", [2, 7])  # as many texts as tokens: their shape can't tell them apart
def test_texts_that_a_family_transposes(batch):
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=64, d_model=HIDDEN, n_layer=2, n_head=2, d_inner=WIDTH)
    model = transformers.XLNetModel(config).eval()
    ids = torch.randint(5, 60, (batch, 7))
    mask = (torch.arange(7) < torch.arange(1, batch + 1).unsqueeze(1)).long()
    check(model, mask.T, input_ids=ids, attention_mask=mask)


def test_padding_that_a_family_adds_by_itself():
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=WIDTH,
        attention_window=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LongformerModel(config).eval()
    added = torch.cat([RIGHT, torch.zeros(B, 16 - T, dtype=torch.long)], 1)
    check(model, added, input_ids=IDS, attention_mask=RIGHT)
    check(model, torch.ones_like(IDS).new_tensor([[1] * 9 + [0] * 7] * B), input_ids=IDS)


@pytest.mark.parametrize("kind", ["reformer", "prophetnet", "fnet"])
def test_families_with_ways_of_their_own(kind):
    model = tiny.tiny_model(kind)
    ids = tiny.tiny_inputs(model)["input_ids"][:1].repeat(B, 1)
    valid = (torch.arange(ids.shape[1]) < torch.tensor([[ids.shape[1]], [4], [1]])).long()
    if kind == "fnet":  # whose layers are told of no mask
        return check(model, valid, input_ids=ids, attention_mask=valid)
    if kind == "reformer":
        added = torch.cat([valid, torch.zeros(B, 16 - ids.shape[1], dtype=torch.long)], 1)
        return check(model, added, input_ids=ids, attention_mask=valid)
    # which reads its text once, and predicts it twice
    return check(model, valid.repeat(1, 3), input_ids=ids, attention_mask=valid)


@pytest.mark.parametrize("experts", [None, "relu*2,gelu*2"])
def test_ffns_that_are_given_their_text_in_chunks(experts):
    model = FAMILIES["bert"].make()
    if experts:
        hf_glu.convert(model, "geglu", experts=experts, check=False)
    found = list(find_experts(model).values()) if experts else [site.in_proj for site in find_sites(model)]
    inputs = {"input_ids": IDS, "attention_mask": RIGHT}
    whole = [recorded(model, module, **inputs) for module in found]
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 3
    for module, expected in zip(found, whole, strict=True):
        assert len(raw(model, module, **inputs)) == 3
        chunks = recorded(model, module, **inputs)
        order = [(b, t) for begin in (0, 3, 6) for b in range(B) for t in range(begin, begin + 3) if RIGHT[b, t]]
        places = {place: row for row, place in enumerate((b, t) for b in range(B) for t in range(T) if RIGHT[b, t])}
        assert_same(chunks, expected[[places[place] for place in order]], "exact up to rounding")


def test_tokens_after_a_cache():
    model = make_native("llama")
    module = find_sites(model)[1].in_proj
    positions = (LEFT.cumsum(1) - 1).clamp_min(0)
    whole = raw(model, module, input_ids=IDS, attention_mask=LEFT, position_ids=positions)[0]
    kept, cache = Kept(1000), None
    with torch.no_grad(), watching(model, [Watch(module=module, see=kept.see)]):
        for begin, end in ((0, 4), (4, 8), (8, 9)):
            part = {"input_ids": IDS[:, begin:end], "position_ids": positions[:, begin:end]}
            cache = model(**part, attention_mask=LEFT[:, :end], past_key_values=cache, use_cache=True).past_key_values
    parts = [whole[:, begin:end][LEFT[:, begin:end].bool()] for begin, end in ((0, 4), (4, 8), (8, 9))]
    assert_same(kept.tensor(), torch.cat(parts), "exact up to rounding")


@pytest.mark.parametrize("name", ["ours", "native"])
def test_experts_tokens(name):
    model = FAMILIES["gpt2"].make() if name == "ours" else make_native("mixtral", num_local_experts=4)
    if name == "ours":
        hf_glu.convert(model, "geglu_new", experts="relu*2,gelu*2", check=False)
        layers = list(find_experts(model).values())
    else:
        layers = [bank.anchor for bank in find_banks(model)]
    for layer in layers:
        batches = [{"input_ids": IDS, "attention_mask": mask} for mask in (RIGHT, LEFT, None)]
        x, experts = routed_inputs(model, layer, batches, limit=1000)
        given = [raw(model, layer, **batch)[0].reshape(-1, HIDDEN) for batch in batches]
        masks = [RIGHT, LEFT, torch.ones_like(RIGHT)]
        expected = [rows[mask.reshape(-1).bool()] for rows, mask in zip(given, masks, strict=True)]
        assert_same(x, torch.cat(expected), "bitwise")
        assert experts.shape == (len(x), 2)
        assert_same(routed_inputs(model, layer, batches, limit=20)[0], x[:20], "bitwise")
        if name == "ours":
            assert_same(layer.router(x).experts, experts, "bitwise")
