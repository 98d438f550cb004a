"""Texts to write, from pairs of one's own: with encoder-decoders and with decoders."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from comparing import assert_same
from covering import few
from datasets import Dataset
from pico import FAMILIES
from taskdata import make_tokenizer, save_base, written_rows
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.errors import CheckpointError, DataError, MissingPackageError, OptionError, UnknownNameError
from hf_glu.publishing.card.card import write_card
from hf_glu.tasks import TASKS
from hf_glu.tasks.choices import OwnOptions
from hf_glu.tasks.metrics import compute
from hf_glu.tasks.own import own_task
from hf_glu.training import job as job_module
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.data.features import collate, count_items, loss_of, make_features
from hf_glu.training.data.pairs import collate_prompts
from hf_glu.training.job import Job, run_job
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.options import JobOptions, TrainingOptions

EXACT = {"t5": "reglu", "bart": "geglu", "gpt2_lm": "geglu_new", "llama": "swiglu"}
OPTIONS = TrainingOptions(
    max_steps=2, batch_size=4, lr=1e-3, max_length=16, precision="no", evaluate_every=0, eval_batch_size=8
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_base(folder / family, family) for family in EXACT}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "films.jsonl"
    Dataset.from_list(written_rows(40)).to_json(path)
    return str(path)


@pytest.fixture
def job(bases, data):
    return JobOptions(model=bases["gpt2_lm"], dataset=data, metrics="exact_match", max_target_length=6)


@pytest.mark.parametrize("family", EXACT)
def test_every_family_writes(family, bases, job):
    results = run_job(replace(job, model=bases[family], to=EXACT[family]), OPTIONS)
    assert set(results["metrics"]) == {"exact_match"}
    assert results["conversion"]["promise"].startswith("exact")
    assert results["examples"] == {"train": 36, "validation": 4}


@pytest.mark.slow
def test_a_decoder_learns_saves_and_writes_the_same_in_a_fresh_process(bases, job, data, tmp_path):
    output = tmp_path / "run"
    learning = replace(OPTIONS, max_steps=100, batch_size=20, lr=1e-2, warmup=0.1)
    job = replace(job, model=bases["llama"], validation=data, to="learnable_swiglu", output=str(output))
    outcome = finetune_and_report(job, learning, finish=write_card)["outcome"]
    assert outcome["reloaded_equal"] is True
    assert outcome["score"] > 0.9
    card = (output / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "fine-tuned on films" in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    given = tokenizer("Boston was it", return_tensors="pt")
    written = model.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=9)
    assert tokenizer.decode(written[0, 3:]) == "a film by Boston [EOS]"


@pytest.mark.parametrize("family", few(["t5", "gpt2_lm"], 2))
def test_a_resumed_run_is_the_uninterrupted_one(family, job, tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", family, **{"t5": {"dropout_rate": 0.2}}.get(family, {"resid_pdrop": 0.2}))
    options = replace(OPTIONS, max_steps=4, checkpoint_every=2, log_every=1, accumulate=2)
    job = replace(job, model=base)
    monkeypatch.setattr(job_module, "reloads_equal", lambda *_: True)
    whole = run_job(replace(job, output=str(tmp_path / "whole")), options)
    plain = loop_module.TrainingLoop._step

    def dying(self):
        if self.progress.step == 3:
            raise KeyError("power")
        return plain(self)

    parts = replace(job, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainingLoop, "_step", dying)
        with pytest.raises(KeyError, match="power"):
            run_job(parts, options)
    resumed = run_job(parts, options, resume=True)
    assert resumed["training"]["loss"] == whole["training"]["loss"]
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_micro_batches_change_nothing_but_rounding(job, tmp_path):
    base = save_base(tmp_path / "base", "gpt2_lm", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)

    def weights(accumulate):
        made = Job(replace(job, model=base), replace(OPTIONS, accumulate=accumulate, batch_size=5))
        made.fit()
        return {key: value.detach() for key, value in made.model.state_dict().items()}

    assert_same(weights(3), weights(1), "trained")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_is_trained_on_the_target_and_its_end_alone(side, job, data):
    made = Job(job, OPTIONS)
    made.tokenizer.padding_side = side
    rows = [{"source": "film", "label": "a"}, {"source": "the very film", "label": "a film by Anna"}]
    task, _ = own_task(data, OwnOptions(metrics="exact_match"))
    features = make_features(
        task, Dataset.from_list(rows), made.tokenizer, max_length=16, text=True, joined=True, max_target=6
    )
    batch = collate(features, made.tokenizer, [0, 1])
    end = made.tokenizer.eos_token_id
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        wanted = [*made.tokenizer(row["label"])["input_ids"], end]
        assert [label for label in labels if label != -100] == wanted
    assert count_items(features, [0, 1]) == batch["labels"].ne(-100).sum() == 2 + 5
    made.model.eval()
    found = loss_of(features)(made.model, batch)
    logits = made.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert_same(found, expected, "exact")
    prompts = collate_prompts(features.data[[0, 1]], made.tokenizer, None)
    assert prompts["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert made.tokenizer.batch_decode(prompts["input_ids"], skip_special_tokens=True) == ["film", "the very film"]


def test_a_decoder_whose_loss_is_not_shifted_is_trained_on_next_tokens(job, tmp_path):
    model = FAMILIES["bart"].make("BartForCausalLM", vocab_size=len(make_tokenizer()), pad_token_id=0, eos_token_id=1)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    made = Job(replace(job, model=str(tmp_path)), OPTIONS)
    made.model.eval()
    batch = made.examples().batch([0, 1, 2], 0)
    logits = made.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert_same(made.examples().loss(made.model, batch), expected, "exact")


def test_a_model_that_sees_what_it_writes_is_refused(job, tmp_path):
    tiny_model("xlnet", "XLNetLMHeadModel", vocab_size=len(make_tokenizer())).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="XLNetLMHeadModel sees the tokens that it would have to predict"):
        Job(replace(job, model=str(tmp_path)), OPTIONS)


def test_long_targets_are_cut_and_it_is_said(data, caplog):
    task, splits = own_task(data, OwnOptions(metrics="exact_match"))
    tokenizer = make_tokenizer()
    with caplog.at_level(logging.WARNING):
        cut = make_features(task, splits["train"], tokenizer, max_length=2, text=True, joined=True, max_target=3)
    assert "36 of 36 texts to write are longer than 3 tokens and cut there" in caplog.text
    assert {len(row) for row in cut.data["input_ids"]} == {5}
    assert {row[-1] for row in cut.data["input_ids"]} == {tokenizer.eos_token_id}
    assert cut.target_lengths == [3] * 36


def test_columns_have_any_name_and_the_first_metric_is_the_score(tmp_path):
    pytest.importorskip("sacrebleu")
    rows = [{"question": row["source"], "answer": row["target"]} for row in written_rows(20)]
    Dataset.from_list(rows).to_json(tmp_path / "own.jsonl")
    chosen = OwnOptions(source_column="question", target_column="answer", metrics="bleu, exact_match")
    task, splits = own_task(tmp_path / "own.jsonl", chosen)
    assert (task.form, task.metric, task.main, task.columns) == ("text", "bleu,exact_match", ("bleu",), ("question",))
    row = splits["train"][0]
    assert task.prompt(row) == row["question"]
    assert row["label"].startswith("a film by ")
    named = [{"source": row["source"], "target": row["target"]} for row in written_rows(20)]
    Dataset.from_list(named).to_json(tmp_path / "named.jsonl")
    assert own_task(tmp_path / "named.jsonl")[0].main == ("chrf",)


@pytest.mark.parametrize(
    ("chosen", "row", "error", "says"),
    [
        ({"source_column": "question"}, {}, DataError, "no text column 'question', but source, target"),
        ({"target_column": "answer"}, {}, DataError, "no column 'answer', but source, target"),
        ({"source_column": "source", "texts": "source"}, {}, OptionError, "source_column and texts exclude each other"),
        ({"source_column": "source", "problem": "multi"}, {}, OptionError, "are of problem=text, not of multi"),
        ({"metrics": "rogue"}, {}, UnknownNameError, "unknown metric 'rogue' of texts; .*rouge"),
        ({"metrics": "exact_match"}, {"target": ""}, DataError, "row 1: there is no text to write, but ''"),
        ({"metrics": "exact_match"}, {"source": " "}, DataError, "row 1: there is no text in 'source', but ' '"),
        ({"metrics": "exact_match"}, {"source": ["a"]}, DataError, "row 1: there is no text in 'source', but "),
        (
            {"problem": "text", "texts": "source,more"},
            {"more": "b"},
            OptionError,
            "has one source, not source and more",
        ),
    ],
)
def test_pairs_that_can_not_be_meant_are_refused(chosen, row, error, says, tmp_path):
    rows = [{"source": "a", "target": "b", **row}] * 4
    (tmp_path / "own.json").write_text(json.dumps(rows))
    with pytest.raises(error, match=says):
        own_task(tmp_path / "own.json", OwnOptions(**chosen))


def test_metrics_are_of_written_texts_and_rouge_of_latin_letters(tmp_path):
    pytest.importorskip("rouge_score")
    (tmp_path / "own.json").write_text(json.dumps([{"source": "一", "target": "二"}] * 4))
    with pytest.raises(
        DataError, match="rouge counts words of Latin letters and digits, and there are none: take chrf"
    ):
        own_task(tmp_path / "own.json", OwnOptions(metrics="rouge"))
    (tmp_path / "own.json").write_text(json.dumps([{"text": "a", "label": n % 2} for n in range(4)]))
    with pytest.raises(OptionError, match="metrics are of texts that are written, and own has labels"):
        own_task(tmp_path / "own.json", OwnOptions(metrics="exact_match"))


def test_a_metric_without_its_package_is_one_line(data, monkeypatch):
    from hf_glu.config import extras

    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    with pytest.raises(MissingPackageError, match=r'chrf needs sacrebleu.*pip install "hf_glu\[metrics\]"'):
        own_task(data)


def test_models_that_can_not_write_are_refused(job, tmp_path):
    bert, bare = save_base(tmp_path / "bert"), save_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(
        OptionError, match="films has texts to write: that is for T5, BART, GPT-2 and such, not for bert"
    ):
        run_job(replace(job, model=bert), OPTIONS)
    with pytest.raises(OptionError, match="not for form=classes"):
        run_job(replace(job, form="classes"), OPTIONS)
    with pytest.raises(OptionError, match=r"max_length=60 and max_target_length=6 is too long.*64 tokens"):
        run_job(job, replace(OPTIONS, max_length=60))
    assert run_job(replace(job, model=bare), OPTIONS)["training"]["steps"] == 2  # its embeddings are its head's, too
    llama = save_base(tmp_path / "llama", "llama")
    AutoModelForCausalLM.from_pretrained(llama).model.save_pretrained(llama)
    with pytest.raises(CheckpointError, match=r"lacks weights of LlamaForCausalLM, such as lm_head\.weight"):
        run_job(replace(job, model=llama), OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.eos_token = None
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(bare)
    with pytest.raises(OptionError, match="no token that ends a text"):
        run_job(replace(job, model=bare), OPTIONS)


def test_max_target_length_is_for_texts_to_write(job, tmp_path):
    Dataset.from_list([{"text": "film", "label": n % 2} for n in range(9)]).to_json(tmp_path / "own.jsonl")
    other = replace(job, dataset=str(tmp_path / "own.jsonl"), metrics=None)
    with pytest.raises(OptionError, match="max_target_length is for texts to write, and own has none"):
        run_job(other, OPTIONS)


def test_written_texts_are_scored_by_the_packages_that_others_use():
    rouge_scorer, sacrebleu = pytest.importorskip("rouge_score.rouge_scorer"), pytest.importorskip("sacrebleu")
    given = ["the film was very fine indeed today", "a dull one", ""]
    wanted = ["the film was fine indeed and long today", " a dull one ", "poor"]
    assert compute("exact_match", given, wanted) == {"exact_match": 1 / 3}
    # longest common subsequences of 6 of 7 and 8 words, 3 of 3 and 3, 0
    by_hand = (2 * (6 / 7) * (6 / 8) / (6 / 7 + 6 / 8) + 1 + 0) / 3
    assert compute("rouge", given, wanted)["rougeL"] == pytest.approx(by_hand)
    assert rouge_scorer.RougeScorer(["rougeL"]).score(wanted[0], given[0])["rougeL"].recall == 6 / 8
    assert compute("chrf", given, wanted)["chrf"] == pytest.approx(
        sacrebleu.CHRF().corpus_score(given, [wanted]).score / 100
    )
    assert compute("bleu", given, wanted)["bleu"] == pytest.approx(
        sacrebleu.BLEU().corpus_score(given, [wanted]).score / 100
    )
    assert compute("bleu", wanted, wanted) == pytest.approx({"bleu": 1.0})
    with pytest.raises(DataError, match=r"predictions\[0\] is None: a string is wanted"):
        compute("chrf", [None], ["a"])


def test_batches_of_prompts_do_not_change_what_is_written(job):
    made = Job(job, replace(OPTIONS, max_steps=6, lr=1e-2))
    made.fit()
    features = made.train
    both = [job_module.predict(made.model, features, made.tokenizer, batch_size=size) for size in (1, 16)]
    assert both[0] == both[1]
    assert torch.is_grad_enabled()


def test_a_checkpoints_way_to_generate_is_not_the_evaluations(job, bases):
    made = Job(replace(job, model=bases["bart"]), OPTIONS)
    wanted = job_module.predict(made.model, made.train, made.tokenizer)
    config = made.model.generation_config
    config.min_length, config.no_repeat_ngram_size, config.repetition_penalty = 5, 1, 9.0
    assert job_module.predict(made.model, made.train, made.tokenizer) == wanted
    assert made.model.generation_config is config


def test_a_long_class_is_written_to_its_end():
    tokenizer = make_tokenizer(end=True)
    rows = [{"text": "a film", "label": "very fine " * 30 if number % 2 else "dull"} for number in range(4)]
    task = replace(TASKS["sst2"], labels=("dull", ("very fine " * 30).strip()))
    raw = Dataset.from_list([{"sentence": row["text"], "label": number % 2} for number, row in enumerate(rows)])
    features = make_features(task, raw, tokenizer, max_length=16, text=True)
    assert features.new_tokens == max(features.target_lengths) == 61
    short = make_features(TASKS["sst2"], raw, tokenizer, max_length=16, text=True)
    assert short.new_tokens == 32
