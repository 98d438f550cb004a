"""Whatever converts also loads, and a checkpoint's FFNs are loaded exactly or not at all."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress

import pytest
import torch
import transformers
from comparing import assert_same, fresh_outputs, outputs
from covering import covering
from pico import FAMILIES, NATIVE, WIDTH, make_native

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_inputs, tiny_model
from hf_glu.errors import CheckpointError, ConversionError

TOKENS = torch.arange(1, 49).reshape(4, 12)
CALIBRATION = {"calibration": TOKENS, "distill_steps": 0}


def options_of(exact: str) -> dict[str, dict]:
    """Return conversions by name; ``exact`` is the gate that computes what the model does."""
    learnable, stateful = f"learnable_{exact}", f"stateful_{exact}"
    return {
        "plain": {"target": exact},
        "mix": {"target": "learnable_swiglu", "mix": {"functions": ["tanh"], "per": "channel"}},
        "adaptive": {"target": "moa_swiglu"},
        "wrapped": {"target": f"modulated_stateful_{exact}", "state": {"alpha": 0.1}},
        "some layers": {"target": stateful, "layers": [1]},
        "by layer": {"target": {"0": exact, "1": learnable}},
        "two wrappers": {"target": {"0": f"modulated_{exact}", "1": stateful}},
        "narrow": {"target": exact, "width": WIDTH // 2, **CALIBRATION},
        "narrow mix": {"target": learnable, "width": WIDTH // 2, **CALIBRATION},
        "narrow layer": {"target": exact, "width": WIDTH // 2, "layers": [0], **CALIBRATION},
    }


def assert_loads(model, folder, inputs=None):
    """Assert that ``model`` comes back as it is, with its FFNs' activations and nothing missing or left over."""
    with torch.no_grad():  # what starts without effect gets one
        for name, parameter in model.named_parameters():
            if "embed" not in name:  # of which a padding row is 0 after loading
                parameter += 0.02 * torch.randn_like(parameter)
    expected, sites = outputs(model, **(inputs or {})), hf_glu.find_sites(model)
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert [site.activation for site in hf_glu.find_sites(again)] == [site.activation for site in sites]
    assert [site.width for site in hf_glu.find_sites(again)] == [site.width for site in sites]
    found = outputs(again.eval(), **(inputs or {}))
    assert_same(found, expected, "bitwise")


@pytest.mark.parametrize(("family", "name"), covering(FAMILIES, options_of("geglu")))
def test_dense_families(family, name, tmp_path):
    model = FAMILIES[family].make()
    hf_glu.convert(model, **options_of(FAMILIES[family].exact)[name], check=False)
    assert_loads(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "name"), covering([family for family in NATIVE if family != "mixtral"], options_of("swiglu"))
)
def test_native_families(family, name, tmp_path):
    model = make_native(family)
    exact = {"t5_v1_1": "geglu_new", "modernbert": "geglu"}.get(family, "swiglu")
    hf_glu.convert(model, **options_of(exact)[name], check=False)
    assert_loads(model, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        ("bloom", "geglu_new"), ("mpt", {"0": "geglu", "1": "learnable_geglu"}), ("xlm", "moa_geglu"),
        ("lilt", "learnable_swiglu"), ("funnel", "geglu_new"), ("moonshine", "geglu"), ("openai-gpt", "geglu_new"),
        ("llama4_text", "learnable_swiglu"), ("albert", "geglu_new"), ("mamba", "stateful_swiglu"),
        ("funnel", "modulated_geglu_new"), ("llama4_text", "moa_swiglu"),
    ],
)  # fmt: skip
def test_families_with_ways_of_their_own(model_type, target, tmp_path):
    if model_type == "moonshine":
        model = make_moonshine()
        inputs = {"input_values": torch.randn(1, 4000), "decoder_input_ids": TOKENS[:1]}
    else:
        model = tiny_model(model_type)
        inputs = tiny_inputs(model)
    hf_glu.convert(model, target, check=False)
    assert_loads(model, tmp_path, inputs)


def make_moonshine():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
    heads = {f"{stack}_num_{kind}_heads": 2 for stack in ("encoder", "decoder") for kind in ("attention", "key_value")}
    config = transformers.MoonshineConfig(vocab_size=61, max_position_embeddings=64, **sizes, **heads)
    return transformers.MoonshineForConditionalGeneration(config).eval()


def test_a_stack_with_a_field_of_its_own():
    model = make_moonshine()
    hf_glu.convert(model, "geglu", check=False)
    assert (model.config.encoder_hidden_act, model.config.decoder_hidden_act) == ("geglu", "silu")


def test_two_ffns_in_one_layer_have_two_names(tmp_path):
    model = tiny_model("lilt")
    names = [site.name for site in hf_glu.find_sites(model)]
    assert len(set(names)) == len(names) == 4
    report = hf_glu.convert(model, "geglu", width="iso", **CALIBRATION, check=False)
    assert len({site.fit for site in report.sites}) == 4
    assert_loads(model, tmp_path, tiny_inputs(model))


def test_a_vision_tower_that_reads_no_field(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = {**sizes, "image_size": 8, "patch_size": 4, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 32}
    tower |= {"projector_input_dim": 32, "projector_output_dim": 32}
    text = {**sizes, "vocab_size": 64, "intermediate_size_mlp": 32, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Llama4Config(vision_config=tower, text_config={**text, "num_local_experts": 2})
    for model in (
        transformers.Llama4ForConditionalGeneration(config),
        transformers.Llama4VisionModel(config.vision_config),
    ):
        hf_glu.convert(model, "learnable_swiglu", check=False)
        model.save_pretrained(tmp_path)
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert_same(dict(again.state_dict()), dict(model.state_dict()), "bitwise")


def test_routes_with_and_without_a_bias_in_one_model(tmp_path):
    model = FAMILIES["t5"].make(feed_forward_proj="relu2")
    report = hf_glu.convert(model, {"0": "reglu", "1": "relu2glu"})
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert_loads(model, tmp_path)


def test_a_classifier_that_reads_no_activation():
    model = tiny_model("funnel", "FunnelForSequenceClassification")
    inputs = tiny_inputs(model)
    before = outputs(model, **inputs)
    hf_glu.convert(model, "geglu_new", inputs=inputs)
    assert_same(outputs(model, **inputs), before, "exact")


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path):
    models = {}
    for family, name in (("bert", "by layer"), ("gpt2", "narrow mix"), ("t5", "two wrappers")):
        model = FAMILIES[family].make()
        hf_glu.convert(model, **options_of(FAMILIES[family].exact)[name], check=False)
        models[type(model).__name__] = model
    models["LlamaForCausalLM"] = make_native("llama")
    hf_glu.convert(models["LlamaForCausalLM"], **options_of("swiglu")["narrow layer"], check=False)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    found = fresh_outputs({name: tmp_path / name for name in models})
    for name, model in models.items():
        assert_same(found[name], outputs(model), "bitwise")


class StubbornConfig(transformers.LlamaConfig):
    """Sets its activation itself, whatever it is given."""

    model_type = "stubborn"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.hidden_act = "silu"


class StubbornModel(transformers.LlamaForCausalLM):
    config_class = StubbornConfig


def test_a_config_that_forgets_is_refused_before_anything_changes():
    config = StubbornConfig(**{**make_native("llama").config.to_dict(), "hidden_act": "silu"})
    model = StubbornModel(config).eval()
    before, said, state = outputs(model), model.config.to_dict(), dict(model.state_dict())
    with pytest.raises(ConversionError, match=r"would not load as it is converted.*learnable_silu.*load as silu"):
        hf_glu.convert(model, "learnable_swiglu")
    assert model.config.to_dict() == said
    assert_same(dict(model.state_dict()), state, "bitwise")
    assert_same(outputs(model), before, "bitwise")


@pytest.mark.parametrize(("family", "part"), [("t5", "encoder"), ("bart", "model.encoder"), ("opt", "model.decoder")])
def test_a_stack_by_itself_is_refused(family, part):
    model = FAMILIES[family].make()
    said = model.config.to_dict()
    with pytest.raises(ConversionError, match="hand over the whole model"):
        hf_glu.convert(model.get_submodule(part), FAMILIES[family].exact)
    assert model.config.to_dict() == said
    assert not any(site.activation for site in hf_glu.find_sites(model))


# --- a checkpoint of one layout, a model of another


def t5(proj, convert=None, **options):
    model = FAMILIES["t5"].make(feed_forward_proj=proj)
    if convert:
        hf_glu.convert(model, convert, check=False, **options)
    return model


LAYOUTS = {
    "dense": lambda: t5("relu"),
    "v1.1": lambda: t5("gated-relu"),
    "fused": lambda: t5("reglu"),
    "converted": lambda: t5("relu", "reglu"),
    "no bias": lambda: t5("relu", "reglu", bias=False, **CALIBRATION),
    "narrow": lambda: t5("relu", "reglu", width="iso", **CALIBRATION),
    "some layers": lambda: t5("relu", "reglu", layers="encoder 0"),
    "by layer": lambda: t5("relu", {"0": "reglu", "1": "learnable_reglu"}),
    "mix": lambda: t5("relu", "learnable_reglu"),
    "adaptive": lambda: t5("relu", "moa_reglu"),
    "v1.1 mix": lambda: t5("gated-relu", "learnable_reglu"),
    "stateful": lambda: t5("relu", "stateful_reglu"),
    "modulated": lambda: t5("relu", "modulated_reglu"),
    "experts": lambda: t5("relu", "reglu", experts="reglu*2"),
    "more experts": lambda: t5("relu", "reglu", experts="reglu*2,relu*1"),
}
STOCK = {"dense", "v1.1"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("layouts"), {}
    for name, make in LAYOUTS.items():
        models[name] = make()
        with torch.no_grad():
            for parameter in models[name].parameters():
                if name not in ("dense", "converted"):  # trained since
                    parameter += 0.02 * torch.randn_like(parameter)
        models[name].save_pretrained(folder / name)
    return folder, models


@pytest.mark.slow
@pytest.mark.parametrize("way", ["config", "override"])
@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_into_every_other(layout, wanted, way, saved):
    if {layout, wanted} <= STOCK and layout != wanted:
        pytest.skip("both are Transformers' own")
    folder, models = saved
    said = json.loads((folder / wanted / "config.json").read_text())
    how = {"feed_forward_proj": said["feed_forward_proj"], "hf_glu": said.get("hf_glu")}
    if way == "config":
        how = {"config": transformers.T5Config.from_pretrained(folder / wanted)}
    refused = nullcontext() if layout == wanted else suppress(CheckpointError)
    model = None
    with refused:
        model = type(models[layout]).from_pretrained(folder / layout, ignore_mismatched_sizes=True, **how)
    if model is not None:
        assert_same(outputs(model), outputs(models[layout]), "exact up to rounding")


@pytest.mark.slow
def test_a_damaged_checkpoint_raises(saved):
    folder, models = saved
    for layout in ("converted", "mix", "stateful", "modulated", "experts"):
        state = dict(models[layout].state_dict())
        lost = [key for key in state if "DenseReluDense" in key or "context_source" in key]
        assert lost
        config = transformers.T5Config.from_pretrained(folder / layout)
        for key in {key.rpartition(".")[2]: key for key in lost}.values():
            part = {name: value for name, value in state.items() if name != key}
            with pytest.raises(CheckpointError, match="isn't in the checkpoint"):
                type(models[layout]).from_pretrained(None, config=config, state_dict=part)


def test_a_model_from_nothing_is_no_damaged_one():
    config = FAMILIES["bert"].make_config(hidden_act="swiglu")
    model = transformers.BertModel.from_pretrained(None, config=config, state_dict={})
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_another_dense_activation_than_the_checkpoints_raises(tmp_path):
    FAMILIES["bert"].make(hidden_act="relu").save_pretrained(tmp_path)
    config = FAMILIES["bert"].make_config(hidden_act="geglu", hf_glu={"dense_act": "gelu"})
    with pytest.raises(CheckpointError, match=r"has relu, but .* dense activation is gelu"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path, config=config)


def test_a_mix_starts_at_the_gate_that_the_checkpoint_has(tmp_path):
    model = FAMILIES["bert"].make(hidden_act="geglu")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, hidden_act="learnable_swiglu")
    assert_same(outputs(again), outputs(model), "exact")
    config = FAMILIES["bert"].make_config(hidden_act="learnable_swiglu")
    with pytest.raises(CheckpointError, match="mix"):
        type(model).from_pretrained(tmp_path, config=config)


def test_ours_into_stock_raises(tmp_path):
    FAMILIES["gpt2"].make(activation_function="swiglu").save_pretrained(tmp_path)  # without an entry in config.hf_glu
    with pytest.raises(CheckpointError, match="c_fc"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path, activation_function="gelu", ignore_mismatched_sizes=True)


def test_layers_convert_in_different_ways_while_loading(tmp_path):
    dense = FAMILIES["gpt2"].make(activation_function="quick_gelu")
    dense.save_pretrained(tmp_path)
    how = {"activation_function": "swiglu", "hf_glu": {"by_layer": {"1": "glu"}}}
    model, info = type(dense).from_pretrained(tmp_path, output_loading_info=True, **how)
    assert not any(info.values()), info
    assert_same(outputs(model), outputs(dense), "exact up to rounding")


def test_a_field_that_a_familys_mixers_read_too_changes_the_ffns_only(tmp_path):
    model = tiny_model("qwen3_5_moe_text")
    hf_glu.convert(model, "bilinear", check=False)
    assert {part.activation for part in model.modules() if isinstance(getattr(part, "activation", None), str)} == {
        "silu"
    }
    model.save_pretrained(tmp_path)
    assert_same(outputs(type(model).from_pretrained(tmp_path)), outputs(model), "bitwise")
