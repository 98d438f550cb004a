"""What gates do, token by token: against formulas on the projections' outputs, in one pass and in many; the command."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import transformers
from comparing import assert_same
from covering import covering, few
from mixers import MODELS
from mixers import awake as awake_mixer
from mixers import make as make_mixer
from pico import FAMILIES, NATIVE, make_native
from runs import Reader
from states import awake, ids, memories
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import hf_glu
from hf_glu import cli
from hf_glu.errors import DataError, NoSiteError
from hf_glu.ffn.forward import projections
from hf_glu.ffn.sites import convertible_sites
from hf_glu.publishing.report.formats import label
from hf_glu.publishing.report.heat import heat_map

MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
NATIVE_NAMES = [name for name in NATIVE if name != "mixtral"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def gated(name: str) -> Any:
    """Return a model whose gates have no state."""
    if name in MODELS:
        return make_mixer(name)
    if name in NATIVE:
        return make_native(name)
    model = FAMILIES[name].make()
    hf_glu.convert(model, FAMILIES[name].exact, check=False)
    return model


def remembering(name: str, **more: Any) -> Any:
    return awake_mixer(name) if name in MODELS else awake(name, **more)


def inputs_of(model: Any) -> dict[str, Tensor]:
    inputs = {"input_ids": ids(2, 9), "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids(2, 5, seed=1), "decoder_attention_mask": MASK[:, 1:6]}
    return inputs


def pre_activations(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each gate's g in float64, from the projection that makes it."""
    found, handles = {}, []
    for site in convertible_sites(model):
        begin = site.width if site.kind == "mixer" and hasattr(site.anchor, "x_proj") else 0
        part = slice(begin, begin + site.width)
        handles.append(
            projections(site)[0].register_forward_hook(
                lambda module, args, out, name=site.name, part=part: found.update({name: out[..., part].double()})
            )
        )
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def walk(memory: Any, g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states before and after each token."""
    decay, state, states = memory.decay.double().sigmoid(), torch.zeros_like(g[:, 0]), []
    for t in range(g.shape[1]):
        state = torch.where(mask[:, t, None].bool(), decay * state + (1 - decay) * g[:, t].sigmoid(), state)
        states.append(state)
    after = torch.stack(states, 1)
    return torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1), after


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def record(model: Any, **inputs: Tensor) -> list[Any]:
    with torch.no_grad(), hf_glu.record_gates(model) as gates:
        model(**inputs)
    return gates.layers


@pytest.mark.parametrize(("make", "name"), covering([gated, remembering], [*FAMILIES, *NATIVE_NAMES, *MODELS]))
@torch.no_grad()
def test_values_are_the_formulas_and_outputs_stay(name, make):
    model = make(name)
    inputs, before = inputs_of(model), hooks(model)
    expected = model(**inputs)[0]
    with hf_glu.record_gates(model) as gates:
        assert_same(model(**inputs)[0], expected, "bitwise")
    assert hooks(model) == before
    sites = {site.name: site for site in convertible_sites(model)}
    found = pre_activations(model, inputs)
    assert [record.layer for record in gates.layers] == list(sites)
    for record in gates.layers:
        mask = MASK[:, 1:6] if model.config.is_encoder_decoder and record.stack == "decoder" else MASK
        site, g = sites[record.layer], found[record.layer].view(*mask.shape, -1)  # OPT's are in one row
        assert (record.kind, record.index, record.stack) == (site.kind, site.layer, site.stack)
        assert record.tokens == mask.sum()
        expected = {"openness": g.sigmoid().mean(-1)}
        if make is remembering:
            memory = memories(site.act)[0]
            past, after = walk(memory, g, mask)
            shift = memory.alpha.double() * past + memory.beta.double() * (g.sigmoid() - past)
            expected |= {"state": after.mean(-1), "shift": shift.abs().mean(-1)}
        for key in ("openness", "state", "shift"):
            value = getattr(record, key)
            assert (value is not None) == (key in expected)
            if value is not None:
                assert (value.dtype, value.device.type, value.requires_grad) == (torch.float32, "cpu", False)
                assert value.isnan().equal(mask == 0)
                torch.testing.assert_close(value[mask == 1].double(), expected[key][mask == 1], **CLOSE)


@pytest.mark.parametrize(("make", "name"), [(gated, "llama"), (gated, "gpt2"), (remembering, "gpt2"),
                                            (remembering, "Mamba"), (remembering, "Mamba2")])  # fmt: skip
def test_generation_appends_along_time(make, name):
    model, prompt = make(name), ids(2, 6)
    model.generation_config.eos_token_id = None
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    with hf_glu.record_gates(model) as gates:
        text = model.generate(prompt, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    read = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    positions = {"position_ids": (read.cumsum(1) - 1).clamp_min(0)} if name in ("llama", "gpt2") else {}
    whole = record(model, input_ids=text[:, :-1], attention_mask=read, **positions)
    for some, one in zip(gates.layers, whole, strict=True):
        assert some.openness.shape == (2, 10)
        for key in ("openness", *(["state", "shift"] if make is remembering else [])):
            torch.testing.assert_close(getattr(some, key), getattr(one, key), equal_nan=True, **CLOSE)


def test_encoder_and_decoder_each_have_their_own_time():
    model = awake("t5")
    with hf_glu.record_gates(model) as gates:
        model.generate(ids(3, 7), max_new_tokens=4, min_new_tokens=4, num_beams=1)
    shapes = [(layer.stack, tuple(layer.openness.shape)) for layer in gates.layers]
    assert shapes == [("encoder", (3, 7))] * 2 + [("decoder", (3, 4))] * 2


def test_a_state_in_both_directions_is_their_mean():
    model = awake("bert", state={"direction": "both"})
    inputs = inputs_of(model)
    found = pre_activations(model, inputs)
    for one in record(model, **inputs):
        memory, g = memories(model.get_submodule(one.layer))[0], found[one.layer]
        both = [walk(memory, g, MASK)[1], walk(memory, g.flip(1), MASK.flip(1))[1].flip(1)]
        expected = torch.stack(both).mean((0, -1))
        torch.testing.assert_close(one.state[MASK == 1].double(), expected[MASK == 1], **CLOSE)


def test_layers_that_share_an_ffn_and_ffns_in_chunks():
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=40, hidden_act="geglu_new",
    )  # fmt: skip
    model = transformers.AlbertModel(config).eval()
    for parameter in model.parameters():
        parameter.data *= 10
    found = record(model, input_ids=ids(2, 9), attention_mask=MASK)
    assert [one.layer.partition(" ")[2] for one in found] == ["", "(2)", "(3)"]
    assert len({one.layer.partition(" ")[0] for one in found}) == 1
    assert all(one.openness.isnan().equal(MASK == 0) for one in found)
    assert (found[0].openness - found[1].openness).nan_to_num().abs().max() > 1e-4
    plain, chunked = gated("bert"), gated("bert")
    for module in chunked.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 3
    for one, other in zip(*(record(m, **inputs_of(m)) for m in (plain, chunked)), strict=True):
        torch.testing.assert_close(one.openness, other.openness, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("make", [gated, remembering])
def test_training_and_gradient_checkpointing_record_once(make):
    model = make("gpt2").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with hf_glu.record_gates(model) as gates:
        for length in (5, 3):
            model(ids(2, length), use_cache=False).logits.sum().backward()
    assert [tuple(layer.openness.shape) for layer in gates.layers] == [(2, 8)] * 2
    assert all(parameter.grad is not None for parameter in model.transformer.h[0].mlp.parameters())


def test_hooks_are_gone_after_exceptions_and_half_a_pass_can_be_read():
    model = awake("gpt2")
    before = hooks(model)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.transformer.h[1].attn.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), hf_glu.record_gates(model) as gates:
        model(ids(1, 4))
    handle.remove()
    assert hooks(model) == before
    assert [layer.index for layer in gates.layers] == [0]


def test_a_model_without_ffns_has_no_gates():
    with pytest.raises(NoSiteError, match="has no gates to record"), hf_glu.record_gates(torch.nn.Linear(2, 2)):
        pass


def test_batches_of_other_sizes_cant_be_appended():
    model = gated("llama")
    with torch.no_grad(), hf_glu.record_gates(model) as gates:
        model(ids(2, 4))
        model(ids(3, 4))
    with pytest.raises(DataError, match="2 and 3 sequences"):
        gates.to_dict()


def test_dense_layers_beside_converted_ones_and_dense_activations_with_a_state():
    model = FAMILIES["gpt2"].make()
    before = record(model, input_ids=ids(1, 4))
    hf_glu.convert(model, "geglu_new", layers=[1])
    after = record(model, input_ids=ids(1, 4))
    assert [one.activation for one in after] == ["gelu_new", "geglu_new"]
    for one, other in zip(before, after, strict=True):  # a dense FFN's gate is that of the converted one
        assert_same(one.openness, other.openness, "bitwise")
    model = FAMILIES["gpt2"].make()
    hf_glu.convert(model, "stateful_gelu_new")
    assert [one.activation for one in record(model, input_ids=ids(1, 4))] == ["stateful_gelu_new"] * 2


def test_plain_data_is_json():
    model = awake("llama")
    with torch.no_grad(), hf_glu.record_gates(model) as gates:
        model(**inputs_of(model))
    rows = json.loads(json.dumps(gates.to_dict(), allow_nan=False))["rows"]
    assert list(rows[0]) == [
        "place", "layer", "index", "stack", "kind", "activation", "tokens", "openness", "state", "shift"
    ]  # fmt: skip
    assert (rows[1]["layer"], rows[1]["kind"], rows[1]["tokens"]) == ("model.layers.1.mlp", "gated", 15)
    for key in ("openness", "state", "shift"):
        assert [value is None for value in rows[1][key][1]] == [True] * 3 + [False] * 6
        assert rows[1][key][0] == getattr(gates.layers[1], key)[0].tolist()


WORDS = {"[PAD]": 0, "[UNK]": 1, "the": 5, "film": 6, "<b>": 7, "&": 8}


def save(model: Any, folder: Any) -> str:
    inner = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", few(["gpt2", "t5", "Mamba"], 3))
def test_the_command_has_the_numbers_as_json_as_a_table_and_as_a_page(name, tmp_path, capsys):
    folder = save(remembering(name), tmp_path / "model")
    arguments = ["gates", folder, "--text", "the film <b> & the", "--html", str(tmp_path / "gates.html")]
    assert cli.run([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"] == ["the", "film", "<b>", "&", "the"]
    tokens = torch.tensor([[5, 6, 7, 8, 5]])
    model = remembering(name)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    for row, one in zip(data["rows"], record(model, input_ids=tokens, **more), strict=True):
        assert row["openness"][0] == pytest.approx(one.openness[0].tolist(), abs=1e-6)
        assert row["mean"]["state"] == pytest.approx(float(one.state.mean()), abs=1e-6)
    html = (tmp_path / "gates.html").read_text()
    page = Reader(html)
    assert len(page.alts) == (4 if name == "t5" else 2)
    assert all(re.match(r"Heat map: (openness|state) by token and layer, from [\d.]+% \('", alt) for alt in page.alts)
    assert "None" not in page.text
    row = page.row("Means by layer", "1")
    assert row["openness"] == f"{data['rows'][-1]['mean']['openness']:.2%}"
    assert row["shift"] == f"{data['rows'][-1]['mean']['shift']:.3f}"
    drawn = re.findall(r">([^<>]+)</text>", html)
    assert {"the", "film", "&lt;b&gt;", "&amp;"} <= set(drawn)
    assert f"{100 * data['rows'][0]['openness'][0][1]:.1f}" in drawn
    assert "<b>" not in html
    assert {"script", "link", "img"}.isdisjoint(page.tags)
    assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", html), "a colour that no scheme changes"
    assert "Written by hf-glu gates." in page.text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["gates.html"]
    assert cli.run(["gates", folder, "--text", "the film"]) == 0
    out = capsys.readouterr().out
    assert "Gates on 2 tokens" in out
    assert data["rows"][0]["layer"] in out


@pytest.mark.slow
def test_what_is_larger_than_a_screen_scrolls_in_its_own_box():
    def draw(rows: int, columns: int) -> str:
        names = [[str(place) for place in range(count)] for count in (rows, columns)]
        values = [[(x + y) / 100 for x in range(columns)] for y in range(rows)]
        return heat_map("name", "title", *names, values, middle=0.2, full=0.1, alt="alt", note="note").svg

    assert draw(5, 4).startswith("<svg ")
    wide, high = draw(5, 24), draw(60, 4)
    assert wide.startswith('<div class="scroll"><svg style="min-width: 726px" ')
    assert high.startswith('<div class="scroll"><svg style="min-width: 390px" ')
    assert high.count(">3</text>") == 3  # a row, and the columns below and above
    page = Reader(wide)
    assert page.tags.count("use") >= 2 * 24 * 5 - 5


def test_labels_can_be_read():
    assert [label(token) for token in (" film", " ", "\n", "a\tb", "日本")] == ["film", " ", "\\n", "a\\tb", "日本"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere/at/all", "--text", "the"], "nowhere"),
        (["BARE", "--text", "the"], "no tokenizer"),
        (["GATED", "--text", " "], "--text is empty"),
        (["GATED", "--text", "\u3000"], "--text is empty"),
        (["GATED"], "--text"),
        (["GATED", "--text", "the", "--html", "GATED"], "can't be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, capsys):
    gated("gpt2").save_pretrained(tmp_path / "bare")
    places = {"BARE": str(tmp_path / "bare"), "GATED": save(gated("gpt2"), tmp_path / "gated")}
    capsys.readouterr()
    assert cli.run(["gates", *(places.get(each, each) for each in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
