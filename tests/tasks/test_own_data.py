"""Labelled files of one's own: what is read is what is there, and what can't be meant is refused."""

from __future__ import annotations

import csv
import json
import os

import pytest
from datasets import ClassLabel, Dataset
from taskdata import make_tokenizer, save_base

from hf_glu.errors import DataError, OptionError
from hf_glu.tasks import TASKS
from hf_glu.tasks.answers import from_texts
from hf_glu.tasks.choices import OwnOptions
from hf_glu.tasks.columns import TEXTS
from hf_glu.tasks.loading import load_task, own_task
from hf_glu.tasks.table import Task
from hf_glu.training.data.features import check_answers
from hf_glu.training.job import run_job
from hf_glu.training.options import JobOptions, TrainingOptions

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")


def write(folder, rows, kind="jsonl", name="own"):
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
        with path.open("w", newline="") as file:
            csv.writer(file, **dialect).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return path


def labelled(*labels, count=20):
    return [{"text": f"text {number}", "label": labels[number % len(labels)]} for number in range(count)]


def everything(splits, column):
    """Return a column's value of each row, in the order of their texts' numbers."""
    rows = [row for data in splits.values() for row in data]
    return [row[column] for row in sorted(rows, key=lambda row: int(row["text"].split()[1]))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("US", "us"), ("US", "us")),
        (("CO", "Co", "co"), ("CO", "Co", "co")),
        (("None", "Some"), ("None", "Some")),
        (("null", "NA", "nan", "N/A"), ("N/A", "NA", "nan", "null")),
        (tuple(range(1, 13)), tuple(str(number) for number in range(1, 13))),
        (tuple(str(number) for number in range(8, 12)), ("8", "9", "10", "11")),
        ((1, 0, -1), ("-1", "0", "1")),
        (("01", "1"), ("01", "1")),
        (("pos ", "neg"), ("neg", "pos")),
    ],
    ids=str,
)
def test_classes_are_the_labels_as_they_are_written(labels, classes, kind, tmp_path):
    rows = labelled(*labels, count=4 * len(labels))
    task, splits = own_task(write(tmp_path, rows, kind))
    assert task.form == "classes"
    assert task.labels == classes
    found = [task.labels[label] for label in everything(splits, "label")]
    assert found == [str(row["label"]).strip() for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_truth_values_are_classes(kind, tmp_path):
    task, _ = own_task(write(tmp_path, labelled(True, False), kind))
    assert task.labels == ("False", "True")


@pytest.mark.parametrize("kind", KINDS)
def test_fractions_are_scores(kind, tmp_path):
    rows = labelled(0.0, 0.25, 1.0, -3.5)
    task, splits = own_task(write(tmp_path, rows, kind))
    assert (task.form, task.labels, task.main) == ("regression", (), ("pearson", "spearmanr"))
    assert everything(splits, "label") == [row["label"] for row in rows]


def test_scores_are_trained(tmp_path):
    job = JobOptions(model=save_base(tmp_path / "base"), dataset=str(write(tmp_path, labelled(0.5, 1.5))), to="geglu")
    results = run_job(job, TrainingOptions(max_steps=1, batch_size=4, precision="no", max_length=16))
    assert set(results["metrics"]) == {"pearson", "spearmanr"}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_look_like_nothing_are_texts(kind, tmp_path):
    texts = ["None", "NA", "null", "nan", "N/A", "2020-01-01", "1e5", "007", "true", "-"]
    rows = [{"text": text, "label": str(number % 2)} for number, text in enumerate(texts)]
    _, splits = own_task(write(tmp_path, rows, kind))
    assert sorted([*splits["train"]["text"], *splits["validation"]["text"]]) == sorted(texts)


@pytest.mark.parametrize("names", [names for names in TEXTS if len(names) == 2], ids=",".join)
def test_both_texts_of_a_pair_are_read(names, tmp_path):
    rows = [{names[1]: f"second {number}", "label": number % 2, names[0]: f"first {number}"} for number in range(10)]
    task, splits = own_task(write(tmp_path, rows, "csv"))
    row = splits["train"][0]
    number = row[names[0]].split()[1]
    assert task.inputs(row) == [(f"first {number}", f"second {number}")]


def test_no_text_is_left_out_without_being_told(tmp_path):
    rows = [
        {"headline": "h", "text": "t", "date": "2020-01-01", "id": "a7", "stars": 3, "label": n % 2} for n in range(9)
    ]
    path = write(tmp_path, rows, "csv")
    with pytest.raises(
        DataError, match=r"'headline' that would be left out.*--text-column text --pair-column headline"
    ):
        own_task(path)
    task, splits = own_task(path, OwnOptions(texts="headline, text"))
    assert task.inputs(splits["train"][0]) == [("h", "t")]
    assert own_task(path, OwnOptions(texts="text"))[0].columns == ("text",)
    with pytest.raises(DataError, match="no text column 'body', but headline, text"):
        own_task(path, OwnOptions(texts="text,body"))
    with pytest.raises(OptionError, match="one column or two"):
        own_task(path, OwnOptions(texts="text,headline,date"))
    for row in rows:
        del row["headline"], row["date"]
    assert own_task(write(tmp_path, rows, "csv"))[0].columns == ("text",)  # numbers and ids are no texts


def broken(says, rows, kind="jsonl"):
    return pytest.param(says, rows, kind, id=f"{says} {kind}")


@pytest.mark.parametrize(
    ("says", "rows", "kind"),
    [
        broken("row 1: the label .0, 1. isn't one class", labelled([0, 1], [1, 1])),
        broken("isn't one class or score", labelled({"a": 1})),
        broken("row 2: there is no label", labelled("a", None)),
        broken("row 2: there is no label", labelled("a", ""), "csv"),
        broken("there is no label", labelled(0.5, float("nan"))),
        broken("numbers such as 0.5 and words such as 'NA'", labelled("0.5", "NA")),
        broken("whole numbers written as fractions, 0.0, 1.0", labelled(0.0, 1.0)),
        broken("the score 1e400 is too large", labelled("0.5", "1e400")),
        broken("differ in spaces only", labelled("a", "a ")),
        broken("one label only: a", labelled("a")),
        broken("one row only", labelled("a", "b", count=1)),
        broken("no rows", [], "json"),
        broken("nothing in the column 'text'", [*labelled("a", "b"), {"text": None, "label": "a"}]),
        broken("'text' is no text, but ..a.", [{"text": ["a"], "label": n % 2} for n in range(9)]),
        broken("validation data have one score only", labelled(0.5, 1.5, count=2)),
    ],
)
def test_what_can_not_be_meant_is_refused(says, rows, kind, tmp_path):
    with pytest.raises(DataError, match=says):
        own_task(write(tmp_path, rows, kind))


def test_one_row_with_validation_data_has_one_label_only(tmp_path):
    one = write(tmp_path, labelled("a", count=1))
    with pytest.raises(DataError, match="one label only"):
        own_task(one, validation=write(tmp_path, labelled("a", "b"), name="more"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\nfoo, bar,1\nx, y,0\n", "Expected 2 fields in line 2, saw 3"),
        ("text,text,label\na,b,1\n", "a column twice"),
        ('text,label\n"open,1\n', "EOF inside string"),
        ("", "No columns"),
        ("text,label\n", "no rows"),
        ("text,label\n\xff,1\n", "codec"),
    ],
)
def test_a_csv_that_would_be_read_as_another_is_refused(content, says, tmp_path):
    (tmp_path / "own.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=says):
        own_task(tmp_path / "own.csv")


def test_a_label_that_training_does_not_know_is_named(tmp_path):
    train = write(tmp_path, labelled("a", "b"))
    with pytest.raises(DataError, match="'A' isn't in the training data, which has a, b"):
        own_task(train, validation=write(tmp_path, labelled("a", "A"), name="more"))
    many = write(tmp_path, labelled(*range(30), count=60), name="many")
    with pytest.raises(DataError, match="7 and 22 more"):
        own_task(many, validation=write(tmp_path, labelled(30), name="more"))


def declare(rows, names):
    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=names))


def test_declared_labels_are_read_by_name(tmp_path):
    declare(labelled(0, 1), ["zebra", "ant"]).to_parquet(tmp_path / "train.parquet")
    declare(labelled(0, 1), ["ant", "zebra"]).to_parquet(tmp_path / "validation.parquet")
    task, splits = own_task(tmp_path)
    assert task.labels == ("zebra", "ant")
    assert splits["train"]["label"][:2] == [0, 1]
    assert splits["validation"]["label"][:2] == [1, 0]
    numbers = declare(labelled(0, 1, 2), ["1", "0", "-1"])
    numbers.to_parquet(tmp_path / "own.parquet")
    _, splits = own_task(tmp_path / "own.parquet")
    assert everything(splits, "label") == numbers["label"][:]


def test_a_tasks_labels_in_another_declared_order(tmp_path):
    rows = [{"premise": "p", "hypothesis": "h", "label": number % 3} for number in range(6)]
    names = ["contradiction", "neutral", "entailment"]
    for split in ("train", *TASKS["mnli"].validation):
        declare(rows, names).to_parquet(tmp_path / f"{split}.parquet")
    assert load_task(TASKS["mnli"], tmp_path)["train"]["label"][:3] == [2, 1, 0]


def test_a_csv_has_numbers_where_a_task_counts_words(tmp_path):
    row = {"word": "film", "sentence1": "the film was", "sentence2": "a film", "start1": 4, "end1": 8, "start2": 2,
           "end2": 6, "label": "True", "idx": 0}  # fmt: skip
    for split in ("train", "validation"):
        write(tmp_path, [row, {**row, "label": "False"}], "csv", split)
    splits = load_task(TASKS["wic"], tmp_path)
    assert TASKS["wic"].inputs(splits["train"][0]) == [("film: the * film * was", "a * film *")]
    write(tmp_path, [{**row, "start1": "four"}], "csv", "train")
    with pytest.raises(DataError, match="'four' in the column 'start1' is no whole number"):
        load_task(TASKS["wic"], tmp_path)


def test_a_file_is_read_as_it_is_now(tmp_path):
    path = write(tmp_path, labelled("a", "b"), "csv")
    assert own_task(path)[0].labels == ("a", "b")
    times = path.stat()
    write(tmp_path, labelled("c", "d"), "csv")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert own_task(path)[0].labels == ("c", "d")


def test_answers_in_words_are_told_apart_by_their_letters():
    task = Task(name="own", columns=("text",), labels=("US", "us", "Other"), inputs=None, prompt=None)
    assert from_texts(task, ["us", "US", "Us", "other ", "OTHER"]) == [1, 0, -1, 2, 2]


def test_what_a_tokenizer_can_not_write_is_refused():
    tokenizer = make_tokenizer(end=True)
    check_answers(TASKS["mnli"], tokenizer)
    task = Task(name="own", columns=("text",), labels=("fine", "Fine"), inputs=None, prompt=None)
    with pytest.raises(OptionError, match="can't write the label 'Fine'"):
        check_answers(task, tokenizer)
    scores = Task(name="stsb", columns=("text",), labels=(), inputs=None, prompt=None, form="regression")
    with pytest.raises(OptionError, match="form=classes"):
        check_answers(scores, tokenizer)


@pytest.mark.parametrize("name", ["valid", "eval", "dev", "Validation", "VAL", "validation-00000-of-00001"])
def test_validation_files_are_found_by_their_usual_names(name, tmp_path):
    write(tmp_path, labelled(0, 1), name="train")
    write(tmp_path, [{"text": f"held out {number}", "label": number % 2} for number in range(6)], name=name)
    write(tmp_path, [{"text": "a test"}], name="test")
    (tmp_path / "README.txt").write_text("about")
    _, splits = own_task(tmp_path)
    assert len(splits["train"]) == 20
    assert splits["validation"]["text"][0] == "held out 0"


def test_parts_of_a_split_are_joined(tmp_path):
    for number in range(2):
        write(tmp_path, labelled(0, 1), "parquet", name=f"train-0000{number}-of-00002-0123456789abcdef")
    _, splits = own_task(tmp_path)
    assert len(splits["train"]) + len(splits["validation"]) == 40


@pytest.mark.parametrize("name", ["train-old", "train.wrong", "validation_matched", "val_1", "held-out"])
def test_a_file_of_no_split_is_refused(name, tmp_path):
    write(tmp_path, labelled(0, 1), name="train")
    path = write(tmp_path, labelled(0, 1), name=name)
    with pytest.raises(DataError, match=f"{name}.jsonl belongs to no split"):
        own_task(tmp_path)
    assert len(own_task(tmp_path, validation=path)[1]["validation"]) == 20


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        write(tmp_path, labelled(0, 1), name=name)
    with pytest.raises(DataError, match="are both validation"):
        own_task(tmp_path)


def test_a_text_that_is_no_number_is_missing(tmp_path):
    path = tmp_path / "nan.jsonl"
    path.write_text("".join(json.dumps({**row, "text": float("nan")}) + "\n" for row in labelled(0, 1)))
    with pytest.raises(DataError, match="nothing in the column 'text'"):
        own_task(path)
