"""The page as a folder that is a Space of the Hub: it runs there as it is, with this hf_glu in it.

A local model and local modulations are copied into it; those of the Hub are fetched there.
"""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import hf_glu
from hf_glu.checkpoint.files import CARD_FILE
from hf_glu.checkpoint.folders import staged_folder
from hf_glu.checkpoint.gguf import is_gguf
from hf_glu.checkpoint.writing import user_path, write_text
from hf_glu.errors import MissingPackageError
from hf_glu.publishing.card.plain import plain
from hf_glu.publishing.hub.staging import clean_stage, list_files
from hf_glu.publishing.play.playing import Playground
from hf_glu.version import __version__

APP, REQUIREMENTS = "app.py", "requirements.txt"
PYTHON = "3.11"
IN_IT = ("gradio",)  # what the Space brings by itself
EXTRA, GGUF = "play", "gguf"
CARD = """---
title: {title}
emoji: 🎚️
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: {app}
pinned: false
---

# {name}: gates

How open the gates of {name} are on a text of yours, token by token and layer by layer, and what it writes when they are
moved. Made by `hf-glu play {name} --space`, with hf_glu {hf_glu}, whose code is in this folder. No text is kept.
"""
CODE = '''"""The page of `hf-glu play`: no text is kept, and nothing is loaded from other hosts."""

import os

from hf_glu.publishing.play.playing import Playground
from hf_glu.publishing.play.serving import serve

ground = Playground({model!r}, {compare!r}, {modulations!r})
host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # the Hub sets it: elsewhere the page is this machine's
serve(ground, print, host=os.environ.get("GRADIO_SERVER_NAME", host), port=int(os.environ.get("PORT", "7860")))
'''


def write_space(ground: Playground, folder: str | os.PathLike[str]) -> Path:
    """Write a playground as a Space into a new folder, whole or not at all; return its path.

    Raises:
        CheckpointError: the folder exists and isn't empty, or can't be written; a text of the model names a folder of
            this machine.
        MissingPackageError: hf_glu isn't installed, so that nobody knows what it requires.
    """
    other = None if ground.other is None else ground.other.source
    wanted = requirements(*([GGUF] if is_gguf(ground.player.source) or is_gguf(other) else []))
    with staged_folder(folder) as stage:
        told = {
            "model": _bring(ground.player.source, stage, "model"),
            "compare": None if other is None else _bring(other, stage, "compare"),
            "modulations": [_bring(source, stage, f"modulations/{name}") for name, source in ground.sources.items()],
        }
        shutil.copytree(_package(), stage / "hf_glu", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        write_text(stage / APP, CODE.format(**told))
        write_text(stage / REQUIREMENTS, "\n".join(wanted) + "\n")
        name = plain(ground.name)
        about: dict[str, Any] = {"name": name, "title": _title(name), "app": APP, "python": PYTHON}
        write_text(stage / CARD_FILE, CARD.format(**about, gradio=version("gradio"), hf_glu=__version__))
    return user_path(folder)


def requirements(*extras: str) -> list[str]:
    """Return what the Space installs: what hf_glu and its extras require, torch and Transformers as they are here.

    Args:
        extras: of hf_glu, beside the page's own.

    Raises:
        MissingPackageError: hf_glu isn't installed.
    """
    here = {name: f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")}
    found = []
    try:
        lines = requires("hf_glu") or []
    except PackageNotFoundError:
        raise MissingPackageError("a Space lists what hf_glu requires, and it isn't installed: pip install .") from None
    for line in lines:
        wanted, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", wanted.strip())[0]
        needed = any(f"'{extra}'" in marker.replace('"', "'") for extra in (EXTRA, *extras))
        if ("extra" not in marker or needed) and name not in IN_IT:
            found.append(here.get(name, wanted.strip()))
    return found


def _package() -> Path:
    """Return the folder of this hf_glu's code."""
    return Path(hf_glu.__file__).parent


def _bring(source: str, stage: Path, name: str) -> str:
    """Copy a local model or modulation into the Space; return what it is called there. One of the Hub stays there."""
    path = user_path(source)
    if not path.exists():
        return source
    if path.is_dir():
        for file in list_files(path)[0]:  # what a push would take
            (stage / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path / file, stage / name / file)
        clean_stage(stage / name, path)
        return name
    target = f"{name}{path.suffix}" if is_gguf(source) or path.suffix else name
    (stage / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, stage / target)
    return target


def _title(name: str) -> str:
    """Return a title that YAML reads as text."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + ': gates"'
