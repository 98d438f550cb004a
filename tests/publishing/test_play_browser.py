"""The page in a real browser: clicked, slid, compared, saved; on a phone, in the dark, by keyboard; nothing is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import steered

import hf_glu

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECRET = "unmistakable zebra"
WAIT = 180_000  # milliseconds: on a machine with other things to do
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["Chromium"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, str]:
    root = tmp_path_factory.mktemp("browser")
    model = steered.make("gpt2")
    steered.fit(model).save(root / "glad")
    for name in ("dense", "gated"):
        if name == "gated":
            hf_glu.convert(model, "stateful_geglu_new", check=False)
        model.save_pretrained(root / name)
        steered.tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in ("dense", "gated", "glad")}


class Served:
    """A page that is served by a process of its own, in whose home and temporary folder nothing was before."""

    def __init__(self, command: list[str], home: Path, where: Path, **more: str) -> None:
        own = {"HOME": home, "TMPDIR": home / "tmp", "XDG_CACHE_HOME": home, "XDG_CONFIG_HOME": home}
        environment = os.environ | {name: str(path) for name, path in own.items()} | more
        (home / "tmp").mkdir()
        self.home = home
        self.process = subprocess.Popen(
            command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, line + self.process.communicate()[1]
        self.url = next(word for word in line.split() if word.startswith("http://")).replace("0.0.0.0", "127.0.0.1")

    def stop(self) -> tuple[int, str, str]:
        """Press Ctrl-C; return the exit code, and what was said after the first line."""
        self.process.send_signal(signal.SIGINT)
        try:
            out, err = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@contextmanager
def browsing(url: str, **more: Any) -> Iterator[tuple[Any, list[str]]]:
    """Open a page in Chromium; yield it, and all that goes wrong there or goes elsewhere."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []

    def note(request: Any) -> None:
        if not request.url.startswith((url, url.replace("http", "ws"), "data:", "blob:")):
            wrong.append(request.url)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(**more).new_page()
        page.set_default_timeout(WAIT)
        page.on("request", note)
        page.on("websocket", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        response = page.goto(url)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        page.wait_for_selector("#model .map")
        yield page, wrong
        browser.close()


def until(page: Any, where: str, says: str) -> str:
    """Wait until a part of the page says something; return all that it says."""
    page.wait_for_function(
        "([where, says]) => document.querySelector(where).innerText.includes(says)", arg=[where, says]
    )
    return str(page.inner_text(where))


def pressed(page: Any, times: int, key: str = "ArrowRight") -> None:
    for _ in range(times):
        page.keyboard.press(key)


def play_with(page: Any, folders: dict[str, str], tmp_path: Path) -> None:
    """Do with the page what people do."""
    assert "bit by bit" in until(page, "#difference", "Difference: gated minus dense")
    colours = page.locator("#model td.m, #model td.l").count()
    assert colours > 10
    page.locator("#threshold input[type=range]").focus()
    pressed(page, 10)  # of 0.05 each, by keyboard
    assert "points" in until(page, "#difference", "Difference: gated, steered minus dense")
    assert page.locator("#difference td.l").count() > 10  # a higher threshold, gates less open
    page.get_by_label("dense, steered alike").check()
    assert "bit by bit" in until(page, "#difference", "Difference: gated, steered minus dense, steered")
    page.get_by_label("state", exact=True).check()
    until(page, "#model", "What the gates remember")
    page.locator("#strength-of-glad input[type=number]").fill("1.5")
    page.keyboard.press("Tab")
    page.locator("#text textarea").fill(f"{SECRET} <b>film</b>")
    page.locator("#run").click()
    page.wait_for_function("document.querySelector('#model tbody th:last-of-type').innerText.length > 0")
    assert page.locator("#model b").count() == 0
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "play.safetensors")
    saved = hf_glu.GateModulation.load(tmp_path / "play.safetensors")
    glad = hf_glu.GateModulation.load(folders["glad"])
    for name, threshold in saved.thresholds.items():
        assert float((threshold - 0.5 - 1.5 * glad.thresholds[name]).abs().max()) < 1e-5
    page.locator("#reset").click()
    assert "bit by bit" not in until(page, "#difference", "Difference: gated minus dense")  # of states, none is dense's
    assert page.locator("#threshold input[type=number]").input_value() == "0"
    page.locator("#text textarea").fill(" ")
    page.locator("#run").click()
    page.wait_for_selector("text=type a text that the model reads")


def test_the_page_in_a_browser(folders: dict[str, str], tmp_path: Path):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    command = [sys.executable, "-m", "hf_glu", "play", folders["gated"], "--compare", folders["dense"]]
    served = Served([*command, "--modulation", folders["glad"]], home, here, PYTHONPATH=str(ROOT))
    try:
        with browsing(served.url, viewport={"width": 1280, "height": 900}, accept_downloads=True) as (page, wrong):
            play_with(page, folders, tmp_path)
            assert not wrong
            shots = [page.screenshot(full_page=True)]
        with browsing(served.url, viewport={"width": 400, "height": 800}, color_scheme="dark", has_touch=True) as (
            page,
            wrong,
        ):
            assert page.evaluate("document.documentElement.scrollWidth") == 400
            assert "dark" in page.evaluate("document.body.className")
            assert page.evaluate("getComputedStyle(document.querySelector('.play')).getPropertyValue('--more')") == (
                "#ff9a5c"
            )
            order = [page.locator(f"#{part}").bounding_box()["y"] for part in ("text", "run", "model", "other")]
            assert order == sorted(order)
            assert not wrong
            shots.append(page.screenshot(full_page=True))
        assert all(len(shot) > 20_000 for shot in shots)
        kept = [path for folder in (home, here) for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in kept if SECRET.encode() in path.read_bytes()]
        assert not list(here.iterdir())
    finally:
        code, out, err = served.stop()
    assert (code, out, err) == (0, "", "")
    assert not list((home / "tmp").glob("hf_glu-*"))


def test_a_space_runs_by_what_is_in_it(folders: dict[str, str], tmp_path: Path):
    space, home = tmp_path / "space", tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "hf_glu", "play", folders["gated"], "--space", str(space)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    served = Served([sys.executable, "app.py"], home, space, PORT="7999", PYTHONPATH="", HF_HUB_OFFLINE="1")
    try:
        with browsing(served.url) as (page, wrong):
            assert until(page, "h1", "model")
            page.locator("#slope input[type=number]").fill("2")
            page.keyboard.press("Tab")
            until(page, "#difference", "Difference: model, steered minus model")
            assert not wrong
    finally:
        code, _, _ = served.stop()
    assert code == 0
