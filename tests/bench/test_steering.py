"""Dose and response: what an area is, what each way computes, the command, and where steering breaks."""

from __future__ import annotations

import json
import math

import pytest
import steered
import torch
import transformers
from comparing import assert_same
from taskdata import save_base

import hf_glu
from hf_glu.bench.steering.curves import Dose, area, breaks, spent
from hf_glu.bench.steering.judging import load_judge
from hf_glu.bench.steering.measuring import SteeringBench, stretch
from hf_glu.bench.steering.options import SteerOptions, split
from hf_glu.bench.steering.ways import EXAMPLES, SteeringWay, gates_way, make_ways
from hf_glu.errors import OptionError, UnknownNameError
from hf_glu.instruments.perplexity import next_token_perplexity


def curve(scores, costs, strengths=(-1.0, 0.0, 1.0)):
    return [
        Dose(strength=strength, score=score, own=10 * cost, neutral=20.0)
        for strength, score, cost in zip(strengths, scores, costs, strict=True)
    ]


def test_the_area_of_known_curves():
    assert area(curve((0.5, 0.5, 0.5), (3, 1, 3)), 2.0) == 0.0
    assert area(curve((0.0, 0.5, 1.0), (1, 1, 1)), 2.0) == 1.0  # for free
    halves = area(curve((0.0, 0.5, 1.0), (2, 1, 2)), 2.0)  # a gain that is proportional to the log of the cost
    assert halves == pytest.approx(0.5, abs=0.05)
    assert area(curve((0.0, 0.5, 1.0), (4, 1, 4)), 2.0) == pytest.approx(halves / 2, abs=0.03)
    assert area(curve((0.0, 0.5, 1.0), (2, 1, 1e9)), 2.0) < halves
    broken = curve((0.0, 0.5, 1.0), (1, 1, math.inf))
    assert area(broken, 2.0) == 0.5
    assert breaks(broken) == [1.0]
    assert math.isnan(area(curve((0.0, math.nan, 1.0), (1, 1, 1)), 2.0))
    assert spent(curve((0, 0, 0), (2, 1, 3)), 2.0)
    assert not spent(curve((0, 0, 0), (2, 1, 1)), 2.0)


def test_doses():
    assert SteerOptions(dose="-2:2:9").strengths() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert SteerOptions(dose="1,3").strengths() == [0, 1, 3]
    assert SteerOptions(seeds="0,2").splits() == [0, 2]
    for dose in ("", "a:b:c", "0:1", "0:1:1", "0:inf:3", "0,0", "0:1:1000"):
        with pytest.raises(OptionError, match="dose"):
            SteerOptions(dose=dose)
    for bad in ({"samples": 0}, {"budget": 1.0}, {"seeds": "x"}, {"label": "good"}):
        with pytest.raises(OptionError):
            SteerOptions(**bad)
    with pytest.raises(UnknownNameError, match="diffmean"):
        SteerOptions(method="diff")


class Even:
    """A judge that scores a half."""

    about, accuracy = "nothing", None

    def scores(self, texts):
        return [0.5] * len(texts)


def bench(model, **more):
    tokenizer = steered.tokenizer()
    texts = [tokenizer(text)["input_ids"] for text in steered.texts()[0]]
    given = {"prompts": [[5, 6], [7, 8, 9]], "neutral": texts, "tokens": 5, "batch_size": 4, "seed": 0, **more}
    return SteeringBench(model=model, tokenizer=tokenizer, judge=Even(), **given)


def test_perplexity_is_that_of_the_tokens_after_the_prefix():
    model = steered.make("llama")
    made = bench(model)
    texts = [{"input_ids": torch.tensor([ids])} for ids in made.neutral]
    expected, _ = next_token_perplexity(model, texts)
    assert made.neutral_perplexity(SteeringWay(name="none", note=""), 1.0) == pytest.approx(expected, rel=1e-5)
    prefixed = made.neutral_perplexity(SteeringWay(name="prompt", note="", prefix=lambda strength: [5, 6, 7]), 1.0)
    total = count = 0.0
    for ids in made.neutral:
        logits = model(input_ids=torch.tensor([[5, 6, 7, *ids]])).logits.detach()[0, 3:-1].log_softmax(-1)
        total -= float(logits[range(len(ids) - 1), ids[1:]].sum())  # the tokens that count without a prefix, too
        count += len(ids) - 1
    assert prefixed == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_prefix_comes_behind_the_token_that_begins_a_text():
    made = bench(steered.make("llama"))
    made.tokenizer.bos_token = made.tokenizer.convert_ids_to_tokens(3)
    assert made.behind([5, 6], [3, 7, 8]) == [3, 5, 6, 7, 8]
    assert made.behind([5, 6], [7, 8]) == [5, 6, 7, 8]
    assert made.behind([], [3, 7]) == [3, 7]


def test_what_each_way_does():
    model, tokenizer = steered.make("llama"), steered.tokenizer()
    options = SteerOptions(dose="-2:2:3")
    ways, made = make_ways(model, tokenizer, split(steered.texts(), 0), options, 0)
    names = [way.name for way in ways]
    assert names == ["gates, diffmean", "prompt", "residual, diffmean", "residual, pca"]
    ids = steered.ids(2, 6)
    plain = model(input_ids=ids).logits.detach()
    for way in ways:
        with way.on(2.0):
            moved = model(input_ids=ids).logits.detach()
        assert torch.equal(moved, plain) == (way.name == "prompt")
        assert_same(model(input_ids=ids).logits.detach(), plain, "bitwise")
    with made.on(model, 2.0):
        expected = model(input_ids=ids).logits.detach()
    with ways[0].on(2.0):
        assert_same(model(input_ids=ids).logits.detach(), expected, "bitwise")
    prompt = ways[1]
    few = [len(prompt.prefix(strength)) for strength in (0.0, 0.5, 1.0, 2.0)]
    assert few[0] == 0
    assert few == sorted(set(few))
    assert prompt.prefix(2.0) != prompt.prefix(-2.0)
    assert EXAMPLES == 4


def test_a_way_that_breaks_says_where_and_a_weak_one_is_stretched():
    model = steered.make("llama")
    made = bench(model)
    weak = gates_way(model, steered.fit(model) * 1e-3)
    assert stretch(made, weak, [-1.0, 0.0, 1.0], 1.01).unit > 1
    huge = gates_way(model, steered.fit(model) * 1e38)
    doses = [made.measure(huge, strength) for strength in (-9.0, 0.0, 9.0)]
    assert [dose.broken for dose in doses] == [True, False, True]
    assert breaks(doses) == [-9.0, 9.0]
    assert made.write(weak, 1.0) == made.write(weak, 1.0)  # the same draws


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steer")
    save_base(folder / "model", "llama")
    save_base(folder / "encoder", "bert")
    for name, texts in zip(("good", "bad"), steered.texts(16), strict=True):
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
    (folder / "few.txt").write_text("fine\n")
    (folder / "empty.txt").write_text("\n")
    return folder


def arguments(files, **more):
    given = {"positive": files / "good.txt", "negative": files / "bad.txt", "dose": "-1:1:3", "samples": 2, "tokens": 3}
    flags = [part for name, value in {**given, **more}.items() for part in (f"--{name}", value)]
    return ["steer", files / "model", *flags]


def test_the_command(files, tmp_path, run_cli):
    more = {"save": tmp_path / "glad", "plot": tmp_path / "dose.png", "seeds": "0,1", "budget": 1.01}
    code, out, err = run_cli(*arguments(files, **more), "--json")
    assert code == 0, err
    data = json.loads(out)
    assert [(row["way"], row["seed"]) for row in data["rows"]][::4] == [("gates, diffmean", 0), ("gates, diffmean", 1)]
    assert [point["strength"] for point in data["rows"][0]["points"]] == [-1, 0, 1]
    base = [next(point for point in row["points"] if point["strength"] == 0) for row in data["rows"][:4]]
    assert (
        len({(point["score"], point["own"], point["neutral"]) for point in base}) == 1
    )  # all ways are unsteered there
    for each in data["areas"]:
        own = [row["area"] for row in data["rows"] if row["way"] == each["way"]]
        assert each["area"] == pytest.approx(sum(own) / 2)
        assert each["interval"][0] <= each["area"] <= each["interval"][1]
    assert (tmp_path / "dose.png").read_bytes().startswith(b"\x89PNG")
    assert hf_glu.GateModulation.load(tmp_path / "glad").method == "diffmean"
    code, out, _ = run_cli(*arguments(files), "--no-peers", "--method", "probe")
    assert code == 0
    assert "gates, probe" in out
    assert "Area at equal perplexity" in out


def test_a_classifier_scores(files, tmp_path, run_cli):
    save_base(tmp_path / "judge", "bert")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "judge")
    config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    code, out, err = run_cli(*arguments(files, classifier=tmp_path / "judge", label="good"), "--no-peers", "--json")
    assert code == 0, err
    assert json.loads(out)["judge"]["about"].startswith("'good' by")
    one, other = (load_judge(str(tmp_path / "judge"), label, steered.tokenizer(), 4) for label in ("good", "bad"))
    texts = [[5, 6, 7], [8, 9]]
    total = torch.tensor(one.scores(texts)) + torch.tensor(other.scores(texts))
    torch.testing.assert_close(total, torch.ones(2))
    with pytest.raises(UnknownNameError, match="good"):
        load_judge(str(tmp_path / "judge"), "goof", steered.tokenizer(), 4)


@pytest.mark.parametrize("padding", [3, None])
def test_a_decoder_scores_each_text_as_by_itself(padding, tmp_path):
    """Its head is on the last token that isn't padding, which it knows by its id."""
    model = steered.FAMILIES["gpt2"].make("GPT2ForSequenceClassification", vocab_size=len(steered.tokenizer()))
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    model.config.pad_token_id = padding
    model.save_pretrained(tmp_path)
    steered.tokenizer().save_pretrained(tmp_path)
    judge = load_judge(str(tmp_path), None, steered.tokenizer(), 4)
    good, bad = steered.texts(2)
    texts = [steered.tokenizer()(text)["input_ids"] for text in (good[0], f"{bad[0]} {bad[1]}", good[1])]
    alone = [judge.scores([text])[0] for text in texts]
    assert judge.scores(texts) == pytest.approx(alone, rel=1e-5)
    assert max(alone) - min(alone) > 1e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"positive": "empty.txt"}, "no text in it"),
        ({"negative": "few.txt"}, "1 texts"),
        ({"positive": "nowhere.txt"}, "can't be read"),
        ({"dose": "2:1"}, "dose"),
        ({"method": "diffmeen"}, "diffmean"),
        ({"layers": "9"}, "out of range"),
        ({"plot": "dose.gif"}, ".png"),
        ({"save": "model"}, "exists already"),
        ({"classifier": "model"}, "no classifier"),
        ({"classifier": "nowhere"}, "no folder"),
    ],
)
def test_bad_input_is_one_line(files, run_cli, monkeypatch, change, says):
    monkeypatch.chdir(files)
    code, out, err = run_cli(*arguments(files, **change))
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_only_language_models_write(files, run_cli):
    given = arguments(files)
    given[1] = files / "encoder"
    code, _, err = run_cli(*given)
    assert code == 2
    assert "no causal language model" in err
