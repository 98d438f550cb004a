"""Saving and loading: bitwise in a fresh process, and never a lie."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from comparing import assert_same, fresh_process, outputs
from pico import FAMILIES
from torch.utils.data import DataLoader
from transformers.activations import ACT2FN

import hf_glu
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.errors import CheckpointError
from hf_glu.ffn.config_fields import activation_of
from hf_glu.instruments.probe import probe_inputs

THREE = ("bert", "gpt2", "t5")


def converted(family, head=None):
    model = FAMILIES[family].make(head)
    hf_glu.convert(model, FAMILIES[family].exact)
    for site in hf_glu.find_sites(model):
        site.in_proj.weight.data += 0.01 * torch.randn_like(site.in_proj.weight)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_family_loads_again_bitwise(family, sharded, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")
    assert_same(dict(again.state_dict()), dict(model.state_dict()), "bitwise")
    tied = again.get_output_embeddings()
    if tied is not None and again.config.tie_word_embeddings:
        assert tied.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("family", THREE)
def test_base_model_and_head_load_each_other(family, tmp_path):
    head = {
        "bert": "BertForSequenceClassification",
        "gpt2": "GPT2ForTokenClassification",
        "t5": "T5ForConditionalGeneration",
    }
    model = converted(family, head[family])
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    for ours, theirs in zip(hf_glu.find_sites(base), hf_glu.find_sites(model), strict=True):
        assert torch.equal(ours.in_proj.weight, theirs.in_proj.weight)
    base.save_pretrained(tmp_path / "base")
    again, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any("intermediate" in key or "mlp" in key or "Dense" in key for key in info["missing_keys"])
    for ours, theirs in zip(hf_glu.find_sites(again), hf_glu.find_sites(model), strict=True):
        assert torch.equal(ours.in_proj.weight, theirs.in_proj.weight)


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_unregistered_loading_raises(family, options, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path)
    hf_glu.unregister()
    with pytest.raises(KeyError, match=f"^'{FAMILIES[family].exact}'$"):
        type(model).from_pretrained(tmp_path, **options)


@pytest.mark.slow
def test_without_the_plugin_loading_raises(tmp_path):
    code = """
import sys, transformers
for name, folder, activation in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    for options in ({}, {"ignore_mismatched_sizes": True}):
        try:
            getattr(transformers, name).from_pretrained(folder, **options)
        except KeyError as error:
            assert error.args == (activation,), error
        else:
            raise SystemExit(f"{name} was loaded")
"""
    arguments = []
    for family in THREE:
        model = converted(family)
        model.save_pretrained(tmp_path / family)
        arguments += [type(model).__name__, str(tmp_path / family), FAMILIES[family].exact]
    done = fresh_process(code, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_checkpoint_with_a_gated_config_raises(family, ignore, tmp_path):
    made = FAMILIES[family]
    made.make().save_pretrained(tmp_path)
    model_class = getattr(transformers, made.heads[0])
    with pytest.raises(CheckpointError, match=r"hf_glu\.convert\(model, 'mish_glu'"):  # no exact route
        model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore, **{made.field: "mish_glu"})
    config = made.make_config(**{made.field: made.exact})  # the checkpoint's own activation isn't known
    with pytest.raises(CheckpointError, match="hf-glu convert"):
        model_class.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=ignore)


def test_a_gated_checkpoint_with_a_dense_config_raises(tmp_path):
    converted("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="gelu"):
        transformers.BertModel.from_pretrained(tmp_path, hidden_act="gelu", ignore_mismatched_sizes=True)


def test_other_mismatches_are_still_the_users_to_ignore(tmp_path):
    model = converted("bert", "BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert again.classifier.out_features == 5


def test_a_checkpoint_without_an_activations_parameters_loads_defined_values(tmp_path):
    FAMILIES["gpt2"].make(activation_function="swiglu").save_pretrained(tmp_path)
    for elementwise in ("prelu", "xielu"):
        name = f"{elementwise}_glu"
        model, info = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path, activation_function=name, output_loading_info=True
        )
        assert any("phi" in key for key in info["missing_keys"])
        fresh = ACT2FN[elementwise].float()
        for site in hf_glu.find_sites(model):
            assert_same(dict(site.act.phi.state_dict()), dict(fresh.state_dict()), "bitwise")
            for key, value in fresh.named_buffers():
                assert_same(site.act.phi.get_buffer(key), value, "bitwise")


@pytest.mark.parametrize(
    ("family", "target", "layers"), [("apertus", "stateful_xielu", "every 2"), ("llama", "xielu_glu", None)]
)
def test_an_activations_parameters_keep_their_dtype(family, target, layers, tmp_path):
    model = tiny_model(family)  # in float32; Transformers builds xIELU in bfloat16 where a class doesn't say otherwise
    hf_glu.convert(model, target, layers=layers, calibration=probe_inputs(model)["input_ids"], distill_steps=0)
    for key, parameter in model.named_parameters():
        if "alpha" in key:
            parameter.data.add_(1e-4)  # what bfloat16 can't say
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same(dict(again.state_dict()), dict(model.state_dict()), "bitwise")
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("family", ["bert", "gpt2", "jina_embeddings_v3", "llama", "t5", "mamba"])
def test_what_an_activation_has_is_of_the_models_dtype(family, tmp_path):
    model = tiny_model(family).to(torch.bfloat16)  # one's own dtype is no example, wherever a class builds it
    own = activation_of(model.config)
    hf_glu.convert(model, f"modulated_{own}" if family == "mamba" else f"modulated_stateful_{own}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert_same(dict(type(model).from_pretrained(tmp_path).state_dict()), dict(model.state_dict()), "bitwise")


def test_loaded_parameters_of_an_activation_are_not_initialised_again(tmp_path):
    model = FAMILIES["gpt2"].make(activation_function="prelu_glu")
    for site in hf_glu.find_sites(model):
        site.act.phi.weight.data.fill_(0.77)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(site.act.phi.weight.item() == pytest.approx(0.77) for site in hf_glu.find_sites(again))


@pytest.mark.parametrize("family", THREE)
def test_deepcopy_torch_save_and_pickle(family):
    model = converted(family)
    expected = outputs(model)
    twin = copy.deepcopy(model)
    assert_same(outputs(twin), expected, "bitwise")
    twin.train()
    assert not model.training
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(outputs(torch.load(buffer, weights_only=False)), expected, "bitwise")
    assert_same(outputs(pickle.loads(pickle.dumps(model))), expected, "bitwise")


class _Scores(torch.utils.data.Dataset):
    """A data set that runs the model in the loader's worker processes."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs

    def __len__(self):
        return 2

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return outputs(self.model, **self.inputs)["logits"]


@pytest.mark.slow
def test_pickled_to_a_spawned_data_loader_worker():
    model = converted("bert")
    inputs = hf_glu.instruments.probe.probe_inputs(model)
    loader = DataLoader(_Scores(model, inputs), num_workers=1, multiprocessing_context="spawn")
    expected = outputs(model, **inputs)["logits"]
    for batch in loader:
        assert_same(batch[0], expected, "bitwise")
