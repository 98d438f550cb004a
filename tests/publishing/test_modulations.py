"""Modulations in folders and on the Hub: the same again, another model refused, broken ones too."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import steered
from comparing import assert_same
from hub_client import REPO
from hub_server import File
from safetensors.torch import load_file, save_file

import hf_glu
from hf_glu.errors import CheckpointError, OptionError, PublishingError

pytest_plugins = ("hub_client",)


@pytest.fixture(scope="module")
def made():
    return steered.fit(steered.make("gpt2"), slopes=True)


def same(one, other):
    for key in ("thresholds", "log_slopes", "samples"):
        assert_same(dict(getattr(one, key)), dict(getattr(other, key)), "bitwise")
        assert list(getattr(one, key)) == list(getattr(other, key))
    assert_same(one.detector.weight, other.detector.weight, "bitwise")
    assert (one.detector.bias, one.detector.place, one.detector.accuracy) == (
        other.detector.bias, other.detector.place, other.detector.accuracy,
    )  # fmt: skip
    assert (one.model, one.method, dict(one.accuracy)) == (other.model, other.method, dict(other.accuracy))
    assert repr(one) == repr(other)


def test_a_folder_holds_all_of_it(made, tmp_path):
    made.save(tmp_path / "glad")
    loaded = hf_glu.GateModulation.load(tmp_path / "glad", model=steered.make("gpt2"))
    same(loaded, made)
    with pytest.raises(OptionError, match="another model"):
        hf_glu.GateModulation.load(tmp_path / "glad", model=steered.make("gpt2", seed=1))
    with pytest.raises(CheckpointError, match="exists already"):
        made.save(tmp_path / "glad")
    total = 0.8 * loaded - made
    total.save(tmp_path / "sum")
    assert hf_glu.GateModulation.load(tmp_path / "sum").detector is None


def test_one_file_holds_all_of_it(made, tmp_path):
    made.save(tmp_path / "glad.safetensors")
    same(hf_glu.GateModulation.load(tmp_path / "glad.safetensors", model=steered.make("gpt2")), made)
    assert [path.name for path in tmp_path.iterdir()] == ["glad.safetensors"]
    with pytest.raises(CheckpointError, match="exists already"):
        made.save(tmp_path / "glad.safetensors")
    save_file({"a": made.thresholds["layers.0"]}, tmp_path / "weights.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    for name, says in (("none", "no file"), ("weights", "no entry 'modulation'"), ("broken", "can't be read")):
        with pytest.raises(CheckpointError, match=says):
            hf_glu.GateModulation.load(tmp_path / f"{name}.safetensors")


def edit(folder, change):
    about = json.loads((folder / "modulation.json").read_text())
    change(about)
    (folder / "modulation.json").write_text(json.dumps(about))


def lose_a_gate(folder):
    tensors = load_file(folder / "modulation.safetensors")
    del tensors["threshold.layers.0"]
    save_file(tensors, folder / "modulation.safetensors")


def lose_samples(folder):
    tensors = load_file(folder / "modulation.safetensors")
    save_file({name: each for name, each in tensors.items() if not name.startswith("sample.")},
              folder / "modulation.safetensors")  # fmt: skip


def put_nan(folder):
    tensors = load_file(folder / "modulation.safetensors")
    tensors["threshold.layers.0"][3] = float("nan")
    save_file(tensors, folder / "modulation.safetensors")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "modulation.json").unlink(), "no modulation"),
        (lambda folder: edit(folder, lambda about: about.update(format=9)), "format 9"),
        (lambda folder: edit(folder, lambda about: about.pop("gates")), "can't be read"),
        (lambda folder: edit(folder, lambda about: about.update(detector=3)), "can't be read"),
        (lambda folder: (folder / "modulation.safetensors").write_bytes(b"1234567890"), "can't be read"),
        (lambda folder: edit(folder, lambda about: about["detector"].update(gate="layers.7")), "broken"),
        (lose_a_gate, "broken"),
        (put_nan, "broken"),
        (lose_samples, "broken"),
    ],
)
def test_a_broken_folder_is_one_line(made, tmp_path, harm, says):
    made.save(tmp_path / "glad")
    harm(tmp_path / "glad")
    with pytest.raises(CheckpointError, match=says) as caught:
        hf_glu.GateModulation.load(tmp_path / "glad")
    assert "\n" not in str(caught.value)


def test_the_hub_gives_it_back(hub, made):
    first = made.push_to_hub(REPO, commit_message="glad")
    same(hf_glu.GateModulation.from_pretrained(REPO), made)
    files = hub.repos[REPO].files()
    assert {"README.md", "modulation.json", "modulation.safetensors"} <= set(files)
    assert f'GateModulation.load("{REPO}")' in files["README.md"].data.decode()
    odd = replace(made, method="![x](http://x.y/z.png)", model="<b>`Model`")
    odd.push_to_hub(f"{REPO}-2")
    card = hub.repos[f"{REPO}-2"].files()["README.md"].data.decode()
    assert "](" not in card
    assert "<b>" not in card
    assert "://" not in card
    (2 * made).push_to_hub(REPO)
    same(hf_glu.GateModulation.load(f"{REPO}@{first.oid}"), made)
    assert hf_glu.GateModulation.load(REPO).method == "2 * (diffmean)"
    repo = hub.repos[REPO]
    repo.add("main", repo.files() | {"README.md": File(b"# theirs", lfs=False)}, "by hand")
    made.push_to_hub(REPO)
    assert repo.files()["README.md"].data == b"# theirs"  # a card that its owner has written stays
    with pytest.raises(PublishingError, match="name"):
        made.push_to_hub("no good/name")
    with pytest.raises(CheckpointError, match="no repository"):
        hf_glu.GateModulation.load("user/nothing")
