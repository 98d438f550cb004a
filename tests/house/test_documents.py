"""What the documents say is there: files, links, versions; and the source distribution has them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import building
import pytest

import hf_glu

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *building.notebooks().values(),
]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:hf_glu|tests|docs)/[\w/.-]+)`")
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def missing(document: Path, text: str) -> list[str]:
    """Return the links and paths of a document that lead nowhere."""
    links = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    return links + [path for path in PATH.findall(text) if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path):
    notebook = document.suffix == ".ipynb"
    assert not missing(document, building.as_page(document) if notebook else document.read_text(encoding="utf-8"))


def test_the_check_of_links_can_fail():
    text = "[a](CHANGELOG.md) [b](https://example.org) [c](nowhere.md) [d](gone.md#x)"
    text += " `hf_glu/nowhere.py` `hf_glu/errors.py`"
    assert missing(ROOT / "README.md", text) == ["nowhere.md", "gone.md", "hf_glu/nowhere.py"]


def test_the_readme_links_to_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff", "docs/architecture.md"):
        assert f"({name})" in text


def test_the_changelog_has_versions_with_dates_and_known_headings():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *versions = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert first == "[Unreleased]"
    assert versions
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions)
    assert set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE)) <= set(KINDS)


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {hf_glu.__version__}\n" in text


def test_the_source_distribution_has_what_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name.lstrip("/")).exists() for name in included)
    assert {f"/{path.relative_to(ROOT).parts[0]}" for path in DOCUMENTS} <= set(included)


def test_pre_commit_runs_the_tools_of_make_quality():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    quality = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nquality:")[1].split("\n\n")[0]
    for tool in re.findall(r"\$\(BIN\)/(\w+)(?: (?:check|format))?", quality):
        assert re.search(rf"entry: {tool}\b", hooks), tool
