"""What the tests of pushing share: huggingface_hub's own client, over real HTTP, pointed at a Hub on loopback.

In this process only the client's settings are changed: its endpoint, its cache, offline mode and Xet (a protocol of its
own, which needs servers beside the Hub) off, and the seconds it waits before trying again. Requests, retries, uploads
and downloads are its own code, over sockets. Tests with processes set the same by environment variables.

Test files name it in ``pytest_plugins``, for its fixtures, and import from it (hence PYTEST_DONT_REWRITE).
"""

import functools
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hub_server import OWNER, Hub
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http, close_session
from pico import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_glu
from hf_glu.instruments.probe import run
from hf_glu.publishing.hub import flat, upload
from hf_glu.publishing.hub.push import push

REPO = "user/gated"
IDS = torch.arange(5, 17).unsqueeze(0)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client and we would have waited."""
    passed = []
    for module in (_http, file_download, upload):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=passed.append, time=time.time))
    return passed


def point_client_at(url, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # which Transformers up to 5.6 asks
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # older ones have none
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


FLAT_CODE = functools.cache(flat.flat_code)  # the real one, made once


@pytest.fixture
def hub(tmp_path, monkeypatch, waits):
    with Hub() as server:
        point_client_at(server.url, tmp_path, monkeypatch)
        monkeypatch.setattr(flat, "flat_code", FLAT_CODE)
        yield server
        close_session()


def save_tokenizer(folder):
    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 5, "the": 6, "film": 7}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def make_model(to="geglu", seed=0):
    model = FAMILIES["bert"].make("BertForSequenceClassification", seed=seed)
    hf_glu.convert(model, to)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, and the weights and config of another one."""
    folders = tmp_path_factory.mktemp("models")
    make_model().save_pretrained(folders / "first")
    save_tokenizer(folders / "first")
    make_model("swiglu", seed=1).save_pretrained(folders / "second")
    return folders


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made / "first", tmp_path / "model"))


@pytest.fixture
def change(made, folder):
    """Make another model of the one in the folder."""
    return lambda: shutil.copytree(made / "second", folder, dirs_exist_ok=True)


def logits(model):
    return run(model, {"input_ids": IDS})["logits"]


def contents(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def push_unchecked(source, repo_id=REPO, **options):
    return push(source, repo_id, **{"check": False, "code": False, **options})


def environment(hub, tmp_path, **more):
    """The same settings as `point_client_at` makes, for a process: read when huggingface_hub is imported."""
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return kept | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": OWNER,
        "NO_PROXY": "127.0.0.1", **more,
    }  # fmt: skip
