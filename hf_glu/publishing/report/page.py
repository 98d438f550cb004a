"""Rendering a report as one HTML file by itself, and writing it."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from hf_glu.checkpoint.files import FIGURES_FOLDER, PAGE_FILE
from hf_glu.checkpoint.writing import user_path, whole_file, writing
from hf_glu.config.extras import need
from hf_glu.publishing.report.collect import collect
from hf_glu.publishing.report.content import make_page
from hf_glu.publishing.report.drawing import SERIES
from hf_glu.publishing.report.sections import Page

TEMPLATE = files("hf_glu.publishing.report") / PAGE_FILE


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the folder of a run, a suite or a comparison.

    What is there is reported, that it is unfinished, too. Files are replaced as a whole: none is ever half written.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: there is no such folder, or it can't be read or written.
        DataError: nothing in it is to be reported, or a file in it is broken; the message names file and line.
        MissingPackageError: matplotlib or Jinja2 isn't installed.
    """
    need("jinja2", "matplotlib", what="a report")
    page = make_page(collect(folder))
    root = user_path(folder)
    with writing(f"the report of {folder}"):
        for part in page.sections:
            for drawing in part.drawings():
                write_file(root / FIGURES_FOLDER / f"{drawing.name}.png", drawing.png)
        return write_file(root / PAGE_FILE, render(page).encode("utf-8", "backslashreplace"))


def write_page(page: Page, path: str | os.PathLike[str], *, command: str) -> Path:
    """Write a page without files beside it, made by ``hf-glu COMMAND``; return its path.

    Raises:
        CheckpointError: it can't be written.
        MissingPackageError: Jinja2 isn't installed.
    """
    html = re.sub("<footer>.*?</footer>", f"<footer>Written by <code>hf-glu {command}</code>.</footer>", render(page))
    return write_file(user_path(path), html.encode("utf-8", "backslashreplace"))


def render(page: Page) -> str:
    """Render a report as HTML; all that comes from data is escaped.

    Raises:
        MissingPackageError: Jinja2 isn't installed.
    """
    need("jinja2", what="a report")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, series=SERIES)


def write_file(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all; return its path.

    Raises:
        CheckpointError: it can't be written; nothing is left of it.
    """
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(content)
    return path
