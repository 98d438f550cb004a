"""Nobody's code and no local path go along, wherever a checkpoint goes; a vocabulary may have such words."""

import json
from pathlib import Path

import pytest
from hub_client import REPO, push_unchecked
from pico import FAMILIES

import hf_glu
from hf_glu.checkpoint.carrying import clean_json, without_code, without_paths
from hf_glu.errors import CheckpointError
from hf_glu.publishing.hub.push import push
from hf_glu.publishing.report import write_report

pytest_plugins = ("hub_client",)

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"
AUTO_MAP = {
    "AutoConfig": "modeling_evil.Config",
    "AutoModel": "someone/else--modeling_evil.Model",
    "AutoModelForSequenceClassification": "modeling_evil.Model",
}
CODE = (
    "modeling_evil.py",
    "modeling_hf_glu.py",
    "custom_generate/generate.py",
    "inner/deep/x.PY",
    "lib.so",
    "setup.sh",
    "__init__.pyc",
    "Notes.ipynb",
)
CONFIGS = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Slow", None]}, "name_or_path": "/Users/me/secret/x"},
    "processor_config.json": {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.Images"}, "size": 3}},
    "inner/preprocessor_config.json": {"auto_map": "evil.Old", "size": 3},
}


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it_ran"


@pytest.fixture
def evil(folder, marker):
    """A checkpoint with code in every place that anything looks for it."""
    for name in CODE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(EVIL.format(marker=str(marker)))
    for name, entries in {**CONFIGS, "config.json": {"auto_map": AUTO_MAP, "custom_pipelines": {"x": {}}}}.items():
        known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(known | entries))
    return folder


def assert_harmless(files, marker, *, ours=()):
    """Assert that no code is in files (name -> bytes) but ours, and that configs name no other."""
    assert not marker.exists()
    code = {name for name in files if not name.endswith((".json", ".safetensors", ".md", ".gitattributes", ".model"))}
    assert code == set(ours)
    for name, content in files.items():
        assert b"evil" not in content
        if name.endswith(".json"):
            named = json.loads(content).get("auto_map") or {}
            assert all(value.startswith("modeling_hf_glu.") for value in named.values()), name
            assert not named or ours
    assert json.loads(files["processor_config.json"]) == {"image_processor": {"size": 3}}
    assert json.loads(files["inner/preprocessor_config.json"]) == {"size": 3}


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", [False, True])
def test_a_push_carries_nobodys_code(code, hub, evil, marker):
    made = push_unchecked(evil, code=code)
    files = {name: file.data for name, file in hub.repos[REPO].files().items()}
    assert_harmless(files, marker, ours=made.code)
    assert bool(made.code) == code
    assert {*CODE, "auto_map of tokenizer_config.json", "custom_pipelines of config.json"} <= {*made.left_out}
    assert b"/Users/me" not in files["tokenizer_config.json"]


@pytest.mark.slow
def test_a_checked_push_runs_nobodys_code(hub, evil, marker):
    assert push(evil, REPO).checked == ("plugin", "remote code")
    assert not marker.exists()


def test_a_pushed_model_names_nobodys_code(hub, evil, marker, monkeypatch):
    from hf_glu.publishing.hub import push as publishing

    monkeypatch.setattr(publishing, "check_loads", lambda stage, expected, *, code: ())
    model = hf_glu.checkpoint.loading.load_model(evil)
    model.config.auto_map = {"AutoModel": "someone/else--modeling_evil.Model"}
    model.push_to_hub(REPO)
    assert "evil" not in hub.repos[REPO].files()["config.json"].data.decode()
    assert not marker.exists()


@pytest.mark.parametrize("run", [hf_glu.convert_checkpoint, hf_glu.convert_stream])
def test_a_conversion_leaves_code_behind(run, evil, marker, tmp_path):
    FAMILIES["bert"].make("BertForSequenceClassification").save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP, "custom_pipelines": {"x": {}}}))
    (evil / "model.safetensors").write_bytes((tmp_path / "stock" / "model.safetensors").read_bytes())
    run(evil, tmp_path / "out", "geglu")
    files = {name: data for name, data in read(tmp_path / "out").items() if name != "hf_glu_report.json"}
    assert_harmless(files, marker)
    assert "custom_pipelines" not in json.loads(files["config.json"])


@pytest.mark.parametrize("link", ["notes.txt", "inner", "loop"])
def test_links_that_lead_out_are_refused(link, hub, folder, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "notes.txt").write_text("mine")
    target = {"notes.txt": tmp_path / "secret" / "notes.txt", "inner": tmp_path / "secret", "loop": folder}[link]
    (folder / link).symlink_to(target)
    with pytest.raises(CheckpointError, match="is a link to"):
        push_unchecked(folder)
    FAMILIES["bert"].make().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / link).symlink_to(target if link != "loop" else tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is a link to"):
        hf_glu.convert_checkpoint(tmp_path / "dense", tmp_path / "out", "geglu")
    assert not hub.seen
    assert not (tmp_path / "out").exists()


def test_links_into_the_hubs_cache_are_inside(tmp_path):
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    FAMILIES["bert"].make().save_pretrained(snapshot)
    (snapshot / "vocab.txt").write_text("a\n")
    (tmp_path / "models--me--it" / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(tmp_path / "models--me--it" / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    hf_glu.convert_checkpoint(snapshot, tmp_path / "out", "geglu")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a\n"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


# local paths


def test_a_report_of_a_run_names_no_path(tmp_path):
    run = {
        "model": str(tmp_path / "base"),
        "task": "sst2",
        "activation": "geglu",
        "hardware": "CPU",
        "options": {"model": str(tmp_path / "base"), "output": "~/runs/x", "dataset": f"train={tmp_path}/a.csv"},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = write_report(tmp_path).read_text()
    assert "<h1>base on sst2</h1>" in page
    assert "train=a.csv" in page
    assert str(tmp_path) not in page
    assert "~/runs" not in page


RESULTS = {"metrics": {}, "main": [], "examples": {}, "training": {}}


def test_old_results_lose_their_paths_when_they_are_pushed(hub, folder):
    (folder / "results.json").write_text(json.dumps(RESULTS | {"note": f"from {folder}/x.csv", "runs": [str(folder)]}))
    (folder / "vocab.json").write_text(json.dumps({"auto_map": 3, "/Users/me/x": 4, str(folder.name): 5}))
    before = (folder / "vocab.json").read_bytes()
    push_unchecked(folder)
    files = hub.repos[REPO].files()
    assert json.loads(files["results.json"].data) == RESULTS | {"note": "from x.csv", "runs": [folder.name]}
    assert files["vocab.json"].data == before
    (folder / "notes.md").write_text(f"trained on {folder.parent}/data")
    with pytest.raises(CheckpointError, match=r"notes\.md names .*, a folder of this machine"):
        push_unchecked(folder)


PATHS = {
    "/Users/me/model": "model",
    "/Users/me/my model/": "my model",
    "see /Users/me/x, and /a/b/c.csv;": "see x, and c.csv;",
    "train=/Users/x/a.csv,val=/Users/x/b.csv": "train=a.csv,val=b.csv",
    "C:\\Users\\me\\x": "x",
    "\\\\server\\share\\x": "x",
    "at C:/Users/me/x.csv": "at x.csv",
    "~/models/x": "x",
    "file:///Users/me/x": "x",
    "https://huggingface.co/me/it": "https://huggingface.co/me/it",
    "google-bert/bert-base": "google-bert/bert-base",
    "silu(g) * u / 2": "silu(g) * u / 2",
    "\\begin{a}": "\\begin{a}",
    "</td></tr>": "</td></tr>",
    "/": "/",
}


def test_paths_become_names_and_all_else_stays():
    assert without_paths(list(PATHS)) == list(PATHS.values())
    assert without_paths({"/a/b": [("/c/d", 3)]}) == {"b": [["d", 3]]}
    assert without_code({"vocab": {"auto_map": 3}, "x": [{"auto_map": {}}]}) == {"vocab": {"auto_map": 3}, "x": [{}]}


def test_json_that_needs_nothing_or_cannot_be_read_stays_as_it_is(tmp_path):
    for content in (b'{"a":   1}', b"{", b"\xff"):
        (tmp_path / "a.json").write_bytes(content)
        assert clean_json(tmp_path / "a.json", tmp_path / "b.json") == []
        assert (tmp_path / "b.json").read_bytes() == content


@pytest.mark.parametrize("depth", [900, 5_000, 500_000])
def test_json_that_is_too_deep_to_look_through_is_refused(depth, tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"x":' * depth + b'{"auto_map": {}}' + b"}" * depth)
    with pytest.raises(CheckpointError, match="too deeply"):
        clean_json(tmp_path / "a.json", tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()
