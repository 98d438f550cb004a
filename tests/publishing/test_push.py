"""Publishing: one commit with all that loads it again, by command, by function and by ``model.push_to_hub``."""

import importlib
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from hub_client import REPO, contents, environment, logits, make_model, point_client_at, push_unchecked
from hub_server import OWNER, STRANGER, File, Hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import close_session
from pico import FAMILIES
from safetensors.torch import load_file
from source import FILES, LEVEL, room_of

import hf_glu
from hf_glu.checkpoint.files import MANIFEST_FILE
from hf_glu.checkpoint.hub import resolve
from hf_glu.checkpoint.loading import load_model
from hf_glu.errors import CheckpointError, OptionError, PublishingError
from hf_glu.instruments.probe import run
from hf_glu.plugin import pushing
from hf_glu.plugin.modulations import LOADER
from hf_glu.plugin.patching import Patches
from hf_glu.plugin.pushing import PUBLISHER
from hf_glu.publishing.card.card import write_card
from hf_glu.publishing.hub import flat
from hf_glu.publishing.hub.checking import check_loads, expected_outputs
from hf_glu.publishing.hub.push import Published, push

pytest_plugins = ("hub_client",)


def test_a_push_is_one_commit_with_weights_config_tokenizer_card_and_code(hub, folder):
    before = contents(folder)
    made = push_unchecked(folder, code=True)
    repo = hub.repos[REPO]
    assert isinstance(made, Published)
    assert repo.titles == ["initial commit", "Push with hf_glu"]
    assert made.commit == repo.branches["main"]
    assert made.url == f"{hub.url}/{REPO}"
    files = repo.files()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", MANIFEST_FILE} <= set(files)
    assert {name: len(files[name].data) for name in made.files} == made.files
    assert files["model.safetensors"].lfs
    assert not files["config.json"].lfs
    assert files["model.safetensors"].data == (folder / "model.safetensors").read_bytes()
    auto_map = json.loads(files["config.json"].data)["auto_map"]
    assert {f"{name.split('.')[0]}.py" for name in auto_map.values()} <= set(made.code) <= set(files)
    assert REPO in files["README.md"].data.decode()
    assert contents(folder) == before


def test_it_loads_by_its_id(hub, folder):
    push_unchecked(folder, code=True)
    expected = logits(load_model(folder))
    snapshot = snapshot_download(REPO)
    for source in (REPO, snapshot):
        for options in ({}, {"trust_remote_code": True}):  # the plugin wins
            loaded = transformers.AutoModelForSequenceClassification.from_pretrained(source, **options)
            assert type(loaded) is transformers.BertForSequenceClassification
            assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load_model(REPO)), expected)
    assert transformers.AutoTokenizer.from_pretrained(REPO)("the film")["input_ids"] == [6, 7]
    assert [found.id for found in HfApi().list_models(author="user")] == [REPO]


def test_a_second_push_is_a_new_commit_and_the_old_one_still_loads(hub, folder, tmp_path, change):
    first = push_unchecked(folder)
    old = logits(load_model(folder))
    change()
    second = push_unchecked(folder, message="better")
    assert first.commit != second.commit
    assert hub.repos[REPO].titles[-1] == "better"
    assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))
    assert not torch.equal(logits(load_model(REPO)), old)
    assert torch.equal(logits(load_model(f"{REPO}@{first.commit}")), old)
    by_revision = transformers.AutoModelForSequenceClassification.from_pretrained(REPO, revision=first.commit)
    assert torch.equal(logits(by_revision), old)
    assert resolve(REPO, revision=first.commit).name == first.commit
    push_unchecked(f"{REPO}@{first.commit}")  # back
    assert torch.equal(logits(load_model(REPO)), old)
    assert hub.repos[REPO].files() == hub.repos[REPO].commits[first.commit]


def test_the_same_again_is_no_commit(hub, folder):
    first, second = push_unchecked(folder), push_unchecked(folder)
    assert first.commit == second.commit
    assert len(hub.repos[REPO].commits) == 2


def test_what_an_earlier_push_has_left_goes_in_the_same_commit(hub, folder, tmp_path):
    model = load_model(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    push_unchecked(tmp_path / "sharded", code=True)
    sharded = set(hub.repos[REPO].files())
    assert "model.safetensors.index.json" in sharded
    assert torch.equal(logits(load_model(REPO)), logits(model))
    repo = hub.repos[REPO]
    repo.add("main", repo.files() | {"handler.py": File(b"theirs", lfs=False)}, "by hand")
    push_unchecked(folder)
    after = repo.files()
    assert "model.safetensors" in after
    assert not [name for name in after if "-of-" in name or name.endswith(("index.json", "_hf_glu.py"))]
    assert {name for name in after if name.endswith(".py")} == {"handler.py"}
    assert "auto_map" not in json.loads(after["config.json"].data)
    assert len(repo.commits) == 4
    assert torch.equal(logits(load_model(REPO)), logits(model))


def test_weights_of_a_stock_push_do_not_shadow_ours(hub, folder, tmp_path):
    FAMILIES["bert"].make("BertForSequenceClassification", seed=3).push_to_hub(REPO)
    load_model(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    push_unchecked(tmp_path / "sharded")
    assert "model.safetensors" not in hub.repos[REPO].files()
    assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))


def test_a_card_that_its_owner_has_written_stays(hub, folder, change):
    push_unchecked(folder)
    repo = hub.repos[REPO]
    made = repo.files()["README.md"]
    push_unchecked(folder, message="again")
    repo.add("main", repo.files() | {"README.md": File(b"mine", lfs=False)}, "by hand")
    change()
    push_unchecked(folder)
    assert repo.files()["README.md"].data == b"mine"
    (folder / "README.md").write_text("from the folder")
    push_unchecked(folder)
    assert repo.files()["README.md"].data == b"from the folder"
    assert made.data.startswith(b"---")


def test_a_card_that_was_made_is_made_anew(hub, folder):
    write_card(folder)
    assert f'from_pretrained("{REPO}")' in push_and_read_card(hub, folder)
    assert push_and_read_card(hub, folder, tags=["reviews"]).count("reviews") == 1
    assert "reviews" not in push_and_read_card(hub, folder)


def push_and_read_card(hub, folder, **options):
    push_unchecked(folder, **options)
    return hub.repos[REPO].files()["README.md"].data.decode()


def test_a_branch(hub, folder, change):
    push_unchecked(folder, repo_id="user/other")
    push_unchecked(folder)
    main = hub.repos[REPO].branches["main"]
    change()
    for _ in range(2):  # made, then there
        made = push_unchecked(folder, revision="ex/periment")
    assert hub.repos[REPO].branches == {"main": main, "ex/periment": made.commit}
    assert made.revision == "ex/periment"
    assert torch.equal(logits(load_model(f"{REPO}@ex/periment")), logits(load_model(folder)))
    with pytest.raises(OptionError, match="is a commit"):
        push_unchecked(folder, revision=main)


def test_a_private_repository(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push_unchecked(folder, private=True, token=OWNER)
    assert hub.repos[REPO].private
    with pytest.raises(CheckpointError, match="or it is private"):
        resolve(REPO)
    with pytest.raises(OSError, match="not a valid model identifier"):
        transformers.AutoModel.from_pretrained(REPO)
    assert HfApi(token=OWNER).model_info(REPO).private
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(REPO, token=OWNER)
    assert torch.equal(logits(loaded), logits(load_model(folder)))
    assert resolve(REPO, token=OWNER).is_dir()


def test_private_never_means_public(hub, folder):
    push_unchecked(folder)
    before = dict(hub.repos[REPO].branches)
    with pytest.raises(PublishingError, match="exists and is public"):
        push_unchecked(folder, private=True)
    assert hub.repos[REPO].branches == before


def test_a_name_alone_goes_to_the_account(hub, folder):
    assert push_unchecked(folder, repo_id="gated").repo == REPO
    assert REPO in hub.repos


def test_large_files_go_in_parts(tmp_path, monkeypatch, waits, folder):
    with Hub(multipart=10_000) as server:
        point_client_at(server.url, tmp_path, monkeypatch)
        push_unchecked(folder)
        assert server.seen["put"] == -(-(folder / "model.safetensors").stat().st_size // 10_000) > 2
        assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))
        close_session()


# model.push_to_hub


def unchecked(monkeypatch):
    from hf_glu.publishing.hub import push as publishing

    monkeypatch.setattr(publishing, "check_loads", lambda stage, expected, *, code: ())


def test_push_to_hub_of_a_gated_model(hub, folder, monkeypatch):
    unchecked(monkeypatch)
    model = load_model(folder).train()
    made = model.push_to_hub(REPO, commit_message="mine", tags=["reviews"], private=True, token=OWNER)
    transformers.AutoTokenizer.from_pretrained(folder).push_to_hub(REPO)
    repo = hub.repos[REPO]
    assert made.oid in repo.commits
    assert repo.titles == ["initial commit", "mine", "Upload tokenizer"]
    assert repo.private
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(repo.files())
    assert "reviews" in repo.files()["README.md"].data.decode()
    assert [name for name in repo.files() if name.endswith(".py")]
    assert model.training
    assert torch.equal(logits(load_model(REPO)), logits(model))


def test_a_push_says_once_what_it_adds_and_can_be_plain(monkeypatch, caplog):
    taken = []
    publisher = SimpleNamespace(push=lambda model, repo: taken.append("ours"))
    monkeypatch.setitem(sys.modules, "publisher_of_this_test", publisher)
    monkeypatch.setattr(pushing, "PUBLISHER", ("publisher_of_this_test", "push"))
    pushing.say_once.cache_clear()

    class Base:
        config = transformers.BertConfig(hf_glu={"version": 1})
        modules = named_modules = lambda self: iter(())

        def push_to_hub(self, repo):
            taken.append("plain")

    patches = Patches()
    pushing.install_push(Base, patches)
    Base().push_to_hub(REPO)
    Base().push_to_hub(REPO)
    assert taken == ["ours", "ours"]
    said = [record.getMessage() for record in caplog.records if record.name == "hf_glu"]
    assert len(said) == 1
    assert "HF_GLU_PLAIN_PUSH=1" in said[0]
    monkeypatch.setenv(pushing.PLAIN, "1")
    Base().push_to_hub(REPO)
    patches.undo()
    monkeypatch.delenv(pushing.PLAIN)
    Base().push_to_hub(REPO)
    assert taken == ["ours", "ours", "plain", "plain"]


def test_push_to_hub_leaves_the_tokenizer_of_an_earlier_push(hub, folder, change, monkeypatch):
    unchecked(monkeypatch)
    push_unchecked(folder)
    change()
    load_model(folder).push_to_hub(REPO)
    assert transformers.AutoTokenizer.from_pretrained(REPO)("the film")["input_ids"] == [6, 7]
    assert torch.equal(logits(load_model(REPO)), logits(load_model(folder)))


def test_push_to_hub_as_a_proposal(hub, folder, monkeypatch):
    unchecked(monkeypatch)
    push_unchecked(folder)
    made = make_model("swiglu").push_to_hub(REPO, create_pr=True, token=STRANGER)
    assert made.pr_url
    assert hub.repos[REPO].titles[-1] == "Push with hf_glu"
    assert made.oid != hub.repos[REPO].branches["main"]


def test_push_to_hub_of_a_stock_model_is_stock(hub):
    model = FAMILIES["bert"].make("BertForSequenceClassification")
    with_plugin = model.push_to_hub("user/with")
    hf_glu.unregister()
    assert "push_to_hub" not in repr(transformers.PreTrainedModel.push_to_hub.__wrapped__.__globals__["__name__"])
    without = model.push_to_hub("user/without")
    hf_glu.register()
    assert type(with_plugin) is type(without)
    assert hub.repos["user/with"].titles == hub.repos["user/without"].titles
    assert hub.repos["user/with"].titles[1] == "Upload BertForSequenceClassification"
    files = [
        {path: file.data for path, file in hub.repos[name].files().items()} for name in ("user/with", "user/without")
    ]
    assert files[0] == files[1]


def test_stock_ways_of_pushing_name_no_code_that_isnt_there(hub, folder, tmp_path, monkeypatch):
    push_unchecked(folder, code=True)
    assert "auto_map" in json.loads(hub.repos[REPO].files()["config.json"].data)
    model = load_model(REPO)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("again", push_to_hub=True, repo_id="user/again")
    files = hub.repos["user/again"].files()
    assert "auto_map" not in json.loads(files["config.json"].data)
    assert torch.equal(logits(load_model("user/again")), logits(model))


def test_an_adapter_alone_goes_the_stock_way(monkeypatch):
    monkeypatch.setattr(transformers.utils.PushToHubMixin, "push_to_hub", lambda *args, **kwargs: "stock")
    model = make_model()
    model._hf_peft_config_loaded = True
    assert model.push_to_hub(REPO) == "stock"


@pytest.mark.slow
def test_the_trainers_push_names_no_code_that_isnt_there(hub, folder, tmp_path):
    push_unchecked(folder, code=True)
    model = load_model(REPO)
    options = transformers.TrainingArguments(
        output_dir=tmp_path / "run", hub_model_id="user/trained", use_cpu=True, report_to=[]
    )
    transformers.Trainer(model, options).push_to_hub()
    files = hub.repos["user/trained"].files()
    assert "auto_map" not in json.loads(files["config.json"].data)
    assert not [name for name in files if name.endswith(".py")]
    assert torch.equal(logits(load_model("user/trained")), logits(model))


def test_what_is_named_from_above_is_there_and_nothing_else_is():
    named = {"pushing.py": PUBLISHER, "modulations.py": LOADER}
    assert all(getattr(importlib.import_module(module), name) for module, name in named.values())
    upward = [
        (path.name, name)
        for path in FILES
        for name in re.findall(r'"(hf_glu(?:\.\w+)+)"', path.read_text())
        if LEVEL.get(name.split(".")[1], -1) > LEVEL.get(room_of(path), 99)
    ]
    assert dict(upward) == {path: module for path, (module, _) in named.items()}, "a name in a string is an import, too"
    assert len(upward) == len(named)


def test_nothing_is_sent_where_the_check_fails(hub, folder, monkeypatch):
    from hf_glu.publishing.hub import push as publishing

    def fails(stage, expected, *, code):
        assert code
        assert torch.equal(expected["outputs"]["logits"], run(load_model(stage), expected["inputs"])["logits"])
        raise CheckpointError("different")

    monkeypatch.setattr(publishing, "check_loads", fails)
    with pytest.raises(CheckpointError, match="different"):
        push(folder, REPO)
    assert dict(hub.seen) == {"whoami": 1}


# hf-glu push


def test_the_command(hub, folder, run_cli):
    code, out, _ = run_cli("push", folder, REPO, "--no-check", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["commit"] == hub.repos[REPO].branches["main"]
    assert data["checked"] == []
    options = ["--no-check", "--no-code", "--private", "--revision", "b", "--message", "m", "--token", OWNER]
    code, out, _ = run_cli("push", folder, "user/second", *options)
    assert code == 0
    assert hub.repos["user/second"].private
    assert hub.repos["user/second"].titles == ["initial commit", "m"]
    assert "model.safetensors" in out
    assert "not checked" in out
    assert f"{hub.url}/user/second" in out
    code, out, _ = run_cli("push", folder, REPO, "--no-check")
    assert "code for use without hf_glu" in out
    assert hub.repos[REPO].branches["main"] in out
    assert "@COMMIT" in run_cli("push", "--help")[1]


def test_bad_input_is_one_line_and_exit_code_2(hub, folder, run_cli):
    for arguments, words in {
        ("push", folder): "REPO",
        ("push", "nowhere/at/all", REPO): "no folder nowhere/at/all",
        ("push", folder, "not good", "--no-check"): "can't be a repository's name",
        ("push", folder, REPO, "--token", "hf_nobody", "--no-check"): "doesn't accept the token",
    }.items():
        code, out, err = run_cli(*arguments)
        assert code == 2
        assert out == ""
        assert words in err
        assert err.count("\n") == 1


# in processes of their own

CLEAN = """
import sys
auto, repo, revision, way, out = sys.argv[1:]
if way == "code":
    sys.modules["hf_glu"] = None  # can't be imported
else:
    import hf_glu
import torch, transformers
from safetensors.torch import save_file
torch.set_num_threads(1)
loaded = getattr(transformers, auto).from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
with torch.no_grad():
    save_file({"logits": loaded(input_ids=torch.arange(5, 17).unsqueeze(0)).logits}, out)
print(type(loaded).__module__)
"""


def loads_in_a_clean_process(hub, tmp_path, auto, way, *, repo=REPO, revision="main", **more):
    out = tmp_path / f"{way}.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, auto, repo, revision, way, out],
        env=environment(hub, tmp_path, **more), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    home = "transformers_modules." if way == "code" else "transformers.models."
    assert done.stdout.strip().splitlines()[-1].startswith(home)
    return load_file(out)["logits"]


@pytest.mark.slow
def test_a_checked_push_loads_in_two_clean_environments(hub, folder, change, tmp_path):
    first = push(folder, REPO, private=True)
    assert first.checked == ("plugin", "remote code")
    old = logits(load_model(folder))
    change()
    push_unchecked(folder, code=True)
    auto = "AutoModelForSequenceClassification"
    for way in ("plugin", "code"):
        assert torch.equal(loads_in_a_clean_process(hub, tmp_path, auto, way), logits(load_model(folder)))
    assert torch.equal(loads_in_a_clean_process(hub, tmp_path, auto, "code", revision=first.commit), old)


@pytest.mark.slow
def test_push_to_hub_checks_and_loads_in_two_clean_environments(hub, tmp_path):
    model = FAMILIES["gpt2"].make("GPT2LMHeadModel")
    hf_glu.convert(model, "stateful_geglu_new")
    model.push_to_hub(REPO)
    for way in ("plugin", "code"):
        assert torch.equal(loads_in_a_clean_process(hub, tmp_path, "AutoModelForCausalLM", way), logits(model))


@pytest.mark.slow
def test_the_check_can_fail(folder):
    expected = expected_outputs(load_model(folder))
    flat.write_code(folder)
    with pytest.raises(CheckpointError, match=r"\(plugin\), the model gives other logits"):
        other = {"logits": expected["outputs"]["logits"].nextafter(torch.tensor(9.0))}
        check_loads(folder, {**expected, "outputs": other}, code=False)
    code = folder / "modeling_hf_glu.py"
    plain = code.read_text()
    for spoiled, words in (
        (plain + "\nimport hf_glu\n", "doesn't load in a fresh process (remote code), so that it isn't pushed: "),
        (plain + PERTURBED, "(remote code), the model gives other logits"),
    ):
        code.write_text(spoiled)
        with pytest.raises(CheckpointError) as raised:
            check_loads(folder, expected, code=True)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


PERTURBED = """

class Perturbed(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits.nextafter(found.logits + 1)
        return found


BertForSequenceClassification = Perturbed
"""


@pytest.mark.slow
def test_ctrl_c_in_an_upload(hub, folder, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    hub.held.add("put")
    command = [sys.executable, "-c", "from hf_glu.cli import main; main()", "push", folder, REPO, "--no-check"]
    process = subprocess.Popen(
        command, env=environment(hub, tmp_path, TMPDIR=str(scratch)), stderr=subprocess.PIPE, text=True
    )
    assert hub.reached.wait(120)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "hf-glu: interrupted" in err
    assert "Traceback" not in err
    assert list(hub.repos[REPO].files()) == [".gitattributes"]
    assert not list(scratch.glob("hf_glu-push-*"))
