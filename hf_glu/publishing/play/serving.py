"""The page on a port of this machine, until Ctrl-C: it keeps nothing, and lets a browser ask nobody else.

Every answer forbids the browser to load anything from another host (a Content-Security-Policy), whatever gradio's own
pages name.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from ipaddress import ip_address
from threading import Event
from typing import TYPE_CHECKING, Any

from hf_glu.checkpoint.writing import reason_of, scratch_folder
from hf_glu.errors import OptionError
from hf_glu.publishing.play.page import build_page, looks

if TYPE_CHECKING:
    from hf_glu.publishing.play.playing import Playground

HOST, PORT, TRIED = "127.0.0.1", 7860, 100
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; form-action 'self'"
)
# before gradio is imported: it looks for newer versions of itself, and tells how it is used
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False"}
FOLDER = "GRADIO_TEMP_DIR"
Message = dict[str, Any]


class OwnHostOnly:
    """An ASGI application that adds the policy to every answer of another.

    Args:
        app: the other.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer one request."""

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = message | {"headers": [*message.get("headers", []), *policy]}
            await send(message)

        await self.app(scope, receive, add)


def choose_port(host: str = HOST, port: int | None = None) -> int:
    """Return the port to listen at: ``port``, or the first free one from `PORT` on.

    Raises:
        OptionError: it is taken, or nothing can listen there.
    """
    for tried in [port] if port is not None else range(PORT, PORT + TRIED):
        try:
            listen(host, tried)
        except OSError as error:
            if port is None and error.errno == errno.EADDRINUSE:
                continue
            raise OptionError(_refused(host, tried, error)) from error
        return tried
    raise OptionError(f"ports {PORT} to {PORT + TRIED - 1} of {host} are taken: give a free one with --port")


def listen(host: str, port: int) -> None:
    """Listen at a port for a moment.

    Raises:
        OSError: nothing can.
    """
    family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with closing(socket.socket(family, kind, number)) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)


def _refused(host: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"there is no host {host}: --host is an address of this machine, {HOST} or 0.0.0.0"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken: give another with --port, or none"
    return f"nothing can listen at port {port} of {host}: {reason_of(error)}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(ground: Playground, say: Callable[[str], None], *, host: str = HOST, port: int | None = None) -> None:
    """Serve the page until Ctrl-C; what gradio writes meanwhile lies in a folder that is removed then.

    Args:
        ground: what the page plays with.
        say: told where the page is.
        host, port: where to listen; no port: the first free one from `PORT` on.

    Raises:
        OptionError: nothing can listen there.
        MissingPackageError: gradio isn't installed.
    """
    os.environ.update(ENVIRONMENT)
    with suppress(KeyboardInterrupt), scratch_folder() as scratch:
        os.environ[FOLDER] = str(scratch)
        page, port = build_page(ground), choose_port(host, port)
        try:
            launch(page, host, port)
            where = f"[{host}]" if ":" in host else host
            say(f"{ground.name}: http://{where}:{port} (Ctrl-C ends it)")
            Event().wait()
        finally:
            page.close(verbose=False)
            os.environ.pop(FOLDER)


def launch(page: Any, host: str, port: int) -> None:
    """Launch the page at a port, and return."""
    from starlette.middleware import Middleware

    page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, inbrowser=False,
        app_kwargs={"middleware": [Middleware(OwnHostOnly)]}, **looks(),
    )  # fmt: skip
