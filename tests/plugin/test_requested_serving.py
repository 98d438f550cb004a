"""``transformers serve`` itself, whose requests are steered each in its own way, or refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import steered
import torch
from served import serving
from transformers.utils import is_serve_available

TEXT = "the film was very"
NEW = 8
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="pip install transformers[serving]"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Save a model, its tokenizer and a modulation; return them, loaded, and their folder."""
    root, model = tmp_path_factory.mktemp("served"), steered.make("llama")
    tokenizer, glad = steered.tokenizer(), steered.fit(model)
    tokenizer.chat_template = CHAT
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    glad.save(root / "glad")
    return model, tokenizer, glad, root


def said(modulation=None):
    config = {"max_new_tokens": NEW, "do_sample": False} | ({"modulation": modulation} if modulation else {})
    return {"generation_config": json.dumps(config)}


def streamed(body):
    """Return the text of a stream of completions."""
    parts = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(part["choices"][0]["text"] for part in parts)


def test_each_request_is_steered_in_its_own_way(served):
    model, tokenizer, glad, root = served
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}

    def expected(strength, **more):
        with glad.on(model, strength, **more):
            written = model.generate(ids, **given)[0, ids.shape[1] :]
        return tokenizer.decode(written, skip_special_tokens=True).split()

    wanted = {
        None: expected(0.0),
        '{"glad": 3}': expected(3),
        '{"glad": -6.0}': expected(-6),
        '{"glad": {"strength": 3, "tokens": "generated"}}': expected(3, tokens="generated"),
    }
    assert len({tuple(words) for words in wanted.values()}) == len(wanted)
    name = {"model": str(root / "model")}
    completions = {**name, "prompt": TEXT}

    def complete(asked):
        answer = server.answer("/v1/completions", completions | said(asked and json.loads(asked)))
        return answer["choices"][0]["text"].split()

    with serving(root / "model", options=("--modulation", f"glad={root / 'glad'}")) as server:
        server.wait("/v1/completions", completions | said())
        asked = list(wanted) * 3
        with ThreadPoolExecutor(4) as pool:  # at once
            assert list(pool.map(complete, asked)) == [wanted[each] for each in asked]
        for each, words in wanted.items():
            one = said(each and json.loads(each))
            status, body = server.ask("/v1/completions", completions | one | {"stream": True})
            assert (status, streamed(body).split()) == (200, words)
            chat = server.answer("/v1/chat/completions", name | one | {"messages": [{"role": "user", "content": TEXT}]})
            assert chat["choices"][0]["message"]["content"].split() == words
            response = server.answer("/v1/responses", name | one | {"input": TEXT, "stream": False})
            assert response["output"][-1]["content"][0]["text"].split() == words
        for stream in (False, True):
            status, body = server.ask("/v1/completions", completions | said({"sad": 1}) | {"stream": stream})
            assert (status, json.loads(body)) == (400, {"detail": "unknown modulation 'sad'; known: glad"})
        status, body = server.ask("/v1/completions", completions | {"modulation": {"glad": 1}})
        assert status == 422
        assert "modulation" in body
        assert complete(None) == wanted[None]


def test_continuous_batching_refuses_each_that_asks_and_serves_the_others(served):
    *_, root = served
    completions = {"model": str(root / "model"), "prompt": TEXT}
    options = ("--modulation", f"glad={root / 'glad'}")
    small = ("--continuous-batching", "--cb-num-blocks", "8", "--cb-max-batch-tokens", "32")
    with serving(root / "model", *small, options=options) as server:
        status, body = server.wait("/v1/completions", completions | said({"glad": 1}))  # the first, before a batch
        assert (status, "one row" in body) == (400, True)
        answer = server.answer("/v1/completions", completions | said())
        assert answer["choices"][0]["text"].split()
        for stream in (False, True):
            status, body = server.ask("/v1/completions", completions | said({"glad": 1}) | {"stream": stream})
            assert (status, "one row" in body) == (400, True)
