"""The page to play on, without gradio: settings as modulations, numbers of a text, HTML, what is refused, a Space."""

from __future__ import annotations

import socket
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import steered
import torch
import transformers
from comparing import assert_same
from torch import nn

import hf_glu
from hf_glu.config import extras
from hf_glu.errors import DataError, OptionError
from hf_glu.publishing.play.playing import Playground
from hf_glu.publishing.play.reading import StackGates, TextGates, difference
from hf_glu.publishing.play.serving import choose_port, is_loopback
from hf_glu.publishing.play.settings import PlaySettings
from hf_glu.publishing.play.tables import Shades, difference_html, reading_html

TEXT = "the film was good"
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio isn't installed: the extra play brings it"
)


def save(name: str, folder: Path, *, to: str | None = None, seed: int = 0) -> str:
    """Save a pico model with a tokenizer; return its path."""
    model = steered.make(name, seed=seed) if name == "gpt2" else steered.make(name)
    if to:
        hf_glu.convert(model, to, check=False)
    model.save_pretrained(folder)
    steered.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("play")
    found = {"dense": save("gpt2", root / "dense"), "other": save("gpt2", root / "other", seed=1)}
    found["gated"] = save("gpt2", root / "gated", to="stateful_geglu_new")
    model = steered.make("gpt2")
    steered.fit(model, slopes=True).save(root / "glad")
    steered.fit(model, layers=[0]).save(root / "calm.safetensors")
    return found | {"glad": str(root / "glad"), "calm": str(root / "calm.safetensors")}


@pytest.fixture(scope="module")
def ground(folders) -> Playground:
    return Playground(folders["gated"], folders["dense"], [folders["glad"], folders["calm"]])


def logits(model: Any, **block: Any) -> Any:
    ids = steered.ids(2, 7)
    with torch.no_grad():
        if not block:
            return model(ids).logits
        with hf_glu.modulation(model, **block):
            return model(ids).logits


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"threshold": 0.3}, {"threshold": 0.3}),
        ({"slope": 1.5, "first": 1, "last": 1}, {"slope": 1.5, "layers": "1"}),
        ({"threshold": -0.4, "slope": 0.5, "first": 1, "last": 0}, {"threshold": -0.4, "slope": 0.5}),
    ],
)
def test_sliders_are_the_modulation_by_hand(ground, settings, by_hand):
    model = ground.player.model
    made = PlaySettings(**settings)
    expected, plain = logits(model, **by_hand), logits(model)
    modulation = made.modulation(model, {})
    with modulation.on(model):
        assert_same(logits(model), expected, "exact up to rounding")
    assert (expected - plain).abs().max() > 1e-3
    code = made.code(2, "play.safetensors", {})
    assert all(f"{key}={value!r}" in code for key, value in by_hand.items() if key != "layers")
    assert ('layers="1-1"' in code) == ("layers" in by_hand)


def test_presets_and_sliders_are_one_sum_and_the_file_is_it(ground, tmp_path):
    settings = PlaySettings(threshold=0.2, strengths={"glad": 0.5, "calm": -1.0})
    made = settings.modulation(ground.player.model, ground.presets)
    hand = PlaySettings(threshold=0.2).modulation(ground.player.model, {})
    expected = hand + 0.5 * ground.presets["glad"] + -1.0 * ground.presets["calm"]
    assert_same(dict(made.thresholds), dict(expected.thresholds), "bitwise")
    assert_same(dict(made.log_slopes), dict(expected.log_slopes), "bitwise")
    (tmp_path / "play.safetensors").write_bytes(ground.export(settings))
    loaded = hf_glu.GateModulation.load(tmp_path / "play.safetensors", model=ground.player.model)
    assert_same(dict(loaded.thresholds), dict(made.thresholds), "bitwise")
    assert "play.safetensors" in ground.export_html(settings)
    assert "base64" not in ground.export_html(PlaySettings())
    for neutral in (PlaySettings(), PlaySettings(strengths={"glad": 0.0})):
        assert neutral.neutral
        assert neutral.modulation(ground.player.model, ground.presets) is None
        assert ground.export(neutral) is None
        assert "move a slider" in neutral.code(2, "play.safetensors", {})


def test_the_numbers_are_those_of_the_gates(ground):
    player = ground.player
    read = player.read(TEXT, new_tokens=3)
    (stack,) = read.stacks
    text = player.tokenizer([TEXT], return_tensors="pt")["input_ids"]
    assert stack.ids[: text.shape[1]] == text[0].tolist()
    assert (len(stack.ids), stack.typed) == (text.shape[1] + 3, text.shape[1])
    with torch.no_grad(), hf_glu.record_gates(player.model) as gates:
        out = player.model(torch.tensor([stack.ids]))
    assert_same(stack.measures["openness"], gates.openness[:, 0], "exact")
    assert_same(stack.measures["state"], gates.state[:, 0], "exact")
    assert stack.ids[-3:] == out.logits[0, -4:-1].argmax(-1).tolist()  # what it wrote is what it holds for likeliest
    loss = nn.functional.cross_entropy(out.logits[0, : stack.typed - 1], text[0, 1:])
    assert read.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert read.written == player.tokenizer.decode(stack.ids[-3:])
    moved = player.read(TEXT, steered=PlaySettings(threshold=1.0).modulation(player.model, {}))
    assert moved.mean("openness") < read.mean("openness") - 0.05
    assert player.read(TEXT).mean("openness") == player.read(TEXT).mean("openness")  # nothing is left on the model


@pytest.mark.parametrize(
    ("name", "stacks", "writes"),
    [("t5", ["encoder", "decoder"], True), ("bert", ["model"], False), ("mixtral", ["model"], True)],
)
def test_other_families(name, stacks, writes, tmp_path):
    ground = Playground(save(name, tmp_path / "model"))
    shown = ground.show(TEXT, PlaySettings(), new_tokens=2, beside=next(iter(ground.choices)))
    read = ground.player.read(TEXT, new_tokens=2)
    assert [stack.stack for stack in read.stacks] == stacks
    assert ground.player.writes == writes == bool(read.written)
    assert shown.model.count('class="map"') == len(stacks)
    assert "bit by bit" in shown.difference
    assert (ground.player.layers == 0) == (name == "mixtral")


def test_a_converted_model_beside_the_dense_one(ground):
    assert list(ground.choices) == ["dense as it is", "dense, steered alike", "gated as it is", "nothing"]
    assert ground.measures == ["openness", "state"]
    same = ground.show(TEXT, PlaySettings(), beside="dense as it is")
    assert "bit by bit" in same.difference
    settings = PlaySettings(threshold=0.5, strengths={"glad": 1.0})
    alike = ground.show(TEXT, settings, beside="dense, steered alike")
    assert "bit by bit" in alike.difference
    assert "dense, steered" in alike.beside
    apart = ground.show(TEXT, settings, beside="gated as it is", measure="state", new_tokens=4)
    assert apart.difference.count('class="map"') == 1
    assert "gated, steered minus gated" in apart.difference
    alone = ground.show(TEXT, settings, beside="nothing")
    assert alone.beside == alone.difference == ""
    with pytest.raises(DataError, match="type a text"):
        ground.show(" \n", PlaySettings())
    with pytest.raises(OptionError, match="nothing called"):
        ground.show(TEXT, PlaySettings(), beside="x")


def made_of(values: list[list[float]], ids: list[int], **more: Any) -> TextGates:
    tokens = [f"<{each}>" for each in ids]
    stack = StackGates(stack="model", ids=ids, tokens=tokens, typed=2, places=["layers.0", "layers.1"],
                       layers=[0, 1], measures={"openness": torch.tensor(values)})  # fmt: skip
    return TextGates(stacks=[stack], written="", perplexity=None, **more)


def test_differences_are_of_the_tokens_that_both_have_read():
    one = made_of([[0.5, 0.25, 0.5], [0.5, 0.5, 0.5]], [5, 6, 7])
    other = made_of([[0.5, 0.75, 0.5], [0.5, 0.375, 0.5]], [5, 6, 8])
    (found,) = difference(one, other)
    assert found.ids == [5, 6]
    assert_same(found.measures["openness"], torch.tensor([[0.0, 0.5], [0.0, -0.125]]), "bitwise")
    html = difference_html([found], "openness", "a<b", "c")
    assert "a&lt;b" in html
    assert "<6>" not in html
    assert "&lt;6&gt;" in html
    assert "from -12.50 points to +50.00 points" in html
    assert html.count('class="m"') + html.count("class=m") == 1
    assert not difference(one, made_of([[0.5], [0.5]], [9]))


def test_colours_are_distances_from_the_middle_and_broken_numbers_are_empty_cells():
    read = made_of([[0.5, float("nan")], [0.75, 0.25]], [5, 6])
    scale = Shades.of([read], "openness")
    assert (scale.middle, scale.span) == (0.5, 0.25)
    html = reading_html(read, "m", "openness", scale)
    assert html.count("<td></td>") == 1
    assert "--a:85" in html
    assert "from 25.0 % to 75.0 %" in html
    assert "Its gates have no state" in reading_html(read, "m", "state", scale)


def taken() -> socket.socket:
    found = socket.create_server(("127.0.0.1", 0))
    return found


@needs_gradio
def test_what_cant_be_played_with_is_one_line(folders, tmp_path, run_cli):
    (tmp_path / "bare").mkdir()
    resnet = tmp_path / "resnet"
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
    transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(resnet)
    steered.tokenizer().save_pretrained(resnet)
    with taken() as used:
        port = str(used.getsockname()[1])
        wrong = {
            "no folder": ([str(tmp_path / "none")], "there is no folder"),
            "no gates": ([str(resnet)], "no gates"),
            "port": ([folders["dense"], "--port", port], "is taken: give another with --port"),
            "no port": ([folders["dense"], "--port", "70000"], "less than or equal to 65535"),
            "host": ([folders["dense"], "--host", "no.such.host.invalid"], "there is no host"),
            "another model's": ([folders["other"], "--modulation", folders["glad"]], "of another model"),
            "no modulation": ([folders["dense"], "--modulation", str(tmp_path / "bare")], "is no modulation"),
            "twice": ([folders["dense"], *["--modulation", folders["glad"]] * 2], "two modulations are called glad"),
            "compare": ([folders["dense"], "--compare", str(tmp_path / "none")], "there is no folder"),
            "space": ([folders["dense"], "--space", folders["dense"]], "exists already"),
        }
        for name, (arguments, says) in wrong.items():
            code, out, err = run_cli("play", *arguments)
            assert (code, out, err.count("\n")) == (2, "", 1), name
            assert says in err, name


def test_without_gradio_it_says_what_to_install(folders, run_cli, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    code, out, err = run_cli("play", folders["dense"])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert 'pip install "hf_glu[play]"' in err


def test_ports():
    with taken() as used:
        with pytest.raises(OptionError, match="is taken"):
            choose_port("127.0.0.1", used.getsockname()[1])
    assert 7860 <= choose_port() < 7960
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1")] == [
        True, True, True, False, False
    ]  # fmt: skip


@needs_gradio
def test_a_space_needs_an_installed_hf_glu(folders, tmp_path, run_cli, monkeypatch):
    def unknown(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("hf_glu.publishing.play.space.requires", unknown)
    code, out, err = run_cli("play", folders["dense"], "--space", tmp_path / "space")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "isn't installed" in err
    assert not (tmp_path / "space").exists()


@needs_gradio
def test_a_space_is_a_folder_with_all_that_it_needs(folders, tmp_path, run_cli):
    for name in ("run.json", "log.jsonl"):
        (Path(folders["gated"]) / name).write_text("{}")
    arguments = ["--compare", folders["dense"], "--modulation", folders["calm"], "--space", tmp_path / "space"]
    code, out, _ = run_cli("play", folders["gated"], *arguments)
    assert (code, out) == (0, f"{tmp_path / 'space'}\n")
    space = tmp_path / "space"
    assert {path.name for path in space.iterdir()} == {
        "app.py", "README.md", "requirements.txt", "hf_glu", "model", "compare", "modulations"
    }  # fmt: skip
    card = (space / "README.md").read_text()
    assert card.startswith('---\ntitle: "gated: gates"\n')
    assert "sdk: gradio\nsdk_version: " in card
    assert "app_file: app.py" in card
    assert "license" not in card
    wanted = (space / "requirements.txt").read_text().split("\n")
    assert {f"torch=={torch.__version__.partition('+')[0]}", "safetensors>=0.5"} <= set(wanted)
    assert not [line for line in wanted if line.startswith(("gradio", "hf_glu"))]
    app = (space / "app.py").read_text()
    assert "Playground('model', 'compare', ['modulations/calm.safetensors'])" in app
    compile(app, "app.py", "exec")
    assert '"0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"' in app
    assert not [path for name in ("run.json", "log.jsonl") for path in (space / "model").glob(name)]
    assert (space / "model" / "config.json").is_file()
    assert not list(space.rglob("__pycache__"))
    assert not [path for path in space.rglob("*") if path.is_symlink()]
    listed = subprocess.run(["grep", "-rl", str(tmp_path), str(space)], capture_output=True, text=True, check=False)
    assert not listed.stdout, "a path of this machine"
