"""What every wrapper of any FFN promises, by the table in wrappers.py: no test here names a kind.

Those that only experts can have are in tests/ffn/test_kappa.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import assert_same, fresh_process, outputs
from covering import covering
from peft import get_peft_model
from pico import FAMILIES, make_native
from short_training import changed, snapshot
from states import CLOSE, GENERATE, ids, logits, one_by_one, without_dropout
from torch import Tensor
from torch.autograd import gradcheck
from versions import generate
from wrappers import TABLE

import hf_glu
from hf_glu.activation import registry
from hf_glu.activation.context import Reading
from hf_glu.activation.context.passes import Pass, within
from hf_glu.activation.context.states import ROLLBACK
from hf_glu.activation.wrapped import TextShift, shifts
from hf_glu.config.registry import hears
from hf_glu.errors import ConversionError, OptionError, UnknownNameError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.experts.group import banks_of

WRAPPERS = [family.kind.flag for family in registry.families if family.place == "wrapper" and family.kind]
KINDS = [flag for flag in WRAPPERS if not hears(f"{flag}_silu")]
SECTIONS = {kind.flag: key for key, kind in registry.sections.items()}
READING = [flag for flag, row in TABLE.items() if row.walk]
DECODERS = {"gpt2": "geglu_new", "llama": "swiglu"}


def make(name: str) -> Any:
    return FAMILIES[name].make() if name in FAMILIES else make_native(name)


def louder(model: Any, seed: int = 1) -> Any:
    """Return the model with weights that say more than a pico model's, and shifts that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        for shift in shifts(model):
            for parameter in shift.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model.eval()


def awake(flag: str, name: str, seed: int = 1, **more: Any) -> Any:
    name, _, experts = name.partition("+")
    model = make(name)
    target = FAMILIES[name].exact if name in FAMILIES else DECODERS[name]
    hf_glu.convert(model, f"{flag}_{target}", check=False, **more, **({"experts": 3} if experts else {}))
    return louder(model, seed)


def test_every_wrapper_has_a_row():
    assert set(KINDS) == set(TABLE) == set(SECTIONS)


@pytest.mark.parametrize(("flag", "name"), covering(TABLE, ["bert", "gpt2", "t5", "llama"]))
def test_conversion_is_exact_and_nothing_is_dead(flag, name, tmp_path):
    model, key = make(name), SECTIONS[flag]
    before, target = outputs(model), FAMILIES[name].exact if name in FAMILIES else DECODERS[name]
    names = {key for key, _ in model.named_parameters()}
    report = hf_glu.convert(model, f"{flag}_{target}", **{key: TABLE[flag].options})
    assert report.plan.promise == "exact"
    assert_same(outputs(model), before, "exact up to rounding")
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.hf_glu[key] == TABLE[flag].options
    assert not hf_glu.convert(model, f"{flag}_{target}", **{key: TABLE[flag].options}).plan.changes
    own = {key for key, _ in model.named_parameters() if key.split(".")[-1] in TABLE[flag].parameters} - names
    assert {key.split(".")[-1] for key in own} == set(TABLE[flag].parameters)
    start, tokens = snapshot(model), ids(4, 10)
    more = {"decoder_input_ids": tokens} if name == "t5" else {}
    optimizer = torch.optim.Adam(hf_glu.parameter_groups(model, 1e-2, 0.1, 1e-2))
    (group,) = (each for each in optimizer.param_groups if each["name"] == "activation")
    assert {id(model.get_parameter(key)) for key in own} <= {id(p) for p in group["params"]}
    for _ in range(3):
        torch.manual_seed(0)
        model.train()(input_ids=tokens, **more)[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert own <= changed(model, start)
    model.eval().save_pretrained(tmp_path / "model")
    again, info = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")


@pytest.mark.parametrize("flag", TABLE)
def test_options_are_refused_with_the_nearest(flag):
    key = SECTIONS[flag]
    for bad in TABLE[flag].refused:
        with pytest.raises(OptionError, match=key):
            hf_glu.GluConfig(**{key: bad})
    wrong = next(iter(TABLE[flag].options)) + "s"
    with pytest.raises(UnknownNameError, match=f"did you mean '{wrong[:-1]}'"):
        hf_glu.GluConfig(**{key: {wrong: 1}})
    model = FAMILIES["bert"].make()
    for call in (hf_glu.convert, hf_glu.plan):
        with pytest.raises(UnknownNameError, match=f"did you mean '{key}'"):
            call(model, f"{flag}_geglu", **{key + "s": {}})
        with pytest.raises(OptionError, match=f"{flag}_swiglu"):
            call(model, "geglu", **{key: {}})
    read = hf_glu.GluConfig.from_dict({key: TABLE[flag].options})
    assert read.to_dict() == {"version": 1, key: TABLE[flag].options}
    assert getattr(read, key) == read.sections[key] == TABLE[flag].options
    assert hf_glu.GluConfig().sections == {}


def walked(flag: str, gates: Tensor, shift: TextShift) -> Tensor:
    """Return what the row's own formula gives for one text ``[T, W]``."""
    row = TABLE[flag]
    assert row.walk is not None
    return torch.stack(row.walk(list(gates), {name: getattr(shift, name) for name in row.parameters}))


def fresh_shift(flag: str, width: int = 5, **options: Any) -> TextShift:
    act = registry[f"{flag}_silu"].factory()
    act.configure(hf_glu.GluConfig(**{SECTIONS[flag]: options or None}), width)
    louder(act)
    return act.shift.double()


def inside(shift: TextShift, gate: Tensor, **reading: Any) -> Tensor:
    """Return the shift's value where its model says so much of the tokens."""
    with within(Pass(shift, Reading(gate.shape[0], gate.shape[1], **reading))):
        return shift(gate)


VALID = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
RESTART = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)


def by_texts(flag: str, gate: Tensor, shift: TextShift, valid: Tensor, restart: Tensor | None) -> Tensor:
    """Return the formula's values of each text on its own, 0 at padding."""
    found = torch.zeros_like(gate)
    for row in range(len(gate)):
        kept = [t for t in range(gate.shape[1]) if valid[row, t]]
        begins = [k for k, t in enumerate(kept) if k == 0 or (restart is not None and restart[row, t])]
        for begin, end in zip(begins, [*begins[1:], len(kept)], strict=True):
            found[row, kept[begin:end]] = walked(flag, gate[row, kept[begin:end]], shift)
    return found


@pytest.mark.parametrize("flag", READING)
@pytest.mark.parametrize("texts", ["one", "padded", "packed", "packed and padded"])
def test_values_and_gradients_are_those_of_the_formula(flag, texts):
    shift, generator = fresh_shift(flag), torch.Generator().manual_seed(3)
    gate = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    valid, restart = VALID if "padded" in texts else None, RESTART if "packed" in texts else None
    counted = torch.ones_like(VALID) if valid is None else valid
    weights = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64) * counted.unsqueeze(-1)
    inputs = [gate, *shift.parameters()]
    found = inside(shift, gate, valid=valid, restart=restart)
    expected = by_texts(flag, gate, shift, counted, restart)
    assert_same(found[counted], expected[counted], "formula")
    assert torch.isfinite(found).all()
    gradients = [torch.autograd.grad((z * weights).sum(), inputs) for z in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        assert_same(ours, theirs, "formula")
    assert gradcheck(lambda g: inside(shift, g, valid=valid, restart=restart) * weights, gate)


@pytest.mark.parametrize("flag", READING)
def test_both_directions_are_the_mean_of_both_sides(flag):
    shift, gate = fresh_shift(flag, direction="both"), torch.randn(2, 9, 5, dtype=torch.float64)
    found = inside(shift, gate, valid=VALID, restart=RESTART)
    back = torch.cat([RESTART[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], 1)
    # the first valid token from the end on begins a text, and so does each before a restart
    back = torch.stack([torch.cummax(row.flip(0).long(), 0).values.bool() & row.flip(0) for row in back]).flip(1)
    back = moved_to_valid(back)
    forth = by_texts(flag, gate, shift, VALID, RESTART)
    other = by_texts(flag, gate.flip(1), shift, VALID.flip(1), back.flip(1)).flip(1)
    assert_same(found[VALID], (0.5 * (forth + other))[VALID], "formula")


def moved_to_valid(back: Tensor) -> Tensor:
    """Return the marks, each at the nearest valid token before it: what stands between is padding."""
    found = torch.zeros_like(back)
    for row, time in back.nonzero().tolist():
        while time >= 0 and not VALID[row, time]:
            time -= 1
        if time >= 0:
            found[row, time] = True
    return found


@pytest.mark.parametrize("flag", TABLE)
def test_both_directions_are_for_encoders(flag):
    row, key = TABLE[flag], SECTIONS[flag]
    if row.both is None:
        pytest.skip("it has no direction")
    with pytest.raises(OptionError, match="direction=forward"):
        awake(flag, "gpt2", **{key: row.both})
    model, tokens = awake(flag, "bert", **{key: row.both}), ids(3, 9)
    mask = torch.tensor([[1] * 9 + [0] * 4] * 3)
    padded = logits(model, torch.cat([tokens, ids(3, 4, seed=5)], 1), attention_mask=mask)[:, :9]
    torch.testing.assert_close(padded, logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("flag", READING)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "llama+experts"])
def test_padding_chunks_and_causality(flag, name):
    model, tokens = awake(flag, name), ids(2, 12)
    whole, source = logits(model, tokens), {}
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 7) % 50 + 5
    assert_same(logits(model, other)[:, :6], whole[:, :6], "bitwise")
    right, mask = torch.cat([tokens, ids(2, 4, seed=5)], 1), torch.tensor([[1] * 12 + [0] * 4] * 2)
    torch.testing.assert_close(logits(model, right, attention_mask=mask)[:, :12], whole, **CLOSE)
    if name == "t5":
        source = {"input_ids": ids(2, 7, seed=9)}
    else:
        left, mask = torch.cat([ids(2, 4, seed=5), tokens], 1), mask.flip(1)
        found = logits(model, left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        torch.testing.assert_close(found[:, 4:], whole, **CLOSE)
    for split in ((1,) * 12, (3, 1, 1, 5, 2)):
        cache, parts = None, []
        for part in tokens.split(split, dim=1):
            with torch.no_grad():
                more = source | {"decoder_input_ids" if source else "input_ids": part}
                out = model(**more, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("flag", READING)
def test_the_padding_test_can_fail(flag, monkeypatch):
    model, tokens = awake(flag, "gpt2"), ids(3, 9)
    monkeypatch.setattr("hf_glu.activation.context.hooks.read", lambda inputs, seen: None)
    left, mask = torch.cat([ids(3, 4, seed=5), tokens], 1), torch.tensor([[0] * 4 + [1] * 9] * 3)
    found = logits(model, left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))[:, 4:]
    assert (found - logits(model, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("flag", READING)
@pytest.mark.parametrize("name", ["llama", "gpt2+experts"])
def test_packed_texts_and_padded_prompts_in_pieces(flag, name):
    model, tokens = awake(flag, name, layers=[0]), ids(1, 11)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in tokens.split((4, 7), 1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])  # the prompt's first piece is nearly all padding
    places, cache, parts = (mask.cumsum(1) - 1).clamp_min(0), None, []
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        with torch.no_grad():
            out = model(
                tokens[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], logits(model, tokens[:, 3:]), **CLOSE)


@pytest.mark.parametrize("flag", READING)
@pytest.mark.parametrize("how", GENERATE)
def test_generation_is_the_same_without_cache(flag, how):
    model = awake(flag, "llama")
    prompt = ids(1 if how == "lookup" else 2, 5).repeat(1, 2)
    shared = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    plain = {key: value for key, value in GENERATE[how].items() if how not in ("static", "lookup")}
    torch.manual_seed(0)
    with_cache = generate(model, prompt, **shared, **GENERATE[how])
    torch.manual_seed(0)
    assert_same(with_cache, generate(model, prompt, **shared, **plain, use_cache=False), "bitwise")


@pytest.mark.parametrize("flag", READING)
def test_tokens_taken_back(flag):
    model, draft = awake(flag, "llama"), awake(flag, "llama", seed=2)
    more = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    assisted = model.generate(ids(1, 6), assistant_model=draft, **more)
    assert_same(assisted, model.generate(ids(1, 6), **more), "bitwise")
    tokens = ids(1, ROLLBACK + 20)
    _, cache = one_by_one(model, tokens, None)
    cache.crop(-ROLLBACK)
    changed_end = (tokens + 1)[:, -ROLLBACK:]
    found, _ = one_by_one(model, changed_end, cache)
    expected = logits(model, torch.cat([tokens[:, :-ROLLBACK], changed_end], 1))[:, -ROLLBACK:]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("flag", READING)
def test_an_expert_reads_the_tokens_that_it_was_sent(flag):
    model = awake(flag, "gpt2+experts")
    experts = next(iter(find_experts(model).values()))
    (bank,) = banks_of(experts.banks)
    seen: list[tuple[Tensor, Tensor, Reading]] = []
    shift = bank.acts[0].phi.shift
    shift.register_forward_hook(lambda shift, args, z: seen.append((args[0], z, copy.copy(shift.current()))))
    logits(model, ids(2, 9), use_cache=False)
    ((gate, z, reading),) = seen
    assert reading.rows is not None
    assert 2 < len(gate) < 18
    for text in range(2):
        mine = reading.rows // 9 == text
        assert_same(z[mine], walked(flag, gate[mine], shift).detach(), "exact up to rounding")


@pytest.mark.parametrize("flag", READING)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(flag, reentrant):
    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for seed, length in ((0, 8), (1, 6)):
            tokens, mask = ids(2, length, seed=seed), torch.ones(2, length, dtype=torch.long)
            mask[0, :3] = 0
            losses.append(model(input_ids=tokens, attention_mask=mask).logits.float().square().mean())
        sum(losses).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model = without_dropout(awake(flag, "gpt2"))
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model), expected, "trained")


@pytest.mark.slow
@pytest.mark.parametrize("flag", READING)
def test_compiled_training_is_one_graph(flag):
    model = without_dropout(awake(flag, "llama"))
    tokens, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0

    def gradients(run: Any) -> dict[str, Tensor]:
        model.zero_grad()
        run(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    torch._dynamo.reset()
    assert_same(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, "trained")


ALL = "".join(f"{flag}_" for flag in reversed(TABLE))  # in no canonical order


@pytest.mark.parametrize(
    ("name", "base"),
    [("bert", "learnable_geglu"), ("gpt2", "moa_geglu_new"), ("bert", "swiglu_oss"), ("llama", "moa_swiglu")],
)
def test_all_wrappers_together(name, base, tmp_path):
    model = make(name)
    before = outputs(model)
    report = hf_glu.convert(model, ALL + base, check=base != "swiglu_oss")
    tolerance = "gelu by sigmoid" if base == "swiglu_oss" else "exact up to rounding"
    assert_same(outputs(model), before, tolerance)
    assert len(shifts(model)) == len(TABLE) * 2
    assert registry[ALL + base].name == "".join(f"{flag}_" for flag in KINDS) + base
    louder(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(model), "bitwise")
    assert report.plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_a_formula_has_its_shifts_from_the_outside_in():
    act = registry[ALL + "swiglu_oss"].factory()
    act.configure(hf_glu.GluConfig(), 5)
    flags = [type(shift) for shift in act.shifts()]
    assert flags == [type(registry[f"{flag}_silu"].factory().shift) for flag in KINDS]
    assert {key.split(".")[0] for key in act.state_dict()} == {
        "shift",
        "inner",
        *(f"inner_{k}" for k in range(2, len(flags))),
    }


@pytest.mark.parametrize("flag", TABLE)
def test_a_wrapper_is_added_and_taken_back(flag):
    model = FAMILIES["gpt2"].make()
    before = outputs(model)
    hf_glu.convert(model, "geglu_new")
    assert hf_glu.convert(model, f"{flag}_geglu_new").plan.promise == "exact"
    hf_glu.convert(model, ALL + "geglu_new", check=False)
    trained = copy.deepcopy(model)
    hf_glu.revert(model)
    assert_same(outputs(model), before, "bitwise")
    assert model.state_dict().keys() == FAMILIES["gpt2"].make().state_dict().keys()
    with torch.no_grad():
        for shift in shifts(trained):
            if type(shift) is type(registry[f"{flag}_silu"].factory().shift):
                for parameter in shift.parameters():
                    parameter += 1
    with pytest.raises(ConversionError, match="can't be reverted"):
        hf_glu.revert(trained)


def test_lora_trains_what_wrappers_have_of_their_own():
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, ALL + "geglu_new", check=False)
    wrapped = get_peft_model(model, hf_glu.lora_config(model))
    assert not hf_glu.frozen_activations(wrapped)
    start = snapshot(wrapped)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        wrapped(input_ids=ids(2, 8), labels=ids(2, 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = changed(wrapped, start)
    for row in TABLE.values():
        for name in row.parameters:
            assert any(key.endswith(f".{name}") for key in moved), name


@pytest.mark.parametrize("flag", TABLE)
def test_the_card_says_what_the_kind_says(flag):
    from hf_glu.publishing.card.wording import traits

    (kind,) = (kind for kind in registry.kinds if kind.flag == flag)
    facts = {"config": {"hidden_act": f"{flag}_geglu"}, "base": {}, "run": {}, "conversion": {}}
    assert traits(facts) == [kind.trait]


def test_wrappers_that_do_something_nest_in_their_order():
    act = registry["".join(f"{flag}_" for flag in READING) + "silu"].factory()
    act.configure(hf_glu.GluConfig(), 5)
    louder(act)
    own, gate = shifts(act.double()), torch.randn(1, 7, 5, dtype=torch.float64)
    expected = gate[0]
    for flag, shift in zip([flag for flag in KINDS if flag in READING], own, strict=True):
        expected = walked(flag, expected, shift)
    with within(Pass(act, Reading(1, 7))):
        assert_same(act(gate)[0], torch.nn.functional.silu(expected), "formula")


def test_a_formula_with_two_wrappers_has_the_names_of_old_checkpoints():
    act = registry["modulated_stateful_swiglu_oss"].factory()
    act.configure(hf_glu.GluConfig(), 5)
    assert set(act.state_dict()) == {"shift.threshold", "shift.slope", "inner.alpha", "inner.beta", "inner.decay"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["GluConfig", "AutoConfig"])
def test_a_process_that_has_built_no_model_knows_the_sections(how, tmp_path):
    said = {SECTIONS[flag]: row.options for flag, row in TABLE.items()}
    FAMILIES["bert"].make_config(hidden_act=f"{ALL}geglu", hf_glu=said).save_pretrained(tmp_path)
    code = {
        "GluConfig": f"assert hf_glu.GluConfig(**{said}).sections == {said}",
        "AutoConfig": f"import transformers; config = transformers.AutoConfig.from_pretrained({str(tmp_path)!r})\n"
        f"assert config.hf_glu == {{'version': 1}} | {said}",
    }
    done = fresh_process(f"import hf_glu\n{code[how]}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("flag", READING)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_graph_takes_other_lengths_and_padding(flag, name, tmp_path):
    from hf_glu.publishing.export import graphs
    from hf_glu.publishing.export.samples import distances, expected_outputs

    model = awake(flag, name)
    graphs.write_graph(model, "program", tmp_path)
    found = distances(expected_outputs(model), graphs.graph_outputs(model, tmp_path))
    assert max(found.values()) < 2e-6
