"""What gates did as people's tools read it: names, one tensor, a frame; of dense and gated FFNs, and of experts."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import accelerate
import banks
import pytest
import torch
from pico import FAMILIES, make_native
from states import awake, ids

import hf_glu
from hf_glu.errors import DataError, MissingPackageError, OptionError, UnknownNameError
from hf_glu.ffn.experts import ExpertFFN
from hf_glu.ffn.experts.native import is_bank
from hf_glu.instruments.recorded import MEASURES
from hf_glu.instruments.steering.places import gate_places

MASK = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
PLAIN = ["layers.0", "layers.1"]
ENCODER = ["encoder.layers.0", "encoder.layers.1"]
EXPERTS = ["layers.0.experts", "layers.1.experts"]


def converted(name: str) -> Any:
    model = FAMILIES[name].make()
    hf_glu.convert(model, FAMILIES[name].exact, check=False)
    return model


def mixed() -> Any:
    model = make_native("mixtral")
    hf_glu.convert(model, experts="silu*1,relu*1", check=False)
    return model


def ours() -> Any:
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "geglu_new", experts="gelu_new*2,geglu_new*2", check=False)
    for module in model.modules():
        if isinstance(module, ExpertFFN):
            torch.nn.init.normal_(module.router.weight)
            for parameter in module.banks.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {
    "gpt2": (FAMILIES["gpt2"].make, PLAIN),
    "bert": (FAMILIES["bert"].make, ENCODER),
    "t5": (FAMILIES["t5"].make, [*ENCODER, "decoder.layers.0", "decoder.layers.1"]),
    "llama": (partial(make_native, "llama"), PLAIN),
    "gpt2 converted": (partial(converted, "gpt2"), PLAIN),
    "bert with states": (partial(awake, "bert"), ENCODER),
    "mixtral": (partial(make_native, "mixtral"), EXPERTS),
    "mixtral, two activations": (mixed, EXPERTS),
    "gpt2 with experts": (ours, EXPERTS),
}


def record(model: Any) -> Any:
    inputs = {"input_ids": ids(2, 7), "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids(2, 3, seed=1)}
    with torch.no_grad(), hf_glu.record_gates(model) as gates:
        model(**inputs)
    return gates


@pytest.mark.parametrize("name", MODELS)
def test_names_tensor_and_frame_are_the_records(name):
    make, places = MODELS[name]
    gates = record(make())
    assert gates.places == places == [one.place for one in gates.layers]
    assert gates.openness.shape == (len(places), 2, 7)
    frame = gates.to_frame()
    assert list(frame) == ["place", "index", "stack", "activation", "sequence", "token", *MEASURES]
    assert len(frame) == sum(one.tokens for one in gates.layers) > 0
    for row, one in zip(gates.openness, gates.layers, strict=True):
        length = one.openness.shape[1]
        assert gates[one.place].layer == one.layer
        torch.testing.assert_close(row[:, :length], one.openness, rtol=0, atol=0, equal_nan=True)
        assert row[:, length:].isnan().all()
        mine = frame[frame["place"] == one.place]
        assert set(mine["activation"]) == {one.activation}
        for key in MEASURES:
            values, known = torch.full(one.openness.shape, torch.nan), getattr(one, key)
            values[mine["sequence"].to_list(), mine["token"].to_list()] = torch.tensor(mine[key].to_list())
            known = values.new_full(values.shape, torch.nan) if known is None else known
            torch.testing.assert_close(values, known, rtol=0, atol=0, equal_nan=True)
    if name == "t5":
        assert gates.tensor(stack="decoder").shape == (2, 2, 3)
        assert not gates.tensor(stack="decoder").isnan().any()


def test_passes_of_another_thread_arent_mixed_in():
    def run(model):
        thread = threading.Thread(target=model, args=(ids(2, 7),))
        thread.start()
        thread.join()

    model = make_native("llama")
    with torch.no_grad(), hf_glu.record_gates(model) as alone:
        model(ids(2, 7))
    with hf_glu.record_gates(model) as gates:
        run(model)
        assert gates.openness.shape == (2, 2, 7)  # a streamer's, say
        with torch.no_grad():
            model(ids(2, 7))
        run(model)
    assert torch.equal(gates.openness, alone.openness)


def test_names_are_those_that_modulations_have():
    for name in ("gpt2", "bert", "t5", "llama", "gpt2 converted"):
        model = MODELS[name][0]()
        assert record(model).places == list(gate_places(model))


@pytest.mark.parametrize("make", [partial(make_native, "mixtral"), ours])
def test_offloaded_experts_are_told_of(make):
    model = accelerate.cpu_offload(make().eval(), execution_device="cpu")
    with pytest.raises(OptionError, match="offloaded"):
        record(model)


def of_native(bank: Any, x: Any, expert: int) -> Any:
    return x @ bank.gate_up_proj[expert].chunk(2)[0].T


def of_gpt_oss(bank: Any, x: Any, expert: int) -> Any:
    return (x @ bank.gate_up_proj[expert] + bank.gate_up_proj_bias[expert])[..., ::2]


def of_ours(ffn: Any, x: Any, expert: int) -> Any:
    bank = ffn.banks[expert // 2]
    return x @ bank.in_proj[expert % 2, :40].T + bank.in_bias[expert % 2, :40]


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("mixtral, two activations", of_native),
        ("gpt2 with experts", of_ours),
        ("Mixtral", of_native),
        ("GptOss", of_gpt_oss),
    ],
)
@torch.no_grad()
def test_experts_gates_are_those_of_the_experts_of_each_token(name, gate):
    model = MODELS[name][0]() if name in MODELS else banks.make(name)
    layers = [module for module in model.modules() if isinstance(module, ExpertFFN) or is_bank(module)]
    given, chosen = [], []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: given.append(args))
        if isinstance(layer, ExpertFFN):
            layer.router.register_forward_hook(lambda module, args, out: chosen.append(out.experts))
    found = record(model)
    assert len(given) == len(layers) == 2
    for number, (layer, args) in enumerate(zip(layers, given, strict=True)):
        x, experts = args[0].reshape(14, -1), args[1] if is_bank(layer) else chosen[number]
        expected = torch.stack(
            [torch.stack([gate(layer, row, e).sigmoid().mean() for e in mine.tolist()]).mean()
             for row, mine in zip(x, experts, strict=True)]
        ).view(2, 7)  # fmt: skip
        kept = MASK == 1
        torch.testing.assert_close(found.openness[number][kept], expected[kept], rtol=1e-5, atol=1e-6)
        assert found.openness[number][~kept].isnan().all()
        assert expected.std() > 1e-4


def test_what_isnt_there_is_one_line(monkeypatch):
    gates = record(FAMILIES["t5"].make())
    with pytest.raises(UnknownNameError, match=r"did you mean 'encoder\.layers\.1'"):
        gates["encoder.layer.1"]
    with pytest.raises(UnknownNameError, match="did you mean 'openness'"):
        gates.tensor("opennes")
    with pytest.raises(UnknownNameError, match="valid: decoder, encoder"):
        gates.tensor(stack="middle")
    assert gates.state.isnan().all()
    model = FAMILIES["t5"].make()
    with hf_glu.record_gates(model) as beams:
        assert beams.openness.shape == (0, 0, 0)
        assert beams.to_frame().empty
        model.generate(ids(1, 4), max_new_tokens=3, num_beams=2)
    with pytest.raises(DataError, match="1 and 2 sequences are no one tensor"):
        beams.openness  # noqa: B018
    assert beams.tensor(stack="decoder").shape[1] == 2
    monkeypatch.setattr("hf_glu.config.extras.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="to_frame needs pandas"):
        gates.to_frame()
