"""What makes the site of the pages: documents outside of docs/, notebooks, generated references, and its own checks.

mkdocs calls the functions whose names begin with ``on_``.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from command_reference import reference

ROOT = Path(__file__).resolve().parents[2]

# documents that stay where they are looked for in a repository: their page on the site
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "COVERAGE.md": "results/coverage.md",
    "SECURITY.md": "security.md",
    "model_cards/README.md": "results/cards.md",
    "recipes/README.md": "results/recipes.md",
    "recipes/SCALE.md": "results/scale.md",
}
SOURCES = {page: source for source, page in OUTSIDE.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]*)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^ *```.*?^ *```$)", flags=re.DOTALL | re.MULTILINE)
# what a browser fetches by itself; an <a> is followed by a reader
FETCHED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href|srcset)=[\"']?(?:https?:)?//[^\s\"'>]+")
FETCHED_BY_STYLE = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//[^\s\"')]+")


def notebooks() -> dict[str, Path]:
    """Return the notebooks, by their pages on the site."""
    folder = ROOT / "docs" / "notebooks"
    return {f"notebooks/{path.stem}.md": path for path in sorted(folder.glob("*.ipynb"))}


def as_page(notebook: Path) -> str:
    """Return a notebook as Markdown: its text, its code in fenced blocks, and in the end a link to its file."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    text = [part if kind == "markdown" else f"```python\n{part}\n```" for kind, part in parts]
    return "\n\n".join([*text, f"[This page as a notebook]({notebook.name})"]) + "\n"


def activations() -> str:
    """Return the table of activations."""
    import hf_glu

    return hf_glu.activations().markdown()


# what stands in a page for what is made when the site is built
GENERATED = {"<!-- commands -->": reference, "<!-- activations -->": activations}


def relinked(text: str, page: str) -> str:
    """Return a page whose links lead to pages of the site; a link to a file that is no page becomes its words.

    A link to a notebook leads to its page, but for that page's own.

    Args:
        text: Markdown, whose links are those of the repository.
        page: its path on the site.
    """
    source = SOURCES.get(page, f"docs/{page}")

    def changed(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if path.endswith(".ipynb") and page not in notebooks():
            path = f"{path.removesuffix('.ipynb')}.md"
        if path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif path in OUTSIDE:
            there = OUTSIDE[path]
        else:
            return words if (ROOT / path).exists() else match.group()
        return f"{picture}[{words}]({os.path.relpath(there, os.path.dirname(page) or '.')}{anchor or ''})"

    parts = FENCED.split(text)
    return "".join(part if i % 2 else LINK.sub(changed, part) for i, part in enumerate(parts))


def undocumented(pages: str) -> list[str]:
    """Return the public names that no page documents, or that have no docstring: those of hf_glu, and its sections."""
    import hf_glu
    from hf_glu.activation import registry

    found = {name.partition("::: ")[2] for name in pages.split("\n") if name.startswith("::: ")}
    named = {f"hf_glu.{name}": getattr(hf_glu, name) for name in hf_glu.__all__ if name != "__version__"}
    sections = [kind.section for kind in registry.sections.values() if kind.section]
    named |= {f"{each.__module__}.{each.__qualname__}": each for each in sections}
    return sorted(name for name, value in named.items() if name not in found or not value.__doc__)


def fetched(site: Path) -> list[str]:
    """Return what the pages and styles of a built site would fetch from other hosts."""
    return [
        f"{path.relative_to(site)}: {match.group()}"
        for suffix, pattern in ((".html", FETCHED), (".css", FETCHED_BY_STYLE))
        for path in sorted(site.rglob(f"*{suffix}"))
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]


def on_pre_build(config: Any) -> None:
    """Refuse to build a site that leaves a public name out."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    if missing := undocumented("\n".join(pages)):
        raise _failed(f"not documented under docs/reference: {', '.join(missing)}")


def on_files(files: Any, config: Any) -> Any:
    """Add the documents that lie outside of docs/, and the notebooks as pages."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, notebook in notebooks().items():
        files.append(File.generated(config, page, content=as_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page with links that work on the site, and with what is generated."""
    text = relinked(markdown, page.file.src_uri)
    for place, made in GENERATED.items():
        text = text.replace(place, made()) if place in text else text
    return text


def on_post_build(config: Any) -> None:
    """Refuse a site that needs another host."""
    if found := fetched(Path(config["site_dir"])):
        raise _failed(f"fetched from other hosts: {', '.join(found[:5])}")


def _failed(message: str) -> Exception:
    from mkdocs.exceptions import PluginError

    return PluginError(message)
