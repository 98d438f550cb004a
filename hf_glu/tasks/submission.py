"""Writing predictions as the leaderboards want them: GLUE's .tsv, SuperGLUE's .jsonl, and a zip of them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.writing import whole_file, write_text, writing
from hf_glu.errors import DataError
from hf_glu.tasks.answers import NO_ANSWER, Answer
from hf_glu.tasks.table import SUITES, TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset


def write_predictions(task: Task, split: str, data: Dataset, answers: Sequence[Answer], folder: Path) -> Path:
    """Write the answers to a test split as the leaderboard wants them; return the file's path.

    Raises:
        DataError: the task has no leaderboard.
    """
    if not task.files:
        raise DataError(f"{task.name} has no leaderboard to write predictions for")
    path = folder / task.files[task.test.index(split)]
    spelled = [spell(task, answer) for answer in answers]
    rows = _table(spelled) if path.suffix == ".tsv" else _lines(task, data, spelled)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{row}\n" for row in rows))
    return path


def spell(task: Task, answer: Answer) -> str:
    """Return an answer as the leaderboard spells it; a class that a model didn't name is the first one."""
    assert not isinstance(answer, list)  # no leaderboard wants several classes a row
    if task.form == "regression":
        return f"{min(5.0, max(0.0, float(answer))):.3f}"  # STS-B goes from 0 to 5
    if isinstance(answer, str):
        return answer
    return (task.spelling or task.labels)[0 if answer == NO_ANSWER else int(answer)]


def _table(answers: Sequence[str]) -> list[str]:
    return ["index\tprediction", *(f"{number}\t{answer}" for number, answer in enumerate(answers))]


def _lines(task: Task, data: Dataset, answers: Sequence[str]) -> list[str]:
    if task.metric == "multirc":
        return _paragraphs(data, answers)
    indices: list[Any] = list(data["idx"]) if "idx" in data.column_names else list(range(len(answers)))
    if task.form == "entity":
        indices = [index["query"] for index in indices]
    number = task.spelling == ("0", "1")
    return [
        json.dumps({"idx": index, "label": int(answer) if number else answer}, ensure_ascii=False)
        for index, answer in zip(indices, answers, strict=True)
    ]


def _paragraphs(data: Dataset, answers: Sequence[str]) -> list[str]:
    """Return MultiRC's lines: one for each paragraph, with its questions and their answers."""
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    for idx, answer in zip(data["idx"], answers, strict=True):
        questions = paragraphs.setdefault(idx["paragraph"], {})
        questions.setdefault(idx["question"], []).append({"idx": idx["answer"], "label": int(answer)})
    return [
        json.dumps(
            {
                "idx": paragraph,
                "passage": {"questions": [{"idx": question, "answers": rows} for question, rows in questions.items()]},
            }
        )
        for paragraph, questions in paragraphs.items()
    ]


def zip_predictions(suite: str, folder: Path) -> tuple[Path, list[str]]:
    """Zip a suite's prediction files as ``folder/SUITE.zip``; return it and the names of the files that are missing."""
    names = [name for task in SUITES[suite] for name in TASKS[task].files]
    path = folder / f"{suite}.zip"
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            if (folder / name).is_file():
                archive.write(folder / name, name)
    return path, [name for name in names if not (folder / name).is_file()]
