"""The recorder and the observers on it: hooks that come and go, models in any state, nothing that is changed."""

from __future__ import annotations

import random
from typing import Any

import numpy
import peft
import pytest
import torch
import transformers
from comparing import assert_same
from pico import FAMILIES, HIDDEN, make_native
from seen import IDS, LEFT, RIGHT, TARGETS, B, raw, recorded
from states import awake
from torch import Tensor, nn

import hf_glu
from hf_glu.activation.context.hooks import Carrying
from hf_glu.activation.learnable import mixes
from hf_glu.config.experts import ExpertOptions
from hf_glu.conversion.experts.native.ungating import routed_inputs
from hf_glu.conversion.fit.calibration import make_batches, site_inputs
from hf_glu.conversion.measure import SiteProbe
from hf_glu.errors import OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.sites import find_banks, find_sites
from hf_glu.instruments import expert_tokens
from hf_glu.instruments.activity import activation_statistics, expert_loads
from hf_glu.instruments.adaptive import adaptive_statistics, snapshot
from hf_glu.instruments.probe import evaluating, probe_inputs, run
from hf_glu.instruments.recorder import Call, Kept, Watch, first_inputs, inputs_of, run_batches, watching

PADDED = {"input_ids": IDS, "attention_mask": LEFT}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def carrying(model: nn.Module) -> int:
    return sum(isinstance(vars(m).get("_gradient_checkpointing_func"), Carrying) for m in model.modules())


def seen(model: Any, **more: Any) -> tuple[list[Call], list[Watch]]:
    """Return a list that fills with the calls of each FFN's in-projection, and the watches that fill it."""
    calls: list[Call] = []
    return calls, [Watch(module=site.in_proj, see=calls.append, **more) for site in find_sites(model)]


@pytest.mark.parametrize("make", [lambda: FAMILIES["t5"].make(), lambda: awake("gpt2"), lambda: awake("t5")])
def test_a_model_computes_what_it_computes_without(make):
    model = make()
    inputs = (
        {**PADDED, "labels": TARGETS.masked_fill(TARGETS > 40, -100)} if model.config.is_encoder_decoder else PADDED
    )
    before, expected = hooks(model), run(model, inputs)
    _, watches = seen(model)
    with watching(model, watches), watching(model, watches):
        assert_same(run(model, inputs), expected, "bitwise")
    assert hooks(model) == before
    assert_same(run(model, inputs), expected, "bitwise")


def test_inputs_and_outputs_before_and_after():
    model = FAMILIES["bert"].make()
    site = find_sites(model)[0]
    found: list[Call] = []
    watches = [Watch(module=site.in_proj, see=found.append), Watch(module=site.in_proj, see=found.append, after=True)]
    with torch.no_grad(), watching(model, watches):
        model(**PADDED)
        model(**PADDED)
    assert [call.output is None for call in found] == [True, False] * 2
    assert all(call.first and not call.repeated and call.tokens.last for call in found)
    assert_same(found[1].output, site.in_proj(found[0].x), "bitwise")
    assert_same(found[0].tokens.rows(found[0].x), found[0].x[LEFT.bool()], "bitwise")


@pytest.mark.slow
def test_what_was_compiled_before_is_seen():
    model, x = make_native("llama"), torch.randn(1, 3, HIDDEN)
    ffn = find_sites(model)[0].anchor
    torch.compiler.reset()
    compiled = torch.compile(ffn, backend="eager")
    compiled(x)
    calls, watches = seen(model)
    for expected in (1, 2):  # again with other hooks
        with torch.no_grad(), watching(model, watches):
            compiled(x)
        compiled(x)
        assert len(calls) == expected
    assert_same(calls[1].x, x, "bitwise")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gates", "experts", "vector"])
def test_a_whole_compiled_model_is_observed_as_it_is_without(what):
    def look(run: Any) -> Any:
        if what == "vector":
            with hf_glu.modulation(model, vector=vector):
                return run(IDS).logits
        with hf_glu.record_gates(model) if what == "gates" else hf_glu.expert_statistics(model) as found:
            run(IDS)
        return found.to_dict()

    model = FAMILIES["bert"].make()
    more = {"experts": "relu,gelu"} if what == "experts" else {}
    hf_glu.convert(model, "geglu" if what == "experts" else "modulated_geglu", check=False, **more)
    for name, parameter in model.named_parameters():
        if name.endswith(("threshold", "slope")):
            nn.init.normal_(parameter)
    vector = hf_glu.context_vector(model, input_ids=IDS.flip(1)) if what == "vector" else None
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(IDS).logits
        expected, found = look(model), look(compiled)
        if isinstance(found, Tensor):
            assert_same(found, expected, "exact up to rounding")
            assert (found - plain).abs().max() > 1e-3
        else:
            assert found == expected
            assert found["rows"]
        assert_same(compiled(IDS).logits, plain, "bitwise")
    torch.compiler.reset()


def test_hooks_are_gone_after_exceptions_whether_inside_or_of_an_observer():
    model = awake("gpt2")
    before = hooks(model)

    def fail(call: Call) -> None:
        raise ZeroDivisionError

    watch = Watch(module=find_sites(model)[1].in_proj, see=fail)
    with pytest.raises(ZeroDivisionError), watching(model, [watch]):
        model(**PADDED)
    broken = Watch(module=find_sites(model)[0].in_proj, see=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError), watching(model, [watch, broken]):
        model(**PADDED)
    assert hooks(model) == before
    kept = recorded(model, find_sites(model)[0].in_proj, **PADDED)
    assert len(kept) == LEFT.sum(), "an interrupted pass says nothing of the next one"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [lambda: FAMILIES["gpt2"].make(), lambda: awake("gpt2")])
def test_what_checkpointing_computes_again_is_seen_once(make, reentrant):
    model = make().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls, watches = seen(model)
    again, more = seen(model, repeated=True)
    with watching(model, [*watches, *more]):
        # the second pass begins before the first one's layers run again
        masks = [RIGHT, RIGHT.flip(0)]
        losses = [model(input_ids=IDS, attention_mask=mask, use_cache=False).logits.sum() for mask in masks]
        sum(losses).backward()
    assert len(calls) == 4
    repeated = [call for call in again if call.repeated]
    assert len(repeated) == 4
    found = sorted(int(call.tokens.kept[: IDS.shape[1]].sum()) for call in repeated)
    assert found == [1, 1, 9, 9], "the mask of the pass that is computed again"
    assert model.training
    assert carrying(model) == (0 if make().config.activation_function == "gelu_new" else carrying(model))


def test_checkpointing_functions_are_given_back():
    model = FAMILIES["gpt2"].make().train()
    model.gradient_checkpointing_enable()
    _, watches = seen(model)
    with watching(model, watches):
        model(**PADDED, use_cache=False)
        assert carrying(model)
    assert not carrying(model)


@pytest.mark.parametrize("training", [True, False])
def test_models_that_peft_has_wrapped(training):
    model = FAMILIES["t5"].make()
    module = model.decoder.block[1].layer[2].DenseReluDense.wi
    inputs = {"input_ids": IDS, "attention_mask": LEFT, "labels": TARGETS.masked_fill(TARGETS > 40, -100)}
    expected = raw(model, module, **inputs)[0][TARGETS <= 40]
    config = peft.LoraConfig(target_modules=["wi", "q"], r=2, lora_dropout=0.5 if training else 0.0)
    wrapped = peft.get_peft_model(model, config).train(training)
    module = model.decoder.block[1].layer[2].DenseReluDense.wi
    assert type(module) is not nn.Linear
    found = first_inputs(wrapped, module, [inputs], limit=1000)
    assert_same(found, expected, "bitwise")
    assert all(part.training == training for part in wrapped.modules())


def test_generation_in_many_passes():
    model = make_native("llama")
    model.generation_config.eos_token_id = None
    kept = Kept(1000)
    with watching(model, [Watch(module=find_sites(model)[0].in_proj, see=kept.see)]):
        text = model.generate(**PADDED, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert text.shape == (B, IDS.shape[1] + 4)
    assert kept.count == LEFT.sum() + 3 * B  # the last token isn't read


def test_no_more_is_kept_than_asked_for():
    model = FAMILIES["bert"].make()
    site, ran = find_sites(model)[0], []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    found = first_inputs(model, site.in_proj, [PADDED] * 5, limit=20)
    handle.remove()
    (x,) = raw(model, site.in_proj, **PADDED)
    assert_same(found, x[LEFT.bool()].repeat(2, 1)[:20], "bitwise")
    assert len(ran) == 2
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_a_pass_ends_where_nothing_more_is_needed():
    model = FAMILIES["bert"].make()
    first, second = (site.in_proj for site in find_sites(model))
    ran: list[int] = []
    handle = second.register_forward_pre_hook(lambda *_: ran.append(1))
    first_inputs(model, first, [PADDED], limit=10)
    handle.remove()
    assert not ran


@pytest.mark.parametrize("limit", [10, 1000])
def test_inputs_of_several_modules_come_from_the_same_passes(limit):
    model, ran = FAMILIES["t5"].make(), []
    modules = [site.in_proj for site in find_sites(model)]
    expected = [first_inputs(model, module, [PADDED] * 3, limit=limit) for module in modules]
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    found = inputs_of(model, modules, [PADDED] * 3, limit=limit)
    assert len(ran) == -(-limit // int(LEFT.sum())) if limit < 1000 else len(ran) == 3
    handle.remove()
    for mine, wanted in zip(found, expected, strict=True):
        assert_same(mine, wanted, "bitwise")
    modules[1].register_forward_pre_hook(lambda *_: pytest.fail("it ran on"))
    inputs_of(model, modules[:1], [PADDED], limit=limit)
    assert inputs_of(model, [modules[0], nn.Linear(1, 1)], [], limit=limit) == [None, None]


def test_calibration_leaves_padding_out_where_it_was_counted_before():
    t5 = FAMILIES["t5"].make()
    batches = make_batches(t5, [PADDED])  # the decoder is given the encoder's ids, padding and all
    assert [len(site_inputs(t5, site, batches)) for site in find_sites(t5)] == [int(LEFT.sum())] * 4
    opt = FAMILIES["opt"].make()  # whose tokens are in one row
    assert len(site_inputs(opt, find_sites(opt)[0], make_batches(opt, [PADDED]))) == LEFT.sum()
    chunked = FAMILIES["bert"].make()
    for module in chunked.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 3
    assert len(site_inputs(chunked, find_sites(chunked)[0], make_batches(chunked, [PADDED]))) == LEFT.sum()
    mixtral = make_native("mixtral")
    x, experts = routed_inputs(mixtral, find_banks(mixtral)[1], make_batches(mixtral, [PADDED]))
    assert (x.shape, x.dtype, len(experts)) == ((int(LEFT.sum()), HIDDEN), torch.float32, int(LEFT.sum()))
    with pytest.raises(OptionError, match="no experts"):
        expert_tokens.routed_inputs(mixtral, mixtral.lm_head, [PADDED], limit=3)


def test_conversions_compare_ffns_on_tokens_only():
    model = FAMILIES["bert"].make()
    sites = find_sites(model)
    probe = SiteProbe(sites)
    with torch.no_grad(), probe.recording(model):
        model(**PADDED)
    for site in sites:
        (x,) = raw(model, site.in_proj, **PADDED)
        assert_same(probe._inputs[site.name], x[LEFT.bool()], "bitwise")


def alone(ids: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row[kept.bool()][None]} for row, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", ["ours", "native"])
def test_mixes_inside_of_experts_leave_padding_out(name):
    if name == "ours":
        model = FAMILIES["bert"].make()
        options = ExpertOptions(groups="moa_swiglu*2,gelu,moa_gelu", top_k=2, shared="moa_gelu")
        hf_glu.convert(model, "geglu", experts=options, check=False)
    else:
        model = make_native("mixtral", num_local_experts=4)
        hf_glu.convert(model, experts="moa_silu*2,silu,moa_silu", check=False)
    for mix in mixes(model):
        for parameter in mix.parameters():
            nn.init.normal_(parameter)
    for ffn in find_experts(model).values():
        nn.init.normal_(ffn.router.weight)
    before = hooks(model)
    padded = adaptive_statistics(model, [{"input_ids": IDS, "attention_mask": RIGHT}], snapshot(model))
    cut = adaptive_statistics(model, alone(IDS, RIGHT), snapshot(model))
    whole = adaptive_statistics(model, [{"input_ids": IDS}], snapshot(model))
    assert hooks(model) == before
    assert len(padded) == (6 if name == "ours" else 4)
    for one, other in zip(padded, cut, strict=True):
        torch.testing.assert_close(one["mix"]["after"], other["mix"]["after"], rtol=1e-4, atol=1e-5)
    assert any(abs(a - b) > 1e-2 for one, other in zip(padded, whole, strict=True)
               for a, b in zip(one["mix"]["after"], other["mix"]["after"], strict=True))  # fmt: skip


def test_routers_statistics_leave_padding_out_by_themselves():
    model = FAMILIES["bert"].make()
    hf_glu.convert(model, "geglu", experts="relu*2,gelu*2", check=False)
    with torch.no_grad(), hf_glu.expert_statistics(model) as found:
        model(input_ids=IDS, attention_mask=RIGHT)
    assert {row["tokens"] for row in found.to_dict()["rows"]} == {int(RIGHT.sum())}
    with torch.no_grad(), hf_glu.expert_statistics(model) as given:
        given.mask = torch.ones_like(RIGHT)
        model(input_ids=IDS, attention_mask=RIGHT)
    assert {row["tokens"] for row in given.to_dict()["rows"]} == {RIGHT.numel()}


def draws() -> tuple[float, float, Tensor]:
    return random.random(), float(numpy.random.rand()), torch.rand(3)


OBSERVERS = {
    "run": lambda model, batch: run(model, probe_inputs(model)),
    "run_batches": lambda model, batch: run_batches(model, [batch]),
    "activation_statistics": lambda model, batch: activation_statistics(model, [batch]),
    "adaptive_statistics": lambda model, batch: adaptive_statistics(model, [batch], {}),
    "expert_loads": lambda model, batch: expert_loads(model, [batch]),
    "site_inputs": lambda model, batch: site_inputs(model, find_sites(model)[0], [batch]),
    "context_vector": lambda model, batch: hf_glu.context_vector(model, **batch),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_leave_modes_random_numbers_weights_and_hooks_alone(name):
    model = FAMILIES["bert"].make()
    more = {"experts": "relu,gelu"} if name == "expert_loads" else {"layers": [0]}
    hf_glu.convert(model, "geglu" if name == "expert_loads" else "modulated_moa_geglu", check=False, **more)
    model.train()
    model.bert.encoder.layer[1].eval()
    # a model that draws, in any mode, from all three
    model.register_forward_pre_hook(lambda *_: (draws(), None)[1])
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = hooks(model)
    seed = lambda: (random.seed(1), numpy.random.seed(1), torch.manual_seed(1))  # noqa: E731
    seed()
    expected = draws()
    seed()
    OBSERVERS[name](model, PADDED)
    found = draws()
    assert found[:2] == expected[:2]
    assert_same(found[2], expected[2], "bitwise")
    assert [module.training for module in model.modules()] == modes
    assert_same(dict(model.state_dict()), state, "bitwise")
    assert hooks(model) == before


def test_running_twice_gives_the_same_and_the_graphics_cards_generators_are_not_seeded(monkeypatch):
    model = FAMILIES["bert"].make()
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits + torch.rand(1)))
    monkeypatch.setattr(torch, "manual_seed", lambda *_: pytest.fail("seeds every device there is"))
    inputs = probe_inputs(model)
    assert_same(run(model, inputs), run(model, inputs), "bitwise")


def test_modes_and_random_numbers_are_restored_after_exceptions():
    model = FAMILIES["bert"].make().train()
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        torch.rand(3)
        raise ZeroDivisionError
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_gates_of_transposed_texts_are_recorded_by_text():
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=64, d_model=HIDDEN, n_layer=2, n_head=2, d_inner=40, ff_activation="gelu"
    )
    model = transformers.XLNetModel(config).eval()
    hf_glu.convert(model, "geglu", check=False)
    site, ids, mask = find_sites(model)[1], IDS[:, :7], LEFT[:, :7]
    with torch.no_grad(), hf_glu.record_gates(model) as gates:
        model(input_ids=ids, attention_mask=mask)
    (both,) = raw(model, site.act, input_ids=ids, attention_mask=mask)
    expected = both.chunk(2, -1)[0].sigmoid().mean(-1).T.masked_fill(mask == 0, torch.nan)
    torch.testing.assert_close(gates.layers[1].openness, expected, equal_nan=True)
    assert 0 < mask.sum() < mask.numel()
    assert gates.layers[1].tokens == mask.sum()
