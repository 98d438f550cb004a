"""A modulation on a model: what it computes, for which tokens, in threads and in generation, and that it goes again."""

from __future__ import annotations

import copy
import pickle
import threading

import peft
import pytest
import steered
import torch
import transformers
from comparing import assert_same
from states import CLOSE, GENERATE, without_dropout
from torch.nn import functional
from versions import generate

import hf_glu
from hf_glu.errors import ConversionError, OptionError, TrainingError, UnknownNameError
from hf_glu.ffn.sites import find_sites
from hf_glu.instruments.pre_activations import gate_rows

LENGTH = {"max_new_tokens": 6, "pad_token_id": 0}
NAMES = ("bert", "gpt2", "t5", "opt", "llama", "phi3")


def inputs(model, seed=0, rows=3, length=7, **more):
    tokens = steered.ids(rows, length, seed=seed)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, **decoder, **more}


def logits(model, **given):
    with torch.no_grad():
        return model(**(given or inputs(model))).logits


def hooks(model):
    return [
        (type(module), len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for module in model.modules()
    ]


def test_it_is_slope_times_gate_minus_threshold():
    model = steered.make("llama")
    made, site = steered.fit(model, slopes=True), find_sites(model)[0]
    x = torch.randn(1, 4, site.hidden)
    gate = gate_rows(site)[0](x)
    slope = (1.5 * made.log_slopes["layers.0"]).exp()
    expected = functional.silu((gate - 1.5 * made.thresholds["layers.0"]) * slope)
    with made.on(model, 1.5):
        assert_same(site.act(gate).detach(), expected.detach(), "exact")


@pytest.mark.parametrize("name", NAMES)
def test_strengths_by_sequence_and_nothing_left(name):
    model = steered.make(name)
    made, plain, before = steered.fit(model), logits(model), hooks(model)
    with made.on(model, 0.0):
        assert_same(logits(model), plain, "bitwise")
    with made.on(model, 1.5):
        strong = logits(model)
    with made.on(model, -1.0):
        weak = logits(model)
    with made.on(model, [1.5, 0.0, -1.0]):
        torch.testing.assert_close(logits(model), torch.stack([strong[0], plain[1], weak[2]]), **CLOSE)
    assert (strong - plain).abs().max() > 1e-3
    attached = made.attach(model, 1.5)
    assert_same(logits(model), strong, "bitwise")
    attached.detach()
    attached.detach()
    assert_same(logits(model), plain, "bitwise")
    with pytest.raises(ZeroDivisionError), made.on(model):
        raise ZeroDivisionError
    assert hooks(model) == before


def test_algebra_is_exact():
    model = steered.make("gpt2")
    a, b = steered.fit(model, slopes=True), steered.fit(model, layers=[1], method="probe")
    made = 0.8 * a - b
    for name, threshold in a.thresholds.items():
        expected = 0.8 * threshold - b.thresholds[name] if name in b.thresholds else 0.8 * threshold
        assert torch.equal(made.thresholds[name], expected)
        assert torch.equal(made.log_slopes[name], 0.8 * a.log_slopes[name])
    assert torch.equal((a / 2 + a / 2).thresholds["layers.0"], a.thresholds["layers.0"])
    with made.on(model, 2.0):
        one = logits(model)
    with (2 * made).on(model):
        torch.testing.assert_close(logits(model), one, **CLOSE)
    assert type(made) is hf_glu.GateModulation
    assert made.detector is None
    assert (0.8 * a + a).detector is a.detector
    assert torch.equal(sum([a, b]).thresholds["layers.0"], a.thresholds["layers.0"])
    assert torch.equal((a * torch.tensor(0.5)).thresholds["layers.0"], (a / 2).thresholds["layers.0"])
    for wrong in (lambda: a / 0, lambda: a / float("nan"), lambda: a * float("nan"), lambda: 1e300 * a):
        with pytest.raises(OptionError, match="finite"):
            wrong()
    with pytest.raises(OptionError, match="different models"):
        a + steered.fit(steered.make("gpt2", seed=1))
    with pytest.raises(OptionError, match="detector"), made.on(model, when="positive"):
        pass


def test_another_model_is_refused():
    model, other = steered.make("gpt2"), steered.make("gpt2", seed=1)
    made = steered.fit(model)
    made.check(model.bfloat16())
    made.check(model.transformer)  # another head
    for odd, says in ((other, "other weights"), (steered.make("opt"), "no gate"), (steered.make("t5"), "no gate")):
        with pytest.raises(OptionError, match=says), made.on(odd):
            pass
        assert not any(module._forward_pre_hooks for module in odd.modules())
    with made.on(other, check=False):
        pass


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_last_token_and_a_mask(name):
    model = steered.make(name)
    made = steered.fit(model)
    tokens = steered.ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    decoder = {"decoder_input_ids": tokens} if name == "t5" else {}
    given = {"input_ids": tokens, "attention_mask": mask, **decoder}
    plain = logits(model, **given)
    last = torch.zeros(2, 6, dtype=torch.bool)
    last[0, 3] = last[1, 5] = True
    with made.on(model, 2.0, tokens=last):
        expected = logits(model, **given)
    assert (expected - plain).abs().max() > 1e-3
    if name != "t5":  # whose decoder isn't told of padding
        with made.on(model, 2.0, tokens="last"):
            assert_same(logits(model, **given), expected, "bitwise")
    if name in ("gpt2", "llama"):
        assert_same(expected[1, :5], plain[1, :5], "exact up to rounding")  # causal: what came before is as it was
        assert (expected[1, 5] - plain[1, 5]).abs().max() > 1e-4
    if name == "t5":  # whose decoder reads another text than the mask's
        return
    with made.on(model, 2.0):
        everywhere = logits(model, **given)
    mask = torch.ones(2, 6, dtype=torch.bool)
    for written in (mask, mask.tolist(), mask.numpy()):
        with made.on(model, 2.0, tokens=written):
            torch.testing.assert_close(logits(model, **given), everywhere, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("how", "tokens"), [*((how, "generated") for how in GENERATE), ("greedy", "all"), ("beam", "all")]
)
def test_generation_is_the_same_without_cache(name, how, tokens):
    model = steered.make(name)
    made = steered.fit(model)
    prompt = steered.ids(1 if how == "lookup" else 2, 5).repeat(1, 2)
    shared = {"max_new_tokens": 8, "pad_token_id": 0}
    without = {key: value for key, value in GENERATE[how].items() if how not in ("static", "lookup")}
    strength = 9.0 if how == "lookup" else [9.0, -9.0]

    def generated(**more):
        torch.manual_seed(0)
        return generate(model, prompt, **shared, **more)

    plain = generated(**GENERATE[how])
    with made.on(model, strength, tokens=tokens):
        cached = generated(**GENERATE[how])
        assert_same(cached, generated(**without, use_cache=False), "bitwise")
    assert not torch.equal(cached, plain) or how == "lookup"
    assert_same(generated(**GENERATE[how]), plain, "bitwise")
    assert "generate" not in vars(model)


def test_generated_tokens_are_those_after_the_prompt():
    model = steered.make("llama")
    made, prompt = steered.fit(model), steered.ids(2, 6)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 6:] = True
    with made.on(model, 3.0, tokens="generated"):
        found = model.generate(
            prompt, max_new_tokens=6, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        with pytest.raises(OptionError, match="generate"):
            model(input_ids=prompt)
    with made.on(model, 3.0, tokens=mask):
        expected = logits(model, input_ids=found.sequences)[:, 5:-1]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, **CLOSE)


@pytest.mark.parametrize("cached", [True, False])
def test_a_mask_of_the_text_isnt_for_what_a_decoder_writes(cached):
    model = steered.make("t5")
    made, prompt = steered.fit(model), steered.ids(2, 6)
    more = {**LENGTH, "use_cache": cached, "output_logits": True, "return_dict_in_generate": True}
    with made.on(model, 3.0, tokens=torch.ones(2, 6, dtype=torch.bool)):
        found = model.generate(prompt, **more)
        read = model.get_encoder()(prompt)
    expected = model.generate(prompt, encoder_outputs=read, **more)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    with made.on(model, 3.0, tokens=torch.ones(2, 6, dtype=torch.bool)):  # a plain pass is that model, too
        again = logits(model, input_ids=prompt, decoder_input_ids=found.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(found.logits, 1), again, **CLOSE)
    assert (found.logits[0] - model.generate(prompt, **more).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding_and_beams_keep_strengths_with_their_texts(name):
    model = steered.make(name)
    made, tokens = steered.fit(model), steered.ids(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
    more = {**LENGTH, "num_beams": 3, "num_return_sequences": 2}
    with made.on(model, [3.0, -3.0]):
        both = model.generate(padded, attention_mask=mask, **more)[:, 9:]
    for row, strength in enumerate((3.0, -3.0)):
        with made.on(model, strength):
            alone = model.generate(tokens[row : row + 1], **more)[:, 6:]
        assert torch.equal(both[2 * row : 2 * row + 2], alone)


def test_a_pipeline_is_steered():
    model = steered.make("llama")
    made = steered.fit(model)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=steered.tokenizer(), device="cpu")
    ask = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    plain = pipe("the film was", **ask)
    with made.on(model, 3.0):
        assert pipe("the film was", **ask) != plain
    assert pipe("the film was", **ask) == plain


def test_only_where_the_detector_says_so():
    model = steered.make("llama")
    made, tokens = steered.fit(model), steered.ids(4, 9)
    plain = logits(model, input_ids=tokens)
    seen = []
    site = find_sites(model)[int(made.detector.place[-1])]
    handle = site.act.register_forward_pre_hook(lambda act, args: seen.append(args[0].detach()))
    logits(model, input_ids=tokens)
    handle.remove()
    said = made.detector.score(seen[0]) > 0
    assert 0 < said.sum() < said.numel()
    late = int(made.detector.place[-1])
    for when, mask in (("positive", said), ("negative", ~said)):
        with made.on(model, 2.0, when=when):
            found = logits(model, input_ids=tokens)
            cut = model(input_ids=tokens[:, :6], use_cache=True)
            rest = model(input_ids=tokens[:, 6:], past_key_values=cut.past_key_values).logits
            torch.testing.assert_close(torch.cat([cut.logits, rest], 1).detach(), found, **CLOSE)
        only = steered.fit(model, layers=list(range(late, 2)))
        with only.on(model, 2.0, tokens=mask):
            torch.testing.assert_close(found, logits(model, input_ids=tokens), **CLOSE)
        assert (found - plain).abs().max() > 1e-4


def test_threads_are_steered_each_by_itself():
    model = steered.make("gpt2")
    made, tokens, found = steered.fit(model), steered.ids(2, 6), {}
    strengths = (2.0, -2.0, None)
    alone = {}
    for strength in strengths[:2]:
        with made.on(model, strength):
            alone[strength] = logits(model, input_ids=tokens)
    alone[None] = logits(model, input_ids=tokens)
    ready, go = threading.Barrier(3), threading.Barrier(3)

    def work(strength):
        if strength is None:
            ready.wait()
            found[strength] = [logits(model, input_ids=tokens) for _ in range(20)]
            go.wait()
            return
        with made.on(model, strength):
            ready.wait()
            found[strength] = [logits(model, input_ids=tokens) for _ in range(20)]
            go.wait()

    threads = [threading.Thread(target=work, args=(strength,)) for strength in strengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for strength in strengths:
        for each in found[strength]:
            assert_same(each, alone[strength], "bitwise")
    assert_same(logits(model, input_ids=tokens), alone[None], "bitwise")


def test_a_model_that_runs_in_other_threads_only_is_told():
    model = steered.make("gpt2")
    made, plain, found = steered.fit(model), logits(model), []

    def elsewhere():
        thread = threading.Thread(target=lambda: found.append(logits(model)))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="attach"), made.on(model, 2.0):
        elsewhere()
    assert_same(found[0], plain, "bitwise")
    attached = made.attach(model, 2.0)
    elsewhere()
    attached.detach()
    assert (found[1] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("strength", [2.0, (2.0, -2.0, 1.0)])
def test_gradient_checkpointing(name, reentrant, strength):
    def gradients():
        model.zero_grad()
        with made.on(model, strength):
            model(**inputs(model)).logits.square().mean().backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    model = without_dropout(steered.make(name))
    made = steered.fit(model.eval())
    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(), expected, "trained")
    with made.on(model, strength):
        loss = model(**inputs(model)).logits.square().mean()
    with pytest.raises(TrainingError, match="inside of the block"):
        loss.backward()


def test_two_at_once_add_up_and_gates_are_recorded():
    model = steered.make("llama")
    made = steered.fit(model)
    with (2 * made).on(model, [1.0, 0.0, 1.0]):
        expected = logits(model)
    with made.on(model, [1.0, 0.0, 1.0]), hf_glu.record_gates(model), made.on(model, [1.0, 0.0, 1.0]):
        torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "Mamba"])
@pytest.mark.parametrize("how", ["on", "by hand"])
def test_gates_are_recorded_as_they_are_steered_whichever_block_is_the_outer(name, how):
    def steer():
        return made.on(model, 2.0) if how == "on" else hf_glu.modulation(model, threshold=1.0)

    model = steered.make(name)
    made = None if how == "by hand" else steered.fit(model)
    with hf_glu.record_gates(model) as plain:
        logits(model)
    with steer(), hf_glu.record_gates(model) as inner:
        logits(model)
    with hf_glu.record_gates(model) as outer, steer():
        logits(model)
    assert_same(outer.openness, inner.openness, "bitwise")
    assert (outer.openness - plain.openness).abs().max() > 1e-3


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_steered_model_are_as_it_is_without(again):
    model = steered.make("gpt2")
    made, plain, before = steered.fit(model), logits(model), hooks(model)
    attached = made.attach(model, 2.0)
    with hf_glu.record_gates(model):
        copied = again(model)
    assert hooks(copied) == before
    assert_same(logits(copied), plain, "bitwise")
    assert (logits(model) - plain).abs().max() > 1e-3
    attached.detach()
    assert hooks(model) == before
    with made.on(model, 2.0, tokens="generated"):
        copied = copy.deepcopy(model)
    prompt = steered.ids(1, 4)
    assert torch.equal(copied.generate(prompt, **LENGTH), model.generate(prompt, **LENGTH))
    assert copied.generate.__self__ is copied


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"strength": [1.0, 2.0]}, OptionError, "2 strengths for a batch of 3"),
        ({"strength": float("nan")}, OptionError, "finite"),
        ({"strength": "much"}, OptionError, "number"),
        ({"tokens": "latest"}, UnknownNameError, "last"),
        ({"tokens": torch.ones(3, 7)}, OptionError, "booleans"),
        ({"tokens": 3}, OptionError, "booleans"),
        ({"tokens": None}, OptionError, "booleans"),
        ({"tokens": [[True], [True, False]]}, OptionError, "booleans"),
        ({"tokens": torch.ones(2, 7, dtype=torch.bool)}, OptionError, "2 rows of the mask for a batch of 3"),
        ({"when": "sad"}, UnknownNameError, "negative"),
    ],
)
def test_bad_input_is_one_line(change, error, says):
    model = steered.make("gpt2")
    made = steered.fit(model)
    with pytest.raises(error, match=says), made.on(model, **change):
        logits(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_was_attached_for_inference_can_be_trained():
    model = steered.make("gpt2")
    attached = steered.fit(model, slopes=True).attach(model)
    with torch.inference_mode():
        model(**inputs(model))
    model(**inputs(model)).logits.sum().backward()
    attached.detach()


@pytest.mark.parametrize(("name", "target"), [("llama", ["gate_proj", "down_proj"]), ("gpt2", ["c_fc"])])
def test_projections_that_peft_has_wrapped_are_seen_through(name, target):
    model = steered.make(name)
    made, given = steered.fit(model), {"input_ids": steered.ids(2, 6)}
    with made.on(model), hf_glu.record_gates(model) as before:
        logits(model, **given)
    more = {"fan_in_fan_out": name == "gpt2", "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=2, **more)).eval()
    with made.on(wrapped), hf_glu.record_gates(wrapped) as after:  # an adapter does nothing at first
        steered_by_lora = logits(wrapped, **given)
    assert_same(after.openness, before.openness, "bitwise")
    with made.on(wrapped), torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
        moved = logits(wrapped, **given)
    assert (moved - steered_by_lora).abs().max() > 1e-3
    with pytest.raises(ConversionError, match="merge_and_unload"):
        made.fold(wrapped, check=False)
    merged = wrapped.merge_and_unload()
    with made.on(merged, check=False):
        torch.testing.assert_close(logits(merged, **given), moved, **CLOSE)


def test_chunks_are_refused_where_tokens_differ():
    model = steered.make("bert")
    made = steered.fit(model)
    model.config.chunk_size_feed_forward = 3
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 3
    given = inputs(model, length=6)
    with made.on(model, 1.0):
        logits(model, **given)
    with pytest.raises(OptionError, match="alike"), made.on(model, [1.0, 2.0, 0.0]):
        logits(model, **given)


def test_what_was_compiled_before_is_steered_and_not_after():
    model = steered.make("llama", num_hidden_layers=1)
    made, ffn, x = steered.fit(model), model.model.layers[0].mlp, torch.randn(1, 3, 16)
    expected = {None: ffn(x)}
    for strength in (2.0, -1.0):
        with made.on(model, strength):
            expected[strength] = ffn(x)
    torch.compiler.reset()
    compiled = torch.compile(ffn, backend="eager", fullgraph=True)
    for strength in (None, 2.0, None, -1.0, 2.0):
        if strength is None:
            found = compiled(x)
        else:
            with made.on(model, strength):
                found = compiled(x)
        torch.testing.assert_close(found, expected[strength], **CLOSE)
    torch.compiler.reset()


def test_virtual_tokens_before_a_text_are_not_counted_as_its_own():
    model = steered.make("llama")
    made = steered.fit(model)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, config).eval()
    given = {"input_ids": steered.ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    for tokens in ("generated", torch.ones(2, 6, dtype=torch.bool)):
        with pytest.raises(OptionError, match="PromptTuningConfig puts tokens of its own before a text"):
            with made.on(tuned, tokens=tokens):
                pass
    plain = logits(tuned, **given)
    for tokens in ("all", "last"):
        with made.on(tuned, 2.0, tokens=tokens):
            assert (logits(tuned, **given) - plain).abs().max() > 1e-3
