"""A chat server on the loopback interface that misbehaves on order, and counts what it is asked."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeServer:
    """Answers by `reply(messages)`, after `fault(number of the request, messages)` had its chance.

    A fault is None (answer properly), a status code, or one of `reset`, `hang`, `not json`, `other form`, `empty`;
    `(status, headers)` adds headers.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.fault: Callable[[int, dict[str, Any]], Any] = lambda number, body: None
        self.reply: Callable[[dict[str, Any]], str] = default_reply
        self.hang_seconds = 30.0
        self.delay = 0.0
        self.default_reply = default_reply
        self.running = 0
        self.most_at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.times.append(time.monotonic())
                    server.headers.append(dict(self.headers))
                    server.running += 1
                    server.most_at_once = max(server.most_at_once, server.running)
                try:
                    self.respond(number, body)
                finally:
                    with server._lock:
                        server.running -= 1

            def respond(self, number: int, body: dict[str, Any]) -> None:
                time.sleep(server.delay)
                fault = server.fault(number, body)
                headers: dict[str, str] = {}
                if isinstance(fault, tuple):
                    fault, headers = fault
                if fault == "reset":
                    self.connection.close()
                    self.close_connection = True
                elif fault == "hang":
                    time.sleep(server.hang_seconds)
                elif fault == "not json":
                    self.send(200, b"<html>busy</html>", headers)
                elif fault == "other form":
                    self.send(200, b'{"id": "x", "object": "list", "data": []}', headers)
                elif fault == "empty":
                    self.send(200, completion("  "), headers)
                elif isinstance(fault, int):
                    self.send(fault, json.dumps({"error": {"message": f"status {fault}"}}).encode(), headers)
                else:
                    self.send(200, completion(server.reply(body)), headers)

            def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client went away, as some tests want it to

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str) -> bytes:
    return json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": "fake",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}},
            ],
        }
    ).encode()


def default_reply(body: dict[str, Any]) -> str:
    """A new question for who asks, an answer from the notes for who answers."""
    first = body["messages"][0]
    if first["role"] == "system" and "interview a witness" in first["content"]:
        asked = sum(message["role"] == "assistant" for message in body["messages"])
        return f"What about attribute {asked}?"
    notes = [line[2:] for line in first["content"].splitlines() if line.startswith("- ")]
    return f"I saw this: {notes[0]}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A fake server; the environment holds no key and no proxy."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeServer()
    yield fake
    fake.close()
