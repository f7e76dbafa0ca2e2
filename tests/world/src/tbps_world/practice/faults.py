"""A practice server with bad days: a share of its requests fails in one of seven ways, to rehearse a pipeline."""

import random
import socket
import struct
import time
from collections import Counter
from typing import Any

from tbps_world.practice.server import Answer, ChatHandler, Messages, PracticeServer

FAULTS = ("rate_limit", "server_error", "reset", "hang", "malformed", "wrong_schema", "empty")


class FaultyServer(PracticeServer):
    """Answers most requests, and fails a share of them.

    Attributes:
        requests: received so far.
        asked: how often each question (the last message's text) was asked.
        met: how often each kind of fault occurred.
        most_at_once: requests in flight, at most.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        share: float = 0.2,
        faults: tuple[str, ...] = FAULTS,
        latency: float = 0.0,
        hang: float = 5.0,
        retry_after: str = "0.2",
        seed: int = 0,
    ) -> None:
        """Open a free port.

        Args:
            answer: as for `PracticeServer`.
            share: of the requests that fail, 0 to 1.
            faults: kinds of failures, each as likely as the others.
            latency: seconds before every answer.
            hang: seconds for which a hanging request stays open.
            retry_after: value of that header in a `rate_limit` answer.
            seed: of the choice.
        """
        super().__init__(answer, handler=_FaultyHandler)
        self.share, self.faults, self.latency, self.hang, self.retry_after = share, faults, latency, hang, retry_after
        self.requests, self.most_at_once, self.at_once = 0, 0, 0
        self.asked: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.random = random.Random(seed)

    def choose(self, messages: Messages) -> str | None:
        """Count a request and choose its fault, if any."""
        with self.lock:
            self.requests += 1
            self.asked[str(messages[-1].get("content"))] += 1
            fault = self.random.choice(self.faults) if self.random.random() < self.share else None
            if fault is not None:
                self.met[fault] += 1
            return fault


class _FaultyHandler(ChatHandler):
    def respond(self, request: dict[str, Any], messages: Messages) -> None:
        server = self.practice
        assert isinstance(server, FaultyServer)
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.latency)
            fault = server.choose(messages)
            if fault is None:
                self.send_answer(request, server.answer(messages))
            else:
                getattr(self, f"_{fault}")(server, request)
        finally:
            with server.lock:
                server.at_once -= 1

    def _rate_limit(self, server: FaultyServer, request: dict[str, Any]) -> None:
        self.send_json(429, {"error": {"message": "too many requests"}}, {"Retry-After": server.retry_after})

    def _server_error(self, server: FaultyServer, request: dict[str, Any]) -> None:
        self.send_json(500, {"error": {"message": "internal error"}})

    def _reset(self, server: FaultyServer, request: dict[str, Any]) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()  # with this option: a reset, not an end

    def _hang(self, server: FaultyServer, request: dict[str, Any]) -> None:
        time.sleep(server.hang)
        self.close_connection = True

    def _malformed(self, server: FaultyServer, request: dict[str, Any]) -> None:
        self.send_bytes(200, b'{"id": "x", "choices": [{"mess')

    def _wrong_schema(self, server: FaultyServer, request: dict[str, Any]) -> None:
        self.send_json(200, {"id": "x", "object": "chat.completion", "choices": [{"text": "old style"}]})

    def _empty(self, server: FaultyServer, request: dict[str, Any]) -> None:
        self.send_answer(request, "")
