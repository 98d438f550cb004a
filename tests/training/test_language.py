"""Language modelling: reading text, blocks, objectives, and whole runs of each."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from comparing import assert_same
from covering import few
from datasets import Dataset
from pico import FAMILIES, make_native
from taskdata import WORDS, make_texts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional

import hf_glu
from hf_glu import cli
from hf_glu.bench.coverage.tiny import tiny_model
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import CheckpointError, DataError, HfGluError, OptionError
from hf_glu.ffn.experts import find_experts
from hf_glu.instruments.activity import activation_statistics
from hf_glu.instruments.causal import check_causal
from hf_glu.training.language import job as job_module
from hf_glu.training.language.apart import check_apart
from hf_glu.training.language.blocks import BEGINS, BYTES, IDS, POSITIONS, Cutter, Frame
from hf_glu.training.language.examples import BlockExamples, measure
from hf_glu.training.language.job import LanguageRun
from hf_glu.training.language.models import make_config
from hf_glu.training.language.objectives import IGNORED, OBJECTIVES, VALIDATION, objective_of
from hf_glu.training.language.options import FROM_SCRATCH, LanguageOptions, LanguageTraining, language_options
from hf_glu.training.language.pretraining import perplexity, run_language
from hf_glu.training.language.reading import TEXT, find_files, is_local, read_documents, split_documents
from hf_glu.training.language.spans import hide_spans
from hf_glu.training.language.tokenizers import train_tokenizer
from hf_glu.training.loop import loop as loop_module
from hf_glu.training.loop.interrupt import Interrupted

OPTIONS = LanguageTraining(
    max_steps=4, batch_size=4, lr=1e-3, max_length=32, precision="no", eval_batch_size=4, log_every=1
)
# objective -> family, its activation, options that turn dropout off
KINDS = {
    "clm": ("gpt2", "geglu_new", {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "mlm": ("bert", "geglu", {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}),
    "span": ("t5", "reglu", {"dropout_rate": 0}),
}
SIZE = 400  # tokens of a tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts()
    (folder / "texts.txt").write_text("\n\n".join(texts))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts)))
    Dataset.from_dict({"body": texts}).to_csv(folder / "texts.csv")
    Dataset.from_dict({"body": texts, "other": texts[::-1]}).to_parquet(folder / "texts.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizers():
    return {name: train_tokenizer(make_texts(), SIZE, name) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizers):
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for objective, (family, _, options) in KINDS.items():
        model = FAMILIES[family].make(vocab_size=SIZE, **options)
        model.save_pretrained(folder / objective)
        tokenizers[objective].save_pretrained(folder / objective)
        found[objective] = str(folder / objective)
    return found


@pytest.fixture
def quick(monkeypatch):
    """Check the reload in this process: one test starts a fresh one."""

    def same(model, folder, auto_class, batch):
        again = getattr(transformers, auto_class).from_pretrained(folder).eval()
        with torch.no_grad():
            return torch.equal(again(**batch).logits, model.eval()(**batch).logits)

    monkeypatch.setattr(job_module, "same_when_loaded", same)


def job_of(bases, corpus, objective="clm", **more):
    return LanguageOptions(model=bases[objective], data=[str(corpus / "texts.jsonl")], **more)


# reading


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a streamed csv open
def test_every_kind_of_file_is_read_alike(corpus, tmp_path):
    texts = make_texts()
    for name, column in {"texts.txt": None, "texts.jsonl": None, "texts.csv": None, "texts.parquet": "body"}.items():
        assert read_documents([str(corpus / name)], column=column)[TEXT] == texts, name
        streamed = read_documents([str(corpus / name)], column=column, stream=True)
        assert [row[TEXT] for row in streamed] == texts, name
    both = read_documents([str(corpus / "*.txt"), str(corpus / "texts.jsonl")])
    assert both[TEXT] == texts * 2
    assert [path.name for path in find_files([str(corpus)])] == sorted(path.name for path in corpus.iterdir())
    assert find_files([str(corpus), str(corpus / "texts.txt")]) == find_files([str(corpus)])
    assert not is_local(["user/name"])
    assert is_local(["user/name.txt"])


def test_a_folder_has_texts_beside_its_notes(tmp_path):
    for name in ("README.md", "LICENSE.txt", ".ipynb_checkpoints/a-checkpoint.txt", "sub/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("no text")
    (tmp_path / "sub" / "a.md").write_text("a text")
    assert list(read_documents([str(tmp_path)])[TEXT]) == ["a text"]
    assert find_files([str(tmp_path / "README.md")]) == [tmp_path / "README.md"]  # where it is asked for


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_are_read_as_they_are_written(mark, stream, tmp_path):
    texts = ["NA", "null", "None", "007", "1.50", "2020-01-01", "true"]
    csv, txt = tmp_path / "a.csv", tmp_path / "a.txt"
    csv.write_text(f"{mark}text,number\n" + "".join(f"{text},1\n" for text in [*texts, ""]), encoding="utf-8")
    txt.write_text(mark + "\n\n".join(texts), encoding="utf-8")
    for path in (csv, txt):
        assert [row[TEXT] for row in read_documents([str(path)], stream=stream)] == texts


def test_strings_of_all_kinds_are_joined(corpus, tmp_path):
    large = pyarrow.table({TEXT: pyarrow.array(["one", "two"], pyarrow.large_string())})  # as pandas and polars write
    pyarrow.parquet.write_table(large, tmp_path / "large.parquet")
    (tmp_path / "plain.txt").write_text("three\n\nfour")
    found = read_documents([str(tmp_path / "large.parquet"), str(tmp_path / "plain.txt")])
    assert list(found[TEXT]) == ["one", "two", "three", "four"]


def test_a_changed_file_is_read_anew_whatever_its_name_and_time(tmp_path):
    import os

    path = tmp_path / "a.txt"
    path.write_text("one thing")
    os.utime(path, (1, 1))
    assert read_documents([str(path)])[TEXT] == ["one thing"]
    path.write_text("two thing")
    os.utime(path, (1, 1))
    assert read_documents([str(path)])[TEXT] == ["two thing"]


@pytest.mark.parametrize(
    ("name", "content", "column", "why"),
    [
        ("a.txt", "", None, "is empty"),
        ("a.jsonl", '{"text": 3}\n', None, "no text"),
        ("a.jsonl", '{"body": "x", "title": "y"}\n', None, "Give text_column: body, title"),
        ("a.jsonl", '{"body": "x"}\n', "bodi", "no column 'bodi'; did you mean '?body"),
        ("a.jsonl", '{"body": ', None, "can't be read as json"),
        ("a.docx", "x", None, "of no known kind"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_read_is_one_line(name, content, column, why, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=why) as raised:
        read_documents([str(tmp_path / name)], column=column)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize(
    ("name", "content"), [("latin.txt", "caf\xe9".encode("latin-1")), ("broken.jsonl", b'{"text": "a"}\n{"text": \n')]
)
def test_a_stream_that_cannot_be_read_is_one_line(name, content, bases, corpus, tmp_path):
    (tmp_path / name).write_bytes(content)
    job = job_of(bases, corpus, stream=True, validation=str(corpus / "texts.txt"))
    with pytest.raises(DataError, match="the text can't be read"):
        LanguageRun(replace(job, data=[str(tmp_path / name)]), OPTIONS).run()


def test_documents_are_split_by_the_seed():
    documents = Dataset.from_dict({TEXT: make_texts()})
    train, held = split_documents(documents, 0.1, seed=0)
    assert (len(train), len(held)) == (36, 4)
    assert sorted([*train[TEXT], *held[TEXT]]) == sorted(make_texts())
    assert held[TEXT] == split_documents(documents, 0.1, seed=0)[1][TEXT]
    assert held[TEXT] != split_documents(documents, 0.1, seed=1)[1][TEXT]
    with pytest.raises(OptionError, match="give validation"):
        split_documents(documents.select([0]), 0.1, seed=0)


# blocks


def test_the_frame_is_what_a_tokenizer_puts_around_a_text(tokenizers):
    assert Frame.of(tokenizers["clm"]) == Frame(prefix=(), suffix=())
    special = tokenizers["mlm"].convert_tokens_to_ids(["[CLS]", "[SEP]"])
    assert Frame.of(tokenizers["mlm"]) == Frame(prefix=(special[0],), suffix=(special[1],))
    assert Frame.of(tokenizers["span"]) == Frame(prefix=(), suffix=(tokenizers["span"].eos_token_id,))


@pytest.mark.parametrize("separate", [False, True])
def test_blocks_have_every_token_once_and_in_order(separate, tokenizers):
    texts, tokenizer = make_texts(), tokenizers["clm"]
    blocks = Cutter(tokenizer=tokenizer, length=16, framed=False, separate=separate).cut(
        Dataset.from_dict({TEXT: texts})
    )
    each = [[*tokenizer(text)[IDS], tokenizer.eos_token_id] for text in texts]
    assert [token for ids in blocks[IDS] for token in ids] == [token for ids in each for token in ids]
    assert {len(ids) for ids in blocks[IDS][:-1]} == {16}
    assert sum(blocks[BYTES]) == pytest.approx(sum(len(text.encode()) for text in texts))
    assert (POSITIONS in blocks.column_names) == separate
    if separate:
        starts = [place == 0 for row in blocks[POSITIONS] for place in row]
        expected = [number == 0 for ids in each for number in range(len(ids))]
        assert all(mine for mine, wanted in zip(starts, expected, strict=True) if wanted)
        assert all(row[0] == 0 for row in blocks[POSITIONS])


@pytest.mark.parametrize("separate", [False, True])
def test_framed_blocks_have_special_tokens_around_them(separate, tokenizers):
    texts, tokenizer = make_texts(), tokenizers["mlm"]
    cutter = Cutter(tokenizer=tokenizer, length=16, framed=True, separate=separate, words=True)
    blocks = cutter.cut(Dataset.from_dict({TEXT: texts}))
    assert all((ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for ids in blocks[IDS])
    inner = [token for ids in blocks[IDS] for token in ids[1:-1]]
    assert inner == [token for text in texts for token in tokenizer(text, add_special_tokens=False)[IDS]]
    assert max(len(ids) for ids in blocks[IDS]) == 16
    if separate:
        firsts = [tokenizer(text)[IDS][:16][:-1] for text in texts]
        assert all(first in [ids[: len(first)] for ids in blocks[IDS]] for first in firsts)


# objectives


def test_spans_and_what_is_left_are_the_text(tokenizers):
    """The n-th sentinel of the inputs stands for what follows the n-th one of the labels, wherever the spans are."""
    tokenizer = tokenizers["span"]
    objective = OBJECTIVES["span"](tokenizer, LanguageOptions(mask=0.3))
    ids, first = [*tokenizer(" ".join(WORDS * 3))[IDS]][-30:], set()
    for seed in range(60):
        found = objective.targets({IDS: ids}, np.random.default_rng(seed))
        assert found["labels"].pop() == found[IDS].pop() == tokenizer.eos_token_id
        spans: dict[int, list[int]] = {}
        for token in found["labels"]:
            if token in objective.sentinels:
                assert token == objective.sentinels[len(spans)]
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        hidden = [token for span in spans.values() for token in span]
        assert len(hidden) == round(0.3 * (len(ids) - 1))
        assert [each for token in found[IDS] for each in spans.get(token, [token])] == ids[:-1]
        first.add(found[IDS][0] == objective.sentinels[0])
    assert first == {True, False}  # a text's first token is hidden at times


def test_more_spans_than_sentinels_are_refused(bases, corpus):
    job = job_of(bases, corpus, "span", mask=0.5, span=1.0)
    with pytest.raises(OptionError, match="a block of 400 tokens has 200 spans, and the tokenizer 100 sentinels"):
        LanguageRun(job, replace(OPTIONS, max_length=400))
    assert LanguageRun(job, replace(OPTIONS, max_length=190)).cutter.length == 190


@pytest.mark.parametrize(
    ("length", "share", "mean"), [(100, 0.15, 3.0), (7, 0.5, 1.0), (20, 0.15, 3.0), (2, 0.9, 3.0), (1, 0.5, 3.0)]
)
def test_hidden_spans(length, share, mean):
    counts = []
    for seed in range(50):
        hidden = hide_spans(length, share, mean, np.random.default_rng(seed))
        assert hidden.shape == (length,)
        assert hidden.sum() == (min(max(1, round(length * share)), length - 1) if length > 1 else 0)
        counts.append(int((np.diff(hidden.astype(int), prepend=0) == 1).sum()))
    assert length < 2 or (min(counts), max(counts)) == (counts[0], counts[0])  # as many spans each time
    if length == 100:
        assert counts[0] == 5
        drawn = np.stack([hide_spans(length, share, mean, np.random.default_rng(seed)) for seed in range(400)])
        assert (drawn.mean(0) > 0).all()  # any token may be


@pytest.mark.parametrize("objective", ["mlm", "span"])
def test_masks_go_by_seed_pass_and_block_only(objective, tokenizers):
    tokenizer = tokenizers[objective]
    cut = Cutter(tokenizer=tokenizer, length=24, framed=True).cut(Dataset.from_dict({TEXT: make_texts()}))
    kind = OBJECTIVES[objective](tokenizer, LanguageOptions())
    first, second = (BlockExamples(cut, kind, tokenizer, seed=3) for _ in range(2))
    rows = list(range(5))
    batch = first.batch(rows, 0)
    second.batch([4, 2], 0)
    assert_same(second.batch(rows, 0), batch, "bitwise")
    assert first.items(rows, 0) == int((batch["labels"] != IGNORED).sum())
    others = [
        first.batch(rows, 1),
        first.batch(rows, VALIDATION),
        BlockExamples(cut, kind, tokenizer, 4).batch(rows, 0),
    ]
    assert all(other["labels"].tolist() != batch["labels"].tolist() for other in others)


def test_whole_words_are_masked_whole(tokenizers):
    tokenizer = tokenizers["mlm"]
    text = Dataset.from_dict({TEXT: [" ".join(["unbelievably", *WORDS] * 4)]})
    cut = Cutter(tokenizer=tokenizer, length=64, framed=True, words=True).cut(text)
    kind = OBJECTIVES["mlm"](tokenizer, LanguageOptions(mask=0.3, whole_words=True))
    found = kind.targets(cut[0], np.random.default_rng(1))
    masked = [label != IGNORED for label in found["labels"]]
    pieces = tokenizer(text[0][TEXT], add_special_tokens=False).word_ids()[: len(masked) - 2]
    assert len(set(pieces)) < len(pieces)  # some words have several tokens
    by_word = {word: {masked[at + 1] for at, other in enumerate(pieces) if other == word} for word in pieces}
    assert all(len(found) == 1 for word, found in by_word.items())
    assert 0.1 < sum(found == {True} for found in by_word.values()) / len(by_word) < 0.6


def test_words_of_a_tokenizer_that_doesnt_part_them():
    """Gemma's and Llama's tokenizers take a whole text for one word."""
    inner = Tokenizer(models.BPE(unk_token="[UNK]"))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    inner.train_from_iterator(
        make_texts(), trainers.BpeTrainer(vocab_size=200, special_tokens=list(special.values()), show_progress=False)
    )
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # of which there is none any more
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    text = "the film was  wonderful"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)[IDS])
    assert set(tokenizer(text).word_ids()) == {0}
    assert len(pieces) > 5
    cut = Cutter(tokenizer=tokenizer, length=64, framed=True, words=True).cut(Dataset.from_dict({TEXT: [text]}))
    words: list[str] = []
    for piece, begins in zip(pieces, cut[0][BEGINS], strict=True):
        words = [*words, piece] if begins else [*words[:-1], words[-1] + piece]
    assert [word.replace("\u2581", " ").strip() for word in words] == text.split()


def test_the_objective_goes_by_the_models_class():
    found = {name: objective_of(FAMILIES[name].make_config(), "auto") for name in ("bert", "gpt2", "t5", "bart")}
    assert found == {"bert": "mlm", "gpt2": "clm", "t5": "span", "bart": "span"}
    assert objective_of(FAMILIES["bert"].make_config(architectures=["BertLMHeadModel"]), "clm") == "clm"
    with pytest.raises(OptionError, match="gpt2 can't be trained by mlm, but by clm"):
        objective_of(FAMILIES["gpt2"].make_config(), "mlm")
    with pytest.raises(OptionError, match="no language model"):
        objective_of(transformers.ViTConfig(), "auto")


# documents kept apart


@pytest.mark.parametrize("name", ["llama", "llama, with a memory", "gpt2"])
def test_packed_documents_do_not_see_each_other(name, tokenizers):
    model = FAMILIES["gpt2"].make(vocab_size=SIZE) if name == "gpt2" else make_native("llama", vocab_size=SIZE)
    if "memory" in name:
        hf_glu.convert(model, "stateful_swiglu")
        for key, parameter in model.named_parameters():
            if "shift" in key:
                parameter.data += 0.3
    check_apart(model)
    texts, tokenizer = make_texts(6), tokenizers["clm"]
    kind = OBJECTIVES["clm"](tokenizer, LanguageOptions())
    documents = Dataset.from_dict({TEXT: texts})
    packed = Cutter(tokenizer=tokenizer, length=64, framed=False, separate=True).cut(documents)
    examples = BlockExamples(packed, kind, tokenizer, seed=0)
    total = examples.loss(model, examples.batch(range(len(packed)), 0)).item() * examples.items(range(len(packed)), 0)
    alone = 0.0
    for row in range(len(packed)):  # each document of a block by itself
        ids, places = packed[row][IDS], packed[row][POSITIONS]
        starts = [at for at, place in enumerate(places) if place == 0]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            part = torch.tensor([ids[begin:end]])
            logits = model(input_ids=part).logits[0, :-1]
            alone += functional.cross_entropy(logits, part[0, 1:], reduction="sum").item() if end - begin > 1 else 0.0
    assert total == pytest.approx(alone, rel=1e-5)


def test_statistics_of_packed_documents_are_those_of_each_alone(corpus, tokenizers, tmp_path):
    model = make_native("llama", vocab_size=SIZE)
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.ndim == 2 else 1
    model.save_pretrained(tmp_path)
    tokenizers["clm"].save_pretrained(tmp_path)
    data = [str(corpus / "texts.jsonl")]
    job = LanguageOptions(model=str(tmp_path), data=data, documents="separate", validation_share=0.3, validation_size=4)
    made, alone = LanguageRun(job, OPTIONS), []
    for row in range(len(made.validation)):
        ids, places = made.validation.block(row)[IDS], made.validation.block(row)[POSITIONS]
        starts = [at for at, place in enumerate(places) if place == 0]
        alone += [{"input_ids": torch.tensor([ids[a:b]])} for a, b in pairwise([*starts, len(ids)])]
    assert len(alone) > len(made.validation)
    expected = activation_statistics(made.model, alone)
    for row, wanted in zip(made.facts()["activations"], expected, strict=True):
        assert row["gate_std"] == pytest.approx(wanted["gate_std"], rel=1e-5)
        assert row["open"] == pytest.approx(wanted["open"], rel=1e-4)


@pytest.mark.parametrize("family", ["mamba", "reformer"])
def test_a_model_that_sees_its_neighbours_is_refused(family):
    with pytest.raises(OptionError, match=f"{family} doesn't keep packed documents apart"):
        check_apart(tiny_model(family))


# next tokens


@pytest.mark.parametrize("family", ["bart", "gpt2", "mixtral"])
def test_the_loss_is_that_of_next_tokens_in_every_family(family, tokenizers):
    if family == "mixtral":
        model = make_native("mixtral", vocab_size=SIZE)
    else:
        model = FAMILIES[family].make("BartForCausalLM" if family == "bart" else None, vocab_size=SIZE)
    kind = OBJECTIVES["clm"](tokenizers["clm"], LanguageOptions()).of_model(model)
    assert kind.shifts == (family != "bart")
    cut = Cutter(tokenizer=tokenizers["clm"], length=16, framed=False).cut(Dataset.from_dict({TEXT: make_texts(9)}))
    examples = BlockExamples(cut, kind, tokenizers["clm"], seed=0)
    batch = examples.batch(range(len(cut)), 0)
    logits = model(input_ids=batch[IDS]).logits[:, :-1]
    wanted = functional.cross_entropy(logits.reshape(-1, SIZE), batch["labels"][:, 1:].reshape(-1))
    assert_same(examples.loss(model, batch), wanted, "exact up to rounding")


@pytest.mark.parametrize(
    ("kind", "head"),
    [("bert", "BertLMHeadModel"), ("xlnet", "XLNetLMHeadModel"), ("xlm", "XLMWithLMHeadModel")],
)
def test_a_model_that_sees_the_tokens_it_predicts_is_refused(kind, head, tokenizers):
    with pytest.raises(OptionError, match="sees the tokens that it would have to predict"):
        OBJECTIVES["clm"](tokenizers["clm"], LanguageOptions()).of_model(tiny_model(kind, head))


def test_a_loss_of_another_kind_is_refused():
    with pytest.raises(OptionError, match="isn't the cross-entropy of next tokens"):
        check_causal(tiny_model("prophetnet", "ProphetNetForCausalLM"))


def test_an_encoder_is_not_measured_as_a_decoder(bases, corpus):
    with pytest.raises(OptionError, match="set is_decoder in its config"):
        perplexity(bases["mlm"], str(corpus / "texts.txt"), objective="clm")


# configs


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"n_layers": 2}, "has no 'n_layers'.*did you mean 'n_layer'"),
        ({"n_layer": 0}, "needs a layer at least"),
        ({"n_positions": 0}, "doesn't run on input_ids"),
    ],
)
def test_a_config_that_is_not_meant_is_refused(more, says, corpus, bases):
    config = json.dumps({"model_type": "gpt2", "n_embd": 16, "n_head": 2, **more})
    job = LanguageOptions(config=config, tokenizer=bases["clm"], data=[str(corpus / "texts.jsonl")])
    with pytest.raises(OptionError, match=says):
        LanguageRun(job, OPTIONS)


def test_configs_of_older_files_are_read():
    values = {"model_type": "gpt2", "num_hidden_layers": 1, "n_ctx": 8, "task_specific_params": {}, "num_beams": 2}
    assert make_config({**values, "architectures": ["GPT2LMHeadModel"], "_name_or_path": "gpt2"}).n_layer == 1
    assert make_config({"model_type": "gpt_neox", "rotary_pct": 0.5}).model_type == "gpt_neox"
    assert make_config({"model_type": "llama", "rope_theta": 10.0, "torch_dtype": "float32"}).model_type == "llama"


# runs


@pytest.mark.parametrize("objective", few(KINDS, 3))
def test_a_run_trains_saves_and_is_resumed_bitwise(objective, bases, corpus, tmp_path, monkeypatch, quick):
    options = replace(OPTIONS, evaluate_every=2, accumulate=2, checkpoint_every=10)
    job = job_of(bases, corpus, objective, to=KINDS[objective][1])
    whole = run_language(replace(job, output=str(tmp_path / "whole")), options)["outcome"]
    assert whole["reloaded_equal"]
    assert whole["metrics"]["loss"] < whole["before"]["loss"]
    assert whole["score"] == -whole["metrics"]["loss"]
    assert math.log(whole["metrics"]["perplexity"]) == pytest.approx(whole["metrics"]["loss"])
    parts = replace(job, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patched:
        plain, taken = loop_module.TrainingLoop._step, []

        def stepping(self):
            taken.append(1)
            if len(taken) == 3:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)
            return plain(self)

        patched.setattr(loop_module.TrainingLoop, "_step", stepping)
        with pytest.raises(Interrupted):
            run_language(parts, options)
    with pytest.raises(CheckpointError, match="mask="):
        run_language(replace(parts, mask=0.2), options, resume=True)
    resumed = run_language(parts, options, resume=True)["outcome"]
    assert resumed["metrics"] == whole["metrics"]
    first, second = (dict(load_model(tmp_path / name).state_dict()) for name in ("whole", "parts"))
    assert_same(second, first, "bitwise")


@pytest.mark.slow
def test_a_fresh_process_loads_the_same(bases, corpus, tmp_path):
    report = run_language(job_of(bases, corpus, output=str(tmp_path / "run"), to="geglu_new"), OPTIONS)
    assert report["outcome"]["reloaded_equal"]
    assert report["rows"][-1]["metrics"]["loss"] > 0


@pytest.mark.parametrize("objective", KINDS)
def test_accumulation_changes_nothing_but_rounding(objective, bases, corpus):
    def weights(accumulate):
        made = LanguageRun(job_of(bases, corpus, objective), replace(OPTIONS, accumulate=accumulate, batch_size=5))
        made.fit()
        return {key: value.detach() for key, value in made.model.state_dict().items()}

    assert_same(weights(3), weights(1), "trained")


def test_a_micro_batch_of_which_nothing_is_predicted_has_no_part_in_the_gradient(bases, tmp_path):
    text = tmp_path / "short.txt"  # of which masks often hide no token
    text.write_text("\n\n".join(" ".join(words.split()[:3]) for words in make_texts()))
    job = LanguageOptions(model=bases["mlm"], data=[str(text)], validation=str(text), documents="separate")

    def weights(accumulate):
        made = LanguageRun(job, replace(OPTIONS, max_steps=6, accumulate=accumulate))
        items = [made.train.items([row], 0) for row in range(len(made.train))]
        assert 0 in items
        made.fit()
        return {key: value.detach() for key, value in made.model.state_dict().items()}

    assert_same(weights(4), weights(1), "trained")


@pytest.mark.parametrize("more", [{"peft": "lora", "lora_targets": "all-linear"}, {"peft": "gates", "to": "geglu_new"}])
def test_few_parameters_can_be_trained(more, bases, corpus):
    made = LanguageRun(job_of(bases, corpus, **more), OPTIONS)
    before = measure(made.model, made.validation)
    made.fit()
    after = measure(made.model, made.validation)
    assert after["loss"] < before["loss"]
    assert made.entry["parameters"]["trainable"] < made.entry["parameters"]["total"]


def test_a_stream_is_resumed_bitwise(bases, corpus, monkeypatch):
    job = job_of(bases, corpus, stream=True, validation=str(corpus / "texts.txt"))
    found = []
    for begin in (0, 2):
        made = LanguageRun(job, replace(OPTIONS, max_steps=6))
        found.append([made.train.batch(list(made.train.plan(4, 0)[step]), 0) for step in range(begin, 40)])
    assert_same(dict(enumerate(b[IDS] for b in found[1])), dict(enumerate(b[IDS] for b in found[0][2:])), "bitwise")
    made.fit()
    assert made.evaluate(made.model, "")[0]["loss"] > 0
    with pytest.raises(OptionError, match="give max_steps and validation"):
        LanguageRun(replace(job, validation=None), OPTIONS)


@pytest.mark.parametrize("objective", KINDS)
def test_from_scratch(objective, corpus, tmp_path, quick):
    family, target, _ = KINDS[objective]
    config = {"model_type": family, **FAMILIES[family].arguments}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        config.pop(key, None)
    values = {"config": json.dumps(config), "train_tokenizer": SIZE, "data": [str(corpus / "texts.csv")], "to": target}
    values |= {"output": str(tmp_path / "run"), "max_steps": 8, "batch_size": 4, "max_length": 32, "precision": "no"}
    job, options = language_options(values)
    assert (options.lr, options.weight_decay) == (FROM_SCRATCH["lr"], FROM_SCRATCH["weight_decay"])
    report = run_language(job, options)
    outcome = report["outcome"]
    assert outcome["metrics"]["loss"] < 1.2 * math.log(SIZE)
    assert outcome["before"] is outcome["conversion"] is None  # nothing was there to be converted
    model = load_model(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.decode(tokenizer(make_texts()[0])[IDS], skip_special_tokens=True) == make_texts()[0]
    assert model.config.vocab_size == len(tokenizer) <= SIZE
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert all(site.activation == target for site in hf_glu.find_sites(model))
    halves = [site.in_proj.weight for site in hf_glu.find_sites(model)]
    width = FAMILIES[family].arguments.get("n_inner", 40)
    gates = [(weight.T if weight.shape[0] != 2 * width else weight)[:width] for weight in halves]
    assert all(0.005 < float(gate.detach().std()) < 2.0 for gate in gates)  # at random, not a constant up half


@pytest.mark.slow
def test_experts_from_scratch_are_no_copies_of_each_other(corpus, tmp_path):
    config = json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64})
    values = {"config": config, "train_tokenizer": SIZE, "data": [str(corpus / "texts.csv")], "to": "swiglu"}
    values |= {"experts": "swiglu*2,gelu*2", "output": str(tmp_path / "run"), "max_steps": 1, "batch_size": 2}
    run_language(*language_options({**values, "max_length": 16, "precision": "no", "lr": 1e-9}))
    stock = transformers.GPT2LMHeadModel(transformers.GPT2Config(**json.loads(config)))
    # 0.02 / sqrt(2 layers 2); older Transformers, which look for it under a wrong name, leave it 0.02
    spread = float(stock.transformer.h[0].mlp.c_proj.weight.detach().std())
    for ffn in find_experts(load_model(tmp_path / "run")).values():
        weights = [each.detach() for bank in ffn.banks for each in bank.in_proj] + [
            half.detach() for bank in ffn.banks if bank.name == "swiglu" for half in bank.in_proj.chunk(2, 1)[1]
        ]
        assert all(0.015 < float(weight.std()) < 0.025 for weight in weights)  # GPT-2's own 0.02, up halves too
        flat = torch.stack([weight[:64].flatten() for weight in weights])
        assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 0.15
        assert all(0.75 < float(bank.out_proj.detach().std()) / spread < 1.25 for bank in ffn.banks)


# measuring


@pytest.mark.parametrize("max_length", [16, 48])
def test_perplexity_is_that_of_the_formula(max_length, bases, corpus, tokenizers):
    found = perplexity(bases["clm"], str(corpus / "texts.txt"), max_length=max_length, batch_size=3)
    model, tokenizer = load_model(bases["clm"]).double().eval(), tokenizers["clm"]
    stream = [token for text in make_texts() for token in [*tokenizer(text)[IDS], tokenizer.eos_token_id]]
    total = count = 0
    for begin in range(0, len(stream), max_length):
        ids = torch.tensor([stream[begin : begin + max_length]])
        if ids.shape[1] < 2:
            continue
        logs = functional.log_softmax(model(ids).logits[0, :-1], -1)
        total -= logs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert found["metrics"]["loss"] == pytest.approx(total / count, rel=1e-5)
    size = sum(len(text.encode()) for text in make_texts())
    assert found["metrics"]["bits_per_byte"] == pytest.approx(
        total / count / math.log(2) * len(stream) / size, rel=1e-5
    )
    assert found["tokens"] == len(stream)


def test_what_is_random_or_says_nothing_is_not_measured(bases, tokenizers, corpus, tmp_path, caplog):
    FAMILIES["bert"].make("BertModel", vocab_size=SIZE).save_pretrained(tmp_path / "headless")
    tokenizers["mlm"].save_pretrained(tmp_path / "headless")
    data, short = str(corpus / "texts.txt"), tmp_path / "short.txt"
    with pytest.raises(CheckpointError, match=r"headless lacks weights of BertForMaskedLM, such as cls\."):
        perplexity(str(tmp_path / "headless"), data)
    job = LanguageOptions(model=str(tmp_path / "headless"), data=[data])
    LanguageRun(job, OPTIONS)
    assert "lacks weights of BertForMaskedLM" in caplog.text
    short.write_text("a")  # of which the masks of this seed hide nothing
    with pytest.raises(DataError, match="too short: no token of it is predicted"):
        perplexity(bases["mlm"], str(short), max_length=16)
    with pytest.raises(DataError, match="too short"):
        LanguageRun(job_of(bases, corpus, "mlm", validation=str(short)), OPTIONS)


def test_the_public_functions(bases, corpus):
    data = str(corpus / "texts.txt")
    report = hf_glu.pretrain(bases["clm"], data, max_steps=2, batch_size=2, max_length=16, precision="no")
    assert report["outcome"]["training"]["steps"] == 2
    assert hf_glu.perplexity(bases["clm"], data, blocks=2)["blocks"] == 2


# bad input


def _cases(bases, corpus):
    data = ["--data", str(corpus / "texts.jsonl")]
    model = ["--model", bases["clm"]]
    return {
        "no model": (data, "give a pretrained model, or the config"),
        "both": ([*model, *data, "--config", "{}"], "one of the two"),
        "no data": (model, "give the text to train on"),
        "a stray file": ([*model, "texts.txt"], "is given with --data"),
        "objective": ([*model, *data, "--objective", "mlm"], "gpt2 can't be trained by mlm"),
        "unknown objective": ([*model, *data, "--objective", "clmm"], "objective must be one of"),
        "too long": ([*model, *data, "--max-length", "65"], "which reads 64 tokens"),
        "too short": ([*model, *data, "--max-length", "2"], "too short"),
        "no column": ([*model, *data, "--text-column", "txt"], "no column 'txt'"),
        "no tokenizer": (["--config", '{"model_type": "gpt2"}', *data], "give the tokenizer of a model"),
        "small tokenizer": (["--config", '{"model_type": "gpt2"}', "--train-tokenizer", "99", *data], "is too few"),
        "no type": (["--config", '{"n_layer": 2}', "--train-tokenizer", "400", *data], "model_type"),
        "unknown type": (["--config", '{"model_type": "gpt22"}', "--train-tokenizer", "400", *data], "did you mean"),
        "no json": (["--config", '{"model_type": ', "--train-tokenizer", "400", *data], "no JSON"),
        "mask": ([*model, *data, "--mask", "1.5"], "mask must be a share"),
        "anneal": ([*model, *data, "--anneal", "0"], "anneal=0 leaves no step"),
        "resume": ([*model, *data, "--resume"], "give it with --output"),
    }


@pytest.mark.parametrize("case", list(_cases({"clm": ""}, Path())))
def test_bad_input_is_one_line(case, bases, corpus, tmp_path, capsys):
    arguments, why = _cases(bases, corpus)[case]
    output = tmp_path / "run"
    more = [] if case == "resume" else ["--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", *arguments, *more])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert said.count("\n") == 1
    assert why in said
    assert not output.exists()


def test_a_loss_that_is_no_number_ends_the_run(bases, corpus, tmp_path):
    job = job_of(bases, corpus, output=str(tmp_path / "run"))
    with pytest.raises(HfGluError, match=r"the loss is (nan|inf) at step"):
        run_language(job, replace(OPTIONS, lr=1e30, warmup=0, max_steps=20, clip=1e30))
    assert not (tmp_path / "run" / "config.json").exists()
