"""Stateful activations: exact at first, alive, causal, blind to padding, the same with and without a cache."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import versions
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, NATIVE, make_native
from states import CLOSE, GENERATE, awake, ids, logits, memories, one_by_one, target_of, without_dropout
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, StaticCache

import hf_glu
from hf_glu.activation.context.states import ROLLBACK
from hf_glu.errors import ConversionError, OptionError, TrainingError, UnknownNameError

DECODERS = ("gpt2", "llama", "opt", "gpt_neox")
EXPERTS = ("gpt2+experts", "llama+experts")
NATIVE_NAMES = [name for name in NATIVE if name != "mixtral"]


def test_names_options_and_loading_of_a_dense_checkpoint(tmp_path):
    dense = FAMILIES["bert"].make()
    dense.save_pretrained(tmp_path)
    options = {"direction": "both", "decay": [0.1, 0.2], "alpha": 0.5, "learnable": False}
    model = type(dense).from_pretrained(tmp_path, hidden_act="stateful_geglu", hf_glu={"state": options})
    memory = memories(model)[0]
    assert_same(memory.alpha.detach(), torch.full_like(memory.alpha, 0.5), "bitwise")
    assert not list(memory.parameters())
    decays = memory.decay.sigmoid()
    assert float(decays.min()) == pytest.approx(0.1, abs=1e-4)
    assert float(decays.max()) == pytest.approx(0.2, abs=1e-4)
    plain = type(dense).from_pretrained(tmp_path, hidden_act="stateful_geglu")
    assert_same(outputs(plain.eval()), outputs(dense), "exact up to rounding")
    for bad in ({"direction": "up"}, {"decay": [0.5, 1.0]}, {"decay": [0.9, 0.1]}, {"alfa": 1}, {"learnable": 3}):
        with pytest.raises((OptionError, UnknownNameError)):
            hf_glu.GluConfig(state=bad)
    with pytest.raises(OptionError, match="stateful_swiglu"):
        hf_glu.convert(FAMILIES["bert"].make(), "swiglu", state={"direction": "both"})


@pytest.mark.parametrize("target", ["stateful_gelu", "stateful_swiglu_oss", "stateful_learnable_swiglu"])
def test_dense_formula_and_learnable_names(target, tmp_path):
    model = FAMILIES["bert"].make()
    before = outputs(model)
    hf_glu.convert(model, target)
    tolerance = "gelu by sigmoid" if target.endswith("oss") else "exact up to rounding"
    assert_same(outputs(model), before, tolerance)
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")


def test_the_nearest_name_has_the_wrapper():
    with pytest.raises(UnknownNameError, match="did you mean 'stateful_swiglu'"):
        hf_glu.convert(FAMILIES["bert"].make(), "stateful_swigl")


def test_state_is_added_to_a_converted_model_and_taken_back():
    model = FAMILIES["gpt2"].make()
    before = outputs(model)
    hf_glu.convert(model, "geglu_new")
    assert hf_glu.convert(model, "stateful_geglu_new").plan.promise == "exact"
    assert_same(outputs(model), before, "exact up to rounding")
    trained = awake("llama")
    expected = outputs(trained)
    hf_glu.convert(trained, "modulated_stateful_swiglu")  # keeps what the state has learned
    assert_same(outputs(trained), expected, "exact")
    again = copy.deepcopy(model)
    hf_glu.convert(model, "modulated_stateful_geglu_new", check=False)
    hf_glu.revert(model)
    assert_same(outputs(model), before, "bitwise")
    assert model.state_dict().keys() == FAMILIES["gpt2"].make().state_dict().keys()  # nothing is left
    with torch.no_grad():
        memories(again)[0].alpha += 1
    with pytest.raises(ConversionError, match="can't be reverted"):
        hf_glu.revert(again)


@pytest.mark.parametrize("name", [*DECODERS, *EXPERTS, "t5", "bart"])
def test_causality_and_that_the_state_reaches_far(name):
    model, tokens = awake(name), ids(2, 12)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 7) % 50 + 5
    first, second = logits(model, tokens), logits(model, other)
    assert_same(second[:, :6], first[:, :6], "bitwise")
    assert (second[:, 7:] - first[:, 7:]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*DECODERS, *EXPERTS, "t5", "bert", "modernbert", "bert+experts"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_padding_changes_nothing_and_rows_are_independent(name, direction):
    if direction == "both" and "bert" not in name:
        pytest.skip("decoders are causal")
    model, tokens = awake(name, state={"direction": direction}), ids(3, 9)
    alone = logits(model, tokens)
    assert_same(logits(model, tokens[1:2]) if name != "t5" else alone[1:2], alone[1:2], "exact up to rounding")
    right = torch.cat([tokens, ids(3, 4, seed=5)], 1)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 3)
    torch.testing.assert_close(logits(model, right, attention_mask=mask)[:, :9], alone, **CLOSE)
    if name in (*DECODERS, *EXPERTS):
        left = torch.cat([ids(3, 4, seed=5), tokens], 1)
        mask = mask.flip(1)
        positions = {} if name == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        found = logits(model, left, attention_mask=mask, **positions)[:, 4:]
        torch.testing.assert_close(found, alone, **CLOSE)


def test_the_padding_test_can_fail(monkeypatch):
    model, tokens = awake("gpt2"), ids(3, 9)
    monkeypatch.setattr("hf_glu.activation.context.hooks.read", lambda inputs, seen: None)
    left, mask = torch.cat([ids(3, 4, seed=5), tokens], 1), torch.tensor([[0] * 4 + [1] * 9] * 3)
    found = logits(model, left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))[:, 4:]
    assert (found - logits(model, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "how"), covering([*DECODERS, *EXPERTS, "t5"], GENERATE))
def test_generation_is_the_same_without_cache(name, how):
    if how == "static" and name == "opt":
        pytest.skip("OPT has no static cache")
    model = awake(name)
    rows = 1 if how == "lookup" else 2
    prompt = ids(rows, 5).repeat(1, 2)  # repeats itself, so that looking up finds something
    shared = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    plain = {key: value for key, value in GENERATE[how].items() if how not in ("static", "lookup")}
    torch.manual_seed(0)
    with_cache = versions.generate(model, prompt, **shared, **GENERATE[how])
    torch.manual_seed(0)
    without = model.generate(prompt, **shared, **plain, use_cache=False)
    assert_same(with_cache, without, "bitwise")


@pytest.mark.parametrize("name", [*DECODERS, "llama+experts"])
def test_prompts_of_different_lengths_and_interleaved_generations(name):
    model, prompts = awake(name), [ids(1, 4, seed=2), ids(1, 9, seed=3)]
    more = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    alone = [model.generate(prompt, **more)[:, prompt.shape[1] :] for prompt in prompts]
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), prompts[0]], 1), prompts[1]])
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    assert_same(model.generate(padded, attention_mask=mask, **more)[:, 9:], torch.cat(alone), "bitwise")
    caches, tokens, found = [None, None], list(prompts), [[], []]
    for _ in range(8):
        for k in (0, 1):
            with torch.no_grad():
                out = model(tokens[k], past_key_values=caches[k], use_cache=True)
            caches[k], tokens[k] = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found[k].append(tokens[k])
    for k in (0, 1):
        assert_same(torch.cat(found[k], 1), alone[k], "bitwise")


@pytest.mark.parametrize("name", ["llama", "llama+experts"])
def test_assisted_generation_and_what_cant_be_taken_back(name):
    model, draft = awake(name), awake(name, seed=2)
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    assisted = model.generate(ids(1, 6), assistant_model=draft, **more)
    assert_same(assisted, model.generate(ids(1, 6), **more), "bitwise")
    tokens = ids(1, ROLLBACK + 20)
    whole = logits(model, tokens)
    cache = model(tokens, use_cache=True).past_key_values
    cache.crop(-ROLLBACK)
    with torch.no_grad():
        again = model(tokens[:, -ROLLBACK:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[:, -ROLLBACK:], **CLOSE)
    with pytest.raises(OptionError, match="taken back"):
        cache.crop(-ROLLBACK - 1)
    versions.needs_working_reset()
    cache.reset()
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits.detach(), whole, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("learnable", [True, False])
def test_many_tokens_one_by_one(dtype, learnable, monkeypatch):
    monkeypatch.setattr("hf_glu.activation.context.states.ROLLBACK", 4)  # states are moved many times
    model = awake("llama", state={"learnable": learnable}).to(dtype)
    tokens = ids(2, 40)
    close = {"rtol": 0.1, "atol": 0.5} if dtype == torch.bfloat16 else CLOSE
    found, cache = one_by_one(model, tokens[:, :30], None)
    torch.testing.assert_close(found, logits(model, tokens)[:, :30], **close)
    copied = copy.deepcopy(cache)
    cache.crop(-4)
    changed = (tokens + 1)[:, 26:]  # another end, from where the states still are
    again, _ = one_by_one(model, changed, cache)
    torch.testing.assert_close(again, logits(model, torch.cat([tokens[:, :26], changed], 1))[:, 26:], **close)
    rest, _ = one_by_one(model, tokens[:, 30:], copied)
    torch.testing.assert_close(rest, logits(model, tokens)[:, 30:], **close)


def test_changed_parameters_count_from_the_next_token_on():
    model, tokens = awake("llama"), ids(1, 12)
    one_by_one(model, tokens, None)
    for change in (lambda t: t.mul_(-2), lambda t: t.set_(t.clone() + 1)):
        with torch.no_grad():
            for memory in memories(model):
                for tensor in memory.parameters():
                    change(tensor)
        found, _ = one_by_one(model, tokens, None)
        torch.testing.assert_close(found, logits(model, tokens), **CLOSE)


def test_a_static_cache_by_hand():
    model, tokens = awake("gpt2"), ids(2, 10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in tokens.split((4, 5, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", *EXPERTS])
def test_packed_sequences_begin_with_no_state(name):
    model, tokens = awake(name, layers=[0]), ids(1, 11)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in tokens.split((4, 7), 1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "llama+experts"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_two_batches_in_flight(name, reentrant):
    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for seed, length in ((0, 8), (1, 6)):
            tokens, mask = ids(2, length, seed=seed), torch.ones(2, length, dtype=torch.long)
            mask[0, :3] = 0
            more = {"decoder_input_ids": tokens, "decoder_attention_mask": mask} if name == "t5" else {}
            out = model(input_ids=tokens, attention_mask=mask, **more)
            losses.append(out.logits.float().square().mean())
        sum(losses).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model = without_dropout(awake(name))
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model), expected, "trained")


def test_another_checkpointing_is_an_error():
    from torch.utils.checkpoint import checkpoint

    model = awake("gpt2").train()
    block = model.transformer.h[0]
    plain = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
    loss = model(ids(1, 5), use_cache=False).logits.sum()
    with pytest.raises(TrainingError, match="gradient_checkpointing_enable"):
        loss.backward()


def test_copies_and_pickles_and_half_precision(tmp_path):
    model, tokens = awake("llama"), ids(2, 9)
    model.generate(tokens, max_new_tokens=2, pad_token_id=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(logits(other, tokens), logits(model, tokens), "bitwise")
        with torch.no_grad():
            memories(other)[0].alpha += 1
        assert (logits(other, tokens) - logits(model, tokens)).abs().max() > 0
    assert all(memory.current() is None and memory.cache() is None for memory in memories(model))
    half = copy.deepcopy(model).bfloat16()
    assert torch.isfinite(logits(half, tokens)).all()


def test_both_directions_dont_generate_and_banks_have_no_state():
    with pytest.raises(OptionError, match="direction=forward"):
        awake("gpt2", state={"direction": "both"})
    with pytest.raises(ConversionError, match="no sequences"):
        hf_glu.convert(make_native("mixtral"), "stateful_swiglu")


@pytest.mark.slow
def test_compiled_decoding():
    model, prompt = awake("llama"), ids(1, 6)
    more = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    expected = model.generate(prompt, **more)
    compiling = CompileConfig(fullgraph=True, backend="inductor", mode="default")
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = model.generate(prompt, **more, cache_implementation="static", compile_config=compiling)
    assert counters["stats"]["unique_graphs"] > 0, counters
    assert_same(found, expected, "bitwise")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("prefix", ["stateful_", "modulated_stateful_"])
def test_compiled_training_is_one_graph(name, prefix):
    model = awake(name)
    if prefix != "stateful_":
        hf_glu.convert(model, prefix + target_of(name).removeprefix("stateful_"), check=False)
    without_dropout(model)
    tokens, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0

    def gradients(run: Any) -> dict[str, Tensor]:
        model.zero_grad()
        run(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    torch._dynamo.reset()
    assert_same(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, "trained")


def test_continuous_batching_is_refused():
    model = awake("gpt2")
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # else all the free memory
    found = model.generate_batch([[5, 6, 7], [8, 9]], config, small, progress_bar=False)
    if not found:
        pytest.skip("this Transformers' continuous batching ends where a request fails")
    assert len(found) == 2
    assert all("paged cache" in each.error for each in found.values())
