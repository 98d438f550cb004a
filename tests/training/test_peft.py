"""LoRA on converted models: what it trains, adapters that load again, merged models, quantized ones."""

import copy

import peft
import pytest
import torch
import transformers
from comparing import assert_same, fresh_process, outputs
from peft import LoraConfig, PeftModel, get_peft_model
from pico import FAMILIES, HEADS_OF_ALL, NATIVE, make_native
from short_training import MODELS, changed, converted, snapshot, train

import hf_glu
from hf_glu.activation.learnable import mixes
from hf_glu.errors import NoSiteError, OptionError
from hf_glu.ffn.linear import LINEAR, weight_rows
from hf_glu.instruments.probe import probe_inputs
from hf_glu.training.parameters.parts import head_names
from hf_glu.training.parameters.peft import (
    count_parameters,
    frozen_activations,
    lora_config,
    target_names,
    train_only_gates,
)

TARGETS = ("ffn", "in", "out", "all-linear")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", MODELS)
def test_lora_trains_the_adapters_the_head_and_nothing_else(family, targets):
    model = converted(family)
    inputs, total, saved = probe_inputs(model), count_parameters(model)["total"], MODELS[family][2]
    names = target_names(model, targets)
    shapes = [weight_rows(model.get_submodule(name)).shape for name in names]
    heads = sum(p.numel() for name in saved for p in model.get_submodule(name).parameters())
    config = lora_config(model, rank=3, targets=targets)
    assert set(config.modules_to_save or ()) == saved
    wrapped = get_peft_model(model, config)
    layers = {name for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert layers == set(names)
    trainable = 3 * sum(sum(shape) for shape in shapes) + heads
    assert count_parameters(wrapped) == {"total": total + trainable, "trainable": trainable}
    before = snapshot(wrapped)
    losses = train(wrapped, inputs)
    assert losses[-1] < 0.97 * losses[0]
    moved = changed(wrapped, before)
    assert {name for name in before if "lora_B" in name} <= moved
    assert {name.partition(".modules_to_save")[0] for name in moved if "lora_" not in name} == {
        f"base_model.model.{name}" for name in saved
    }


def test_targets():
    bert, gpt2, llama = converted("bert"), converted("gpt2"), make_native("llama")
    layer = "bert.encoder.layer.0."
    assert target_names(bert)[:2] == [layer + "intermediate.dense", layer + "output.dense"]
    assert target_names(bert, "out") == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    assert target_names(gpt2, "in") == [f"transformer.h.{i}.mlp.c_fc" for i in range(2)]
    assert [name.rpartition(".")[2] for name in target_names(llama)[:3]] == ["gate_proj", "up_proj", "down_proj"]
    assert target_names(bert, ["query", layer + "output.dense"]) == [
        *(f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)),
        layer + "output.dense",
    ]
    assert lora_config(gpt2).fan_in_fan_out
    assert not lora_config(bert).fan_in_fan_out
    more = lora_config(bert, alpha=4, dropout=0.1, bias="all", modules_to_save=["embeddings"])
    assert (more.lora_alpha, more.lora_dropout, more.bias) == (4, 0.1, "all")
    assert set(more.modules_to_save) == {"classifier", "bert.pooler", "embeddings"}


def test_bad_targets():
    with pytest.raises(OptionError, match="did you mean 'ffn'"):
        lora_config(converted("bert"), targets="fnn")
    with pytest.raises(OptionError, match="no module 'c_fc'"):
        lora_config(converted("bert"), targets=["c_fc"])
    with pytest.raises(NoSiteError, match="all-linear"):
        lora_config(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(("family", "head"), HEADS_OF_ALL)
def test_heads(family, head):
    model = FAMILIES[family].make(head)
    heads, linear = head_names(model), target_names(model, "all-linear")
    assert bool(heads) or not any(task in head for task in ("Classification", "QuestionAnswering", "MultipleChoice"))
    assert not any(name.split(".")[0] in heads for name in linear)
    embeddings = model.get_output_embeddings()
    assert all(model.get_submodule(name) is not embeddings for name in linear)
    assert set(target_names(model)) <= set(linear)
    base = {id(module) for module in model.base_model.modules() if isinstance(module, LINEAR)}
    assert {id(model.get_submodule(name)) for name in linear} <= base


def test_an_encoder_decoders_head_is_no_target():
    encoder, decoder = (
        FAMILIES["bert"].make("BertModel"),
        FAMILIES["gpt2"].make("GPT2LMHeadModel", add_cross_attention=True),
    )
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    linear = target_names(model, "all-linear")
    assert "decoder.transformer.h.0.mlp.c_fc" in linear
    assert "decoder.lm_head" not in linear


_FRESH = """
import sys, torch, hf_glu, transformers
from hf_glu.instruments.probe import probe_inputs, run
from peft import PeftModel
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    base = getattr(transformers, name).from_pretrained(folder + "/base").eval()
    inputs = probe_inputs(base)
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
    also = getattr(transformers, name).from_pretrained(folder + "/adapter").eval()
    torch.save([run(model, inputs), run(also, inputs)], folder + "/outputs.pt")
"""


@pytest.mark.slow
def test_adapters_load_on_the_converted_folder_in_a_new_process(tmp_path):
    expected, arguments = {}, []
    for family, (_, auto, _) in MODELS.items():
        model, folder = converted(family, "learnable_" + FAMILIES[family].exact), tmp_path / family
        model.save_pretrained(folder / "base")
        model = getattr(transformers, auto).from_pretrained(folder / "base")
        inputs = probe_inputs(model)
        wrapped = get_peft_model(model, lora_config(model))
        plain = outputs(wrapped, **inputs)
        train(wrapped, inputs)
        expected[family] = outputs(wrapped, **inputs)
        assert not torch.equal(expected[family]["logits"], plain["logits"])
        wrapped.save_pretrained(folder / "adapter")
        arguments += [auto, str(folder)]
    done = fresh_process(_FRESH, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    for family in MODELS:
        for loaded in torch.load(tmp_path / family / "outputs.pt", weights_only=True):
            assert_same(loaded, expected[family], "bitwise")


@pytest.mark.parametrize("family", MODELS)
def test_merged_models_are_plain_models(family, tmp_path):
    model = converted(family, "learnable_" + FAMILIES[family].exact)
    inputs, sites = probe_inputs(model), [site.to_dict() for site in hf_glu.find_sites(model)]
    wrapped = get_peft_model(model, lora_config(model, targets="all-linear"))
    train(wrapped, inputs)
    expected = outputs(wrapped, **inputs)
    merged = wrapped.merge_and_unload()
    assert_same(outputs(merged, **inputs), expected, "exact up to rounding")
    assert [site.to_dict() for site in hf_glu.find_sites(merged)] == sites
    merged.save_pretrained(tmp_path / "merged")
    auto = getattr(transformers, MODELS[family][1])
    loaded, info = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(loaded.eval(), **inputs), outputs(merged, **inputs), "bitwise")
    hf_glu.anneal(loaded, 1.0)
    hf_glu.freeze_mix(loaded)
    assert {site.activation for site in hf_glu.find_sites(loaded)} == {FAMILIES[family].exact}


def test_lora_trains_the_mix_which_a_plain_configuration_leaves_frozen():
    model = converted("bert", "learnable_geglu")
    inputs, names = probe_inputs(model), target_names(model)
    assert frozen_activations(model) == []
    plain = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=names))
    ours = get_peft_model(model, lora_config(model))
    frozen = [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn.phi.mix" for i in range(2)]
    assert frozen_activations(plain) == frozen
    assert frozen_activations(ours) == []
    for wrapped, trained in ((plain, False), (ours, True)):
        start = mixes(wrapped)[0].mix.detach().clone()
        train(wrapped, inputs)
        assert any(not torch.equal(mix.mix, start) for mix in mixes(wrapped)) is trained
        mix = mixes(wrapped.merge_and_unload())[0].mix
        assert torch.equal(mix, start) is not trained
    model = converted("bert", "learnable_geglu")
    config = lora_config(model)
    ours = get_peft_model(model, config)
    ours.add_adapter("other", config)
    assert frozen_activations(ours) == [], "the active adapter trains it"
    ours.requires_grad_(False)
    assert frozen_activations(ours) == frozen


def test_lora_trains_the_parameters_of_a_native_familys_activation():
    model = make_native("llama", hidden_act="prelu")
    inputs = probe_inputs(model)
    assert frozen_activations(get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["up_proj"])))
    wrapped = get_peft_model(model, lora_config(model))
    assert frozen_activations(wrapped) == []
    before = snapshot(wrapped)
    train(wrapped, inputs)
    assert {name for name in before if "act_fn.modules_to_save" in name} <= changed(wrapped, before)


@pytest.mark.parametrize("name", NATIVE)
def test_lora_on_native_families(name):
    model = make_native(name)
    inputs, sites = probe_inputs(model), len(hf_glu.find_sites(model))
    config = lora_config(model)
    assert bool(config.target_parameters) == (name == "mixtral")
    wrapped = get_peft_model(model, config)
    losses = train(wrapped, inputs)
    assert losses[-1] < losses[0]
    expected = outputs(wrapped, **inputs)
    merged = wrapped.merge_and_unload()
    assert_same(outputs(merged, **inputs), expected, "exact up to rounding")
    assert len(hf_glu.find_sites(merged)) == sites


def test_a_quantized_head_is_refused():
    model = converted("bert")
    model.classifier.weight = torch.nn.Parameter(torch.zeros(2, 16, dtype=torch.uint8), requires_grad=False)
    for make in (lora_config, train_only_gates):
        with pytest.raises(OptionError, match=r"llm_int8_skip_modules=\['classifier'\]"):
            make(model)


def test_qlora(tmp_path):
    """LoRA on a converted model in 4 bits, with an adapter that loads again on it."""
    pytest.importorskip("bitsandbytes")
    model = converted("bert", "learnable_geglu", hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path / "base")
    inputs, total = probe_inputs(model), count_parameters(model)["total"]

    def load(**more):
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **more)
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(tmp_path / "base", quantization_config=settings)

    with pytest.raises(OptionError, match="llm_int8_skip_modules"):
        lora_config(load())
    skip = {"llm_int8_skip_modules": ["classifier", "bert.pooler"]}
    loaded = load(**skip)
    assert [type(site.in_proj).__name__ for site in hf_glu.find_sites(loaded)] == ["Linear4bit"] * 2
    assert count_parameters(loaded)["total"] == total
    wrapped = get_peft_model(peft.prepare_model_for_kbit_training(loaded, False), lora_config(loaded))
    assert frozen_activations(wrapped) == []
    losses = train(wrapped, inputs)
    assert losses[-1] < 0.97 * losses[0]
    expected = outputs(wrapped, **inputs)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        peft.prepare_model_for_kbit_training(load(**skip), False), tmp_path / "adapter"
    ).eval()
    assert_same(outputs(again, **inputs), expected, "bitwise")


@pytest.mark.parametrize("targets", ["ffn", "all-linear"])
@pytest.mark.parametrize("kind", ["ours", "native", "mixed"])
def test_lora_reaches_the_experts_and_leaves_the_router(kind, targets, tmp_path):
    model = FAMILIES["gpt2"].make() if kind == "ours" else make_native("mixtral")
    if kind == "ours":
        hf_glu.convert(model, "geglu_new", experts="gelu_new*2,learnable_swiglu*2", check=False)
    elif kind == "mixed":
        hf_glu.convert(model, experts="silu,learnable_relu", check=False)
    if kind == "ours" and targets == "all-linear":
        with pytest.raises(OptionError, match="Conv1D"):
            lora_config(model, targets=targets)
        return
    config = lora_config(model, targets=targets)
    again = copy.deepcopy(model)
    wrapped = get_peft_model(model, config)
    assert not frozen_activations(wrapped)
    before = snapshot(wrapped)
    train(wrapped, probe_inputs(model))
    moved = changed(wrapped, before)
    experts = {name for name in before if ("banks" in name or "experts" in name) and "lora_B" in name}
    assert len(experts) == {"ours": 8, "native": 4, "mixed": 4}[kind]
    assert experts <= moved, "routed experts are silently frozen"
    assert not any("router" in name or "mlp.gate." in name for name in moved)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert_same(outputs(loaded.eval()), outputs(wrapped.eval()), "bitwise")
    assert_same(outputs(wrapped.merge_and_unload()), outputs(loaded), "exact up to rounding")
