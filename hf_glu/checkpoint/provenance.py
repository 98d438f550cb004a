"""Where a checkpoint comes from: its base model, and what that one's card says of license and language."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from hf_glu.checkpoint.files import CARD_FILE as CARD_FILE
from hf_glu.checkpoint.files import CONFIG_FILE
from hf_glu.checkpoint.files import REPORT_FILE as REPORT_FILE
from hf_glu.checkpoint.gguf import is_gguf
from hf_glu.checkpoint.hub import invalid_name, resolve
from hf_glu.checkpoint.jsonio import JsonObject, read_object, write_json
from hf_glu.checkpoint.writing import user_path

OF = "of"  # the entry of a report that says what it is of
CARRIED = ("license", "license_name", "license_link", "language")


class Naming(TypedDict):
    """A checkpoint's name, and whether a repository on the Hub is called so."""

    name: str
    repository: bool


class Carried(TypedDict, total=False):
    """The entries of a card that hold for models made from this one, too."""

    license: str
    license_name: str
    license_link: str
    language: str | list[str]


class Base(Naming, Carried):
    """The checkpoint that another one is made from, with the report of its conversion if it was converted."""

    conversion: NotRequired[JsonObject]


def base_of(source: str | os.PathLike[str], name: str | None = None) -> Base:
    """Return name, license and language of the checkpoint that others made from ``source`` have as their base.

    ``name``; ``repository``, whether that is one on the Hub; of its card ``license`` and ``language``, where it says
    them. A checkpoint that was converted, and nothing else, isn't a base: its own base is returned, with the report of
    its ``conversion``. One that was saved anew with other weights is.

    Args:
        source: local folder or Hub id.
        name: what to call it, where it is a folder.

    Raises:
        CheckpointError, DataError: it can't be found, or its report can't be read.
    """
    if is_gguf(source):
        return {"name": name or Path(source).stem, "repository": False}
    folder = resolve(source)
    base: Base = {**naming(source, name), **carried(folder)}
    report = _report(folder)
    if "promise" not in report or not is_of(report, folder):
        return base
    known = report.pop("base", {})
    named = {**base, **known, **(naming(source, name) if name else {}), "conversion": report}
    return cast(Base, named)


def naming(source: str | os.PathLike[str], name: str | None = None) -> Naming:
    """Return the ``name`` of ``source``, without the path to it, and whether it is that of a ``repository``."""
    called = name or str(source).partition("@")[0]
    local = user_path(source).is_dir()
    if invalid_name(called) or (local if name is None else "/" not in called):
        return {"name": Path(called).absolute().name, "repository": False}
    return {"name": called, "repository": True}


def carried(folder: Path) -> Carried:
    """Return license and language from the card in a folder: they hold for models made from it, too."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError):
        return {}  # a card that nobody can read says nothing
    return cast(Carried, {key: data[key] for key in CARRIED if data.get(key)})


def write_report(folder: Path, report: JsonObject) -> None:
    """Write the report of a conversion beside what it made, with the hashes of that."""
    write_json(folder / REPORT_FILE, {**report, OF: _contents(folder)})


def is_of(report: JsonObject, folder: Path) -> bool:
    """Return whether a report is of the weights and options in a folder, which may have been saved anew since."""
    return OF not in report or report[OF] == _contents(folder)


def _contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights, and of the options of ours in the config and those inside of it."""
    options = json.dumps(_options(read_object(folder / CONFIG_FILE)), sort_keys=True)
    found = {CONFIG_FILE: hashlib.sha256(options.encode()).hexdigest()}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _options(config: JsonObject) -> JsonObject:
    inner = {key: _options(value) for key, value in config.items() if isinstance(value, dict) and key != "hf_glu"}
    return {"hf_glu": config.get("hf_glu"), **{key: value for key, value in inner.items() if any(value.values())}}


def _report(folder: Path) -> JsonObject:
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    return read_object(path)
