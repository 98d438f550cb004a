"""Healing: the loss against references, what it trains, whole runs, live models, conversions, and bad input."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from comparing import assert_same
from covering import few
from pico import FAMILIES, make_native
from taskdata import make_texts
from torch.nn import functional
from transformers import AutoTokenizer
from versions import needs_attention

import hf_glu
from hf_glu import cli
from hf_glu.bench.coverage.tiny import model_types, tiny_inputs, tiny_model
from hf_glu.checkpoint.files import CARD_FILE, REPORT_FILE, SENTENCE_TRANSFORMERS_FILE
from hf_glu.checkpoint.jsonio import read_object
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import HfGluError, OptionError
from hf_glu.ffn.forward import ffn_output
from hf_glu.training.language.blocks import IDS
from hf_glu.training.language.dropout import without_dropout
from hf_glu.training.language.healing import Healing, divergence, predicted
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.likeness import Likeness, mean_state
from hf_glu.training.language.objectives import IGNORED, OBJECTIVES
from hf_glu.training.language.options import LanguageOptions, LanguageTraining
from hf_glu.training.language.pretraining import run_language
from hf_glu.training.language.teachers import find_teacher
from hf_glu.training.language.tokenizers import train_tokenizer
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.loop.interrupt import Interrupted
from hf_glu.training.parameters.gates import count_parameters, train_only_gates, trained_halves

OPTIONS = LanguageTraining(
    max_steps=30, batch_size=4, lr=1e-3, max_length=32, precision="no", eval_batch_size=4, log_every=1, warmup=0.0
)
# objective -> family, class, options that turn dropout off
KINDS = {
    "clm": ("gpt2", None, {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "mlm": ("bert", None, {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}),
    "span": ("t5", None, {"dropout_rate": 0}),
    "hidden": ("bert", "BertModel", {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}),
}
SIZE = 400
CASES = [
    ("clm", "none"), ("clm", "ffn"), ("clm", "hidden"), ("mlm", "ffn"), ("span", "ffn"), ("span", "hidden"),
    ("hidden", "ffn"), ("hidden", "hidden"),
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts()))
    return str(path)


def enlarged(model):
    """Make a model's FFNs and logits more than next to nothing."""
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.ndim == 2 else 1
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a dense model of each objective, and the same with FFNs of half the width, whose report names it."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for objective, (family, head, options) in KINDS.items():
        dense, narrow = folder / f"{objective}-dense", folder / f"{objective}-narrow"
        enlarged(FAMILIES[family].make(head, vocab_size=SIZE, **options)).save_pretrained(dense)
        train_tokenizer(make_texts(), SIZE, objective).save_pretrained(dense)
        if objective == "hidden":
            (dense / SENTENCE_TRANSFORMERS_FILE).write_text("[]")
        hf_glu.convert_checkpoint(
            dense, narrow, FAMILIES[family].exact, width=16, calibration=make_texts(), distill_steps=0
        )
        found[objective] = str(dense), str(narrow)
    return found


def job_of(folders, corpus, objective, **more):
    dense, narrow = folders[objective]
    return LanguageOptions(**{"model": narrow, "teacher": dense, "data": [corpus], **more})


def healing_of(run: LanguageRun) -> Healing:
    return run.likeness.healing


# the loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_that_of_the_formula(temperature):
    torch.manual_seed(0)
    own, other = torch.randn(7, 11, requires_grad=True), torch.randn(7, 11)
    found = divergence(own, other, temperature)
    (gradient,) = torch.autograd.grad(found, own)
    exact = own.detach().double().requires_grad_()
    p, q = ((logits / temperature).softmax(-1) for logits in (other.double(), exact))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(wanted, exact)[0], rtol=1e-5, atol=1e-6)
    assert divergence(other, other, temperature).abs() < 1e-6
    assert divergence(own[:0], other[:0], temperature) == 0


def test_predicted_tokens_are_those_of_the_objective():
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[IGNORED, 1, 2, 3], [IGNORED, IGNORED, 4, IGNORED]])
    found = {name: predicted(OBJECTIVES[name], logits, labels) for name in ("clm", "mlm")}
    assert_same(found, {
        "clm": torch.stack([logits[0, 0], logits[0, 1], logits[0, 2], logits[1, 1]]),
        "mlm": torch.stack([logits[0, 1], logits[0, 2], logits[0, 3], logits[1, 2]]),
    }, "bitwise")  # fmt: skip


@pytest.mark.parametrize(("objective", "match"), CASES)
def test_the_loss_is_that_of_the_formula(objective, match, folders, corpus):
    made = LanguageRun(job_of(folders, corpus, objective, match=match, teacher_share=0.7, temperature=2.0), OPTIONS)
    model, healing = made.model.double().eval(), healing_of(made)
    healing.teacher.double()
    batch = made.train.batch(range(5), 0)
    found = healing.loss(model, batch).double()
    labels = batch["labels"]
    kept = {key: value for key, value in batch.items() if key != "labels" or objective == "span"}
    with torch.no_grad():
        own, other = (each(**kept, output_hidden_states=True) for each in (model, healing.teacher))
    wanted = torch.zeros((), dtype=torch.float64)
    if objective != "hidden":
        shifted = labels[:, 1:] if objective == "clm" else labels
        rows = [(out.logits[:, :-1] if objective == "clm" else out.logits)[shifted != IGNORED] for out in (own, other)]
        q, p = ((row / 2).log_softmax(-1) for row in rows)
        wanted += 0.7 * 4 * (p.exp() * (p - q)).sum(-1).mean()
        wanted += 0.3 * functional.cross_entropy(rows[0], shifted[shifted != IGNORED])
    if match == "hidden" or objective == "hidden":
        wanted += _states(own, other, batch, objective)
    if match == "ffn":
        wanted += _ffns(model, healing, batch, objective)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def _weighted(own, wanted, batch, valid):
    """Return the mean over texts, by their labels, of the mean error over the tokens of each."""
    counts, means = (batch["labels"] != IGNORED).sum(-1), []
    for mine, theirs, keep in zip(own, wanted, valid, strict=True):
        size = theirs[keep].square().sum(-1)
        floor = size.sort().values[(len(size) - 1) // 2]  # the lower one of two medians
        means.append(((mine - theirs)[keep].square().sum(-1) / size.clamp_min(floor)).mean())
    return sum(count * mean for count, mean in zip(counts, means, strict=True)) / counts.sum()


def _valid(batch, objective, decoder=False):
    if decoder:
        return batch["labels"] != IGNORED
    return batch.get("attention_mask", torch.ones_like(batch[IDS])).bool()


def _states(own, other, batch, objective):
    found = []
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        for mine, theirs in list(zip(getattr(own, name, None) or (), getattr(other, name, None) or (), strict=True))[
            1:
        ]:
            valid = _valid(batch, objective, decoder=name.startswith("decoder"))
            found.append(_weighted(mine, theirs, batch, valid))
    return sum(found) / len(found)


def _ffns(model, healing, batch, objective):
    """Return the mean error of FFNs, from what they are given, recorded by plain hooks."""
    given, found = {}, []
    handles = [
        site.in_proj.register_forward_pre_hook(lambda module, args, name=site.name: given.__setitem__(name, args[0]))
        for site in hf_glu.find_sites(model)
    ]
    with torch.no_grad():
        model(**healing.inputs(batch))
    for handle in handles:
        handle.remove()
    others = {site.name: site for site in hf_glu.find_sites(healing.teacher)}
    for site in hf_glu.find_sites(model):
        with torch.no_grad():
            mine, theirs = (ffn_output(each, given[site.name]) for each in (site, others[site.name]))
        valid = _valid(batch, objective, decoder=site.stack == "decoder" and objective == "span")
        found.append(_weighted(mine, theirs, batch, valid))
    return sum(found) / len(found)


@pytest.mark.parametrize(("objective", "match"), few(CASES, 3, tuples=True))
def test_only_the_student_gets_gradients(objective, match, folders, corpus):
    made = LanguageRun(job_of(folders, corpus, objective, match=match), OPTIONS)
    healing = healing_of(made)
    before = {key: value.clone() for key, value in healing.teacher.state_dict().items()}
    healing.loss(made.model.train(), made.train.batch(range(4), 0)).backward()
    missing = [name for name, p in made.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad is None for p in healing.teacher.parameters())
    assert not healing.teacher.training
    made.fit()
    assert_same(dict(healing.teacher.state_dict()), before, "bitwise")
    ours = {id(p) for p in made.model.parameters()}
    assert ours.isdisjoint(id(p) for p in healing.teacher.parameters())


def test_gradient_checkpointing_and_dropped_masks_change_nothing(folders, corpus):
    def gradients(checkpointing):
        made = LanguageRun(job_of(folders, corpus, "mlm", match="ffn"), OPTIONS)
        if checkpointing:
            made.model.gradient_checkpointing_enable()
        healing_of(made).loss(made.model.train(), made.train.batch(range(4), 0)).backward()
        return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}

    assert_same(gradients(True), gradients(False), "bitwise")


# runs


@pytest.mark.parametrize(("objective", "match"), few(CASES, 3, tuples=True))
def test_micro_batches_add_up_to_the_whole(objective, match, folders, corpus):
    """Their losses are weighted as in the loop, by the tokens that are predicted; in float64, as Adam hides a lot."""
    made = LanguageRun(
        job_of(folders, corpus, objective, match=match, teacher_share=0.5, documents="separate"), OPTIONS
    )
    model, examples = made.model.double().train(), made.examples()
    healing_of(made).teacher.double()

    def gradients(parts):
        model.zero_grad()
        total = sum(examples.items(part, 0) for part in parts)
        for part in parts:
            loss = examples.loss(model, examples.batch(part, 0)) * examples.items(part, 0) / total
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found, wanted = gradients([[0, 1], [2], [3, 4, 5, 6]]), gradients([list(range(7))])
    assert len({len(examples.batch([row], 0)[IDS][0]) for row in range(7)}) > 1 or objective == "clm"
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 1e-4
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "hidden"])
def test_a_run_heals_and_is_resumed_bitwise(objective, folders, corpus, tmp_path, monkeypatch):
    job = job_of(folders, corpus, objective, match="hidden", teacher="base")
    options = replace(OPTIONS, evaluate_every=10, checkpoint_every=50)
    report = run_language(replace(job, output=str(tmp_path / "whole")), options)
    whole = report["outcome"]
    assert whole["reloaded_equal"]  # in a fresh process
    main = "kl" if objective == "clm" else "hidden_error"
    assert whole["metrics"][main] < whole["before"][main]
    assert whole["metrics"]["ffn_error"] < whole["before"]["ffn_error"]
    errors = list(whole["healing"]["sites"].values())
    for at, metrics in enumerate((whole["before"], whole["metrics"])):
        assert sum(pair[at] for pair in errors) / len(errors) == pytest.approx(metrics["ffn_error"])
    assert whole["healing"]["teacher"] == f"{objective}-dense"
    assert whole["training"]["tokens"] > 0
    assert whole["main"] == [main]
    assert report["rows"][-1]["model"] == "healed"
    parts = replace(job, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patched:
        plain, taken = loop_module.TrainingLoop._step, []

        def stepping(self):
            taken.append(1)
            if len(taken) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(self)

        patched.setattr(loop_module.TrainingLoop, "_step", stepping)
        with pytest.raises(Interrupted):
            run_language(parts, options)
    resumed = run_language(parts, options, resume=True)["outcome"]
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["healing"] == whole["healing"]
    first, second = (dict(load_model(tmp_path / name).state_dict()) for name in ("whole", "parts"))
    assert_same(second, first, "bitwise")
    assert (tmp_path / "whole" / SENTENCE_TRANSFORMERS_FILE).is_file() == (objective == "hidden")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"peft": "lora"}, {"peft": "gates"}])
@pytest.mark.parametrize("match", ["ffn", "hidden"])
def test_few_parameters_can_be_healed(match, more, folders, corpus):
    made = LanguageRun(job_of(folders, corpus, "clm", match=match, **more), OPTIONS)
    before = made.evaluate(made.model, "before")[0]
    made.fit()
    assert made.evaluate(made.model, "after")[0]["kl"] < before["kl"]
    assert made.entry["parameters"]["trainable"] < made.entry["parameters"]["total"]


@pytest.mark.slow
def test_a_model_is_converted_and_healed_by_what_it_was(folders, corpus, tmp_path):
    job = LanguageOptions(
        model=folders["clm"][0], teacher="base", to="geglu_new", width="16", data=[corpus], output=str(tmp_path / "run")
    )
    report = run_language(job, OPTIONS)
    assert [row["model"] for row in report["rows"]] == ["teacher", "geglu_new, converted", "geglu_new, healed"]
    teacher, before, after = (row["metrics"] for row in report["rows"])
    assert before["kl"] > after["kl"] > 0
    assert teacher.keys() == {"loss", "perplexity", "bits_per_byte"}
    assert teacher["loss"] == pytest.approx(hf_glu_loss(folders["clm"][0], corpus, job), rel=1e-5)


def hf_glu_loss(model, corpus, job):
    """Return a model's own loss on the validation text of a run."""
    made = LanguageRun(LanguageOptions(model=model, data=[corpus]), OPTIONS)
    return made.evaluate(made.model, "")[0]["loss"]


def test_measured_values_are_those_of_the_formulas(folders, corpus):
    for objective in ("clm", "hidden"):
        made = LanguageRun(job_of(folders, corpus, objective, match="ffn"), replace(OPTIONS, eval_batch_size=3))
        healing, count = healing_of(made), len(made.validation)
        for model in (made.model, healing.teacher):
            model.double()  # in float32 a batch and its rows one by one differ by more than the bounds, on some CPUs
        found = made.evaluate(made.model, "")[0]
        batches = [made.validation.batch([row], -1) for row in range(count)]
        pairs = []
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with torch.no_grad():
                pairs.append([each(**inputs) for each in (made.model.eval(), healing.teacher)])
        if objective == "clm":
            rows = [torch.cat([pair[at].logits[0, :-1] for pair in pairs]).double() for at in (0, 1)]
            q, p = (row.log_softmax(-1) for row in rows)
            assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
            assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
            assert math.exp(found["loss"]) == pytest.approx(found["perplexity"])
        else:
            means = [torch.cat([pair[at].last_hidden_state.mean(1) for pair in pairs]) for at in (0, 1)]
            assert found["cosine"] == pytest.approx(functional.cosine_similarity(*means).mean().item(), rel=1e-5)
            rows = [torch.cat([pair[at].last_hidden_state[0] for pair in pairs]) for at in (0, 1)]
            wanted = ((rows[0] - rows[1]).norm() / rows[1].norm()).item()
            assert found["hidden_error"] == pytest.approx(wanted, rel=1e-5)
    same = Likeness(replace(healing, teacher=made.model))
    assert same.measure(made.model, made.validation, batch_size=4, accelerator=None, title="")["cosine"] > 0.99999
    states, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(mean_state(states, mask), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))


@pytest.mark.parametrize("padded", ["teacher", "model"])
def test_a_vocabulary_that_is_padded_otherwise_is_no_other(padded, folders, corpus, tmp_path):
    dense, narrow = folders["clm"]
    source, wide = (dense if padded == "teacher" else narrow), tmp_path / "padded"
    model = load_model(source)
    model.resize_token_embeddings(SIZE + 48, mean_resizing=False)
    model.get_input_embeddings().weight.data[SIZE:] = 3.0  # weights that a softmax would hear of
    shutil.copytree(source, wide)
    model.save_pretrained(wide)
    given = {"teacher": str(wide)} if padded == "teacher" else {"model": str(wide), "teacher": dense}
    made, plain = (
        LanguageRun(job_of(folders, corpus, "clm", **more, teacher_share=1.0), OPTIONS) for more in (given, {})
    )
    batch = made.train.batch(range(5), 0)
    found, wanted = (healing_of(run).loss(run.model.eval(), batch) for run in (made, plain))
    assert_same(found, wanted, "exact")
    mine, theirs = (run.evaluate(run.model, "")[0] for run in (made, plain))
    assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
    assert mine["agreement"] == pytest.approx(theirs["agreement"])
    own, other = made.model, healing_of(made).teacher
    assert (mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)) == (padded == "teacher")  # a loss is of all tokens
    assert own.config.vocab_size != other.config.vocab_size


@pytest.mark.parametrize("match", ["ffn", "hidden"])
def test_padding_after_packed_documents_is_not_matched(match, folders, corpus):
    made = LanguageRun(job_of(folders, corpus, "clm", match=match, documents="separate"), OPTIONS)
    healing, blocks = healing_of(made), made.train.blocks
    rows = sorted(range(len(blocks)), key=lambda row: len(blocks[row][IDS]))[
        :3
    ]  # the short ones, behind which is padding
    batch = made.train.batch([*rows, len(blocks) // 2], 0)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    other = {**batch, IDS: batch[IDS].masked_fill(padding, 7)}
    found = [healing.loss(made.model.eval(), each) for each in (batch, other)]
    assert_same(found[1], found[0], "exact")
    with torch.no_grad():
        likeness = [made.likeness._part(made.model, each, healing.pairs) for each in (batch, other)]
    assert likeness[1] == pytest.approx(likeness[0], rel=1e-5)


# live models


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertModel", "BertForSequenceClassification"])
def test_a_live_model_is_healed_in_place(head, folders, corpus):
    tokenizer = AutoTokenizer.from_pretrained(folders["mlm"][0])
    teacher = enlarged(FAMILIES["bert"].make(head, vocab_size=SIZE, **KINDS["mlm"][2])).train()
    model = FAMILIES["bert"].make(head, vocab_size=SIZE, **KINDS["mlm"][2])
    model.load_state_dict(teacher.state_dict())
    hf_glu.convert(model, "swiglu", width=16, calibration=make_texts(), tokenizer=tokenizer, distill_steps=0)
    model.bfloat16().train()
    next(model.parameters()).requires_grad_(False)
    flags, before = [p.requires_grad for p in model.parameters()], teacher.state_dict()
    ids = {key: id(p) for key, p in model.named_parameters()}
    report = hf_glu.heal(
        model, teacher, corpus, tokenizer=tokenizer, max_steps=30, batch_size=4, lr=1e-3, max_length=32, precision="no"
    )
    main = "kl" if head == "BertForMaskedLM" else "hidden_error"
    assert report["after"][main] < report["before"][main]
    assert report["training"]["steps"] == 30
    assert len(report["sites"]) == 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training
    assert teacher.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {key: id(p) for key, p in model.named_parameters()} == ids
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert_same(dict(teacher.state_dict()), dict(before), "bitwise")
    assert count_parameters(model)["total"] == model.num_parameters()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}),
        ("gpt2", {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}),
        ("t5", {"dropout_rate": 0.4}),
        ("llama", {"attention_dropout": 0.4}),
        ("bart", {"dropout": 0.4, "attention_dropout": 0.4, "activation_dropout": 0.4, "encoder_layerdrop": 0.4}),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_drops_while_a_model_is_healed(family, options, attention):
    needs_attention(getattr(transformers, model_types()[family]), attention)
    model = tiny_model(family, attn_implementation=attention, **options).train()
    inputs, rates = tiny_inputs(model), [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]

    def last():
        return model(**inputs, output_hidden_states=True)[0]

    assert not torch.equal(last(), last())
    with without_dropout(model):
        assert_same(last(), last(), "bitwise")
        found = last()
    assert not torch.equal(last(), found)
    assert rates == [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert_same(model.eval()(**inputs, output_hidden_states=True)[0], found, "exact")


def test_healing_drops_nothing(folders, corpus):
    tokenizer, found = AutoTokenizer.from_pretrained(folders["hidden"][0]), []
    for rate in (0.0, 0.5):
        teacher, model = (load_model(folder) for folder in folders["hidden"])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        hf_glu.heal(
            model, teacher, corpus, tokenizer=tokenizer, max_steps=2, batch_size=4, max_length=32, precision="no"
        )
        found.append(dict(model.state_dict()))
    assert_same(*found, "bitwise")


def test_a_live_teacher_drops_nothing_whatever_its_mode_and_dtype(folders, corpus):
    """Half precision of the same weights, in training mode, teaches what they do in float32."""
    tokenizer, found = AutoTokenizer.from_pretrained(folders["clm"][0]), []
    teacher = load_model(folders["clm"][0]).bfloat16().float()
    for dropping in (False, True):
        model = load_model(folders["clm"][1])
        for module in teacher.modules():
            if dropping and isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        if dropping:
            teacher.bfloat16().train()
            teacher.transformer.h[0].eval()
        report = hf_glu.heal(model, teacher, corpus, tokenizer=tokenizer, max_steps=1, batch_size=4, precision="no")
        found.append((report["before"], report["after"]))
    assert found[0] == found[1]
    assert teacher.dtype == torch.bfloat16
    assert [block.training for block in teacher.transformer.h] == [False, True]


def test_a_teacher_reads_whole_blocks_and_each_document_alone(folders, corpus):
    tokenizer, model = AutoTokenizer.from_pretrained(folders["clm"][0]), load_model(folders["clm"][1])
    short = FAMILIES["gpt2"].make(vocab_size=SIZE, n_positions=32, n_layer=2)
    more = {"tokenizer": tokenizer, "max_steps": 1, "batch_size": 2, "precision": "no"}
    assert hf_glu.heal(model, short, corpus, **more)["after"]["kl"] > 0  # in blocks of 32 tokens
    with pytest.raises(OptionError, match="max_length=64 is too long for model and teacher, which read 32 tokens"):
        hf_glu.heal(model, short, corpus, max_length=64, **more)
    config = transformers.MambaConfig(vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(OptionError, match="mamba doesn't keep packed documents apart"):
        hf_glu.heal(model, transformers.MambaForCausalLM(config), corpus, documents="separate", **more)


@pytest.mark.parametrize("stop", [False, True])
def test_a_model_healed_in_mixed_precision_has_its_own_forward_again(stop, folders, corpus, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folders["hidden"][0])
    teacher, model = (load_model(folder) for folder in folders["hidden"])

    def heal():
        options = {"max_steps": 2, "batch_size": 4, "max_length": 32, "precision": "bf16"}
        return hf_glu.heal(model, teacher, corpus, tokenizer=tokenizer, **options)

    if stop:
        monkeypatch.setattr(Healing, "loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
        with pytest.raises(HfGluError, match="the loss is nan"):
            heal()
    else:
        assert heal()["after"]["cosine"] <= 1
    assert "forward" not in vars(model)
    found = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert found.last_hidden_state.dtype == torch.float32
    assert len(found.hidden_states) == 3


def test_what_cannot_be_healed_live_is_one_line(folders, corpus):
    dense, narrow = (load_model(name) for name in folders["clm"])
    tokenizer = AutoTokenizer.from_pretrained(folders["clm"][0])
    more = {"tokenizer": tokenizer, "max_steps": 1, "precision": "no"}
    with pytest.raises(OptionError, match="the teacher is the model itself"):
        hf_glu.heal(narrow, narrow, corpus, **more)
    with pytest.raises(OptionError, match="give the tokenizer"):
        hf_glu.heal(narrow, dense, corpus)
    with pytest.raises(OptionError, match="output isn't for heal"):
        hf_glu.heal(narrow, dense, corpus, output="somewhere", **more)
    with pytest.raises(OptionError, match="GPT2Model, has no such head as GPT2LMHeadModel"):
        hf_glu.heal(narrow, dense.transformer, corpus, **more)
    with pytest.raises(OptionError, match="can't be healed by mlm, but by clm"):
        hf_glu.heal(narrow, dense, corpus, objective="mlm", **more)
    other = make_native("llama", vocab_size=SIZE + 8)
    with pytest.raises(OptionError, match="teacher's vocabulary has 408 tokens, the model's 400"):
        hf_glu.heal(narrow, other, corpus, **more)
    wide = FAMILIES["gpt2"].make(vocab_size=SIZE, n_embd=32)
    with pytest.raises(OptionError, match="hidden states have 32 channels, the model's 16: give match=none"):
        hf_glu.heal(narrow, wide, corpus, match="hidden", **more)
    deep = FAMILIES["gpt2"].make(vocab_size=SIZE, n_layer=3)
    with pytest.raises(OptionError, match="hidden states have 3 layers, the model's 2"):
        hf_glu.heal(narrow, deep, corpus, match="hidden", **more)
    assert narrow.dtype == torch.float32


# conversions


def test_a_conversion_is_healed_before_it_is_written(folders, corpus, tmp_path, capsys):
    source, made = folders["clm"][0], tmp_path / "made"
    (tmp_path / "calibration.txt").write_text("\n".join(make_texts()))
    (tmp_path / "options.yaml").write_text("max_steps: 30\nlr: 1e-3\nbatch_size: 4\nmax_length: 32\nprecision: 'no'\n")
    command = ["convert", source, str(made), "--to", "geglu_new", "--width", "16", "--heal", corpus]
    command += ["--calibration", str(tmp_path / "calibration.txt"), "--heal-options", str(tmp_path / "options.yaml")]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "healed by clm-dense" in said
    assert "relative error of an FFN's output" in said
    healing = read_object(made / REPORT_FILE)["healing"]
    assert healing["after"]["kl"] < healing["before"]["kl"]
    assert healing["training"]["steps"] == 30
    card = (made / CARD_FILE).read_text()
    assert "which was then healed by `clm-dense` on unlabelled text." in card
    assert "## Healing" in card
    assert "nothing is known of its quality" not in card
    assert hf_glu.find_sites(load_model(made))[0].activation == "geglu_new"
    assert find_teacher(LanguageOptions(model=str(made), teacher=source, data=[corpus])) == source


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--heal", "nowhere.txt"], "there is no nowhere.txt"),
        (["--heal-options", "x.yaml"], "give --heal, too"),
        (["--heal", "x.txt", "--stream"], "leave --heal out"),
        (["--heal", "x.txt", "--plan"], "leave --heal out"),
    ],
)
def test_a_conversion_that_cannot_be_healed_is_one_line(more, why, folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", folders["clm"][0], str(tmp_path / "made"), "--to", "geglu_new", *more])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert why in said
    assert not list(tmp_path.iterdir())


# the teacher, and bad input


def test_the_base_is_what_a_report_names(folders, corpus, tmp_path):
    dense, narrow = folders["mlm"]
    assert find_teacher(LanguageOptions(model=narrow, teacher="base", data=[corpus])) == dense
    assert find_teacher(LanguageOptions(model=dense, teacher="base", to="geglu", data=[corpus])) == dense
    with pytest.raises(OptionError, match="wasn't converted"):
        find_teacher(LanguageOptions(model=dense, teacher="base", data=[corpus]))
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    for file in Path(narrow).iterdir():
        (lonely / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OptionError, match="isn't beside it"):
        find_teacher(LanguageOptions(model=str(lonely), teacher="base", data=[corpus]))
    report = json.loads((lonely / REPORT_FILE).read_text())
    report["base"] = {"name": "user/name", "repository": True}
    (lonely / REPORT_FILE).write_text(json.dumps(report))
    assert find_teacher(LanguageOptions(model=str(lonely), teacher="base", data=[corpus])) == "user/name"


def _cases(folders, corpus):
    data = ["--data", corpus]
    model = ["--model", folders["mlm"][1], *data]
    return {
        "no teacher there": ([*model, "--teacher", "nowhere/at/all"], "nowhere/at/all"),
        "no head": ([*model, "--teacher", folders["hidden"][0]], "has no language-model head"),
        "another vocabulary": ([*model, "--teacher", folders["clm"][0]], "clm-dense"),
        "another tokenizer": ([*model, "--teacher", folders["other"]], "has another vocabulary"),
        "no base": (["--model", folders["mlm"][0], *data, "--teacher", "base"], "wasn't converted"),
        "no teacher": ([*model, "--match", "hidden"], "does nothing without teacher"),
        "hidden alone": ([*model, "--objective", "hidden"], "give the teacher"),
        "share": ([*model, "--teacher", "x", "--teacher-share", "1.5"], "teacher_share must be 0 to 1"),
        "temperature": ([*model, "--teacher", "x", "--temperature", "0"], "temperature must be more than 0"),
        "match": ([*model, "--teacher", "x", "--match", "ffns"], "match must be one of"),
        "empty": (["--model", folders["mlm"][1], "--data", folders["empty"], "--teacher", "base"], "is empty"),
        "compiled": ([*model, "--teacher", "base", "--match", "ffn", "--compile"], "can't be compiled or sharded"),
        "from scratch": (
            ["--config", "{}", "--train-tokenizer", "400", *data, "--teacher", "base"],
            "name the teacher",
        ),
    }


@pytest.mark.parametrize("case", list(_cases(dict.fromkeys((*KINDS, "other", "empty"), ("", "")), "")))
def test_bad_input_is_one_line(case, folders, corpus, tmp_path, capsys):
    other, empty = tmp_path / "other", tmp_path / "empty.txt"
    FAMILIES["bert"].make(vocab_size=SIZE).save_pretrained(other)
    train_tokenizer(make_texts(seed=1) + ["quite another word"] * 9, SIZE, "mlm").save_pretrained(other)
    empty.write_text("")
    output = tmp_path / "run"
    arguments, why = _cases({**folders, "other": str(other), "empty": str(empty)}, corpus)[case]
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", *arguments, "--output", str(output)])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert said.count("\n") == 1, said
    assert why in said
    assert not output.exists()


def test_experts_have_no_ffn_to_match(folders, corpus):
    job = LanguageOptions(
        model=folders["clm"][0], to="geglu_new", experts="2", teacher="base", match="ffn", data=[corpus]
    )
    with pytest.raises(OptionError, match="compares FFNs one by one"):
        LanguageRun(job, OPTIONS)
    made = LanguageRun(replace(job, match="hidden"), OPTIONS)
    assert "ffn_error" not in made.evaluate(made.model, "")[0]


def test_gates_only_are_trained_after_healing_as_before(folders, corpus):
    tokenizer = AutoTokenizer.from_pretrained(folders["mlm"][0])
    teacher = FAMILIES["bert"].make(vocab_size=SIZE, **KINDS["mlm"][2])
    model = copy.deepcopy(teacher)
    hf_glu.convert(model, "geglu")
    train_only_gates(model)
    halves, counts = trained_halves(model), count_parameters(model)
    hf_glu.heal(model, teacher, corpus, tokenizer=tokenizer, max_steps=1, batch_size=4, max_length=32, precision="no")
    assert trained_halves(model) == halves != {}
    assert count_parameters(model) == counts
    model(input_ids=torch.arange(5, 13)[None]).logits.sum().backward()
    gate, up = model.bert.encoder.layer[0].intermediate.dense.weight.grad.chunk(2)
    assert gate.abs().sum() == 0 < up.abs().sum()
