"""Pushes and downloads that the Hub refuses, or the network breaks: one clear line, and nothing is half there."""

import json
import time

import huggingface_hub
import pytest
import torch
from hub_client import REPO, contents, logits, push_unchecked
from hub_server import READER, STRANGER, File
from huggingface_hub import HfApi, constants

from hf_glu.checkpoint.hub import reachable, resolve
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import CheckpointError, HfGluError, PublishingError
from hf_glu.publishing.hub import upload

pytest_plugins = ("hub_client",)


REFUSED = {
    "name": ({"repo_id": "user/not good"}, "can't be a repository's name"),
    "too deep": ({"repo_id": "a/b/c"}, "can't be a repository's name"),
    "unknown token": ({"token": "hf_nobody"}, "doesn't accept the token"),
    "reader": ({"token": READER}, "may not write to user/gated"),
    "stranger": ({"token": STRANGER}, "may not write to user/gated"),
    "another's name": ({"repo_id": "someone/gated"}, "may not write to someone/gated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses(case, hub, folder, change):
    push_unchecked(folder)
    before = dict(hub.repos[REPO].branches)
    options, words = REFUSED[case]
    change()
    with pytest.raises(PublishingError, match=words) as raised:
        push_unchecked(folder, **options)
    assert "\n" not in str(raised.value)
    assert hub.repos[REPO].branches == before
    assert set(hub.repos) == {REPO}


def test_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishingError, match="there is no token"):
        push_unchecked(folder)
    assert not hub.seen


def test_no_network(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishingError, match="HF_HUB_OFFLINE is set: nothing was pushed"):
        push_unchecked(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(PublishingError, match=r"the Hub \(http://127.0.0.1:9\) can't be reached"):
        push_unchecked(folder)
    assert time.perf_counter() - start < 4
    assert not hub.seen


def write(folder, name, data=b"x"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def broken(**entries):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | entries)
    )


NO_CHECKPOINT = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "unreadable config": (lambda folder: write(folder, "config.json", b"{"), "config.json can't be read"),
    "our entry": (broken(hf_glu={"wdth": 3}), "did you mean 'width'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "pickle": (lambda folder: write(folder, "pytorch_model.bin"), "pytorch_model.bin isn't safetensors"),
    "pickle below": (lambda folder: write(folder, "head/a.pt"), "a.pt isn't safetensors"),
    "not what it says": (lambda folder: write(folder, "model.safetensors"), "isn't a whole safetensors file"),
    "cut short": (
        lambda folder: write(folder, "model.safetensors", (folder / "model.safetensors").read_bytes()[:-9]),
        "isn't a whole safetensors file",
    ),
}


@pytest.mark.parametrize("case", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_refused_before_the_network(case, hub, folder):
    spoil, words = NO_CHECKPOINT[case]
    spoil(folder)
    with pytest.raises(HfGluError, match=words) as raised:
        push_unchecked(folder)
    assert "\n" not in str(raised.value)
    assert not hub.seen


def test_a_missing_shard(hub, folder, tmp_path):
    load_model(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        push_unchecked(tmp_path / "sharded")


def test_what_isnt_the_models_stays_here(hub, folder):
    for name in ("training_args.bin", "optimizer.pt", ".env", "log.jsonl", "checkpoint-5/optimizer.bin", "1_Pooling/a"):
        write(folder, name, b"{}")
    made = push_unchecked(folder)
    assert set(made.left_out) == {"training_args.bin", "optimizer.pt", ".env", "log.jsonl", "checkpoint-5"}
    assert "1_Pooling/a" in hub.repos[REPO].files()
    assert not set(made.left_out) & set(hub.repos[REPO].files())


def test_an_upload_that_is_cut_is_tried_again(hub, folder, waits):
    hub.cut("put", times=3, after=1000)
    hub.fail("preupload", 2)
    push_unchecked(folder)
    assert hub.seen["put"] == 4
    assert len(waits) == 5
    assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))


def test_an_upload_that_is_always_cut_leaves_the_repository_as_it_was(hub, folder, waits, change):
    first = push_unchecked(folder)
    old = logits(load_model(folder))
    change()
    before = contents(folder)
    hub.cut("put", times=10_000, after=1000)
    with pytest.raises(PublishingError, match="the connection to the Hub broke") as raised:
        push_unchecked(folder)
    assert "\n" not in str(raised.value)
    assert hub.seen["put"] == 1 + 3 * 6  # ours times the client's own
    assert sum(waits) < 120
    assert hub.repos[REPO].branches == {"main": first.commit}
    assert torch.equal(logits(load_model(REPO)), old)
    assert contents(folder) == before
    hub.cut("put", times=0, after=0)
    push_unchecked(folder)
    assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, folder, waits):
    hub.lose("commit")
    made = push_unchecked(folder)
    assert hub.seen["commit"] == 1  # the second try finds all there
    assert len(hub.repos[REPO].commits) == 2
    assert made.commit == hub.repos[REPO].branches["main"]
    assert waits == [upload.WAITS[0]]


@pytest.mark.parametrize("kind", ["whoami", "create", "info", "batch", "commit"])
def test_a_busy_hub_is_asked_again_and_then_no_more(kind, hub, folder, waits, change):
    hub.fail(kind, 2)
    push_unchecked(folder)
    hub.fail(kind, 10_000)
    change()
    commits = dict(hub.repos[REPO].branches)
    with pytest.raises(PublishingError, match="503"):
        push_unchecked(folder)
    assert hub.repos[REPO].branches == commits


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, folder, monkeypatch, change):
    push_unchecked(folder)
    repo = hub.repos[REPO]
    change()
    plain = HfApi.preupload_lfs_files

    def interrupted(*args, **kwargs):
        plain(*args, **kwargs)
        repo.add("main", repo.files() | {"note.txt": File(b"theirs", lfs=False)}, "theirs")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupted)
    with pytest.raises(PublishingError, match="changed by somebody else"):
        push_unchecked(folder)
    assert repo.titles[-1] == "theirs"


def test_an_interruption_leaves_the_repository_as_it_was(hub, folder, monkeypatch, change):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    push_unchecked(folder)
    before = dict(hub.repos[REPO].branches)
    change()
    monkeypatch.setattr(huggingface_hub._commit_api, "lfs_upload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push_unchecked(folder)
    assert hub.repos[REPO].branches == before


# what is read


def test_downloads_go_on_where_they_broke_off(hub, folder):
    push_unchecked(folder)
    hub.cut("resolve", times=2, after=500)
    assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))


def test_errors_of_reading(hub, folder, monkeypatch):
    push_unchecked(folder)
    for source, words in {
        "user/nothing": "no repository user/nothing",
        f"{REPO}@nowhere": "no branch, tag or commit 'nowhere'",
        "user/a--b": "no repository can have that name",
        "./nowhere": "there is no folder",
        str(folder / "config.json"): "is a file",
    }.items():
        with pytest.raises(CheckpointError, match=words) as raised:
            resolve(source)
        assert "\n" not in str(raised.value)
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(CheckpointError, match="is gated"):
        resolve(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(CheckpointError, match="doesn't accept the token"):
        resolve(REPO)


def test_reachable_through_a_proxy(hub, monkeypatch):
    assert reachable()
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert not reachable()
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert reachable()
