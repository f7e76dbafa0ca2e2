"""`tbps-page`: a gallery searched in the browser, with words, with a picture and words, or in a chat.

`page_blocks` has what the page shows, `page_answers` what it asks the gallery, `page_html` its parts that are HTML; this is how it is
served, to this machine only. In front of Gradio stands a door (`Door`) that knows the few addresses that the page needs and refuses
all others, among them those at which Gradio offers files, and those that make it fetch something from the internet.
"""

import argparse
import ipaddress
import json
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tbps_common.errors import InputError
from tbps_common.search.gallery import list_galleries, open_gallery
from tbps_common.search.retriever import open_retriever


def page(flags: argparse.Namespace) -> int:
    """Open gallery and models, then serve the page until Ctrl-C."""
    galleries = list_galleries(flags.gallery)  # before models are loaded, so that a wrong path is reported at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _listen(flags.host, flags.port) as listener, tempfile.TemporaryDirectory(prefix="tbps-page-") as folder:
        _keep_inside(folder)
        try:
            import fastapi
            import gradio
            import uvicorn

            from tbps_common.search import page_answers, page_blocks
        except ModuleNotFoundError as error:
            raise InputError(
                f"the page needs gradio ({error}): install it with pip install 'tbps-common[page]', or pip install gradio"
            ) from error
        models = {
            name: open_retriever(name, device=flags.device, trust=flags.trust_checkpoint)
            for name in dict.fromkeys(flags.model)
        }
        for model in models.values():
            open_gallery(flags.gallery, model)
        host, port = listener.getsockname()[:2]
        most = flags.max_upload << 20
        filters = page_answers.find_filters(galleries)
        blocks = page_blocks.build(page_blocks.Page(flags.gallery, models, filters, Path(folder), most))
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None, lifespan=None),
            blocks,
            path="",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=1,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=page_blocks.theme(),
            css=page_blocks.CSS,
        )
        loopback = ipaddress.ip_address(host).is_loopback
        address = f"[{host}]" if ":" in host else host
        door = Door(app, {address, "localhost"} if loopback else None, port, most * 4 // 3 + (1 << 20))
        if not loopback:
            print(f"note: whoever can reach {host} can search this gallery: there is no password")
        print(f"page: http://{address}:{port}/ (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(
            uvicorn.Config(door, log_level="error", timeout_graceful_shutdown=1, server_header=False, ws="none")
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            pass
    return 0


def _keep_inside(folder: str) -> None:
    """Before Gradio is imported: it must not call home, write outside of a folder, or be opened to others by a setting."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
    tempfile.tempdir = folder


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on --host {host} --port {port} ({reason}): choose another, or --port 0"
        ) from error


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Door:
    """What stands in front of Gradio: refuses what the page itself never asks for.

    An ASGI application. Refused are addresses beside `PLACES`, requests under another host's name (a page of the internet
    whose name was made to point to this machine) or from another page, bodies that are too large or of unknown size, and
    bodies that name a file: Gradio would read or fetch it.
    """

    PLACES = frozenset(
        "/ /config /theme.css /favicon.ico /gradio_api/startup-events /gradio_api/queue/join /gradio_api/queue/data".split()
    )
    FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
    HEADERS = (
        (
            b"content-security-policy",
            b"default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; connect-src 'self' data:; "
            b"script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
            b"form-action 'none'; frame-ancestors 'none'",
        ),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
    )

    def __init__(
        self, app: Callable[[Any, Any, Any], Awaitable[None]], hosts: set[str] | None, port: int, most: int
    ) -> None:
        self.app = app
        self.hosts = None if hosts is None else {f"{host}:{port}" for host in hosts} | (hosts if port == 80 else set())
        self.most = most

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            status = self._status(scope)
            if status == 200 and scope["method"] == "POST":
                body = await _body(receive)
                receive = _again(body, receive)
                status = 403 if _names_a_file(body) else 200
            if status == 200:
                await self.app(scope, receive, self._with_headers(send))
            else:
                await send(
                    {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
                )
                await send({"type": "http.response.body", "body": _REFUSALS[status]})

    def _with_headers(self, send: Send) -> Send:
        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.HEADERS]}
            await send(message)

        return send_more

    def _status(self, scope: MutableMapping[str, Any]) -> int:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        path = scope["path"]
        if self.hosts is not None and host not in self.hosts:
            return 403
        if path not in self.PLACES and not (path.startswith(self.FOLDERS) and ".." not in path):
            return 404
        if scope["method"] in ("GET", "HEAD"):
            return 200
        if scope["method"] != "POST":
            return 405
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            return 403
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411
        return 413 if int(length) > self.most else 200


_REFUSALS = {
    403: b"refused",
    404: b"there is nothing here",
    405: b"refused",
    411: b"the size of the body is missing",
    413: b"too large",
}


async def _body(receive: Receive) -> bytes:
    """The whole body of a request; what came until then if the other side has gone."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read again."""
    given = False

    async def receive_again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _names_a_file(body: bytes) -> bool:
    """Whether a request holds what Gradio takes for a file: an object with a path; or is no JSON."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return True
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
