"""The page on a GGUF file: read, moved, beside what was converted of it, as a page and as a Space."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec

import ggufs
import pytest

import hf_glu
from hf_glu.checkpoint.loading import load_model, load_tokenizer
from hf_glu.publishing.play.page import build_page
from hf_glu.publishing.play.playing import Playground
from hf_glu.publishing.play.settings import PlaySettings

pytest.importorskip("gguf")
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio isn't installed: the extra play brings it"
)
TEXT = "a film"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a GGUF file, a converted model of it, and a modulation of it."""
    found = tmp_path_factory.mktemp("gguf")
    file = ggufs.write(found / "tiny.gguf")
    hf_glu.convert_checkpoint(file, found / "gated", "learnable_swiglu")
    glad = hf_glu.fit_modulation(load_model(file), load_tokenizer(file), ["good film", "fine"], ["bad film", "dull"])
    glad.save(found / "glad")
    return found


@pytest.fixture(scope="module")
def ground(root):
    return Playground(str(root / "tiny.gguf"), str(root / "gated"), [str(root / "glad")])


def test_a_gguf_file_is_read_moved_and_compared(ground):
    assert (ground.name, ground.other_name, ground.player.layers) == ("tiny.gguf", "gated", ggufs.LAYERS)
    still, beside = ground.player.read(TEXT, new_tokens=3), "gated as it is"
    assert len(still.stacks[0].ids) > 3
    assert still.written
    assert ground.show(TEXT, PlaySettings(), beside=beside).difference.count("bit by bit")
    steered = PlaySettings(strengths={"glad": 2.0})
    assert "bit by bit" not in ground.show(TEXT, steered, beside=beside).difference
    moved = ground.player.read(TEXT, steered=PlaySettings(threshold=1.0).modulation(ground.player.model, {}))
    assert moved.mean("openness") < ground.player.read(TEXT).mean("openness")


@pytest.mark.slow
@needs_gradio
def test_its_page_is_built(ground):
    async def built():  # gradio would leave a loop of its own open
        return build_page(ground)

    assert "tiny.gguf" in str(asyncio.run(built()).get_config_file())


@pytest.mark.slow
@needs_gradio
def test_its_space_has_the_file_and_installs_what_reads_it(root, tmp_path, run_cli):
    code, _, err = run_cli("play", root / "tiny.gguf", "--space", tmp_path / "space")
    assert code == 0, err
    space = tmp_path / "space"
    assert (space / "model.gguf").read_bytes() == (root / "tiny.gguf").read_bytes()
    assert "Playground('model.gguf', None, [])" in (space / "app.py").read_text()
    wanted = (space / "requirements.txt").read_text().split("\n")
    assert [line for line in wanted if line.startswith("gguf")]
    run_cli("play", root / "gated", "--space", tmp_path / "other")
    wanted = (tmp_path / "other" / "requirements.txt").read_text().split("\n")
    assert not [line for line in wanted if line.startswith("gguf")]


@needs_gradio
def test_a_file_that_is_not_there_is_one_line(tmp_path, run_cli):
    code, out, err = run_cli("play", tmp_path / "none.gguf")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"there is no file {tmp_path / 'none.gguf'}" in err
