"""A chat server on this machine that answers by a rule: to try a pipeline, or to test one, without a model or a key."""

import argparse
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from tbps_common.run.arguments import whole_number

Messages = list[dict[str, Any]]
Answer = Callable[[Messages], str]

_LONGEST_REQUEST = 1 << 20


class PracticeServer:
    """Serves `POST <url>/chat/completions` on the loopback address while the context is open.

    Attributes:
        answers: answers sent so far.
    """

    def __init__(self, answer: Answer, *, port: int = 0, handler: type["ChatHandler"] | None = None) -> None:
        """Open the port.

        Args:
            answer: the text that answers the messages of one request.
            port: 0 takes a free one.
            handler: for a server that behaves otherwise (tests).

        Raises:
            OSError: the port is taken.
        """
        self.answer = answer
        self.answers = 0
        self.lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", port), handler or ChatHandler)
        self._server.practice = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What `--base_url` or `OPENAI_BASE_URL` takes."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no event; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class ChatHandler(BaseHTTPRequestHandler):
    """One connection; `respond` may be overridden."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def practice(self) -> PracticeServer:
        return self.server.practice  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= _LONGEST_REQUEST:
                raise ValueError(length)
            request: dict[str, Any] = json.loads(self.rfile.read(length))
            messages = request["messages"]
        except (ValueError, KeyError, TypeError):
            self.close_connection = True
            return self.send_json(400, {"error": {"message": "the request is not a chat completion request"}})
        if not self.path.endswith("/chat/completions"):
            return self.send_json(404, {"error": {"message": f"no such address: {self.path}"}})
        self.respond(request, messages)

    def respond(self, request: dict[str, Any], messages: Messages) -> None:
        """Answer one request."""
        self.send_answer(request, self.practice.answer(messages))

    def send_answer(self, request: dict[str, Any], text: str, finish_reason: str = "stop") -> None:
        """Send a chat completion."""
        with self.practice.lock:
            self.practice.answers += 1
            number = self.practice.answers
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        completion = {"id": f"practice-{number}", "object": "chat.completion", "created": 0}
        self.send_json(200, {**completion, "model": request.get("model", ""), "choices": [choice]})

    def send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send a JSON body."""
        self.send_bytes(status, json.dumps(body).encode(), headers)

    def send_bytes(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a body that is called JSON."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the caller reports."""


def serve(argv: list[str], answer: Answer, *, module: str, port: int, purpose: str) -> int:
    """The command line of `python -m MODULE [--port N]`: serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"Serve an OpenAI-compatible chat on this machine that {purpose}: "
        "export OPENAI_BASE_URL=http://127.0.0.1:PORT/v1 OPENAI_API_KEY=any",
    )
    parser.add_argument("--port", type=whole_number(0), default=port, help="0 takes a free one (default: %(default)s)")
    with PracticeServer(answer, port=parser.parse_args(argv).port) as server:
        print(f"serving on {server.url}; press Ctrl-C to stop", flush=True)
        threading.Event().wait()
    return 0
