"""Folders of synthetic runs, and their reports read back from the HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import torch

from hf_glu.publishing.report import write_report

VOID = {"meta", "br", "link", "img"}


EVIL = '<script>alert("1")</script> & $x$'


class Reader(HTMLParser):
    """Reads a page: its tables by caption, its ids, tags, alt texts and text; fails where tags aren't nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.alts, self.tables = [], [], [], [], {}
        self.references, self.text = [], ""
        self.caption = None
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.references += [value for key, value in attrs.items() if key in ("src", "href", "srcset", "action")]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.alts += [attrs.get("aria-label")] if attrs.get("role") == "img" else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        elif tag == "tr":
            self.tables[self.caption].append([])
        elif tag in ("td", "th"):
            self.tables[self.caption][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables[self.caption] = []

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] == ["caption"]:
            self.caption += data
        elif {"td", "th"} & set(self.open):
            self.tables[self.caption][-1][-1] += data

    def row(self, caption, first):
        """Return a row of a table as a mapping from its columns."""
        columns, *rows = self.tables[caption]
        return dict(zip(columns, next(row for row in rows if row[0] == first), strict=True))


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.rglob(".*partial*"))
    html = path.read_text(encoding="utf-8")
    page = Reader(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", html))
    pictures = sorted((folder / "figures").glob("*.png")) if (folder / "figures").is_dir() else []
    assert len(pictures) == page.tags.count("svg") == len(page.alts)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert all(page.alts)
    assert "None" not in page.text
    page.html, page.pictures = html, [picture.name for picture in pictures]
    return page


def site_row(layer, stack, **more):
    row = {"site": f"{stack}.layer.{layer}", "layer": layer, "stack": stack, "activation": "geglu", "width": 40}
    shares = {"open": 0.25 + layer / 100, "sparsity": 0.0123, "dead": 0.0}
    return {**row, **shares, "gate_mean": -0.5, "gate_std": 0.75, **more}


def conversion():
    step = {"from": "gelu", "to": "geglu", "route": "up = 1", "promise": "exact", "note": "", "relative_error": 2.5e-7}
    step |= {"width_before": 40, "width_after": 40, "parameters_before": 1336, "parameters_after": 1976, "fit": None}
    costs = {"parameters_before": 4000, "parameters_after": 5000, "ffn_parameters_before": 1336}
    costs |= {"ffn_parameters_after": 1976, "max_abs_difference": 3e-7}
    return {"target": "geglu", "promise": "exact", **costs, "sites": [{"site": "encoder.layer.0", **step}]}


def write_run(folder, *, finished=True, model="pico", task="mrpc", score=0.9, stacks=("encoder",), **more):
    folder.mkdir(parents=True)
    about = {"model": model, "task": task, "activation": "geglu", "options": {"seed": 3, "lr": 2e-5}}
    about |= {"parameters": {"total": 5000, "trainable": 5000, "before": 4000}, "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps({**about, "hardware": "CPU"}))
    lines = [{"step": s, "epoch": s / 20, "loss": 1 / s, "lr": 1e-5, "tokens_per_second": 1234.5} for s in range(1, 41)]
    for step, value in ((20, 0.7125), (40, score)):
        found = {"accuracy": value, "f1": value, "loss": 0.5}
        lines.append({"step": step, "epoch": step / 20, "evaluation": found, "score": value})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "task": task, "score": score, "metrics": {"accuracy": score - 0.01, "f1": score + 0.01, "loss": 0.4321},
        "before": {"accuracy": 0.3, "f1": 0.5, "loss": 0.7}, "examples": {"train": 3668, "validation": 408},
        "parameters": 5000, "main": ["accuracy", "f1"], "conversion": conversion(),
        "training": {"steps": 40, "seconds": 125.4, "loss": 0.1234, "tokens_per_second": 1234.5},
        "activations": [site_row(layer, stack) for stack in stacks for layer in range(2)], **more,
    }  # fmt: skip
    if finished:
        (folder / "results.json").write_text(json.dumps(results))
    return results


def contrast(first, second):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


IDS = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(1))


MASK = (torch.arange(9) < torch.tensor([[9], [4], [7], [1]])).long()
