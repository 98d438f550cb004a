"""Columns of one's own data by any name, and what is predicted of them."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, List
from taskdata import several_rows, tagged_rows

from hf_glu.errors import DataError, OptionError
from hf_glu.tasks.choices import OwnOptions
from hf_glu.tasks.own import own_task


def write(folder, rows, name="own.jsonl"):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / name


def tags_of(task, splits):
    return [[task.labels[number] for number in row] for row in splits["train"]["label"]]


@pytest.fixture(autouse=True)
def _needs_seqeval():
    pytest.importorskip("seqeval")


def test_columns_have_any_name(tmp_path):
    rows = [{"label": "old", "Head line": f"h{n}", "body": f"b{n}", "genre": "xY"[n % 2]} for n in range(20)]
    path = write(tmp_path, rows)
    chosen = OwnOptions(text_column="Head line", pair_column="body", label_column="genre")
    task, splits = own_task(path, chosen)
    assert task.labels == ("Y", "x")
    row = splits["train"][0]
    number = int(row["Head line"][1:])
    assert task.inputs(row) == [(f"h{number}", f"b{number}")]
    assert task.labels[row["label"]] == "xY"[number % 2]
    alone, _ = own_task(path, OwnOptions(text_column="body", label_column="genre"))
    assert alone.columns == ("body",)
    assert own_task(path, OwnOptions(texts="Head line,body", label_column="genre"))[0].columns == task.columns


def test_the_label_may_be_the_only_one_that_is_named(tmp_path):
    rows = [{"text": f"t{n}", "genre": n % 2} for n in range(20)]
    assert own_task(write(tmp_path, rows), OwnOptions(label_column="genre"))[0].labels == ("0", "1")
    rows = [{**row, "title": "a title"} for row in rows]
    with pytest.raises(DataError, match=r"texts in .title. that would be left out.*--text-column text"):
        own_task(write(tmp_path, rows), OwnOptions(label_column="genre"))


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        ({"text_column": "body"}, DataError, "no text column 'body', but text, label, other"),
        ({"label_column": "genre"}, DataError, "own.jsonl has no column 'genre', but text, label, other"),
        ({"text_column": "text", "pair_column": "text"}, DataError, "'text' is both texts of a pair"),
        ({"text_column": "text", "label_column": "text"}, DataError, "no text column 'text'"),
        ({"text_column": "label", "label_column": "other"}, DataError, "texts in the column 'label'"),
        ({"texts": "text", "text_column": "text"}, OptionError, "texts and text_column exclude each other"),
        ({"texts": "text", "pair_column": "text"}, OptionError, "texts and pair_column exclude each other"),
        ({"pair_column": "other"}, OptionError, "name the first with text_column"),
        (
            {"problem": "many"},
            OptionError,
            "problem must be one of single, multi, regression, tokens, text, got 'many'",
        ),
        ({"label_separator": ";"}, OptionError, "needs problem=multi"),
        ({"label_separator": "", "problem": "multi"}, OptionError, "label_separator is empty"),
        ({"problem": "tokens"}, DataError, "call the lists of words `tokens`.*--text-column"),
        ({"problem": "regression"}, DataError, "split train, row 1: the label 'a' is no score"),
    ],
)
def test_columns_that_can_not_be_meant_are_refused(chosen, error, says, tmp_path):
    path = write(tmp_path, [{"text": f"t{n}", "label": "ab"[n % 2], "other": n} for n in range(9)])
    with pytest.raises(error, match=says):
        own_task(path, OwnOptions(**chosen))


def test_validation_data_without_the_column_name_those_that_are_there(tmp_path):
    path = write(tmp_path, [{"text": "t", "genre": n % 2} for n in range(9)])
    other = write(tmp_path, [{"text": "t", "label": 1}], "more.jsonl")
    with pytest.raises(DataError, match="split validation: there is no column 'genre', but text, label"):
        own_task(path, OwnOptions(label_column="genre"), validation=other)


@pytest.mark.parametrize(("problem", "labels"), [("single", ("1", "2", "3")), ("regression", ())])
def test_whole_numbers_are_classes_or_scores_as_is_told(problem, labels, tmp_path):
    path = write(tmp_path, [{"text": f"t{n}", "label": 1 + n % 3} for n in range(90)])
    task, splits = own_task(path, OwnOptions(problem=problem))
    assert task.labels == labels
    assert task.form == {"single": "classes"}.get(problem, problem)
    number = int(splits["train"][0]["text"][1:])
    assert splits["train"][0]["label"] == {"single": number % 3, "regression": 1.0 + number % 3}[problem]


def test_fractions_are_classes_where_that_is_told(tmp_path):
    path = write(tmp_path, [{"text": f"t{n}", "label": f"{n % 2}.5"} for n in range(9)])
    assert own_task(path, OwnOptions(problem="single"))[0].labels == ("0.5", "1.5")


def test_several_classes_are_lists_of_their_names(tmp_path):
    task, splits = own_task(write(tmp_path, several_rows(40)), OwnOptions(problem="multi"))
    assert (task.form, task.labels, task.main) == ("multi", ("Bad", "so good"), ("micro_f1",))
    before = {row["text"]: sorted(row["label"]) for row in several_rows(40)}
    named = tags_of(task, splits)
    assert named == [before[text] for text in splits["train"]["text"]]
    assert [] in named


def test_several_classes_in_one_text_are_separated_as_is_told(tmp_path):
    (tmp_path / "own.csv").write_text("text,kinds\n" + "a,x; Y z\nb,\nc,Y z\n" * 5)
    task, splits = own_task(
        tmp_path / "own.csv", OwnOptions(problem="multi", label_separator=";", label_column="kinds")
    )
    assert task.labels == ("Y z", "x")
    assert dict(zip(*(splits["train"][each] for each in ("text", "label")), strict=True)) == {
        "a": [0, 1], "b": [], "c": [0]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["x", "y"], "row 1: 'x' is one text: say what separates its classes, such as --label-separator ';'"),
        ([["x"], None], r"row 2: None is no list of classes; one without any is \[\]"),
        ([["x"], [None, "y"]], "row 2: None is no label"),
        ([["x"], [""]], "row 2: '' is no label"),
        ([[1, 0, 1]], "row 1: the class '1' is there twice; a list has the classes that hold, and no 0 and 1"),
        ([["x"], ["x "]], "differ in spaces only"),
        ([["x"], []], "one label only: x"),
        ([[], []], "the training data have no label"),
    ],
)
def test_lists_of_classes_that_are_none_are_refused(labels, says, tmp_path):
    rows = [{"text": "t", "label": labels[n % len(labels)]} for n in range(10)]
    with pytest.raises(DataError, match=says):
        own_task(write(tmp_path, rows), OwnOptions(problem="multi"))


def test_a_class_that_training_does_not_know_is_named(tmp_path):
    rows = [{"text": "t", "label": ["x", "y"]}] * 5
    other = write(tmp_path, [{"text": "t", "label": ["z"]}], "more.jsonl")
    with pytest.raises(DataError, match="'z' isn't in the training data, which has x, y"):
        own_task(write(tmp_path, rows), OwnOptions(problem="multi"), validation=other)


@pytest.mark.parametrize("problem", ["tokens", None])
def test_words_have_tags(problem, tmp_path):
    task, splits = own_task(write(tmp_path, tagged_rows(40)), OwnOptions(problem=problem))
    assert (task.form, task.metric, task.main) == ("tokens", "entities", ("f1",))
    assert task.labels == ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    before = {tuple(row["tokens"]): row["tags"] for row in tagged_rows(40)}
    assert tags_of(task, splits) == [before[tuple(words)] for words in splits["train"]["tokens"]]
    assert task.inputs(splits["train"][0]) == [(" ".join(splits["train"][0]["tokens"]),)]


def test_tags_that_name_no_entities_are_counted_one_by_one(tmp_path):
    rows = [{"words": ["it", 5], "pos": ["PRP", "CD"]}] * 9
    task, _ = own_task(write(tmp_path, rows), OwnOptions(problem="tokens", label_column="pos"))
    assert (task.metric, task.main, task.labels) == ("tags", ("accuracy",), ("CD", "PRP"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "split train, row 2: there are 2 words but 1 tags"),
        ({"tokens": [], "tags": []}, "row 2: there are no words in 'tokens'"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "row 2: .'a', None. in 'tokens' is no list of words"),
        ({"tokens": ["a"], "tags": [None]}, "row 2: None is no label"),
        ({"tokens": ["a"], "tags": None}, "row 2: None is no list of tags"),
    ],
)
def test_words_without_a_tag_for_each_are_refused(row, says, tmp_path):
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, row, *tagged_rows(9)]
    with pytest.raises(DataError, match=says):
        own_task(write(tmp_path, rows))


def test_words_of_two_columns_are_refused(tmp_path):
    with pytest.raises(OptionError, match="words with tags are in one column, not in tokens and other"):
        own_task(write(tmp_path, [{**row, "other": ["a"]} for row in tagged_rows(9)]), OwnOptions(texts="tokens,other"))


def test_lists_say_which_problem_they_are(tmp_path):
    with pytest.raises(DataError, match="isn't one class or score; several classes a row are --problem multi"):
        own_task(write(tmp_path, several_rows(9)))
    with pytest.raises(DataError, match=r"'text' is no text, but .*; words with tags are --problem tokens"):
        own_task(write(tmp_path, [{"text": ["a"], "label": n % 2} for n in range(9)]))


def test_declared_names_of_lists_are_read(tmp_path):
    names = ["zebra", "ant"]
    rows = [{"text": "t", "label": [n % 2]} for n in range(10)]
    data = Dataset.from_list(rows).cast_column("label", List(ClassLabel(names=names)))
    data.to_parquet(tmp_path / "own.parquet")
    task, _ = own_task(tmp_path / "own.parquet", OwnOptions(problem="multi"))
    assert task.labels == ("zebra", "ant")
    wrong = Dataset.from_list([{"text": "t", "label": [-1]}, *rows]).cast_column("label", List(ClassLabel(names=names)))
    wrong.to_parquet(tmp_path / "own.parquet")
    with pytest.raises(DataError, match="row 1: -1 is no label"):
        own_task(tmp_path / "own.parquet", OwnOptions(problem="multi"))


CONLL = "-DOCSTART- -X- O\n\nAnna NNP B-PER\nwas VBD O\n\n\nit PRP O\n"


@pytest.mark.parametrize("name", ["own.conll", "own.txt"])
def test_conll_files_are_words_with_tags(name, tmp_path):
    (tmp_path / name).write_text(CONLL * 5)
    task, splits = own_task(tmp_path / name)
    assert task.labels == ("B-PER", "O")
    assert {tuple(words) for words in splits["train"]["tokens"]} == {("Anna", "was"), ("it",)}
    (tmp_path / name).write_text("New York\tB-LOC\nis\tO\n\nbig\tO\n")
    task, splits = own_task(tmp_path / name, validation=tmp_path / name)
    assert splits["train"]["tokens"][0] == ["New York", "is"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Anna B-PER\nwas\n", "own.conll can't be read as conll: line 2 has 1 columns, not 2: a word a line"),
        ("Anna B-PER\nwas VBD O\n", "line 2 has 3 columns, not 2"),
        ("", "no rows"),
    ],
)
def test_broken_conll_files_are_refused(text, says, tmp_path):
    (tmp_path / "own.conll").write_text(text)
    with pytest.raises(DataError, match=says):
        own_task(tmp_path / "own.conll")


def test_entities_need_seqeval(tmp_path, monkeypatch):
    from hf_glu.config import extras
    from hf_glu.errors import MissingPackageError

    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "seqeval" else find(name))
    with pytest.raises(MissingPackageError, match=r'scoring entities needs seqeval.*pip install "hf_glu\[metrics\]"'):
        own_task(write(tmp_path, tagged_rows(9)))
