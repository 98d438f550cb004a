"""What can't be is one line, found before the work: wrong values, paths, models; and what a config doesn't say."""

import time

import pytest
import torch
import transformers
from comparing import assert_same, outputs
from pico import FAMILIES, make_native
from source import FILES, PACKAGE
from versions import needs_family

import hf_glu
from hf_glu import cli
from hf_glu.bench.coverage import tiny
from hf_glu.bench.coverage.survey import _exact_target
from hf_glu.checkpoint.writing import check_file, check_folder
from hf_glu.config.traits import longest_text, text_config, token_id, vocabulary
from hf_glu.errors import CheckpointError, HfGluError, OptionError
from hf_glu.ffn.sites import convertible_sites
from hf_glu.instruments.probe import CHARACTERS, probe_inputs, run
from hf_glu.training.data.features import check_length
from hf_glu.training.data.models import give_padding
from hf_glu.training.filling import read_yaml

_TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": 8, "patch_size": 4}
del _VISION["vocab_size"]


def _gemma3(**text):
    return transformers.Gemma3Config(
        text_config={**_TEXT, "num_key_value_heads": 2, "head_dim": 8, **text}, vision_config=_VISION,
        mm_tokens_per_image=4,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # MobileBERT's
@pytest.mark.parametrize("family", ["canine", "cpmant", "funnel", "mobilebert", "perceiver", "roc_bert", "xlnet"])
def test_the_readmes_call_needs_no_attribute_that_a_family_lacks(family):
    model = tiny.tiny_model(family)
    report = hf_glu.convert(model, _exact_target(model, convertible_sites(model)))
    assert report.plan.promise == "exact"
    assert report.max_abs_difference <= 1e-6


def test_what_configs_say():
    xlnet, funnel = transformers.XLNetConfig(), transformers.FunnelConfig(vocab_size=40)
    assert (longest_text(xlnet), token_id(xlnet, "eos_token_id")) == (None, 2)
    assert (longest_text(funnel), vocabulary(funnel), token_id(funnel, "eos_token_id")) == (None, 40, None)
    assert (longest_text(transformers.T5Config()), longest_text(transformers.GPT2Config())) == (None, 1024)
    assert longest_text(transformers.RobertaConfig(max_position_embeddings=66, pad_token_id=1)) == 64
    gemma = _gemma3(pad_token_id=3, max_position_embeddings=77, eos_token_id=[5, 6])
    assert (vocabulary(gemma), longest_text(gemma), token_id(gemma, "pad_token_id")) == (64, 77, 3)
    assert token_id(transformers.BertConfig(eos_token_id=[5, 6]), "eos_token_id") == 5
    assert token_id(transformers.BertConfig(pad_token_id=None), "pad_token_id") is None
    assert vocabulary(transformers.ViTConfig()) is None
    assert text_config(gemma) is gemma.text_config


def test_a_family_without_a_vocabulary_reads_characters():
    model = tiny.tiny_model("canine")
    ids = probe_inputs(model)["input_ids"]
    assert ids.max() < CHARACTERS
    assert len(ids.unique()) > 5
    report = hf_glu.convert(model, "geglu", width="iso", calibration=ids)
    assert all(site.fit for site in report.sites)


@pytest.mark.parametrize(
    ("family", "target", "why"),
    [
        ("neomme", "relu2glu", "can't say what is asked for: Validation error for field 'hidden_act'"),
        ("reformer", "stateful_reglu", "runs its layers again without their texts"),
        ("reformer", "modulated_reglu", "runs its layers again without their texts"),
        ("xlnet", "stateful_geglu", "transposed"),
        ("zamba", "moa_glu", r"share all they have by names, and \S+annealed is no parameter"),
        ("zamba", "modulated_xielu", r"share all they have by names, and \S+beta is no parameter"),
    ],
)
def test_what_a_family_cannot_have_is_refused_and_changes_nothing(family, target, why):
    needs_family(family)
    model = tiny.tiny_model(family)
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(HfGluError, match=why):
        hf_glu.convert(model, target)
    assert_same(dict(model.state_dict()), state, "bitwise")
    assert model.config.to_dict() == config


def test_a_familys_own_experts_are_not_made_of_experts():
    model = tiny.tiny_model("switch_transformers")  # whose class initialises each expert's own projections
    before = dict(model.state_dict())
    with pytest.raises(HfGluError, match="can't be built as it would be"):
        hf_glu.convert(model, "stateful_learnable_geglu", experts=3, top_k=1)
    assert_same(dict(model.state_dict()), before, "bitwise")


def test_what_is_drawn_at_random_is_the_same_each_time():
    model = FAMILIES["bert"].make()
    model.bert.embeddings.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    before, state = run(model, probe_inputs(model)), torch.get_rng_state()
    assert_same(run(model, probe_inputs(model)), before, "bitwise")
    assert torch.equal(torch.get_rng_state(), state)


class _Tokenizer:
    pad_token, eos_token, unk_token, pad_token_id, model_max_length = None, "</s>", None, 7, 10**30


def test_composite_configs_get_their_padding_token_and_have_a_longest_text():
    model = transformers.Gemma3ForSequenceClassification(_gemma3(pad_token_id=None, max_position_embeddings=50))
    give_padding(model, _Tokenizer())
    assert model.config.get_text_config().pad_token_id == 7
    ids = torch.tensor([[8, 9, 7, 7]])
    assert_same(run(model, {"input_ids": ids})["logits"], run(model, {"input_ids": ids[:, :2]})["logits"], "exact")
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = 0  # another one than the tokenizer's
    give_padding(model, _Tokenizer())
    assert model.config.pad_token_id == model.config.get_text_config().pad_token_id == 7
    check_length(50, model.config, _Tokenizer())
    with pytest.raises(OptionError, match="reads 50 tokens"):
        check_length(51, model.config, _Tokenizer())
    check_length(5_000, transformers.XLNetConfig(), _Tokenizer())


def _images(kind):
    torch.manual_seed(0)
    config = {
        "CLIPModel": lambda: transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8),
        "SiglipModel": lambda: transformers.SiglipConfig(text_config=_TEXT, vision_config=_VISION),
        "ViltModel": lambda: transformers.ViltConfig(**_TEXT, image_size=8, patch_size=4),
        "ViTModel": lambda: transformers.ViTConfig(**_VISION),
    }[kind]()
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel", "ViltModel", "ViTModel"])
def test_models_of_images_say_which_inputs_they_need(kind):
    model = _images(kind)
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(OptionError, match=r"give inputs=\{...\}") as raised:
        hf_glu.convert(model, "learnable_swiglu")
    assert kind == "ViTModel" or "it takes pixel_values" in str(raised.value)
    assert_same(dict(model.state_dict()), state, "bitwise")
    assert model.config.to_dict() == config
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8)}
    if kind != "ViTModel":
        inputs["input_ids"] = torch.arange(5, 11).view(1, 6)
    assert hf_glu.convert(model, "learnable_swiglu", inputs=inputs).max_abs_difference < 1e-6


@pytest.mark.parametrize("target", [5, 5.0, True, [], ["geglu"], b"geglu", {}, {"0": 5}, {0: "geglu"}, object()])
@pytest.mark.parametrize("experts", [None, 4])
def test_a_target_that_is_no_name(target, experts):
    model = FAMILIES["bert"].make()
    before = outputs(model)
    with pytest.raises(HfGluError) as raised:
        hf_glu.convert(model, target, experts=experts)
    assert "\n" not in str(raised.value)
    assert_same(outputs(model), before, "bitwise")


@pytest.mark.parametrize("source", [5, None, object(), "a\0b", "n" * 300, "~nobody-of-this-name/x"])
@pytest.mark.parametrize("call", [hf_glu.export, hf_glu.convert_checkpoint, lambda a, b: hf_glu.verify(str(a), a)])
def test_what_is_no_checkpoint(call, source, tmp_path):
    with pytest.raises(HfGluError):
        call(source, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_model_is_no_checkpoint_to_export(tmp_path):
    with pytest.raises(CheckpointError, match="BertForMaskedLM is no checkpoint"):
        hf_glu.export(FAMILIES["bert"].make(), tmp_path / "new")


def test_other_vocabularies_are_not_compared():
    with pytest.raises(OptionError, match="61 and 99 tokens"):
        hf_glu.verify(FAMILIES["bert"].make("BertModel"), FAMILIES["bert"].make("BertModel", vocab_size=99))
    with pytest.raises(OptionError, match="doesn't run on input_ids"):
        hf_glu.verify(
            FAMILIES["bert"].make("BertModel", vocab_size=99), FAMILIES["bert"].make("BertModel"),
            inputs={"input_ids": torch.tensor([[98]])},
        )  # fmt: skip


@pytest.fixture
def blocked(tmp_path):
    """Return paths that can't be written: below a file, too long, with a zero byte, of a user that there isn't."""
    (tmp_path / "file").write_text("x")
    return [tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", tmp_path / ("n" * 300), "a\0b", "~nobody-of-this/x"]


def test_what_cannot_be_written_is_said_before(blocked, tmp_path):
    for path in blocked:
        for check in (check_file, check_folder):
            with pytest.raises(CheckpointError, match="can't be written"):
                check(path)
    with pytest.raises(CheckpointError, match="Is a directory"):
        check_file(tmp_path)
    assert check_file(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_folder(tmp_path / "new" / "er") == tmp_path / "new" / "er"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x80", b"a: 2020-13-45", b"[" * 100_000, b"- 1", b""])
def test_a_file_of_options_that_is_none(content, tmp_path):
    (tmp_path / "o.yaml").write_bytes(content)
    with pytest.raises(OptionError, match=r"o\.yaml"):
        read_yaml(tmp_path / "o.yaml")


@pytest.fixture
def dense(tmp_path):
    FAMILIES["gpt2"].make().save_pretrained(tmp_path / "gpt2")
    make_native("mixtral").save_pretrained(tmp_path / "mixtral")
    (tmp_path / "file").write_text("x")
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n' * 4)
    return tmp_path


# the command, with @ for the folder
_LINES = [
    "convert @gpt2 @new --to geglu_new --experts nope*4",
    "convert @gpt2 @new --to geglu_new --experts relu*999999999999",
    "convert @gpt2 @new --to geglu_new --experts geglu_new*4 --layers 9",
    "convert @gpt2 @new --to swigul --experts 4",
    "convert @mixtral @new --experts silu*3",
    "convert @mixtral @new --experts nope*2",
    "convert @gpt2 @new --to " + "stateful_modulated_" * 500 + "swiglu",
    "convert @gpt2 @file/new --to geglu_new",
    "verify @gpt2 @gpt2 --tolerance nan",
    "coverage --markdown @file/x",
    "coverage --markdown @gpt2",
    "gates @gpt2 --text a --html @gpt2",
    "bench whole --save @gpt2",
    "activations --plot @file/x.png",
    "finetune --model @gpt2 --dataset @data.jsonl --output @file/x",
    "compare --model @gpt2 --dataset @data.jsonl --output @file/x",
    "finetune --config @gpt2/model.safetensors",
]


@pytest.mark.parametrize("line", _LINES)
def test_one_line_and_exit_code_2_before_the_weights_are_read(line, dense, capsys, monkeypatch):
    reached = []
    monkeypatch.setattr(
        "hf_glu.checkpoint.convert.load_model", lambda *a, **k: reached.append(a) or pytest.fail("loaded")
    )
    monkeypatch.setattr("hf_glu.checkpoint.verification.load_model", lambda *a, **k: pytest.fail("loaded"))
    start = time.perf_counter()
    code = cli.run([part.replace("@", f"{dense}/") for part in line.split()])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    errors = [text for text in captured.err.splitlines() if text.startswith("hf-glu: ")]
    assert len(errors) == 1
    assert len(errors[0]) < 1_500
    assert captured.out == ""
    assert not reached
    assert time.perf_counter() - start < 20
    assert not (dense / "new").exists()


def test_only_the_registry_takes_names_apart():
    prefixes = ("stateful_", "modulated_", "learnable_", "moa_")
    taking = [f'{how}("{prefix}' for prefix in prefixes for how in ("removeprefix", "startswith", "partition", "split")]
    found = [path.relative_to(PACKAGE) for path in FILES if any(part in path.read_text() for part in taking)]
    assert not found


def test_weights_that_a_quantizer_has_made_are_refused():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = FAMILIES["bert"].make()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(HfGluError, match="a weight of the class Int8Tensor"):
        hf_glu.convert(model, "geglu")


@pytest.mark.parametrize(("batch", "why"), [
    ({"input_ids": [5, 6, 7, 8]}, r"whole numbers \[sequences, length\], got torch.int64 \[4\]"),
    ({"input_ids": torch.ones(2, 12)}, "whole numbers .* got torch.float32"),
    ({"text": "hello"}, "calibration text must be a tensor, got 'hello'"),
    ({"input_ids": torch.full((2, 12), 61)}, "must be from 0 to 60, got 61 to 61"),
    ({"input_ids": torch.ones(2, 65, dtype=torch.long)}, "65 tokens, and the model 64 positions"),
])  # fmt: skip
def test_calibration_that_a_model_cannot_read_is_one_line(batch, why):
    with pytest.raises(OptionError, match=why):
        hf_glu.convert(FAMILIES["bert"].make(), "geglu", width=20, distill_steps=0, calibration=[batch])


def test_calibration_may_have_entries_that_are_none():
    ids = torch.arange(24).view(2, 12)
    batches = [{"input_ids": ids, "token_type_ids": None}]
    report = hf_glu.convert(FAMILIES["bert"].make(), "geglu", width=20, distill_steps=0, calibration=batches)
    assert report.sites


def test_a_class_that_takes_more_than_a_config_says_what_can_be_converted():
    class Wider(transformers.BertPreTrainedModel):
        def __init__(self, config, extra):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.post_init()

    model = Wider(FAMILIES["bert"].make_config(), 3)
    with pytest.raises(HfGluError, match=r"its base model can be converted \(\.bert\)"):
        hf_glu.convert(model, "geglu")
    hf_glu.convert(model.bert, "geglu")
    assert model.config.hidden_act == "geglu"
