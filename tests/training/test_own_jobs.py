"""Jobs on data of one's own whose labels are lists: several classes for a text, a tag for each word."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from comparing import assert_same
from covering import few
from datasets import Dataset
from taskdata import OWN_ROWS, make_tokenizer, save_base, tagged_rows
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    XLNetConfig,
)

from hf_glu.errors import CheckpointError, DataError, OptionError
from hf_glu.publishing.card.card import write_card
from hf_glu.publishing.report import write_report
from hf_glu.tasks.metrics.scores import NO_ANSWER
from hf_glu.tasks.own import own_task
from hf_glu.training import job as job_module
from hf_glu.training.baseline import finetune_and_report
from hf_glu.training.comparing.classifiers import compare
from hf_glu.training.data.features import collate, count_items, loss_of, make_features
from hf_glu.training.data.models import load_for_task
from hf_glu.training.data.prediction import predict
from hf_glu.training.data.tokens import padding_side
from hf_glu.training.job import Job, run_job
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.options import JobOptions, TrainingOptions

EXACT = {"bert": "geglu", "gpt2": "geglu_new", "t5": "reglu"}
OPTIONS = TrainingOptions(
    max_steps=2, batch_size=4, lr=1e-3, max_length=32, precision="no", evaluate_every=0, eval_batch_size=8
)
LEARNING = replace(OPTIONS, max_steps=60, batch_size=20, lr=5e-3, warmup=0.1)
KEYS = {"multi": {"micro_f1", "macro_f1", "exact_match"}, "tokens": {"precision", "recall", "f1", "accuracy"}}


@pytest.fixture(scope="module", autouse=True)
def _needs_seqeval():
    pytest.importorskip("seqeval")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_base(folder / family, family) for family in EXACT}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for problem, rows in OWN_ROWS.items():
        Dataset.from_list(rows(40)).to_json(folder / f"{problem}.jsonl")
    return {problem: str(folder / f"{problem}.jsonl") for problem in OWN_ROWS}


@pytest.fixture
def unchecked(monkeypatch):
    """Don't check the reload: a fresh process takes seconds to import, and other tests start it."""
    monkeypatch.setattr(job_module, "reloads_equal", lambda *_: True)


@pytest.mark.parametrize("problem", OWN_ROWS)
@pytest.mark.parametrize("family", EXACT)
def test_every_problem_with_every_family(family, problem, bases, data):
    job = JobOptions(model=bases[family], dataset=data[problem], problem=problem, to=EXACT[family])
    results = run_job(job, OPTIONS)
    assert set(results["metrics"]) == KEYS[problem]
    assert results["conversion"]["promise"] == "exact"
    assert results["training"]["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("problem", OWN_ROWS)
def test_the_whole_job_learns_saves_and_reloads_in_a_fresh_process(problem, bases, data, tmp_path):
    output = tmp_path / "run"
    job = JobOptions(model=bases["bert"], dataset=data[problem], problem=problem, to="geglu", output=str(output))
    job = replace(job, validation=data[problem])
    result = finetune_and_report(job, LEARNING, finish=write_card)
    assert result["outcome"]["reloaded_equal"] is True
    assert result["outcome"]["score"] > 0.9
    config = json.loads((output / "config.json").read_text())
    names = {"multi": ["Bad", "so good"], "tokens": ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]}[problem]
    assert config["id2label"] == {str(number): name for number, name in enumerate(names)}
    assert config.get("problem_type") == {"multi": "multi_label_classification", "tokens": None}[problem]
    kind = {"multi": "text-classification", "tokens": "token-classification"}[problem]
    card = (output / "README.md").read_text()
    assert f"pipeline_tag: {kind}" in card
    assert f"fine-tuned on {problem}" in card
    assert write_report(output).is_file()


@pytest.mark.usefixtures("unchecked")
def test_a_stock_class_reads_a_saved_tagger(bases, data, tmp_path):
    job = JobOptions(model=bases["bert"], dataset=data["tokens"], to="geglu", output=str(tmp_path / "run"))
    run_job(job, LEARNING)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    inputs = tokenizer("the film was Anna Carl", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    found = [model.config.id2label[int(number)] for number in model(**inputs).logits[0].argmax(-1)]
    assert found[-2:] == ["B-PER", "I-PER"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("problem", few(OWN_ROWS, 2))
def test_a_resumed_run_is_the_uninterrupted_one(problem, data, tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", "bert", hidden_dropout_prob=0.2)
    options = replace(OPTIONS, max_steps=5, evaluate_every=2, checkpoint_every=2, log_every=1, accumulate=2)
    job = JobOptions(model=base, dataset=data[problem], problem=problem, to="geglu")
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
    assert resumed["metrics"] == whole["metrics"]
    kind = AutoModelForTokenClassification if problem == "tokens" else AutoModelForSequenceClassification
    states = [dict(kind.from_pretrained(tmp_path / name).state_dict()) for name in ("parts", "whole")]
    assert_same(*states, "bitwise")


@pytest.mark.parametrize("problem", OWN_ROWS)
def test_micro_batches_change_nothing_but_rounding(problem, data, tmp_path):
    base = save_base(tmp_path / "base", "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)

    def weights(accumulate):
        job = JobOptions(model=base, dataset=data[problem], problem=problem, to="geglu")
        made = Job(job, replace(OPTIONS, accumulate=accumulate, batch_size=5))
        made.fit()
        return {key: value.detach() for key, value in made.model.state_dict().items()}

    assert_same(weights(3), weights(1), "trained")


def test_the_loss_of_several_classes_is_binary_cross_entropy(bases, data):
    made = Job(JobOptions(model=bases["bert"], dataset=data["multi"], problem="multi"), OPTIONS)
    batch = collate(made.train, made.tokenizer, range(6))
    assert batch["labels"].dtype == torch.float
    made.model.eval()
    logits = made.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    wanted = functional.binary_cross_entropy_with_logits(logits, batch["labels"])
    assert_same(loss_of(made.train)(made.model, batch), wanted, "exact")


@pytest.mark.parametrize("side", ["left", "right"])
def test_words_have_their_label_at_their_first_token(side):
    tokenizer = make_tokenizer(end=True)
    tokenizer.padding_side = "left"  # which is for generating, and doesn't count here
    rows = [{"tokens": ["Anna Carl", "", "film"], "label": [1, 0, 2]}, {"tokens": ["it"], "label": [0]}]
    task, _ = own_task_of(tagged_rows(20))
    features = make_features(task, Dataset.from_list(rows), tokenizer, max_length=4, text=False, side=side)
    batch = collate(features, tokenizer, [0, 1])
    assert features.places == [[0, NO_ANSWER, 2], [0]]
    wanted = [[1, -100, 2, -100], [0, -100, -100, -100] if side == "right" else [-100, -100, 0, -100]]
    assert batch["labels"].tolist() == wanted
    assert batch["labels"].ne(-100).sum() == count_items(features, [0, 1]) == 3
    cut = make_features(task, Dataset.from_list(rows), tokenizer, max_length=3, text=False)
    assert cut.places == [[0, NO_ANSWER, NO_ANSWER], [0]]


def own_task_of(rows):
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        Dataset.from_list(rows).to_json(f"{folder}/own.jsonl")
        return own_task(f"{folder}/own.jsonl")


def byte_level(folder):
    """Save a GPT-2 with a tokenizer to which `film` and ` film` are two tokens; return the folder."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, "<|endoftext|>", "Ġa", "Ġb"])}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=[("Ġ", "a"), ("Ġ", "b")])
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_words_are_tokenized_as_in_a_text(tmp_path):
    tokenizer = byte_level(tmp_path)
    task, splits = own_task_of([{"tokens": ["b", "a", "b"], "tags": ["X", "Y", "X"]}] * 4)
    features = make_features(task, splits["train"], tokenizer, max_length=8, text=False)
    assert features.data["input_ids"][0] == tokenizer("b a b")["input_ids"]
    assert features.data["labels"][0] == [0, 1, 0]


@pytest.mark.usefixtures("unchecked")
def test_the_heads_rows_follow_the_tags_names(bases, data, tmp_path):
    output = tmp_path / "run"
    run_job(JobOptions(model=bases["bert"], dataset=data["tokens"], output=str(output)), OPTIONS)
    config = json.loads((output / "config.json").read_text())
    names = ["O", "I-PER", "B-PER", "I-LOC", "B-LOC"]
    order = [names.index(config["id2label"][str(number)]) for number in range(5)]
    before = AutoModelForTokenClassification.from_pretrained(output).eval()
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (output / "config.json").write_text(json.dumps(config))
    task, _ = own_task(data["tokens"])
    after, *_ = load_for_task(str(output), task)
    ids = torch.tensor([[5, 6, 7]])
    assert_same(after.eval()(input_ids=ids).logits, before(input_ids=ids).logits[..., order], "exact")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_comparison(bases, data, tmp_path):
    job = JobOptions(model=bases["bert"], dataset=data["tokens"], output=str(tmp_path / "compare"), calibration=16)
    variants = ["dense", "geglu", "swiglu:iso"]
    table = compare(variants, [0], job, OPTIONS)
    assert [row["name"] for row in table["variants"]] == variants
    assert table["metric"] == "f1"
    assert compare(variants, [0], job, OPTIONS)["variants"] == table["variants"]
    with pytest.raises(CheckpointError, match="problem"):
        compare(variants, [0], replace(job, problem="tokens"), OPTIONS)


def test_what_can_not_be_done_is_one_line(bases, data, tmp_path, monkeypatch):
    job = JobOptions(model=bases["t5"], dataset=data["multi"], problem="multi")
    with pytest.raises(OptionError, match="form=text writes one class or score, and multi has more"):
        run_job(replace(job, form="text"), OPTIONS)
    with pytest.raises(OptionError, match="predict writes a leaderboard's files, and multi has no leaderboard"):
        run_job(replace(job, predict=True, output=str(tmp_path / "run")), OPTIONS)
    bart = save_base(tmp_path / "bart", "bart")
    with pytest.raises(CheckpointError, match="can't be loaded for tokens: Unrecognized configuration class"):
        run_job(replace(job, model=bart, dataset=data["tokens"], problem="tokens"), OPTIONS)
    Dataset.from_list([{"tokens": [" "], "tags": [tag]} for tag in "XY" * 5]).to_json(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="the tokenizer makes nothing of row 1: "):
        run_job(replace(job, dataset=str(tmp_path / "empty.jsonl"), problem=None), OPTIONS)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(OptionError, match="doesn't say which tokens are of which word"):
        run_job(replace(job, model=bases["bert"], dataset=data["tokens"], problem=None), OPTIONS)


@pytest.mark.parametrize("problem", ["multi", "tokens"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(family, problem, bases, data, tmp_path):
    shutil.copytree(bases[family], tmp_path / "left")
    path = tmp_path / "left" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    made = Job(JobOptions(model=str(tmp_path / "left"), dataset=data[problem], problem=problem), OPTIONS)
    assert made.tokenizer.padding_side == "left"
    alone, together = (predict(made.model, made.train, made.tokenizer, batch_size=size) for size in (1, 64))
    assert_same(torch.tensor(alone), torch.tensor(together), "exact")


def test_what_classifies_by_the_last_place_is_padded_on_the_left():
    assert padding_side(XLNetConfig()) == "left"
    assert padding_side(BertConfig()) == padding_side(GPT2Config()) == "right"
