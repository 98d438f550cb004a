"""Several fine-tunes in one mixture: what is promised, what is averaged, where a router's rows come from, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from comparing import assert_same, outputs
from pico import FAMILIES, VOCAB, make_native
from taskdata import make_tokenizer
from torch.nn.functional import normalize
from whole import structure

import hf_glu
from hf_glu.conversion import Merge
from hf_glu.errors import ConversionError, HfGluError, OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.ffn.forward import ffn_output
from hf_glu.ffn.sites import convertible_sites

FOUR = ("bert", "t5", "llama", "gpt2")
IDS = [torch.randint(3, VOCAB, (6, 10), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def make(name, seed=0, head=None, **more):
    """Return a pico model whose weights are those of ``seed``."""
    if name in FAMILIES:
        return FAMILIES[name].make(head, seed=seed, **more)
    model = make_native(name, **more)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def tuned(name, seed):
    """Return a fine-tune of `make(name)`: each weight moved a little."""
    model, generator = make(name), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("options", [{}, {"router": "hidden", "prompts": IDS}, {"attention": "first", "top_k": 3}])
@pytest.mark.parametrize("name", FOUR)
def test_models_that_are_the_same_give_the_same_outputs(name, options):
    models = [make(name) for _ in range(3)]
    before, state = outputs(models[0]), structure(models[0])
    merged = hf_glu.merge_experts(models, **options)
    assert_same(outputs(merged), before, "exact up to rounding")
    experts = find_experts(merged)
    assert len(experts) == len(convertible_sites(models[0])) > 1
    inside = {id(parameter) for each in experts.values() for parameter in each.parameters()}
    kept = {key: value for key, value in merged.named_parameters() if id(value) not in inside}
    assert_same(kept, {key: models[0].get_parameter(key) for key in kept}, "bitwise")
    assert structure(models[0]) == state


@pytest.mark.parametrize("name", FOUR)
def test_each_expert_is_its_models_ffn_and_the_rest_is_the_mean(name, tmp_path):
    models = [tuned(name, seed) for seed in range(3)]
    merged = hf_glu.merge_experts(models, names=["a", "b", "c"], top_k=2)
    for path, experts in find_experts(merged).items():
        x = torch.randn(7, experts.hidden, generator=torch.Generator().manual_seed(0))
        (bank,) = experts.banks
        for number, model in enumerate(models):
            site = next(
                site for site in convertible_sites(model) if site.name in (path, path.rpartition(".intermediate")[0])
            )
            with torch.no_grad():
                assert_same(bank.one(x, number), ffn_output(site, x), "exact")
            assert torch.equal(bank.out_proj[number], weight(site.out_proj))
            rows = torch.cat([weight(part) for part in ins(site)])
            assert torch.equal(bank.in_proj[number], rows)
    norms = [
        key for key, value in merged.named_parameters() if value.ndim == 1 and key in dict(models[0].named_parameters())
    ]
    for key in norms:
        mean = torch.stack([model.get_parameter(key).double() for model in models]).mean(0).float()
        assert_same(merged.get_parameter(key).detach(), mean.detach(), "exact")
    assert merged.config.hf_glu["experts"]["sources"] == ["a", "b", "c"]
    assert merged.config.num_experts == 3
    merged.save_pretrained(tmp_path)
    again, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same(outputs(again), outputs(merged), "bitwise")
    assert again.config.hf_glu == merged.config.hf_glu


def weight(linear):
    return linear.weight.detach().T if type(linear).__name__ == "Conv1D" else linear.weight.detach()


def ins(site):
    return [site.anchor.get_submodule(path) for path in (site.row.gate, site.row.in_proj) if path]


def test_the_first_models_rest():
    models = [tuned("gpt2", seed) for seed in range(2)]
    merged = hf_glu.merge_experts(models, attention="first")
    for key in ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "transformer.ln_f.bias"):
        assert torch.equal(merged.get_parameter(key), models[0].get_parameter(key))
        assert not torch.equal(merged.get_parameter(key), models[1].get_parameter(key))
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_what_is_tied_stays_tied_and_half_precision_is_rounded_once():
    models = [tuned("t5", seed).to(torch.bfloat16) for seed in range(3)]
    merged = hf_glu.merge_experts(models)
    assert merged.lm_head.weight is merged.shared.weight
    assert merged.shared.weight is merged.encoder.embed_tokens.weight
    mean = torch.stack([model.shared.weight.double() for model in models]).mean(0).to(torch.bfloat16)
    assert torch.equal(merged.shared.weight, mean)


def test_hidden_rows_are_the_mean_inputs_of_each_models_own_prompts():
    models = [tuned("llama", seed) for seed in range(3)]
    merged = hf_glu.merge_experts(models, router="hidden", prompts=IDS, top_k=2)
    for path, experts in find_experts(merged).items():
        for number, (model, ids) in enumerate(zip(models, IDS, strict=True)):
            seen = []
            hook = model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(ids)
            hook.remove()
            row = normalize(seen[0].reshape(-1, 16).mean(0), dim=0)
            assert_same(experts.router.weight[number].detach(), row, "exact")


def test_padding_has_no_part_in_the_rows_and_texts_need_a_tokenizer():
    tokenizer, texts = make_tokenizer(), [["some words", "a much longer text of many words"], ["others", "yet others"]]
    models = [make("bert", seed, vocab_size=len(tokenizer)) for seed in range(2)]
    merged = hf_glu.merge_experts(models, router="hidden", prompts=texts, tokenizer=tokenizer)
    alone = [[dict(tokenizer(text, return_tensors="pt")) for text in each] for each in texts]
    again = hf_glu.merge_experts(models, router="hidden", prompts=alone)
    for path, experts in find_experts(merged).items():
        assert_same(experts.router.weight, find_experts(again)[path].router.weight, "exact up to rounding")
    with pytest.raises(OptionError, match="prompts need tokenizer="):
        hf_glu.merge_experts(models, router="hidden", prompts=texts)


def test_a_tasks_head_is_the_first_models():
    models = [make("bert", seed, "BertForSequenceClassification") for seed in range(2)]
    merged = hf_glu.merge_experts(models)
    assert torch.equal(merged.classifier.weight, models[0].classifier.weight)
    assert not torch.equal(merged.bert.pooler.dense.weight, models[0].bert.pooler.dense.weight)
    other = make("bert", 1, "BertForSequenceClassification", num_labels=3)
    with pytest.raises(OptionError, match=r"classifier.weight is \[3, 16\] float32 in model 2, and \[2, 16\] .* first"):
        hf_glu.merge_experts([models[0], other])


def test_gated_conversions_and_activations_with_parameters():
    models = [make("bert", seed) for seed in range(2)]
    for model in models:
        hf_glu.convert(model, "geglu")
    merged = hf_glu.merge_experts([models[0], copy.deepcopy(models[0])])
    assert merged.config.hf_glu["experts"]["groups"] == "geglu*2"
    assert_same(outputs(merged), outputs(models[0]), "exact up to rounding")
    hf_glu.merge_experts(models)
    learned = [make("gpt2", seed, activation_function="prelu") for seed in range(2)]
    for number, model in enumerate(learned):
        for site in convertible_sites(model):
            site.act.weight.data.fill_(0.1 + number)
    merged = hf_glu.merge_experts(learned)
    for experts in find_experts(merged).values():
        slopes = [bank.act.weight.item() for bank in experts.banks]
        assert slopes == pytest.approx([0.1, 1.1])


def test_the_change_alone_makes_experts_of_a_model_and_others():
    model, other = make("gpt2"), make("gpt2", 1)
    planned = hf_glu.plan(model, Merge(others=(other,), names=("x", "y")))
    assert planned.promise == "approximate"
    assert "the models' FFNs differ" in planned.to_dict()["sites"][0]["note"]
    assert hf_glu.plan(model, Merge(others=(make("gpt2"),))).promise == "exact"


def stateful(name):
    model = make(name)
    hf_glu.convert(model, "stateful_geglu_new")
    return model


def with_experts():
    model = make("gpt2")
    hf_glu.convert(model, "geglu_new", experts=2)
    return model


BAD = {
    "one": (lambda: [make("gpt2")], {}, "two models at least, got 1"),
    "no list": (lambda: make("gpt2"), {}, "needs a list of two models at least, got a GPT2LMHeadModel"),
    "a name": (lambda: [make("gpt2"), "gpt2"], {}, "got the str 'gpt2'"),
    "classes": (lambda: [make("gpt2"), make("bert")], {}, "model 2 is a BertForMaskedLM, and the first a GPT2LMHead"),
    "shapes": (lambda: [make("gpt2"), make("gpt2", n_inner=48)], {}, "model 2 has n_inner 48, and the first 40"),
    "vocabularies": (lambda: [make("bert"), make("bert", vocab_size=70)], {}, "vocab_size 70, and the first 61"),
    "activations": (
        lambda: [make("bert"), make("bert"), make("bert", hidden_act="relu")], {},
        "model 3 has hidden_act 'relu', and the first 'gelu'",
    ),
    "dtypes": (lambda: [make("bert"), make("bert").bfloat16()], {}, "bfloat16 in model 2"),
    "experts": (lambda: [with_experts(), with_experts()], {}, "model 1 has experts already"),
    "banks": (lambda: [make_native("mixtral"), make_native("mixtral")], {}, "model 1 has experts already"),
    "wrapped": (lambda: [stateful("gpt2"), stateful("gpt2")], {}, "stateful_geglu_new is more than a plain or gated"),
    "no prompts": (lambda: [make("bert"), make("bert")], {"router": "hidden"}, "needs prompts=.* each of the 2 models"),
    "too few prompts": (
        lambda: [make("bert"), make("bert")], {"router": "hidden", "prompts": IDS}, "each of the 2 models, got 3",
    ),
    "flat prompts": (
        lambda: [make("bert"), make("bert")], {"router": "hidden", "prompts": ["a", "b"]}, "got 2 of type str",
    ),
    "empty prompts": (
        lambda: [make("bert"), make("bert")], {"router": "hidden", "prompts": [IDS[0], []]}, "model 2 has no prompts",
    ),
    "unread prompts": (lambda: [make("bert"), make("bert")], {"prompts": IDS[:2]}, "router='random' reads no prompts"),
    "router": (lambda: [make("bert"), make("bert")], {"router": "hiden"}, "router must be one of random, hidden"),
    "attention": (lambda: [make("bert"), make("bert")], {"attention": "last"}, "must be one of average, first"),
    "top_k": (lambda: [make("bert"), make("bert")], {"top_k": 3}, "top_k must be 1 to 2"),
    "names": (lambda: [make("bert"), make("bert")], {"names": ["a"]}, "sources must be a list of 2 names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case):
    made, options, says = BAD[case]
    models = made()
    whole = [model for model in models if not isinstance(model, str)] if isinstance(models, list) else [models]
    before = [structure(model) for model in whole]
    with pytest.raises(HfGluError, match=says) as raised:
        hf_glu.merge_experts(models, **options)
    assert isinstance(raised.value, (OptionError, ConversionError))
    assert "\n" not in str(raised.value)
    assert [structure(model) for model in whole] == before
