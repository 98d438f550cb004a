"""What a forward pass tells its activations is that pass's own: by thread, by stack, and gone afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
import versions
from accelerate import cpu_offload, disk_offload
from comparing import assert_same, outputs
from mixers import make as make_mamba
from pico import FAMILIES, make_native
from states import awake as awake_states
from torch import nn

import hf_glu
from hf_glu.activation.context.passes import Pass, current_pass, enter, leave, within
from hf_glu.activation.context.reading import Reading, read_restarts
from hf_glu.activation.stateful import Memory
from hf_glu.errors import OptionError

VOCABULARY = 50


def disturb(model: Any) -> Any:
    """Give all parameters, those that start without effect, too, other values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(family: str, target: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if family == "mamba":
        model = make_mamba("Mamba")
    else:
        model = FAMILIES[family].make() if family in FAMILIES else make_native(family)
    hf_glu.convert(model, target, check=False, **options)
    return disturb(model)


def prompts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for batch, length, padding in ((1, 4, 0), (2, 7, 3), (3, 5, 0), (1, 9, 2)):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :padding] = 0
        yield torch.randint(5, VOCABULARY, (batch, length), generator=generator), mask


@pytest.fixture
def eager_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(works: list[Callable[[], None]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("gpt2", "stateful_geglu_new", {}),
        ("gpt2", "modulated_geglu_new", {}),
        ("gpt2", "stateful_geglu_new", {"experts": 2}),
        ("bert", "modulated_stateful_geglu", {}),
        ("mamba", "stateful_swiglu", {}),
        ("mamba", "reglu", {}),
    ],
)
def test_four_threads_with_one_model_get_what_one_gets(family, target, options, eager_switching):
    model, given = make(family, target, **options), list(prompts())

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask)[0]

    expected, wrong = [run(*each) for each in given], []

    def work(number: int) -> None:
        for _ in range(12):
            if not torch.allclose(run(*given[number]), expected[number], atol=1e-4):
                wrong.append(number)

    assert not in_threads([lambda number=number: work(number) for number in range(4)])
    assert not wrong
    assert current_pass() is None


def test_passes_nest_and_an_interrupted_one_is_left():
    outer, inner = nn.Identity(), nn.Identity()
    enter(outer, Reading(1, 2))
    enter(inner, None)
    assert current_pass().outer.stack is outer
    leave(outer)  # not the one that runs
    assert current_pass().stack is inner
    leave(inner)
    assert current_pass().stack is outer
    enter(outer, Reading(3, 4))  # begins again: it was interrupted
    leave(outer)
    assert current_pass() is None
    with pytest.raises(KeyError), within(Pass(outer, None)):
        raise KeyError
    assert current_pass() is None


def test_an_exception_in_a_layer_ends_the_pass():
    model = make("gpt2", "stateful_geglu_new")
    handle = model.transformer.h[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(1, 3, dtype=torch.long))
    handle.remove()
    assert current_pass() is None


@pytest.mark.parametrize("way", [pytest.param("broken graphs", marks=pytest.mark.slow), "whole"])
def test_compiled_or_in_pieces_a_pass_is_seen(way):
    """What one graph writes, the next reads: masks arrive although the graph breaks in each layer."""
    torch._dynamo.reset()
    if way == "whole":
        versions.needs_whole_graphs()
    model = make("bert", "modulated_stateful_geglu")
    ids, mask = list(prompts())[1]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        if way == "broken graphs":
            for layer in model.bert.encoder.layer:
                layer.intermediate.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        compiled = torch.compile(model, backend="eager", fullgraph=way == "whole")
        found = compiled(input_ids=ids, attention_mask=mask)[0]
        assert_same(found, expected, "exact up to rounding")
        other = compiled(input_ids=ids, attention_mask=torch.ones_like(mask))[0]
    assert (other - expected).abs().max() > 1e-4
    assert current_pass() is None


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("family", "target", "options"),
    [
        ("gpt2", "modulated_stateful_geglu_new", {}),
        ("gpt2", "geglu_new", {"experts": 2}),
        ("llama", "learnable_swiglu", {}),
        ("mamba", "stateful_swiglu", {}),
    ],
)
def test_offloaded_models_compute_the_same(family, target, options, offload, tmp_path):
    model = make(family, target, **options)
    ids = torch.randint(5, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, one = (model(input_ids=part).logits for part in (ids, ids[:1, :1]))
        if offload == "disk":
            disk_offload(model, tmp_path)
        else:
            cpu_offload(model)
        assert_same(model(input_ids=ids).logits, whole, "exact")
        assert_same(model(input_ids=ids[:1, :1]).logits, one, "exact")


def tokenwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of one token after the other, with a cache."""
    cache, found = None, []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1)


def test_weights_written_by_data_are_seen_while_decoding():
    """As averaging (EMA), merging adapters, and some optimizers do."""
    model = awake_states("gpt2")
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    tokenwise(model, ids)
    for module in model.modules():
        if isinstance(module, Memory):
            module.alpha.data.fill_(3.0)
            module.decay.data.sub_(2.0)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    assert_same(tokenwise(model, ids), whole, "exact up to rounding")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_float64_decodes_as_it_reads(family):
    model = awake_states(family).double()
    ids = torch.randint(5, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same(tokenwise(model, ids), model(input_ids=ids).logits, "formula")


def test_chunks_of_a_text_are_refused_at_conversion_and_later():
    chunked = FAMILIES["bert"].make(chunk_size_feed_forward=2)
    before = outputs(chunked)
    with pytest.raises(OptionError, match="chunk_size_feed_forward to 0"):
        hf_glu.convert(chunked, "stateful_geglu")
    assert_same(outputs(chunked), before, "bitwise")
    hf_glu.convert(FAMILIES["bert"].make(chunk_size_feed_forward=2), "geglu")
    model = make("bert", "stateful_geglu")
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    with pytest.raises(OptionError, match="2 tokens at a time"):
        outputs(model)


@pytest.mark.parametrize("layer", [0, 1])
def test_every_parameter_of_a_modulated_model_gets_a_gradient(layer):
    model = make("gpt2", "modulated_geglu_new", context={"layer": layer}).train()
    ids = torch.randint(5, VOCABULARY, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("kind", ["XLNet", "FSMT"])
def test_families_that_transpose_their_texts_are_refused(kind):
    sizes = {
        "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 61, "ff_activation": "gelu"}
    }
    sizes["FSMT"] = {"langs": ["a", "b"], "src_vocab_size": 61, "tgt_vocab_size": 61, "d_model": 16}
    sizes["FSMT"] |= {f"{stack}_{key}": 1 for stack in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    sizes["FSMT"] |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes[kind]))
    target = "geglu" if kind == "XLNet" else "reglu"
    with pytest.raises(OptionError, match="transposed"):
        hf_glu.convert(model, f"stateful_{target}", check=False)


def test_an_encoders_vector_needs_an_encoder():
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(OptionError, match="needs a decoder with an encoder"):
        hf_glu.convert(transformers.OPTForCausalLM(config), "modulated_reglu", context={"pool": "encoder"}, check=False)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_states_that_arent_trained_let_the_rest_be(family):
    model = make(family, f"stateful_{FAMILIES[family].exact}", state={"learnable": False, "alpha": 0.5}).train()
    ids = torch.randint(5, VOCABULARY, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "mlp" in name)


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 3]], ids=str)
@pytest.mark.parametrize(
    ("family", "target", "options"),
    [("llama", "stateful_swiglu", {}), ("llama", "canon_swiglu", {}), ("llama", "smear_swiglu", {}),
     ("llama", "modulated_stateful_swiglu", {}), ("gpt2", "stateful_geglu_new", {"experts": 3})],
)  # fmt: skip
def test_padding_changes_nothing_where_tokens_come_one_by_one(family, target, options, sizes):
    model = make(family, target, **options)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    found, begin = [], 0
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)[0]
        for size in sizes:
            end = begin + size
            part = slice(begin, end)
            given = {"input_ids": ids[:, part], "attention_mask": mask[:, :end], "position_ids": places[:, part]}
            found.append(model(**given, past_key_values=cache, use_cache=True)[0])
            begin = end
    assert_same(torch.cat(found, 1)[mask.bool()], whole[mask.bool()], "exact up to rounding")


@pytest.mark.parametrize("target", ["stateful_geglu", "modulated_geglu"])
def test_masks_of_four_dimensions_are_read(target):
    model = make("bert", target, **({"state": {"direction": "both"}} if "stateful" in target else {}))
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    seen = mask[:, None, None].bool()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask)[0]
        for given in (seen, seen.expand(2, 1, 6, 6), torch.where(seen, 0.0, -1e9)):
            assert_same(model(input_ids=ids, attention_mask=given)[0][mask.bool()], wanted[mask.bool()], "exact")


def test_positions_of_texts_and_of_what_they_show():
    places = torch.tensor([[0, 1, 2, 0, 1]])
    wanted = read_restarts(places, 2, 5, None)
    assert wanted.tolist() == [[True, False, False, True, False]] * 2
    assert_same(read_restarts(torch.stack([places, *[torch.zeros_like(places)] * 3]), 2, 5, None), wanted, "bitwise")
    assert read_restarts(torch.stack([places] * 3), 2, 5, None) is None  # time, height and width say nothing of texts


def test_experts_in_float64_know_their_padding():
    model = make("gpt2", "geglu_new", experts=3).double().train()
    ids, mask = list(prompts())[1]
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert model.transformer.h[0].mlp.router.weight.grad.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, "reglu", "stateful_relu", "modulated_relu"])
def test_compiled_generation_compiles_once(target):
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    model = FAMILIES["t5"].make()
    if target is not None:
        hf_glu.convert(model, target, check=False)
    model.generation_config.eos_token_id = None
    how = transformers.CompileConfig(backend="eager", fullgraph=False)
    how._compile_all_devices = True
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "cache_implementation": "static", "compile_config": how}
    for _ in range(2):
        model.generate(torch.randint(5, VOCABULARY, (2, 7)), do_sample=False, **options)
        assert counted["unique_graphs"] == 1


def _two_texts(first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two texts of four tokens in a row, and which tokens see which."""
    ids = torch.cat([torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(seed))
                     for seed in (first, 9)], dim=1)  # fmt: skip
    return ids, torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool()[None, None]


@pytest.mark.parametrize("positions", [None, torch.arange(8)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])])
@pytest.mark.parametrize(("name", "target"), [
    ("bert", "modulated_geglu"), ("bert", "stateful_geglu"), ("llama", "stateful_swiglu"), ("llama", "canon_swiglu"),
    ("llama", "modulated_swiglu"),
])  # fmt: skip
def test_texts_that_only_a_mask_tells_apart_do_not_see_each_other(name, target, positions):
    model, found = make(name, target), []
    for first in (1, 2):
        ids, seen = _two_texts(first)
        seen = seen.tril() if name == "llama" else seen
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask, position_ids=positions)[0])
    assert_same(found[0][:, 4:], found[1][:, 4:], "bitwise")
    assert not torch.equal(found[0][:, :4], found[1][:, :4])


def test_the_context_of_a_packed_text_is_that_of_the_text_alone():
    model = make("bert", "modulated_geglu")
    ids, seen = _two_texts(1)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        packed = model(input_ids=ids, attention_mask=seen, position_ids=places)[0]
        for part in (slice(0, 4), slice(4, 8)):
            assert_same(packed[:, part], model(input_ids=ids[:, part])[0], "exact")
