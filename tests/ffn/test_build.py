"""Stock classes with a gated name in their ordinary config."""

import json

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES, HEADS_OF_ALL, NATIVE, WIDTH, make_native
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config

import hf_glu
from hf_glu.activation.module import GatedActivation
from hf_glu.errors import ConversionError, NoSiteError, OptionError, UnknownNameError
from hf_glu.ffn.build import owned_activations
from hf_glu.ffn.linear import out_features

AUTO = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}


def gated_config(family, name="swiglu", **more):
    return FAMILIES[family].make_config(**{FAMILIES[family].field: name}, **more)


def assert_gated(model, name, sites=None):
    found = hf_glu.find_sites(model)
    assert found
    for site in found if sites is None else [found[i] for i in sites]:
        assert site.activation == name
        assert out_features(site.in_proj) == 2 * WIDTH
        assert site.width == WIDTH
    placed = {id(site.act) for site in found}
    assert all(id(module) in placed for _, module in owned_activations(model)), "a gated activation outside of an FFN"


@pytest.mark.parametrize(("family", "head"), HEADS_OF_ALL)
def test_every_head(family, head):
    config = gated_config(family)
    model = getattr(transformers, head)(config).eval()
    assert_gated(model, "swiglu")
    result = outputs(model)
    assert all(torch.isfinite(value).all() for value in result.values())
    suffix = next((suffix for suffix in AUTO if head.endswith(suffix)), None)
    if suffix and not head.endswith("BertLMHeadModel"):
        assert_gated(getattr(transformers, AUTO[suffix]).from_config(gated_config(family)), "swiglu")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_is_the_formula(family):
    model = getattr(transformers, FAMILIES[family].heads[0])(gated_config(family)).eval()
    site = hf_glu.find_sites(model)[0]
    x = torch.randn(3, site.hidden)
    gate, up = site.in_proj(x).chunk(2, dim=-1)
    assert_same(site.act(site.in_proj(x)), nn.functional.silu(gate) * up, "exact")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient_and_the_initialisation_is_the_familys(family):
    model = getattr(transformers, FAMILIES[family].heads[0])(gated_config(family))
    dense = getattr(transformers, FAMILIES[family].heads[0])(FAMILIES[family].make_config())
    for gated_site, dense_site in zip(hf_glu.find_sites(model), hf_glu.find_sites(dense), strict=True):
        ratio = gated_site.in_proj.weight.std() / dense_site.in_proj.weight.std()
        assert 0.8 < ratio < 1.25
        assert gated_site.in_proj.weight.std() > 0
    model.train()
    result = model(**hf_glu.instruments.probe.probe_inputs(model))
    result[0].pow(2).sum().backward()
    for site in hf_glu.find_sites(model):
        assert site.in_proj.weight.grad.abs().sum() > 0


def test_what_is_no_ffn_keeps_the_dense_activation():
    model = BertForMaskedLM(gated_config("bert"))
    assert isinstance(model.cls.predictions.transform.transform_act_fn, type(transformers.activations.ACT2FN["gelu"]))
    config = gated_config("bert", hf_glu={"dense_act": "relu"})
    assert isinstance(BertForMaskedLM(config).cls.predictions.transform.transform_act_fn, nn.ReLU)
    distil = transformers.DistilBertForMaskedLM(gated_config("distilbert"))
    assert not isinstance(distil.activation, GatedActivation)


@pytest.mark.parametrize(
    ("family", "layers", "gated"),
    [
        ("bert", [1], [1]),
        ("bert", "0", [0]),
        ("gpt2", "every 2", [0]),
        ("t5", "1", [1, 3]),
        ("t5", "encoder", [0, 1]),
        ("t5", {"decoder": [0]}, [2]),
        ("bart", {"encoder": "all", "decoder": "1"}, [0, 1, 3]),
    ],
)
def test_some_layers_gated_others_not(family, layers, gated):
    config = gated_config(family, hf_glu={"layers": layers})
    model = getattr(transformers, FAMILIES[family].heads[0])(config)
    sites = hf_glu.find_sites(model)
    assert [number for number, site in enumerate(sites) if site.activation] == gated
    for number, site in enumerate(sites):
        assert out_features(site.in_proj) == (2 * WIDTH if number in gated else WIDTH)
    outputs(model)
    stack = transformers.T5EncoderModel(config) if family == "t5" else None
    if stack is not None:
        wanted = [number for number in gated if number < 2]
        assert [number for number, site in enumerate(hf_glu.find_sites(stack)) if site.activation] == wanted


def test_stacks_alone_know_which_they_are():
    config = gated_config("bart", hf_glu={"layers": "decoder"})
    from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder

    assert all(site.activation for site in hf_glu.find_sites(BartDecoder(config)))
    assert not any(site.activation for site in hf_glu.find_sites(BartEncoder(config)))


def test_meta_device():
    for family in FAMILIES:
        with torch.device("meta"):
            model = getattr(transformers, FAMILIES[family].heads[0])(gated_config(family, "prelu_glu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert_gated(model, "prelu_glu")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_gradient_checkpointing(family):
    def gradients(checkpointing):
        model = FAMILIES[family].make(**{FAMILIES[family].field: "swiglu"}).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**hf_glu.instruments.probe.probe_inputs(model)).logits.pow(2).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    assert_same(gradients(True), gradients(False), "exact")


def test_feed_forward_chunking():
    whole = FAMILIES["bert"].make(hidden_act="geglu")
    chunked = FAMILIES["bert"].make(hidden_act="geglu", chunk_size_feed_forward=5)
    chunked.load_state_dict(whole.state_dict())
    inputs = {"input_ids": torch.arange(20)[None] % 60}
    assert_same(outputs(chunked, **inputs), outputs(whole, **inputs), "exact")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_half_precision(family, dtype, tmp_path):
    FAMILIES[family].make(**{FAMILIES[family].field: "swiglu"}).save_pretrained(tmp_path)
    model = getattr(transformers, FAMILIES[family].heads[0]).from_pretrained(tmp_path, dtype=dtype)
    assert hf_glu.find_sites(model)[0].in_proj.weight.dtype == dtype
    assert all(torch.isfinite(value).all() for value in outputs(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_compile(family):
    model = FAMILIES[family].make(**{FAMILIES[family].field: "swiglu"})
    inputs = hf_glu.instruments.probe.probe_inputs(model)
    expected = outputs(model, **inputs)["logits"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(**inputs).logits, expected, "exact")


@pytest.mark.parametrize("name", NATIVE)
def test_natively_gated_families_get_the_gates_activation_and_no_second_gate(name):
    field = NATIVE[name][3]
    prefix = "gated-" if field == "feed_forward_proj" else ""
    stock = make_native(name, **{field: f"{prefix}relu"})
    ours = make_native(name, **{field: f"{prefix}reglu"})
    assert not owned_activations(ours)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }
    assert all(type(site.act) is nn.ReLU for site in hf_glu.find_sites(ours))
    assert_same(outputs(ours), outputs(stock), "bitwise")
    with pytest.raises(ConversionError, match="swiglu_oss"):
        make_native(name, **{field: f"{prefix}swiglu_oss"})


def test_config_is_validated_and_round_trips(tmp_path):
    options = {"dense_act": "relu", "bias": True, "layers": "0-1"}
    config = gated_config("t5", "reglu", hf_glu=options)
    assert config.hf_glu == {"version": 1, **options}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hf_glu"] == config.hf_glu
    again = T5Config.from_pretrained(tmp_path)
    assert again.hf_glu == config.hf_glu
    assert again.to_dict() == config.to_dict()
    assert hf_glu.find_sites(transformers.T5EncoderModel(again))[0].in_proj.bias is not None
    changed = T5Config.from_pretrained(tmp_path, hf_glu={"layers": [0]})
    assert changed.hf_glu == {"version": 1, "layers": [0]}


@pytest.mark.parametrize(
    ("entry", "error", "match"),
    [
        ({"lyers": [0]}, UnknownNameError, "layers"),
        ({"bias": "yes"}, OptionError, "bias"),
        ({"layers": "0-x"}, OptionError, "0-x"),
        ({"layers": "3-1"}, OptionError, "3-1"),
        ({"layers": "every 0"}, OptionError, "step"),
        ({"layers": [-1]}, OptionError, "layers"),
        ({"layers": {"middle": [0]}}, OptionError, "middle"),
        ({"version": 2}, OptionError, "upgrade"),
        ({"dense_act": 3}, OptionError, "dense_act"),
        ("layers", OptionError, "dict"),
    ],
)
def test_bad_options_are_refused(entry, error, match):
    with pytest.raises(error, match=match):
        BertConfig(hf_glu=entry)


def test_bad_options_are_refused_by_the_model_too():
    config = gated_config("bert")
    config.hf_glu = {"layers": [7]}
    with pytest.raises(OptionError, match="0 to 1"):
        BertModel(config)
    config.hf_glu = {"lyers": [7]}
    with pytest.raises(UnknownNameError, match="layers"):
        BertModel(config)
    config.hf_glu = {"dense_act": "gelo", "layers": [0]}
    with pytest.raises(UnknownNameError, match="gelu"):
        BertModel(config)


def test_a_model_without_sites_says_so():
    class Strange(transformers.PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.act = transformers.activations.ACT2FN[config.hidden_act]
            self.post_init()

    with pytest.raises(NoSiteError, match="Strange"):
        Strange(gated_config("bert"))


def test_t5_fields_never_go_stale(tmp_path):
    config = FAMILIES["t5"].make_config()
    config.feed_forward_proj = "reglu"
    assert (config.dense_act_fn, config.is_gated_act) == ("reglu", False)
    config.feed_forward_proj = "gated-swiglu"
    assert (config.dense_act_fn, config.is_gated_act) == ("swiglu", True)
    config.feed_forward_proj = "relu"
    assert (config.dense_act_fn, config.is_gated_act) == ("relu", False)
    FAMILIES["t5"].make_config().save_pretrained(tmp_path)
    assert T5Config.from_pretrained(tmp_path, feed_forward_proj="reglu").dense_act_fn == "reglu"
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"feed_forward_proj": "relu"', '"feed_forward_proj": "reglu"'))
    assert T5Config.from_pretrained(tmp_path).dense_act_fn == "reglu"
    hf_glu.unregister()
    stale = T5Config.from_pretrained(tmp_path)
    assert stale.dense_act_fn == "relu"  # what Transformers itself does
    hf_glu.register()
    assert_gated(transformers.T5ForConditionalGeneration(stale), "reglu")


def test_tensor_parallel_plan_leaves_widened_projections_whole():
    dense = transformers.GPTNeoXForCausalLM(FAMILIES["gpt_neox"].make_config())
    gated = transformers.GPTNeoXForCausalLM(gated_config("gpt_neox"))
    dropped = {"gpt_neox.layers.*.mlp.dense_h_to_4h", "gpt_neox.layers.*.mlp.dense_4h_to_h"}
    assert dropped <= set(dense._tp_plan)
    assert set(dense._tp_plan) - set(gated._tp_plan) == dropped
