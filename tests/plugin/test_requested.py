"""Steering by request: what a generation config asks for, which modulations the operator has named, what is refused."""

from __future__ import annotations

import asyncio
import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import steered
import torch
from comparing import assert_same
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import is_serve_available

import hf_glu
from hf_glu import plugin
from hf_glu.errors import HfGluError, OptionError, UnknownNameError
from hf_glu.plugin.generation import check_reached
from hf_glu.plugin.modulations import read_wanted

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
WITH_LOGITS = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
PATCHED = ("generate", "init_continuous_batching", "generate_batch")
IDS = steered.ids(2, 5)


@pytest.fixture(scope="module")
def model():
    return steered.make("llama")


@pytest.fixture(scope="module")
def glad(model):
    return steered.fit(model, slopes=True)


@pytest.fixture(scope="module")
def folders(model, glad, tmp_path_factory):
    root = tmp_path_factory.mktemp("named")
    glad.save(root / "glad")
    steered.fit(model, layers=[0], method="diffmean").save(root / "formal.safetensors")
    steered.fit(steered.make("gpt2")).save(root / "other")
    return {"glad": str(root / "glad"), "formal": str(root / "formal.safetensors"), "other": str(root / "other")}


@pytest.fixture
def named(folders, monkeypatch):
    """Name the modulations, as the process that is started by the operator has them."""
    hf_glu.unregister()
    monkeypatch.setenv(plugin.MODULATIONS, json.dumps(folders))
    hf_glu.register()
    yield folders
    hf_glu.unregister()


def generate(model, modulation=None, *, ids=IDS, **more):
    """Return the tokens and the logits of a generation whose config asks for a modulation."""
    asked = {} if modulation is None else {"modulation": modulation}
    out = model.generate(ids, generation_config=GenerationConfig(**{**WITH_LOGITS, **asked, **more}))
    return {"tokens": out.sequences, "logits": torch.stack(out.logits)}


def by_block(model, made, *args, **kwargs):
    with made.on(model, *args, **kwargs):
        return generate(model)


@pytest.mark.parametrize("strength", [1.5, -2, 0.25])
def test_a_request_is_steered_as_within_the_block(named, model, glad, strength):
    plain, found = generate(model), generate(model, {"glad": strength})
    assert_same(found, by_block(model, glad, strength), "bitwise")
    assert (found["logits"] - plain["logits"]).abs().max() > 0.01
    assert_same(generate(model), plain, "bitwise")  # nothing is left on the model


@pytest.mark.parametrize("tokens", ["generated", "last", "all"])
def test_a_request_says_which_tokens(named, model, glad, tokens):
    found = generate(model, {"glad": {"strength": 1.5, "tokens": tokens}})
    assert_same(found, by_block(model, glad, 1.5, tokens=tokens), "bitwise")
    alike = torch.equal(found["logits"], generate(model, {"glad": 1.5})["logits"])
    assert alike == (tokens == "all")
    first = torch.equal(found["logits"][0], generate(model)["logits"][0])  # of the prompt's last token
    assert first == (tokens == "generated")


def test_several_are_their_sum_whatever_their_order(named, model, glad, folders):
    formal = hf_glu.GateModulation.load(folders["formal"])
    expected = by_block(model, 1.5 * glad - 0.5 * formal)
    for asked in ({"glad": 1.5, "formal": -0.5}, {"formal": -0.5, "glad": 1.5}):
        assert_same(generate(model, asked), expected, "exact up to rounding")
    assert (expected["logits"] - by_block(model, glad, 1.5)["logits"]).abs().max() > 1e-3
    with glad.on(model, 1.5), formal.on(model, -0.5, tokens="generated"):
        expected = generate(model)
    found = generate(model, {"formal": {"strength": -0.5, "tokens": "generated"}, "glad": 1.5})
    assert_same(found, expected, "exact up to rounding")


def test_the_models_own_config_stands_where_a_request_says_nothing(named, glad):
    model = steered.make("llama")
    plain, steered_so = generate(model), by_block(model, glad, 1.5)
    model.generation_config.modulation = {"glad": 1.5}
    assert_same(generate(model), steered_so, "bitwise")
    assert_same({"tokens": model.generate(IDS, **GREEDY)}, {"tokens": steered_so["tokens"]}, "bitwise")
    assert_same(generate(model, {}), plain, "bitwise")
    assert_same(generate(model, {"glad": -2}), by_block(steered.make("llama"), glad, -2), "bitwise")


def test_a_config_that_asks_is_copied_saved_and_compared_as_any_other(named, model, tmp_path):
    config = GenerationConfig(**WITH_LOGITS, modulation={"glad": {"strength": 1.5, "tokens": "generated"}})
    config.save_pretrained(tmp_path)
    expected = generate(model, config.modulation)
    for same in (copy.deepcopy(config), GenerationConfig.from_pretrained(tmp_path)):
        assert same.modulation == config.modulation
        assert same == config
        assert hash(same) == hash(config)
        assert torch.equal(model.generate(IDS, generation_config=same).sequences, expected["tokens"])
    assert config != GenerationConfig(**WITH_LOGITS, modulation={"glad": 1.5})
    assert not config.disable_compile  # the caller's own is as it was


def test_two_requests_at_once_do_not_mix(named, model, glad):
    asked = [{"glad": 1.5}, None, {"glad": {"strength": -2, "tokens": "generated"}}, {"formal": 3}] * 3
    expected = [generate(model, each) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: generate(model, each), asked))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, "bitwise")
    assert len({each["logits"].sum().item() for each in expected}) == 4


def test_an_assistant_proposes_unsteered_and_changes_nothing(named, model, glad):
    expected = generate(model, {"glad": 1.5}, ids=IDS[:1])
    config = GenerationConfig(**GREEDY, modulation={"glad": 1.5})
    assistant = steered.make("llama", seed=1)  # of which the modulation isn't
    found = model.generate(IDS[:1], generation_config=config, assistant_model=assistant)
    assert torch.equal(found, expected["tokens"])


def test_a_steered_generate_is_not_compiled_for_each_strength(named, model, glad):
    def never(*_):
        raise AssertionError("compiled")

    config = CompileConfig(backend=never, fullgraph=False, mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    with pytest.raises(Exception, match="compiled"):
        generate(model, **static)
    torch.compiler.reset()
    found = generate(model, {"glad": 1.5}, **static)
    assert_same(found, by_block(model, glad, 1.5), "exact up to rounding")


def test_strengths_of_zero_steer_nothing(named, model):
    assert read_wanted({"glad": 0, "formal": {"strength": 0.0}}) == ()
    assert_same(generate(model, {"glad": 0.0}), generate(model), "bitwise")


# what a request says -> what it is told
REFUSED = {
    "unknown": ({"sad": 1.0}, "unknown modulation 'sad'; known: formal, glad, other"),
    "path": ({"/etc": 1.0}, "unknown modulation '/etc'; known"),
    "no object": (1.5, "names and strengths, such as {'glad': 1.5}"),
    "list": ([{"glad": 1.5}], "names and strengths, such as"),
    "text": ({"glad": "1.5"}, "'glad' has one number as its strength"),
    "true": ({"glad": True}, "'glad' has one number as its strength"),
    "null": ({"glad": None}, "'glad' has one number as its strength"),
    "several": ({"glad": [1.5, 2.0]}, "'glad' has one number as its strength"),
    "no strength": ({"glad": {"tokens": "all"}}, "'glad' has one number as its strength"),
    "not a number": ({"glad": float("nan")}, "finite"),
    "too large": ({"glad": 1e300}, "finite"),
    "far too large": ({"glad": 10**400}, "finite"),
    "tokens": ({"glad": {"strength": 1, "tokens": "generate"}}, "unknown tokens 'generate'; did you mean 'generated'"),
    "key": ({"glad": {"strenght": 1}}, "unknown key 'strenght' in modulation 'glad'; did you mean 'strength'"),
    "another model": ({"other": 1.0}, "modulation 'other': the modulation is of another model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_request_cannot_ask_for_is_one_line(named, model, name):
    asked, line = REFUSED[name]
    with pytest.raises(HfGluError) as caught:
        generate(model, asked)
    assert line in str(caught.value)
    assert not set('"\\\n') & set(str(caught.value))  # Transformers' server puts it into JSON as it is


def test_an_entry_that_is_nearly_ours_is_not_passed_over(named, model):
    for name in ("modulations", "Modulation", "modulaton"):
        with pytest.raises(UnknownNameError, match=f"unknown entry '{name}' of a generation config; did you mean"):
            model.generate(IDS, generation_config=GenerationConfig(**GREEDY, **{name: {"glad": 1.5}}))
    with pytest.raises(OptionError, match="said in a generation config"):
        model.generate(IDS, **GREEDY, modulation={"glad": 1.5})


def test_continuous_batching_is_refused_not_unsteered(named, model):
    asked = GenerationConfig(**GREEDY, modulation={"glad": 1.5})
    for batch in (
        lambda: model.generate_batch(IDS.tolist(), generation_config=asked),
        lambda: model.init_continuous_batching(asked),
        lambda: model.generate(IDS, generation_config=asked, cache_implementation="paged"),
        lambda: model.generate_batch(IDS.tolist(), GenerationConfig(**GREEDY), modulation={"glad": 1.5}),
    ):
        with pytest.raises(OptionError, match="modulation"):
            batch()
    with pytest.raises(OptionError, match="one row"):
        model.init_continuous_batching(generation_config=asked)
    assert model.init_continuous_batching(GenerationConfig(**GREEDY, modulation={})) is not None


def test_a_generate_that_the_hook_does_not_reach_is_told(named):
    class Own(type(steered.make("llama"))):
        def generate(self, inputs, generation_config=None, **kwargs):  # as MusicGen's, Janus' and RAG's begin
            config, _ = self._prepare_generation_config(generation_config, **kwargs)
            return torch.cat([inputs, inputs[:, -1:].repeat(1, config.max_new_tokens)], dim=1)

    model = steered.make("llama")
    check_reached(model)
    with hf_glu.modulation(model, threshold=0.1):
        check_reached(model)
    model.__class__ = Own
    with pytest.raises(OptionError, match="Own has a generate of its own"):
        check_reached(model)
    assert len(model.generate(IDS, generation_config=GenerationConfig(**GREEDY))) == 2
    with pytest.raises(OptionError, match="Own has a generate of its own"):
        model.generate(IDS, generation_config=GenerationConfig(**GREEDY, modulation={"glad": 1.5}))


def test_nothing_is_patched_where_no_modulation_is_named(named, monkeypatch, model):
    assert GenerationMixin.generate.hf_glu_steers
    hf_glu.unregister()
    stock = {name: getattr(GenerationMixin, name) for name in PATCHED}
    assert all(each.__module__.startswith("transformers") for each in stock.values())
    assert "init_continuous_batching" not in vars(GenerationMixin)  # it is another class's
    monkeypatch.delenv(plugin.MODULATIONS)
    hf_glu.register()
    assert {name: getattr(GenerationMixin, name) for name in PATCHED} == stock
    assert not plugin.STEERED.keys() & plugin.hooked().keys()


needs_server = pytest.mark.skipif(not is_serve_available(), reason="pip install transformers[serving]")


@needs_server
@pytest.mark.parametrize("kind", ["GenerateManager", "CBGenerateManager"])
def test_a_server_answers_400_with_the_line_whether_it_streams_or_not(named, model, kind):
    from fastapi import HTTPException
    from transformers.cli.serving import utils

    manager = getattr(utils, kind)()
    line = "one row" if kind == "CBGenerateManager" else "another model"
    asked = GenerationConfig(**GREEDY, modulation={"other": 1.0})

    async def ask(method):
        found = getattr(manager, method)(model, None, {"input_ids": IDS}, asked, request_id="1")
        return await found if asyncio.iscoroutine(found) else found

    for method in ("generate_streaming", "generate_non_streaming"):
        with pytest.raises(HTTPException) as caught:
            asyncio.run(ask(method))
        assert caught.value.status_code == 400
        assert line in caught.value.detail
    if kind == "CBGenerateManager":
        with pytest.raises(HTTPException):
            manager.init_cb(model, asked)


@needs_server
def test_a_server_tells_what_is_known_only_as_the_model_runs(named):
    from fastapi import HTTPException
    from transformers.cli.serving.utils import GenerateManager

    model = steered.make("llama")
    asked = GenerationConfig(**GREEDY, modulation={"glad": {"strength": 1.0, "tokens": "generated"}})
    model.model.layers[0].mlp.act_fn.register_forward_pre_hook(lambda act, args: (args[0].flatten(0, 1)[1:],))
    with pytest.raises(HTTPException) as caught:
        asyncio.run(GenerateManager().generate_non_streaming(model, None, {"input_ids": IDS}, asked, request_id="1"))
    assert "steer all tokens alike" in caught.value.detail
