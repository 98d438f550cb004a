"""Tasks as data: inputs, prompts, loading, answers and the leaderboards' files."""

from __future__ import annotations

import json
import zipfile
from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from taskdata import make_rows, write_dataset

from hf_glu.errors import DataError, UnknownNameError
from hf_glu.tasks import SUITES, TASKS, find_task
from hf_glu.tasks import answers as tasks_answers
from hf_glu.tasks.inputs import mark_words, passage
from hf_glu.tasks.loading import load_task, own_task
from hf_glu.tasks.metrics import METRICS
from hf_glu.tasks.prompts import rounded
from hf_glu.tasks.submission import write_predictions, zip_predictions
from hf_glu.tasks.table import find_suite

GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"}
SUPERGLUE = {"boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc", "axb", "axg"}


def test_the_suites_are_whole():
    assert set(SUITES["glue"]) == GLUE
    assert set(SUITES["superglue"]) == SUPERGLUE
    assert {"newsgroups", "brown_pos", "quartz", "movie_ratings"} < set(SUITES["open_nlu"])
    assert len(SUITES["open_nlu"]) == 10
    files = [name for task in TASKS.values() for name in task.files]
    assert len(files) == len(set(files)) == 21
    assert {task.name for task in TASKS.values() if task.suite and not task.averaged} == {"wnli", "ax", "axb", "axg"}
    for task in TASKS.values():
        assert task.metric in METRICS
        assert len(task.files) in (0, len(task.test))
        assert task.model_of is None or task.model_of in TASKS
        assert task.spelling is None or len(task.spelling) == len(task.labels)
        assert not task.dataset or len(str(task.revision)) == 40


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="mrpc"):
        find_task("mrp")
    with pytest.raises(UnknownNameError, match="superglue"):
        find_suite("super_glue")


@pytest.mark.parametrize("name", TASKS)
def test_inputs_and_prompts_of_every_task(name):
    task = TASKS[name]
    for row in make_rows(name, 4):
        texts = task.inputs(row)
        assert len(texts) == {"choice": 2, "entity": 3}.get(task.form, 1)
        assert all(1 <= len(text) <= 2 and all(text) for text in texts)
        prompt = task.prompt(row)
        assert "\n" not in prompt
        assert "<b>" not in prompt


def test_inputs_by_hand():
    row = make_rows("wic", 1)[0]
    assert TASKS["wic"].inputs(row)[0][0] == "film: the * film * was"
    assert mark_words("Anna was fine so she left", [(0, "Anna", "*"), (4, "she", "#")]) == (
        "* Anna * was fine so # she # left"
    )
    assert passage("one\n@highlight\ntwo") == "one. two"
    choices = TASKS["copa"].inputs({"premise": "It fell.", "choice1": "a", "choice2": "b", "question": "cause"})
    assert choices == [("It fell. What was the cause of this?", "a"), ("It fell. What was the cause of this?", "b")]
    entities = TASKS["record"].inputs(make_rows("record", 1)[0])
    assert [pair for _, pair in entities][1] == "the film was by Boston"
    assert [rounded(value) for value in (3.75, 0.0, 4.89, 2.5)] == ["3.8", "0.0", "4.8", "2.4"]
    assert TASKS["mnli"].prompt({"premise": "p", "hypothesis": "h"}) == "mnli hypothesis: h premise: p"


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].suite])
def test_loading_from_a_folder(name, tmp_path):
    task = TASKS[name]
    splits = load_task(task, write_dataset(tmp_path, name))
    assert set(splits) == {*(() if task.model_of else ("train",)), *task.validation, *task.test}
    if task.labels and task.form not in ("entity", "tokens") and not task.model_of:
        assert set(splits["train"]["label"]) == set(range(min(len(task.labels), len(splits["train"]))))
        assert set(splits[task.test[0]]["label"]) == {-1}


def test_tags_are_read_by_name_or_number(tmp_path):
    rows = [{"tokens": ["a", "b"], "label": ["NOUN", 9]}, {"tokens": ["c"], "label": ["X"]}]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_task(TASKS["brown_pos"], tmp_path)["train"]["label"] == [[5, 9], [11]]
    for label in (["NOUN"], ["NOUN", "?"], "NOUN", ["NOUN", -1]):
        (tmp_path / "train.jsonl").write_text(json.dumps({**rows[0], "label": label}))
        with pytest.raises(DataError, match=r"row 1|is none of ADJ"):
            load_task(TASKS["brown_pos"], tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_kinds_of_files_and_spellings_of_labels(kind, tmp_path):
    spelled = ["entailment", "NOT_ENTAILMENT", "0", 1] if kind != "parquet" else [0, 1, 0, 1]
    rows = [{"sentence1": "a b", "sentence2": "c", "label": str(label)} for label in spelled]
    data = Dataset.from_list(rows)
    write = {
        "jsonl": data.to_json,
        "csv": data.to_csv,
        "parquet": data.to_parquet,
        "tsv": partial(data.to_csv, sep="\t"),
    }
    for split in ("train", "val"):
        write[kind](tmp_path / f"{split}.{kind}")
    splits = load_task(TASKS["rte"], tmp_path)
    assert splits["train"]["label"] == [0, 1, 0, 1]


def broken(says, change, name="rte"):
    return pytest.param(says, change, name, id=says)


@pytest.mark.parametrize(
    ("says", "change", "name"),
    [
        broken("no column 'sentence2'", lambda rows: [{"sentence1": "a", "label": 0}]),
        broken("no column 'label'", lambda rows: [{"sentence1": "a", "sentence2": "b"}]),
        broken("unlabeled", lambda rows: [{**row, "label": -1} for row in rows]),
        broken("the label 7 is none", lambda rows: [{**row, "label": 7} for row in rows]),
        broken("'maybe' is none of entailment", lambda rows: [{**row, "label": "maybe"} for row in rows]),
        broken("no number", lambda rows: [{**row, "label": "high"} for row in rows], "stsb"),
        broken("nothing in the column", lambda rows: [*rows, {**rows[0], "sentence1": None}]),
    ],
)
def test_bad_data(says, change, name, tmp_path):
    rows = make_rows(name, 4)
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    Dataset.from_list(change(rows)).to_json(tmp_path / "validation.jsonl")
    with pytest.raises(DataError, match=says):
        load_task(TASKS[name], tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="no dataset folder"):
        load_task(TASKS["rte"], tmp_path / "none")
    with pytest.raises(DataError, match=r"such as train\.jsonl"):
        load_task(TASKS["rte"], tmp_path)
    Dataset.from_list(make_rows("rte", 2)).to_json(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="no split validation"):
        load_task(TASKS["rte"], tmp_path)
    (tmp_path / "validation.jsonl").write_text("{broken")
    with pytest.raises(DataError, match="can't be read as jsonl"):
        load_task(TASKS["rte"], tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        own_task(tmp_path / "nothing.csv")
    (tmp_path / "one.csv").write_text("text,label\na,1\nb,1\n")
    with pytest.raises(DataError, match="one label only"):
        own_task(tmp_path / "one.csv", validation=tmp_path / "one.csv")


def test_no_hub_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="--dataset"):
        load_task(TASKS["sst2"])


def test_answers_of_each_form():
    data = Dataset.from_list(make_rows("record", 2))
    logits = np.array([[0, 0.1], [0, 3.0], [0, 1.0], [2.0, 1.0], [0, -5.0], [0, -0.5]])
    assert tasks_answers.from_logits(TASKS["record"], data, logits, [0, 0, 0, 1, 1, 1]) == ["Boston", "Carl"]
    two = Dataset.from_list(make_rows("copa", 2))
    scores = np.array([[1.0], [2.0], [0.5], [0.1]])
    assert tasks_answers.from_logits(TASKS["copa"], two, scores, [0, 0, 1, 1]) == [1, 0]
    assert tasks_answers.from_logits(TASKS["stsb"], two, np.array([[2.5], [1.0]]), [0, 1]) == [2.5, 1.0]
    with pytest.raises(DataError, match="NaN"):
        tasks_answers.from_logits(TASKS["stsb"], two, np.array([[np.nan], [1.0]]), [0, 1])
    assert tasks_answers.from_texts(TASKS["mnli"], ["Neutral ", "contradiction", "what"]) == [1, 2, -1]
    assert tasks_answers.from_texts(TASKS["stsb"], ["3.8", "x", "inf"]) == [3.8, 0.0, 0.0]


def test_the_score_is_the_mean_of_the_main_metrics_and_splits():
    assert tasks_answers.score(TASKS["mrpc"], {"accuracy": 0.5, "f1": 0.7}) == pytest.approx(0.6)
    both = {"validation_matched/accuracy": 0.8, "validation_mismatched/accuracy": 0.6}
    assert tasks_answers.score(TASKS["mnli"], both) == pytest.approx(0.7)


EXPECTED = {
    "cola": ["index\tprediction", "0\t1", "1\t0", "2\t0"],
    "qnli": ["index\tprediction", "0\tnot_entailment", "1\tentailment", "2\tentailment"],
    "boolq": [{"idx": 0, "label": "true"}, {"idx": 1, "label": "false"}, {"idx": 2, "label": "false"}],
    "wsc": [{"idx": 0, "label": "True"}, {"idx": 1, "label": "False"}, {"idx": 2, "label": "False"}],
    "copa": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}, {"idx": 2, "label": 0}],
    "axb": [
        {"idx": 0, "label": "not_entailment"},
        {"idx": 1, "label": "entailment"},
        {"idx": 2, "label": "entailment"},
    ],
    "multirc": [
        {"idx": 0, "passage": {"questions": [
            {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
            {"idx": 1, "answers": [{"idx": 2, "label": 0}]},
        ]}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_leaderboards_files(name, tmp_path):
    task = TASKS[name]
    data = Dataset.from_list(make_rows(name, 3, labeled=False))
    path = write_predictions(task, task.test[0], data, [1, 0, -1], tmp_path)
    lines = path.read_text().splitlines()
    assert (lines if path.suffix == ".tsv" else [json.loads(line) for line in lines]) == EXPECTED[name]


def test_other_files_and_the_zip(tmp_path):
    data = Dataset.from_list(make_rows("record", 2, labeled=False))
    path = write_predictions(TASKS["record"], "test", data, ["Anna", "Carl"], tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"idx": 0, "label": "Anna"}, {"idx": 1, "label": "Carl"}
    ]  # fmt: skip
    data = Dataset.from_list(make_rows("stsb", 2, labeled=False))
    path = write_predictions(TASKS["stsb"], "test", data, [5.2, 1.25], tmp_path)
    assert path.read_text().splitlines()[1:] == ["0\t5.000", "1\t1.250"]
    both = [write_predictions(TASKS["mnli"], split, data, [0, 2], tmp_path).name for split in TASKS["mnli"].test]
    assert both == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    archive, missing = zip_predictions("glue", tmp_path)
    assert zipfile.ZipFile(archive).namelist() == ["STS-B.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]
    assert "CoLA.tsv" in missing
    with pytest.raises(DataError, match="no leaderboard"):
        write_predictions(TASKS["movie_reviews"], "test", data, [0, 1], tmp_path)
