"""Other programs of this environment, run with the plugin, and a server among them that is asked over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


def command(*arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """Return a command that runs another of this environment's programs with the plugin."""
    return [sys.executable, "-c", "from hf_glu.cli import main; main()", "run", *options, "--", *arguments]


def program(name: str) -> str:
    """Return the path of a program of this environment, or skip the test."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return found or pytest.skip(f"there is no {name}")


class Server:
    """A server that is running, or starting.

    Attributes:
        process: what was started.
        port: where it listens.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def ask(self, path: str, data: dict[str, Any]) -> tuple[int, str]:
        """Return status and body of the answer to ``data``.

        Raises:
            OSError: nobody listens.
        """
        address, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(data).encode(), headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answer(self, path: str, data: dict[str, Any]) -> Any:
        """Return the object of an answer that has to be right."""
        status, body = self.ask(path, data)
        assert status == 200, body
        return json.loads(body)

    def wait(self, path: str, data: dict[str, Any], seconds: float = 240) -> tuple[int, str]:
        """Return the first answer of a server that is starting."""
        end = time.monotonic() + seconds
        while True:
            try:
                return self.ask(path, data)
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                assert time.monotonic() < end, "the server doesn't answer"
                time.sleep(1)


@contextmanager
def serving(model: Path, *arguments: str, options: tuple[str, ...] = ()) -> Iterator[Server]:
    """Serve a model by ``transformers serve``, with ``options`` of ``hf-glu run``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    server = subprocess.Popen(
        command(program("transformers"), "serve", *where, *arguments, str(model), options=options),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield Server(server, port)
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself, which `wait` tells
            os.killpg(server.pid, 15)
        server.wait(30)
