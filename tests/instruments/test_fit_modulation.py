"""Fitting a modulation: what its thresholds are, on which models, and what it refuses."""

from __future__ import annotations

import pytest
import steered
import torch
from comparing import assert_same
from peft import LoraConfig, get_peft_model
from pico import make_native

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.errors import DataError, NoSiteError, OptionError, UnknownNameError
from hf_glu.instruments.recorder import Watch, watching
from hf_glu.instruments.steering.places import gate_places

STACK = {"bert": "encoder.", "opt": "decoder."}  # what their modules are called
FAMILIES = ("bert", "gpt2", "t5", "bart", "opt", *steered.NATIVE)


def difference(model, layer):
    """Return the difference of means of the gates of a GPT-2 or Llama, computed text by text."""
    tokenizer, sides = steered.tokenizer(), []
    block = model.transformer.h[layer].mlp if hasattr(model, "transformer") else model.model.layers[layer].mlp
    act = block.act if hasattr(block, "act") else block.act_fn
    for texts in steered.texts():
        means = []
        for text in texts:
            seen = []
            with watching(model, [Watch(module=act, see=lambda call, seen=seen: seen.append(call.x))]):
                model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
            means.append(seen[0].detach()[0].mean(0))
        sides.append(torch.stack(means).mean(0))
    return sides[0] - sides[1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_thresholds_are_differences_of_means(name):
    model = steered.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = steered.fit(model, batch_size=5)
    assert list(made.thresholds) == ["layers.0", "layers.1"]
    for layer in (0, 1):
        assert_same(made.thresholds[f"layers.{layer}"], -difference(model, layer), "exact up to rounding")
    assert not made.log_slopes
    assert_same(dict(model.state_dict()), before, "bitwise")
    assert set(made.accuracy) == set(made.thresholds)
    assert made.detector.accuracy == max(made.accuracy.values()) > 0.8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_gates(name):
    model = steered.make(name)
    made = steered.fit(model)
    sites = hf_glu.find_sites(model)
    assert [len(threshold) for threshold in made.thresholds.values()] == [site.width for site in sites]
    assert all(threshold.abs().max() > 1e-4 for threshold in made.thresholds.values())
    stacks = ("encoder.", "decoder.") if model.config.is_encoder_decoder else (STACK.get(name, ""),)
    assert list(made.thresholds) == [f"{stack}layers.{layer}" for stack in stacks for layer in (0, 1)]


@pytest.mark.parametrize(("name", "target"), [("gpt2", "c_attn"), ("t5", "q")])
def test_padding_is_left_out_of_a_wrapped_model(name, target):
    """A PeftModel without a task hides what the forward inside takes, as compiled models do."""
    pairs = [[text, f"{text} {text}"][at % 2] for at, text in enumerate(steered.texts()[0])], steered.texts()[1]
    model = steered.make(name)
    plain = hf_glu.fit_modulation(model, steered.tokenizer(), *pairs, batch_size=1)
    wrapped = get_peft_model(model, LoraConfig(target_modules=[target], fan_in_fan_out=name == "gpt2"))
    found = hf_glu.fit_modulation(wrapped, steered.tokenizer(), *pairs)
    assert_same(dict(found.thresholds), dict(plain.thresholds), "exact up to rounding")


@pytest.mark.parametrize("method", ["pca", "probe"])
def test_directions_are_scaled_to_the_difference(method):
    model = steered.make("gpt2")
    mean, made = steered.fit(model).thresholds, steered.fit(model, method=method).thresholds
    for name, threshold in made.items():
        unit = threshold / threshold.norm()
        assert_same(threshold, unit * (unit @ mean[name]), "exact")
        assert unit @ mean[name] > 0
        assert (threshold - mean[name]).norm() > 0.01 * mean[name].norm()


def test_slopes_are_ratios_of_deviations():
    model = steered.make("llama")
    made = steered.fit(model, slopes=True)
    plain = steered.fit(model)
    assert set(made.log_slopes) == set(plain.thresholds)
    for name, slope in made.log_slopes.items():
        assert 0 < slope.abs().max() <= 0.6932
        assert (made.thresholds[name] - plain.thresholds[name]).abs().max() > 1e-4
    assert_same(made.detector.weight, plain.detector.weight, "exact")


def test_learned_makes_the_texts_likelier():
    model = steered.make("llama")

    def loss(made, texts, strength):
        ids = torch.tensor([steered.tokenizer()(text)["input_ids"] for text in texts])
        with made.on(model, strength), torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    start, made = steered.fit(model), steered.fit(model, method="learned", steps=24)
    good, bad = steered.texts()
    assert loss(made, good, 1.0) + loss(made, bad, -1.0) < loss(start, good, 1.0) + loss(start, bad, -1.0) - 0.05
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    again = steered.fit(model, method="learned", steps=24)
    assert_same(dict(again.thresholds), dict(made.thresholds), "bitwise")
    with pytest.raises(OptionError, match="learned"):
        steered.fit(steered.make("t5"), method="learned", steps=1)


def test_layers_and_converted_models():
    dense, converted = steered.make("bert"), steered.make("bert")
    hf_glu.convert(converted, "geglu")
    one, other = steered.fit(dense, layers=[1]), steered.fit(converted, layers=[1])
    assert list(one.thresholds) == ["encoder.layers.1"]
    assert_same(dict(other.thresholds), dict(one.thresholds), "exact up to rounding")
    one.check(converted)  # it has the dense one's gates
    with pytest.raises(OptionError, match="0 to 1"):
        steered.fit(dense, layers=[7])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"positive": []}, DataError, "no positive texts"),
        ({"negative": []}, DataError, "no negative texts"),
        ({"negative": "a text"}, DataError, "list of texts"),
        ({"positive": ["fine", " "]}, DataError, "no text"),
        ({"positive": ["zzz yyy"] * 8}, DataError, "language"),
        ({"method": "diffmeans"}, UnknownNameError, "diffmean"),
        ({"batch_size": 0}, OptionError, "batch_size"),
    ],
)
def test_bad_input_is_one_line(change, error, says):
    good, bad = steered.texts(8)
    given = {"positive": good, "negative": bad, **change}
    with pytest.raises(error, match=says) as caught:
        hf_glu.fit_modulation(steered.make("gpt2"), steered.tokenizer(), **given)
    assert "\n" not in str(caught.value)


def test_another_models_tokenizer_and_models_without_gates():
    with pytest.raises(OptionError, match="another model's"):
        steered.fit(steered.make("gpt2", vocab_size=5000))
    with pytest.raises(OptionError, match="another model's"):
        steered.fit(steered.make("gpt2", vocab_size=20))
    with pytest.raises(NoSiteError, match="experts"):
        steered.fit(make_native("mixtral"))


class Numbers:
    """A tokenizer of numbers, for the tiny models of all families."""

    unk_token_id, name_or_path = None, "numbers"

    def __len__(self):
        return 40

    def __call__(self, texts, truncation, max_length):
        first = {"+": 6, "-": 12}
        return {"input_ids": [[first[text[0]] + int(digit) % 8 for digit in text[1:]] for text in texts]}


@pytest.mark.parametrize(("family", "left_out"), [("git", "encoder.layers.0")])
def test_gates_that_no_whole_text_reaches_are_left_out(family, left_out):
    model = tiny_model(family)
    positive, negative = ([f"{sign}{1234 + at}" for at in range(8)] for sign in "+-")
    made = hf_glu.fit_modulation(model, Numbers(), positive, negative)
    assert made.thresholds
    assert set(made.samples) == set(made.accuracy) == set(made.thresholds)
    assert left_out in gate_places(model)
    assert left_out not in made.thresholds


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_gates_inside_of_experts_are_none_of_them(family):
    model = tiny_model(family)
    sites = {id(site.anchor): site for site in gate_places(model).values()}
    inside = [site for site in hf_glu.find_sites(model) if "experts" in site.path]
    assert sites
    assert inside
    assert not any(id(site.anchor) in sites for site in inside)


@pytest.mark.parametrize(
    ("family", "says"), [("cpmant", "whole texts"), ("voxtral_realtime", "doesn't run on input_ids")]
)
def test_models_that_take_more_than_texts_are_refused(family, says):
    with pytest.raises(OptionError, match=says) as caught:
        hf_glu.fit_modulation(tiny_model(family), Numbers(), ["+1234"] * 4, ["-1234"] * 4)
    assert "\n" not in str(caught.value)
