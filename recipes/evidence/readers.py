"""Reading what packages hold: texts with a class, words with parts of speech, and plain text by its domain."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_glu.errors import DataError

Row = dict[str, Any]
BROWN_FILE = re.compile(r"(?:.*/)?(c[a-r]\d\d)")
_CHOICES = re.compile(r"(?P<question>.*?)\s*\n+ *A: (?P<choice1>.*?)\n+ *B: (?P<choice2>.*)", re.DOTALL)
# a Brown tag without its suffixes (of titles, headlines, cited words) -> the universal part of speech; the mapping is
# ours, and isn't the published one (https://arxiv.org/abs/1104.2086)
_UNIVERSAL = {
    "ADJ": "jj jjr jjs jjt ap od", "ADP": "in", "ADV": "rb rbr rbt rn ql qlp wrb wql nr nrs *", "CONJ": "cc cs",
    "DET": "at dt dti dts dtx abl abn abx wdt", "NOUN": "nn nns np nps", "NUM": "cd",
    "PRON": "pn pp pp$ pp$$ ppl ppls ppo pps ppss wp wp$ wpo wps ex", "PRT": "rp to",
    "VERB": "vb vbd vbg vbn vbz md be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz",
    "X": "uh nil",
}  # fmt: skip
UNIVERSAL = {tag: part for part, tags in _UNIVERSAL.items() for tag in tags.split()}
# what stood together before the words were told apart
_JOINED = re.compile(r" (?=[,.;:?!)'])|(?<=\() ")


def members(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a wheel, or of a gzipped tar archive, whose paths are ``wanted``, in the order of the paths.

    Raises:
        DataError: it has none.
    """
    if package.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(package) as archive:
            found = {name: archive.read(name) for name in archive.namelist() if wanted(name)}
    else:
        with tarfile.open(package) as tar:
            found = {each.name: tar.extractfile(each).read() for each in tar if each.isfile() and wanted(each.name)}  # type: ignore[union-attr]
    if not found:
        raise DataError(f"{package.name} has no such file as is looked for: is it another version?")
    yield from sorted(found.items())


def read_table(data: bytes) -> list[dict[str, str]]:
    """Read a table of Orange: names of columns, their types, their roles, then rows."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(data.decode("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE)
    names = next(rows)
    next(rows), next(rows)
    return [dict(zip(names, row, strict=False)) for row in rows if len(row) == len(names)]


def classed(data: bytes) -> list[Row]:
    """Read a table of documents with a class, without rows that lack one of the two."""
    rows = ({"text": row["Text"].strip(), "label": row["Category"].strip()} for row in read_table(data))
    return [row for row in rows if row["text"] and row["label"]]


def quotes(data: bytes) -> list[str]:
    """Read the lines of each scene of the series, joined."""
    scenes: dict[str, list[str]] = {}
    for row in read_table(data):
        line = f"{row['Author'].strip()}: {row['Quote'].strip()}"
        scenes.setdefault(row["Season & Episode"], []).append(line)
    return ["\n".join(lines[at : at + 40]) for lines in scenes.values() for at in range(0, len(lines), 40)]


def universal(tag: str) -> str:
    """Return the universal part of speech of a Brown tag, such as ``np-tl``, ``nn$`` or ``do*``."""
    plain = tag.removeprefix("fw-").split("-")[0].split("+")[0]
    if plain in UNIVERSAL:
        return UNIVERSAL[plain]
    plain = plain.rstrip("*").rstrip("$") or plain
    return UNIVERSAL.get(plain, "X" if plain[:1].isalpha() else ".")


def tagged(data: bytes) -> list[Row]:
    """Read the sentences of one of Brown's files, ``word/tag word/tag``, as words with universal parts of speech."""
    found = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        pairs = [each.rpartition("/") for each in line.split()]
        pairs = [(word, tag) for word, _, tag in pairs if word and tag]
        if pairs:
            found.append({"tokens": [word for word, _ in pairs], "label": [universal(tag) for _, tag in pairs]})
    return found


def running_text(sentences: list[Row]) -> str:
    """Return Brown's sentences as text."""
    lines = (" ".join(row["tokens"]).replace("`` ", '"').replace(" ''", '"') for row in sentences)
    return "\n".join(_JOINED.sub("", line) for line in lines)


def headlines(data: bytes) -> list[Row]:
    """Read headlines that a model was asked to call sarcastic (1) or not (0)."""
    names = {"0": "sincere", "1": "sarcastic"}
    return [{"text": text, "label": names[ideal]} for text, ideal in _asked(data)]


def quartz(data: bytes) -> list[Row]:
    """Read questions with two answers, A and B."""
    found = []
    for text, ideal in _asked(data):
        if match := _CHOICES.fullmatch(text):
            found.append({**match.groupdict(), "label": {"A": "choice1", "B": "choice2"}[ideal]})
    return found


def answers(row: Row) -> str:
    """Return the two answers of a question in any order: those of its twin, whose question says the opposite."""
    found = (row[name].lower().strip(" .?!") for name in ("choice1", "choice2"))
    return "\n".join(sorted(found))


def _asked(data: bytes) -> Iterator[tuple[str, str]]:
    for line in data.decode("utf-8").splitlines():
        row = json.loads(line)
        yield row["input"][-1]["content"].strip(), row["ideal"].strip()
