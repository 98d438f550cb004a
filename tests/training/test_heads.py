"""Classifiers that were fine-tuned before, as the base of a task: rows of the head by their labels' names."""

from __future__ import annotations

import logging

import pytest
import torch
from comparing import assert_same
from pico import FAMILIES
from taskdata import make_tokenizer, save_base, vocabulary
from transformers import BertForTokenClassification

import hf_glu
from hf_glu.errors import CheckpointError
from hf_glu.tasks import TASKS
from hf_glu.training.data.heads import label_dimensions, row_order
from hf_glu.training.data.models import load_for_task

CLASSIFIERS = {
    family: next(head for head in made.heads if head.endswith("ForSequenceClassification"))
    for family, made in FAMILIES.items()
}
NEEDED = {"t5": {"eos_token_id": 2}, "gpt_neox": {"pad_token_id": 0}}
OTHER_ORDER = ["CONTRADICTION", "Neutral", "entailment"]
ORDER = [2, 1, 0]  # of entailment, neutral, contradiction in it


def save_classifier(folder, family="bert", names=OTHER_ORDER):
    """Save a pico classifier whose labels are called so, with its tokenizer; return it and the folder."""
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: number for number, name in enumerate(names)}
    more = {**labels, **NEEDED.get(family, {})}
    model = FAMILIES[family].make(CLASSIFIERS[family], vocab_size=len(vocabulary()), **more)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model, str(folder)


def logits(model):
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_rows_of_the_head_follow_their_names(family, tmp_path):
    before, folder = save_classifier(tmp_path / "mnli", family)
    after, *_ = load_for_task(folder, TASKS["mnli"], form="classes")
    assert_same(logits(after), logits(before)[:, ORDER], "bitwise")
    assert after.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_another_number_of_labels_has_a_new_head(family, tmp_path, caplog):
    before, folder = save_classifier(tmp_path / "mnli", family)
    with caplog.at_level(logging.WARNING):
        after, *_ = load_for_task(folder, TASKS["rte"], form="classes", seed=3)
    assert "CONTRADICTION, Neutral, entailment" in caplog.text
    assert "a new one is trained" in caplog.text
    again, *_ = load_for_task(folder, TASKS["rte"], form="classes", seed=3)
    assert_same(dict(again.state_dict()), dict(after.state_dict()), "bitwise")
    rows = label_dimensions(after)
    assert rows
    kept = {name: tensor for name, tensor in after.state_dict().items() if name not in rows}
    assert_same(kept, {name: tensor for name, tensor in before.state_dict().items() if name in kept}, "bitwise")
    assert {after.get_parameter(name).shape[at] for name, at in rows.items()} == {2}


@pytest.mark.parametrize(
    ("names", "task"),
    [(["negative", "positive"], "rte"), (["good", "fine", "bad"], "mnli"), (["one", "two", "three"], "stsb")],
)
def test_other_labels_have_a_new_head(names, task, tmp_path, caplog):
    before, folder = save_classifier(tmp_path / "other", names=names)
    with caplog.at_level(logging.WARNING):
        after, *_ = load_for_task(folder, TASKS[task])
    assert "a new one is trained" in caplog.text
    assert_same(after.bert.pooler.dense.weight, before.bert.pooler.dense.weight, "bitwise")
    count = min(len(before.classifier.weight), len(after.classifier.weight))
    assert not torch.equal(after.classifier.weight[:count], before.classifier.weight[:count])
    assert not after.classifier.bias.any()


def test_a_head_of_another_kind_is_not_taken(tmp_path, caplog):
    _, folder = save_classifier(tmp_path / "other", names=["0", "1"])
    model = BertForTokenClassification.from_pretrained(folder)
    model.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        after, *_ = load_for_task(folder, TASKS["sst2"])
    assert "a new one is trained" in caplog.text
    assert not torch.equal(after.classifier.weight, model.classifier.weight)


def test_a_head_of_scores_is_not_taken_for_a_choices(tmp_path, caplog):
    save_base(tmp_path)
    model = FAMILIES["bert"].make(
        CLASSIFIERS["bert"], vocab_size=len(vocabulary()), num_labels=1, problem_type="regression"
    )
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        after, *_ = load_for_task(str(tmp_path), TASKS["copa"])
    assert "head (scores) isn't for copa" in caplog.text
    assert not torch.equal(after.classifier.weight, model.classifier.weight)
    after, *_ = load_for_task(str(tmp_path), TASKS["stsb"])
    assert_same(after.classifier.weight, model.classifier.weight, "bitwise")


def test_labels_without_names_are_kept_in_their_order_and_it_is_said(tmp_path, caplog):
    before, folder = save_classifier(tmp_path / "unnamed", names=["LABEL_0", "LABEL_1", "LABEL_2"])
    with caplog.at_level(logging.WARNING):
        after, *_ = load_for_task(folder, TASKS["mnli"])
    assert "taken to be entailment, neutral, contradiction" in caplog.text
    assert_same(logits(after), logits(before), "bitwise")


def test_the_same_order_and_no_head_are_silent(tmp_path, caplog):
    before, folder = save_classifier(tmp_path / "same", names=list(TASKS["mnli"].labels))
    with caplog.at_level(logging.WARNING):
        after, *_ = load_for_task(folder, TASKS["mnli"])
        fresh, *_ = load_for_task(save_base(tmp_path / "base"), TASKS["mnli"])
    assert_same(logits(after), logits(before), "bitwise")
    assert fresh.num_labels == 3
    assert not caplog.records


def test_a_converted_classifier_is_a_base_too(tmp_path):
    before, folder = save_classifier(tmp_path / "mnli")
    hf_glu.convert(before, "geglu", check=False)
    before.save_pretrained(folder)
    after, *_ = load_for_task(folder, TASKS["mnli"])
    assert_same(logits(after), logits(before)[:, ORDER], "bitwise")


def test_other_sizes_outside_of_the_head_are_refused(tmp_path):
    before, folder = save_classifier(tmp_path / "mnli")
    before.config.intermediate_size += 8
    before.config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"intermediate\.dense|another size|have"):
        load_for_task(folder, TASKS["rte"])


@pytest.mark.parametrize(
    ("known", "wanted", "order"),
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["US", "us"], ["us", "US"], [1, 0]),
        (["US", "us"], ["us", "Us"], None),
        (["Not-Entailment", "entailment"], ["entailment", "not_entailment"], [1, 0]),
        (["a", "a"], ["a", "b"], None),
        (["a", "b", "c"], ["a", "b"], None),
    ],
)
def test_row_order(known, wanted, order):
    assert row_order(dict(enumerate(known)), dict(enumerate(wanted))) == order
