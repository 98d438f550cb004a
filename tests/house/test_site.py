"""The site of the documentation: every page has a place, every public name a page, no host is asked."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import building
import pytest
import yaml
from command_reference import commands, escaped, flags, reference

from hf_glu.activation import registry
from hf_glu.config.glu import KEYS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES |= {page: building.as_page(path) for page, path in building.notebooks().items()}


def placed(entry) -> list[str]:
    """Return the pages below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in placed(each)]


def configuration() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_has_one_place():
    pages = placed(configuration()["nav"])
    assert len(pages) == len({*pages})
    assert {*pages} == {*PAGES, *building.OUTSIDE.values()}
    assert all((ROOT / source).is_file() for source in building.OUTSIDE)


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_first_what_they_are_for(page):
    title, first = PAGES[page].split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert len(first) > 30
    assert not first.startswith(("#", "|", "```", ":::")), first


def test_every_public_name_is_documented():
    pages = "\n".join(PAGES.values())
    assert not building.undocumented(pages)
    assert building.undocumented(pages.replace("::: hf_glu.revert\n", "")) == ["hf_glu.revert"]
    for name in ("functional", "metrics", "tasks"):
        assert f"hf_glu.{name}" in PAGES["reference/api/plugin.md"]


def test_what_is_generated_has_a_place():
    for place, made in building.GENERATED.items():
        assert sum(place in text for text in PAGES.values()) == 1
        assert "\n|---|" in made()


def test_every_entry_of_the_config_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["reference/config.md"], flags=re.MULTILINE)
    assert {*rows} | {"version"} == KEYS | registry.sections.keys()


def test_the_reference_has_every_command_and_flag():
    text = reference()
    parts = dict(re.findall(r"^## `hf-glu (\S+)`\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE))
    assert parts.keys() == commands().keys()
    assert len(parts) > 15
    for name, command in commands().items():
        found = {*re.findall(r"(?<![\w-])--?[a-z][\w-]*", parts[name])}
        assert flags(command) - {"--help", "-h"} <= found, name


@pytest.mark.parametrize(
    ("text", "shown"), [("a*b|c", r"a\*b\|c"), ("`a*b` <x>", r"`a*b` \<x\>"), ("`a|b`", r"`a\|b`")]
)
def test_help_is_shown_as_it_is(text, shown):
    assert escaped(text) == shown


@pytest.mark.parametrize(
    ("page", "text", "there"),
    [
        ("guides/convert.md", "[a](../../COVERAGE.md)", "[a](../results/coverage.md)"),
        ("guides/convert.md", "[a](../concepts/state.md#x)", "[a](../concepts/state.md#x)"),
        ("guides/convert.md", "[a](../../LICENSE)", "a"),
        ("guides/convert.md", "[`a`](../../nowhere.md)", "[`a`](../../nowhere.md)"),
        ("contributing/index.md", "[a](docs/architecture.md)", "[a](../architecture.md)"),
        ("contributing/index.md", "[a](https://example.org) `f(x)`", "[a](https://example.org) `f(x)`"),
        ("results/recipes.md", "[a](SCALE.md)", "[a](scale.md)"),
        ("notebooks/index.md", "[a](steering.ipynb)", "[a](steering.md)"),
        ("notebooks/steering.md", "[a](steering.ipynb)", "[a](steering.ipynb)"),
        ("index.md", "```\n[a](../COVERAGE.md)\n```", "```\n[a](../COVERAGE.md)\n```"),
    ],
)
def test_links_lead_to_the_sites_pages(page, text, there):
    assert building.relinked(text, page) == there


def test_what_comes_from_other_hosts_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://x.org">x</a><script src="b.js"></script><img src="i.svg">')
    (tmp_path / "a.css").write_text("a{background:url(data:image/svg+xml;x)}")
    assert not building.fetched(tmp_path)
    (tmp_path / "a.html").write_text('<link rel="stylesheet" href="https://fonts.org/a.css"><script src=//x.org/b.js>')
    (tmp_path / "a.css").write_text("@import 'https://x.org/c.css'; b{src:url(//x.org/d.woff)}")
    assert len(building.fetched(tmp_path)) == 4


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="the extra docs isn't installed")
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert (tmp_path / "site" / "index.html").is_file()
