"""Learnable mixes: exact at the start, alive, annealed to the target, folded into it."""

from types import SimpleNamespace

import pytest
import torch
from comparing import assert_same, outputs
from covering import covering
from pico import FAMILIES, make_native
from torch.autograd import gradcheck
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.activation.learnable import LearnableMix, mixes
from hf_glu.errors import ConversionError, NoSiteError, OptionError, UnknownNameError

SOURCES = ("relu", "gelu", "gelu_new", "silu", "relu2", "quick_gelu")
TARGETS = ("glu", "bilinear", "reglu", "geglu", "geglu_new", "swiglu", "relu2glu")


def target_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("source", "target"), covering(SOURCES, TARGETS))
def test_any_to_any_is_exact_at_the_start_and_pure_at_the_end(source, target, tmp_path):
    family = {"relu": "t5", "gelu": "bert"}.get(source, "gpt2")
    model = FAMILIES[family].make(**{FAMILIES[family].field: source})
    before = outputs(model)
    report = hf_glu.convert(model, f"learnable_{target}")
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact")
    assert report.to_dict()["parameters_after"] == model.num_parameters()
    hf_glu.anneal(model, 1.0)
    pure = outputs(model)
    hf_glu.freeze_mix(model)
    assert_same(outputs(model), pure, "exact")
    assert getattr(model.config, FAMILIES[family].field) == target
    assert "mix" not in model.config.hf_glu
    assert not mixes(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_saved_in_the_middle_of_annealing(family, tmp_path):
    model = FAMILIES[family].make()
    hf_glu.convert(model, "learnable_swiglu")
    for mix in mixes(model):
        mix.mix.data += 0.1 * torch.randn_like(mix.mix)
    assert hf_glu.anneal(model, 0.2, until=0.5) == pytest.approx(0.4)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), outputs(model), "bitwise")
    assert mixes(again)[0].names == (FAMILIES[family].dense, "silu")
    with pytest.raises(ConversionError, match="40%"):
        hf_glu.freeze_mix(again)


def test_every_coefficient_is_alive():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "learnable_swiglu")
    model(**hf_glu.instruments.probe.probe_inputs(model)).logits.pow(2).sum().backward()
    for mix in mixes(model):
        assert (mix.mix.grad != 0).all()


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_from_scratch_and_reloaded(per, tmp_path):
    options = {"mix": {"functions": ["silu", "relu", "tanh"], "per": per}}
    model = FAMILIES["gpt2"].make(activation_function="learnable_swiglu", hf_glu=options)
    shape = (3,) if per == "layer" else (3, 40)
    for mix in mixes(model):
        assert mix.mix.shape == shape
        assert_same(mix.coefficients()[0].detach(), torch.ones(shape[1:]), "bitwise") if per == "channel" else None
        mix.mix.data += 0.1 * torch.randn_like(mix.mix)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(outputs(again), outputs(model), "bitwise")


def test_a_checkpoint_without_the_mix_loads_its_start(tmp_path):
    plain = FAMILIES["gpt2"].make(activation_function="swiglu")
    plain.save_pretrained(tmp_path)
    model, info = type(plain).from_pretrained(
        tmp_path, activation_function="learnable_swiglu", output_loading_info=True
    )
    assert any(key.endswith("phi.mix") for key in info["missing_keys"])
    assert_same(outputs(model), outputs(plain), "exact")


def test_native_family_keeps_its_weights_and_gets_a_learnable_gate(tmp_path):
    for name in ("llama", "mixtral", "phi3"):
        model = make_native(name)
        before = outputs(model)
        assert hf_glu.convert(model, "learnable_reglu").plan.promise == "exact"
        assert_same(outputs(model), before, "bitwise")
        assert hf_glu.find_sites(model)[0].act.names == ("silu", "relu")
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name)
        assert_same(outputs(again), before, "bitwise")
        hf_glu.anneal(again, 1.0)
        pure = outputs(again)
        hf_glu.freeze_mix(again)
        assert again.config.hidden_act == "relu"
        assert again.config.hf_glu is None
        assert_same(outputs(again), pure, "bitwise")


def test_a_dense_ffn_can_have_a_learnable_activation_without_a_gate(tmp_path):
    model = FAMILIES["bert"].make()
    before = outputs(model)
    hf_glu.convert(model, "learnable_relu")
    assert model.config.hidden_act == "learnable_relu"
    assert hf_glu.find_sites(model)[0].in_proj.out_features == 40
    assert_same(outputs(model), before, "exact")
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), before, "exact")


@pytest.mark.parametrize("name", ["learnable_gelu", "learnable_swiglu", "learnable_relu6_glu"])
def test_value_and_gradient(name):
    module = ACT2FN[name].double()
    mix = mixes(module)[0]
    mix.mix.data = torch.randn(len(mix.names), dtype=torch.float64)
    mix.annealed.fill_(0.3)
    x = 3 * torch.randn(3, 8, dtype=torch.float64)
    gate, up = (x[:, :4], x[:, 4:]) if module.gated else (x, 1.0)
    weights = 0.7 * mix.mix.detach()
    weights[mix.names.index(mix.target)] += 0.3
    expected = sum(w * ACT2FN[f](gate) for w, f in zip(weights, mix.names, strict=True)) * up
    assert_same(module(x).detach(), expected, "formula")
    assert gradcheck(module, x.requires_grad_())
    assert gradcheck(lambda m: torch.func.functional_call(module, {_mix_key(module): m}, (x.detach(),)), mix.mix)


def _mix_key(module):
    return next(key for key, _ in module.named_parameters() if key.endswith("mix"))


def test_the_schedule_is_a_function_of_progress():
    model = FAMILIES["gpt2"].make(activation_function="learnable_swiglu")
    assert [hf_glu.anneal(model, p) for p in (0.0, 0.25, 0.5, 1.0, 0.25)] == [0.0, 0.5, 1.0, 1.0, 0.5]
    with pytest.raises(OptionError, match="progress"):
        hf_glu.anneal(model, 1.5)
    with pytest.raises(OptionError, match="until"):
        hf_glu.anneal(model, 0.5, until=0)
    with pytest.raises(NoSiteError, match="learnable"):
        hf_glu.anneal(FAMILIES["gpt2"].make(), 0.5)
    with pytest.raises(NoSiteError, match="learnable"):
        hf_glu.freeze_mix(FAMILIES["gpt2"].make())


def test_the_callback_anneals_also_after_a_resume(tmp_path):
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "learnable_swiglu")
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
    seen = []

    class Watch(hf_glu.AnnealCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            super().on_step_begin(args, state, control, model=model, **kwargs)
            seen.append(float(mixes(model)[0].annealed))

    def trainer(model, steps):
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 1}
        arguments = TrainingArguments(str(tmp_path), max_steps=4, save_steps=2, **options)
        return Trainer(model, arguments, train_dataset=data, callbacks=[Watch(until=1.0)])

    trainer(model, 4).train()
    assert seen == [0.0, 0.25, 0.5, 0.75]
    assert mixes(model)[0].annealed == 1
    seen.clear()
    fresh = FAMILIES["gpt2"].make()
    hf_glu.convert(fresh, "learnable_swiglu")
    trainer(fresh, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [0.5, 0.75]
    hf_glu.freeze_mix(fresh)
    assert fresh.config.activation_function == "swiglu"


def test_the_callback_leaves_the_best_checkpoint_as_it_was():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "learnable_swiglu")
    callback, state = hf_glu.AnnealCallback(until=1.0), TrainerState(global_step=8, max_steps=8)
    for best, annealed in ((True, 0.25), (False, 1.0)):
        hf_glu.anneal(model, 0.25, until=1.0)
        state.best_model_checkpoint = "checkpoint-2" if best else None
        callback.on_train_end(SimpleNamespace(load_best_model_at_end=best), state, TrainerControl(), model=model)
        assert mixes(model)[0].annealed == annealed


def test_the_mix_has_no_weight_decay():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "learnable_swiglu")
    groups = {group["name"]: {id(p) for p in group["params"]} for group in hf_glu.parameter_groups(model, 1.0, 0.1)}
    assert all(id(mix.mix) in groups["no_decay"] for mix in mixes(model))


@pytest.mark.parametrize(
    ("mix", "error", "match"),
    [
        ({"function": ["relu"]}, UnknownNameError, "functions"),
        ({"functions": []}, OptionError, "functions"),
        ({"per": "token"}, OptionError, "channel"),
        (["relu"], OptionError, "dict"),
    ],
)
def test_bad_mixes(mix, error, match):
    with pytest.raises(error, match=match):
        FAMILIES["bert"].make(hidden_act="learnable_swiglu", hf_glu={"mix": mix})


def test_unknown_functions_say_the_nearest():
    with pytest.raises(UnknownNameError, match="relu"):
        FAMILIES["bert"].make(hidden_act="learnable_swiglu", hf_glu={"mix": {"functions": ["relo"]}})
    assert "learnable_swiglu_oss" not in ACT2FN
    assert isinstance(ACT2FN["learnable_silu"], LearnableMix)
